"""Agreement between annotators and with themselves, against published numbers and pair counts."""

from __future__ import annotations

import itertools

import pytest

from oracles.web.agreement import agreement, alpha
from prefenv.feedback import Judgement

pytest.importorskip("krippendorff")

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: observers A to D, units 1 to 12;
# interval data: alpha = 0.849.
TABLE = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
}


def test_alpha_of_the_published_example():
    answers = {str(i): {who: {"x": row[i]} for who, row in TABLE.items()} for i in range(12)}
    assert alpha(answers) == pytest.approx(0.849, abs=5e-4)


def test_alpha_counted_by_hand():
    panels = {"p": {"ann": [1, 0], "bob": [1, 0]}, "q": {"ann": [1, 0], "bob": [0.5, 0.5]},
              "r": {"ann": [0, 1], "bob": [1, 0]}, "s": {"ann": [None, None], "bob": [1, 0]}}  # fmt: skip
    answers = {
        p: {w: dict(zip("xy", v, strict=True)) for w, v in a.items()} for p, a in panels.items()
    }
    units = [(a["ann"][i], a["bob"][i]) for p, a in panels.items() if p != "s" for i in range(2)]
    observed = sum((a - b) ** 2 for a, b in units) / len(units)
    values = [v for unit in units for v in unit]
    pairs = [(a - b) ** 2 for a, b in itertools.permutations(values, 2)]
    assert alpha(answers) == pytest.approx(1 - observed / (sum(pairs) / len(pairs)))


def test_agreement_takes_first_answers_and_counts_repeats():
    def said(panel, who, *scores, turned=False):
        names = (f"{panel}x", f"{panel}y")
        step = -1 if turned else 1
        return Judgement(names[::step], scores[::step], who)

    told = [
        said("p", "ann", 1, 0),
        said("q", "ann", 0, 1),
        said("p", "bob", 1, 0, turned=True),
        said("q", "bob", 0, 1),
    ]
    first = agreement(told)
    assert (first.alpha, first.shared, first.repeated, first.consistent) == (1.0, 2, 0, None)
    again = [said("p", "ann", 1, 0, turned=True), said("q", "ann", 1, 0), said("q", "bob", 0, 1)]
    later = agreement([*told, *again])
    assert (later.alpha, later.shared, later.repeated) == (1.0, 2, 3)
    assert later.consistent == pytest.approx(2 / 3)
    assert agreement([]).alpha is None and agreement([said("p", "ann", 1, 0)]).alpha is None
    assert agreement([said("p", w, 1, 1) for w in ("ann", "bob")]).alpha is None, "nothing varies"
