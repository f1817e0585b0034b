"""noise: the head and its KL against torch's, SAC as it is SB3's, the reference untouched, missing answers."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from probes import ROWS, left, noises, probe_agent, sometimes, trained, weights
from torch.distributions import Normal, kl_divergence

from agents.noise import NoiseActor, noise_kl
from prefenv.errors import ConfigError
from prefenv.registry import make_agent
from prefenv.testing.probe import probe_env, right


def test_kl_to_the_reference_noise():
    mean, log_std = torch.randn(2, 7, 5).unbind(0)
    theirs = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(noise_kl(mean, log_std), theirs)
    assert float(noise_kl(torch.zeros(1, 5), torch.zeros(1, 5))) == 0


def test_it_begins_as_the_reference_bit_by_bit():
    agent = probe_agent("noise")
    assert torch.equal(agent.sample(noises()), agent.env.reference.sample(noises()))
    assert agent.kl_bound() == 0 and agent.chain() == []


def test_actions_are_drawn_from_the_law_whose_kl_is_told():
    """SB3 sees shares of the bound; what reaches the env is ``N(mu, std^2)``, whose KL stands for the entropy."""
    agent = probe_agent("noise")
    actor, obs = agent.sac.actor, torch.zeros(4000, 1)
    assert isinstance(actor, NoiseActor)
    mean, std = torch.tensor([1.5, -0.5]), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        actor.mu.bias.copy_(mean)
        actor.log_std.bias.copy_(std.log())
    actions, kl = actor.action_log_prob(obs)
    w = actions.detach() * agent.env.task.bound
    torch.testing.assert_close(w.mean(0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(w.std(0), std, atol=0.1, rtol=0)
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl.detach(), expected.expand(4000))
    assert agent.kl_bound() == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(agent.steer(noises(9)), mean + std * noises(9))
    drawn, _ = agent.sac.predict(np.zeros((4000, 1), np.float32), deterministic=False)
    assert np.allclose(drawn.mean(0), mean, atol=0.15) and np.allclose(drawn.std(0), std, atol=0.1)


def test_the_critic_sees_the_noise_itself():
    agent = probe_agent("noise")
    critic, w = agent.sac.critic, noises(6)
    expected = critic.qf0(torch.cat([torch.zeros(6, 1), w], 1))
    torch.testing.assert_close(critic(torch.zeros(6, 1), w / agent.env.task.bound)[0], expected)


def test_what_is_replayed_is_what_was_judged():
    """The stored reward is the oracle's judgement of the reference's sample of the stored action."""
    agent = probe_agent("noise", lr=0.0).learn(2 * ROWS)
    answers = agent.replay.state_dict()
    w = answers["actions"][:, 0] * agent.env.task.bound
    assert len(w) == 2 * ROWS == len(w.unique(dim=0))
    torch.testing.assert_close(
        answers["rewards"][:, 0], right(agent.env.reference.sample(w)), rtol=1e-4, atol=1e-5
    )
    assert bool((answers["dones"] == 1).all()) and not bool(answers["observations"].any())


def test_rows_without_an_answer_are_not_replayed():
    agent = probe_agent("noise", sometimes).learn(ROWS)
    x = agent.env.reference.sample(
        agent.replay.state_dict()["actions"][:, 0] * agent.env.task.bound
    )
    assert 0 < len(x) < ROWS and bool((x[:, 1] <= 0).all())


def test_the_temperature_holds_the_kl():
    """Adam's first step is the learning rate long: up where the KL is above what is asked, down where below."""
    for mean, sign in ((2.0, 1), (0.0, -1)):
        agent = probe_agent("noise", kl=1.0, lr=1e-3, gradient_steps=1)
        with torch.no_grad():
            agent.sac.actor.mu.bias.fill_(mean)
        assert (agent.kl_bound() > 1.0) is (sign > 0)
        before = agent.alpha.clone()
        assert float(before.exp()) == pytest.approx(agent.config.alpha)
        agent.learn(ROWS)
        assert float(agent.alpha - before) == pytest.approx(sign * 1e-3, rel=1e-2)


def test_it_moves_the_noise_and_keeps_its_spread():
    """On the probe the side is decided by the first coordinate of the noise."""
    there, back = (
        probe_agent("noise", answer, kl=1.0).learn(20 * ROWS) for answer in (right, left)
    )
    z = noises(4000)
    for agent, sign in ((there, 1), (back, -1)):
        w = agent.steer(z)
        assert sign * float(w[:, 0].mean()) > 0.7
        assert abs(float(w[:, 1].mean())) < 0.4 and float(w[:, 1].std()) > 0.6
        assert float(agent.sample(z).std(0).min()) > 0.1, "still a distribution"
        assert len(agent.sample(z).unique(dim=0)) == 4000


def test_only_the_actor_and_the_critics_learn():
    agent = probe_agent("noise")
    before = weights(agent.reference), weights(agent.model)
    start = [p.detach().clone() for p in trained(agent)]
    agent.learn(3 * ROWS)
    assert all(map(torch.equal, before[0], weights(agent.reference)))
    assert all(map(torch.equal, before[1], weights(agent.model)))
    assert agent.env.ledger.nfe == 3 * ROWS * agent.env.steps, "its networks are not the flow's"
    assert any(not torch.equal(a, b) for a, b in zip(start, trained(agent), strict=True))


def test_numpys_generator_is_left_alone_too():
    np.random.seed(3)  # noqa: NPY002 (it is SB3's source of minibatches)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    probe_agent("noise").learn(ROWS)
    assert (before == np.random.get_state()[1]).all()  # noqa: NPY002


def test_going_on_when_the_buffer_has_wrapped(tmp_path):
    settings = {"buffer_size": 100, "gradient_steps": 3}
    whole = probe_agent("noise", **settings).learn(4 * ROWS)
    half = probe_agent("noise", **settings).learn(2 * ROWS)
    assert half.replay.state_dict()["full"] and half.replay.state_dict()["pos"] == 28
    half.save(tmp_path / "agent.zip")
    env, _ = probe_env(num_envs=ROWS, control="noise")
    loaded = type(half).load(tmp_path / "agent.zip", env).learn(2 * ROWS)
    assert torch.equal(whole.sample(noises()), loaded.sample(noises()))
    assert torch.equal(whole.alpha, loaded.alpha) and float(whole.alpha) != float(half.alpha)
    assert all(
        torch.equal(whole.replay.state_dict()[k], loaded.replay.state_dict()[k])
        for k in ("actions", "rewards")
    )


def test_it_learns_in_an_env_that_was_left_between_samples():
    agent = probe_agent("noise")
    agent.env.begin()
    agent.env.advance(noises(ROWS))  # finished, and nothing new begun
    agent.learn(ROWS)
    assert agent.replay.size() == ROWS and agent.env.ledger.queries == 2 * ROWS


def test_it_wants_an_env_of_noises():
    with pytest.raises(ConfigError, match="control='noise'"):
        make_agent("noise", probe_env()[0])


@pytest.mark.cuda
def test_on_cuda(tmp_path):
    env = gym.make_vec(
        "prefenv/Shapes-v0", num_envs=8, panel_size=4, control="noise", device="cuda"
    )
    agent = make_agent("noise:gradient_steps=4", env, seed=0).learn(16)
    noise = torch.randn(4, 64, 2)
    samples = agent.sample(noise)
    assert samples.is_cuda and bool(samples.isfinite().all())
    agent.save(tmp_path / "agent.zip")
    assert torch.equal(samples, type(agent).load(tmp_path / "agent.zip", env).sample(noise))
