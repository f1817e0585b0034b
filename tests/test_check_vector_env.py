"""``check_vector_env`` notices envs that are broken on purpose, and passes sound ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from prefenv.envs import FlowEnv, FlowVectorEnv
from prefenv.errors import PrefenvError
from prefenv.flow import RectifiedFlow
from prefenv.networks import GaussianVelocity
from prefenv.tasks.shapes import Shapes
from prefenv.testing import ContractError, check_vector_env

TASK = Shapes()


def small(cls, n=4, **settings):
    """An env with a closed-form reference and three steps."""
    settings = {"kl_coef": 0.01, "steps": 3, "device": "cpu", **settings}
    flow = RectifiedFlow(GaussianVelocity(0.0, 0.5, TASK.event_shape))
    return cls(n, reference=flow, **settings)


class Changed(FlowVectorEnv):
    """Changes what reset and step return."""

    def observe(self, observation):
        return observation

    def outcome(self, reward, terminated, truncated, info):
        return reward, terminated, truncated, info

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        return self.observe(observation), info

    def step(self, actions):
        observation, *rest = super().step(actions)
        return self.observe(observation), *self.outcome(*rest)


class WrongDtype(Changed):
    def observe(self, observation):
        return {**observation, "x": observation["x"].astype(np.float64)}


class WrongShape(Changed):
    def observe(self, observation):
        return {**observation, "t": observation["t"][:, 0]}


class MissingKey(Changed):
    def observe(self, observation):
        return {"x": observation["x"]}


class OutsideItsSpace(Changed):
    def observe(self, observation):
        return {**observation, "t": observation["t"] + 1.0}


class ReusedBuffer(Changed):
    buffer = None

    def observe(self, observation):
        self.buffer = self.buffer if self.buffer is not None else observation["x"]
        self.buffer[:] = observation["x"]
        return {**observation, "x": self.buffer}


class ListOfRewards(Changed):
    def outcome(self, reward, *rest):
        return list(reward), *rest


class ColumnOfRewards(Changed):
    def outcome(self, reward, *rest):
        return reward[:, None], *rest


class WholeRewards(Changed):
    def outcome(self, reward, *rest):
        return reward.astype(int), *rest


class NaNReward(Changed):
    def outcome(self, reward, *rest):
        return reward * np.nan, *rest


class DoneAsNumbers(Changed):
    def outcome(self, reward, terminated, *rest):
        return reward, terminated.astype(np.float32), *rest


class NoFinalObs(Changed):
    def outcome(self, *rest):
        rest[-1].pop("final_obs", None)
        return rest


class NoFinalInfo(Changed):
    def outcome(self, *rest):
        rest[-1].pop("final_info", None)
        return rest


class NoMask(Changed):
    def outcome(self, *rest):
        rest[-1].pop("_final_obs", None)
        return rest


class ForgetsClipped(Changed):
    def outcome(self, *rest):
        rest[-1].pop("clipped", None)
        return rest


class NeverEnds(Changed):
    def outcome(self, reward, terminated, truncated, info):
        return reward, truncated, truncated, {}


class FinalIsShown(FlowVectorEnv):
    def step(self, actions):
        observation, *rest = super().step(actions)
        if rest[1].all():
            final = rest[-1]["final_obs"]
            observation = {k: np.stack([row[k] for row in final]) for k in observation}
        return observation, *rest


class NextStep(FlowVectorEnv):
    """Gymnasium's default: a finished row is reset by the next step."""

    over = False

    def step(self, actions):
        if self.over:
            self.over = False
            zeros = np.zeros(self.num_envs)
            return self.reset()[0], zeros, zeros.astype(bool), zeros.astype(bool), {}
        observation, *rest, info = super().step(actions)
        self.over = bool(rest[1].all())
        if self.over:
            final = info["final_obs"]
            observation = {k: np.stack([row[k] for row in final]) for k in observation}
        return observation, *rest, {"clipped": info["clipped"]}


class SaysNextStep(NextStep):
    metadata = {**FlowVectorEnv.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}


class NotSeeded(FlowVectorEnv):
    def begin(self, noise=None, condition=None):
        shape = (self.num_envs, *self.task.event_shape)
        fresh = np.random.default_rng().standard_normal(shape, np.float32)
        return super().begin(fresh if noise is None else noise)


class SeedsTheWorld(FlowVectorEnv):
    def reset(self, *, seed=None, options=None):
        if seed is not None:
            torch.manual_seed(seed)
        return super().reset(seed=seed, options=options)

    def begin(self, noise=None, condition=None):
        shape = (self.num_envs, *self.task.event_shape)
        return super().begin(torch.randn(shape) if noise is None else noise)


class OneSeedForAll(FlowVectorEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed if seed is None else 5, options=options)


class SeedsEveryReset(FlowVectorEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=0 if seed is None else seed, options=options)


class EqualRows(FlowVectorEnv):
    def begin(self, noise=None, condition=None):
        x, _ = super().begin(noise)
        return super().begin(x[:1].expand_as(x))


class SharedState(FlowVectorEnv):
    made = 0

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        SharedState.made += 1
        self.offset = 1e-3 * SharedState.made

    def advance(self, action):
        state, reward = super().advance(action)
        return state, reward + self.offset


class ShowsItsState(FlowVectorEnv):
    """The observation is a view of the state: writing into it moves the row."""

    def _observation(self, x, i):
        return {**super()._observation(x, i), "x": x.flatten(1).numpy()}


class KeepsTheAction(FlowVectorEnv):
    """The state is the caller's array."""

    def advance(self, action):
        state, reward = super().advance(action)
        if self._x is not None:
            self._x = torch.as_tensor(action).view_as(state)
        return state, reward


class NotPicklable(FlowVectorEnv):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.hook = lambda: None


class PickleForgets(FlowVectorEnv):
    def __setstate__(self, state):
        self.__dict__.update(state)
        self.seed_noise(0)


class ClosesOnce(FlowVectorEnv):
    def close(self, **kwargs):
        if self.closed:
            raise RuntimeError("closed already")
        super().close()


class WrongRows(FlowVectorEnv):
    def __init__(self, n, **settings):
        super().__init__(n + 1, **settings)


class UnbatchedSpace(FlowVectorEnv):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.action_space = self.single_action_space


class ListOfFrames(FlowVectorEnv):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings, render_mode="ansi")

    def render(self):
        return list(super().render())


BROKEN = [
    (WrongDtype, "dtype float64, its space float32"),
    (WrongShape, r"shape \(4,\), its space \(4, 1\)"),
    (MissingKey, "must be a dict with keys"),
    (OutsideItsSpace, r"\['t'\] lies outside its space"),
    (ReusedBuffer, r"was changed by a later call: return a new array"),
    (ListOfRewards, "reward of step 1 must be an array of 4 floating"),
    (ColumnOfRewards, "reward of step 1 must be an array of 4 floating"),
    (WholeRewards, "reward of step 1 must be an array of 4 floating"),
    (NaNReward, "not finite; no answer counts 0"),
    (DoneAsNumbers, "terminated of step 1 must be an array of 4 bool"),
    (NoFinalObs, "info must hold 'final_obs'"),
    (NoFinalInfo, "info must hold 'final_info'"),
    (NoMask, "a mask '_final_obs'"),
    (ForgetsClipped, r"info lacks \['clipped'\]"),
    (NeverEnds, "not every row ended in 30 steps"),
    (FinalIsShown, "its observation is the final one"),
    (NextStep, "info must hold 'final_obs'"),
    (SaysNextStep, "must be AutoresetMode.SAME_STEP"),
    (NotSeeded, "draw everything from self.np_random"),
    (SeedsTheWorld, "torch's global generator"),
    (OneSeedForAll, "another seed gave the same first observation"),
    (SeedsEveryReset, "seed only when a seed is given"),
    (EqualRows, "rows start alike"),
    (SharedState, "must not share state"),
    (ShowsItsState, "overwriting what was returned, or a used action, changed the env"),
    (KeepsTheAction, "overwriting what was returned, or a used action, changed the env"),
    (NotPicklable, "cannot be pickled"),
    (PickleForgets, "a pickled env went on differently"),
    (ClosesOnce, "closing twice must be harmless"),
    (WrongRows, "asked for 4 rows, num_envs says 5"),
    (UnbatchedSpace, "action_space is not batch_space"),
    (ListOfFrames, "must return a tuple of 4 frames"),
]


def small_single(cls=FlowEnv, **settings):
    def make():
        flow = RectifiedFlow(GaussianVelocity(0.0, 0.5, TASK.event_shape))
        return cls(reference=flow, **{"kl_coef": 0.01, "steps": 3, "device": "cpu", **settings})

    return make


def test_check_vector_env_passes_a_sound_env():
    check_vector_env(lambda n: small(FlowVectorEnv, n), small_single(), max_steps=30)


@pytest.mark.parametrize(("cls", "message"), BROKEN, ids=lambda x: getattr(x, "__name__", None))
def test_check_vector_env_catches(cls, message):
    with pytest.raises(ContractError, match=message) as caught:
        check_vector_env(lambda n: small(cls, n), small_single(), max_steps=30)
    assert isinstance(caught.value, PrefenvError)


class OtherReward(FlowEnv):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + 0.01, *rest


class ArrayReward(FlowEnv):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, np.float32(reward), *rest


class OtherObservation(FlowEnv):
    def step(self, action):
        observation, *rest = super().step(action)
        return {**observation, "x": observation["x"] * 0.9}, *rest


class OtherSeed(FlowEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else seed + 1, options=options)


class IgnoresNoise(FlowEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


class OtherInfo(FlowEnv):
    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "clipped": 9999}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (OtherReward, r"\(reward, terminated, truncated\) in step 1 \[0\] of row 0 differs"),
        (ArrayReward, "reward must be a float"),
        (OtherObservation, "the observation in step 1"),
        (OtherSeed, "the first observation"),
        (IgnoresNoise, "the first observation"),
        (OtherInfo, "info in step 1"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_check_vector_env_catches_an_unequal_single_env(cls, message):
    with pytest.raises(ContractError, match=message):
        check_vector_env(lambda n: small(FlowVectorEnv, n), small_single(cls), max_steps=30)


def test_check_vector_env_catches_other_spaces_and_lengths():
    bigger = small_single(task=Shapes(bound=20.0))
    with pytest.raises(ContractError, match="spaces are not single_observation_space"):
        check_vector_env(lambda n: small(FlowVectorEnv, n), bigger, max_steps=30)
    shorter = small_single(steps=2)
    with pytest.raises(ContractError, match="in step 1"):
        check_vector_env(lambda n: small(FlowVectorEnv, n), shorter, max_steps=30)


def test_check_vector_env_lets_nondeterministic_envs_be():
    check_vector_env(lambda n: small(NotSeeded, n), max_steps=30, nondeterministic=True)
