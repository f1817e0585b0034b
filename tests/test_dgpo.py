"""``dgpo``: golden numbers of the public code, and that two samples make it a pairwise loss."""

from __future__ import annotations

import math

import pytest
import torch
from probes import ROWS, close, noises, probe_agent, silent

from agents.dgpo import dgpo_loss, moved_enough
from agents.flow_dpo import dpo_loss, dpo_margin
from prefenv.matching import matching_error
from prefenv.testing.probe import right


@pytest.fixture
def dgpo(golden):
    """Golden arrays in our convention: velocities turned round."""
    g = {k: torch.as_tensor(v) for k, v in golden("04e_dgpo").items() if v.dtype.kind in "fiub"}
    assert g["group"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1], "panels are rows in a row"
    return {
        **g,
        **{k: -g[k] for k in ("v_theta", "v_old", "v_ref")},
        "target": g["x0"] - g["noise"],
    }


def panels(g, values):
    return values.view(-1, int(g["group_size"]))


@pytest.mark.parametrize("clip", ["noclip", "clip"])
def test_loss_and_gradient_match_golden(dgpo, clip):
    g = dgpo
    reference = panels(g, matching_error(g["v_ref"], g["target"]))
    old = panels(g, matching_error(g["v_old"], g["target"]))
    limit = float(g["adv_clip_max"])
    gain = panels(g, g["advantages"].clamp(-limit, limit))
    close(reference.flatten(), g["err_ref"])
    for i, beta in enumerate(g["beta"].tolist()):
        velocity = g["v_theta"].clone().requires_grad_(True)
        error = panels(g, matching_error(velocity, g["target"]))
        close(error.detach().flatten(), g["err_theta"])
        used = velocity
        if clip == "clip":
            rest = moved_enough(error, old, gain, float(g["clip_range"])).flatten()
            assert torch.equal(rest, g["clip_should_clip"][i]) and 0 < int(rest.sum()) < 8
            used = torch.where(rest.view(-1, 1, 1, 1), velocity.detach(), velocity)
            error = panels(g, matching_error(used, g["target"]))
        each = dgpo_loss(error, reference, gain, beta)
        close((each / (gain * error)).mean(1).detach(), g["group_weight_derived"][i])
        kl = matching_error(used, g["v_ref"]).mean()
        close(each.mean().detach(), g[f"{clip}_dgpo_loss"][i])
        close(kl.detach(), g[f"{clip}_kl_loss"][i])
        loss = each.mean() + float(g["kl_beta"]) * kl
        close(loss.detach(), g[f"{clip}_loss"][i])
        close(-torch.autograd.grad(loss, velocity)[0], g[f"{clip}_grad_v_theta"][i])


def test_what_has_moved_enough_by_hand():
    """At a clip of 0.2 the good rest above a ratio of 1.2, the bad below 0.8."""
    ratio = torch.tensor([1.3, 1.1, 0.9, 0.7]).repeat(2)
    gain = torch.tensor([1.0] * 4 + [-1.0] * 4)
    rest = moved_enough(-ratio.log(), torch.zeros(8), gain, 0.2)
    assert rest.tolist() == [True, False, False, False, False, False, False, True]


def test_a_panel_of_two_has_the_gradient_of_the_pairwise_loss():
    """With advantages +1 and -1 it is the diffusion-DPO loss's, divided by beta."""
    error, reference = torch.rand(2, 5, 2, dtype=torch.float64)
    gain = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(5, 2)
    for beta in (0.5, 20.0):
        e = error.clone().requires_grad_(True)
        (got,) = torch.autograd.grad(dgpo_loss(e, reference, gain, beta).mean(1).sum(), e)
        margin = dpo_margin(*e.unbind(1), *reference.unbind(1), beta)
        (want,) = torch.autograd.grad(dpo_loss(margin).sum(), e)
        close(got, want / beta, 1e-12)


def test_loss_by_hand_where_an_answer_is_missing():
    """K stays the panel's size: (2 / 4)(1 x 0.2 - 1 x 0.1) = 0.05 in the sigmoid, for beta = 2."""
    error, reference = torch.tensor([[0.5, 0.4, 9.0, 9.0]]), torch.tensor([[0.3, 0.3, 1.0, 1.0]])
    gain = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    w = 1 / (1 + math.exp(-0.05))
    close(
        dgpo_loss(error, reference, gain, 2.0), torch.tensor([[0.5 * w, -0.4 * w, 0.0, 0.0]]), 1e-6
    )


def spied(agent):
    """Every batch of points that its model's gradients went through."""
    seen, velocity = [], agent.velocity

    def spy(flow, at):
        if flow is agent.model and torch.is_grad_enabled():
            seen.append(at)
        return velocity(flow, at)

    agent.velocity = spy
    return seen


def test_a_panel_stays_together_and_shares_noise_and_time():
    agent = probe_agent("dgpo", anchor=0.0, times=2, minibatches=3)
    seen = spied(agent)
    agent.learn(ROWS)
    pool = agent.pool["sample"].view(-1, 4, 2)
    used = torch.zeros(len(pool))
    for at in seen:
        x0 = (at.sample - at.target).view(-1, 4, 2)
        torch.testing.assert_close(x0, x0[:, :1].expand_as(x0), rtol=1e-5, atol=1e-6)
        assert torch.equal(at.t.view(-1, 4), at.t.view(-1, 4)[:, :1].expand(-1, 4))
        assert float(at.t.max()) < agent.config.horizon
        for panel in at.sample.view(-1, 4, 2):
            used[(pool == panel).all((1, 2))] += 1
    assert len(seen) == 3 and used.tolist() == [2.0] * len(pool)


def test_panels_without_two_different_answers_are_left_out():
    def answer(panels):
        judged = right(panels)
        judged[0] = math.nan
        judged[1] = 0.3
        judged[2, 1:] = math.nan
        judged[3, 2:] = math.nan
        return judged

    agent = probe_agent("dgpo", answer, anchor=0.0, times=1, minibatches=1)
    seen = spied(agent)
    agent.learn(ROWS)
    assert len(seen) == 1
    assert torch.equal(seen[0].sample.sort(0).values, agent.pool["sample"][12:].sort(0).values)


def test_clip_takes_gradients_and_leaves_values():
    """With a tiny clip and a model that has moved in the round, further steps hardly change it."""
    change = []
    for clip in (0.0, 1e-4):
        agent = probe_agent("dgpo", clip_range=clip, anchor=0.0, epochs=6, lr=3e-3, horizon=1.0)
        agent.learn(ROWS)
        x = noises(256)
        change.append(float((agent.sample(x) - agent.env.policy(agent.reference).sample(x)).norm()))
    assert change[1] < 0.8 * change[0], change


def test_kl_and_anchor_hold_the_model():
    change = []
    for settings in ({}, {"kl_coef": 100.0}, {"anchor": 100.0, "horizon": 0.0}):
        agent = probe_agent("dgpo", **{"anchor": 0.0, "lr": 3e-3, "horizon": 1.0, **settings})
        agent.learn(2 * ROWS)
        x = noises(256)
        change.append(float((agent.sample(x) - agent.env.policy(agent.reference).sample(x)).norm()))
    assert change[1] < 0.3 * change[0] and change[2] < 0.3 * change[0], change


def test_metrics_start_at_one_half_and_silence_teaches_nothing():
    metrics = []
    probe_agent("dgpo", lr=0.0).learn(ROWS, callback=lambda _, m: metrics.append(m))
    assert metrics[0]["weight"] == pytest.approx(0.5)
    agent = probe_agent("dgpo", silent)
    agent.learn(ROWS)
    x = noises(8)
    assert torch.equal(agent.sample(x), agent.env.policy(agent.reference).sample(x))
