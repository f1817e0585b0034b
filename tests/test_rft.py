"""``rft``: what is kept, what is learned from it, and that its fixed point is the law of accepted samples."""

from __future__ import annotations

import math

import pytest
import torch
from probes import ROWS, constant, left, noises, probe_agent, same, share, silent, weights

from agents.rft import kept
from prefenv.rollout import Rollout


def a_round(judgement, samples, panel_size=4):
    judgement = torch.as_tensor(judgement)
    path = torch.stack([torch.zeros_like(samples), samples])
    return Rollout(path, torch.zeros(1, len(samples)), judgement, judgement, panel_size)


def test_best_of_a_group_matches_golden(golden):
    """flow_grpo's ``sft`` advantages: 1 for the best of each prompt's group."""
    g = golden("03_policy_losses")
    prompt, reward = (torch.as_tensor(g[k]) for k in ("ddpo_prompts_1", "ddpo_rewards_1"))
    want = torch.as_tensor(g["flowgrpo_adv_sft"])
    for p in prompt.unique():
        row = prompt == p
        assert torch.equal(kept(reward[row][None], 0.0, "best")[0].double(), want[row])


def test_kept_skips_missing_answers_and_ties():
    nan = math.nan
    judgement = torch.tensor(
        [
            [0.9, nan, 0.6, 0.2],
            [0.3, 0.3, 0.3, 0.3],
            [nan] * 4,
            [0.1, 0.4, 0.4, nan],
            [0.7] + [nan] * 3,
        ]
    )
    assert kept(judgement, 0.5, "accepted").nonzero().tolist() == [[0, 0], [0, 2], [4, 0]]
    assert kept(judgement, 0.4, "accepted")[3].tolist() == [False, True, True, False], "at least"
    assert kept(judgement, 0.5, "best").nonzero().tolist() == [[0, 0], [3, 1], [3, 2]]


def test_the_pool_holds_the_newest_kept_samples():
    agent = probe_agent("rft", memory=5, updates=0)
    x = noises(12)
    assert agent.update(a_round([0.9, 0.1, 0.6, 0.4] * 2, x[:8])) == {"kept": 4.0, "loss": 0.0}
    agent.update(a_round([0.9, 0.8, 0.1, math.nan], x[8:]))
    assert torch.equal(agent.pool["accepted"], x[[2, 4, 6, 8, 9]])


def test_the_gradient_is_that_of_flow_matching_on_the_kept_samples():
    """Averaged over many small batches at lr 0, against the loss on a grid of times with its own noises."""
    agent = probe_agent("rft", lr=0.0, batch=4096, updates=20, max_grad_norm=1e9)
    seen = []
    agent.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in agent.model.parameters()]))
    )
    samples = noises(4) + 2.0
    metrics = agent.update(a_round([0.9, 0.1, 0.2, 0.8], samples))
    agent.optimizer.zero_grad()
    rng = torch.Generator().manual_seed(1)
    x0 = torch.randn(40_000, 2, generator=rng)
    x1 = samples[[0, 3]][torch.randint(2, (40_000,), generator=rng)]
    t = torch.rand(40_000, generator=rng)[:, None]
    v = agent.model.field((1 - t) * x0 + t * x1, t[:, 0])
    loss = (v - (x1 - x0)).square().mean()
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in agent.model.parameters()])
    got = torch.stack(seen).mean(0)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=0.03)
    assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("settings", [{}, {"keep": "best"}, {"iterate": True}])
def test_it_learns_the_preferred_side(settings):
    agent = probe_agent("rft", lr=3e-3, **settings).learn(15 * ROWS)
    assert share(agent) > 0.9
    other = probe_agent("rft", left, lr=3e-3, **settings).learn(15 * ROWS)
    assert share(other) < 0.1


def test_the_fixed_point_is_the_law_of_accepted_samples():
    """The right half of the mixture, N((1, 0), 0.3^2): mean and spread of what comes out, not only the side."""
    agent = probe_agent("rft", lr=3e-3, updates=100).learn(15 * ROWS)
    reference = agent.env.policy(agent.reference).sample(noises(8000))
    accepted, x = reference[reference[:, 0] > 0], agent.sample(noises(8000))
    assert torch.allclose(x.mean(0), accepted.mean(0), atol=0.04)
    assert torch.allclose(x.std(0), accepted.std(0), atol=0.04)


def test_proposals_come_from_the_reference_or_from_the_model():
    for iterate in (False, True):
        agent = probe_agent("rft", lr=3e-3, iterate=iterate).learn(4 * ROWS)
        flow = agent.model if iterate else agent.reference
        assert agent.behaviour().flow is flow and not agent.behaviour().stochastic_steps


def test_nothing_accepted_teaches_nothing():
    for answer in (constant(0.4), silent):
        agent = probe_agent("rft", answer)
        before = weights(agent.model)
        agent.learn(3 * ROWS)
        assert same(before, weights(agent.model))
