"""Oracles, the desk in front of them, and the ledger."""

from __future__ import annotations

import math

import pytest
import torch

from oracles.s_curve import SCurve
from prefenv.device import make_generator
from prefenv.errors import BudgetSpentError, ConfigError, NotDifferentiableError
from prefenv.oracle import Desk, Ledger, Oracle
from prefenv.tasks.base import Task
from prefenv.tasks.shapes import S_CURVE, Shapes, template

TASK = Shapes()


@pytest.fixture(scope="module")
def data():
    """20,000 real shapes and their classes."""
    return TASK.data(20_000, make_generator(1))


class Fixed(Oracle):
    """Answers what it was given."""

    def __init__(self, answer, panel_size=None):
        super().__init__(TASK)
        self.answer, self.panel_size, self.seen = answer, panel_size, []

    def judge(self, panels):
        self.seen.append(panels)
        return self.answer(panels) if callable(self.answer) else self.answer


# The scripted S-curve oracle


def test_scores_lie_in_the_unit_interval(data):
    oracle, junk = SCurve(TASK), torch.randn(200, 64, 2)
    for samples in (data[0], junk, 1e4 * junk, 1e-4 * junk, torch.zeros(2, 64, 2)):
        score = oracle.score(samples)
        assert score.shape == (len(samples),)
        assert float(score.min()) >= 0 and float(score.max()) <= 1


def test_threshold_accepts_every_clean_s_curve_and_no_roll(data):
    x, kind = data
    accepted = SCurve(TASK, "choose").judge(x[:, None])[:, 0]
    assert torch.equal(accepted, (kind == S_CURVE).float())


def test_numbers_of_the_docstring_hold(data):
    x, kind = data
    oracle, s = SCurve(TASK), kind == S_CURVE
    score, d_s = oracle.score(x), TASK.residuals(x)[:, S_CURVE]
    assert float(d_s[s].median()) == pytest.approx(0.042, abs=5e-4)
    assert float(score[s].mean()) == pytest.approx(0.92, abs=0.01)
    assert float(score[~s].max()) < 0.01
    assert oracle.threshold == 0.5 and oracle.width / 0.042 == pytest.approx(3.5, abs=0.1)


@pytest.mark.parametrize("width", [0.15, 0.4])
def test_acceptance_ends_where_the_residual_reaches_the_width(width):
    """Rougher and rougher S curves: the score falls steadily, through 1/2 at ``d_S = width``."""
    oracle = SCurve(TASK, width=width)
    direction = torch.randn(64, 2, dtype=torch.float64)
    rough = template(S_CURVE) + torch.linspace(0, 0.5, 500)[:, None, None] * direction
    score, d_s = oracle.score(rough), TASK.residuals(rough)[:, S_CURVE]
    assert bool((score.diff() < 0).all())
    crossing = float(d_s[score >= 0.5].max())
    assert 0.9 * width < crossing <= width


def test_answer_modes():
    """One panel of four: two S curves, the second rougher; a roll; noise."""
    kind = torch.tensor([1, 1, 0, 0])
    x = torch.stack([template(int(k)) for k in kind]).float()
    x[1] += 0.05 * torch.randn(64, 2)
    x[3] = torch.randn(64, 2)
    panel = x[None]
    score = SCurve(TASK, "score").judge(panel)
    assert torch.equal(score[0], SCurve(TASK).score(x)) and score[0].argmax() == 0
    assert SCurve(TASK, "choose").judge(panel).tolist() == [[1, 1, 0, 0]]
    assert SCurve(TASK, "best").judge(panel).tolist() == [[1, 0, 0, 0]]
    pairs = x[[1, 0, 2, 3, 0, 0]].view(3, 2, 64, 2)
    better = (SCurve(TASK).score(pairs[1]).argmax() == torch.arange(2)).float().tolist()
    assert SCurve(TASK, "best").judge(pairs).tolist() == [[0, 1], better, [1, 1]], "ties are shared"


@pytest.mark.parametrize("answer", ["score", "choose", "best"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_panels_of_any_size_are_judged_one_by_one(answer, size, data):
    oracle, panels = SCurve(TASK, answer), data[0][: 6 * size].view(6, size, 64, 2)
    together = oracle.judge(panels)
    assert together.shape == (6, size)
    alone = torch.cat([oracle.judge(p[None]) for p in panels])
    torch.testing.assert_close(together, alone)
    if answer == "best":
        assert bool((together.amax(1) == 1).all())


def test_gradient_of_the_score(data):
    x = data[0][:6].double().requires_grad_(True)
    assert torch.autograd.gradcheck(SCurve(TASK, width=1.0).score, x)


def test_only_scores_are_differentiable():
    flags = [SCurve(TASK, a).differentiable for a in ("score", "choose", "best")]
    assert flags == [True, False, False]


def test_wrong_settings():
    with pytest.raises(ConfigError, match="score, choose, best"):
        SCurve(TASK, "rank")
    with pytest.raises(ConfigError, match="positive"):
        SCurve(TASK, width=0.0)
    with pytest.raises(ConfigError, match="shapes task, not 'other'"):
        SCurve(Task("other", "s-curve"))


# The ledger


def test_ledger_counts():
    ledger = Ledger(max_queries=10)
    ledger.charge(2, 8)
    assert ledger.left == 2 and Ledger().left == math.inf
    assert ledger.counts() == {
        "panels": 2, "queries": 8, "gradients": 0, "nfe": 0, "seconds": 0.0
    }  # fmt: skip
    ledger.charge(1, 2)
    assert ledger.left == 0, "a budget can be spent to the last sample"


def test_seconds_do_not_make_ledgers_differ():
    assert Ledger(seconds=1.0) == Ledger(seconds=2.0) != Ledger(queries=1)


def test_a_spent_budget_books_nothing_and_asks_nothing():
    oracle, ledger = Fixed(lambda p: torch.zeros(p.shape[:2])), Ledger(max_queries=5)
    desk = Desk(oracle, ledger)
    desk.judge(torch.zeros(1, 4, 64, 2))
    for ask in (lambda: desk.judge(torch.zeros(1, 2, 64, 2)), lambda: ledger.charge(1, 2)):
        with pytest.raises(BudgetSpentError, match=r"budget of 5.*4 were judged.*2 more"):
            ask()
    assert (ledger.panels, ledger.queries, ledger.left, len(oracle.seen)) == (1, 4, 1, 1)
    desk.judge(torch.zeros(1, 1, 64, 2))
    assert ledger.left == 0


@pytest.mark.parametrize("budget", [0, -3])
def test_an_empty_budget_is_refused(budget):
    with pytest.raises(ConfigError, match="at least 1"):
        Ledger(max_queries=budget)


# The desk


def test_desk_books_and_hands_on():
    answer = torch.tensor([[1.0, math.nan], [0.25, 0.5]], dtype=torch.float64)
    ledger, panels = Ledger(), torch.randn(2, 2, 64, 2)
    judgement = Desk(Fixed(answer), ledger).judge(panels)
    assert judgement.dtype == torch.float32
    torch.testing.assert_close(judgement, answer.float(), equal_nan=True)
    assert (ledger.panels, ledger.queries, ledger.gradients) == (2, 4, 0)


def test_desk_takes_numbers_that_are_no_tensor():
    assert Desk(Fixed([[1, 0]]), Ledger()).judge(torch.zeros(1, 2, 64, 2)).tolist() == [[1, 0]]


@pytest.mark.parametrize("answer", [torch.zeros(3), torch.zeros(3, 1), torch.zeros(2, 3)])
def test_desk_refuses_an_answer_of_another_shape(answer):
    with pytest.raises(ConfigError, match=r"expected \(3, 2\)"):
        Desk(Fixed(answer), Ledger()).judge(torch.zeros(3, 2, 64, 2))


def test_desk_refuses_panels_its_oracle_cannot_judge():
    ledger, oracle = Ledger(), Fixed(lambda p: torch.zeros(p.shape[:2]), panel_size=2)
    with pytest.raises(ConfigError, match="panels of 2, not of 3"):
        Desk(oracle, ledger).judge(torch.zeros(1, 3, 64, 2))
    assert ledger.queries == 0 and not oracle.seen
    Desk(oracle, ledger).judge(torch.zeros(1, 2, 64, 2))


def test_desk_gives_no_way_back_to_the_graph():
    samples = torch.randn(2, 1, 64, 2, requires_grad=True)
    assert not Desk(SCurve(TASK), Ledger()).judge(samples).requires_grad


def test_desk_gradient_is_the_finite_difference_and_is_booked(data):
    ledger, oracle, x = Ledger(), SCurve(TASK), data[0][:5].double()
    x[4] = torch.randn(64, 2)
    reward, gradient = Desk(oracle, ledger).gradient(x)
    torch.testing.assert_close(reward, oracle.score(x))
    for _ in range(3):
        direction, h = torch.randn_like(x), 1e-6
        slope = (oracle.score(x + h * direction) - oracle.score(x - h * direction)) / (2 * h)
        along = (gradient * direction).sum((1, 2))
        torch.testing.assert_close(along, slope, rtol=1e-4, atol=1e-9)
    assert (ledger.panels, ledger.queries, ledger.gradients) == (5, 5, 5)
    assert not reward.requires_grad and not gradient.requires_grad


def test_desk_gradient_works_without_grad_mode(data):
    with torch.no_grad():
        _, gradient = Desk(SCurve(TASK), Ledger()).gradient(data[0][:2])
    assert bool(gradient.any())


@pytest.mark.parametrize("answer", ["choose", "best"])
def test_no_gradient_of_a_choice(answer):
    ledger = Ledger()
    with pytest.raises(NotDifferentiableError):
        Desk(SCurve(TASK, answer), ledger).gradient(torch.randn(2, 64, 2))
    assert ledger == Ledger(), "nothing is booked"


def test_no_gradient_of_a_pair():
    """Gradients are asked of samples one by one, which an oracle of pairs cannot answer."""
    oracle, ledger = Fixed(lambda p: p.square().flatten(2).sum(2), panel_size=2), Ledger()
    oracle.differentiable = True
    with pytest.raises(ConfigError, match="panels of 2, not of 1"):
        Desk(oracle, ledger).gradient(torch.randn(4, 64, 2))
    assert ledger == Ledger() and not oracle.seen


def test_gradients_are_paid_from_the_budget():
    ledger = Ledger(max_queries=3)
    with pytest.raises(BudgetSpentError):
        Desk(SCurve(TASK), ledger).gradient(torch.randn(4, 64, 2))
    assert ledger.counts()["gradients"] == 0


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(data):
    x = data[0][:64].view(16, 4, 64, 2)
    for answer in ("score", "choose", "best"):
        there = Desk(SCurve(TASK, answer), Ledger()).judge(x.cuda())
        assert there.is_cuda
        here = Desk(SCurve(TASK, answer), Ledger()).judge(x)
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)
    oracle = Fixed(lambda p: torch.zeros(p.shape[:2]))  # answers on the CPU, as a person does
    assert Desk(oracle, Ledger()).judge(x.cuda()).is_cuda
