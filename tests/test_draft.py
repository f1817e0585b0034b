"""draft: its gradient against autograd through the whole chain, closed forms, and the adjoint that must agree."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from probes import LinearVelocity, Plain, gaussian, noises, probe_agent

from agents.adjoint import adjoint_loss, lean_adjoint
from agents.draft import draft_loss, predict, replay
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.oracle import Oracle
from prefenv.policy import FlowPolicy
from prefenv.registry import make_agent
from prefenv.rollout import collect
from prefenv.testing.probe import ProbeVelocity, probe_env, right

STEPS, ROWS = 6, 5
KERNELS = {"ode": Kernel("ode"), "ddim": Kernel("ddim", 1.0), "flow-sde": Kernel("flow-sde", 0.7)}


def reward(x):
    """Something smooth that is not linear."""
    return (x * torch.tensor([1.0, -0.5, 2.0]).to(x)).sum(1).sin() + x[:, 0].square() / 3


def walked(flow, kernel, steps=STEPS, rows=ROWS, dtype=torch.float64):
    """A policy, a path of it, and the noises that the path was drawn with."""
    policy, g = FlowPolicy(flow, kernel, steps), torch.Generator().manual_seed(0)
    shape = (rows, *flow.event_shape)
    noises = [torch.randn(shape, generator=g, dtype=dtype) for _ in range(steps + 1)]
    return policy, chain(policy, noises, 0).detach(), noises


def chain(policy, noises, start, x=None):
    """The path by its definition, differentiable: every state from ``start`` on."""
    path = [noises[-1] if x is None else x]
    for i in range(start, policy.steps):
        v = policy.flow.velocity(path[-1], float(policy.times[i]))
        path.append(policy.mean(path[-1], v, i) + policy.std(i) * noises[i])
    return torch.stack(path)


def reward_gradient(x):
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(reward(x).sum(), x)[0]


def gradient(loss, flow):
    grads = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("last", [1, 3, STEPS])
def test_gradient_is_autograds_through_the_last_steps_of_the_chain(small_flow, kernel, last):
    flow = small_flow(dtype=torch.float64)
    policy, path, noises = walked(flow, KERNELS[kernel])
    end, _ = replay(policy, path, last)
    torch.testing.assert_close(end, path[-1])
    ours = gradient(draft_loss(end, reward_gradient(path[-1])), flow)
    start = STEPS - last
    whole = gradient(-reward(chain(policy, noises, start, path[start])[-1]).mean(), flow)
    torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)
    assert float(ours.norm()) > 1e-3


def test_a_linear_flow_in_closed_form_and_truncation_drops_the_earlier_terms():
    """``x_N = M^N x_0`` with ``M = I + A / N``, so ``d<g, x_N> / dA = sum_k h (M^T)^(N-1-k) g x_k^T``."""
    g = torch.Generator().manual_seed(1)
    matrix = 0.4 * torch.randn(3, 3, generator=g, dtype=torch.float64)
    flow = RectifiedFlow(LinearVelocity(matrix.requires_grad_(True)))
    policy, path, _ = walked(flow, Kernel("ode"))
    slope = torch.randn(ROWS, 3, generator=g, dtype=torch.float64)
    step = torch.eye(3, dtype=torch.float64) + matrix.detach() / STEPS
    terms = []
    for k in range(STEPS):
        back = slope @ torch.linalg.matrix_power(step, STEPS - 1 - k)
        terms.append(-(back.T @ path[k]) / STEPS / ROWS)
    for last in range(1, STEPS + 1):
        loss = draft_loss(replay(policy, path, last)[0], slope)
        (ours,) = torch.autograd.grad(loss, flow.field.matrix)
        torch.testing.assert_close(ours, sum(terms[STEPS - last :]))


def test_in_one_dimension_every_step_has_the_same_share():
    """``x_N = (1 + a / N)^N``: the last K of N steps have K / N of the derivative ``(1 + a / N)^(N - 1)``."""
    a, steps = 0.5, 4
    matrix = torch.full((1, 1), a, dtype=torch.float64, requires_grad=True)
    flow = RectifiedFlow(LinearVelocity(matrix))
    policy = FlowPolicy(flow, Kernel("ode"), steps)
    path = chain(policy, [torch.ones(1, 1, dtype=torch.float64)] * (steps + 1), 0).detach()
    for last in (1, 2, 4):
        loss = draft_loss(replay(policy, path, last)[0], torch.ones(1, 1, dtype=torch.float64))
        (ours,) = torch.autograd.grad(loss, matrix)
        assert float(ours) == pytest.approx(-last / steps * 1.125**3)


def test_path_kl_of_a_shift_in_closed_form():
    """The velocities to N(m, 1) and N(0, 1) differ by ``m (1 - t) / ((1 - t)^2 + t^2)`` everywhere."""
    mean = 0.3
    flow, reference = (gaussian([m, m], 1.0, torch.float64) for m in (mean, 0.0))
    policy, path, _ = walked(flow, Kernel("ddim", 1.0))
    assert torch.equal(replay(policy, path, STEPS)[1], torch.zeros(ROWS, dtype=torch.float64))
    terms = []
    for t, b, std in zip(
        policy.times[:-1].tolist(), *map(torch.Tensor.tolist, policy.table[1:]), strict=True
    ):
        change = mean * (1 - t) / ((1 - t) ** 2 + t**2)
        terms.append(2 * (b * change / std) ** 2 / 2 if std > 0 else 0.0)
    assert terms[-1] == 0 < min(terms[:-1]), "the last step of ddim has no noise"
    for last in (1, 2, STEPS):
        _, kl = replay(policy, path, last, reference)
        expected = torch.full((ROWS,), sum(terms[STEPS - last :]), dtype=torch.float64)
        torch.testing.assert_close(kl, expected)


def test_at_the_reference_it_is_the_gradient_of_adjoint_matching(small_flow):
    """There the KL is flat; ``d|b dv / std + std ~a|^2 = 2 b dv^T ~a``, ``~a`` ending in ``-grad r / beta``."""
    flow, beta = small_flow(dtype=torch.float64), 0.1
    policy, path, _ = walked(flow, Kernel("ddim", 1.0))
    slope = reward_gradient(path[-1])
    adjoint, met = lean_adjoint(
        lambda x, k: flow.velocity(x, float(policy.times[k])), path, policy.table, -slope / beta
    )
    steps = policy.stochastic_steps
    assert steps == list(range(STEPS - 1))
    total = 0.0
    for k in steps:
        b, std = (c.double()[k] for c in policy.table[1:])
        change = flow.velocity(path[k], float(policy.times[k])) - met[k]
        total = total + adjoint_loss(change, adjoint[k + 1], b, std).mean()
    end, kl = replay(policy, path, STEPS, flow.clone())
    last_step, _ = replay(policy, path, 1)
    ours = gradient(draft_loss(end, slope) + beta * kl.mean(), flow)
    ours = ours - gradient(
        draft_loss(last_step, slope), flow
    )  # has no noise, so adjoint leaves it out
    torch.testing.assert_close(ours, gradient(total, flow) * beta / 2, rtol=1e-8, atol=1e-12)


def shifted(policy):
    """Of the velocity to N(m, 1) on the path to N(0, 1): ``G = d x_N / dm``, and H of ``KL = H m^2 / 2``."""
    gain, square = 0.0, 0.0
    table = [c.tolist() for c in policy.table]
    for t, a, b, std in zip(policy.times[:-1].tolist(), *table, strict=True):
        s = (1 - t) ** 2 + t**2
        square += (b * (1 - t) / s / std) ** 2 if std > 0 else 0.0
        gain = a * gain + b * ((2 * t - 1) / s * gain + (1 - t) / s)
    return gain, square


def test_the_kl_stops_a_gaussian_at_the_tilt():
    """``E[<g, x_N>] - beta KL`` is flat at ``m = g G / (beta H)``; ``E x_N`` is then the tilt's ``g / beta``."""
    slope, beta, steps = 0.3, 0.5, 8
    flow, reference = (gaussian([0.0], 1.0, torch.float64) for _ in range(2))
    policy, _, noises = walked(flow, Kernel("ddim", 1.0), steps)
    gain, square = shifted(policy)
    for factor, flat in ((1.0, True), (0.5, False)):
        mean = torch.tensor(
            [factor * slope * gain / (beta * square)], dtype=torch.float64, requires_grad=True
        )
        flow.field.mean = mean
        path = chain(policy, noises, 0).detach()
        end, kl = replay(policy, path, steps, reference)
        loss = draft_loss(end, torch.full_like(end, slope)) + beta * kl.mean()
        (grad,) = torch.autograd.grad(loss, mean)
        expected = 0.0 if flat else -slope * gain / 2
        assert grad.item() == pytest.approx(expected, abs=1e-9)
    gain, square = shifted(FlowPolicy(flow, Kernel("ddim", 1.0), 2000))
    assert gain**2 / square == pytest.approx(1.0, rel=0.01)


class Spy(Oracle):
    """Remembers what it was asked last."""

    differentiable = True

    def judge(self, panels):
        self.asked = panels.detach()[:, 0]
        return right(panels)


def test_refl_asks_about_the_prediction_and_learns_from_its_step_alone():
    env, _ = probe_env(num_envs=8, differentiable=True)
    env.desk._oracle = spy = Spy(Plain(dim=2))
    settings = {"truncation": "refl", "last": 3, "kernel": Kernel("ode"), "lr": 0.0, "anchor": 0.0}
    agent = probe_agent("draft", env=env, minibatches=1, **settings)
    start, seen = env._generator.get_state(), []
    before = ProbeVelocity.evaluated
    agent.learn(8, callback=lambda _, m: seen.append(int(m["steps"])))
    assert ProbeVelocity.evaluated - before == env.ledger.nfe == 8 * (8 + 1 + 1)
    asked, k = spy.asked, 8 - seen[0]
    env._generator.set_state(start)
    path = collect(env, agent.policy).path
    guess = path[k] + (1 - agent.policy.times[k].float()) * agent.policy.velocity(path[k], k)
    torch.testing.assert_close(asked, guess)
    assert seen[0] > 1 and not torch.allclose(asked, path[-1], atol=1e-3), "not the sample itself"
    # d sigmoid(4 x) / dx, along the first coordinate.
    slope = torch.stack([4 * right(asked) * (1 - right(asked)), torch.zeros(8)], 1)
    x1 = path[k] + (1 - float(agent.policy.times[k])) * agent.model.velocity(
        path[k], float(agent.policy.times[k])
    )
    want = torch.autograd.grad(-(slope * x1).sum() / 8, list(agent.model.parameters()))
    assert math.sqrt(sum(float(g.square().sum()) for g in want)) < 1, "no gradient is clipped here"
    for g, p in zip(want, agent.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_one_straight_step_predicts_the_sample(small_flow):
    flow = small_flow()
    policy, path, _ = walked(flow, Kernel("ode"), dtype=torch.float32)
    torch.testing.assert_close(predict(policy, path[-2], STEPS - 1), path[-1])


def test_random_truncation_draws_every_depth():
    agent, seen = probe_agent("draft", num_envs=4, truncation="random", last=3, lr=0.0), []
    agent.learn(4 * 60, callback=lambda _, m: seen.append(m["steps"]))
    assert {k: seen.count(k) > 10 for k in (1, 2, 3)} == {1: True, 2: True, 3: True}
    assert len(seen) == 60 and set(seen) == {1, 2, 3}


@pytest.mark.parametrize(
    "settings", [{}, {"truncation": "random"}, {"truncation": "refl", "last": 3}, {"last": 1}]
)
def test_each_kind_learns_and_books_what_it_evaluates(settings):
    agent = probe_agent("draft", **settings)
    start = float(agent.sample(noises())[:, 0].mean())
    before = ProbeVelocity.evaluated
    agent.learn(5 * 64)
    assert ProbeVelocity.evaluated - before == agent.env.ledger.nfe
    assert agent.env.ledger.gradients == agent.env.ledger.queries == 5 * 64
    assert float(agent.sample(noises())[:, 0].mean()) > start + 0.02


def test_rows_without_an_answer_teach_nothing():
    """Their reward gradient is 0, and the mean is over the answered ones."""

    def half(panels):
        mute = torch.arange(len(panels))[:, None] < len(panels) // 2
        return right(panels).masked_fill(mute, math.nan)

    whole, partial = (
        probe_agent("draft", answer, minibatches=1, lr=0.0, anchor=0.0) for answer in (right, half)
    )
    grads = []
    for agent in (whole, partial):
        rollout = collect(agent.env, agent.policy, gradient=True)
        if agent is whole:
            rollout.judgement[:32] = math.nan
        agent.ascend(rollout, agent.last)
        grads.append(torch.cat([p.grad.flatten() for p in agent.model.parameters()]))
    torch.testing.assert_close(*grads)
    assert float(grads[0].norm()) > 1e-3


def test_the_price_of_the_kl_holds_it():
    kl = {}
    for beta in (0.0, 0.1, 10.0):
        agent = probe_agent("draft", beta=beta, anchor=0.0).learn(10 * 64)
        noisy = len(agent.policy.stochastic_steps)
        nfe = 8 + 8 + (noisy if beta else 0)
        assert 0 < noisy < 8 and agent.env.ledger.nfe == 10 * 64 * nfe
        rollout = collect(agent.env, agent.policy)
        kl[beta] = replay(agent.policy, rollout.path, 8, agent.reference)[1].mean().item()
    assert kl[0.0] > 1.5 * kl[0.1] and kl[0.1] > 5 * kl[10.0] >= 0


def test_settings_that_cannot_be_are_refused():
    for settings, message in (
        ({"last": 0}, "last must be 1 to 8"),
        ({"last": 9}, "last must be 1 to 8"),
        ({"truncation": "half"}, "fixed, random or refl"),
    ):
        with pytest.raises(ConfigError, match=message):
            probe_agent("draft", **settings)
    with pytest.raises(ConfigError, match="reward gradient"):
        probe_agent("draft", env=probe_env()[0])


@pytest.mark.cuda
@pytest.mark.parametrize("truncation", ["fixed", "refl"])
def test_on_cuda(truncation):
    env = gym.make_vec("prefenv/Shapes-v0", num_envs=8, panel_size=4, device="cuda")
    agent = make_agent(f"draft:truncation={truncation}", env, seed=0).learn(16)
    samples = agent.sample(torch.randn(4, 64, 2))
    assert samples.is_cuda and bool(samples.isfinite().all())
