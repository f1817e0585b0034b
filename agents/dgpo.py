"""``dgpo``: direct group preference optimisation, a whole panel's preference in one sigmoid.

    w = sg sigmoid( (beta / K) sum_k A_k (e_k - e_k^ref) ),   e_k = |v(x_t, t) - (x1_k - x0)|^2 / D
    L = mean_k w A_k e_k + kl_coef E[ |v - v_ref|^2 / D ],    A_k = (r_k - mean r) / std r  over the panel

Luo et al. 2025 (DGPO, arXiv 2510.08425). A panel shares its noise and its time; ``w`` is near 1 as long as the
good are matched worse, and the bad better, than by the reference. ``clip_range`` takes the gradient from samples
whose error has moved far enough since the round began: ``A > 0`` and ``rho > 1 + c``, or ``A <= 0`` and
``rho < 1 - c``, with ``rho = exp(e_old - e)``; the loss keeps its value. K is the panel's size even where answers
are missing.

Instead of the KL, which its authors take small for their speed and larger for their results, the default here
looks at early times alone (``horizon``), where classes are decided, and holds the velocity after (``anchor``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.grpo import group_advantages
from prefenv.agent import Metrics, Requires
from prefenv.matching import MatchingAgent, matching_error
from prefenv.rollout import Rollout


def dgpo_loss(error: Tensor, reference: Tensor, advantage: Tensor, beta: float) -> Tensor:
    """``w A e`` of each sample, panels ``(m, K)`` to ``(m, K)``.

    Args:
        error: The model's matching errors, ``(m, K)``.
        reference: The reference's at the same points.
        advantage: ``(m, K)``; 0 = no answer.
        beta: How soon a panel is learned enough.
    """
    moved = (advantage * (error - reference)).mean(1, keepdim=True)
    return (beta * moved).sigmoid().detach() * advantage * error


def moved_enough(error: Tensor, old: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Which samples rest, a mask of the shape of ``error``."""
    ratio = (old - error).detach().exp()
    return torch.where(advantage > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)


class DGPO(MatchingAgent):
    """Direct group preference optimisation."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``dgpo``.

        Args:
            beta: How soon a panel is learned enough; for errors averaged over dimensions.
            kl_coef: Weight of the velocity's distance to the reference's.
            clip_range: How far a sample's error may move in a round before its gradient stops; 0 = any way.
            adv_clip: Largest absolute advantage.
            horizon: Times are below this.
            anchor: Weight of the velocity's distance to the reference's beyond the horizon.
            times: Times at which each panel is matched.
            epochs: Passes over each round.
            minibatches: Optimiser steps per pass.
            lr: Adam's learning rate.
            max_grad_norm: Largest gradient norm.
        """

        beta: float = 2.0
        kl_coef: float = 0.0
        clip_range: float = 0.0
        adv_clip: float = 5.0
        horizon: float = 0.3
        anchor: float = 10.0
        times: int = 4
        epochs: int = 1
        minibatches: int = 10
        lr: float = 1e-4
        max_grad_norm: float = 1.0

    name: ClassVar[str] = "dgpo"
    requires: ClassVar[Requires] = Requires(panel_size=2)
    persistent: ClassVar[tuple[str, ...]] = ("model", "optimizer")

    def update(self, rollout: Rollout) -> Metrics:
        cfg, k, total = self.config, rollout.panel_size, {"loss": 0.0, "weight": 0.0}
        self.remember(rollout)
        advantage = group_advantages(rollout.panels(rollout.judgement), cfg.adv_clip)
        told = advantage.any(1).nonzero()[:, 0].repeat(cfg.times)
        if len(told) == 0:
            return total
        member = torch.arange(k, device=self.device)
        at = self.points(
            (told[:, None] * k + member).flatten(), shared=k, window=(0.0, cfg.horizon)
        )
        reference = self.velocity(self.reference, at)
        with torch.no_grad():
            old = matching_error(self.velocity(self.model, at), at.target).view(-1, k)
        before = matching_error(reference, at.target).view(-1, k)
        count = 0
        for _ in range(cfg.epochs):
            order = torch.randperm(len(told), generator=self.generator, device=self.device)
            for part in order.chunk(cfg.minibatches):
                pick = (part[:, None] * k + member).flatten()
                here, gain = at.rows(pick), advantage[told[part]]
                velocity = self.velocity(self.model, here)
                error = matching_error(velocity, here.target).view(-1, k)
                if cfg.clip_range:
                    rest = moved_enough(error, old[part], gain, cfg.clip_range).flatten()
                    mask = rest.view(-1, *[1] * (velocity.dim() - 1))
                    velocity = torch.where(mask, velocity.detach(), velocity)
                    error = matching_error(velocity, here.target).view(-1, k)
                loss = dgpo_loss(error, before[part], gain, cfg.beta).mean()
                if cfg.kl_coef:
                    loss = loss + cfg.kl_coef * matching_error(velocity, reference[pick]).mean()
                if cfg.anchor:
                    loss = loss + cfg.anchor * self.drift_beyond(cfg.horizon, len(part))
                total["loss"] += self.descend(loss)
                moved = (gain * (error.detach() - before[part])).mean(1)
                total["weight"] += float((cfg.beta * moved).sigmoid().mean())
                count += 1
        return {key: value / count for key, value in total.items()}
