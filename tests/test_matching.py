"""What the matching agents share: points, pool, running averages, bookkeeping."""

from __future__ import annotations

import pytest
import torch
from probes import ROWS, noises, probe_agent, same, weights

from prefenv.matching import Points, blend_, matching_error, row_mean
from prefenv.rollout import Rollout, collect
from prefenv.testing.probe import right

NAMES = ["flow-dpo", "dspo", "kto", "mapo", "nft", "awm", "dgpo", "rwr"]
every_agent = pytest.mark.parametrize("name", NAMES)


def a_round(samples, judgement, condition=None, panel_size=4):
    path = torch.stack([torch.zeros_like(samples), samples])
    return Rollout(path, torch.zeros(1, len(samples)), judgement, judgement, panel_size, condition)


def test_matching_error_is_the_flows_residual(small_flow):
    flow, x0, x1, t = small_flow((3, 2)), *torch.randn(2, 5, 3, 2), torch.rand(5)
    s = t.view(-1, 1, 1)
    v = flow.velocity((1 - s) * x0 + s * x1, t)
    torch.testing.assert_close(matching_error(v, x1 - x0), flow.residual(x0, x1, t))
    by_hand = [(row - target).pow(2).sum() / 6 for row, target in zip(v, x1 - x0, strict=True)]
    torch.testing.assert_close(matching_error(v, x1 - x0), torch.stack(by_hand))
    assert torch.equal(row_mean(torch.arange(6.0).view(2, 3)), torch.tensor([1.0, 4.0]))


def test_points_lie_on_the_straight_way_from_noise_to_sample():
    agent = probe_agent("rwr")
    x1, condition = noises(12), torch.arange(12) % 3
    agent.remember(a_round(x1, right(x1), condition))
    rows = torch.tensor([3, 3, 0, 1, 7, 2])
    at = agent.points(rows)
    x0, s = at.sample - at.target, at.t[:, None]
    torch.testing.assert_close(at.x, (1 - s) * x0 + s * at.sample)
    assert torch.equal(at.sample, x1[rows]) and torch.equal(at.condition, condition[rows])
    assert len(x0.unique()) == x0.numel() and len(at.t.unique()) == 6, "all noises differ"
    some = at.rows(torch.tensor([4, 1]))
    for mine, theirs in zip(some, at, strict=True):
        assert torch.equal(mine, theirs[torch.tensor([4, 1])])
    assert Points(*at[:4]).rows(rows[:1]).condition is None


def test_rows_that_share_have_one_noise_and_one_time():
    agent = probe_agent("rwr")
    agent.remember(a_round(noises(12), torch.rand(12)))
    at = agent.points(torch.arange(12), shared=3)
    x0, t = (at.sample - at.target).view(4, 3, 2), at.t.view(4, 3)
    torch.testing.assert_close(x0, x0[:, :1].expand(4, 3, 2), rtol=1e-6, atol=1e-6)
    assert torch.equal(t, t[:, :1].expand(4, 3)) and len(t.unique()) == 4
    assert len(x0[:, 0].flatten().unique()) > 4


def test_times_keep_to_the_window_by_the_law_of_the_references_training():
    agent = probe_agent("rwr")
    agent.remember(a_round(noises(4000), torch.rand(4000)))
    rows, early = torch.arange(4000), agent.env.task.train.early
    whole = agent.points(rows).t
    assert early == 2 and float(whole.mean()) == pytest.approx(1 / 3, abs=1e-3), "mean of u^2"
    part = agent.points(rows, window=(0.25, 0.75)).t
    assert 0.25 <= float(part.min()) < 0.251 and 0.749 < float(part.max()) < 0.75
    assert float(part.mean()) == pytest.approx(0.25 + 0.5 / 3, abs=1e-3)


def test_memory_keeps_the_last_rounds():
    for memory, kept in ((0, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3])):
        agent = probe_agent("rwr", memory=memory)
        for i in range(4):
            agent.remember(a_round(noises(8) + i, torch.full((8,), float(i))))
        assert agent.pool["judgement"].tolist() == [float(i) for i in kept for _ in range(8)]
        assert torch.equal(agent.pool["sample"], torch.cat([noises(8) + i for i in kept]))
    online = probe_agent("awm")
    for i in range(2):
        online.remember(a_round(noises(8), torch.full((8,), float(i))))
    assert online.pool["judgement"].tolist() == [1.0] * 8, "without the setting: one round"


def test_blend_is_the_weights_running_average(small_flow):
    average, flow = small_flow(seed=1), small_flow(seed=2).requires_grad_(True)
    before, new = weights(average), weights(flow)
    blend_(average, flow, 0.75)
    for got, a, b in zip(weights(average), before, new, strict=True):
        torch.testing.assert_close(got, 0.75 * a + 0.25 * b)
    assert same(new, weights(flow))
    blend_(average, flow, 0.0)
    assert all(torch.allclose(a, b) for a, b in zip(weights(average), new, strict=True))


def test_drift_beyond_is_the_mean_squared_change_past_the_horizon():
    agent = probe_agent("flow-dpo")
    agent.remember(a_round(noises(64), torch.rand(64)))
    assert float(agent.drift_beyond(0.3, 50).detach()) == 0
    with torch.no_grad():
        agent.model.field.change.out.bias += 0.3
    seen, velocity = [], agent.velocity
    agent.velocity = lambda flow, at: seen.append(at.t) or velocity(flow, at)
    nfe = agent.env.ledger.nfe
    change = agent.drift_beyond(0.3, 50)
    assert float(change.detach()) == pytest.approx(0.3**2, rel=1e-5)
    assert float(torch.cat(seen).min()) >= 0.3 and agent.env.ledger.nfe == nfe + 100
    change.backward()
    assert all(p.grad is None for p in agent.reference.parameters())


@every_agent
def test_proposals_come_from_the_ode(name):
    """No step draws noise: a matching agent needs no log-probability."""
    agent = probe_agent(name)
    policy = agent.behaviour()
    assert policy.kernel.name == "ode" and policy.stochastic_steps == []
    rollout = collect(agent.env, policy)
    torch.testing.assert_close(rollout.samples, policy.sample(rollout.noise))


@pytest.mark.parametrize("name", ["flow-dpo", "dspo", "kto", "mapo", "rwr"])
def test_offline_proposals_stay_the_references(name):
    for proposals, still in (("reference", True), ("model", False)):
        agent = probe_agent(name, proposals=proposals, lr=1e-2)
        agent.learn(4 * ROWS)
        x = noises(16)
        moved = agent.behaviour().sample(x)
        assert torch.equal(moved, agent.env.policy(agent.reference).sample(x)) is still
        assert torch.equal(moved, agent.sample(x)) is not still


# Settings under which they learn the probe's right-hand side in 15 rounds, and the share that they reach.
QUICK = {
    "flow-dpo": ({"lr": 5e-3, "beta": 2.0}, 0.95),
    "dspo": ({"lr": 5e-3, "updates": 5}, 0.9),
    "kto": ({"lr": 5e-3, "beta": 2.0, "horizon": 1.0, "anchor": 0.0}, 0.95),
    "mapo": ({"lr": 5e-3, "updates": 5}, 0.85),
    "nft": ({"lr": 5e-3, "updates": 5}, 0.75),
    "awm": ({"lr": 5e-3, "ema_decay": 0.5}, 0.8),
    "dgpo": ({"lr": 5e-3}, 0.95),
    "rwr": ({"lr": 5e-3, "updates": 5}, 0.9),
}


def share(agent):
    return float((agent.sample(noises())[:, 0] > 0).float().mean())


@every_agent
def test_learns_what_is_preferred_whichever_it_is(name):
    settings, level = QUICK[name]
    shares = []
    for answer in (right, lambda p: 1 - right(p)):
        agent = probe_agent(name, answer, quick=False, **settings)
        agent.learn(15 * ROWS)
        shares.append(share(agent))
    assert shares[0] > level and shares[1] < 1 - level, shares


@every_agent
def test_equal_answers_and_none_teach_nothing(name):
    if name == "rwr":
        pytest.skip("equal weights are weights: it goes on matching what it is shown")
    for value in (0.1, 0.3, 0.7, float("nan")):
        agent = probe_agent(name, lambda p, v=value: torch.full(p.shape[:2], v), **QUICK[name][0])
        before = weights(agent.model)
        agent.learn(2 * ROWS)
        assert same(before, weights(agent.model))
