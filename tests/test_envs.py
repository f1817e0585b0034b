"""The environment does what it says: rewards, KL cost, clipping, budget, ledger and panels, with known answers."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

from prefenv.envs import FlowEnv, FlowVectorEnv
from prefenv.errors import (
    BudgetSpentError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    UnknownNameError,
)
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.networks import GaussianVelocity, VelocityField
from prefenv.oracle import Oracle
from prefenv.registry import make_oracle
from prefenv.rollout import collect
from prefenv.tasks.shapes import Shapes

TASK = Shapes()
D = 128


class Recorder(Oracle):
    """Judges by the first coordinate, and keeps what it was shown."""

    def __init__(self):
        super().__init__(TASK)
        self.seen = []

    def judge(self, panels):
        self.seen.append(panels.clone())
        return panels.flatten(2)[..., 0].clone()


class Silent(Oracle):
    """Answers for the first sample of each panel only."""

    def judge(self, panels):
        answer = torch.full(panels.shape[:2], torch.nan)
        answer[:, 0] = 0.75
        return answer


class PairsOnly(Recorder):
    panel_size = 2


class NaNField(VelocityField):
    """A damaged network."""

    def forward(self, x, t, condition=None):
        return x * torch.nan


def gaussian(mean=0.0, std=0.5):
    """A reference whose velocity is a closed form."""
    return RectifiedFlow(GaussianVelocity(mean, std, TASK.event_shape))


def vector(num_envs=4, **settings):
    return FlowVectorEnv(
        num_envs, **{"reference": gaussian(), "steps": 4, "device": "cpu", **settings}
    )


def single(**settings):
    return FlowEnv(**{"reference": gaussian(), "steps": 4, "device": "cpu", **settings})


def noises(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


def play(env, policy=None):
    """One episode of the deterministic reference, or of ``policy(observation)``, from where the env is."""
    observation = env._observation(env._x, env._i)
    while True:
        action = (
            policy(observation)
            if policy
            else env.reference.predict(observation, None, None, True)[0]
        )
        step = env.step(action)
        observation = step[0]
        if step[2].all():
            return step


# Rewards


def test_the_reward_is_the_score_of_the_finished_sample_and_0_before():
    env = gym.make_vec("prefenv/Shapes-v0", num_envs=32)
    observation, info = env.reset(seed=0)
    assert info == {}
    for i in range(16):
        u = i / 16  # the shapes task walks the grid of shift 2
        np.testing.assert_allclose(observation["t"], u / (2 - u), rtol=1e-6)
        action, _ = env.unwrapped.reference.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, info = env.step(action)
        assert not truncated.any()
        assert terminated.all() == (i == 15)
        if i < 15:
            np.testing.assert_array_equal(observation["x"], action)
            np.testing.assert_array_equal(reward, 0)
            assert "judged" not in info
    score = make_oracle("s-curve", TASK).score(torch.as_tensor(action).view(32, 64, 2))
    np.testing.assert_allclose(reward, score, rtol=1e-5)
    assert score.max() > 0.3 > 0.1 > score.min()  # model A makes both
    assert info["judged"].all()
    final = np.stack([row["x"] for row in info["final_obs"]])
    np.testing.assert_array_equal(final, action)
    np.testing.assert_array_equal([row["t"] for row in info["final_obs"]], np.ones((32, 1)))
    np.testing.assert_array_equal(observation["t"], 0)


def test_noise_control_is_the_reference_ode_from_the_action():
    latent = noises(6)
    one = vector(6, control="noise", steps=16)
    one.reset(seed=0)
    _, reward, terminated, _, info = one.step(latent)
    assert terminated.all()
    sample = one.reference.sample(torch.as_tensor(latent).view(6, 64, 2))
    np.testing.assert_allclose(reward, make_oracle("s-curve", TASK).score(sample), rtol=1e-5)
    many = vector(6, steps=16)
    many.reset(seed=1, options={"noise": latent})
    _, same, *_, there = play(many)
    np.testing.assert_allclose(reward, same, rtol=1e-4)
    for mine, other in zip(info["final_obs"], there["final_obs"], strict=True):
        np.testing.assert_allclose(mine["x"], other["x"], rtol=1e-4, atol=1e-5)


def test_no_answer_is_reward_0_and_not_judged():
    env = vector(4, oracle=Silent(TASK), panel_size=2)
    env.reset(seed=0)
    _, reward, _, _, info = play(env)
    np.testing.assert_array_equal(reward, [0.75, 0, 0.75, 0])
    np.testing.assert_array_equal(info["judged"], [True, False, True, False])
    np.testing.assert_array_equal(info["final_info"]["judged"], info["judged"])


def test_panels_are_rows_that_follow_each_other():
    oracle = Recorder()
    env = vector(6, oracle=oracle, panel_size=3)
    env.reset(seed=0)
    _, reward, _, _, info = play(env)
    final = np.stack([row["x"] for row in info["final_obs"]])
    (panels,) = oracle.seen
    assert panels.shape == (2, 3, 64, 2)
    for i in range(2):
        np.testing.assert_array_equal(panels[i].flatten(1), final[3 * i : 3 * i + 3])
    np.testing.assert_array_equal(reward, final[:, 0])
    pairs = torch.arange(6.0).view(6, 1, 1).expand(6, 64, 2)
    np.testing.assert_array_equal(env.judge(pairs), range(6))
    with pytest.raises(ConfigError, match="do not fill panels of 3"):
        env.judge(pairs[:4])


def test_equal_noises_give_equal_rows():
    env = vector(4)
    observation, _ = env.reset(seed=0, options={"noise": np.repeat(noises(1), 4, 0)})
    np.testing.assert_array_equal(observation["x"], np.repeat(noises(1), 4, 0))
    _, reward, _, _, info = play(env)
    assert len({row["x"].tobytes() for row in info["final_obs"]}) == 1
    assert len(set(reward)) == 1
    in_points = noises(4).reshape(4, 64, 2)
    observation, _ = env.reset(options={"noise": in_points})
    np.testing.assert_array_equal(observation["x"], noises(4))


def test_one_seed_gives_one_row_and_one_env_the_same_noise():
    batch, row = vector(1), single()
    for seed in (3, None, None):
        mine, theirs = batch.reset(seed=seed)[0], row.reset(seed=seed)[0]
        np.testing.assert_array_equal(mine["x"][0], theirs["x"])
    noise = noises(1)[0]
    np.testing.assert_array_equal(row.reset(options={"noise": noise})[0]["x"], noise)
    assert not np.array_equal(vector(1).reset()[0]["x"], vector(1).reset()[0]["x"])


# KL cost


GRID = [0, 1 / 7, 1 / 3, 3 / 5, 1]  # u / (2 - u) at u = i / 4: the shapes task's grid of 4 steps


def by_hand(x, i, level):
    """Mean and std of a ``flow-sde`` step of ``gaussian()``, written out."""
    t, h = GRID[i], GRID[i + 1] - GRID[i]
    v = (t * 0.25 - (1 - t)) / ((1 - t) ** 2 + 0.25 * t**2) * x
    sigma2 = level**2 * (1 - t) / (t or h)
    return x + h * (v + sigma2 / 2 * (t * v - x) / (1 - t)), np.sqrt(sigma2 * h)


@pytest.mark.parametrize(("kernel", "level"), [("flow-sde", 0.7), ("memoryless", np.sqrt(2))])
@pytest.mark.parametrize("size", [0.5, 20.0], ids=["inside", "clipped"])
def test_kl_coef_is_the_gaussian_path_kl(kernel, level, size):
    """The cost is that of the action as it was given, whose log-probability an agent knows."""
    env = vector(5, kl_coef=0.1, kernel=kernel, oracle=Silent(TASK))
    observation, _ = env.reset(seed=0)
    for i in range(4):
        action = size * noises(5, seed=i)
        mean, std = by_hand(observation["x"].astype(float), i, level)
        expected = -0.1 * (np.square(action - mean).sum(1) / (2 * std**2) - D / 2)
        observation, reward, *_ = env.step(action)
        np.testing.assert_allclose(reward, expected + 0.75 * (i == 3), rtol=2e-5)


def test_the_references_own_steps_cost_nothing_on_average():
    """E |a - m|^2 = D std^2, so the cost's mean is 0; a mean shifted by d costs |d|^2 / (2 std^2)."""
    beta, n = 0.3, 4000
    env = vector(n, kl_coef=beta, oracle=Recorder())
    for shift in (0.0, 0.1):
        x, _ = env.begin()
        cost = torch.zeros(n)
        expected = 0.0
        for i in range(4):
            action, _ = env.reference.act(x, i)
            expected -= beta * D * shift**2 / (2 * env.reference.std(i) ** 2)
            x, reward = env.advance(action + shift)
            cost += reward
        cost -= env.judgement
        error = float(cost.std() / n**0.5)
        assert abs(float(cost.mean()) - expected) < 4 * error
        assert error < 0.1
        assert shift == 0 or expected < -20 * error


def test_kl_of_noise_control_is_to_the_standard_normal():
    env = vector(4, control="noise", kl_coef=0.2, oracle=Silent(TASK), kernel="ode")
    env.reset(seed=0)
    latent = noises(4)
    _, reward, *_ = env.step(latent)
    np.testing.assert_allclose(reward, 0.75 - 0.2 * (np.square(latent).sum(1) - D) / 2, atol=1e-5)


# Clipping and what is not finite


def test_clipped_coordinates_are_counted_row_by_row():
    env = vector(3, steps=3)
    env.reset(seed=0)
    action = np.zeros((3, D), np.float32)
    action[1, :5], action[2, :2], action[0, 0] = 10.5, -1e6, 10.0
    observation, _, _, _, info = env.step(action)
    np.testing.assert_array_equal(info["clipped"], [0, 5, 2])
    np.testing.assert_array_equal(observation["x"], action.clip(-10, 10))
    np.testing.assert_array_equal(env.step(0 * action)[-1]["clipped"], [0, 5, 2])
    info = env.step(action)[-1]
    np.testing.assert_array_equal(info["clipped"], [0, 10, 4])
    np.testing.assert_array_equal(info["final_info"]["clipped"], [0, 10, 4])
    np.testing.assert_array_equal(env.step(0 * action)[-1]["clipped"], 0)
    row = single()
    row.reset(seed=0)
    assert row.step(action[1])[-1]["clipped"] == 5


def test_samples_of_noise_control_stay_inside_the_observation_space():
    """A reference that throws far: its samples are clipped, and counted."""
    env = vector(2, control="noise", reference=gaussian(std=8.0), steps=64)
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.full((2, D), 9.0, np.float32))
    for row in info["final_obs"]:
        assert env.single_observation_space.contains(row)
    np.testing.assert_array_equal(info["clipped"], D)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_an_action_that_is_not_finite_changes_nothing(bad, kl_coef):
    env, twin = vector(2, kl_coef=kl_coef), vector(2, kl_coef=kl_coef)
    first, _ = env.reset(seed=0)
    twin.reset(seed=0)
    action = 0.5 * first["x"].astype(np.float64)
    env.step(action)
    twin.step(action)
    before = env.ledger.counts()
    broken = action.copy()
    broken[1, 7] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity; the state was not changed"):
        env.step(broken)
    assert env.ledger.counts() == before
    mine, theirs = env.step(action), twin.step(action)
    np.testing.assert_allclose(mine[0]["t"], GRID[2], rtol=1e-6)
    np.testing.assert_array_equal(mine[0]["x"], theirs[0]["x"])
    np.testing.assert_array_equal(mine[1], theirs[1])


@pytest.mark.parametrize("control", ["state", "noise"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_damaged_network_is_a_typed_error(control, kl_coef):
    env = vector(
        2, reference=RectifiedFlow(NaNField(TASK.event_shape)), control=control, kl_coef=kl_coef
    )
    observation, _ = env.reset(seed=0)
    if control == "state":
        with pytest.raises(NonFiniteError):
            env.step(env.reference.predict(observation)[0])
        with pytest.raises(NonFiniteError):
            collect(env, env.reference)
    if control == "noise" or kl_coef:
        with pytest.raises(NonFiniteError):
            env.step(observation["x"])
    assert env.ledger.counts()["queries"] == 0
    with pytest.raises(NonFiniteError, match="the noise holds NaN"):
        env.reset(options={"noise": np.full((2, D), np.nan)})


# Budget and ledger


@pytest.mark.parametrize("control", ["state", "noise"])
def test_the_budget_ends_in_the_right_round_and_books_nothing_more(control):
    env = vector(4, max_queries=10, panel_size=2, control=control, kl_coef=0.1)
    env.reset(seed=0)
    for _ in range(2):
        play(env, lambda o: 0.5 * o["x"])
    assert (env.ledger.queries, env.ledger.left) == (8, 2)
    for _ in range(3 if control == "state" else 0):
        env.step(noises(4))
    before, clipped = env.ledger.counts(), env.clipped.clone()
    for _ in range(2):
        with pytest.raises(BudgetSpentError, match="budget of 10 judged samples is spent: 8 were"):
            env.step(100 * noises(4))
        assert env.ledger.counts() == before
        assert torch.equal(env.clipped, clipped)
    env.ledger.max_queries = 12  # the sample is still under way
    assert env.step(noises(4))[2].all()
    assert env.ledger.queries == 12


@pytest.mark.parametrize(
    ("settings", "nfe"),
    [
        ({}, 4),
        ({"kl_coef": 0.1}, 8),
        ({"control": "noise"}, 4),
        ({"control": "noise", "kl_coef": 1.0}, 4),
    ],
)
def test_the_ledger_counts_exactly(settings, nfe):
    env = vector(6, panel_size=3, **settings)
    env.reset(seed=0)
    for rounds in (1, 2, 3):
        play(env, lambda o: 0.5 * o["x"])
        counts = env.ledger.counts()
        assert counts.pop("seconds") == 0
        assert counts == {
            "panels": 2 * rounds,
            "queries": 6 * rounds,
            "gradients": 0,
            "nfe": 6 * nfe * rounds,
        }
    env.judge(torch.zeros(3, 64, 2))
    assert (env.ledger.panels, env.ledger.queries) == (7, 21)


# What comes in


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_envs": 6, "panel_size": 4}, ConfigError, "positive multiple of panel_size=4"),
        ({"num_envs": 0}, ConfigError, "num_envs=0 must be a positive multiple"),
        ({"num_envs": -2}, ConfigError, "num_envs=-2 must be a positive multiple"),
        ({"panel_size": 0}, ConfigError, "multiple of panel_size=0"),
        ({"panel_size": -1}, ConfigError, "multiple of panel_size=-1"),
        ({"control": "velocity"}, ConfigError, "control must be one of"),
        ({"array": "jax"}, ConfigError, "array must be one of"),
        ({"render_mode": "depth"}, ConfigError, "render_mode must be one of"),
        ({"kernel": "flow-sd"}, UnknownNameError, "unknown kernel 'flow-sd'"),
        ({"oracle": "s-curv"}, UnknownNameError, "did you mean 's-curve'"),
        ({"oracle": "s-curve:answer=guess"}, ConfigError, "answer must be one of"),
        ({"oracle": Recorder}, ConfigError, "a name or an Oracle, not <class"),
        ({"task": "shape"}, UnknownNameError, "did you mean 'shapes'"),
        ({"steps": 0}, ConfigError, "steps must be at least 1"),
        ({"max_queries": 0}, ConfigError, "give at least 1"),
        ({"kl_coef": -0.1}, ConfigError, "kl_coef must be finite and at least 0"),
        ({"kl_coef": float("nan")}, ConfigError, "kl_coef must be finite"),
        ({"kl_coef": float("inf")}, ConfigError, "kl_coef must be finite"),
        ({"kl_coef": 0.1, "kernel": "ode"}, ConfigError, "noise at every step"),
        ({"kl_coef": 0.1, "kernel": "cps"}, ConfigError, "noise at every step"),
        (
            {"kl_coef": 0.1, "kernel": Kernel(window=(0.0, 0.5))},
            ConfigError,
            "noise at every step",
        ),
        pytest.param(
            {"oracle": PairsOnly()}, ConfigError, "set panel_size=2, not 1", id="pairs-only"
        ),
        (
            {"reference": RectifiedFlow(GaussianVelocity(0.0, 1.0, (3,)))},
            ConfigError,
            r"samples of shape \(3,\), task 'shapes' has \(64, 2\)",
        ),
        ({"reference": None, "checkpoint": "no.safetensors"}, CheckpointError, "no checkpoint at"),
        ({"device": "gpu"}, ConfigError, "is no device"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        vector(**settings)


def test_the_single_env_refuses_what_belongs_to_the_batch():
    for settings in ({"num_envs": 2}, {"panel_size": 4}, {"array": "torch"}):
        with pytest.raises(ConfigError, match="belongs to the batched env: use gym.make_vec"):
            gym.make("prefenv/Shapes-v0", **settings)
    single(num_envs=1, panel_size=1, array="numpy").close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_without_cuda_is_a_clear_error():
    with pytest.raises(ConfigError, match="torch sees no CUDA here; use cpu"):
        vector(device="cuda")


@pytest.mark.parametrize("shape", [(4,), (D,), (4, D - 1), (3, D), (D, 4), (4, 2, 64), (1, 4, D)])
def test_noises_and_actions_of_another_shape_are_refused(shape):
    env = vector(4)
    with pytest.raises(ConfigError, match=r"noise has shape .* expected \(4, 128\)"):
        env.reset(options={"noise": np.zeros(shape)})
    env.reset(seed=0)
    with pytest.raises(ConfigError, match=r"action has shape .* expected \(4, 128\)"):
        env.step(np.zeros(shape))
    np.testing.assert_allclose(env.step(np.zeros((4, D)))[0]["t"], GRID[1], rtol=1e-6)


def test_calls_out_of_order_and_unknown_options_are_refused():
    env, row = vector(2, render_mode="ansi"), single()
    with pytest.raises(ConfigError, match=r"call reset\(\) before step\(\)"):
        env.step(np.zeros((2, D)))
    with pytest.raises(ConfigError, match=r"call reset\(\) before render\(\)"):
        env.render()
    for each in (env, row):
        with pytest.raises(ConfigError, match="unknown reset option 'nois'"):
            each.reset(options={"nois": 0})
    row.reset(seed=0)
    while not row.step(np.zeros(D, np.float32))[2]:
        pass
    with pytest.raises(ConfigError, match=r"call reset\(\) before step\(\)"):
        row.step(np.zeros(D))


def test_actions_may_be_lists_read_only_or_carry_gradients():
    env, policy = vector(2), torch.nn.Parameter(torch.zeros(2, D))
    read_only = np.broadcast_to(np.float32(0.5), (2, D))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(seed=0)
        for action in (read_only, read_only[:, ::-1], [[0.5] * D] * 2, policy + 0.5):
            observation, *_ = env.step(action)
            if action is read_only:
                np.testing.assert_array_equal(observation["x"], 0.5)
    torch_env = vector(2, array="torch", kl_coef=0.1)
    torch_env.reset(seed=0)
    observation, reward, *_ = torch_env.step(policy + 0.5)
    assert not observation["x"].requires_grad
    assert not reward.requires_grad


# What goes out


@pytest.mark.parametrize("control", ["state", "noise"])
def test_torch_arrays_stay_tensors(control):
    env, twin = vector(2, array="torch", control=control), vector(2, control=control)
    observation, _ = env.reset(seed=0)
    numbers, _ = twin.reset(seed=0)
    assert observation["x"].device == env.device
    done = False
    while not done:
        observation, reward, terminated, truncated, info = env.step(0.5 * observation["x"])
        numbers, value, *_ = twin.step(0.5 * numbers["x"])
        flags = (terminated, truncated)
        assert all(isinstance(v, torch.Tensor) for v in (*observation.values(), reward, *flags))
        assert all(v.dtype == torch.bool for v in flags)
        assert observation["x"].dtype == observation["t"].dtype == torch.float32
        np.testing.assert_array_equal(observation["x"], numbers["x"])
        np.testing.assert_array_equal(reward, value)
        done = bool(terminated.all())
    assert isinstance(info["clipped"], torch.Tensor)
    assert isinstance(info["judged"], torch.Tensor)
    assert info["final_obs"]["x"].shape == (2, D)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_torch_arrays_stay_on_cuda():
    env = vector(2, array="torch", device="cuda", kl_coef=0.1)
    observation, _ = env.reset(seed=0)
    assert env.reference.flow.device.type == "cuda"
    for _ in range(4):
        observation, reward, terminated, truncated, info = env.step(
            env.reference.predict(observation)[0]
        )
        for value in (*observation.values(), reward, terminated, truncated, info["clipped"]):
            assert value.device.type == "cuda"


def test_the_single_env_shows_its_insides():
    env = gym.make("prefenv/Shapes-v0", steps=8)
    inside = env.unwrapped
    observation, _ = env.reset(seed=0)
    done, total = False, 0.0
    while not done:
        action, state = inside.reference.predict(observation, deterministic=True)
        assert action.shape == (D,)
        assert state is None
        observation, reward, done, _, info = env.step(action)
        total += reward
    assert isinstance(info["judged"], bool)
    assert total == reward > 0
    assert inside.ledger.queries == 1
    assert inside.task.name == "shapes"
    with pytest.raises(AttributeError):
        _ = inside.nonsense


def test_the_reference_is_a_frozen_copy():
    flow = RectifiedFlow(TASK.network())
    env = vector(2, reference=flow)
    assert env.reference.flow is not flow
    assert not any(p.requires_grad for p in env.reference.flow.parameters())
    assert all(p.requires_grad for p in flow.parameters())


def test_the_default_dtype_of_torch_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        env = vector(2, kl_coef=0.1)
        observation, _ = env.reset(seed=0)
        assert env.judgement.dtype == torch.float32
        assert env.observation_space.contains(observation)
        final = play(env)
        assert env.observation_space.contains(final[0])
    finally:
        torch.set_default_dtype(torch.float32)


def test_collect_plays_one_round():
    oracle = Recorder()
    env = vector(4, oracle=oracle, panel_size=2, kl_coef=0.1)
    env.reset(seed=0)
    rollout = collect(env, env.reference)
    assert rollout.path.shape == (5, 4, 64, 2)
    assert torch.equal(rollout.samples, oracle.seen[0].flatten(0, 1))
    assert torch.equal(rollout.judgement, rollout.samples[:, 0, 0])
    assert rollout.log_prob.shape == (4, 4)
    # log N(a; m, std) = -(|a - m|^2 / 2 std^2) - D log std - D/2 log 2 pi, so the cost follows from it
    stds = torch.tensor([env.reference.std(i) for i in range(4)])
    square = -rollout.log_prob - D * stds.log()[:, None] - D / 2 * np.log(2 * np.pi)
    cost = 0.1 * (square - D / 2).sum(0)
    torch.testing.assert_close(rollout.reward, rollout.judgement - cost, rtol=1e-3, atol=1e-3)
