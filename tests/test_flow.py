"""The flow against closed forms: Gaussian data, convergence orders, Jacobians, and zuko's log-likelihood."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from prefenv.device import make_generator, resolve_device
from prefenv.errors import ConfigError, NonFiniteError
from prefenv.flow import SOLVERS, RectifiedFlow, divergence, nfe, normal_log_prob
from prefenv.kernels import Kernel
from prefenv.networks import GaussianVelocity, VelocityField


def f64(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def gaussian(mean, std) -> RectifiedFlow:
    """The exact flow to ``N(mean, std^2)`` in float64."""
    mean, std = torch.broadcast_tensors(f64(mean), f64(std))
    return RectifiedFlow(GaussianVelocity(mean, std, mean.shape))


def slope(t, s):
    """Derivative of the Gaussian velocity to x."""
    return (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)


def normal_rows(n, dim, seed=0):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth(flow: RectifiedFlow) -> RectifiedFlow:
    """Slow the time features from 100 to 3 rad, so that a fine solver is exact to many digits."""
    flow.field.frequency.clamp_(max=3.0)
    return flow


class Linear(VelocityField):
    """``dx/dt = A x``: flow map ``expm(A)``, divergence ``tr A``, with a Jacobian that is not diagonal."""

    def __init__(self, matrix):
        super().__init__((len(matrix),))
        self.register_buffer("matrix", matrix)

    def forward(self, x, t, condition=None):
        return x @ self.matrix.T


@pytest.fixture
def gauss(golden):
    return {k: f64(v) for k, v in golden("09_gaussian_flow").items()}


# The closed form itself, at every golden time


def test_velocity_and_divergence_match_golden(gauss):
    flow, x = gaussian(gauss["mu"], gauss["s"]), gauss["x"]
    for i, t in enumerate(gauss["t"]):
        torch.testing.assert_close(
            flow.velocity(x, t), gauss["velocity"][i], rtol=1e-12, atol=1e-12
        )
        v, div = divergence(lambda y, t=t: flow.velocity(y, t), x)
        torch.testing.assert_close(v, gauss["velocity"][i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(div, gauss["divergence_v"][i].expand(len(x)), rtol=1e-9, atol=0)


def test_velocity_takes_one_time_per_row(gauss):
    flow, k = gaussian(gauss["mu"], gauss["s"]), len(gauss["t"])
    v = flow.velocity(gauss["x"].repeat(k, 1), gauss["t"].repeat_interleave(len(gauss["x"])))
    torch.testing.assert_close(v.view_as(gauss["velocity"]), gauss["velocity"])


def test_posterior_means_match_golden(gauss):
    """A step that ends at u = 1 without noise ends at E[x1 | x_t]; E[x0 | x_t] = E[x1 | x_t] - v."""
    for i, t in enumerate(gauss["t"][:-1]):
        x, v = gauss["x"], gauss["velocity"][i]
        x1 = Kernel("ddim", 1.0).mean(x, v, t, 1.0)
        torch.testing.assert_close(x1, gauss["posterior_mean_x1"][i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(x1 - v, gauss["posterior_mean_x0"][i], rtol=1e-10, atol=1e-10)


def test_score_matches_golden(gauss):
    """The drift that ``constant`` adds to Euler's is ``sigma^2 / 2`` times the score."""
    flow, h = gaussian(gauss["mu"], gauss["s"]), 1e-3
    for k, i in enumerate(gauss["interior_index"].long()):
        x, t = gauss["x"], gauss["t"][i]
        v = flow.velocity(x, t)
        score = (Kernel("constant", 2.0).mean(x, v, t, t + h) - (x + h * v)) / (2 * h)
        torch.testing.assert_close(score, gauss["score"][i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(score, gauss["sit_score_from_velocity"][k], rtol=1e-9, atol=1e-9)


# The ODE


@pytest.mark.parametrize(("method", "rtol"), [("rk4", 1e-7), ("heun", 2e-4)])
def test_flow_map_matches_golden_in_both_directions(gauss, method, rtol):
    flow, x0, x1 = gaussian(gauss["mu"], gauss["s"]), gauss["flow_map_x0"], gauss["flow_map_x1"]
    forth = flow.integrate(x0, 128, method)
    torch.testing.assert_close(forth, x1, rtol=rtol, atol=rtol)
    torch.testing.assert_close(
        flow.integrate(x1, 128, method, start=1, stop=0), x0, rtol=rtol, atol=rtol
    )
    torch.testing.assert_close(
        flow.integrate(forth, 128, method, start=1, stop=0), x0, rtol=rtol, atol=rtol
    )


def test_flow_map_of_a_linear_field_is_the_matrix_exponential():
    matrix, x = normal_rows(3, 3), normal_rows(5, 3, seed=1)
    out = RectifiedFlow(Linear(matrix)).integrate(x, 64, "rk4", start=0.2, stop=0.9)
    torch.testing.assert_close(out, x @ torch.linalg.matrix_exp(0.7 * matrix).T, rtol=1e-7, atol=0)


@pytest.mark.parametrize("s", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("steps", [1, 8, 16, 32])
def test_euler_is_its_own_recursion(s, steps):
    """Standard deviation of the samples: one factor ``1 + h v'`` a step."""
    out = gaussian([0.6], s).integrate(f64([[0.0], [1.0]]), steps)
    gain = math.prod(1 + slope(i / steps, s) / steps for i in range(steps))
    assert float(out[1] - out[0]) == pytest.approx(gain, rel=1e-12)
    assert float(out[0]) == pytest.approx(0.6, rel=1e-12), "the mean is exact"


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_solvers_converge_at_their_order_and_cost_what_they_say(method, order):
    flow, x0 = gaussian([0.5, -0.3], [0.6, 0.8]), normal_rows(16, 2)
    calls = []
    flow.field.register_forward_hook(lambda *_: calls.append(1))
    exact = flow.field.mean + flow.field.std * x0
    error = [float((flow.integrate(x0, k, method) - exact).abs().max()) for k in (16, 32, 64, 128)]
    assert len(calls) == sum(nfe(k, method) for k in (16, 32, 64, 128))
    rates = np.log2(np.divide(error[:-1], error[1:]))
    assert abs(rates[-1] - order) < 0.2 and len(SOLVERS) == 3, rates


def test_path_holds_every_state(small_flow):
    flow, x = small_flow(), torch.randn(5, 3)
    path = flow.integrate(x, 4, return_path=True)
    assert path.shape == (5, 5, 3) and torch.equal(path[0], x)
    for i in range(4):
        torch.testing.assert_close(path[i + 1], path[i] + flow.velocity(path[i], i / 4) / 4)
    assert torch.equal(path[-1], flow.integrate(x, 4))


def test_wrong_settings_are_named(small_flow):
    flow, x = small_flow(), torch.randn(2, 3)
    with pytest.raises(ConfigError, match=r"rk5.*euler, heun, rk4"):
        flow.integrate(x, method="rk5")
    with pytest.raises(ConfigError, match="at least 1"):
        flow.log_prob(x, steps=0)
    nn.init.constant_(flow.field.out.bias, math.nan)
    with pytest.raises(NonFiniteError):
        flow.integrate(x)


# The likelihood


def test_normal_log_prob_is_torchs():
    x = torch.randn(4, 3, 2)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2))
    torch.testing.assert_close(normal_log_prob(x), expected)


@pytest.mark.parametrize("exact", [True, False])
def test_log_prob_matches_golden(gauss, exact):
    """The Jacobian is diagonal, so Hutchinson's estimate with signs is exact too."""
    flow = gaussian(gauss["mu"], gauss["s"])
    ll = flow.log_prob(gauss["ll_x1"], 64, exact=exact)
    torch.testing.assert_close(ll, gauss["ll_closed_form"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("std", [[1.5, 0.7, 0.3], [0.2, 0.2, 0.2]])
def test_log_prob_matches_the_normal_density(std, exact):
    mean = f64([1.0, -0.5, 0.3])
    x = mean + f64(std) * normal_rows(20, 3)
    density = torch.distributions.Normal(mean, f64(std)).log_prob(x).sum(1)
    ll = gaussian(mean, std).log_prob(x, 32, exact=exact)
    torch.testing.assert_close(ll, density, rtol=0, atol=2e-5)


def test_eulers_log_prob_is_wrong_by_a_known_amount():
    """Backwards Euler: ``x0 = prod(1 - h v'(t)) (x - m)``, ``log det = -h sum v'(t)``; the error halves slowly."""
    s, mean, error = f64([0.5, 0.3, 0.1]), f64([1.0, -0.5, 0.3]), []
    x = mean + s * normal_rows(500, 3)
    exact = torch.distributions.Normal(mean, s).log_prob(x).sum(1)
    for steps in (8, 16, 32, 64):
        rates = torch.stack([slope(i / steps, s) for i in range(steps, 0, -1)]) / steps
        by_hand = normal_log_prob((x - mean) * (1 - rates).prod(0)) - rates.sum()
        ll = gaussian(mean, s).log_prob(x, steps, "euler", exact=True)
        torch.testing.assert_close(ll, by_hand, rtol=1e-11, atol=1e-11)
        error.append(float((ll - exact).abs().mean()))
    ratios = np.divide(error[:-1], error[1:])
    assert error[2] > 0.1 and ((ratios > 1.3) & (ratios < 2.1)).all(), error


def test_divergence_is_the_trace_of_the_jacobian(small_flow):
    flow, x = small_flow((2, 2), torch.float64), normal_rows(6, 4).view(6, 2, 2)
    t = torch.rand(6, dtype=torch.float64)
    out, div = divergence(lambda y: flow.velocity(y, t), x)
    for i in range(6):
        jacobian = torch.autograd.functional.jacobian(
            lambda y, i=i: flow.velocity(y[None], t[i : i + 1])[0], x[i]
        )
        assert float(div[i]) == pytest.approx(float(jacobian.reshape(4, 4).trace()), rel=1e-10)
    torch.testing.assert_close(out, flow.velocity(x, t))


def test_hutchinson_is_exact_on_average(small_flow):
    """The mean over all 2^3 vectors of signs is the trace; a single one is not."""
    flow, x = small_flow((3,), torch.float64), normal_rows(5, 3)
    signs = f64(list(itertools.product([-1, 1], repeat=3)))
    each = [divergence(lambda y: flow.velocity(y, 0.4), x, p.expand(5, 3))[1] for p in signs]
    _, exact = divergence(lambda y: flow.velocity(y, 0.4), x)
    torch.testing.assert_close(torch.stack(each).mean(0), exact)
    assert float((each[0] - exact).abs().max()) > 0.05


def test_log_det_is_slogdet_of_the_flow_maps_jacobian(small_flow):
    flow, x = smooth(small_flow((3,), torch.float64)), normal_rows(4, 3)
    out, log_det = flow.integrate_with_log_det(x, 64, exact=True)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda y, i=i: flow.integrate(y[None], 64, "rk4")[0], x[i]
            )
            for i in range(4)
        ]
    )
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, flow.integrate(x, 64, "rk4"))


def test_log_prob_agrees_with_zuko(small_flow):
    """An adaptive solver and a trace that nobody here wrote."""
    zuko = pytest.importorskip("zuko")
    flow = smooth(small_flow((2, 2), torch.float64)).frozen()
    x = normal_rows(5, 4)
    ode = zuko.transforms.FreeFormJacobianTransform(
        lambda t, y: flow.velocity(y.view(-1, 2, 2), t).flatten(1), 1.0, 0.0, atol=1e-8, rtol=1e-8
    )
    x0, log_det = ode.call_and_ladj(x)
    ll = flow.log_prob(x.view(-1, 2, 2), 64, exact=True)
    torch.testing.assert_close(ll, normal_log_prob(x0) + log_det, rtol=0, atol=1e-6)


def test_shorter_steps_near_the_data_resolve_thin_data():
    """``N(0.3, 0.005^2)``: 32 equal steps of RK4 are off by nats, 32 that shorten towards the data are not."""
    flow = RectifiedFlow(GaussianVelocity(torch.tensor(0.3), torch.tensor(0.005), (2,)).double())
    x = 0.3 + 0.005 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    want = torch.distributions.Normal(0.3, 0.005).log_prob(x).sum(1)
    equal, short = (float((flow.log_prob(x, 32, shift=s) - want).abs().mean()) for s in (1.0, 0.1))
    assert short < 0.05 and equal > 0.5
    for ends in ({"stop": 0.5}, {"start": 1.0, "stop": 0.3}):
        equal, short = (flow.integrate_with_log_det(x, 400, **ends, shift=s) for s in (1.0, 0.5))
        torch.testing.assert_close(short, equal, rtol=1e-4, atol=1e-5)


def test_log_prob_works_without_grad_and_repeats_with_a_seed(small_flow):
    flow, x = small_flow(), torch.randn(4, 3)
    draws = []
    for seed in (1, 1, 2):
        with torch.no_grad():
            draws.append(flow.log_prob(x, 4, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# The loss


def test_residual_is_taken_at_golden_interpolants(gauss):
    """A field that answers its own point: the residual is ``mean (x_t - (x1 - x0))^2``."""
    i = gauss["interior_index"].long()
    flow = RectifiedFlow(Linear(torch.eye(2, dtype=torch.float64)))
    expected = (gauss["plan_xt"] - gauss["plan_ut"]).square().mean(1)
    residual = flow.residual(gauss["plan_x0"], gauss["plan_x1"], gauss["t"][i])
    torch.testing.assert_close(residual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("s", [0.1, 0.7, 2.0])
def test_exact_velocity_leaves_the_irreducible_loss(s):
    """``pi s / 2`` per dimension, whatever the mean: what no velocity can explain."""
    x1 = 0.5 + s * normal_rows(200_000, 4)
    loss = gaussian([0.5] * 4, s).loss(x1, generator=torch.Generator().manual_seed(1))
    assert float(loss) == pytest.approx(math.pi * s / 2, rel=0.02)


def test_coupled_sources_are_used_and_seeds_repeat(small_flow):
    """A pair that the flow itself made has no residual left on a straight path."""
    flow = gaussian([1.0, 2.0], 1e-9)
    x0 = normal_rows(64, 2)
    x1 = flow.field.mean.expand(64, 2)
    assert float(flow.loss(x1, x0=x0)) < 1e-8 < 1e-2 < float(flow.loss(x1 + 1, x0=x0))
    small, data = small_flow(), torch.randn(8, 3)
    losses = [small.loss(data, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_clones_are_independent(small_flow):
    flow = small_flow()
    frozen, clone = flow.frozen(), flow.clone()
    nn.init.zeros_(flow.field.out.weight)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in clone.parameters())
    assert all(bool(f.field.out.weight.any()) for f in (frozen, clone))


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="'abacus' is no device"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA"):
            resolve_device("cuda:0")
    draws = [torch.rand(3, generator=make_generator(s)) for s in (5, 5, 6, 2**70)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(small_flow):
    flow, x = small_flow(), torch.randn(8, 3)
    there = flow.clone().cuda()
    for method in SOLVERS:
        torch.testing.assert_close(
            there.integrate(x.cuda(), 8, method).cpu(), flow.integrate(x, 8, method)
        )
    ll = there.log_prob(x.cuda(), 8, exact=True).cpu()
    torch.testing.assert_close(ll, flow.log_prob(x, 8, exact=True), rtol=1e-4, atol=1e-4)
