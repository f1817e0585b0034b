"""``jury``: several oracles together: vector rewards, compared as Pareto does, or averaged.

With the members' values ``r_i`` (one vector for each sample of a panel), a sample **dominates** another if it is
at least as good to every member and better to one. ``combine="pareto"`` answers

    score_i = 1/2 + (|{j: i dominates j}| - |{j: j dominates i}|) / (2 (K - 1))              in [0, 1]

**For a pair this is D3PO's comparison** (Yang et al. 2023, arXiv 2311.13231; its public code's ``compare``): 1 and
0 where one dominates, equal where neither does. A larger panel has no such scores in general (dominance is
partial); this one keeps every dominance, and may also tell two apart that do not dominate each other. A rating (a
panel of one) is 1 where all members accept the sample, else 0. ``combine="mean"`` is the weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prefenv.errors import ConfigError
from prefenv.oracle import Oracle, judged
from prefenv.registry import make_oracle
from prefenv.tasks import Task


def dominance(values: Tensor) -> Tensor:
    """``d[..., i, j]``: whether i dominates j, ``(m, K, K)`` bool, from values ``(m, K, R)``; NaN never does."""
    one, other = values[:, :, None], values[:, None]
    return (one >= other).all(-1) & (one > other).any(-1)


def pareto_scores(values: Tensor) -> Tensor:
    """Scores ``(m, K)`` in [0, 1] from values ``(m, K, R)``, K >= 2; NaN where a value is NaN."""
    wins = dominance(values).to(values.dtype)
    net = wins.sum(2) - wins.sum(1)
    score = 0.5 + net / (2 * (values.shape[1] - 1))
    return score.masked_fill(values.isnan().any(-1), torch.nan)


class Jury(Oracle):
    """A panel of oracles. A sample that one of them does not answer has no answer.

    Args:
        task: The task whose samples they judge.
        members: Oracles, or their names; on the command line joined by ``+``, ``s-curve+learned``.
        combine: ``pareto`` or ``mean``.
        weights: Of the mean, one for each member; None = equal.

    Raises:
        ConfigError: No members, panel sizes or weights that do not fit together.
    """

    def __init__(
        self,
        task: Task,
        members: str | Sequence[str | Oracle] = (),
        combine: Literal["pareto", "mean"] = "pareto",
        weights: Sequence[float] | None = None,
    ):
        super().__init__(task)
        named = [m for m in members.split("+") if m] if isinstance(members, str) else members
        self.members = [make_oracle(m, task) if isinstance(m, str) else m for m in named]
        if not self.members:
            raise ConfigError("a jury has members: jury:members=s-curve+another")
        if combine not in ("pareto", "mean"):
            raise ConfigError(f"jury: combine must be pareto or mean, not {combine!r}")
        given = list(weights) if weights is not None else [1.0] * len(self.members)
        if len(given) != len(self.members) or min(given) < 0 or sum(given) <= 0:
            raise ConfigError(f"jury: {len(self.members)} weights of at least 0, not {weights!r}")
        sizes = {m.panel_size for m in self.members if m.panel_size is not None}
        if len(sizes) > 1:
            raise ConfigError(f"jury: members judge panels of different sizes, {sorted(sizes)}")
        self.weights, self.combine = [w / sum(given) for w in given], combine
        self.panel_size = next(iter(sizes), None)
        self.conditional = any(m.conditional for m in self.members)
        self.unconditional = any(m.unconditional for m in self.members)
        self.nondeterministic = any(m.nondeterministic for m in self.members)
        self.generators = tuple(g for m in self.members for g in m.generators)
        if combine == "mean":
            self.differentiable = all(m.differentiable for m in self.members)
            pairs = zip(self.weights, self.members, strict=True)
            self.threshold = sum(w * m.threshold for w, m in pairs)

    def publish(self, agent: Any, metrics: dict[str, float]) -> None:
        for member in self.members:
            member.publish(agent, metrics)

    def judge(self, panels: Tensor, condition: Tensor | None = None) -> Tensor:
        values = torch.stack([judged(m, panels, condition) for m in self.members], -1)
        if self.combine == "mean":
            return (values * values.new_tensor(self.weights)).sum(-1)
        if panels.shape[1] > 1:
            return pareto_scores(values)
        accepted = values >= values.new_tensor([m.threshold for m in self.members])
        return accepted.all(-1).to(values.dtype).masked_fill(values.isnan().any(-1), torch.nan)
