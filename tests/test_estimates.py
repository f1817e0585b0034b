"""Estimates with errors, on Gaussians in closed form: each interval holds the truth 90 times of 100 or more.

Rewards ``N(m, s^2)`` under the reference: the frontier is ``K(R) = (R - m)^2 / (2 s^2)``, the optimum
``N(m + s^2 / beta, s^2)``.
"""

from __future__ import annotations

import math

import pytest
import torch
from probes import Chain, Linear, Plain, euler_gain, gaussian, gaussian_kl
from scipy import stats

from prefenv.divergence import kl_divergence, path_kl, step_kl
from prefenv.errors import ConfigError, NoLogProbError
from prefenv.estimates import (
    frontier_kl_estimate,
    frontier_stderr,
    optimum_mean,
    optimum_resample,
)
from prefenv.evaluation import Judge
from prefenv.kernels import Kernel
from prefenv.optimum import energy_distance, frontier, frontier_kl
from prefenv.policy import FlowPolicy

M, S = 0.3, 0.5


def rewards(n=4000, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return M + S * torch.randn(n, generator=rng, dtype=torch.float64)


def held(pairs, truth):
    """How many intervals of (estimate, standard error) hold the truth."""
    return sum(abs(value - truth) < 1.96 * error for value, error in pairs)


# The frontier


@pytest.mark.parametrize("tilt", [0.3, 1.0, 1.5])
def test_the_frontiers_interval_holds_the_truth(tilt):
    found = [frontier_kl_estimate(rewards(seed=i), M + tilt * S) for i in range(100)]
    assert held(found, tilt**2 / 2) >= 90
    spread = torch.tensor(found).double()[:, 0].std()
    assert float(spread) == pytest.approx(sum(e for _, e in found) / 100, rel=0.3), (
        "no wider than need be"
    )


def test_the_frontiers_interval_knows_the_error_of_the_reward():
    """A model's mean reward comes from samples too, and its error counts with the slope ``1 / beta``."""
    found, blind = [], []
    for i in range(100):
        own = S + rewards(500, seed=1000 + i)
        mean, error = float(own.mean()), float(own.std()) / math.sqrt(len(own))
        found.append(frontier_kl_estimate(rewards(seed=i), mean, error))
        blind.append(frontier_kl_estimate(rewards(seed=i), mean))
    assert held(found, 0.5) >= 90 > held(blind, 0.5)


def test_the_frontiers_interval_holds_the_truth_over_conditions():
    """Three conditions with means of their own: all are tilted alike, and their errors are averaged."""
    means = torch.tensor([[0.0], [3.0], [-1.0]])

    def table(seed):
        return means + torch.stack([rewards(seed=3 * seed + k) for k in range(3)])

    reward = M + float(means.mean()) + S
    found = [frontier_kl_estimate(table(i), reward) for i in range(100)]
    assert held(found, 0.5) >= 90
    spread = torch.tensor(found).double()[:, 0].std()
    assert float(spread) == pytest.approx(sum(e for _, e in found) / 100, rel=0.3)
    assert found[0][0] == pytest.approx(frontier_kl(table(0), reward), rel=1e-6)


def test_where_few_samples_carry_the_frontier_its_error_is_not_small():
    r = rewards()
    top = float(r.sort().values[-5])
    kl, error = frontier_kl_estimate(r, top)
    assert math.isfinite(kl) and math.isinf(error)
    betas = torch.tensor([S, S / 100])
    assert [bool(e.isfinite().all()) for e in torch.stack(frontier_stderr(r, betas)).T] == [
        True,
        False,
    ]


def test_frontier_estimate_is_frontier_kl_with_an_error():
    r = rewards()
    for reward in (M - 1, M, M + 0.2, M + 0.9, 99.0):
        kl, error = frontier_kl_estimate(r, reward)
        assert kl == pytest.approx(frontier_kl(r, reward), rel=1e-6)
        assert math.isinf(error) == math.isinf(kl) and (error > 0) == (kl > 0)
    _, quarter = frontier_kl_estimate(rewards(16_000), M + 0.5)
    assert quarter == pytest.approx(frontier_kl_estimate(r, M + 0.5)[1] / 2, rel=0.2)


def test_errors_along_the_frontier_hold_the_truth():
    betas = S / torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)
    inside, gaps, errors = torch.zeros(2, 3), [], []
    for i in range(100):
        r = rewards(seed=i)
        got, error = torch.stack(frontier(r, betas)), torch.stack(frontier_stderr(r, betas))
        truth = torch.stack([M + S**2 / betas, (S / betas) ** 2 / 2])
        inside += (got - truth).abs() < 1.96 * error
        gaps.append(got - truth)
        errors.append(error)
    assert bool((inside >= 90).all()), inside
    ratio = torch.stack(errors).mean(0) / torch.stack(gaps).std(0)
    assert bool((ratio < 1.3).all()), "no wider than need be"


def test_errors_of_conditions_are_those_of_their_mean():
    betas = S / torch.tensor([0.3, 1.0], dtype=torch.float64)
    table = torch.stack([rewards(4000, seed=i) for i in range(4)])
    for many, one in zip(
        frontier_stderr(table, betas), frontier_stderr(table.flatten(), betas), strict=True
    ):
        torch.testing.assert_close(many, one, rtol=0.1, atol=0)


def test_nothing_lies_above_the_frontier_by_more_than_its_error():
    """The optimum lies on it; a narrower and a wider Gaussian of the same mean reward lie below."""
    reference, on = gaussian([M], [S]), []
    for i in range(100):
        least, error = frontier_kl_estimate(rewards(seed=i), M + S)
        kl, stderr = kl_divergence([gaussian([M + S], [S])], reference, 64, 4, seed=i)
        on.append((kl - least, math.hypot(error, stderr)))
    assert held(on, 0.0) >= 90
    assert all(gap > -4 * error for gap, error in on)
    for std in (0.7 * S, 1.4 * S):
        kl, stderr = kl_divergence([gaussian([M + S], [std])], reference, 1000, 8)
        assert kl - 2 * math.hypot(stderr, error) > least


# The optimum


def test_intervals_of_the_optimums_means_hold_the_truth():
    beta, threshold = S, M + S
    reward, rate = [], []
    for i in range(100):
        r = rewards(seed=i)
        reward.append(optimum_mean(r, r, beta))
        rate.append(optimum_mean(r >= threshold, r, beta))
    assert held(reward, M + S) >= 90 and held(rate, 0.5) >= 90


def test_resampled_optimum_has_its_law_and_its_effective_size():
    r = rewards(100_000)
    got, size = optimum_resample(r, r, S, 2000, torch.Generator().manual_seed(1))
    assert stats.kstest(((got - M - S) / S).numpy(), "norm").pvalue > 1e-3
    assert size == pytest.approx(len(r) / math.e, rel=0.1)
    again, _ = optimum_resample(r, r, S, 2000, torch.Generator().manual_seed(1))
    assert torch.equal(got, again)
    few, _ = optimum_resample(r[:1000], r[:1000], S, 2000, torch.Generator().manual_seed(1))
    assert len(few.unique()) < 1000, "draws repeat"
    truth = M + S + S * torch.randn(2000, generator=torch.Generator().manual_seed(2))
    assert energy_distance(got[:, None], truth[:, None]) < 0.05


def test_an_optimum_on_too_few_samples_is_refused():
    r = rewards(2000)
    for call in (
        lambda: optimum_mean(r, r, 0.1),
        lambda: optimum_resample(r, r, 0.1, 10, torch.Generator()),
    ):
        with pytest.raises(
            ConfigError, match=r"beta=0.1 rests on \d+ effective samples of 2000; raise beta"
        ):
            call()


# What a judge tells of a model


def test_what_a_judge_tells_is_within_its_sampling_error():
    """``N(0, g^2 I)`` in the plane: normal rewards, Rayleigh residuals, a mean distance of ``g sqrt(pi)``."""
    n, g, task = 256, euler_gain(1.0), Plain(dim=2)
    reference, model = gaussian([0.5, 0.0], [1.0]), Chain(gaussian([0.0, 0.0], [1.0]))
    some, all_ = (
        Judge(reference, task, Linear(task, [1.0, 0.0], threshold), beta=1.0, n=n)
        for threshold in (0.3, -99.0)
    )
    told = {"reward": [], "preferred_rate": [], "residual": [], "diversity": []}
    for seed in range(100):
        noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
        some.noise = all_.noise = noise
        e = some.evaluate(model, kl=False)
        for name in ("reward", "preferred_rate", "residual"):
            told[name].append(getattr(e, name))
        told["diversity"].append(all_.evaluate(model, kl=False).diversity * all_.spread)
    rate, ray = stats.norm.sf(0.3 / g), stats.rayleigh(scale=g)
    x = g * torch.randn(2, 3000, 2, generator=torch.Generator().manual_seed(0))
    projected = torch.cdist(*x).mean(1).std()  # of a U statistic: 2 sd(E|x - Y|) / sqrt(n)
    want = {
        "reward": (0.0, g),
        "preferred_rate": (rate, math.sqrt(rate * (1 - rate))),
        "residual": (ray.median(), 1 / (2 * ray.pdf(ray.median()))),
        "diversity": (g * math.sqrt(math.pi), 2 * float(projected)),
    }
    for name, (truth, spread) in want.items():
        pairs = [(value, spread / math.sqrt(n)) for value in told[name]]
        assert 90 <= held(pairs, truth) < 100, name


# The KL of paths

CONSTANT = Kernel("constant", 1.0)


def policies(kernel=CONSTANT, steps=8, other=None):
    b = FlowPolicy(gaussian([0.8, -0.2], [0.7, 0.9]), kernel, steps)
    a = FlowPolicy(gaussian([0.2, 0.1], [0.8, 0.6]), other or kernel, steps)
    return b, a


def walked(b, a):
    """Path KL in closed form, and the mean and std of both ends: every step of every coordinate is affine."""
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    total, state = 0.0, {p: (torch.zeros(2), torch.ones(2)) for p in (b, a)}
    for i in range(b.steps):
        lines = {}
        for p in (b, a):
            start, end = p.mean(x, p.velocity(x, i), i)
            lines[p] = start, end - start
        mean, var = state[b]
        shift, slope = (lines[b][k] - lines[a][k] for k in (0, 1))
        square = (shift + slope * mean) ** 2 + slope**2 * var
        ratio = (b.std(i) / a.std(i)) ** 2
        total += float(square.sum()) / (2 * a.std(i) ** 2) + (ratio - 1 - math.log(ratio))
        for p in (b, a):
            (start, gain), (mean, var) = lines[p], state[p]
            state[p] = start + gain * mean, gain**2 * var + p.std(i) ** 2
    return total, state[b], state[a]


@pytest.mark.parametrize("other", [None, Kernel("constant", 0.9)])
def test_the_path_kls_interval_holds_the_truth(other):
    b, a = policies(other=other)
    truth, _, _ = walked(b, a)
    assert truth > 0.3
    assert held([path_kl(b, a, 100, seed) for seed in range(100)], truth) >= 90


def test_the_kl_of_paths_is_no_less_than_that_of_their_ends():
    b, a = policies()
    truth, (mean_b, var_b), (mean_a, var_a) = walked(b, a)
    ends = gaussian_kl(mean_b, var_b.diag(), mean_a, var_a.diag())
    assert truth > ends > 0.2
    assert path_kl(b, b) == (0.0, 0.0)
    assert path_kl(b, a, 50) == path_kl(b, a, 50) != path_kl(b, a, 50, seed=1)


def test_kl_of_a_step_is_torchs():
    x, y = torch.randn(2, 5, 3, 2)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(x, 0.7), normal(y, 0.4)).sum((1, 2))
    torch.testing.assert_close(step_kl(x, 0.7, y, 0.4), want.double(), rtol=1e-5, atol=1e-5)


def test_paths_that_cannot_be_compared_are_refused():
    b, a = policies(Kernel("ode"))
    with pytest.raises(NoLogProbError, match="deterministic step"):
        path_kl(b, a)
    b, _ = policies()
    with pytest.raises(ConfigError, match="one grid of times"):
        path_kl(b, policies(steps=9)[1])
