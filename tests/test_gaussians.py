"""The gaussians task: closed forms of its density, velocity and optimum, and the evaluation held against them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from probes import Chain
from scipy import stats

from oracles.two_modes import TwoModes
from prefenv import plotting
from prefenv.checkpoints import load_checkpoint
from prefenv.device import make_generator
from prefenv.divergence import chain_log_prob, kl_divergence
from prefenv.errors import ConfigError
from prefenv.evaluation import Judge
from prefenv.flow import normal_log_prob
from prefenv.networks import GaussianVelocity, MixtureVelocity
from prefenv.optimum import frontier, frontier_kl
from prefenv.registry import make_oracle, make_task
from prefenv.tasks.gaussians import Gaussians
from prefenv.tasks.shapes import Shapes

TASK = Gaussians()
LARGE, SMALL = 1, 5
N = 16_000


@pytest.fixture(scope="module")
def data():
    x, kind = TASK.data(N, make_generator(0))
    return x.double(), kind


@pytest.fixture(scope="module")
def judge():
    """Scores against the perfect reference."""
    return Judge(TASK.exact_flow(), TASK, TwoModes(TASK), steps=32)


@pytest.fixture(scope="module")
def grid():
    """Nodes, the data's probability there, and the rewards."""
    nodes, mass = TASK.quadrature()
    return nodes, mass, TwoModes(TASK).score(nodes)


def tilted(grid, beta=0.1):
    return (grid[1].log() + grid[2] / beta).softmax(0)


def small_share(x):
    kind = TASK.classify(x)
    return float((kind == SMALL).sum() / ((kind == SMALL) | (kind == LARGE)).sum())


# The data


def test_data_is_the_stated_mixture(data):
    x, kind = data
    assert torch.equal(
        torch.bincount(kind, minlength=8), torch.tensor([2, 3, 2, 2, 2, 1, 2, 2]) * N // 16
    )
    for k in range(8):
        mine = x[kind == k]
        angle = k * math.pi / 4
        want = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle)])
        torch.testing.assert_close(mine.mean(0), want.double(), atol=0.03, rtol=0)
        torch.testing.assert_close(mine.T.cov(), 0.04 * torch.eye(2).double(), atol=0.004, rtol=0)
    assert float((TASK.classify(x) == kind).double().mean()) > 0.999
    # A distance in standard deviations is Rayleigh's.
    distance = stats.kstest(TASK.residual(x).numpy(), "rayleigh").statistic
    assert distance < 0.02
    assert float(TASK.residual(x).median()) == pytest.approx(math.sqrt(2 * math.log(2)), rel=0.02)


def test_equal_masses_are_an_option():
    even = make_task("gaussians:masses=(1,1,1,1,1,1,1,1)")
    _, kind = even.data(800, make_generator(0))
    assert torch.equal(torch.bincount(kind), torch.full((8,), 100))


def test_density_is_scipys_and_integrates_to_one(data):
    x = data[0][:50]
    want = sum(
        m * stats.multivariate_normal(c, 0.04).pdf(x.numpy())
        for m, c in zip(TASK.shares.numpy(), TASK.centres.numpy(), strict=True)
    )
    np.testing.assert_allclose(TASK.log_density(x).exp().numpy(), want, rtol=1e-10)
    line = torch.linspace(-4, 4, 401, dtype=torch.float64)
    nodes = torch.cartesian_prod(line, line)
    assert float(TASK.log_density(nodes).exp().sum()) * 0.02**2 == pytest.approx(1, abs=1e-9)
    nodes, mass = TASK.quadrature()
    assert float((mass * nodes.square().sum(1)).sum()) == pytest.approx(4 + 2 * 0.04, rel=1e-9)


@pytest.mark.parametrize("settings", [{"masses": (1,) * 7}, {"masses": (0,) * 8}, {"std": 0.0}])
def test_wrong_settings_are_named(settings):
    with pytest.raises(ConfigError, match="gaussians:"):
        Gaussians(**settings)


# The exact flow


def test_velocity_keeps_the_equation_of_continuity():
    """``dp/dt + div(p v) = 0`` for the marginal of the path, which is a mixture too."""
    flow = TASK.exact_flow().double()

    def density(x, t):
        var = (1 - t) ** 2 + (t * TASK.std) ** 2
        square = (x[:, None] - t * TASK.centres).square().sum(-1)
        return (TASK.shares * (-square / (2 * var)).exp()).sum(-1) / (2 * math.pi * var)

    for t in (0.1, 0.5, 0.9):
        rng = make_generator(0)
        x0 = torch.randn(40, 2, generator=rng, dtype=torch.float64)
        x = (1 - t) * x0 + t * TASK.data(40, rng)[0].double()
        x.requires_grad_(True)
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        rate = torch.stack(
            [torch.autograd.grad(density(x[i : i + 1], time)[0], time)[0] for i in range(40)]
        )
        flux = density(x, time.detach())[:, None] * flow.velocity(x, t)
        div = sum(
            torch.autograd.grad(flux[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)
        )
        torch.testing.assert_close(rate, -div, atol=1e-6, rtol=1e-5)  # the weights are float32


def test_one_component_is_a_gaussian():
    mean = torch.tensor([0.5, -1.0, 2.0])
    one = MixtureVelocity(mean[None], 0.7, torch.ones(1))
    other = GaussianVelocity(mean, 0.7, (3,))
    x, t = torch.randn(5, 3), torch.rand(5)
    torch.testing.assert_close(one(x, t), other(x, t))
    torch.testing.assert_close(one.at(t[:1])[0](x), other(x, t[0]))


def test_likelihood_of_the_exact_flow_is_the_density(data):
    flow, x = TASK.exact_flow().double(), data[0][:64]
    got = flow.log_prob(x, 128, exact=True)
    torch.testing.assert_close(got, TASK.log_density(x), atol=2e-3, rtol=0)


def test_kl_estimate_is_that_of_quadrature(grid):
    """Between two mixtures, by likelihoods of their exact flows, and by a sum over a grid."""
    other = Gaussians(masses=(1, 5, 1, 1, 1, 4, 1, 2), std=0.25)
    log_b, log_a = other.log_density(grid[0]), TASK.log_density(grid[0])
    cell = float((grid[0][1] - grid[0][0]).norm()) ** 2
    want = float((log_b.exp() * (log_b - log_a)).sum()) * cell
    got, stderr = kl_divergence([other.exact_flow()], TASK.exact_flow(), n=4096, steps=32)
    assert stderr < 0.03 < want / 10
    assert got == pytest.approx(want, abs=3 * stderr)


# The trained reference


def test_trained_reference_is_near_the_exact_one():
    flow = load_checkpoint(None, TASK).flow
    noise = torch.randn(4096, 2, generator=make_generator(1))
    x, log_b = chain_log_prob([flow], noise[:2048], 32, make_generator(2))
    gap = (log_b - TASK.log_density(x)).double()
    assert float(gap.mean()) < 0.02, "KL of the trained one to the exact density, in nats"
    rate = torch.bincount(TASK.classify(flow.integrate(noise, 16)), minlength=8) / 4096
    assert float((rate - TASK.shares).abs().sum()) / 2 < 0.03
    exact = TASK.exact_flow()
    for t in (0.2, 0.5, 0.8):
        x_t = (1 - t) * noise + t * TASK.data(4096, make_generator(3))[0]
        v, want = flow.velocity(x_t, t), exact.velocity(x_t, t)
        assert float((v - want).square().mean()) < 0.02 * float(want.square().mean()), t


# The oracle and its optimum


def test_oracle_by_hand():
    oracle = TwoModes(TASK, values=(1.0, 0.5))
    there = TASK.centres[[LARGE, SMALL, 0]]
    want = torch.tensor([1, 0.5, 1 / (1 + (4 * math.sin(math.pi / 8) / 0.6) ** 4)]).double()
    torch.testing.assert_close(oracle.score(there), want)
    edge = there[0] + torch.tensor([0.6, 0.0])
    assert float(oracle.score(edge)) == pytest.approx(0.5)
    x = TASK.data(20, make_generator(0))[0].double().requires_grad_(True)
    assert torch.autograd.gradcheck(oracle.score, x)


@pytest.mark.parametrize(
    "settings", ["modes=(1,9)", "modes=(1,2,3)", "values=(1.0,0.0)", "values=(2,1)", "width=0"]
)
def test_wrong_oracle_settings_are_named(settings):
    with pytest.raises(ConfigError, match="two-modes"):
        make_oracle(f"two-modes:{settings}", TASK)
    with pytest.raises(ConfigError, match="judges the gaussians task"):
        TwoModes(Shapes())


def test_optimum_keeps_both_modes(grid):
    """Equal values leave 3 to 1; a value that is 0.1 larger weighs ``exp(0.1 / beta)`` in the middle of a mode."""
    tilt = tilted(grid)
    kind = TASK.classify(grid[0])
    assert float(tilt[kind == SMALL].sum() / tilt[kind == LARGE].sum()) == pytest.approx(
        1 / 3, rel=1e-6
    )
    assert float(tilt[(kind == SMALL) | (kind == LARGE)].sum()) > 0.999
    other = TwoModes(TASK, values=(0.9, 1.0)).score(grid[0])
    tilt = (grid[1].log() + other / 0.1).softmax(0)
    ratio = float(tilt[kind == SMALL].sum() / tilt[kind == LARGE].sum())
    # In polar coordinates about a centre, mode by mode.
    radius = torch.linspace(0, 1.2, 100_001).double()
    inside = [
        torch.trapezoid(
            radius * (-radius.square() / 0.08 + a / 0.1 / (1 + (radius / 0.6) ** 4)).exp(), radius
        )
        for a in (1.0, 0.9)
    ]
    assert ratio == pytest.approx(float(inside[0] / inside[1]) / 3, rel=1e-4)
    assert 0.8 < ratio < math.e / 3


def test_judge_agrees_with_quadrature(judge, grid):
    """Reward, KL and frontier that it estimates from 16,384 samples, against sums over the plane."""
    mass, rewards = grid[1:]
    tilt = tilted(grid)
    best = float((tilt * rewards).sum())
    kl = float((tilt * (tilt.log() - mass.log()).nan_to_num()).sum())
    assert float(judge.rewards.mean()) == pytest.approx(float((mass * rewards).sum()), abs=0.01)
    assert judge.optimum_reward == pytest.approx(best, abs=5e-3)
    assert judge.optimum_kl == pytest.approx(kl, abs=0.03)
    # The frontier with masses is exact, and the one from samples comes near it.
    exact_reward, exact_kl = frontier(rewards, torch.tensor([0.1], dtype=torch.float64), mass)
    assert float(exact_reward) == pytest.approx(best, rel=1e-9)
    assert float(exact_kl) == pytest.approx(kl, rel=1e-9)
    assert frontier_kl(rewards, best, mass) == pytest.approx(kl, rel=1e-6)
    for reward in (0.4, 0.6, 0.9):
        want = frontier_kl(rewards, reward, mass)
        assert frontier_kl(judge.rewards, reward) == pytest.approx(want, abs=0.03)
    assert frontier_kl(rewards, 0.2, mass) == 0


def test_rejection_draws_the_quadratures_optimum(judge, grid):
    assert small_share(judge.optimum) == pytest.approx(0.25, abs=0.04)
    second = float((tilted(grid)[:, None] * grid[0].square()).sum())
    assert float(judge.optimum.square().sum(1).mean()) == pytest.approx(second, rel=0.01)


def test_diversity_and_score_see_a_forgotten_mode(judge):
    """Exact flows: the reference, one that makes the two preferred modes, and one that forgot the small one."""

    def made(*masses):
        return judge.evaluate(Chain(Gaussians(masses=masses).exact_flow(), steps=32), kl=False)

    best, collapsed = made(0, 3, 0, 0, 0, 1, 0, 0), made(0, 1, 0, 0, 0, 0, 0, 0)
    assert min(best.preferred_rate, collapsed.preferred_rate) > 0.97
    assert best.score > 0.9 and best.diversity == pytest.approx(1, abs=0.1)
    assert collapsed.score < 0.75 and collapsed.diversity < 0.25


def test_a_class_without_mass_is_no_trouble():
    flow = Gaussians(masses=(1, 0, 0, 0, 0, 0, 0, 0)).exact_flow()
    x = flow.integrate(torch.randn(200, 2), 64, "heun")
    assert float((x - torch.tensor([2.0, 0.0])).norm(dim=1).max()) < 1.2
    assert bool(torch.isfinite(normal_log_prob(x)).all())


# Pictures


def test_points_are_drawn_together_and_alone(data):
    groups = [data[0][:300].numpy(), data[0][300:500].numpy()]
    figure = plotting.overlays(TASK, groups, [plotting.RED, plotting.GREEN], ["a", "b"])
    drawn = [len(c.get_offsets()) for axes in figure.axes for c in axes.collections]
    assert drawn == [8, 300, 8, 200], "the modes' places, then the samples"
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    alone = Figure().add_subplot()
    TASK.draw(alone, groups[0][0], plotting.RED)
    assert len(alone.collections[1].get_offsets()) == 1


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(data):
    x = data[0][:100].float()
    flow, oracle = TASK.exact_flow(), TwoModes(TASK)
    torch.testing.assert_close(TASK.log_density(x.cuda()).cpu(), TASK.log_density(x))
    torch.testing.assert_close(oracle.score(x.cuda()).cpu(), oracle.score(x))
    there = flow.clone().cuda().velocity(x.cuda(), 0.5).cpu()
    torch.testing.assert_close(there, flow.velocity(x, 0.5))
