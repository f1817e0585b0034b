"""``nft``: golden numbers of the public code, its binary mode and its log, and what ends the drift."""

from __future__ import annotations

import pytest
import torch
from probes import ROWS, close, noises, probe_agent, same, share, silent, weights

from agents.nft import nft_loss, old_decay, optimality
from prefenv.matching import matching_error


@pytest.fixture
def nft(golden):
    """Golden arrays in our convention: t = 1 - sigma, velocities turned round."""
    g = {k: torch.as_tensor(v) for k, v in golden("04c_diffusion_nft").items()}
    return {**g, **{k: -g[k] for k in ("v_theta", "v_old", "v_ref")}, "t": 1 - g["t"]}


# The public modes act on clipped advantages, before they are divided by the clip.
MODES = {
    "all": lambda a: a,
    "positive_only": lambda a: a.clamp_min(0),
    "negative_only": lambda a: a.clamp_max(0),
    "one_only": lambda a: (a > 0).to(a.dtype),
    "binary": torch.sign,
}


def goodness(g, mode):
    clip = float(g["adv_clip_max"])
    return optimality(MODES[mode](g["advantages"].clamp(-clip, clip)), clip)


def rows(g, r, beta, velocity=None):
    velocity = g["v_theta"] if velocity is None else velocity
    return nft_loss(g["xt"], g["t"], g["x0"], velocity, g["v_old"], r, beta)


def test_the_golden_points_are_ours(nft):
    close(torch.lerp(nft["noise"], nft["x0"], nft["t"].view(-1, 1, 1, 1)), nft["xt"])


@pytest.mark.parametrize("mode", MODES)
def test_loss_matches_golden_and_the_logged_one_holds_the_kl(nft, mode):
    """The public code adds the KL in place to the tensor that it logs as the policy's loss."""
    r, c = goodness(nft, mode), float(nft["adv_clip_max"])
    kl = matching_error(nft["v_theta"], nft["v_ref"]).mean()
    for i, beta in enumerate(nft["beta"].tolist()):
        close(r, nft[f"{mode}_r"][i])
        each = rows(nft, r, beta)
        close(each, nft[f"{mode}_per_sample_policy_loss"][i])
        policy = c * each.mean()
        close(policy, nft[f"{mode}_policy_loss"][i])
        close(policy + nft["kl_beta"] * kl, nft[f"{mode}_loss"][i])
        close(nft[f"{mode}_logged_policy_loss"][i] - policy, nft["kl_beta"] * kl, 1e-12)


def test_gradient_and_kl_match_golden(nft):
    r, c = goodness(nft, "all"), float(nft["adv_clip_max"])
    for i, beta in enumerate(nft["beta"].tolist()):
        velocity = nft["v_theta"].clone().requires_grad_(True)
        kl = matching_error(velocity, nft["v_ref"]).mean()
        close(kl.detach(), nft["all_kl_div"][i])
        loss = c * rows(nft, r, beta, velocity).mean() + nft["kl_beta"] * kl
        close(-torch.autograd.grad(loss, velocity)[0], nft["all_grad_v_theta"][i])


def test_both_implicit_policies_match_golden(nft):
    """``r = 1`` leaves the good one's loss, ``r = 0`` the bad one's."""
    for i, beta in enumerate(nft["beta"].tolist()):
        for r, side in ((1.0, "positive"), (0.0, "negative")):
            got = beta * rows(nft, torch.full((4,), r).double(), beta)
            close(got, nft[f"all_{side}_loss"][i])
            implicit = torch.lerp(nft["v_old"], nft["v_theta"], beta if r else -beta)
            close(-implicit, nft[f"all_v_{side}"][i])


def test_public_binary_mode_is_hardly_binary(nft):
    """Both numbers: the good weigh 0.6 and the bad 0.4 as coded, 1 and 0 here; losses 1.8569 and 1.8807."""
    c, beta = float(nft["adv_clip_max"]), float(nft["beta"][0])
    ours = optimality(nft["advantages"], c, binary=True)
    assert nft["binary_r"][0].tolist() == pytest.approx([0.6, 0.4, 0.6, 0.4])
    assert ours.tolist() == [1.0, 0.0, 1.0, 0.0]
    losses = [float(c * rows(nft, r, beta).mean()) for r in (nft["binary_r"][0], ours)]
    assert losses[0] == pytest.approx(float(nft["binary_policy_loss"][0]), rel=1e-9)
    assert [round(x, 4) for x in losses] == [1.8569, 1.8807]


def test_old_decay_matches_golden(nft):
    """The three public schedules: none at all, slowly to 0.5, and late but fast to 0.999."""
    for kind, rate, wait, most in ((0, 0.0, 0, 0.0), (1, 1e-3, 0, 0.5), (2, 7.5e-3, 75, 0.999)):
        got = [old_decay(step, rate, wait, most) for step in nft["decay_steps"].tolist()]
        close(torch.tensor(got, dtype=torch.float64), nft[f"decay_type{kind}"])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_first_step_from_the_old_policy_by_hand(beta):
    """At ``v = v_old`` the gradient is ``2 (1 - t) (2 r - 1) gap / (D w)``, whatever ``beta`` is."""
    x_t, x1, v = torch.randn(3, 5, 4, dtype=torch.float64)
    t, r = torch.rand(2, 5, dtype=torch.float64)
    velocity = v.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(nft_loss(x_t, t, x1, velocity, v, r, beta).sum(), velocity)
    left = (1 - t)[:, None]
    gap = x_t + left * v - x1
    w = gap.abs().mean(1, keepdim=True)
    close(grad, 2 * left * (2 * r - 1)[:, None] * gap / (4 * w))


# The agent


def test_the_old_policy_proposes_and_follows():
    """A decay of 0.25 in round 1 leaves a quarter of the old weights; in round 0 none are left."""
    agent = probe_agent("nft", rate=0.25, lr=1e-2)
    x = noises(16)
    for round_, kept in ((0, 0.0), (1, 0.25)):
        before = weights(agent.old)
        agent.learn(ROWS)
        assert agent.rounds == round_ + 1
        for a, b, c in zip(weights(agent.old), before, weights(agent.model), strict=True):
            close(a, kept * b + (1 - kept) * c, 1e-6)
    assert torch.equal(agent.behaviour().sample(x), agent.env.policy(agent.old).sample(x))
    assert not torch.equal(agent.behaviour().sample(x), agent.sample(x))


def test_the_kl_ends_the_drift_and_beta_does_not():
    """Where the KL balances the pull, ``beta`` has dropped out; without a KL nothing ends the drift."""
    drift = {}
    for kl in (0.0, 0.05, 0.5):
        agent, seen = probe_agent("nft", kl_coef=kl), []
        agent.learn(10 * ROWS, callback=lambda _, m, s=seen: s.append(m["drift"]))
        drift[kl] = seen[-1], share(agent)
    (free, all_right), (held, most), (tight, some) = drift.values()
    assert free > 1.5 * held > 3 * tight, drift
    assert all_right > 0.99 > some > 0.6 and all_right >= most > some, drift


def test_metrics_are_clean_and_evaluations_booked():
    """The policy's loss does not hold the KL: at lr 0 it is the same for any ``kl_coef``."""
    losses = []
    for kl in (0.0, 10.0):
        agent, seen = probe_agent("nft", kl_coef=kl, lr=0.0), []
        with torch.no_grad():
            agent.model.field.change.out.bias += 0.5
        agent.learn(ROWS, callback=lambda _, m, s=seen: s.append(m))
        losses.append(seen[0]["policy_loss"])
        assert seen[0]["drift"] == pytest.approx(0.25, rel=1e-4)
    assert losses[0] == losses[1]
    cfg = agent.config
    assert agent.env.ledger.nfe == ROWS * agent.env.steps + 3 * cfg.updates * cfg.batch


def test_silence_teaches_nothing():
    agent = probe_agent("nft", silent)
    before = weights(agent.model)
    agent.learn(2 * ROWS)
    assert same(before, weights(agent.model)) and same(before, weights(agent.old))
