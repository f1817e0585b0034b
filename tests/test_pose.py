"""``pose``: placed templates have the scores that the formulas give; the tilt is a truncated exponential."""

from __future__ import annotations

import math

import pytest
import torch

from oracles.pose import Pose
from prefenv.errors import ConfigError
from prefenv.tasks.base import Task
from prefenv.tasks.shapes import ROLL, S_CURVE, Shapes, template

TASK = Shapes()


def placed(kind, turn, scale, shift=(0.3, -2.0)):
    """A clean curve, turned by complex multiplication, scaled and moved."""
    z = torch.view_as_complex(template(kind).contiguous())
    moved = scale * z * complex(math.cos(turn), math.sin(turn)) + complex(*shift)
    return torch.view_as_real(moved).float()


@pytest.mark.parametrize("kind", [ROLL, S_CURVE])
@pytest.mark.parametrize(("turn", "scale"), [(0.0, 1.0), (0.25, 0.9), (-0.4, 1.2), (1.5, 3.0)])
def test_pose_is_the_one_a_template_was_placed_in(kind, turn, scale):
    got = TASK.pose(placed(kind, turn, scale)[None])
    assert float(got[0]) == pytest.approx(turn, abs=1e-4)
    assert float(got[1]) == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("kind", [ROLL, S_CURVE])
def test_scores_go_from_0_to_1_over_the_data_and_no_further(kind):
    turns, sizes = [-0.8, -0.4, 0.0, 0.2, 0.4, 0.9], [0.5, 0.8, 1.0, 1.1, 1.2, 2.0]
    x = torch.stack([placed(kind, t, s) for t, s in zip(turns, sizes, strict=True)])
    want = torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0])
    for of in ("turn", "size"):
        torch.testing.assert_close(Pose(TASK, of=of).score(x), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("of", ["turn", "size"])
def test_scores_of_data_are_uniform_in_both_classes(of):
    x, kind = TASK.data(4000, torch.Generator().manual_seed(0))
    score = Pose(TASK, of=of).score(x)
    for k in (ROLL, S_CURVE):
        mine = score[kind == k].sort().values
        ideal = (torch.arange(len(mine)) + 0.5) / len(mine)
        assert float((mine - ideal).abs().max()) < 1.63 / math.sqrt(len(mine)), "Kolmogorov, 1 %"


def test_tilt_of_the_data_is_a_truncated_exponential():
    beta = 0.1
    x, kind = TASK.data(20000, torch.Generator().manual_seed(1))
    score = Pose(TASK).score(x).double()
    weight = (score / beta).softmax(0)
    mean = 1 / (1 - math.exp(-1 / beta)) - beta
    assert float((weight * score).sum()) == pytest.approx(mean, abs=0.01)
    assert float((weight * kind).sum()) == pytest.approx(0.25, abs=0.03), "classes stay as they are"


@pytest.mark.parametrize("of", ["turn", "size"])
def test_gradient_is_that_of_finite_differences(of):
    x = placed(S_CURVE, 0.1, 1.05).double()[None].requires_grad_(True)
    oracle = Pose(TASK, of=of)
    (grad,) = torch.autograd.grad(oracle.score(x).sum(), x)
    step = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ahead, behind = oracle.score(x + 1e-5 * step), oracle.score(x - 1e-5 * step)
    assert float((grad * step).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-4)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="turn or size, not 'colour'"):
        Pose(TASK, of="colour")
    with pytest.raises(ConfigError, match="judges the shapes task"):
        Pose(Task(name="other", default_oracle=""))
