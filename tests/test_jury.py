"""The jury: D3PO's Pareto comparison for pairs, every dominance kept in panels, the mean and its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles.jury import Jury, dominance, pareto_scores
from oracles.s_curve import SCurve
from oracles.teacher import Teacher
from prefenv.errors import ConfigError
from prefenv.oracle import Desk, Ledger, Oracle, ScriptedOracle
from prefenv.registry import make_oracle
from prefenv.tasks.shapes import Shapes
from prefenv.testing import check_oracle

TASK = Shapes()


class Column(ScriptedOracle):
    """Coordinate ``i`` of a sample is its value."""

    def __init__(self, task, i=0, threshold=0.5):
        super().__init__(task)
        self.i, self.threshold = i, threshold

    def score(self, samples):
        return samples[:, self.i]


class Wide(ScriptedOracle):
    """Prefers wide shapes."""

    def score(self, samples):
        return samples[..., 0].std(1).clamp(0, 2) / 2


def d3po_compare(a, b):
    """Dominance of vectors, written out: 1 = a, -1 = b, 0 = neither."""
    if all(x >= y for x, y in zip(a, b, strict=True)) and any(
        x > y for x, y in zip(a, b, strict=True)
    ):
        return 1
    if all(x <= y for x, y in zip(a, b, strict=True)) and any(
        x < y for x, y in zip(a, b, strict=True)
    ):
        return -1
    return 0


vectors = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3)


@given(vectors, vectors)
def test_pairs_are_compared_as_d3po_does(a, b):
    values = torch.tensor([[a, b]])
    first = d3po_compare(a, b)
    assert dominance(values)[0].tolist() == [[False, first == 1], [first == -1, False]]
    score = pareto_scores(values)[0].tolist()
    assert score == {1: [1, 0], -1: [0, 1], 0: [0.5, 0.5]}[d3po_compare(a, b)]


@given(st.lists(vectors, min_size=2, max_size=6))
def test_panels_keep_every_dominance(values):
    score = pareto_scores(torch.tensor([values]))[0].tolist()
    assert all(0 <= s <= 1 for s in score)
    assert sum(score) == pytest.approx(len(values) / 2), "what one wins, another loses"
    for i, j in itertools.permutations(range(len(values)), 2):
        if d3po_compare(values[i], values[j]) == 1:
            assert score[i] > score[j]


def test_one_member_is_a_ranking():
    values = torch.tensor([[0.3, 0.9, 0.1, 0.9]])
    expected = torch.tensor([[1 / 3, 5 / 6, 0, 5 / 6]])
    torch.testing.assert_close(pareto_scores(values[..., None]), expected)
    assert dominance(values[..., None])[0, 1].tolist() == [True, False, True, False]


def test_ratings_are_unanimous():
    jury = Jury(TASK, [Column(TASK, 0, 0.5), Column(TASK, 1, 0.2)])
    panels = torch.tensor([[0.6, 0.3], [0.6, 0.1], [0.4, 0.3], [0.5, 0.2]])[:, None]
    assert jury.judge(panels)[:, 0].tolist() == [1, 0, 0, 1] and jury.threshold == 0.5


class Shy(Oracle):
    def judge(self, panels):
        return panels[..., 1].masked_fill(panels[..., 1] < 0, torch.nan)


@pytest.mark.parametrize("combine", ["pareto", "mean"])
def test_a_silent_member_silences_its_sample(combine):
    jury = Jury(TASK, [Column(TASK), Shy(TASK)], combine)
    told = jury.judge(torch.tensor([[[1.0, 1.0], [0.0, -1.0], [0.5, 0.5]]]))[0]
    assert told.isnan().tolist() == [False, True, False] and told[0] > told[2]
    assert bool(jury.judge(torch.tensor([[[1.0, -1.0]]])).isnan().all())


def test_the_mean_and_its_gradient():
    members = [SCurve(TASK), Wide(TASK)]
    jury = Jury(TASK, members, "mean", (3, 1))
    x, _ = TASK.data(6, torch.Generator().manual_seed(0))
    reward, gradient = Desk(jury, Ledger()).gradient(x)
    torch.testing.assert_close(reward, 0.75 * members[0].score(x) + 0.25 * members[1].score(x))
    parts = [Desk(m, Ledger()).gradient(x)[1] for m in members]
    torch.testing.assert_close(gradient, 0.75 * parts[0] + 0.25 * parts[1])
    assert not Jury(TASK, members).differentiable and jury.threshold == 0.5
    assert Jury(TASK, [Column(TASK, 0, 0.2), SCurve(TASK)], "mean").threshold == pytest.approx(0.35)
    assert not Jury(TASK, [SCurve(TASK, "best"), Wide(TASK)], "mean").differentiable


def test_what_members_need_the_jury_needs():
    teacher = Teacher(SCurve(TASK), beta=1.0)
    jury = Jury(TASK, [teacher, Wide(TASK)])
    assert jury.nondeterministic and jury.generators == teacher.generators
    pairs = Shy(TASK)
    pairs.panel_size = 2
    assert Jury(TASK, [pairs, Wide(TASK)]).panel_size == 2
    threes = Shy(TASK)
    threes.panel_size = 3
    for settings, message in (
        ({"members": [pairs, threes]}, "different sizes"),
        ({}, "has members"),
        ({"members": "s-curve", "combine": "max"}, "pareto or mean"),
        ({"members": "s-curve", "weights": (1, 2)}, "1 weights"),
        ({"members": "s-curve", "weights": (-1,)}, "1 weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            Jury(TASK, **settings)


def test_by_name():
    jury = make_oracle("jury:members=s-curve+s-curve,combine=mean", TASK)
    x, _ = TASK.data(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(jury.judge(x[None]), SCurve(TASK).judge(x[None]))


@pytest.mark.parametrize("combine", ["pareto", "mean"])
def test_it_is_an_oracle(combine):
    samples, _ = TASK.data(24, torch.Generator().manual_seed(0))
    check_oracle(Jury(TASK, [SCurve(TASK), Wide(TASK)], combine), samples, low=0, high=1)


@pytest.mark.cuda
def test_cuda_agrees_with_cpu():
    x = TASK.data(24, torch.Generator().manual_seed(0))[0].unflatten(0, (-1, 4))
    for combine in ("pareto", "mean"):
        jury = Jury(TASK, [SCurve(TASK), Wide(TASK)], combine)
        there = jury.judge(x.cuda())
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), jury.judge(x), rtol=1e-4, atol=1e-5)


def test_members_see_how_far_the_agent_is():
    """So does the oracle behind a teacher."""

    class Seen(Jury):
        def publish(self, agent, metrics):
            told.append((agent, metrics))

    told = []
    inner = Seen(TASK, ["s-curve"])
    Jury(TASK, [Teacher(inner), "s-curve"]).publish("agent", {"loss": 1.0})
    assert told == [("agent", {"loss": 1.0})]
