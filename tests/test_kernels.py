"""Kernels against exact recursions, published tables, the reference implementations' numbers, and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prefenv.errors import ConfigError, NoLogProbError, UnknownNameError
from prefenv.kernels import KERNELS, Kernel, gaussian_log_prob
from prefenv.networks import GaussianVelocity

STOCHASTIC = [name for name in KERNELS if name != "ode"]
# Kernels whose last step, to u = 1, is deterministic.
QUIET_END = ["cps", "precise", "ddim"]

# A step from t to u: any of [0, 0.999], not from a time so small that sigma swamps the point.
starts = st.just(0.0) | st.floats(1e-4, 0.98)
steps = st.tuples(starts, st.floats(1e-3, 1.0)).map(lambda p: (p[0], p[0] + p[1] * (0.999 - p[0])))


def f64(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def uniform(k) -> np.ndarray:
    return np.linspace(0, 1, k + 1)


def shifted(k, shift) -> np.ndarray:
    u = np.linspace(1, 0, k + 1)
    return 1 - shift * u / (1 + (shift - 1) * u)


def diffusers_grid(k, shift) -> np.ndarray:
    """diffusers' ``FlowMatchEulerDiscreteScheduler``: float32, shifted twice, 1000 training steps."""

    def warp(s):
        return shift * s / (1 + (shift - 1) * s)

    table = warp(np.linspace(1, 1000, 1000, dtype=np.float32)[::-1] / np.float32(1000))
    sigmas = warp(np.linspace(float(table[0]) * 1000, float(table[-1]) * 1000, k) / 1000)
    return 1 - np.append(sigmas.astype(np.float32), 0.0).astype(np.float64)


def final_mean_std(kernel, grid, mean, std):
    """Exact mean and std after all steps for data ``N(mean, std^2)``: every step is affine in x."""
    t, u = f64(grid[:-1]), f64(grid[1:])
    field = GaussianVelocity(f64([mean]), f64([std]))
    v0, v1 = (field(torch.full((len(t), 1), x, dtype=torch.float64), t)[:, 0] for x in (0.0, 1.0))
    a, b, noise = kernel.coefficients(t, u)
    gains, shifts = (a + b * (v1 - v0)).tolist(), (b * v0).tolist()
    m, var = 0.0, 1.0
    for gain, shift, extra in zip(gains, shifts, noise.square().tolist(), strict=True):
        m, var = gain * m + shift, gain**2 * var + extra
    return m, math.sqrt(var)


# Discretisation bias, exactly. Tables: final sd / true sd of data N(1, s^2) with K steps.


@pytest.mark.parametrize(
    ("kernel", "table"),
    [
        (Kernel("ode"), "851 923 961 990  782 886 942 985  538 750 869 966"),
        (Kernel("flow-sde", 0.7), "953 983 997 1004  927 962 983 998  1002 906 943 985"),
        (Kernel("memoryless"), "1011 1002 1000 1000  1037 1008 1002 1000  2203 1093 1018 1001"),
        (Kernel("ddim", 0.245), "838 913 954 988  767 870 930 981  534 736 853 957"),
        (Kernel("ddim", 1.0), "768 868 928 981  690 803 883 965  509 673 784 923"),
        (Kernel("cps", 0.7), "742 792 819 842  684 754 795 832  510 662 740 811"),
    ],
    ids=lambda v: v.name if isinstance(v, Kernel) else "",
)
def test_final_std_table(kernel, table):
    """Columns: s = 1, 0.3, 0.1, in each K = 8, 16, 32, 128; per mille."""
    cells = [(s, k) for s in (1, 0.3, 0.1) for k in (8, 16, 32, 128)]
    for (s, k), printed in zip(cells, table.split(), strict=True):
        mean, std = final_mean_std(kernel, uniform(k), 1.0, s)
        assert abs(1000 * std / s - int(printed)) <= 0.51, (s, k, std / s)
        assert mean == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("kernel", "row"),
    [
        (Kernel("ode"), (0.879, 0.148, 0.959, 1)),
        (Kernel("flow-sde", 0.7), (0.965, 4.46, 0.980, 1)),
        (Kernel("constant", 0.3), (0.887, 3.10, 1.009, 1)),
        (Kernel("cps", 0.8), (0.724, 0.147, 0.762, 0.808)),
        (Kernel("precise", 1.5), (0.797, 0.147, 0.904, 1)),
    ],
    ids=lambda v: v.name if isinstance(v, Kernel) else "",
)
def test_sampler_bias_of_thin_data_and_many_steps(kernel, row):
    columns = (1, uniform(10)), (0.05, shifted(10, 3)), (0.05, uniform(200)), (1, uniform(4000))
    for (s, grid), printed in zip(columns, row, strict=True):
        half_a_digit = 0.0051 if printed > 2 else 0.0021 if printed == 1 else 0.00051
        assert final_mean_std(kernel, grid, 0.0, s)[1] / s == pytest.approx(
            printed, abs=half_a_digit
        )


@pytest.mark.parametrize("name", sorted(KERNELS.keys() - {"cps"}))
@pytest.mark.parametrize("s", [1.0, 0.3])
def test_marginals_are_preserved_in_the_limit(name, s):
    """The bias falls like 1/K. ``flow-sde``'s first step adds a surplus variance of level^4 / 4 whatever the step
    size, which fades only like K^(-level^2): no rate is asked of it."""
    errors = []
    for k in (1000, 4000):
        mean, std = final_mean_std(Kernel(name), uniform(k), 0.7, s)
        assert mean == pytest.approx(0.7, abs=1e-9)
        errors.append(abs(std / s - 1))
    assert errors[1] < 2e-3, errors
    assert name == "flow-sde" or errors[1] < 0.3 * errors[0], errors


@pytest.mark.parametrize(("level", "limit"), [(0.7, 0.85), (0.8, 0.81), (1.0, 0.71)])
def test_cps_never_converges(level, limit):
    assert final_mean_std(Kernel("cps", level), uniform(4000), 0.0, 1.0)[1] == pytest.approx(
        limit, abs=0.006
    )


def test_golden_sampler_table(golden):
    arrays = golden("09_gaussian_flow")
    names = ["ode", "flow-sde", "cps", "constant", "precise"]
    mu, s = arrays["sampler_target_mean_std"]
    for k, shift, index, level, mean, std in arrays["sampler_table"]:
        kernel = Kernel(names[int(index)], None if index == 0 else float(level))
        ours = final_mean_std(kernel, diffusers_grid(int(k), shift), mu, s)
        assert ours == pytest.approx((mean, std), abs=1e-8), (k, shift, kernel)


# The reference implementations. Image convention: sigma = 1 - t, their velocity is -v.


def check_step(kernel, t, u, x, v, noise, given_next, want, skip=()):
    """Mean, draw and log-probabilities (mean over dimensions) of one step against golden arrays."""
    options = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(kernel.mean(x, v, t, u), f64(want["mean"]), **options)
    draw = kernel.sample(x, v, t, u, noise=noise)
    torch.testing.assert_close(draw, f64(want["draw"]), **options)
    torch.testing.assert_close(
        torch.broadcast_to(kernel.std(t, u), (len(x),)), f64(want["std"]), **options
    )
    if "draw_log_prob" in want:
        log_prob = kernel.log_prob(x, v, t, u, draw, "mean")
        torch.testing.assert_close(log_prob, f64(want["draw_log_prob"]), rtol=1e-8, atol=1e-8)
        log_prob = kernel.log_prob(x, v, t, u, given_next, "mean")
        torch.testing.assert_close(log_prob, f64(want["given_log_prob"]), **options)
        total = kernel.log_prob(x, v, t, u, given_next)
        torch.testing.assert_close(total, log_prob * x[0].numel(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["flat", "img"])
@pytest.mark.parametrize(("ours", "theirs"), [("flow-sde", "sde"), ("cps", "cps")])
def test_flow_grpo_steps(golden, shape, ours, theirs):
    """Rows of one batch are at different times. The ``cps`` log-probability is a surrogate there: not compared."""
    a = golden("01_flow_grpo_step")
    times = 1 - f64(a["sigmas"])
    x, v, noise, given_next = (
        f64(a[f"{shape}_{k}"]) for k in ("sample", "model_output", "noise", "given_prev_sample")
    )
    for i, level in enumerate(a["noise_levels"]):
        for j, index in enumerate(a[f"{shape}_step_index"]):

            def of(key, i=i, j=j):
                return a[f"{shape}_{theirs}_{key}_f64"][i, j]

            want = {"mean": of("mean"), "draw": of("draw_prev_sample"), "std": of("std")}
            if theirs == "sde":
                want["std"] = want["std"] * of("sqrt_neg_dt")
                want |= {k: of(k) for k in ("draw_log_prob", "given_log_prob")}
            t, u = times[index], times[index + 1]
            check_step(Kernel(ours, float(level)), t, u, x, -v, noise, given_next, want)


def test_dance_grpo_steps(golden):
    a = golden("02_other_sde_steps")
    times = 1 - f64(a["dance_sigmas"])
    x, v, noise, given_next = (
        f64(a[f"dance_{k}"]) for k in ("latents", "model_output", "noise", "given_prev_sample")
    )
    for i, level in enumerate(a["dance_eta"]):
        for j, index in enumerate(a["dance_index"]):
            keys = ("mean", "draw_log_prob", "given_log_prob")
            want = {k: a[f"dance_{k}_f64"][i, j] for k in keys}
            want["draw"] = a["dance_draw_prev_sample_f64"][i, j]
            want["std"] = np.full(3, a["dance_std_f64"][i, j])
            t, u = times[index], times[index + 1]
            check_step(Kernel("constant", float(level)), t, u, x, -v, noise, given_next, want)
            euler = Kernel("ode").mean(x, -v, t, u)
            torch.testing.assert_close(euler, f64(a["dance_ode_mean_f64"][i, j]))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("flow-sde", "flow_grpo"),
        ("constant", "dance_grpo"),
        ("cps", "cps"),
        ("precise", "precise"),
    ],
)
def test_precise_steps(golden, ours, theirs):
    a = golden("02_other_sde_steps")
    times, index = 1 - f64(a["precise_sigmas"]), a["precise_step_index"]
    kernel = Kernel(ours, float(a[f"precise_{theirs}_eta"]))
    x, v, noise, given_next = (
        f64(a[f"precise_{k}"]) for k in ("sample", "model_output", "noise", "given_prev_sample")
    )
    keys = ("mean", "draw_log_prob", "given_log_prob")
    want = {k: a[f"precise_{theirs}_{k}_f64"] for k in keys}
    want["draw"] = a[f"precise_{theirs}_draw_prev_sample_f64"]
    all_std = a[f"precise_{theirs}_std_all_steps_f64"]
    want["std"] = all_std[index]
    t, u = times[index], times[index + 1]
    check_step(kernel, t, u, x, -v, noise, given_next, want)
    # The reference clamps the std to 1e-6, which only the last step of cps and precise reaches: skipped there.
    last = -1 if ours in QUIET_END else None
    a_, b, std = kernel.coefficients(times[:-1], times[1:])
    np.testing.assert_allclose(std[:last], all_std[:last], rtol=1e-9)
    slopes = a[f"precise_{theirs}_abs_dmean_dv_all_steps_f64"]
    np.testing.assert_allclose(b.abs()[:last], slopes[:last], rtol=1e-9)


def test_raresense_log_prob(golden):
    """Euler mean with a given variance, summed."""
    a = golden("02_other_sde_steps")
    times = 1 - f64(a["precise_sigmas"])
    x, v, x_next = (
        f64(a[k]) for k in ("precise_sample", "precise_model_output", "raresense_given_prev_sample")
    )
    for i, variance in enumerate(a["raresense_variance"]):
        for j, index in enumerate(a["precise_step_index"]):
            mean = Kernel("ode").mean(x, -v, times[index], times[index + 1])
            ours = gaussian_log_prob(x_next, mean, f64(variance).sqrt())
            np.testing.assert_allclose(ours, a["raresense_log_prob_f64"][i, j], rtol=1e-9)


@pytest.mark.parametrize("clip", ["clip", "noclip"])
def test_reinflow_log_prob(golden, clip):
    """Euler mean with a given std per coordinate, summed over dimensions and the chain."""
    a = golden("02_other_sde_steps")
    chain, v, std = (f64(a[f"reinflow_{k}"]) for k in ("chain", "velocity", "std"))
    total, edge = torch.zeros(3, dtype=torch.float64), float(a["reinflow_clip_value"])
    for k, t in enumerate(a["reinflow_t_used_in_replay"]):
        mean = Kernel("ode").mean(chain[:, k], v[:, k], t, t + 1 / v.shape[1])
        mean = mean.clamp(-edge, edge) if clip == "clip" else mean
        total += gaussian_log_prob(chain[:, k + 1], mean, std[:, k].view_as(mean))
    np.testing.assert_allclose(total, a[f"reinflow_{clip}_nox0_log_prob"], rtol=1e-9)


# Identities between kernels


def same(one, two, t, u, **options):
    for a, b in zip(one.coefficients(t, u), two.coefficients(t, u), strict=True):
        torch.testing.assert_close(a, b, **options)


@pytest.mark.parametrize("name", ["flow-sde", "constant", "ddim", "precise", "cps"])
@given(steps)
def test_level_zero_is_euler(name, step):
    same(Kernel(name, 0.0), Kernel("ode"), *step, rtol=0, atol=1e-12)


@given(steps)
def test_ddim_at_one_is_precise_at_sqrt_two(step):
    same(Kernel("ddim", 1.0), Kernel("precise", math.sqrt(2)), *step, rtol=1e-9, atol=1e-12)


@given(steps)
def test_memoryless_is_flow_sde_at_sqrt_two(step):
    same(Kernel("memoryless"), Kernel("flow-sde", math.sqrt(2)), *step, rtol=0, atol=0)


def test_memoryless_variance_is_the_golden_sbdm_diffusion(golden):
    """``std^2 = 2 w h`` with SiT's ``w = (1 - t) / t``."""
    a = golden("09_gaussian_flow")
    t, h = f64(a["t"])[f64(a["interior_index"]).long()], 1e-3
    std = Kernel("memoryless").std(t, t + h)
    np.testing.assert_allclose(std**2 / (2 * h), a["sit_diffusion_w"][1], rtol=1e-9)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_small_steps_agree_on_the_drift(name):
    """With ``sigma^2 = std^2 / h`` every kernel's mean is ``x + h (v + sigma^2 score / 2)`` to first order."""
    t, h, x, v = 0.4, 1e-5, f64([[0.3]]), f64([[-1.2]])
    kernel = Kernel(name)
    sigma2 = float(kernel.std(t, t + h)) ** 2 / h
    if name == "cps":  # its std does not vanish with the step: no SDE stands behind it
        assert sigma2 > 1e4
        return
    drift = (kernel.mean(x, v, t, t + h) - x) / h
    score = (t * v - x) / (1 - t)
    torch.testing.assert_close(drift, v + sigma2 / 2 * score, rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", STOCHASTIC)
@given(st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1))
def test_outside_its_window_a_kernel_is_euler(name, t, one, two):
    window = min(one, two), max(one, two)
    other = Kernel(name) if window[0] <= t < window[1] else Kernel("ode")
    same(Kernel(name, window=window), other, t, 0.995, rtol=0, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_every_step_of_the_grid_is_finite(name):
    t = torch.linspace(0, 1, 17)
    a, b, std = Kernel(name).coefficients(t[:-1], t[1:])
    assert all(bool(torch.isfinite(c).all()) for c in (a, b, std))
    assert bool((std[:-1] > 0).all()) == (name != "ode")
    assert (float(std[-1]) == 0) == (name in ("ode", *QUIET_END))


@pytest.mark.parametrize("name", ["cps", "precise", "ddim"])
@pytest.mark.parametrize("level", [0.2, 1.0])
def test_ddim_form_keeps_the_size_of_the_noise(name, level):
    """What is left of x0^ and what is fresh add up to (1-u)^2; the share of x1^ is u."""
    t, u = 0.3, 0.45
    a, b, std = Kernel(name, level).coefficients(t, u)
    # mean = c1 (x + (1-t) v) + c0 (x - t v)
    c0, c1 = (1 - t) * a - b, t * a + b
    assert float(c1) == pytest.approx(u, rel=1e-12)
    assert float(c0**2 + std**2) == pytest.approx((1 - u) ** 2, rel=1e-12)


# Draws and log-probabilities


def batch(n=4, shape=(3, 2), dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, dtype=dtype, generator=rng) for _ in range(3)]


@pytest.mark.parametrize("name", STOCHASTIC)
@given(step=steps)
def test_log_prob_of_a_draw_is_scipys(name, step):
    (x, v, noise), kernel = batch(), Kernel(name)
    if float(kernel.std(*step)) < 1e-6:
        return  # z is lost in the rounding of mean + std z
    draw = kernel.sample(x, v, *step, noise=noise)
    mean, std = kernel.mean(x, v, *step), float(kernel.std(*step))
    each = stats.norm.logpdf(draw.numpy(), mean.numpy(), std).reshape(4, -1)
    total = kernel.log_prob(x, v, *step, draw)
    np.testing.assert_allclose(total, each.sum(1), rtol=1e-9)
    np.testing.assert_allclose(kernel.log_prob(x, v, *step, draw, "mean"), each.mean(1), rtol=1e-9)
    closed = stats.norm.logpdf(noise.numpy()).reshape(4, -1).sum(1) - 6 * math.log(std)
    np.testing.assert_allclose(total, closed, rtol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_times_per_row_equal_one_time_for_all(name):
    (x, v, noise), kernel = batch(), Kernel(name, window=(0.0, 0.8))
    t, u = f64([0.0, 0.2, 0.5, 0.9]), f64([0.1, 0.3, 0.9, 1.0])
    rows = kernel.sample(x, v, t, u, noise=noise)
    alone = [
        kernel.sample(x[i : i + 1], v[i : i + 1], t[i], u[i], noise=noise[i : i + 1])
        for i in range(4)
    ]
    torch.testing.assert_close(rows, torch.cat(alone), rtol=0, atol=0)
    if name != "ode":
        some = slice(0, 3)
        both = kernel.log_prob(x[some], v[some], t[some], u[some], rows[some])
        each = [
            kernel.log_prob(x[i : i + 1], v[i : i + 1], t[i], u[i], rows[i : i + 1])
            for i in range(3)
        ]
        torch.testing.assert_close(both, torch.cat(each))


def test_draws_come_from_the_generator():
    (x, v, _), kernel = batch(20_000, (1,)), Kernel("flow-sde")
    one, two, three = (
        kernel.sample(x, v, 0.5, 0.6, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)
    z = (one - kernel.mean(x, v, 0.5, 0.6)) / kernel.std(0.5, 0.6)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_prob_is_at_least_float32(dtype):
    x, v, noise = (y.to(dtype) for y in batch(dtype=torch.float32))
    kernel = Kernel("flow-sde")
    draw = kernel.sample(x, v, 0.5, 0.6, noise=noise)
    assert draw.dtype == dtype
    log_prob = kernel.log_prob(x, v, 0.5, 0.6, draw)
    assert log_prob.dtype == torch.promote_types(dtype, torch.float32)
    doubles = (y.double() for y in (x, v))
    exact = kernel.log_prob(*doubles, 0.5, 0.6, draw.double())
    loose = 0.2 if dtype in (torch.float16, torch.bfloat16) else 1e-4
    torch.testing.assert_close(log_prob.double(), exact, rtol=0, atol=loose)


def test_log_prob_carries_the_gradient_of_the_mean():
    """``d log p / d v = b (x' - mean) / std^2``."""
    (x, v, noise), kernel = batch(), Kernel("flow-sde")
    v.requires_grad_(True)
    draw = kernel.sample(x, v, 0.5, 0.6, noise=noise).detach()
    kernel.log_prob(x, v, 0.5, 0.6, draw).sum().backward()
    c = kernel.coefficients(0.5, 0.6)
    torch.testing.assert_close(v.grad, c.b * noise / c.std)


# What cannot be


@pytest.mark.parametrize("kernel", [Kernel("ode"), Kernel("cps", 0.0), Kernel(window=(0.7, 1.0))])
def test_a_deterministic_step_has_no_log_prob(kernel):
    x, v, x_next = batch()
    with pytest.raises(NoLogProbError, match="std = 0"):
        kernel.log_prob(x, v, 0.5, 0.6, x_next)


@pytest.mark.parametrize("name", QUIET_END)
def test_one_deterministic_row_is_enough_to_refuse(name):
    x, v, x_next = batch(2)
    with pytest.raises(NoLogProbError):
        Kernel(name).log_prob(x, v, f64([0.5, 0.9]), f64([0.6, 1.0]), x_next)


def test_unknown_kernel_lists_the_choices():
    with pytest.raises(UnknownNameError, match="flow-ode.*flow-sde.*ddim"):
        Kernel("flow-ode")


@pytest.mark.parametrize(
    ("name", "level"),
    [
        *[(n, -0.1) for n in ("flow-sde", "constant", "cps", "precise", "ddim")],
        *[(n, math.nan) for n in ("flow-sde", "cps")],
        ("cps", 1.01),
        ("ddim", 1.01),
        ("ode", 0.5),
        ("memoryless", 1.0),
    ],
)
def test_levels_out_of_range(name, level):
    with pytest.raises(ConfigError, match=name):
        Kernel(name, level)


@pytest.mark.parametrize("window", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_windows_out_of_range(window):
    with pytest.raises(ConfigError, match="window"):
        Kernel("flow-sde", window=window)


@pytest.mark.cuda
@pytest.mark.parametrize("name", STOCHASTIC)
def test_cuda_agrees_with_cpu(name):
    (x, v, noise), kernel = batch(dtype=torch.float32), Kernel(name)
    t, u = torch.tensor([0.0, 0.2, 0.5, 0.7]), torch.tensor([0.1, 0.3, 0.6, 0.9])
    here = kernel.sample(x, v, t, u, noise=noise)
    there = kernel.sample(x.cuda(), v.cuda(), t.cuda(), u.cuda(), noise=noise.cuda())
    torch.testing.assert_close(there.cpu(), here)
    log_prob = kernel.log_prob(x.cuda(), v.cuda(), t, u, there)
    torch.testing.assert_close(
        log_prob.cpu(), kernel.log_prob(x, v, t, u, here), rtol=1e-4, atol=1e-4
    )
