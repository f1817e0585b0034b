"""Stable-Baselines3 on the environment: the vector env, the generator as its policy, lent random generators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from probes import gaussian
from stable_baselines3.common.vec_env import VecMonitor

from prefenv import sb3
from prefenv.envs import FlowVectorEnv
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.registry import make_oracle
from prefenv.testing.probe import probe_env


def test_vec_env_tells_sb3_what_finished():
    core = FlowVectorEnv(4, steps=3, device="cpu")
    env = sb3.FlowVecEnv(core)
    env.seed(5)
    observation = env.reset()
    again = FlowVectorEnv(4, steps=3, device="cpu").reset(seed=5)[0]
    assert np.array_equal(observation["x"], again["x"])
    actions = np.random.default_rng(0).normal(size=(3, 4, 128)).astype(np.float32)
    for i in range(3):
        observation, reward, done, infos = env.step(actions[i])
        assert done.dtype == bool and done.tolist() == [i == 2] * 4
        assert len({id(info) for info in infos}) == 4
        if i < 2:
            assert infos == [{}] * 4
    score = make_oracle("s-curve", core.task).score(torch.tensor(actions[2]).view(4, 64, 2))
    np.testing.assert_allclose(reward, score, rtol=1e-5)
    for row, info in enumerate(infos):
        assert np.array_equal(info["terminal_observation"]["x"], actions[2, row])
        assert info["terminal_observation"]["t"] == [1.0]
        assert info["TimeLimit.truncated"] is False
        assert not np.array_equal(observation["x"][row], actions[2, row])
    assert (observation["t"] == 0).all()


def test_vec_env_has_sb3s_other_methods():
    env = sb3.FlowVecEnv(FlowVectorEnv(4, steps=2, device="cpu"))
    assert env.get_attr("steps") == [2] * 4 and env.get_attr("steps", [0, 1]) == [2] * 2
    env.set_attr("render_mode", "ansi")
    assert env.env.render_mode == "ansi"
    assert env.env_is_wrapped(VecMonitor) == [False] * 4
    assert env.env_method("close") == [None] * 4 and env.get_attr("num_envs", 2) == [4]
    watched = VecMonitor(env)
    watched.reset()
    for _ in range(2):
        *_, infos = watched.step(np.zeros((4, 128), np.float32))
    assert [info["episode"]["l"] for info in infos] == [2] * 4
    watched.close()


def test_sb3_acts_as_the_generator_and_knows_its_log_probabilities():
    env = FlowVectorEnv(4, device="cpu")
    model, _ = sb3.make_ppo(env, 16, 1, lr=0.0)
    observation, _ = env.reset(seed=0)
    for i in range(env.steps):
        ours, _ = env.reference.predict(observation, deterministic=False)
        mean, _ = model.predict(observation, deterministic=True)
        tensors = {k: torch.as_tensor(v) for k, v in observation.items()}
        x = tensors["x"].view(4, 64, 2)
        there = env.reference.mean(x, env.reference.velocity(x, i), i).flatten(1)
        np.testing.assert_allclose(mean, there, rtol=1e-4, atol=1e-4)
        _, log_prob, _ = model.policy.evaluate_actions(tensors, torch.as_tensor(ours))
        index = torch.full((4,), i)
        expected = env.reference.log_prob(x, index, torch.as_tensor(ours).view(4, 64, 2))
        torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-2)
        drawn, _, said = model.policy(tensors)
        again = env.reference.log_prob(x, index, drawn.view(4, 64, 2))
        torch.testing.assert_close(said, again, rtol=1e-4, atol=1e-2)
        observation, *_ = env.step(ours)


def test_with_learning_rate_0_sb3_replays_what_it_collected():
    """And it notices when it does not: the clip fraction of a changed network is not 0."""
    model, rollout = sb3.make_ppo(FlowVectorEnv(8, device="cpu"), 32, 2, lr=0.0)
    before = [p.clone() for p in model.policy.parameters()]
    rollout()
    assert model.rollout_buffer.full and model.rollout_buffer.actions.shape == (16, 8, 128)
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    logged = model.logger.name_to_value
    assert logged["train/clip_fraction"] == 0 and abs(logged["train/approx_kl"]) < 1e-6
    rollout()
    torch.nn.init.normal_(model.policy.flow.field.out.bias, std=0.3)
    model.train()
    assert logged["train/clip_fraction"] > 0.5


def test_sb3_learns_with_it():
    model, rollout = sb3.make_ppo(FlowVectorEnv(8, device="cpu"), 32, 1, lr=1e-3)
    flow, critic = model.policy.flow.field, model.policy.critic
    before = flow.out.weight.clone(), critic[0].weight.clone()
    rollout()
    model.train()
    assert not torch.equal(flow.out.weight, before[0])
    assert not torch.equal(critic[0].weight, before[1])
    assert not any(p.requires_grad for p in model.env.env.reference.flow.parameters())


def test_a_torch_environment_is_refused():
    with pytest.raises(ConfigError, match="array='numpy'"):
        sb3.FlowVecEnv(FlowVectorEnv(4, array="torch", device="cpu"))


def test_rows_without_an_answer_are_told():
    def half(panels):
        return panels[..., 0].masked_fill(panels[..., 1] > 0, torch.nan)

    env = sb3.FlowVecEnv(probe_env(half, 8, steps=1)[0])
    env.reset()
    actions = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    _, reward, _, infos = env.step(actions)
    silent = actions[:, 1] > 0
    assert [info["judged"] for info in infos] == (~silent).tolist() and 0 < silent.sum() < 8
    np.testing.assert_array_equal(reward, np.where(silent, 0, actions[:, 0]))
    np.testing.assert_array_equal(env.judgement, np.where(silent, np.nan, actions[:, 0]))


# Steps without noise


WINDOW = Kernel("flow-sde", 0.7, (0.0, 0.5))


def windowed(**settings):
    env, _ = probe_env(num_envs=8, kernel=WINDOW)
    return sb3.make_ppo(env, 64, 1, lr=1e-3, seed=0, **settings)[0]


def observation(n, step):
    t = (step / 8 * torch.ones(n, 1)).float()  # the probe's grid has equal steps
    return {"x": torch.randn(n, 2), "t": t}


def test_a_step_without_noise_is_its_mean_and_has_no_log_probability():
    model = windowed()
    for step in range(8):
        seen = observation(50, step)
        action, _, log_prob = model.policy(seen)
        mean, std = model.policy.walk.gaussian(seen["x"], torch.full((50,), step))
        _, again, _ = model.policy.evaluate_actions(seen, action)
        torch.testing.assert_close(log_prob, again)
        if step < 4:
            expected = torch.distributions.Normal(mean, std).log_prob(action).sum(1)
            torch.testing.assert_close(log_prob, expected)
            assert float((action - mean).detach().abs().min(0).values.max()) > 0
        else:
            assert torch.equal(action, mean) and not bool(log_prob.any())
            (grad,) = torch.autograd.grad(again.sum(), model.policy.flow.field.change.out.weight)
            assert not bool(grad.any()), "and no gradient, not even NaN"


def test_entropy_is_the_anchor_on_steps_without_noise():
    """Against ``mean (v - v_ref)^2`` worked out from the velocities."""
    model = windowed(ent_coef=1.0)
    flow, reference = model.policy.flow, model.policy.reference.flow
    assert windowed().policy.evaluate_actions(observation(3, 5), torch.zeros(3, 2))[2] is None
    torch.nn.init.normal_(flow.field.change.out.weight)
    mixed = {k: torch.cat([observation(5, 1)[k], observation(5, 6)[k]]) for k in ("x", "t")}
    entropy = model.policy.evaluate_actions(mixed, torch.zeros(10, 2))[2]
    x, t = mixed["x"], mixed["t"][:, 0]
    change = (flow.velocity(x, t) - reference.velocity(x, t)).square().mean(1)
    expected = -change.where(t > 0.5, 0.0)
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-5)
    assert bool((expected[5:] < -1e-3).all()) and entropy.requires_grad


def test_the_reference_has_an_anchor_of_0():
    flow = RectifiedFlow(gaussian([1.0, 0.0], 0.5).field)
    env, _ = probe_env(num_envs=8, kernel=WINDOW)
    env.reference = env.policy(flow, WINDOW)
    policy = sb3.make_ppo(env, 64, 1, lr=1e-3, ent_coef=1.0)[0].policy
    assert not bool(policy.evaluate_actions(observation(6, 6), torch.zeros(6, 2))[2].any())


# Generators


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002 (SB3's own source)


def test_global_generators_are_lent_and_come_back():
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    before, expected = (torch.get_rng_state(), np.random.get_state()[1].copy()), draws()  # noqa: NPY002
    torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    with sb3.seeded(generator):
        first = draws()
    with sb3.seeded(generator):
        assert draws() != first, "another stretch each time"
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert draws() == expected
    generator.set_state(state)
    with pytest.raises(ZeroDivisionError), sb3.seeded(generator):
        assert draws() == first
        1 / 0  # noqa: B018
    assert draws() != first


# Replay


def replay(size=6):
    space = FlowVectorEnv(1, control="noise", device="cpu").single_action_space
    return sb3.AnsweredReplay(size, space, space, "cpu", n_envs=4)


def add(buffer, values, judged):
    rows = np.repeat(np.asarray(values, np.float32)[:, None], 128, 1)
    infos = [{"judged": j} for j in judged]
    buffer.add(rows, rows + 1, rows + 2, rows[:, 0] + 3, np.ones(len(rows), bool), infos)


def test_replay_keeps_answered_rows_alone_and_the_newest():
    buffer = replay()
    add(buffer, [0, 1, 2, 3], [True, False, False, True])
    assert buffer.size() == 2 and buffer.actions[:2, 0, 0].tolist() == [2, 5]
    assert buffer.observations[:2, 0, 5].tolist() == [0, 3]
    assert buffer.rewards[:2, 0].tolist() == [3, 6]
    add(buffer, [4, 5, 6, 7], [False] * 4)
    assert buffer.size() == 2
    add(buffer, [8, 9, 10, 11], [True] * 4)
    add(buffer, [12], [True])
    assert (
        buffer.full and buffer.pos == 1 and sorted(buffer.rewards[:, 0]) == [6, 11, 12, 13, 14, 15]
    )
    batch = buffer.sample(500)
    assert set(batch.rewards[:, 0].tolist()) == {6, 11, 12, 13, 14, 15}
    torch.testing.assert_close(batch.actions[:, 0] + 1, batch.rewards[:, 0])


def test_replay_goes_on_where_it_stood():
    buffer, other = replay(), replay()
    add(buffer, range(4), [True] * 4)
    other.load_state_dict(buffer.state_dict())
    for b in (buffer, other):
        add(b, range(10, 14), [True] * 4)
    for name in buffer.ARRAYS:
        assert np.array_equal(getattr(buffer, name), getattr(other, name))
    assert (other.pos, other.full) == (buffer.pos, buffer.full) == (2, True)
