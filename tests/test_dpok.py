"""``dpok``: golden numbers of both public codes, the true KL beside them, and the baseline."""

from __future__ import annotations

import math

import pytest
import torch
from probes import ROWS, close, constant, gaussian, noises, probe_agent, share
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from agents.dpok import Value, dpok_loss
from agents.ppo import gaussian_kl, ppo_loss
from prefenv.errors import ConfigError
from prefenv.kernels import Kernel
from prefenv.policy import FlowPolicy
from prefenv.rollout import collect
from prefenv.testing.probe import ProbeVelocity, right


@pytest.fixture
def g(tensors):
    return tensors("03_policy_losses")


# The surrogate


def surrogate(g, clamp):
    """The golden rows by our function: losses, and gradients of the golden loss to the log-probabilities."""
    log_prob = g["dpok_logp"].clone().requires_grad_(True)
    clip = float(g["dpok_ratio_clip"])
    each = dpok_loss(log_prob, g["dpok_old_logp"], g["dpok_advantage"], clip, clamp)
    scale = float(g["dpok_reward_weight"]) / int(g["dpok_grad_accum"])
    (grad,) = torch.autograd.grad(scale * each.mean(), log_prob)
    return each.detach(), grad


def test_two_sided_matches_golden(g):
    """[ mean(-100 A clip(rho)) + 0.01 mean (pred - pretrained)^2 ] / 12, and both gradients."""
    each, grad = surrogate(g, "two-sided")
    close(-each / g["dpok_advantage"], g["dpok_ratio"])
    pred = g["dpok_pred"].clone().requires_grad_(True)
    coded = (pred - g["dpok_pretrained_pred"]).square().mean()
    close(coded.detach(), g["dpok_kl_mean"])
    weight, parts = float(g["dpok_kl_weight"]), int(g["dpok_grad_accum"])
    close(
        (float(g["dpok_reward_weight"]) * each.mean() + weight * coded.detach()) / parts,
        g["dpok_loss"],
    )
    close(grad, g["dpok_grad_logp"])
    close(torch.autograd.grad(weight * coded / parts, pred)[0], g["dpok_grad_pred"])


def test_one_sided_pulls_back_what_moved_the_wrong_way(g):
    """Rows 4 and 5 left the band the wrong way: 0 in the public code, ``-100 A rho / 8 / 12`` here."""
    _, public = surrogate(g, "two-sided")
    each, ours = surrogate(g, "one-sided")
    ratio, advantage = (g["dpok_logp"] - g["dpok_old_logp"]).exp(), g["dpok_advantage"]
    outside = (ratio - 1).abs() > float(g["dpok_ratio_clip"])
    wrong_way = outside & ((ratio - 1) * advantage < 0)
    assert wrong_way.nonzero()[:, 0].tolist() == [4, 5] and int(outside.sum()) == 4
    assert torch.equal(ours[~wrong_way], public[~wrong_way])
    close(public[wrong_way], torch.zeros(2, dtype=torch.float64))
    close(ours[wrong_way], (-100 * advantage * ratio / 96)[wrong_way])
    close(ours[wrong_way], torch.tensor([6.2512501, -7.2902084], dtype=torch.float64), 1e-7)
    close(
        each, ppo_loss(g["dpok_logp"], g["dpok_old_logp"], advantage, float(g["dpok_ratio_clip"]))
    )


# The KL


def batch_kl(log_prob, old):
    """D3PO's: of two softmaxes over the batch, by ``torch.distributions``."""
    return kl_divergence(Categorical(logits=log_prob), Categorical(logits=old))


def test_the_kl_of_d3pos_dpok_is_empty(g):
    """1.09e-8 for its batch of 8 and 0 for its default batch of 1; the steps' own KL does not depend on it."""
    log_prob, old = g["ddpo_logp"], g["ddpo_old_logp"]
    close(batch_kl(log_prob, old), g["d3po_dpok_batch_kl"])
    assert float(g["d3po_dpok_batch_kl"]) == pytest.approx(1.0905e-8, rel=1e-4)
    assert float(batch_kl(log_prob[:1], old[:1])) == float(g["d3po_dpok_single_kl"]) == 0
    clip = float(g["ddpo_clip_range"])
    advantage = g["ddpo_advantages"].clamp(-5, 5)
    policy = ppo_loss(log_prob, old, advantage, clip)
    weight = float(g["d3po_dpok_kl_ratio"])
    close(policy.mean() + weight * g["d3po_dpok_batch_kl"], g["d3po_dpok_batch_loss"])
    close(policy[0], g["d3po_dpok_single_loss"])
    # A single step that has moved by 0.3 of its std in each of 32 dimensions: 1.44 nats, not 0.
    mean = torch.zeros(1, 32, dtype=torch.float64)
    std = torch.full((1, 1), 0.5, dtype=torch.float64)
    moved = mean + 0.3 * std
    true = gaussian_kl(moved, mean, std)
    close(true, torch.tensor([32 * 0.3**2 / 2], dtype=torch.float64))
    x = moved + std * torch.randn(1, 32, dtype=torch.float64)
    log_probs = [Independent(Normal(m, std.expand(1, 32)), 1).log_prob(x) for m in (moved, mean)]
    assert float(batch_kl(*log_probs)) == 0 < float(true)


def test_the_coded_kl_lacks_the_coefficient_of_each_step(g):
    """True: ``b^2 D / (2 std^2)`` times the mean square of the predictions' difference."""
    v, v_ref = g["dpok_pred"][:4], g["dpok_pretrained_pred"][:4]
    x, coded = torch.randn_like(v), (v - v_ref).square().flatten(1).mean(1)
    kernel, times = Kernel("flow-sde", 0.7), torch.linspace(0, 1, 17, dtype=torch.float64)
    factors = []
    for t, u in zip(times[:5], times[1:6], strict=True):
        _, b, std = kernel.coefficients(t, u)
        mean, reference = (kernel.mean(x, w, t, u) for w in (v, v_ref))
        true = gaussian_kl(mean, reference, std.view(1, 1, 1, 1))
        wide = std.expand_as(mean)
        ours, theirs = (Independent(Normal(m, wide), 3) for m in (mean, reference))
        close(true, kl_divergence(ours, theirs))
        factors.append(float(b**2 * 18 / (2 * std**2)))
        close(true, factors[-1] * coded)
    assert max(factors) / min(factors) > 3, factors


def test_kl_of_the_path_is_at_least_that_of_the_samples():
    """A constant added to the velocity of an exact Gaussian flow: all is Gaussian, both KLs have closed forms."""
    shift, mean, spread = 0.4, 0.5, 0.7
    policy = FlowPolicy(gaussian(mean, spread, torch.float64), Kernel("flow-sde", 0.7), 16)
    variance, gap, path = 1.0, 0.0, 0.0
    for i, t in enumerate(policy.times[:-1].tolist()):
        a, b, std = (float(c[i]) for c in policy.table)
        rate = (t * spread**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * spread**2)
        path += (b * shift) ** 2 / (2 * std**2)
        gap = (a + b * rate) * gap + b * shift
        variance = (a + b * rate) ** 2 * variance + std**2
    samples = gap**2 / (2 * variance)
    assert 0.1 < samples < path < 10 * samples


def test_metric_is_the_true_kl_to_the_reference_not_to_the_old_policy():
    """The model moved before it collected: its old policy is itself, its KL to the reference is not 0."""
    agent = probe_agent(
        "dpok", lr=0.0, epochs=1, minibatches=1, anchor=0.0, kl_coef=0.5, value_lr=0.0
    )
    with torch.no_grad():
        agent.model.field.change.out.bias += 0.3
    rollout = collect(agent.env, agent.policy)
    rollout.judgement = torch.full((ROWS,), math.nan)
    metrics = agent.update(rollout)
    _, b, std = agent.policy.table
    steps = agent.policy.stochastic_steps
    want = sum((float(b[i]) * 0.3 / float(std[i])) ** 2 for i in steps) / len(steps)
    assert metrics["ratio_error"] < 1e-3 and metrics["kl"] == pytest.approx(want, rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.5 * want, rel=1e-4)
    close(agent.model.field.change.out.bias.grad, torch.full((2,), 0.5 * want / 0.3), 1e-4)


def test_a_larger_kl_coef_stays_nearer():
    kl = []
    for kl_coef in (0.0, 1.0):
        agent = probe_agent("dpok", lr=3e-3, kl_coef=kl_coef, anchor=0.0).learn(8 * ROWS)
        seen: list[dict] = []
        agent.optimizer.param_groups[0]["lr"] = 0.0
        object.__setattr__(agent.config, "kl_coef", 1.0)
        agent.learn(ROWS, callback=lambda _, m, seen=seen: seen.append(m))
        kl.append(seen[0]["kl"])
    assert kl[0] > 3 * kl[1] > 0, kl


# The baseline


def test_value_is_zero_at_first_and_can_learn_what_x_and_t_tell():
    value = Value(3, 32)
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(400, 3, generator=rng), torch.rand(400, generator=rng)
    assert torch.equal(value(x, t), torch.zeros(400)) and value(x[:, :, None], t).shape == (400,)
    target = torch.where(t > 0.5, x[:, 0].tanh(), -x[:, 1].tanh())
    optimizer = torch.optim.Adam(value.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (value(x, t) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * float(target.var())


def test_baseline_learns_and_knows_more_the_later_it_is():
    """With the policy at rest: its error falls below the judgements' variance, most at the last of the steps."""
    agent, seen = probe_agent("dpok", lr=0.0, value_lr=1e-2, num_envs=256), []
    agent.learn(12 * 256, callback=lambda _, m: seen.append(m["value_error"]))
    rollout = collect(agent.env, agent.policy)
    variance = float(rollout.judgement.var())
    assert seen[0] == pytest.approx(float((rollout.judgement**2).mean()), rel=0.2), (
        "V is 0 at first"
    )
    assert seen[-1] < 0.8 * variance < seen[0]
    batch = rollout.transitions(agent.policy.stochastic_steps)
    with torch.no_grad():
        error = (agent.value(batch.x, batch.index / 8) - rollout.judgement[batch.row]).square()
    by_step = error.view(-1, 256).mean(1)
    assert by_step[-1] < by_step[0]


def test_advantage_is_the_judgement_less_the_baseline_before_its_fit():
    """With V = 0.25 everywhere, the loss at the old policy is ``-mean(r - 0.25)``, no answer counting 0."""
    agent = probe_agent("dpok", lr=0.0, epochs=1, minibatches=1, anchor=0.0, kl_coef=0.0)
    with torch.no_grad():
        agent.value.out.bias.fill_(0.25)
    rollout = collect(agent.env, agent.policy)
    rollout.judgement = torch.linspace(0, 1, ROWS)
    rollout.judgement[::4] = math.nan
    told = rollout.judgement[~rollout.judgement.isnan()]
    metrics = agent.update(rollout)
    assert metrics["loss"] == pytest.approx(-float((told - 0.25).sum()) / ROWS, rel=1e-5)
    assert metrics["value_error"] == pytest.approx(float((told - 0.25).square().mean()), rel=1e-5)
    assert float(agent.value.out.bias.detach()) != 0.25, "it was fitted afterwards"


def test_silence_is_not_fitted():
    agent = probe_agent("dpok", constant(math.nan), lr=5e-3)
    before = [p.clone() for p in (*agent.model.parameters(), *agent.value.parameters())]
    agent.learn(3 * ROWS)
    after = [*agent.model.parameters(), *agent.value.parameters()]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    "settings", [{}, {"clamp": "two-sided"}, {"kl_coef": 0.0, "value_lr": 0.0}], ids=len
)
def test_it_learns_and_books_what_it_spends(settings):
    agent = probe_agent("dpok", right, **{"lr": 5e-3, **settings})
    before = ProbeVelocity.evaluated
    agent.learn(15 * ROWS)
    assert ProbeVelocity.evaluated - before == agent.env.ledger.nfe
    assert share(agent) > 0.8


def test_baseline_goes_on_after_a_save(tmp_path):
    agent = probe_agent("dpok").learn(2 * ROWS)
    agent.save(tmp_path / "a.zip")
    loaded = type(agent).load(tmp_path / "a.zip", probe_agent("dpok").env)
    x, t = noises(10), torch.full((10,), 0.2)
    assert torch.equal(agent.value(x, t), loaded.value(x, t)) and bool(
        (agent.value(x, t) != 0).all()
    )
    agent.learn(2 * ROWS)
    loaded.learn(2 * ROWS)
    assert torch.equal(agent.value(x, t), loaded.value(x, t))
    assert torch.equal(agent.sample(x), loaded.sample(x))


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="one-sided or two-sided"):
        probe_agent("dpok", clamp="none")
