"""How well annotators agree, with each other and with themselves.

Krippendorff's alpha (Krippendorff 2004, ch. 11; the ``krippendorff`` package): 1 - observed / expected
disagreement, 1 = perfect, 0 = as by chance. A unit is one sample of one panel, its value 1 (chosen), 0 or 1/2
(tie), compared on the interval scale, since a tie lies half way; a skip is a missing value. Samples of one panel
depend on each other, so alpha's usual confidence bounds do not hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prefenv.feedback import Judgement

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Agreement:
    """What is known about a set of judgements.

    Args:
        alpha: Krippendorff's alpha between annotators' first answers; None = none can be told.
        shared: Panels that more than one annotator answered.
        repeated: Answers to panels that their annotator had answered before.
        consistent: Share of those that are the same as the first answer; None = there were none.
    """

    alpha: float | None
    shared: int
    repeated: int
    consistent: float | None


def agreement(judgements: Iterable[Judgement]) -> Agreement:
    """The agreement of judgements that stand, in the order in which they were made."""
    first: dict[str, dict[str, Scores]] = defaultdict(dict)  # panel, annotator
    alike: list[bool] = []
    for judgement in judgements:
        scores = dict(zip(judgement.samples, judgement.scores, strict=True))
        before = first[judgement.panel].setdefault(judgement.annotator, scores)
        if before is not scores:
            alike.append(before == scores)
    shared = {panel: answers for panel, answers in first.items() if len(answers) > 1}
    consistent = sum(alike) / len(alike) if alike else None
    return Agreement(alpha(shared), len(shared), len(alike), consistent)


def alpha(answers: dict[str, dict[str, Scores]]) -> float | None:
    """Krippendorff's alpha of answers by panel and annotator; None where nothing varies or nothing is shared."""
    names = sorted({annotator for panel in answers.values() for annotator in panel})
    columns = [
        [panel.get(name, {}).get(sample) for name in names]
        for panel in answers.values()
        for sample in sorted(next(iter(panel.values())))
    ]
    if not columns:
        return None
    table = np.array(columns, dtype=float).T  # (annotators, units); None becomes NaN
    pairable = table[:, (~np.isnan(table)).sum(0) > 1]
    if len(np.unique(pairable[~np.isnan(pairable)])) < 2:
        return None
    import krippendorff

    return float(krippendorff.alpha(reliability_data=pairable, level_of_measurement="interval"))
