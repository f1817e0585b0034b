"""The shapes task: scikit-learn's curves, the stated statistics of the data, and Procrustes in other ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import procrustes

from prefenv.device import make_generator, stratified_uniform
from prefenv.tasks.shapes import ROLL, S_CURVE, Shapes, procrustes_residual, template

N = 20_000


class EvenSteps(np.random.RandomState):
    """scikit-learn's parameter at equal steps instead of random ones."""

    def uniform(self, *args, size=None, **kwargs):
        n = size if np.ndim(size) == 0 else size[-1]
        return np.linspace(0, 1, n).reshape(size)


def sklearn_curve(kind, points=64):
    datasets = pytest.importorskip("sklearn.datasets")
    make = (datasets.make_swiss_roll, datasets.make_s_curve)[kind]
    return make(points, noise=0.0, random_state=EvenSteps())[0][:, [0, 2]]


@pytest.fixture(scope="module")
def data():
    """Real samples in float64, their classes and residuals to both templates."""
    task = Shapes()
    x, kind = task.data(N, make_generator(0))
    return x.double(), kind, task.residuals(x.double())


def as_complex(xy):
    return torch.view_as_complex(xy.double().contiguous())


# The curves


@pytest.mark.parametrize("kind", [ROLL, S_CURVE])
@pytest.mark.parametrize("points", [64, 100])
def test_templates_are_sklearns_standardised(kind, points):
    raw = sklearn_curve(kind, points)
    centred = raw - raw.mean(0)
    np.testing.assert_allclose(template(kind, points), centred / centred.std(), atol=1e-12)


def test_templates_lie_on_the_manifolds():
    """Roll: radius = angle mod 2 pi; S: two unit circles, free of scale: ``(x^2 + z^2) / |z|`` is constant."""
    raw = sklearn_curve(ROLL)
    roll = template(ROLL).numpy() * (raw - raw.mean(0)).std() + raw.mean(0)
    turns = (np.hypot(*roll.T) - np.arctan2(roll[:, 1], roll[:, 0])) / (2 * np.pi)
    np.testing.assert_allclose(turns, turns.round(), atol=1e-12)
    assert turns.round().min() >= 1 and turns.round().max() == 2, "one and a half turns"
    x, z = template(S_CURVE).numpy().T
    ratio = (x**2 + z**2) / np.abs(z)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)


# The data


def test_share_of_s_curves_and_variance(data):
    x, kind, _ = data
    assert int(kind.sum()) == N // 4
    # Unit template times E[size^2] of U(0.8, 1.2), and the point noise.
    assert float(x.square().mean()) == pytest.approx((1.2**3 - 0.8**3) / 1.2 + 0.03**2, rel=5e-3)
    assert x.shape == (N, 64, 2)


def test_turn_scale_and_noise_are_as_stated(data):
    """Recovered from every shape by complex regression on its own template."""
    x, kind, _ = data
    w = torch.stack([as_complex(template(k)) for k in (ROLL, S_CURVE)])[kind]
    z = as_complex(x)
    c = (w.conj() * z).sum(1) / w.abs().square().sum(1)
    rest = z - c[:, None] * w
    freedom = 2 * 64 - 2  # turn and scale are fitted; the shift is 0
    assert float(rest.abs().square().sum(1).mean() / freedom) ** 0.5 == pytest.approx(
        0.03, rel=2e-3
    )
    for values, low, high in ((c.angle(), -0.4, 0.4), (c.abs(), 0.8, 1.2)):
        distance = stats.kstest(values.numpy(), "uniform", args=(low, high - low)).statistic
        assert distance < 0.02, (distance, low, high)


def test_stratified_uniforms_fill_every_cell_once():
    u = stratified_uniform(1000, make_generator(0))
    assert torch.equal((u * 1000).floor().sort().values, torch.arange(1000.0))
    assert stats.kstest((u * 1000 % 1).numpy(), "uniform").pvalue > 1e-3, "anywhere in its cell"
    assert abs(float(torch.corrcoef(torch.stack([u, torch.arange(1000.0)]))[0, 1])) < 0.1


def test_data_repeats_with_the_seed():
    task = Shapes()
    (a, ka), (b, kb), (c, _) = (task.data(50, make_generator(s)) for s in (0, 0, 1))
    assert a.dtype == torch.float32
    assert torch.equal(a, b) and torch.equal(ka, kb) and not torch.equal(a, c)


def test_settings_change_the_data():
    clean = Shapes(noise=0.0, turn=0.0, scale=(1.0, 1.0), s_rate=1.0, points=32)
    x, kind = clean.data(5, make_generator(0))
    assert x.shape == (5, 32, 2) and bool((kind == S_CURVE).all())
    torch.testing.assert_close(x, template(S_CURVE, 32).float().expand_as(x))


def test_every_shape_is_told_apart(data):
    x, kind, residuals = data
    assert torch.equal(Shapes().classify(x), kind)
    own, other = (residuals.gather(1, k[:, None])[:, 0] for k in (kind, 1 - kind))
    assert float(own.max()) < 0.1 and float(other.min()) > 1.0, "nowhere near a tie"
    assert torch.equal(Shapes().residual(x), own)


# Procrustes


def transform(x, angle=0.0, scale=1.0, shift=(0.0, 0.0)):
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return x @ x.new_tensor([[c, s], [-s, c]]) + x.new_tensor(shift)


@pytest.mark.parametrize("kind", [ROLL, S_CURVE])
def test_residual_is_the_brute_force_least_squares(kind, data):
    """Fit shift, turn and scale with ``numpy.linalg.lstsq``; rms distance in the shape's own unit."""
    curve = template(kind).numpy()
    zero, one = np.zeros(64), np.ones(64)
    design = np.concatenate(
        [
            np.stack([curve[:, 0], -curve[:, 1], one, zero], 1),
            np.stack([curve[:, 1], curve[:, 0], zero, one], 1),
        ]
    )
    for shape, ours in zip(data[0][:20].numpy(), data[2][:20, kind], strict=True):
        target = shape.T.ravel()
        rest = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
        unit = (shape - shape.mean(0)).std()
        assert float(ours) == pytest.approx(np.sqrt(2 * (rest**2).mean()) / unit, rel=1e-9)


def test_residual_is_scipys_where_no_mirror_is_needed(data):
    """scipy may mirror, we may not: equal for a shape's own class, never smaller for the other."""
    x, kind, residuals = data
    for shape, own, ours in zip(x[:20].numpy(), kind[:20], residuals[:20], strict=True):
        for k in (ROLL, S_CURVE):
            theirs = np.sqrt(2 * procrustes(template(k).numpy(), shape)[2])
            assert float(ours[k]) >= theirs - 1e-12
            if k == own:
                assert float(ours[k]) == pytest.approx(theirs, rel=1e-9)


def test_a_mirrored_curve_is_no_fit():
    mirrored = template(S_CURVE) * torch.tensor([-1.0, 1.0])
    assert np.sqrt(2 * procrustes(template(S_CURVE).numpy(), mirrored.numpy())[2]) < 1e-6
    assert float(procrustes_residual(mirrored, template(S_CURVE))) > 0.3


@pytest.mark.parametrize(
    "move", [{"angle": 2.5}, {"scale": 1e-3}, {"scale": 40.0}, {"shift": (5.0, -7.0)}]
)
def test_residual_is_invariant_under_similarity(move, data):
    x, _, residuals = data
    moved = Shapes().residuals(transform(x[:50], **move))
    torch.testing.assert_close(moved, residuals[:50], rtol=1e-7, atol=1e-9)


def test_residual_has_its_stated_range():
    torch.testing.assert_close(
        procrustes_residual(transform(template(ROLL), 1.0, 3.0, (1, 2)), template(ROLL)),
        torch.tensor(0.0, dtype=torch.float64),
        atol=2e-6,
        rtol=0,
    )
    # A shape orthogonal to the template has nothing of it: sqrt 2.
    w = as_complex(template(ROLL))
    z = torch.randn(64, dtype=torch.complex128)
    z = z - z.mean()
    z = z - (w.conj() * z).sum() / w.abs().square().sum() * w
    away = procrustes_residual(torch.view_as_real(z), template(ROLL))
    assert float(away) == pytest.approx(2**0.5, rel=1e-12)


def test_residual_is_differentiable(data):
    x = data[0][:3].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda y: procrustes_residual(y, template(S_CURVE)), x)
    degenerate = torch.zeros(1, 64, 2, requires_grad=True)
    procrustes_residual(degenerate, template(S_CURVE)).sum().backward()
    assert bool(torch.isfinite(degenerate.grad).all()), "a collapsed shape has a finite gradient"


def test_residual_keeps_its_digits_in_float32(data):
    x, _, residuals = data
    torch.testing.assert_close(Shapes().residuals(x.float()).double(), residuals, rtol=0, atol=2e-4)


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(data):
    x = data[0][:100].float()
    torch.testing.assert_close(Shapes().residuals(x.cuda()).cpu(), Shapes().residuals(x))
