"""The policy: what it draws, what it says about the draw afterwards, and that it follows its flow's weights."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from prefenv.errors import ConfigError, NoLogProbError
from prefenv.flow import RectifiedFlow, time_grid
from prefenv.kernels import KERNELS, Kernel
from prefenv.networks import GaussianVelocity, VelocityMLP
from prefenv.policy import FlowPolicy
from prefenv.rollout import Rollout, collect

STEPS = 5
KERNEL_CASES = [Kernel(name) for name in KERNELS] + [Kernel("flow-sde", window=(0.2, 0.6))]


def kernel_id(kernel):
    return kernel.name if kernel.window == (0.0, 1.0) else f"{kernel.name} window"


@pytest.fixture(params=KERNEL_CASES, ids=kernel_id)
def policy(request, small_flow):
    return FlowPolicy(small_flow((3, 2)), request.param, STEPS)


def whole(n, i):
    return torch.full((n,), i)


def walk(policy, n=6):
    """Every step of one walk: index, state, next state, log-probability."""
    x = torch.randn(n, 3, 2)
    for i in range(policy.steps):
        action, log_prob = policy.act(x, i)
        yield i, x, action, log_prob
        x = action


# Draws and replay


def test_replay_gives_the_log_prob_of_the_draw(policy):
    stochastic = []
    for i, x, action, log_prob in walk(policy):
        if log_prob is None:
            continue
        stochastic.append(i)
        replay = policy.log_prob(x, whole(6, i), action)
        torch.testing.assert_close(replay.detach(), log_prob, rtol=1e-5, atol=1e-4)
        mean = policy.log_prob(x, whole(6, i), action, reduction="mean")
        torch.testing.assert_close(mean * 6, replay)
        v, t, u = policy.flow.velocity(x, i / STEPS), i / STEPS, (i + 1) / STEPS
        m, s = policy.kernel.mean(x, v, t, u).detach(), float(policy.kernel.std(t, u))
        each = stats.norm.logpdf(action.numpy(), m.numpy(), s).reshape(6, -1).sum(1)
        np.testing.assert_allclose(log_prob, each, rtol=1e-4, atol=1e-4)
    assert stochastic == policy.stochastic_steps


def test_deterministic_steps_have_no_log_prob(policy):
    quiet = [i for i in range(STEPS) if i not in policy.stochastic_steps]
    assert all(policy.std(i) == 0 for i in quiet)
    for i, x, action, log_prob in walk(policy):
        if i in quiet:
            assert log_prob is None
            with pytest.raises(NoLogProbError):
                policy.log_prob(x, whole(6, i), action)
    expected = {"ode": STEPS, "cps": 1, "precise": 1, "ddim": 1}.get(policy.kernel.name, 0)
    assert len(quiet) == (expected if policy.kernel.window == (0.0, 1.0) else 3)


def test_steps_of_one_batch_may_differ(small_flow):
    """Rows at different steps, as one training batch has them."""
    policy = FlowPolicy(small_flow((3, 2)), steps=STEPS)
    rows = [(i, x, action) for i, x, action, _ in walk(policy, 1)]
    together = policy.log_prob(
        torch.cat([x for _, x, _ in rows]),
        torch.tensor([i for i, _, _ in rows]),
        torch.cat([action for *_, action in rows]),
    )
    alone = [policy.log_prob(x, whole(1, i), action) for i, x, action in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_replay_carries_gradients_and_acting_does_not(small_flow):
    policy = FlowPolicy(small_flow((3, 2)), steps=STEPS)
    x = torch.randn(4, 3, 2)
    action, log_prob = policy.act(x, 2)
    assert not action.requires_grad and not log_prob.requires_grad
    policy.log_prob(x, whole(4, 2), action).sum().backward()
    assert all(bool(p.grad.any()) for p in policy.flow.parameters())


def test_draws_repeat_with_the_generator(small_flow):
    flow, x = small_flow((3, 2)), torch.randn(4, 3, 2)
    draws = [
        FlowPolicy(flow, steps=STEPS, generator=torch.Generator().manual_seed(s)).act(x, 1)[0]
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("kernel", "final_std"), [("flow-sde", 0.983), ("memoryless", 1.002), ("ddim", 0.913)]
)
def test_whole_walks_have_the_exact_spread(kernel, final_std):
    """16 steps with the exact velocity to N(1, 1): the final std is known (see test_kernels)."""
    rng = torch.Generator().manual_seed(1)
    flow = RectifiedFlow(GaussianVelocity(1.0, 1.0, (4,)))
    policy, x = FlowPolicy(flow, Kernel(kernel), 16, rng), torch.randn(20_000, 4, generator=rng)
    for i in range(16):
        x, _ = policy.act(x, i)
    assert float(x.std()) == pytest.approx(final_std, rel=0.01)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.01)


# Deterministic


def test_deterministic_steps_are_eulers(policy):
    x = torch.randn(4, 3, 2)
    path = policy.flow.integrate(x, STEPS, return_path=True).detach()
    for i in range(STEPS):
        step, log_prob = policy.act(path[i], i, deterministic=True)
        torch.testing.assert_close(step, path[i + 1])
        assert log_prob is None
    torch.testing.assert_close(policy.sample(x), path[-1])
    torch.testing.assert_close(policy.sample(x), policy.sample(x), rtol=0, atol=0)


def test_conditions_reach_the_flow(small_flow):
    policy = FlowPolicy(small_flow((3, 2), classes=2), steps=STEPS)
    x, condition = torch.randn(2, 3, 2), torch.tensor([0, 1])
    both = policy.sample(x, condition)
    torch.testing.assert_close(both, policy.flow.integrate(x, STEPS, condition=condition).detach())
    assert not torch.allclose(both, policy.sample(x, 1 - condition), atol=1e-3)
    action, log_prob = policy.act(x, 1, condition)
    torch.testing.assert_close(policy.log_prob(x, whole(2, 1), action, condition), log_prob)


# Weights that change


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
}


def optimise(flow, optimizer):
    """Fused optimisers do not raise the version counters of the parameters they change."""
    optimizer = OPTIMIZERS[optimizer](flow.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        flow.loss(torch.randn(8, 3, 2) + 5).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        *[lambda flow, name=name: optimise(flow, name) for name in OPTIMIZERS],
        lambda flow: flow.load_state_dict({k: v + 1 for k, v in flow.state_dict().items()}),
        lambda flow: torch.nn.utils.vector_to_parameters(
            torch.randn(sum(p.numel() for p in flow.parameters())), flow.parameters()
        ),
        lambda flow: torch._foreach_lerp_(
            [p.detach() for p in flow.parameters()], [p * 3 for p in flow.parameters()], 0.5
        ),
        lambda flow: [p.data.mul_(2.0) for p in flow.parameters()],
    ],
    ids=[*OPTIMIZERS, "load_state_dict", "vector_to_parameters", "ema", "data"],
)
def test_velocity_is_never_stale(small_flow, change):
    flow, x = small_flow((3, 2)), torch.randn(4, 3, 2)
    policy = FlowPolicy(flow, steps=STEPS)
    before = policy.velocity(x, 2)
    change(flow)
    now = flow.velocity(x, 2 / STEPS).detach()
    assert float((now - before).abs().max()) > 0.01, "the change is felt"
    torch.testing.assert_close(policy.velocity(x, 2), now, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["load_state_dict", "ema"])
def test_velocity_of_frozen_weights_is_never_stale(small_flow, change):
    """What may still happen to weights that are not trained: loading, and following others."""
    flow, other, x = small_flow((3, 2)).frozen(), small_flow((3, 2), seed=1), torch.randn(4, 3, 2)
    policy = FlowPolicy(flow, steps=STEPS)
    before = policy.velocity(x, 2)
    assert torch.equal(policy.velocity(x, 2), before)
    if change == "ema":
        torch._foreach_lerp_(list(flow.parameters()), list(other.frozen().parameters()), 0.5)
    else:
        flow.load_state_dict(other.state_dict())
    now = flow.velocity(x, 2 / STEPS)
    assert float((now - before).abs().max()) > 0.01, "the change is felt"
    torch.testing.assert_close(policy.velocity(x, 2), now, rtol=1e-4, atol=1e-5)


def test_held_weights_are_those_of_the_beginning_and_only_while_held(small_flow):
    flow, x = small_flow((3, 2), classes=3), torch.randn(4, 3, 2)
    one, other = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 1, 1])
    policy = FlowPolicy(flow, steps=STEPS)
    before = policy.velocity(x, 2, one)
    with pytest.raises(ZeroDivisionError), policy.hold(x, one):
        torch.testing.assert_close(policy.velocity(x, 2, one), before, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            flow.field.out.bias.add_(1.0)
        torch.testing.assert_close(policy.velocity(x, 2, one), before, rtol=1e-5, atol=1e-6)
        with policy.hold(x, other):
            torch.testing.assert_close(
                policy.velocity(x, 2, other),
                flow.velocity(x, float(policy.times[2]), other).detach(),
            )
        twin = copy.deepcopy(policy)
        torch.testing.assert_close(twin.velocity(x, 2, one), before + 1, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(policy.velocity(x, 2, one), before, rtol=1e-5, atol=1e-6)
        raise ZeroDivisionError
    torch.testing.assert_close(policy.velocity(x, 2, one), before + 1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_another_flow_can_be_put_in(small_flow, frozen):
    flows = [small_flow((3, 2), seed=s).requires_grad_(not frozen) for s in (0, 1)]
    policy, x = FlowPolicy(flows[0], steps=STEPS), torch.randn(4, 3, 2)
    policy.velocity(x, 2)
    policy.flow = flows[1]
    torch.testing.assert_close(policy.velocity(x, 2), policy.flow.velocity(x, 2 / STEPS).detach())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_act_alike_and_alone(small_flow, twin):
    policy, x = FlowPolicy(small_flow((3, 2)), steps=STEPS), torch.randn(4, 3, 2)
    policy.act(x, 0)
    other = twin(policy)
    assert torch.equal(policy.act(x, 1)[0], other.act(x, 1)[0])
    torch.nn.init.zeros_(policy.flow.field.out.weight)
    assert not torch.equal(policy.velocity(x, 1), other.velocity(x, 1))


# predict


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("rows", [None, 1, 4], ids=["one", "batch of 1", "batch of 4"])
@pytest.mark.parametrize("i", [0, 3, 4])
def test_predict_answers_in_kind(small_flow, kind, rows, i):
    policy = FlowPolicy(small_flow((3, 2)), steps=STEPS)
    x = torch.randn(6) if rows is None else torch.randn(rows, 6)
    t = torch.full((*x.shape[:-1], 1), i / STEPS)
    action, state = policy.predict({"x": kind(x), "t": kind(t)}, "state", deterministic=True)
    assert type(action) is type(kind(x)) and tuple(action.shape) == x.shape and state == "state"
    euler = x + policy.flow.velocity(x.view(-1, 3, 2), i / STEPS).view_as(x).detach() / STEPS
    torch.testing.assert_close(torch.as_tensor(action), euler)
    one, _ = policy.predict({"x": kind(x), "t": kind(t)})
    two, _ = policy.predict({"x": kind(x), "t": kind(t)})
    assert not np.array_equal(one, two), "draws from its kernel unless told otherwise"


@pytest.mark.parametrize("times", [[0.0, 0.2], [1.0, 1.0], [-0.2, -0.2]])
def test_predict_refuses_times_off_the_grid_or_mixed(small_flow, times):
    policy = FlowPolicy(small_flow((3, 2)), steps=STEPS)
    with pytest.raises(ConfigError, match="one common time"):
        policy.predict({"x": np.zeros((2, 6), np.float32), "t": np.array(times)[:, None]})


def test_no_steps_is_refused(small_flow):
    with pytest.raises(ConfigError, match="at least 1"):
        FlowPolicy(small_flow((3, 2)), steps=0)


# Rollouts


class Corridor:
    """An env of six rows in panels of three, reduced to what ``collect`` uses: step ``i`` pays ``i``."""

    panel_size, steps, times = 3, STEPS, time_grid(STEPS)
    gradient = None

    def __init__(self):
        self.seen, self.judgement = [], torch.full((6,), torch.nan)

    def begin(self, noise=None):
        self.seen = [torch.randn(6, 3, 2)]
        return self.seen[0], None

    def advance(self, action, gradient=False):
        self.seen.append(action)
        self.judgement = torch.arange(6.0)
        return action, torch.full((6,), float(len(self.seen) - 1))


def test_collect_keeps_path_log_probs_and_rewards(policy):
    env = Corridor()
    rollout = collect(env, policy)
    assert torch.equal(rollout.path, torch.stack(env.seen))
    assert torch.equal(rollout.noise, env.seen[0]) and torch.equal(rollout.samples, env.seen[-1])
    assert rollout.reward.tolist() == [sum(range(1, STEPS + 1))] * 6
    assert torch.equal(rollout.judgement, env.judgement) and rollout.condition is None
    assert rollout.panels(rollout.judgement).tolist() == [[0, 1, 2], [3, 4, 5]]
    quiet = [i for i in range(STEPS) if i not in policy.stochastic_steps]
    assert not bool(rollout.log_prob[quiet].any())
    if policy.stochastic_steps:
        batch = rollout.transitions(policy.stochastic_steps)
        replay = policy.log_prob(batch.x, batch.index, batch.x_next).detach()
        torch.testing.assert_close(replay, batch.log_prob, rtol=1e-5, atol=1e-4)


def test_transitions_are_steps_of_rows():
    """State of row r at step i written as 10 i + r."""
    path = (10 * torch.arange(4)[:, None] + torch.arange(2)).float()
    rollout = Rollout(path[..., None], -path[:3], torch.zeros(2), torch.zeros(2), 1)
    batch = rollout.transitions([0, 2])
    assert batch.x.flatten().tolist() == [0, 1, 20, 21]
    assert batch.x_next.flatten().tolist() == [10, 11, 30, 31]
    assert batch.index.tolist() == [0, 0, 2, 2] and batch.row.tolist() == [0, 1, 0, 1]
    assert batch.log_prob.tolist() == [0, -1, -20, -21]


def test_collect_refuses_another_number_of_steps(small_flow):
    with pytest.raises(ConfigError, match="takes 7 steps, the environment 5"):
        collect(SimpleNamespace(steps=STEPS), FlowPolicy(small_flow((3, 2)), steps=7))


@pytest.mark.cuda
def test_cuda_replays_its_own_draws(small_flow):
    flow = small_flow((3, 2)).cuda()
    policy = FlowPolicy(flow, steps=STEPS)
    x = torch.randn(4, 3, 2, device="cuda")
    action, log_prob = policy.act(x, 2)
    index = whole(4, 2).cuda()
    torch.testing.assert_close(
        policy.log_prob(x, index, action).detach(), log_prob, rtol=1e-4, atol=1e-3
    )
    given = {"x": np.zeros((4, 6), np.float32), "t": np.full((4, 1), 0.2, np.float32)}
    there = policy.predict(given, deterministic=True)[0]
    here = FlowPolicy(flow.clone().cpu(), steps=STEPS).predict(given, deterministic=True)[0]
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 3.0])
def test_a_shifted_grid_is_walked_and_found_again(shift):
    """The grid's closed form; a policy on it is Euler on it; predict finds every step by its time."""
    times = time_grid(16, shift)
    u = torch.arange(17, dtype=torch.float64) / 16
    torch.testing.assert_close(times, u / (u + shift * (1 - u)))
    assert bool((times.diff() > 0).all()) and times[0] == 0 and times[-1] == 1
    flow = small_flow_of(shift)
    policy = FlowPolicy(flow, Kernel("ode"), 16, shift=shift)
    x = y = torch.randn(5, *flow.event_shape)
    for i in range(16):
        y = y + float(times[i + 1] - times[i]) * flow.velocity(y, float(times[i]))
        seen = {"x": x.flatten(1), "t": times[i].float().expand(5, 1)}
        x = policy.predict(seen, deterministic=True)[0].reshape(x.shape)
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(policy.sample(y * 0 + 1), walk_by_hand(flow, y * 0 + 1, times))


def small_flow_of(seed):
    torch.manual_seed(int(seed * 10))
    flow = RectifiedFlow(VelocityMLP((3, 2), width=16, blocks=1))
    torch.nn.init.normal_(flow.field.out.weight, std=0.3)
    return flow.frozen()


def walk_by_hand(flow, x, times):
    for t, h in zip(times[:-1], times.diff(), strict=True):
        x = x + float(h) * flow.velocity(x, float(t))
    return x


def test_a_policy_on_another_grid_is_refused():
    """A rollout whose states lie at other times than the policy thinks would be silently wrong."""
    policy = FlowPolicy(small_flow_of(1), Kernel("ode"), STEPS, shift=2.0)
    with pytest.raises(ConfigError, match="grid"):
        collect(Corridor(), policy)
