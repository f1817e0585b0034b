"""Oracles judge panels; the ledger counts what they were asked.

A **panel** is K finished samples shown together: one question. A **judgement** is one number per sample,
NaN where there was no answer: a rating, 1 for the chosen and 0 for the rest, equal numbers for a tie.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from prefenv.errors import BudgetSpentError, ConfigError, NonFiniteError, NotDifferentiableError
from prefenv.tasks import Task

Answer = Literal["score", "choose", "best", "extremes"]


class Oracle:
    """Base of all oracles; a subclass writes ``judge``.

    Attributes:
        panel_size: The only panel size it can judge; None = any.
        differentiable: Whether judgements carry gradients to the samples.
        conditional: Whether ``judge`` and ``score`` are told the condition too.
        unconditional: Whether it cannot judge where there are conditions, since it would not see them.
        nondeterministic: Whether the same panel may be judged differently twice.
        threshold: A judgement of at least this is an acceptance.
        generators: Sources of its randomness; agents save them, so that a run goes on exactly.
    """

    panel_size: int | None = None
    differentiable: bool = False
    conditional: bool = False
    unconditional: bool = False
    nondeterministic: bool = False
    threshold: float = 0.5
    generators: tuple[torch.Generator, ...] = ()

    def __init__(self, task: Task):
        self.task = task

    def judge(self, panels: Tensor) -> Tensor:
        """Judge panels ``(m, K, *event_shape)``; returns ``(m, K)``, NaN = no answer.

        A conditional oracle's is ``judge(panels, condition)``, the condition of each panel ``(m, ...)``.
        """
        raise NotImplementedError

    def publish(self, agent: Any, metrics: dict[str, float]) -> None:
        """Show those who answer how far an agent is; a run calls it at its start and after every round."""


def judged(oracle: Oracle, panels: Tensor, condition: Tensor | None = None) -> Tensor:
    """What an oracle, conditional or not, says of panels ``(m, K, *event_shape)`` of conditions ``(m, ...)``."""
    judge: Any = oracle.judge
    return judge(panels, condition) if oracle.conditional else judge(panels)


def scored(oracle: Any, samples: Tensor, condition: Tensor | None = None) -> Tensor:
    """The true values ``(n,)`` of samples ``(n, *event_shape)`` of conditions ``(n, ...)``."""
    return oracle.score(samples, condition) if oracle.conditional else oracle.score(samples)


class ScriptedOracle(Oracle):
    """An oracle whose true value is a function, which evaluation may read and agents may not.

    Args:
        task: The task whose samples it judges.
        answer: How it tells what it thinks: ``score`` = the value itself (a rating per sample); ``choose`` = 1
            for every sample at or above the threshold, 0 for the rest; ``best`` = 1 for the best of the panel
            (a pair is a panel of 2), equal best samples share it; ``extremes`` = PFM's pairs, 1 for the best and
            0 for the worst of the panel, no answer to the others.
    """

    differentiable = True

    def __init__(self, task: Task, answer: Answer = "score"):
        super().__init__(task)
        if answer not in tuple(_ANSWERS):
            raise ConfigError(f"answer must be one of {', '.join(_ANSWERS)}, not {answer!r}")
        self.answer = answer
        self.differentiable = answer == "score"

    def score(self, samples: Tensor) -> Tensor:
        """The true value of each sample ``(n, *event_shape)``, ``(n,)``. For evaluation, not for agents.

        A conditional oracle's is ``score(samples, condition)``, the condition of each sample ``(n, ...)``.
        """
        raise NotImplementedError

    def judge(self, panels: Tensor, condition: Tensor | None = None) -> Tensor:
        each = None if condition is None else condition.repeat_interleave(panels.shape[1], 0)
        scores = scored(self, panels.flatten(0, 1), each).view(panels.shape[:2])
        return _ANSWERS[self.answer](scores, self.threshold)


def _extremes(scores: Tensor) -> Tensor:
    """1 for the largest and 0 for the least of each row, NaN for the others; the first of equals."""
    told = torch.full_like(scores, torch.nan)
    told.scatter_(1, scores.argmin(1, keepdim=True), 0.0)
    return told.scatter_(1, scores.argmax(1, keepdim=True), 1.0)


_ANSWERS = {
    "score": lambda s, threshold: s,
    "choose": lambda s, threshold: (s >= threshold).to(s.dtype),
    "best": lambda s, threshold: (s == s.amax(1, keepdim=True)).to(s.dtype),
    "extremes": lambda s, threshold: _extremes(s),
}


@dataclass
class Ledger:
    """What an agent has spent. One *query* is one judged sample; one *panel* is one question.

    Args:
        max_queries: Budget of judged samples; None = no limit.
        panels: Questions put to the oracle.
        queries: Samples judged.
        gradients: Samples whose reward gradient was asked.
        nfe: Network evaluations, one per sample and step.
        seconds: Seconds spent learning.
    """

    max_queries: int | None = None
    panels: int = 0
    queries: int = 0
    gradients: int = 0
    nfe: int = 0
    seconds: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if self.max_queries is not None and self.max_queries < 1:
            raise ConfigError(
                f"a budget of {self.max_queries} queries asks nothing; give at least 1"
            )

    @property
    def left(self) -> float:
        """Samples that may still be judged."""
        return float("inf") if self.max_queries is None else self.max_queries - self.queries

    def afford(self, queries: int) -> None:
        """Make sure that so many more samples may be judged.

        Raises:
            BudgetSpentError: They would exceed the budget.
        """
        if queries > self.left:
            raise BudgetSpentError(
                f"the budget of {self.max_queries} judged samples is spent: {self.queries} were judged, and "
                f"{queries} more were asked; raise max_queries or stop earlier"
            )

    def charge(self, panels: int, queries: int) -> None:
        """Book answered questions.

        Raises:
            BudgetSpentError: They exceed the budget; nothing is booked.
        """
        self.afford(queries)
        self.panels += panels
        self.queries += queries

    def counts(self) -> dict[str, float]:
        """The counters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "max_queries"}


class Desk:
    """The only door to the oracle: every question passes it and is booked in the ledger.

    Args:
        oracle: Who answers.
        ledger: Where it is booked.
    """

    def __init__(self, oracle: Oracle, ledger: Ledger):
        self._oracle = oracle
        self.ledger = ledger
        self.threshold = oracle.threshold
        self.differentiable = oracle.differentiable
        self.nondeterministic = oracle.nondeterministic
        self.generators = oracle.generators

    def _fits(self, k: int) -> None:
        if self._oracle.panel_size not in (None, k):
            raise ConfigError(f"this oracle judges panels of {self._oracle.panel_size}, not of {k}")

    def publish(self, agent: Any, metrics: dict[str, float]) -> None:
        """See ``Oracle.publish``; nothing is asked, and nothing booked."""
        self._oracle.publish(agent, metrics)

    @torch.no_grad()
    def judge(self, panels: Tensor, condition: Tensor | None = None) -> Tensor:
        """Ask about panels ``(m, K, *event_shape)``, of conditions ``(m, ...)`` where the task has some.

        Returns:
            Judgements float32 ``(m, K)``, NaN = no answer.

        Raises:
            BudgetSpentError: The budget does not cover them; they are not asked.
            ConfigError: The oracle cannot judge panels of this size, or answered in another shape.
            NonFiniteError: It answered infinity.
        """
        m, k = panels.shape[:2]
        self._fits(k)
        self.ledger.afford(m * k)
        answer = torch.as_tensor(judged(self._oracle, panels, condition), dtype=torch.float32)
        if answer.shape != (m, k):
            raise ConfigError(f"the oracle answered {tuple(answer.shape)}, expected {(m, k)}")
        if bool(answer.isinf().any()):
            raise NonFiniteError(
                "the oracle answered infinity; judgements are finite, or NaN for none"
            )
        self.ledger.charge(m, m * k)
        return answer.to(panels.device)

    def gradient(self, samples: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Judgements ``(n,)`` and their gradient ``(n, *event_shape)``, samples judged one by one.

        Where there is no answer (NaN), or an answer that does not depend on the sample, the gradient is 0.

        Raises:
            NotDifferentiableError: The oracle has no gradient.
            BudgetSpentError: The budget does not cover them; they are not asked.
            NonFiniteError: It answered infinity, or an infinite gradient.
        """
        self._fits(1)
        if not self.differentiable:
            raise NotDifferentiableError("this oracle gives no reward gradient")
        self.ledger.afford(len(samples))
        with torch.enable_grad():
            x = samples.detach().requires_grad_(True)
            reward = judged(self._oracle, x[:, None], condition)[:, 0]
            (grad,) = (
                torch.autograd.grad(reward.sum(), x)
                if reward.requires_grad
                else (torch.zeros_like(x),)
            )
        silent = reward.isnan().view(-1, *[1] * (x.dim() - 1))
        grad = grad.masked_fill(silent, 0.0)
        if bool(reward.isinf().any()) or not bool(grad.isfinite().all()):
            raise NonFiniteError("the oracle answered infinity, or with an infinite gradient")
        self.ledger.charge(len(samples), len(samples))
        self.ledger.gradients += len(samples)
        return reward.detach(), grad
