"""sb3-ppo: Stable-Baselines3's own algorithm as an agent: its update, its booking, its generators, its silence."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from probes import ROWS, left, noises, probe_agent, share, sometimes, weights
from stable_baselines3.common.utils import set_random_seed

from prefenv.envs import FlowVectorEnv
from prefenv.errors import ConfigError
from prefenv.kernels import Kernel
from prefenv.registry import make_agent
from prefenv.sb3 import make_ppo
from prefenv.testing.probe import ProbeVelocity, probe_env, right


def test_it_is_what_sb3_itself_learns():
    """SB3's own ``learn`` on the same noises with the same draws ends in the same weights, bit by bit."""
    kernel = Kernel("flow-sde", 0.7, (0.0, 0.5))
    agent = probe_agent("sb3-ppo", quick=False, kernel=kernel, batch_size=128, lr=1e-3)
    env, _ = probe_env(num_envs=ROWS)
    torch.manual_seed(0)
    model, _ = make_ppo(
        env,
        128,
        2,
        lr=1e-3,
        reference=env.policy(env.reference.flow, kernel),
        clip_range=0.2,
        ent_coef=20.0,
        vf_coef=0.5,
        max_grad_norm=1.0,
    )
    model.policy.load_state_dict(agent.actor_critic.state_dict())
    env._generator.set_state(agent.env._generator.get_state())
    draw = torch.randint(
        2**32, (), generator=torch.Generator().set_state(agent.generator.get_state())
    )
    set_random_seed(int(draw))
    model.learn(ROWS * env.steps)
    agent.learn(ROWS)
    for ours, theirs in zip(
        agent.actor_critic.parameters(), model.policy.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    fresh = probe_agent("sb3-ppo", quick=False, kernel=kernel, batch_size=128, lr=1e-3)
    assert not torch.equal(ours, list(fresh.actor_critic.parameters())[-1])


@pytest.mark.parametrize("ent_coef", [0.0, 20.0])
def test_it_books_every_evaluation(ent_coef):
    agent = probe_agent("sb3-ppo", ent_coef=ent_coef, n_epochs=3)
    noisy = len(agent.policy.stochastic_steps)
    assert 0 < noisy < 8
    before = ProbeVelocity.evaluated
    agent.learn(2 * ROWS)
    nfe = 2 * ROWS * (8 + 3 * (8 + (8 - noisy if ent_coef else 0)))
    assert ProbeVelocity.evaluated - before == agent.env.ledger.nfe == nfe


def test_the_path_kl_of_the_env_is_part_of_its_return():
    env, _ = probe_env(num_envs=ROWS, kl_coef=0.5)
    agent = probe_agent("sb3-ppo", env=env, kernel=Kernel("flow-sde", 0.7), ent_coef=0.0, lr=0.0)
    judged = []
    agent.learn(ROWS, callback=lambda _, m: judged.append(m["judgement"]))
    returns = agent.ppo.rollout_buffer.returns.reshape(ROWS, 8)[:, 0]
    assert float(np.abs(returns).max()) > 1.5, "a sample's judgement alone is below 1"
    assert 0.3 < judged[0] < 0.7, "what is reported is the judgement"


def test_a_large_anchor_holds_the_steps_without_noise():
    moved = {}
    for ent_coef in (0.0, 1000.0):
        agent = probe_agent("sb3-ppo", ent_coef=ent_coef).learn(10 * ROWS)
        x, t = noises(500), torch.full((500,), 0.75)
        change = agent.model.velocity(x, t) - agent.reference.velocity(x, t)
        moved[ent_coef] = change.square().mean().item()
    assert moved[1000.0] < moved[0.0] / 5


def test_no_answer_is_a_reward_of_0():
    agent = probe_agent("sb3-ppo", sometimes, lr=0.0)
    answers = []
    agent.learn(ROWS, callback=lambda a, _: answers.append(a.ppo.env.judgement))
    returns = agent.ppo.rollout_buffer.returns.reshape(ROWS, 8)
    np.testing.assert_allclose(returns, np.nan_to_num(answers[0])[:, None].repeat(8, 1), atol=1e-5)
    assert 0 < np.isnan(answers[0]).sum() < ROWS


def test_numpys_generator_is_left_alone_too():
    np.random.seed(3)  # noqa: NPY002 (it is SB3's source of minibatches)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    probe_agent("sb3-ppo").learn(ROWS)
    assert (before == np.random.get_state()[1]).all()  # noqa: NPY002


def test_minibatches_larger_than_a_round_are_the_round():
    agent = probe_agent("sb3-ppo", batch_size=10**6, num_envs=4)
    assert agent.ppo.batch_size == 32
    agent.learn(4)


def test_it_learns_with_noise_at_every_step_too():
    kernel = Kernel("flow-sde", 0.7)
    there, back = (
        probe_agent("sb3-ppo", answer, kernel=kernel).learn(10 * ROWS) for answer in (right, left)
    )
    assert share(there) > share(back) + 0.2


def test_an_env_that_speaks_torch_is_refused():
    with pytest.raises(ConfigError, match="array='numpy'"):
        make_agent("sb3-ppo", FlowVectorEnv(4, array="torch", device="cpu"))


@pytest.mark.cuda
def test_on_cuda_and_its_generator_is_left_alone():
    env = gym.make_vec("prefenv/Shapes-v0", num_envs=8, panel_size=4, device="cuda")
    agent = make_agent("sb3-ppo", env, seed=0)
    state, before = torch.cuda.get_rng_state(), weights(agent.model)
    agent.learn(16)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(agent.model), strict=True))
    assert agent.sample(torch.randn(4, 64, 2)).is_cuda
