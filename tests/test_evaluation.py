"""Evaluation against Gaussians, where frontier, optimum, KL and energy distance have closed forms.

Reference ``N(m, S)`` and reward ``r = a . x``: the optimum at temperature beta is ``N(m + S a / beta, S)``, its
mean reward ``a . m + a'Sa / beta`` and its KL ``a'Sa / (2 beta^2)``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from probes import Chain, Linear, LinearVelocity, Plain, euler_gain, gaussian, gaussian_kl
from scipy import integrate, stats

from oracles.s_curve import SCurve
from prefenv.checkpoints import load_checkpoint
from prefenv.divergence import chain_log_prob, kl_divergence
from prefenv.errors import ConfigError
from prefenv.evaluation import Judge
from prefenv.flow import normal_log_prob
from prefenv.optimum import energy_distance, frontier, frontier_kl, optimum_samples, optimum_weights
from prefenv.oracle import Oracle
from prefenv.tasks.shapes import Shapes


def draws(n, dim, seed=0):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quantiles(n=200_000):
    """A standard normal sample without chance: the middles of n equally likely slices."""
    return torch.as_tensor(stats.norm.ppf((np.arange(n) + 0.5) / n))


# The frontier

TILTS = torch.tensor([0.1, 0.5, 1.0, 1.5], dtype=torch.float64)  # sd of the reward over beta


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (-3.0, 0.2), (40.0, 10.0)])
def test_frontier_is_the_closed_form(mean, sd):
    reward, kl = frontier(mean + sd * quantiles(), sd / TILTS)
    torch.testing.assert_close((reward - mean) / sd, TILTS, rtol=1e-3, atol=0)
    torch.testing.assert_close(kl, TILTS**2 / 2, rtol=2e-3, atol=0)


def test_frontier_of_samples_is_right_on_average():
    a, m, s = draws(3, 1, 5)[:, 0], torch.tensor([1.0, -2.0, 0.5]).double(), 0.5
    sd = s * float(a.norm())
    points = [
        torch.stack(frontier((m + s * draws(4000, 3, seed)) @ a, sd / TILTS)) for seed in range(40)
    ]
    points = torch.stack(points)
    want = torch.stack([a @ m + sd * TILTS, TILTS**2 / 2])
    error = (points.mean(0) - want).abs() / (points.std(0) / math.sqrt(40))
    assert float(error.max()) < 4, error


@pytest.mark.parametrize("tilt", [0.01, 0.3, 1.0, 2.0])
def test_frontier_kl_is_the_frontiers_inverse(tilt):
    rewards = 5 + 2 * draws(20_000, 1)[:, 0]
    reward, kl = frontier(rewards, torch.tensor([2 / tilt]))
    assert frontier_kl(rewards, float(reward)) == pytest.approx(float(kl), rel=1e-4, abs=1e-9)
    assert frontier_kl(5 + 2 * quantiles(), 5 + 2 * tilt) == pytest.approx(tilt**2 / 2, rel=0.01)


def test_frontier_kl_at_its_ends():
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0])
    assert frontier_kl(rewards, 1.0) == frontier_kl(rewards, -5.0) == 0
    assert frontier_kl(rewards, 2.0) == frontier_kl(rewards, 3.0) == math.inf
    assert frontier_kl(rewards, 2 - 1e-6) == pytest.approx(math.log(4), rel=1e-3)
    values = [frontier_kl(rewards, r) for r in (1.1, 1.4, 1.7, 1.9)]
    assert values == sorted(values) and values[0] > 0


def test_frontier_of_two_values_is_the_binary_divergence():
    """Rewards 0 and 1, a share p of ones: the least KL for a share q is ``KL(q || p)`` of two coins."""
    p = 0.3
    rewards = torch.cat([torch.zeros(700), torch.ones(300)])
    for q in (0.35, 0.6, 0.9, 0.99):
        coin = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        assert frontier_kl(rewards, q) == pytest.approx(coin, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_no_mixture_lies_above_the_frontier(weight):
    """A share of optimum in the reference has the reward of a weaker tilt, and a larger KL by a known amount."""
    shift = 1.5

    def density(x):
        return weight * stats.norm.pdf(x, shift) + (1 - weight) * stats.norm.pdf(x)

    kl, _ = integrate.quad(
        lambda x: density(x) * np.log(density(x) / stats.norm.pdf(x)), -12, 14, limit=200
    )
    least = frontier_kl(quantiles(), weight * shift)
    assert least == pytest.approx((weight * shift) ** 2 / 2, rel=5e-3)
    if 0 < weight < 1:
        assert kl > 1.05 * least
    else:
        assert kl == pytest.approx(least, rel=5e-3, abs=1e-9)


# The optimum


def test_optimum_weights_and_their_effective_size():
    for tilt in (0.2, 0.5, 1.0):
        weight, size = optimum_weights(3 * quantiles(), 3 / tilt)
        assert float(weight.sum()) == pytest.approx(1)
        assert size / len(weight) == pytest.approx(math.exp(-(tilt**2)), rel=2e-3)
    assert optimum_weights(torch.full((50,), 0.7), 0.1)[1] == pytest.approx(50)
    assert optimum_weights(torch.tensor([0.0, 100.0]), 0.1)[1] == pytest.approx(1)


def test_optimum_samples_have_the_optimums_law():
    a = torch.tensor([1.0, -0.5]).double()
    mean = torch.tensor([0.3, 2.0]).double()
    root = torch.tensor([[0.8, 0.0], [0.3, 0.4]]).double()
    cov = root @ root.T
    x = mean + draws(400_000, 2) @ root.T
    beta = float((a @ cov @ a).sqrt()) / 1.0
    kept = optimum_samples(x, x @ a, beta, torch.Generator().manual_seed(1))
    want = mean + cov @ a / beta
    n = len(kept)
    assert n > 2000
    assert bool(((kept.mean(0) - want).abs() < 4 * (cov.diagonal() / n).sqrt()).all())
    torch.testing.assert_close(kept.T.cov(), cov, rtol=0.15, atol=0.01)
    z = torch.linalg.solve(root, (kept - want).T).flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert len(kept.unique(dim=0)) == n, "every sample at most once"
    other = optimum_samples(x, x @ a, beta, torch.Generator().manual_seed(2))
    assert not torch.equal(kept[:50], other[:50])


def test_too_few_survivors_are_refused():
    x = draws(5000, 1)
    with pytest.raises(ConfigError, match=r"only \d+ of 5000 .*beta=0.05.*raise beta"):
        optimum_samples(x, x[:, 0], 0.05, torch.Generator().manual_seed(0))


# The KL of flows


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.5, 0.0, -0.3], [1.0, 0.5, 0.7]),
        ([0.0, 0.0, 0.0], [0.6, 0.8, 0.9]),
        ([2.0, 1, 0], [1, 1, 1]),
    ],
)
def test_kl_of_gaussian_flows(mean, std):
    mean, std = torch.tensor(mean).double(), torch.tensor(std).double()
    m_a, s_a = torch.tensor([0.1, -0.2, 0.0]).double(), torch.tensor([0.9, 0.6, 0.7]).double()
    got, stderr = kl_divergence([gaussian(mean, std)], gaussian(m_a, s_a), 1000)
    want = gaussian_kl(mean, (std**2).diag(), m_a, (s_a**2).diag())
    assert abs(got - want) < 4 * stderr and 0 < stderr < 0.2 * want
    again = kl_divergence([gaussian(mean, std)], gaussian(m_a, s_a), 1000)
    assert again == (got, stderr)
    other, _ = kl_divergence([gaussian(mean, std)], gaussian(m_a, s_a), 1000, seed=1)
    assert other != got and abs(other - want) < 4 * stderr


def test_kl_of_a_flow_to_itself_is_zero():
    got, stderr = kl_divergence(
        [gaussian([0.3, 1.0], [0.5, 0.9])], gaussian([0.3, 1.0], [0.5, 0.9])
    )
    assert abs(got) < 1e-3 and stderr < 1e-4


def test_kl_of_a_chain_of_flows():
    """The second flow turns and shears: ``N(m, S)`` becomes ``N(Em, ESE')``, ``E = expm(A)``."""
    m, s = torch.tensor([0.5, -0.5]), torch.tensor([0.8, 0.5])
    matrix = torch.tensor([[0.2, -0.6], [0.3, -0.1]])
    e = torch.linalg.matrix_exp(matrix)
    cov = (s**2).diag()
    want = gaussian_kl(e @ m, e @ cov @ e.T, m, cov)
    first, second = gaussian(m, s), LinearVelocityFlow(matrix)
    got, stderr = kl_divergence([first, second], first, 4000, 8)
    assert abs(got - want) < 4 * stderr and stderr < 0.1 * want
    one_way, _ = kl_divergence([second, first], first, 4000, 8)
    assert abs(one_way - want) > 4 * stderr, "the order matters"


def LinearVelocityFlow(matrix):
    flow = gaussian([0.0] * len(matrix), 1.0)
    flow.field = LinearVelocity(matrix)
    return flow


def test_chain_log_prob_is_the_density():
    m, s = torch.tensor([0.5, -0.5]).double(), torch.tensor([0.8, 0.5]).double()
    matrix = torch.tensor([[0.2, -0.6], [0.3, -0.1]]).double()
    e = torch.linalg.matrix_exp(matrix)
    flows = [gaussian(m, s, torch.float64), LinearVelocityFlow(matrix)]
    x, log_prob = chain_log_prob(flows, draws(20_000, 2), 16, torch.Generator().manual_seed(0))
    density = torch.distributions.MultivariateNormal(e @ m, e @ (s**2).diag() @ e.T).log_prob(x)
    gap = log_prob - density
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap)) + 1e-4
    assert float(gap.std()) < 1, "one probe a row"


def test_the_interval_of_the_kl_holds_the_truth():
    mean, std = torch.tensor([0.6, -0.4]), torch.tensor([0.7, 0.9])
    b, a = gaussian(mean, std), gaussian([0.0, 0.0], [0.9, 0.8])
    want = gaussian_kl(mean, (std**2).diag(), torch.zeros(2), torch.tensor([0.81, 0.64]).diag())
    got = [kl_divergence([b], a, 100, 6, seed=seed) for seed in range(100)]
    held = sum(abs(nats - want) < 1.96 * stderr for nats, stderr in got)
    assert 90 <= held < 100, held


def test_the_reference_is_no_nats_from_itself():
    """Equal steps of RK4 are too long near thin data: 16 of them make -4.8 nats of the KL of A to A."""
    flow = load_checkpoint(None, Shapes()).flow
    got, stderr = kl_divergence([flow], flow, 16)
    assert abs(got) < 0.025 and stderr < 0.02
    noise = torch.randn(16, 64, 2, generator=torch.Generator().manual_seed(0))
    rng = (torch.Generator().manual_seed(1) for _ in range(2))
    x, log_det = flow.integrate_with_log_det(noise, 16, "rk4", generator=next(rng))
    there, back = normal_log_prob(noise) - log_det, flow.log_prob(x, 16, "rk4", generator=next(rng))
    assert -6 < float((there - back).mean()) < -3


def test_common_probes_leave_less_noise_and_the_truth():
    """Two shears that differ a little, in 8 dimensions: their traces' noises are nearly the same."""
    one = 0.3 * draws(8, 8, 1).float()
    other = one + 0.03 * draws(8, 8, 2).float()
    e, f = torch.linalg.matrix_exp(one).double(), torch.linalg.matrix_exp(other).double()
    want = gaussian_kl(torch.zeros(8).double(), f @ f.T, torch.zeros(8).double(), e @ e.T)
    a, b = LinearVelocityFlow(one), LinearVelocityFlow(other)
    got = [kl_divergence([b], a, 100, 6, seed=seed) for seed in range(100)]
    assert 90 <= sum(abs(nats - want) < 1.96 * stderr for nats, stderr in got) < 100
    x, log_b = chain_log_prob([b], draws(100, 8).float(), 6, torch.Generator().manual_seed(1))
    log_a = a.log_prob(x, 6, "rk4", generator=torch.Generator().manual_seed(2))
    assert max(stderr for _, stderr in got) < float((log_b - log_a).std()) / 10 / 2


# The energy distance


def root(square):
    return math.sqrt(max(square, 0))


def test_energy_distance_matches_golden(golden):
    g = {k: torch.as_tensor(v) for k, v in golden("10_metrics").items()}
    for other, name in (("Y", "U"), ("Y2", "U_unequal")):
        got = energy_distance(g["X"], g[other])
        assert got == pytest.approx(root(float(g[f"energy_distance_{name}_dcor"])), rel=1e-7)
        assert got < root(float(g[f"energy_distance_{name.replace('U', 'V')}_dcor"])), "unbiased"
    for d in range(2):
        x, y = g["X"][:, d : d + 1], g["Y"][:, d : d + 1]
        scipys = float(g["energy_1d_per_dim_scipy"][d])
        assert energy_distance(x, y) == pytest.approx(
            root(scipys**2 - diagonal(x) - diagonal(y)), rel=1e-7
        )


def diagonal(x):
    """What a V statistic adds: the mean distance of two different samples, over n."""
    x = x.numpy().ravel()
    return np.abs(x[:, None] - x).sum() / (len(x) - 1) / len(x) ** 2


@pytest.mark.parametrize(("n", "m"), [(7, 7), (30, 101), (1500, 1100)])
def test_energy_distance_is_scipys_but_for_the_diagonal(n, m):
    x, y = draws(n, 1), 0.5 + 2 * draws(m, 1, 1)
    scipys = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy())
    want = root(scipys**2 - diagonal(x) - diagonal(y))
    assert energy_distance(x, y) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_energy_distance_of_normals(shift):
    """``E|N(d, 2)|`` is a folded normal's mean; D^2 = 2 E|N(d, 2)| - 2 E|N(0, 2)|."""
    folded = stats.foldnorm(shift / math.sqrt(2), scale=math.sqrt(2)).mean()
    want = math.sqrt(2 * folded - 4 / math.sqrt(math.pi))
    assert energy_distance(draws(4000, 1), shift + draws(4000, 1, 1)) == pytest.approx(
        want, rel=0.08
    )


def test_energy_distance_of_one_law_is_zero_without_bias():
    got = [energy_distance(draws(60, 3, 2 * i), draws(60, 3, 2 * i + 1)) for i in range(60)]
    zeros = sum(d == 0 for d in got)
    assert 20 <= zeros <= 48, "clipped about as often as not"
    squares = [plain_square(draws(60, 3, 2 * i), draws(60, 3, 2 * i + 1)) for i in range(60)]
    assert abs(np.mean(squares)) < 4 * np.std(squares) / math.sqrt(60)
    assert [root(s) for s in squares] == pytest.approx(got, abs=1e-6)


def plain_square(x, y):
    def mean(a, b, same):
        d = (a[:, None] - b).norm(dim=-1)
        return float(d.sum() / (len(a) * (len(a) - 1))) if same else float(d.mean())

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


def test_energy_distance_knows_no_direction_and_no_order():
    x, y = draws(200, 4), 0.4 + 1.3 * draws(150, 4, 1)
    d = energy_distance(x, y)
    q, _ = torch.linalg.qr(draws(4, 4, 2))
    assert energy_distance(y, x) == pytest.approx(d, rel=1e-9)
    assert energy_distance(x @ q + 7, y @ q + 7) == pytest.approx(d, rel=1e-6)
    assert energy_distance(x.flip(0), y.view(150, 2, 2)) == pytest.approx(d, rel=1e-9)
    assert energy_distance(9 * x, 9 * y) == pytest.approx(3 * d, rel=1e-9), "a root of a distance"
    assert energy_distance(x.float(), y.float()) == pytest.approx(d, rel=1e-5)


# The judge

M, S, A = torch.tensor([0.5, -1.0]), torch.tensor([0.8, 1.2]), torch.tensor([1.0, 0.5])
GAIN = torch.tensor([euler_gain(float(s)) for s in S])  # the sampler's own standard deviations
SPREAD = float((GAIN * A).norm())  # of the reward, on the reference's samples
SHIFT = GAIN**2 * A / SPREAD  # of the optimum's mean, at beta = SPREAD
THRESHOLD = float(M @ A) + SPREAD


def shifted(weight, stretch=1.0):
    """A model ``weight`` of the way to the optimum."""
    return Chain(gaussian(M + weight * SHIFT, S * stretch))


@pytest.fixture(scope="module")
def judge():
    task = Plain(dim=2)
    return Judge(gaussian(M, S), task, Linear(task, A, THRESHOLD), beta=SPREAD, n_reference=200_000)


def test_judge_knows_the_reference_and_the_optimum(judge):
    n = len(judge.optimum)
    assert 800 < n <= 2048
    assert float(judge.rewards.mean()) == pytest.approx(float(M @ A), abs=4 * SPREAD / 447)
    assert float(judge.rewards.std()) == pytest.approx(SPREAD, rel=0.01)
    assert bool(((judge.optimum.mean(0) - M - SHIFT).abs() < 4 * GAIN / math.sqrt(n)).all())
    assert float(judge.optimum_rewards().mean()) == pytest.approx(
        THRESHOLD, abs=4 * SPREAD / n**0.5
    )
    assert judge.optimum_reward == pytest.approx(THRESHOLD, abs=0.05 * SPREAD)
    assert judge.optimum_kl == pytest.approx(0.5, rel=0.06)
    assert judge.effective_size == pytest.approx(200_000 / math.e, rel=0.15)


def test_scores_run_from_the_reference_to_the_optimum(judge):
    scores = [judge.evaluate(shifted(w), kl=False).score for w in (0.0, 0.3, 0.6, 1.0)]
    assert scores[0] == pytest.approx(0, abs=0.06)
    assert scores[3] > 0.85 and judge.optimum_score > 0.85
    assert scores == sorted(scores)
    far, back = (judge.evaluate(shifted(w), kl=False).score for w in (2.0, -1.0))
    assert far == pytest.approx(0, abs=0.15), "as far behind the optimum as the reference before it"
    assert back < -0.5
    along = float((SHIFT / GAIN).norm())
    want = 1 - energy(0.4 * along) / energy(along)
    assert scores[2] == pytest.approx(want, abs=0.1)


def energy(shift):
    """D between ``N(0, I_2)`` and itself moved by ``shift``, the axes' spreads being nearly equal here."""
    x = draws(3000, 2, 8)
    return energy_distance(x, draws(3000, 2, 9) + torch.tensor([shift, 0.0]))


def test_rewards_rates_and_kl_are_the_closed_forms(judge):
    for weight in (0.0, 0.5, 1.0):
        e = judge.evaluate(shifted(weight))
        mean = float(M @ A) + weight * SPREAD
        assert e.reward == pytest.approx(mean, abs=4 * SPREAD / math.sqrt(2048))
        rate = stats.norm.sf((THRESHOLD - mean) / SPREAD)
        assert e.preferred_rate == pytest.approx(rate, abs=4 * math.sqrt(0.25 / 2048))
        nats = float(((weight * SHIFT / S) ** 2).sum() / 2)
        assert abs(e.kl_nats - nats) < 4 * e.kl_stderr + 1e-3
        assert e.frontier_kl_nats == pytest.approx(weight**2 / 2, rel=0.25, abs=0.01)
        assert e.reward_stderr == pytest.approx(SPREAD / math.sqrt(2048), rel=0.1)
        assert abs(e.frontier_kl_nats - weight**2 / 2) < 4 * e.frontier_kl_stderr + 1e-6
    assert e.reference_preferred_rate == pytest.approx(stats.norm.sf(1), abs=0.005)
    assert e.beta == SPREAD and e.optimum_score == judge.optimum_score
    assert e.optimum_effective_size == judge.effective_size
    assert e.residual == pytest.approx(
        float((M + SHIFT + GAIN * draws(9000, 2)).norm(dim=1).median()), rel=0.05
    )
    assert e.reference_residual == pytest.approx(float(judge.samples.norm(dim=1).median()))


def test_no_model_lies_above_the_frontier(judge):
    aside = Chain(gaussian(M + SHIFT * torch.tensor([2.0, -0.8]), S))
    for model in (shifted(0.7, 1.6), shifted(0.7, 0.4), aside):
        e = judge.evaluate(model)
        assert e.kl_nats - 4 * e.kl_stderr > e.frontier_kl_nats > 0.1


def test_diversity_is_that_of_the_accepted_relative_to_the_optimum(judge):
    optimum = judge.evaluate(shifted(1.0), kl=False)
    assert optimum.diversity == pytest.approx(1, abs=0.1)
    assert 0.4 < optimum.preferred_rate < 0.6, (
        "half of the optimum is not accepted and does not count"
    )
    narrow = judge.evaluate(shifted(2.5, 0.2), kl=False)
    assert narrow.preferred_rate > 0.99 and narrow.diversity < 0.5
    one = Chain(gaussian(M + 5 * SHIFT, 1e-9))
    assert judge.evaluate(one, kl=False).diversity < 1e-3
    assert judge.evaluate(Chain(gaussian(M - 9 * SHIFT, S)), kl=False).diversity == 0


def test_diversity_is_nan_where_the_optimum_has_nothing_accepted():
    task = Plain()
    judge = Judge(gaussian([0.0], [1.0]), task, Linear(task, [1.0], 50.0), beta=2.0)
    assert math.isnan(judge.evaluate(Chain(gaussian([1.0], [1.0])), kl=False).diversity)


def test_likelihoods_can_be_left_out(judge):
    e = judge.evaluate(shifted(0.5), kl=False)
    assert (
        math.isnan(e.kl_nats)
        and math.isnan(e.kl_stderr)
        and e.reward == judge.evaluate(shifted(0.5)).reward
    )


def test_a_model_without_flows_has_no_likelihood_but_may_know_a_bound(judge):
    class Selects(Chain):
        def chain(self):
            return []

        def kl_bound(self):
            return 1.25

    e = judge.evaluate(Selects(gaussian(M, S)))
    assert math.isnan(e.kl_nats) and math.isnan(e.kl_stderr) and e.kl_bound_nats == 1.25
    assert math.isnan(judge.evaluate(shifted(0.0), kl=False).kl_bound_nats)


def test_frontier_curve_rises_from_the_reference():
    task = Plain(dim=2)
    judge = Judge(gaussian(M, S), task, Linear(task, A), beta=1.5 * SPREAD)
    reward, kl, stderr = judge.frontier_curve()
    assert reward.shape == kl.shape == stderr.shape and 50 < len(kl) < 200
    assert stderr[0] == pytest.approx(
        float(judge.rewards.std()) / len(judge.rewards) ** 0.5, rel=0.05
    )
    assert (np.diff(reward) > -1e-9).all() and (np.diff(kl) > -1e-9).all()
    assert kl[0] < 1e-3 and reward[0] == pytest.approx(float(judge.rewards.mean()), abs=0.02)
    betas = torch.logspace(2, -3, 200)[len(kl) - 1 : len(kl) + 1]
    sizes = [optimum_weights(judge.rewards, float(b))[1] for b in betas]
    assert sizes[0] >= 100 > sizes[1], "it ends where too few samples carry it"
    low = kl < 0.5
    closed = ((reward - float(M @ A)) / SPREAD) ** 2 / 2
    np.testing.assert_allclose(kl[low], closed[low], atol=0.06)


def test_two_judges_agree_to_the_last_bit():
    task = Plain()
    one, other = (
        Judge(gaussian([0.0], [1.0]), task, Linear(task, [1.0]), beta=1.5) for _ in range(2)
    )
    assert torch.equal(one.optimum, other.optimum) and torch.equal(one.noise, other.noise)
    model = Chain(gaussian([0.4], [0.9]))
    assert one.evaluate(model) == other.evaluate(model)


def test_beta_is_the_tasks_unless_given():
    task = Plain(beta=1.7)
    assert Judge(gaussian([0.0], [1.0]), task, Linear(task, [1.0])).beta == 1.7
    assert Judge(gaussian([0.0], [1.0]), task, Linear(task, [1.0]), beta=2.0).beta == 2.0


def test_what_cannot_be_evaluated_is_refused():
    task, reference = Plain(), gaussian([0.0], [1.0])
    with pytest.raises(ConfigError, match="true score"):
        Judge(reference, task, Oracle(task))
    with pytest.raises(ConfigError, match="raise beta"):
        Judge(reference, task, Linear(task, [1.0]), beta=0.05)
    with pytest.raises(ConfigError, match="no other than the reference"):
        Judge(reference, task, Linear(task, [0.0]), beta=1.0, n_reference=1000)


def test_diversity_counts_only_what_is_accepted_on_shapes():
    """Half of the samples one S curve over and over, half rolls: no rate nor residual shows it, diversity does."""
    task = Shapes()
    oracle = SCurve(task)
    data, kind = task.data(6000, torch.Generator().manual_seed(0))
    s = data[kind == 1]

    class Fixed:
        def __init__(self, samples):
            self.samples = samples

        def sample(self, noise):
            return self.samples[torch.arange(len(noise)) % len(self.samples)]

        def chain(self):
            return []

    judge = object.__new__(Judge)
    judge.task, judge.oracle, judge.beta, judge.effective_size = task, oracle, 0.1, 1.0
    judge.noise = torch.zeros(1000, 64, 2)
    judge.samples, judge.rewards = data, oracle.score(data)
    judge.optimum, judge.distance, judge.optimum_score = s[:700], 1.0, 1.0
    pairs = torch.pdist(s[:700].flatten(1)).mean()
    judge.spread = float(pairs)
    assert judge.evaluate(Fixed(s[700:1400]), kl=False).diversity == pytest.approx(1, abs=0.03)
    half = torch.cat([s[:1].repeat(500, 1, 1), data[kind == 0][:500]])
    collapsed = judge.evaluate(Fixed(half), kl=False)
    assert collapsed.preferred_rate == 0.5 and collapsed.diversity < 1e-3
