"""``kto``: Kahneman-Tversky optimisation of matching errors: each sample is good or bad on its own, no pairs.

    L = lambda (1 - U(y)),   y = s beta (g - z),   g = e_ref - e,   e = |v(x_t, t) - (x1 - x0)|^2 / D,
    s = +1 for an accepted sample, -1 for a rejected one;   U(y) = sigmoid(y)

Ethayarajh et al. 2024 (KTO, arXiv 2402.01306); Li et al. 2024 (Diffusion-KTO, arXiv 2404.04465). ``z`` is what
a sample gains on average, without gradient: ``max(mean g, 0)`` (the public code's default, there called ``none``),
or the average of the two classes' means, not clamped. ``U`` may also be ``log sigmoid(y)`` (loss-averse) or
``-log sigmoid(-y)`` (risk-seeking). Half of a batch is accepted, half rejected, whatever their shares. ``horizon``
and ``anchor`` as in ``agents/flow_dpo.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefenv.agent import Metrics, Requires
from prefenv.matching import MatchingAgent, matching_error
from prefenv.rollout import Rollout

Utility = Literal["sigmoid", "loss-averse", "risk-seeking"]
Offset = Literal["batch", "classes"]


def gain_offset(gain: Tensor, accepted: Tensor, offset: Offset = "batch") -> Tensor:
    """``z``, a scalar without gradient, from gains and labels ``(B,)``."""
    gain = gain.detach()
    if offset == "batch":
        return gain.mean().clamp_min(0)
    return (gain[accepted].mean() + gain[~accepted].mean()) / 2


def kto_loss(
    gain: Tensor,
    accepted: Tensor,
    z: Tensor,
    beta: float,
    utility: Utility = "sigmoid",
    weight: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """The loss of each sample, ``(B,)``.

    Args:
        gain: ``e_ref - e``, ``(B,)``.
        accepted: Whether a sample was accepted, ``(B,)`` bool.
        z: What a gain is compared with.
        beta: How soon a sample is fitted, or avoided, enough.
        utility: ``sigmoid``, ``loss-averse`` or ``risk-seeking``.
        weight: ``lambda`` of accepted and of rejected samples.
    """
    y = torch.where(accepted, beta, -beta) * (gain - z)
    if utility == "sigmoid":
        value = y.sigmoid()
    else:
        value = F.logsigmoid(y) if utility == "loss-averse" else -F.logsigmoid(-y)
    return torch.where(accepted, *weight) * (1 - value)


class KTO(MatchingAgent):
    """Kahneman-Tversky optimisation."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``kto``.

        Args:
            proposals: Who makes the samples: ``model`` (online) or the ``reference`` (offline).
            memory: Rounds that are learned from, the last ones; 0 = all so far.
            beta: How soon a sample is fitted, or avoided, enough; for errors averaged over dimensions.
            utility: ``sigmoid``, ``loss-averse`` or ``risk-seeking``.
            offset: ``batch``, or ``classes`` for the average of the two classes' means.
            lambda_accepted: Weight of accepted samples.
            lambda_rejected: Weight of rejected samples.
            horizon: Times are below this.
            anchor: Weight of the velocity's distance to the reference's beyond the horizon.
            lr: Adam's learning rate.
            updates: Gradient steps per round.
            batch: Samples per gradient step.
            max_grad_norm: Largest gradient norm.
        """

        proposals: Literal["model", "reference"] = "reference"
        memory: int = 0
        beta: float = 5.0
        utility: Utility = "sigmoid"
        offset: Offset = "batch"
        lambda_accepted: float = 1.0
        lambda_rejected: float = 1.0
        horizon: float = 0.3
        anchor: float = 10.0
        lr: float = 1e-4
        updates: int = 10
        batch: int = 128
        max_grad_norm: float = 1.0

    name: ClassVar[str] = "kto"
    requires: ClassVar[Requires] = Requires()

    def update(self, rollout: Rollout) -> Metrics:
        cfg = self.config
        self.remember(rollout)
        judgement, half = self.pool["judgement"], cfg.batch // 2
        good = (judgement >= self.env.desk.threshold).nonzero()[:, 0]
        bad = (judgement < self.env.desk.threshold).nonzero()[:, 0]
        metrics = {"loss": 0.0, "accepted": float(len(good)), "accuracy": 0.0}
        accepted = torch.arange(2 * half, device=self.device) < half
        for _ in range(cfg.updates if len(good) and len(bad) else 0):
            rows = torch.cat([good[self.draw(len(good), half)], bad[self.draw(len(bad), half)]])
            at = self.points(rows, window=(0.0, cfg.horizon))
            reference = matching_error(self.velocity(self.reference, at), at.target)
            gain = reference - matching_error(self.velocity(self.model, at), at.target)
            z, weight = (
                gain_offset(gain, accepted, cfg.offset),
                (cfg.lambda_accepted, cfg.lambda_rejected),
            )
            loss = kto_loss(gain, accepted, z, cfg.beta, cfg.utility, weight).mean()
            if cfg.anchor:
                loss = loss + cfg.anchor * self.drift_beyond(cfg.horizon, half)
            metrics["loss"] += self.descend(loss) / cfg.updates
            metrics["accuracy"] += float(((gain > z) == accepted).float().mean()) / cfg.updates
        return metrics
