"""The benchmarks' statistics against brute force, scipy and known truths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import statistics
from benchmarks.statistics import (
    bootstrap,
    improvement,
    iqm,
    mean_iqm,
    pooled_iqm,
    profile,
    run_weights,
    superiority,
)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# The interquartile mean


@pytest.mark.parametrize("n", [4, 8, 60])
def test_iqm_is_the_trimmed_mean_where_four_divides_the_number(n):
    x = draws(7, n)
    np.testing.assert_allclose(iqm(x), stats.trim_mean(x, 0.25, axis=-1), rtol=1e-12)
    assert iqm(x[0]) == pytest.approx(iqm(np.flip(x[0])), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_iqm_of_other_numbers_is_that_of_fourfold_runs(n):
    """Each run written four times is the same law, and its quartiles lie between whole runs."""
    x = draws(n)
    assert iqm(x) == pytest.approx(stats.trim_mean(np.repeat(x, 4), 0.25), rel=1e-12)


def test_iqm_of_five_counts_the_parts_inside_the_quartiles():
    assert iqm(np.array([9.0, 1.0, 2.0, 5.0, 3.0])) == pytest.approx(
        (0.75 * 2 + 3 + 0.75 * 5) / 2.5
    )


def test_weights_are_repetitions():
    x, times = draws(6), np.array([1, 4, 2, 3, 5, 1])
    assert iqm(x, times / 7) == pytest.approx(stats.trim_mean(np.repeat(x, times), 0.25), rel=1e-12)


def test_strata_count_by_their_shares_however_many_runs_they_have():
    strata = [draws(3), draws(8, seed=1), draws(5, seed=2)]
    weights = run_weights(strata, [1, 1, 2])
    parts = np.split(weights, [3, 11])
    assert [p.sum() for p in parts] == pytest.approx([0.25, 0.25, 0.5])
    assert all(np.ptp(p) == 0 for p in parts)
    doubled = [np.repeat(strata[0], 2), *strata[1:]]
    assert pooled_iqm(doubled).value == pytest.approx(pooled_iqm(strata).value, rel=1e-12)


# The bootstrap


def exact_ends(strata, statistic):
    """Percentiles of a statistic over every draw there is."""
    draws = [list(itertools.product(s, repeat=len(s))) for s in strata]
    values = [statistic(*map(np.array, one)) for one in itertools.product(*draws)]
    return np.percentile(values, [2.5, 97.5])


def test_intervals_are_those_of_all_possible_draws(monkeypatch):
    monkeypatch.setattr(statistics, "LEAST", 3)  # all draws of five would be too many
    strata = [draws(4), 1 + draws(3, seed=1)]
    found = pooled_iqm(strata, resamples=20_000)
    want = exact_ends(strata, lambda *s: iqm(np.concatenate(s), run_weights(strata)))
    np.testing.assert_allclose([found.low, found.high], want, atol=0.03)
    found = mean_iqm(strata, resamples=20_000)
    want = exact_ends(strata, lambda *s: np.mean([iqm(x) for x in s]))
    np.testing.assert_allclose([found.low, found.high], want, atol=0.03)
    assert found.value == pytest.approx(np.mean([iqm(s) for s in strata]), rel=1e-12)


def test_strata_are_never_mixed():
    """Two strata far apart: drawn together their mean would wander, drawn apart it stays."""
    found = mean_iqm([1e-3 * draws(5), 100 + 1e-3 * draws(5, seed=1)])
    assert 49.99 < found.low < found.value < found.high < 50.01
    together = pooled_iqm([np.r_[1e-3 * draws(5), 100 + 1e-3 * draws(5, seed=1)]])
    assert together.high - together.low > 20


def coverage(strata, seeds, repetitions=100):
    held = 0
    for seed in range(repetitions):
        found = pooled_iqm(list(draws(strata, seeds, seed=seed)), resamples=300, seed=seed)
        held += found.low <= 0 <= found.high
    return held / repetitions


def test_the_interval_holds_the_truth():
    """Nominally 95 %; a little less with few seeds, as the module says."""
    assert coverage(12, 20) >= 0.9
    assert 0.88 <= coverage(12, 5) <= 0.97
    assert 0.88 <= coverage(1, 5) <= 0.97


def test_same_seed_same_interval_and_no_interval_of_four_runs():
    strata = [draws(5), draws(5, seed=1)]
    assert pooled_iqm(strata) == pooled_iqm(strata) != pooled_iqm(strata, seed=1)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    found = pooled_iqm([draws(5), draws(4)])
    assert (state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert math.isnan(found.low) and math.isnan(found.high) and not math.isnan(found.value)
    zeros = mean_iqm([np.zeros(7), np.zeros(5)])
    assert (zeros.value, zeros.low, zeros.high) == (0, 0, 0)


# The probability of improvement


def test_superiority_is_mann_whitneys():
    x, y = draws(9).round(), draws(7, seed=1).round()
    assert superiority(x, y) == pytest.approx(stats.mannwhitneyu(x, y).statistic / 63, rel=1e-12)
    assert superiority(x, y) + superiority(y, x) == pytest.approx(1)
    assert superiority(np.array([1.0, 1.0]), np.array([1.0])) == 0.5


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_probability_of_improvement_of_normals(shift):
    """``P(N(d, 1) > N(0, 1)) = Phi(d / sqrt 2)`` in one stratum, one half in the other."""
    x = [shift + draws(150), draws(150, seed=2)]
    y = [draws(150, seed=1), draws(150, seed=3)]
    one = stats.norm.cdf(shift / math.sqrt(2))
    even = improvement(x, y, resamples=200)
    assert even.low <= (one + 0.5) / 2 <= even.high and even.high - even.low < 0.1
    first = improvement(x, y, [3, 1], resamples=200)
    assert first.value == pytest.approx(
        0.75 * superiority(x[0], y[0]) + 0.25 * superiority(x[1], y[1]), rel=1e-12
    )


def test_interval_of_the_improvement_holds_the_truth():
    want, held = (stats.norm.cdf(1 / math.sqrt(2)) + 0.5) / 2, 0
    for seed in range(100):
        x, y = draws(2, 4, 10, seed=seed)
        x[:2] += 1
        found = improvement(list(x), list(y), resamples=300, seed=seed)
        held += found.low <= want <= found.high
    assert held >= 90


# Profiles


def test_profile_is_the_share_above():
    strata, taus = [draws(5), draws(8, seed=1)], np.linspace(-2, 2, 9)
    found = profile(strata, taus, [1, 3])
    for tau, value in zip(taus, found.value, strict=True):
        shares = [np.mean(s > tau) for s in strata]
        assert value == pytest.approx(0.25 * shares[0] + 0.75 * shares[1], abs=1e-12)
    assert (np.diff(found.value) <= 0).all()
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    assert profile([np.array([0.5, 0.5])], np.array([0.5])).value == 0, "above, not at"


def test_band_of_the_profile_holds_the_truth():
    taus, held = np.array([-0.5, 0.0, 0.5]), 0
    for seed in range(100):
        found = profile(list(draws(4, 25, seed=seed)), taus, resamples=300, seed=seed)
        held += (found.low <= stats.norm.sf(taus)) & (stats.norm.sf(taus) <= found.high)
    assert (held >= 90).all(), held


def test_any_statistic_can_be_bootstrapped():
    found = bootstrap(
        [draws(50), draws(50, seed=1)], lambda x, y, axis: x.mean(axis) - y.mean(axis)
    )
    middle = float(draws(50).mean() - draws(50, seed=1).mean())
    stderr = math.hypot(draws(50).std(), draws(50, seed=1).std()) / math.sqrt(50)
    assert found.value == pytest.approx(middle)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * stderr, rel=0.1)
