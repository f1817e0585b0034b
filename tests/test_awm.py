"""``awm``: golden numbers of the public code, its undefined names, and what holds the bad samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from probes import ROWS, close, noises, probe_agent, silent, weights

from agents.awm import awm_log_prob, awm_loss, velocity_distance
from prefenv.matching import matching_error

WEIGHTINGS = ["uniform", "t", "tpow2", "huber", "ghuber"]
ORDERS = {"exp_first": "exp-first", "sum_first": "sum-first"}


@pytest.fixture
def awm(golden):
    """Golden arrays in our convention: t = 1 - sigma, velocities turned round."""
    g = {k: torch.as_tensor(v) for k, v in golden("04d_awm").items() if v.dtype.kind in "fiub"}
    ours = {k: -g[k] for k in ("v_theta", "v_old", "v_ref", "v_ema")}
    return {**g, **ours, "t": 1 - g["t"], "target": g["x0"] - g["noise"]}


def stand_in(g, velocity, weighting):
    """``l`` as (T, B): the golden rows are time by time."""
    error = matching_error(velocity, g["target"])
    l = awm_log_prob(error, g["t"], weighting, float(g["ghuber_power"]))
    return l.view(int(g["num_timesteps"]), -1)


def advantage(g):
    clip = float(g["adv_clip_max"])
    return g["advantages"].clamp(-clip, clip) / clip * float(g["advantage_max"])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_stand_in_matches_golden(awm, weighting):
    close(stand_in(awm, awm["v_theta"], weighting).flatten(), awm[f"{weighting}_logp"])
    close(stand_in(awm, awm["v_old"], weighting).flatten(), awm[f"{weighting}_old_logp"])


@pytest.mark.parametrize(("weighting", "order"), list(itertools.product(WEIGHTINGS, ORDERS)))
def test_loss_and_gradient_match_golden(awm, weighting, order):
    name, clip = f"{weighting}_{order}_uniform", float(awm["clip_range"])
    velocity = awm["v_theta"].clone().requires_grad_(True)
    l, old = (stand_in(awm, v, weighting) for v in (velocity, awm["v_old"]))
    ratio = (l - old).detach()
    ratio = (ratio.mean(0) if order == "sum_first" else ratio.flatten()).exp()
    close(ratio, awm[f"{name}_ratio"])
    policy = awm_loss(l, old, advantage(awm), clip, ORDERS[order]).mean()
    close(policy.detach(), awm[f"{name}_policy_loss"])
    kl, ema = (
        velocity_distance(velocity, awm[v], awm["t"], "uniform").mean() for v in ("v_ref", "v_ema")
    )
    close(kl.detach(), awm[f"{name}_kl_loss"])
    close(ema.detach(), awm[f"{name}_ema_kl_loss"])
    loss = policy + float(awm["beta"]) * kl + float(awm["ema_beta"]) * ema
    close(loss.detach(), awm[f"{name}_loss"])
    if (want := awm.get(f"{name}_grad_v_theta")) is not None:
        close(-torch.autograd.grad(loss, velocity)[0], want)


@pytest.mark.parametrize("order", ORDERS)
def test_elbo_distances_match_golden(awm, order):
    name, v = f"ghuber_{order}_elbo", awm["v_theta"]
    kl, ema = (velocity_distance(v, awm[k], awm["t"], "elbo").mean() for k in ("v_ref", "v_ema"))
    close(kl, awm[f"{name}_kl_loss"])
    close(ema, awm[f"{name}_ema_kl_loss"])
    l, old = (stand_in(awm, x, "ghuber") for x in (v, awm["v_old"]))
    policy = awm_loss(l, old, advantage(awm), float(awm["clip_range"]), ORDERS[order]).mean()
    close(policy + float(awm["beta"]) * kl + float(awm["ema_beta"]) * ema, awm[f"{name}_loss"])


def test_clip_stops_what_has_moved_far_enough():
    """At a clip of 0.2, time by time, or of the mean over times: row 1's times are 1.5 and 1 / 1.5, so 1."""
    ratio = torch.tensor([[1.5, 1.5], [1.5, 1 / 1.5]])
    gain = torch.tensor([1.0, 2.0])
    for order, want in (
        ("exp-first", [[0.0, 0.0], [0.0, -2 / 1.5]]),
        ("sum-first", [[0.0, -1.0], [0.0, -1.0]]),
    ):
        l = ratio.log().requires_grad_(True)
        loss = awm_loss(l, torch.zeros(2, 2), gain, 0.2, order)
        (grad,) = torch.autograd.grad(loss.sum(), l)
        close(grad, torch.tensor(want), 1e-6)


def test_only_a_leash_holds_what_is_bad():
    """Along a growing error of a bad sample the surrogate only falls; a leash of weight 1 gives it a minimum."""
    far = torch.linspace(0, 4, 81, dtype=torch.float64)
    velocity, target = far[:, None], torch.zeros(81, 1, dtype=torch.float64)
    error = matching_error(velocity, target)
    surrogate = awm_loss(-error[None], 0 * error[None], -torch.ones(81), 1.0)[0]
    assert bool((surrogate.diff() < 0).all())
    held = surrogate + velocity_distance(velocity, target + 1, far, "uniform")
    assert 0 < int(held.argmin()) < 40


@pytest.mark.parametrize(("kl", "ema"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_a_coefficient_of_zero_leaves_its_term_out(kl, ema):
    """The public script knows no ``kl_loss`` then, and stops with a NameError."""
    agent = probe_agent("awm", kl_coef=kl, ema_coef=ema)
    before = agent.env.ledger.nfe
    agent.learn(ROWS)
    cfg, points = agent.config, ROWS * agent.config.times
    spent = points + cfg.epochs * points * (1 + (kl > 0) + (ema > 0))
    assert agent.env.ledger.nfe - before == ROWS * agent.env.steps + spent


def test_leash_of_a_shifted_model_by_hand():
    agent = probe_agent("awm", kl_coef=3.0, ema_coef=5.0, lr=0.0)
    agent.learn(ROWS)
    with torch.no_grad():
        agent.model.field.change.out.bias += torch.tensor([0.3, -0.2])
        agent.average.field.change.out.bias += torch.tensor([0.1, 0.0])
    at = agent.points(torch.arange(8))
    got = agent.leash(agent.velocity(agent.model, at), at)
    assert float(got.detach()) == pytest.approx(
        3 * (0.09 + 0.04) / 2 + 5 * (0.04 + 0.04) / 2, rel=1e-4
    )


def test_ratio_is_one_before_the_first_step_and_not_after():
    for lr, one in ((0.0, True), (1e-2, False)):
        metrics = []
        probe_agent("awm", lr=lr).learn(ROWS, callback=lambda _, m, seen=metrics: seen.append(m))
        assert (abs(metrics[0]["ratio"] - 1) < 1e-6) is one


def test_every_minibatch_sees_all_times_of_its_samples_once_an_epoch():
    agent, seen = probe_agent("awm", epochs=1, times=3, minibatches=4, lr=0.0), []
    leash = agent.leash
    agent.leash = lambda velocity, at: seen.append(at) or leash(velocity, at)
    agent.learn(ROWS)
    used = []
    for at in seen:
        samples = at.sample.view(3, -1, 2)
        assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
        assert len(at.t.unique()) == len(at.t)
        used.append(samples[0])
    assert len(seen) == 4 and len(torch.cat(used).unique(dim=0)) == ROWS


def test_average_follows_the_model():
    agent = probe_agent("awm", ema_decay=0.5, epochs=1, minibatches=1, lr=1e-2)
    start = weights(agent.average)
    agent.learn(ROWS)
    for a, b, c in zip(weights(agent.average), start, weights(agent.model), strict=True):
        close(a, 0.5 * b + 0.5 * c, 1e-6)


def test_silence_teaches_nothing():
    agent = probe_agent("awm", silent)
    agent.learn(2 * ROWS)
    x = noises(8)
    assert torch.equal(agent.sample(x), agent.env.policy(agent.reference).sample(x))
