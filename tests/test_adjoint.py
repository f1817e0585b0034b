"""``adjoint``: golden numbers of the paper's form, a public code's defects, and what a step is learned from."""

from __future__ import annotations

import math

import pytest
import torch
from probes import ROWS, close, gaussian, noises, probe_agent, same, share, silent, weights

from agents.adjoint import adjoint_loss, lean_adjoint
from prefenv.kernels import Affine, Kernel
from prefenv.policy import FlowPolicy
from prefenv.rollout import collect
from prefenv.testing.probe import ProbeVelocity

# The paper's memoryless steps


@pytest.fixture
def flow(tensors):
    """Golden 05b as affine steps, with the golden's offset of one step in sigma."""
    g = tensors("05b_adjoint_matching_flow")
    t, h = g["ts"][:-1], 1 / int(g["num_steps"])
    table = Affine(1 - h / (t + h), torch.full_like(t, 2 * h), g["sigma"] * h**0.5)
    terminal = (
        g["reward_multiplier"] * g["reward_precision"] * (g["trajectory"][-1] - g["reward_mean"])
    )
    return {**g, "table": table, "h": h, "terminal": terminal}


def net(g, kind, x, k, v=None, w=None):
    v = g[f"net_{kind}_V"] if v is None else v
    w = g[f"net_{kind}_W"] if w is None else w
    return (x @ w.T + g["ts"][k] * g["net_c"]).tanh() @ v.T


def flow_adjoint(g):
    return lean_adjoint(
        lambda x, k: net(g, "base", x, k), g["trajectory"], g["table"], g["terminal"]
    )


def flow_losses(g, sign=1.0, v=None, w=None):
    """Losses ``(steps, B)`` of the paper's form, which is ours divided by the step."""
    adjoint, met = flow_adjoint(g)
    each = []
    for k in range(int(g["num_steps"])):
        change = net(g, "ft", g["trajectory"][k], k, v, w) - met[k]
        each.append(adjoint_loss(change, sign * adjoint[k], g["table"].b[k], g["table"].std[k]))
    return torch.stack(each) / g["h"]


def test_flow_adjoint_loss_and_gradients_match_golden(flow):
    a, b, std = flow["table"]
    for k in range(8):
        x = flow["trajectory"][k]
        mean = a[k] * x + b[k] * net(flow, "ft", x, k)
        close(mean + std[k] * flow["noise"][k], flow["trajectory"][k + 1])
    adjoint, met = flow_adjoint(flow)
    close(adjoint, flow["lean_adjoint"])
    close(adjoint[:-1], flow["fdc_lean_adjoint"], 1e-8)
    close(met, flow["v_base"])
    v, w = (flow[f"net_ft_{p}"].clone().requires_grad_(True) for p in "VW")
    each = flow_losses(flow, v=v, w=w)
    close(each.detach(), flow["loss_per_step_sample"])
    close(each.mean().detach(), flow["loss"])
    grad_v, grad_w = torch.autograd.grad(each.mean(), (v, w))
    close(grad_v, flow["grad_V"])
    close(grad_w, flow["grad_W"])


def test_public_flow_code_descends_against_the_reward(flow):
    """Both numbers: its loss is 38.45 with its sign, 35.97 with the paper's; its descent is against the reward."""
    each = {sign: float(flow_losses(flow, sign).sum(1).mean()) for sign in (-1.0, 1.0)}
    assert each[-1.0] == pytest.approx(float(flow["fdc_loss_as_coded"]), rel=1e-12)
    assert [round(x, 2) for x in each.values()] == [38.45, round(3 * float(flow["loss"]), 2)]
    assert round(each[1.0], 2) == 35.97
    adjoint, met = flow_adjoint(flow)
    along = {}
    for sign in (-1.0, 1.0):
        change = torch.zeros_like(met, requires_grad=True)
        b, std = (c[:, None, None] for c in flow["table"][1:])
        loss = sum(
            adjoint_loss(change[k], sign * adjoint[k], b[k], std[k]).sum() / flow["h"]
            for k in range(8)
        )
        (grad,) = torch.autograd.grad(loss / 8, change)
        along[sign] = float((-grad * -adjoint[:-1]).sum())
    assert along[-1.0] == pytest.approx(
        float(flow["fdc_descent_direction_dot_reward_direction"]), rel=1e-9
    )
    assert along[-1.0] < 0 < along[1.0] and along[1.0] == pytest.approx(-along[-1.0])


def test_ours_learns_from_every_noisy_step_and_has_a_finite_sigma(flow):
    """The public code keeps the first quarter of the steps, of four chosen 0 and 1, and an infinite sigma at 0."""
    assert flow["fdc_timestep_subset"].tolist()[:2] == [0, 1]
    for kernel in (Kernel("ddim", 1.0), Kernel("memoryless")):
        times = torch.linspace(0, 1, 9, dtype=torch.float64)
        assert bool(torch.stack(kernel.coefficients(times[:-1], times[1:])).isfinite().all())
        agent = probe_agent("adjoint", kernel=kernel, anchor=0.0)
        noisy = [i for i in range(agent.env.steps) if agent.policy.std(i) > 0]
        assert noisy == list(range(agent.env.steps))[: len(noisy)] and len(noisy) >= 7
        seen, velocity = [], agent.model.velocity
        agent.model.velocity = lambda x, t, c=None, s=seen, v=velocity: s.append(t) or v(x, t)
        rollout = collect(agent.env, agent.policy, gradient=True)
        seen.clear()
        agent.update(rollout)
        counts = torch.cat(seen).unique(return_counts=True)[1]
        assert counts.tolist() == [agent.config.epochs * ROWS] * len(noisy)


@pytest.mark.parametrize("kernel", [Kernel("memoryless"), Kernel("ddim", 1.0)])
def test_fine_steps_have_the_closed_forms(tensors, kernel):
    """Gaussian data, reward ``lambda a . x``: ``a~ = -lambda a t s^2 / S_t``, and no loss at the optimum."""
    g = tensors("05b_adjoint_matching_flow")
    s, slope, steps = float(g["cf_s"]), float(g["cf_lambda"]) * g["cf_a"], 800
    reference = gaussian(torch.zeros(3), s, torch.float64)
    policy = FlowPolicy(reference, kernel, steps)
    x = torch.randn(steps + 1, 2, 3, dtype=torch.float64)
    adjoint, _ = lean_adjoint(
        lambda y, k: reference.velocity(y, float(policy.times[k])),
        x,
        policy.table,
        -slope.expand(2, 3),
    )
    for t, want, change in zip(
        g["cf_t"], g["cf_lean_adjoint"], g["cf_v_star_minus_v"], strict=True
    ):
        k = round(float(t) * steps)
        close(adjoint[k], want.expand(2, 3), 5e-3)
        if 0.05 < t < 0.95:
            b, std = (c[k].double() for c in policy.table[1:])
            at = [adjoint_loss(c * change.expand(2, 3), adjoint[k], b, std) for c in (0.0, 1.0)]
            assert bool((at[1] < 1e-3 * at[0]).all())


# The agent


def test_both_ends_of_a_step_by_hand():
    """The target of each step is the adjoint of its end, or with ``start`` of its start."""
    for adjoint in ("end", "start"):
        agent = probe_agent("adjoint", adjoint=adjoint, epochs=1, minibatches=1, lr=0.0, beta=0.4)
        rollout, policy = collect(agent.env, agent.policy, gradient=True), agent.policy
        a = [-rollout.gradient / 0.4]
        for k in reversed(range(agent.env.steps)):
            x = rollout.path[k].clone().requires_grad_(True)
            step = policy.table.a[k] * x + policy.table.b[k] * agent.reference.velocity(
                x, float(policy.times[k])
            )
            a.append(torch.autograd.grad(step, x, a[-1].to(step))[0])
        a = a[::-1]
        want = [
            float((policy.std(k) * a[k + (adjoint == "end")]).square().sum(1).mean())
            for k in policy.stochastic_steps
        ]
        metrics = agent.update(rollout)
        assert metrics["loss"] == pytest.approx(sum(want) / len(want), rel=1e-4)
        target = torch.stack([a[k + (adjoint == "end")] for k in policy.stochastic_steps])
        assert metrics["adjoint"] == pytest.approx(float(target.norm(dim=2).mean()), rel=1e-4)
        assert float(a[0].abs().max()) < 1e-6, (
            "memoryless: the sample tells nothing about its noise"
        )


def test_beta_is_the_tasks_unless_it_is_set():
    loss = {}
    for beta in (None, 0.1, 0.2):
        agent, metrics = probe_agent("adjoint", beta=beta, lr=0.0), []
        agent.learn(ROWS, callback=lambda _, m, seen=metrics: seen.append(m["loss"]))
        loss[beta] = metrics[0]
    assert agent.env.task.beta == 0.1 and loss[None] == loss[0.1]
    assert loss[0.2] == pytest.approx(loss[0.1] / 4, rel=1e-5)


def test_learns_what_is_preferred_whichever_it_is():
    shares = []
    for answer in (lambda p: (4 * p[..., 0]).sigmoid(), lambda p: (-4 * p[..., 0]).sigmoid()):
        agent = probe_agent("adjoint", answer, lr=5e-3)
        agent.learn(15 * ROWS)
        shares.append(share(agent))
    assert shares[0] > 0.8 and shares[1] < 0.2, shares


def test_anchor_holds_the_step_that_has_no_noise():
    """It is the last one; without an anchor what is learned at earlier times moves its velocity too."""
    change = {}
    for anchor in (0.0, 100.0):
        agent = probe_agent("adjoint", lr=5e-3, anchor=anchor)
        agent.learn(5 * ROWS)
        x, t = agent.sample(noises(200)), float(agent.policy.times[-2])
        with torch.no_grad():
            moved = [agent.model.velocity(x, s) - agent.reference.velocity(x, s) for s in (t, 0.1)]
        change[anchor] = [float(m.square().mean()) for m in moved]
    assert change[100.0][0] < 0.02 * change[0.0][0] and change[100.0][1] > 0.1, change


def test_books_its_gradients_and_evaluations():
    agent = probe_agent("adjoint")
    before = ProbeVelocity.evaluated
    agent.learn(2 * ROWS)
    ledger, steps, cfg = agent.env.ledger, agent.env.steps, agent.config
    noisy = len(agent.policy.stochastic_steps)
    assert ledger.gradients == ledger.queries == 2 * ROWS
    anchored = cfg.epochs * cfg.minibatches * 2
    assert ledger.nfe == 2 * ROWS * (2 * steps + cfg.epochs * noisy + anchored)
    assert ProbeVelocity.evaluated - before == ledger.nfe


def test_unanswered_rows_are_left_out():
    def answer(panels):
        judged = (4 * panels[..., 0]).sigmoid()
        return judged.masked_fill(panels[..., 1] > 0, math.nan)

    agent = probe_agent("adjoint", answer, epochs=1, minibatches=1, anchor=0.0)
    rollout = collect(agent.env, agent.policy, gradient=True)
    told = int((~rollout.judgement.isnan()).sum())
    before = agent.env.ledger.nfe
    agent.update(rollout)
    steps, noisy = agent.env.steps, len(agent.policy.stochastic_steps)
    assert 0 < told < ROWS and agent.env.ledger.nfe - before == ROWS * steps + told * noisy
    quiet = probe_agent("adjoint", lambda p: silent(p) + 0 * p[..., 0])
    start = weights(quiet.model)
    quiet.learn(2 * ROWS)
    assert same(start, weights(quiet.model)) and bool(quiet.sample(noises(4)).isfinite().all())
