"""``flow-dpo``: direct preference optimisation of matching errors, no log-probabilities needed.

    L = -log sigmoid( -(beta_t / 2) [(e_w - e_w^ref) - (e_l - e_l^ref)] ),   e = |v(x_t, t) - (x1 - x0)|^2 / D,
    w preferred to l in one panel; both share their noise x0 and time t

Wallace et al. 2023 (Diffusion-DPO, arXiv 2311.12908); for flows: Liu et al. 2025 (Flow-DPO, arXiv 2501.13918).
``beta_t`` is constant, which that paper recommends, or ``beta t^2``, which its derivation gives (there written
``beta (1 - t)^2``, with t = 1 noise): an error in the velocity is an error in the predicted noise, divided by t.

``proposals="reference"`` with ``memory=0`` is the offline algorithm: every pair so far, all from the untouched
reference. With ``"model"`` and ``memory=1`` it is online. Pairs come from panels as they were judged; the public
script stacks winners and losers, and splits them into batches that pair winners with winners.

At all times alike, pushing away what was rejected ruins the shapes sooner than it changes their class (measured:
rate 0, residual x18 and more). ``horizon`` keeps the loss to the early times, where classes are decided, and
``anchor`` holds the velocity near the reference's after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.d3po import preferred_pairs
from prefenv.agent import Metrics, Requires
from prefenv.matching import MatchingAgent, Points, matching_error
from prefenv.rollout import Rollout

Proposals = Literal["model", "reference"]


def dpo_margin(
    error_w: Tensor, error_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: Tensor | float
) -> Tensor:
    """``-(beta / 2) [(e_w - e_w^ref) - (e_l - e_l^ref)]`` of each pair, ``(P,)``: its implicit log-odds."""
    return -beta / 2 * ((error_w - ref_w) - (error_l - ref_l))


def dpo_loss(margin: Tensor) -> Tensor:
    """``-log sigmoid(margin)``."""
    return -F.logsigmoid(margin)


class FlowDPO(MatchingAgent):
    """Flow-DPO; its relatives override ``objective``."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``flow-dpo``.

        Args:
            proposals: Who makes the samples: ``model`` (online) or the ``reference`` (offline).
            memory: Rounds that are learned from, the last ones; 0 = all so far.
            beta: How much the errors of a pair must differ; for errors averaged over dimensions.
            schedule: ``constant``, or ``noise`` for ``beta t^2``.
            horizon: Times are below this.
            anchor: Weight of the velocity's distance to the reference's beyond the horizon.
            tie: Judgements that differ by no more than this are a tie and make no pair.
            lr: Adam's learning rate.
            updates: Gradient steps per round.
            batch: Pairs per gradient step.
            max_grad_norm: Largest gradient norm.
        """

        proposals: Proposals = "reference"
        memory: int = 0
        beta: float = 10.0
        schedule: Literal["constant", "noise"] = "constant"
        horizon: float = 0.3
        anchor: float = 10.0
        tie: float = 0.3
        lr: float = 1e-4
        updates: int = 10
        batch: int = 64
        max_grad_norm: float = 1.0

    name: ClassVar[str] = "flow-dpo"
    requires: ClassVar[Requires] = Requires(panel_size=2)

    def objective(self, at: Points) -> tuple[Tensor, Tensor]:
        """Loss and margin ``(P,)`` at points whose rows are winner, loser, winner, loser, ..."""
        cfg = self.config
        velocity, reference = self.velocity(self.model, at), self.velocity(self.reference, at)
        error_w, error_l = matching_error(velocity, at.target).view(-1, 2).unbind(1)
        ref_w, ref_l = matching_error(reference, at.target).view(-1, 2).unbind(1)
        beta = cfg.beta * at.t[::2].square() if cfg.schedule == "noise" else cfg.beta
        margin = dpo_margin(error_w, error_l, ref_w, ref_l, beta)
        return dpo_loss(margin) + self.anchor(), margin

    def anchor(self) -> Tensor | float:
        """What holds the velocity to the reference's beyond the horizon."""
        cfg = self.config
        return cfg.anchor * self.drift_beyond(cfg.horizon, cfg.batch) if cfg.anchor else 0.0

    def update(self, rollout: Rollout) -> Metrics:
        cfg = self.config
        self.remember(rollout)
        winner, loser = preferred_pairs(rollout.panels(self.pool["judgement"]), cfg.tie)
        metrics = {"loss": 0.0, "pairs": float(len(winner)), "accuracy": 0.0}
        for _ in range(cfg.updates if len(winner) else 0):
            pair = self.draw(len(winner), cfg.batch)
            rows = torch.stack([winner[pair], loser[pair]], 1).flatten()
            at = self.points(rows, shared=2, window=(0.0, cfg.horizon))
            loss, margin = self.objective(at)
            metrics["loss"] += self.descend(loss.mean()) / cfg.updates
            metrics["accuracy"] += float((margin > 0).float().mean()) / cfg.updates
        return metrics
