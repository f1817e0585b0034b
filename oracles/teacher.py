"""An imperfect teacher: an oracle's values, told with doubt, mistakes, skips and ties (B-Pref).

For a panel of K samples with values ``S`` and the values' scale ``margin``:

    skip    no answer unless  max S > skip margin             (only where skip > 0)
    equal   all equal (1/2)   where  max S - min S < equal margin
    choice  P(i) = softmax(beta S)_i                          (beta = None: the best; equal best evenly, the limit)
    mistake with probability ``mistake`` another one than was meant, each of the other K - 1 alike

The chosen one gets 1, the rest 0. **With K = 2 this is exactly B-Pref**: ``P(2) = sigmoid(beta (S_2 - S_1))``,
and a mistake flips the pair. A **rating** (a panel of one, or ``answer="choose"``: each sample by itself) is a
pair with an imagined sample worth the oracle's ``threshold``: 1 = accepted with probability
``sigmoid(beta (S - threshold))``, a mistake flips accepted and rejected, and 1/2 is "cannot say".

Lee et al. 2021 (B-Pref, arXiv 2111.03026). Its myopia weighs the steps of a path, and a finished sample has one.
Defects of the public code (rll-research/BPref): after the first session it multiplies the thresholds by skip and
equal twice, so that 0.1 acts as 0.01 (here once); of two equal values it always prefers the first (here evenly).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prefenv.device import make_generator
from prefenv.errors import ConfigError
from prefenv.oracle import Oracle, judged, scored


def skipped(values: Tensor, threshold: float) -> Tensor:
    """Panels ``(m, K)`` that are not answered, ``(m,)`` bool: nothing in them is above ``threshold > 0``."""
    worth = values.amax(1)
    return worth <= threshold if threshold > 0 else torch.zeros_like(worth, dtype=torch.bool)


def tied(values: Tensor, threshold: float) -> Tensor:
    """Panels ``(m, K)`` whose values all lie closer than ``threshold``, ``(m,)`` bool."""
    return values.amax(1) - values.amin(1) < threshold


def choice_probabilities(values: Tensor, beta: float | None, mistake: float) -> Tensor:
    """The probability that each sample of panels ``(m, K)``, K >= 2, is the one chosen, ``(m, K)`` float64."""
    values = values.double()
    if beta is None:
        meant = (values == values.amax(1, keepdim=True)).double()
        meant = meant / meant.sum(1, keepdim=True)
    else:
        meant = (beta * values).softmax(1)
    return (1 - mistake) * meant + mistake * (1 - meant) / (values.shape[1] - 1)


class Teacher(Oracle):
    """An oracle whose answers are imperfect. Evaluation uses the oracle itself.

    Args:
        oracle: Whose values are told: its ``score`` where it has one, else its judgements.
        beta: Certainty of a choice, in units of 1 / value; 0 = a coin, None = certain.
        mistake: Probability of a wrong answer, in [0, 1].
        skip: Panels whose best is worth at most ``skip margin`` are not answered; 0 = all are.
        equal: Panels whose values differ by less than ``equal margin`` are ties; 0 = none.
        margin: Scale of the values (B-Pref: the mean return); 1 suits scores in [0, 1].
        answer: ``best`` = one of each panel is chosen; ``choose`` = each sample is accepted or rejected.
        seed: Seed of its doubts and mistakes.

    Raises:
        ConfigError: A setting out of range.
    """

    nondeterministic = True

    def __init__(
        self,
        oracle: Oracle,
        beta: float | None = None,
        mistake: float = 0.0,
        skip: float = 0.0,
        equal: float = 0.0,
        margin: float = 1.0,
        answer: Literal["best", "choose"] = "best",
        seed: int = 0,
    ):
        super().__init__(oracle.task)
        settings = {"beta": beta, "mistake": mistake, "skip": skip, "equal": equal}
        for name, value in {**settings, "margin": margin}.items():
            number = isinstance(value, int | float) and 0 <= value < float("inf")
            if not (number or (name == "beta" and value is None)):
                raise ConfigError(f"teacher: {name} must be finite and at least 0, not {value!r}")
        if mistake > 1:
            raise ConfigError(f"teacher: mistake is a probability, not {mistake}")
        if answer not in ("best", "choose"):
            raise ConfigError(f"teacher: answer must be best or choose, not {answer!r}")
        self.oracle, self.panel_size = oracle, oracle.panel_size
        self.conditional, self.unconditional = oracle.conditional, oracle.unconditional
        self.beta, self.mistake, self.answer = beta, mistake, answer
        self.skip, self.equal = margin * skip, margin * equal
        self.generators = (make_generator(seed, stream="teacher"),)

    def publish(self, agent: Any, metrics: dict[str, float]) -> None:
        self.oracle.publish(agent, metrics)

    def judge(self, panels: Tensor, condition: Tensor | None = None) -> Tensor:
        values = self._values(panels, condition)
        if self.answer == "choose" or panels.shape[1] == 1:
            told = self._rate(values.flatten()).view_as(values)
        else:
            told = self._choose(values, skipped(values, self.skip))
        return told.to(panels.device)

    def _values(self, panels: Tensor, condition: Tensor | None) -> Tensor:
        if hasattr(self.oracle, "score"):
            each = None if condition is None else condition.repeat_interleave(panels.shape[1], 0)
            values = scored(self.oracle, panels.flatten(0, 1), each)
        else:
            values = judged(self.oracle, panels, condition)
        return values.reshape(panels.shape[:2]).detach().cpu()

    def _rate(self, values: Tensor) -> Tensor:
        """Values ``(n,)`` as acceptances: choices between each and one worth the threshold."""
        imagined = torch.full_like(values, self.oracle.threshold)
        silent = skipped(values[:, None], self.skip)
        return self._choose(torch.stack([values, imagined], 1), silent)[:, 0]

    def _choose(self, values: Tensor, silent: Tensor) -> Tensor:
        unknown = values.isnan().any(1)
        p = choice_probabilities(values.masked_fill(unknown[:, None], 0.0), self.beta, self.mistake)
        chosen = torch.multinomial(p, 1, generator=self.generators[0])
        told = torch.zeros(values.shape).scatter_(1, chosen, 1.0)
        told[tied(values, self.equal)] = 0.5
        told[silent | unknown] = torch.nan
        return told
