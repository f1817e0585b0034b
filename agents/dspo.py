"""``dspo``: direct score preference optimisation, a matching loss whose target leans away from what was rejected.

    L = |(v_w - u_w) - beta (1 - sigmoid(m)) (v_w - v_w^ref)|^2 / D,
    m = -(beta / 2) [(e_w - e_w^ref) - (e_l - e_l^ref)],   u = x1 - x0,   e = |v - u|^2 / D

Zhu et al. 2025 (DSPO, ICLR), with the velocity in the place of the noise. The winner is fitted, and on beyond its
target as long as the preference is in doubt; the loser enters through ``m`` alone. The gradient also flows through
the sigmoid, as in the public code. Keep ``beta < 2``: at the reference the gradient is ``1 - beta / 2`` times the
matching loss's, and turns around. The public SDXL branch switches to another objective where
``|v_w - v_w^ref|^2 / D`` falls below 0.1, a jump in the loss; it is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agents.flow_dpo import FlowDPO, Proposals, dpo_margin
from prefenv.matching import Points, matching_error, row_mean


def dspo_loss(
    velocity_w: Tensor, target_w: Tensor, reference_w: Tensor, margin: Tensor, beta: float
) -> Tensor:
    """The loss of each pair, ``(P,)``.

    Args:
        velocity_w: The model's velocity at the preferred sample's point, ``(P, *event_shape)``.
        target_w: ``x1 - x0`` there.
        reference_w: The reference's velocity there.
        margin: The pair's implicit log-odds ``m``, ``(P,)``.
        beta: Strength of the preference.
    """
    doubt = (1 - margin.sigmoid()).view(-1, *[1] * (velocity_w.dim() - 1))
    lean = beta * doubt * (velocity_w - reference_w)
    return row_mean((velocity_w - target_w - lean).square())


class DSPO(FlowDPO):
    """Direct score preference optimisation."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``dspo``.

        Args:
            proposals: Who makes the samples: ``model`` (online) or the ``reference`` (offline).
            memory: Rounds that are learned from, the last ones; 0 = all so far.
            beta: Strength of the preference; for errors averaged over dimensions.
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
        beta: float = 0.5
        horizon: float = 1.0
        anchor: float = 0.0
        tie: float = 0.3
        lr: float = 1e-4
        updates: int = 20
        batch: int = 64
        max_grad_norm: float = 1.0

    name: ClassVar[str] = "dspo"

    def objective(self, at: Points) -> tuple[Tensor, Tensor]:
        cfg = self.config
        velocity, reference = self.velocity(self.model, at), self.velocity(self.reference, at)
        error_w, error_l = matching_error(velocity, at.target).view(-1, 2).unbind(1)
        ref_w, ref_l = matching_error(reference, at.target).view(-1, 2).unbind(1)
        margin = dpo_margin(error_w, error_l, ref_w, ref_l, cfg.beta)
        loss = dspo_loss(velocity[::2], at.target[::2], reference[::2], margin, cfg.beta)
        return loss + self.anchor(), margin
