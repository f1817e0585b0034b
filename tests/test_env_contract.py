"""Every registered env keeps the contracts of Gymnasium, of Stable-Baselines3 and our own.

A new env is covered by existing: the tests run over all specs in ``gym.registry`` with our namespace. Run alone
with ``pytest tests/test_env_contract.py``. The second half breaks envs and oracles on purpose and sees that
``prefenv.testing`` notices.
"""

from __future__ import annotations

import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

import prefenv
from prefenv.envs import FlowEnv, FlowVectorEnv
from prefenv.errors import PrefenvError
from prefenv.flow import RectifiedFlow
from prefenv.networks import GaussianVelocity
from prefenv.oracle import Oracle, ScriptedOracle
from prefenv.tasks.shapes import Shapes
from prefenv.testing import ContractError, check_oracle, check_vector_env

SPECS = [spec for spec in gym.registry.values() if spec.namespace == "prefenv"]
# What the checkers may warn of, and why it is meant so. Any other warning fails.
ALLOWED = {
    "gymnasium": {
        "For Box action spaces, we recommend using a symmetric and normalized space": (
            "the action is the next state, in the unit of the data: a box of +-1 would cut shapes off"
        ),
    },
    "sb3": {
        "We recommend you to use a symmetric and normalized Box action space": (
            "the same, in Stable-Baselines3's words"
        ),
    },
}
# A U-Net, and clouds of 400 points; the fast tests of conditions are in test_conditions.py.
SLOW = ("prefenv/Digits-v0", "prefenv/Clouds-v0")
every_spec = pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=pytest.mark.slow if s.id in SLOW else (), id=s.id) for s in SPECS],
)
every_control = pytest.mark.parametrize("control", ["state", "noise"])
every_array = pytest.mark.parametrize("array", ["numpy", "torch"])


def started(observation):
    """``reset``'s options that start a vector env as another one did."""
    options = {"noise": observation["x"]}
    if "condition" in observation:
        options["condition"] = observation["condition"]
    return options


def by_the_reference(env, observation):
    """Actions that make shapes, so that judgements differ from row to row."""
    if env.unwrapped.control == "noise":
        x = observation["x"]
        return x.copy() if isinstance(x, np.ndarray) else x.clone()
    return env.unwrapped.reference.predict(observation, deterministic=True)[0]


def run_checker(name, check):
    """Run a checker; every warning must be listed, and every listed one must come."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check()
    texts = [str(w.message) for w in caught]
    assert [t for t in texts if not any(known in t for known in ALLOWED[name])] == []
    assert [known for known in ALLOWED[name] if not any(known in t for t in texts)] == []


# Every registered env


def test_importing_registers():
    gym.register_envs(prefenv)
    assert "prefenv/Shapes-v0" in {spec.id for spec in SPECS}
    gym.make("prefenv:prefenv/Shapes-v0").close()


@every_spec
@every_control
def test_gymnasium_check_env(spec, control):
    env = gym.make(spec.id, control=control, disable_env_checker=True)
    run_checker("gymnasium", lambda: gymnasium_check_env(env.unwrapped))


@every_spec
@every_control
def test_sb3_check_env(spec, control):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = gym.make(spec.id, control=control, render_mode="rgb_array", disable_env_checker=True)
    run_checker("sb3", lambda: checker.check_env(env.unwrapped, skip_render_check=False))


@every_spec
@every_control
@every_array
@pytest.mark.parametrize("act", [None, by_the_reference], ids=["any-action", "reference"])
def test_check_vector_env(spec, control, array, act):
    check_vector_env(
        lambda n: gym.make_vec(spec.id, num_envs=n, control=control, array=array, steps=4),
        lambda: gym.make(spec.id, control=control, steps=4),
        act=act,
    )


@every_spec
def test_check_vector_env_with_kl_panels_and_pictures(spec):
    check_vector_env(
        lambda n: gym.make_vec(spec.id, num_envs=n, kl_coef=0.1, steps=4),
        lambda: gym.make(spec.id, kl_coef=0.1, steps=4),
    )
    for mode in ("rgb_array", "ansi", "human"):
        check_vector_env(
            lambda n, mode=mode: gym.make_vec(
                spec.id, num_envs=n, panel_size=2, steps=2, render_mode=mode
            ),
            num_envs=2,
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
@every_spec
@every_control
@every_array
def test_check_vector_env_on_cuda(spec, control, array):
    check_vector_env(
        lambda n: gym.make_vec(spec.id, num_envs=n, control=control, array=array, device="cuda"),
        lambda: gym.make(spec.id, control=control, device="cuda"),
        act=by_the_reference,
    )


def same(one, other):
    """Nested data is equal, bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, np.ndarray) and one.dtype == object:
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and np.array_equal(one, other)


@every_spec
@every_control
@pytest.mark.parametrize("rows", [0, 4], ids=["single", "vector"])
def test_determinism_rollout(spec, control, rows):
    """Two envs with one seed stay equal for 50 steps, and reset() in between draws the same new noises."""
    settings = {"control": control}
    envs = [
        gym.make_vec(spec.id, num_envs=rows, **settings) if rows else gym.make(spec.id, **settings)
        for _ in range(2)
    ]
    one, other = [env.reset(seed=7) for env in envs]
    assert same(one[0], other[0])
    envs[0].action_space.seed(7)
    starts = [one[0]["x"]]
    for _ in range(50):
        action = envs[0].action_space.sample()
        one, other = [env.step(action) for env in envs]
        for mine, theirs in zip(one, other, strict=True):
            assert same(mine, theirs)
        if not rows and one[2]:
            one, other = [env.reset() for env in envs]
            assert same(one[0], other[0])
            starts.append(one[0]["x"])
        elif rows and one[2].all():
            starts.append(one[0]["x"])
    assert len(starts) == (51 if control == "noise" else 4)
    assert len({start.tobytes() for start in starts}) == len(starts)


@every_spec
def test_the_single_env_can_be_pickled_and_closed_twice(spec):
    env = gym.make(spec.id, steps=3)
    start, _ = env.reset(seed=1)
    action, _ = env.unwrapped.reference.predict(start, deterministic=True)
    env.step(action)
    twin = pickle.loads(pickle.dumps(env))
    for _ in range(2):
        mine, theirs = env.step(action), twin.step(action)
        assert same(mine[0], theirs[0])
        assert mine[1:3] == theirs[1:3]
    assert same(env.reset()[0], twin.reset()[0])
    for each in (env, env.unwrapped, twin):
        each.close()
        each.close()


@every_spec
def test_the_spec_survives_json(spec):
    oracle = prefenv.make_task(spec.kwargs["task"]).default_oracle + ":answer=choose"
    env = gym.make(spec.id, oracle=oracle, control="noise", kernel="ode")
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.control == "noise"
    assert again.unwrapped.reference.kernel.name == "ode"
    vector = gym.make_vec(spec.id, num_envs=4, panel_size=2)
    assert EnvSpec.from_json(vector.spec.to_json()).kwargs["panel_size"] == 2


@every_spec
@every_control
def test_the_vector_env_is_a_sync_vector_env_of_singles(spec, control):
    n = 3
    sync = SyncVectorEnv(
        [lambda: gym.make(spec.id, control=control)] * n, autoreset_mode=AutoresetMode.SAME_STEP
    )
    vector = gym.make_vec(spec.id, num_envs=n, control=control)
    assert vector.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"]
    for kind in ("observation_space", "action_space"):
        assert getattr(vector, kind) == getattr(sync, kind)
    theirs, _ = sync.reset(seed=3)
    mine, _ = vector.reset(options=started(theirs))
    for _ in range(2):
        done = False
        while not done:
            assert same(mine, theirs)
            action = by_the_reference(vector, mine)
            mine, my_reward, my_end, my_cut, my_info = vector.step(action)
            theirs, reward, end, cut, info = sync.step(action)
            np.testing.assert_allclose(my_reward, reward, rtol=1e-4, atol=1e-6)
            assert same(my_end, end)
            assert same(my_cut, cut)
            done = end.all()
        for key in ("final_obs", "_final_obs", "_final_info"):
            for a, b in zip(my_info[key], info[key], strict=True):
                if key == "final_obs":
                    np.testing.assert_allclose(a["x"], b["x"], rtol=1e-4, atol=1e-5)
                    assert same(a["t"], b["t"])
                else:
                    assert a == b
        for key, values in my_info["final_info"].items():
            assert same(values, info["final_info"][key].astype(values.dtype))
        mine, _ = vector.reset(options=started(theirs))


@every_spec
def test_gymnasiums_vector_wrappers(spec):
    env = RecordEpisodeStatistics(gym.make_vec(spec.id, num_envs=3))
    observation, _ = env.reset(seed=0)
    total = np.zeros(3)
    for step in range(32):
        observation, reward, end, _, info = env.step(by_the_reference(env, observation))
        total += reward
        assert ("episode" in info) == end.all() == (step % 16 == 15)
        if end.all():
            np.testing.assert_array_equal(info["episode"]["l"], 16)
            np.testing.assert_allclose(info["episode"]["r"], total)
            total[:] = 0
    assert env.episode_count == 6

    env = DictInfoToList(gym.make_vec(spec.id, num_envs=3, control="noise"))
    env.reset(seed=0)
    infos = env.step(env.action_space.sample())[-1]
    assert len(infos) == 3
    assert all(info["judged"] and info["final_info"]["judged"] for info in infos)


@every_spec
@pytest.mark.parametrize("mode", ["rgb_array", "human", "ansi"])
def test_every_render_mode_works_without_a_screen(spec, mode):
    env = gym.make(spec.id, render_mode=mode)
    vector = gym.make_vec(spec.id, num_envs=2, render_mode=mode)
    assert set(env.metadata["render_modes"]) == {"rgb_array", "human", "ansi"}
    assert env.metadata["render_fps"] > 0
    observation, _ = env.reset(seed=0)
    vector.reset(seed=0)
    env.step(observation["x"])
    frame, frames = env.render(), vector.render()
    if mode == "human":
        assert frame is None
        assert frames is None
    else:
        assert isinstance(frames, tuple)
        assert len(frames) == 2
        for picture in (frame, *frames):
            assert isinstance(picture, np.ndarray if mode == "rgb_array" else str)
    if mode == "rgb_array":
        assert frame.dtype == np.uint8
        assert frame.ndim == 3
        assert frame.shape[2] == 3
        assert frame.std() > 0
        assert not np.array_equal(*frames)
    env.close()
    vector.close()


@every_spec
def test_ppo_of_stable_baselines3_runs(spec):
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO(
        "MultiInputPolicy", gym.make(spec.id), n_steps=32, batch_size=32, n_epochs=1, device="cpu"
    )
    model.learn(64)
    assert model.num_timesteps == 64
    assert len(model.ep_info_buffer) == 4


# prefenv.testing notices broken envs

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


# prefenv.testing notices broken oracles


class Sound(ScriptedOracle):
    """Closeness to the origin."""

    def score(self, samples):
        return -samples.square().flatten(1).mean(1)


class PairsOnly(Oracle):
    panel_size = 2

    def judge(self, panels):
        size = panels.flatten(2).norm(dim=2)
        return torch.where(size == size.amin(1, keepdim=True), 1.0, torch.nan)


class Flat(Sound):
    def judge(self, panels):
        return super().judge(panels).flatten()


class Whole(Sound):
    def judge(self, panels):
        return super().judge(panels).long()


class Listed(Sound):
    def judge(self, panels):
        return super().judge(panels).tolist()


class Infinite(Sound):
    def judge(self, panels):
        return super().judge(panels) / 0


class Meddling(Sound):
    def judge(self, panels):
        panels -= panels.mean()
        return super().judge(panels)


class FirstOfPanel(Sound):
    def judge(self, panels):
        return super().judge(panels) - torch.arange(panels.shape[1])


class FirstOfBatch(Sound):
    def judge(self, panels):
        return super().judge(panels) - torch.arange(len(panels))[:, None]


class BatchNormalised(Sound):
    def judge(self, panels):
        score = super().judge(panels)
        return score - score.mean()


class Moody(Sound):
    def judge(self, panels):
        score = super().judge(panels)
        return score + 0.1 * torch.randn(score.shape)


class Detached(Sound):
    def score(self, samples):
        return super().score(samples.detach())


class HalfDetached(Sound):
    def score(self, samples):
        return super().score(samples) + super().score(samples.detach())


class InfiniteSlope(Sound):
    def score(self, samples):
        return super().score(samples) + (samples - samples).abs().sqrt().flatten(1).sum(1)


class SlopedPairs(Sound):
    panel_size = 2


class ScoresInColumns(Sound):
    differentiable = False

    def judge(self, panels):
        return super().score(panels.flatten(0, 1)).view(panels.shape[:2])

    def score(self, samples):
        return super().score(samples)[:, None]


class NoThreshold(Sound):
    threshold = float("nan")


class EmptyPanels(Sound):
    panel_size = 0


@pytest.fixture
def shapes():
    return TASK.data(12, torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("answer", ["score", "choose", "best"])
def test_check_oracle_passes_our_own(answer, shapes):
    check_oracle(prefenv.make_oracle(f"s-curve:answer={answer}", TASK), shapes, low=0, high=1)
    check_oracle(Sound(TASK, answer), shapes)
    check_oracle(PairsOnly(TASK), shapes, low=1, high=1)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Flat, r"must return \(12, 1\), not \(12,\)"),
        (Whole, "must be floating, not torch.int64"),
        (Listed, "must return a tensor, not list"),
        (Infinite, r"must be NaN \(no answer\) or in"),
        (Meddling, "judge\\(\\) changed the samples"),
        (FirstOfPanel, "depend on the order within a panel"),
        (FirstOfBatch, "depend on the order of the panels"),
        (BatchNormalised, "judged differently beside other panels"),
        (Moody, "set nondeterministic = True"),
        (Detached, "carries no gradient"),
        (HalfDetached, "disagrees with finite differences"),
        (InfiniteSlope, "NaN or infinite"),
        (SlopedPairs, "panel_size None or 1"),
        (ScoresInColumns, "one finite value per sample"),
        (NoThreshold, "threshold must be a finite number"),
        (EmptyPanels, "panel_size must be a positive int"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_check_oracle_catches(cls, message, shapes):
    with pytest.raises(ContractError, match=message):
        check_oracle(cls(TASK), shapes)


def test_check_oracle_checks_the_range_and_wants_enough_samples(shapes):
    with pytest.raises(ContractError, match=r"or in \[0, 1\]"):
        check_oracle(Sound(TASK), shapes, low=0, high=1)
    with pytest.raises(ContractError, match="two panels, 4 samples"):
        check_oracle(PairsOnly(TASK), shapes[:3])


def test_check_oracle_lets_moody_oracles_be(shapes):
    moody = Moody(TASK)
    moody.nondeterministic, moody.differentiable = True, False
    check_oracle(moody, shapes)
