"""The options of ``ppo`` and ``d3po``: path ratios, averaged log-probabilities, margins and ties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from probes import ROWS, noises, probe_agent, share
from torch.distributions import Independent, Normal

from agents.d3po import d3po_loss, preferred_pairs
from agents.ppo import advantages, gaussian_kl, ppo_loss
from prefenv.errors import ConfigError
from prefenv.kernels import Kernel
from prefenv.rollout import collect
from prefenv.testing.probe import ProbeVelocity, probe_env, right

OPTIONS = [(ratio, reduction) for ratio in ("step", "path") for reduction in ("sum", "mean")]
every_option = pytest.mark.parametrize(("ratio", "reduction"), OPTIONS)
STILL = {"lr": 0.0, "epochs": 1, "minibatches": 1, "anchor": 0.0}


def close(got, want, tolerance=1e-4):
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=tolerance, atol=tolerance)


def moved(shift, **settings):
    """A ppo whose model's velocity is the reference's plus a constant."""
    agent = probe_agent("ppo", **settings)
    with torch.no_grad():
        agent.model.field.change.out.bias += shift
    return agent


def gradient(agent):
    return torch.cat([p.grad.flatten() for p in agent.model.parameters()])


def log_ratios(agent, rollout):
    """``log p_theta - log p_old`` of each stochastic step, ``(S, B)``, by ``torch.distributions``."""
    out = []
    for i in agent.policy.stochastic_steps:
        a, b, std = (float(c[i]) for c in agent.policy.table)
        x, x_next = rollout.path[i], rollout.path[i + 1]
        mean = a * x + b * agent.model.velocity(x, i / agent.env.steps)
        step = Independent(Normal(mean.double(), std), 1)
        out.append(step.log_prob(x_next.double()) - rollout.log_prob[i].double())
    return torch.stack(out)


# ppo: what a ratio is


@every_option
def test_loss_is_the_closed_form_off_the_old_policy(ratio, reduction):
    """Ratios, clip and scale put together by hand; the model has moved, so that the clip is felt."""
    clip_range = 0.2
    agent = moved(0.4, ratio=ratio, reduction=reduction, clip_range=clip_range, **STILL)
    rollout = collect(agent.env, probe_agent("ppo").policy)
    log_ratio = log_ratios(agent, rollout).detach()
    dim, steps = (2 if reduction == "mean" else 1), len(log_ratio)
    log_ratio = (log_ratio.sum(0, keepdim=True) if ratio == "path" else log_ratio) / dim
    advantage = advantages(rollout.judgement, 5.0).double()
    rho = log_ratio.exp()
    clipped = rho.clamp(1 - clip_range / dim, 1 + clip_range / dim)
    each = torch.maximum(-advantage * rho, -advantage * clipped)
    want = dim * each.mean() / (steps if ratio == "path" else 1)
    beyond = ((rho - 1).abs() > clip_range / dim).double().mean()
    metrics = agent.update(rollout)
    assert steps == 3 and 0.05 < float(beyond) < 0.95
    assert metrics["loss"] == pytest.approx(float(want), rel=1e-4, abs=1e-6)
    assert metrics["clipped"] == pytest.approx(float(beyond), abs=1e-6)
    assert metrics["ratio_error"] == pytest.approx(float((rho - 1).abs().max()), rel=1e-4)


def test_path_ratio_is_the_product_of_the_steps():
    log_prob, old = torch.randn(2, 4, 9, dtype=torch.float64)
    advantage = torch.randn(9, dtype=torch.float64)
    product = (log_prob - old).exp().prod(0)
    want = -torch.minimum(advantage * product, advantage * product.clamp(0.8, 1.2))
    close(ppo_loss(log_prob.sum(0), old.sum(0), advantage, 0.2), want, 1e-9)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_all_four_are_the_same_update_to_first_order(kl_coef):
    """At the old policy, away from the reference: one gradient, with the weight of the KL beside it the same."""
    rollout = collect(probe_env(num_envs=ROWS)[0], moved(0.3).policy)
    grads = []
    for ratio, reduction in OPTIONS:
        agent = moved(0.3, ratio=ratio, reduction=reduction, kl_coef=kl_coef, **STILL)
        assert agent.update(rollout)["ratio_error"] < 1e-3
        grads.append(gradient(agent))
    assert float(grads[0].norm()) > 1e-2
    for grad in grads[1:]:
        close(grad, grads[0])


def test_anchor_weighs_the_same_beside_a_sum_and_a_mean():
    """Same seed, same points of the anchor: a mean must not make it D times as heavy."""
    rollout = collect(probe_env(num_envs=ROWS)[0], moved(0.3).policy)
    grads = []
    for anchor, reduction in ((0.0, "sum"), (5.0, "sum"), (5.0, "mean")):
        agent = moved(0.3, reduction=reduction, **{**STILL, "anchor": anchor})
        agent.update(rollout)
        grads.append(gradient(agent))
    assert float((grads[1] - grads[0]).norm()) > 0.1 * float(grads[0].norm())
    close(grads[2], grads[1])


def test_rounds_of_a_mean_are_rounds_of_a_sum():
    """Five rounds with default settings end in nearly the same weights: the clip scales along."""
    ends = []
    for reduction in ("sum", "mean"):
        agent = probe_agent("ppo", reduction=reduction).learn(5 * ROWS)
        ends.append(torch.cat([p.detach().flatten() for p in agent.model.parameters()]))
    start = torch.cat([p.flatten() for p in probe_agent("ppo").reference.parameters()])
    assert float((ends[0] - ends[1]).norm()) < 0.05 * float((ends[0] - start).norm())


def test_defaults_are_the_plain_loop_bit_for_bit():
    """Written out once more, without any option: shuffled steps, clipped ratios, the anchor, Adam."""
    agent, plain = probe_agent("ppo"), probe_agent("ppo")
    agent.learn(3 * ROWS)
    cfg, policy, model = plain.config, plain.policy, plain.model
    assert (cfg.ratio, cfg.reduction, cfg.kl_coef) == ("step", "sum", 0.0)
    for _ in range(3):
        rollout = collect(plain.env, policy)
        batch = rollout.transitions(policy.stochastic_steps)
        gain = advantages(rollout.judgement, cfg.adv_clip)[batch.row]
        for _ in range(cfg.epochs):
            order = torch.randperm(len(gain), generator=plain.generator)
            for part in order.chunk(cfg.minibatches):
                log_prob = policy.log_prob(batch.x[part], batch.index[part], batch.x_next[part])
                loss = ppo_loss(log_prob, batch.log_prob[part], gain[part], cfg.clip_range).mean()
                loss = loss + cfg.anchor * plain.drift(rollout, len(part))
                plain.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
                plain.optimizer.step()
                plain.env.ledger.nfe += len(part)
    assert all(map(torch.equal, agent.model.parameters(), model.parameters()))
    assert agent.env.ledger.nfe == plain.env.ledger.nfe


@every_option
def test_every_option_learns_and_books_what_it_spends(ratio, reduction):
    seen = []
    agent = probe_agent("ppo", right, ratio=ratio, reduction=reduction, kl_coef=0.01)
    before = ProbeVelocity.evaluated
    agent.learn(15 * ROWS, callback=lambda _, m: seen.append(m))
    assert ProbeVelocity.evaluated - before == agent.env.ledger.nfe
    assert share(agent) > 0.85 and all(m["ratio_error"] < 1e-3 for m in seen)
    again = probe_agent("ppo", right, ratio=ratio, reduction=reduction, kl_coef=0.01).learn(
        15 * ROWS
    )
    assert torch.equal(agent.sample(noises()), again.sample(noises()))


def test_kl_is_that_of_the_steps_whatever_the_ratio():
    """The mean over the steps that were evaluated, in nats: neither the path's nor divided by D."""
    for ratio, reduction in OPTIONS:
        agent = moved(0.3, ratio=ratio, reduction=reduction, kl_coef=1.0, **STILL)
        metrics = agent.update(collect(agent.env, agent.policy))
        mean = torch.zeros(1, 2)
        want = [
            float(gaussian_kl(mean + float(b) * 0.3, mean, torch.full((1, 1), float(std))))
            for _, b, std in zip(*agent.policy.table, strict=True)
            if float(std) > 0
        ]
        assert metrics["kl"] == pytest.approx(sum(want) / len(want), rel=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"ratio": "all"}, {"reduction": "max"}], ids=lambda w: next(iter(w))
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError, match="reduction is sum or mean and ratio is step or path"):
        probe_agent("ppo", **wrong)


def test_a_kernel_without_noise_is_refused():
    with pytest.raises(ConfigError, match="ppo needs a step with noise"):
        probe_agent("ppo", kernel=Kernel("constant", 0.0))


# d3po: margins and ties


def test_margin_is_asked_of_the_log_odds():
    w, l = torch.tensor([0.3, -0.2, 0.0]), torch.tensor([-0.1, 0.5, 0.0])
    margin = torch.tensor([0.5, 0.0, 2.0])
    want = (1 + (margin - 0.7 * (w - l)).exp()).log()
    close(d3po_loss(w, l, 0.7, 0.9, "none", margin=margin), want, 1e-6)
    close(d3po_loss(w, l, 0.7, 0.9, margin=0.0), -F.logsigmoid(0.7 * (w - l)), 1e-6)


def test_margin_grows_with_the_gap_of_the_judgements():
    """Each pair's own gap: of a model that has moved, so that every pair has log-ratios of its own."""
    settings = {
        "lr": 0.0,
        "anchor": 0.0,
        "minibatches": 1,
        "clamp": "none",
        "tie": 0.1,
        "beta": 0.7,
    }
    agent = probe_agent("d3po", margin=2.0, **settings)
    rollout = collect(agent.env, agent.frozen)
    rollout.judgement = r = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    for shift in (0.0, 0.5):
        with torch.no_grad():
            agent.model.field.change.out.bias += shift
        ratio = log_ratios(agent, rollout).detach()
        losses = [
            F.softplus(2 * (r[w] - r[l]) - 0.7 * (ratio[:, w] - ratio[:, l])).mean()
            for w in range(ROWS)
            for l in range(w - w % 4, w - w % 4 + 4)
            if r[w] - r[l] > 0.1
        ]
        metrics = agent.update(rollout)
        assert metrics["pairs"] == len(losses) > 20
        assert metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_ties_make_no_pair_and_neither_does_silence():
    """A difference of just ``tie`` is a tie; with ``tie = 0`` only equal judgements are."""
    judgement = torch.tensor([[0.5, 0.75, 0.25, math.nan], [1.0, 1.0, 1.0, 1.0]])

    def pairs(tie):
        return set(zip(*(i.tolist() for i in preferred_pairs(judgement, tie)), strict=True))

    assert (
        pairs(0.0) == {(0, 2), (1, 0), (1, 2)} and pairs(0.25) == {(1, 2)} and pairs(0.5) == set()
    )
