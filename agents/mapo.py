"""``mapo``: margin-aware preference optimisation of matching errors, without a reference.

    L = e_w - beta log sigmoid( scale (f(e_w) - f(e_l)) ),   f(e) = a e / (exp(a e) - 1),
    e = |v(x_t, t) - (x1 - x0)|^2 / D,   w preferred to l in one panel; both share their noise x0 and time t

Hong et al. 2024 (MaPO, arXiv 2406.06424). ``f`` falls from 1 at ``e = 0``, where the public code divides 0 by 0.
The first term fits what was preferred, at all times, and is all that holds the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.flow_dpo import FlowDPO, Proposals
from prefenv.matching import Points, matching_error


def likelihood_proxy(error: Tensor, a: float) -> Tensor:
    """``f(e) = a e / (exp(a e) - 1)``, 1 at ``e = 0``."""
    z = a * error
    # Where z is large exp(z) swamps the 1, and later overflows: its gradient would be NaN.
    small, large = z < 1e-4, z > 30.0
    safe = torch.where(small | large, 1.0, z)
    ratio = torch.where(large, z * (-z).exp(), safe / safe.expm1())
    return torch.where(small, 1 - z / 2 + z.square() / 12, ratio)


def mapo_loss(
    error_w: Tensor, error_l: Tensor, beta: float, a: float, scale: float
) -> tuple[Tensor, Tensor]:
    """The loss and the margin ``scale (f(e_w) - f(e_l))`` of each pair, ``(P,)`` each.

    Args:
        error_w: Matching error of the preferred sample, ``(P,)``.
        error_l: Of the other.
        beta: Weight of the margin's term.
        a: How soon ``f`` falls (the public code's ``snr``).
        scale: Of the margin (there, 1000 diffusion steps).
    """
    margin = scale * (likelihood_proxy(error_w, a) - likelihood_proxy(error_l, a))
    return error_w - beta * F.logsigmoid(margin), margin


class MaPO(FlowDPO):
    """Margin-aware preference optimisation."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``mapo``.

        Args:
            proposals: Who makes the samples: ``model`` (online) or the ``reference`` (offline).
            memory: Rounds that are learned from, the last ones; 0 = all so far.
            beta: Weight of the margin's term.
            a: How soon the likelihood's stand-in falls with the error; the paper takes 0.5.
            scale: Of the margin; the paper takes 1000.
            horizon: Times are below this.
            tie: Judgements that differ by no more than this are a tie and make no pair.
            lr: Adam's learning rate.
            updates: Gradient steps per round.
            batch: Pairs per gradient step.
            max_grad_norm: Largest gradient norm.
        """

        proposals: Proposals = "reference"
        memory: int = 0
        beta: float = 0.1
        a: float = 0.5
        scale: float = 10.0
        horizon: float = 1.0
        tie: float = 0.3
        lr: float = 1e-4
        updates: int = 20
        batch: int = 64
        max_grad_norm: float = 1.0

    name: ClassVar[str] = "mapo"

    def objective(self, at: Points) -> tuple[Tensor, Tensor]:
        cfg = self.config
        error = matching_error(self.velocity(self.model, at), at.target).view(-1, 2)
        return mapo_loss(error[:, 0], error[:, 1], cfg.beta, cfg.a, cfg.scale)
