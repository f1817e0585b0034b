"""``awm``: advantage-weighted matching, PPO with the matching loss in the place of the log-probability.

    l = -phi(e),   e = |v(x_t, t) - (x1 - x0)|^2 / D,   rho = exp(l - l_old) at the same noise and time
    L = E[ max(-A rho, -A clip(rho, 1 - c, 1 + c)) ] + kl_coef E|v - v_ref|^2 / D + ema_coef E|v - v_ema|^2 / D

Xue et al. 2025 (AWM, arXiv 2509.25050). With ``s = 1 - t``, ``phi(e)`` is ``e``, ``e s``, ``e s^2``, or the
robust ``sqrt(e) s`` (``huber``) and ``e^p s / p`` (``ghuber``). ``kl="elbo"`` divides squared distances by
``2 sd^2``, ``sd = 0.7 sqrt(s / (1 - min(s, 0.99)))``.

Where ``A < 0`` a bad sample's error may grow without end: until its ratio has vanished, only the distances to
``v_ref`` and to ``v_ema``, the running average of the model's own weights, hold it. The public code fails with an
undefined name where one of their coefficients is 0; here 0 leaves the term out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agents.ppo import advantages, ppo_loss
from prefenv.agent import Metrics, Requires
from prefenv.matching import MatchingAgent, Points, blend_, matching_error
from prefenv.rollout import Rollout

Weighting = Literal["uniform", "t", "tpow2", "huber", "ghuber"]
Order = Literal["exp-first", "sum-first"]
Distance = Literal["uniform", "elbo"]


def awm_log_prob(
    error: Tensor, t: Tensor, weighting: Weighting = "uniform", power: float = 0.25
) -> Tensor:
    """``-phi(e)``, what stands in for the log-probability, of the shape of ``error``.

    Args:
        error: Matching errors.
        t: Their times; 1 = data.
        weighting: ``phi``; the names are the public code's, whose ``t`` is ``1 - t`` here.
        power: Of ``ghuber``.
    """
    s, tiny = 1 - t, 1e-10
    if weighting == "huber":
        return -((error + tiny).sqrt() - tiny**0.5) * s
    if weighting == "ghuber":
        return -((error + tiny) ** power - tiny**power) * s / power
    return -error * {"uniform": torch.ones_like(s), "t": s, "tpow2": s.square()}[weighting]


def awm_loss(
    log_prob: Tensor, old: Tensor, advantage: Tensor, clip_range: float, order: Order = "exp-first"
) -> Tensor:
    """The clipped surrogate of each time and sample ``(T, B)``, or of each sample ``(B,)``.

    Args:
        log_prob: Stand-ins ``(T, B)``.
        old: The same of the model before the update.
        advantage: ``(B,)``.
        clip_range: How far a ratio may move; at 1 or more it is hardly ever felt.
        order: ``exp-first`` = a ratio for each time, ``sum-first`` = one for each sample, of the mean over times.
    """
    if order == "sum-first":
        log_prob, old = log_prob.mean(0), old.mean(0)
    return ppo_loss(log_prob, old, advantage.expand_as(log_prob), clip_range)


def velocity_distance(velocity: Tensor, other: Tensor, t: Tensor, kl: Distance) -> Tensor:
    """``|v - v'|^2 / D`` of each row, ``(B,)``; ``elbo``: divided by ``2 sd^2``."""
    square = matching_error(velocity, other)
    if kl == "uniform":
        return square
    s = 1 - t
    return square / (2 * 0.7**2 * s / (1 - s.clamp_max(0.99)))


class AWM(MatchingAgent):
    """Advantage-weighted matching."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``awm``.

        Args:
            weighting: ``uniform``, ``t``, ``tpow2``, ``huber`` or ``ghuber``.
            order: ``exp-first`` = a ratio for each time, ``sum-first`` = one for each sample.
            clip_range: How far a ratio may move before its gradient stops.
            adv_clip: Largest absolute advantage, which counts as 1.
            times: Times at which each sample is matched.
            epochs: Passes over each round.
            minibatches: Optimiser steps per pass.
            kl: How velocities' distances are weighted over time: ``uniform`` or ``elbo``.
            kl_coef: Weight of the distance to the reference.
            ema_coef: Weight of the distance to the running average.
            ema_decay: Of the running average, per optimiser step.
            lr: Adam's learning rate.
            max_grad_norm: Largest gradient norm.
        """

        weighting: Weighting = "uniform"
        order: Order = "exp-first"
        clip_range: float = 1.0
        adv_clip: float = 5.0
        times: int = 4
        epochs: int = 2
        minibatches: int = 4
        kl: Distance = "uniform"
        kl_coef: float = 0.1
        ema_coef: float = 1.0
        ema_decay: float = 0.9
        lr: float = 1e-4
        max_grad_norm: float = 1.0

    name: ClassVar[str] = "awm"
    requires: ClassVar[Requires] = Requires()
    persistent: ClassVar[tuple[str, ...]] = ("model", "optimizer", "average")

    def build(self) -> None:
        super().build()
        self.average = self.reference.frozen()

    def log_prob(self, velocity: Tensor, at: Points) -> Tensor:
        """``l`` of each time and sample, ``(T, B)``."""
        l = awm_log_prob(matching_error(velocity, at.target), at.t, self.config.weighting)
        return l.view(self.config.times, -1)

    def leash(self, velocity: Tensor, at: Points) -> Tensor:
        """The weighted distances to the reference and to the running average, a scalar."""
        cfg, total = self.config, velocity.new_zeros(())
        for weight, flow in ((cfg.kl_coef, self.reference), (cfg.ema_coef, self.average)):
            if weight:
                other = self.velocity(flow, at)
                total = total + weight * velocity_distance(velocity, other, at.t, cfg.kl).mean()
        return total

    def update(self, rollout: Rollout) -> Metrics:
        cfg, total = self.config, {"policy_loss": 0.0, "ratio": 0.0}
        self.remember(rollout)
        advantage = advantages(rollout.judgement, cfg.adv_clip) / cfg.adv_clip
        told = advantage.nonzero()[:, 0]
        if len(told) == 0:
            return total
        at = self.points(told.repeat(cfg.times))
        with torch.no_grad():
            old = self.log_prob(self.velocity(self.model, at), at)
        count = 0
        for _ in range(cfg.epochs):
            order = torch.randperm(len(told), generator=self.generator, device=self.device)
            for part in order.chunk(cfg.minibatches):
                start = torch.arange(0, len(at.t), len(told), device=self.device)[:, None]
                here = at.rows((start + part).flatten())
                velocity = self.velocity(self.model, here)
                l = self.log_prob(velocity, here)
                gain = advantage[told[part]]
                policy = awm_loss(l, old[:, part], gain, cfg.clip_range, cfg.order).mean()
                self.descend(policy + self.leash(velocity, here))
                blend_(self.average, self.model, cfg.ema_decay)
                total["policy_loss"] += float(policy.detach())
                total["ratio"] += float((l.detach() - old[:, part]).exp().mean())
                count += 1
        return {k: v / count for k, v in total.items()}
