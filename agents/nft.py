"""``nft``: DiffusionNFT, negative-aware fine-tuning: one matching loss for good samples, one for bad ones.

    v+ = beta v + (1 - beta) v_old,   v- = (1 + beta) v_old - beta v,   x^(+-) = x_t + (1 - t) v(+-)
    L = c E[ (r l(x^+) + (1 - r) l(x^-)) / beta ] + kl_coef E[ |v - v_ref|^2 / D ],
    l(x) = |x - x1|^2 / D / w,   w = sg max(|x - x1|_1 / D, 1e-5),   r = clip(A / c, -1, 1) / 2 + 1/2

Zheng et al. 2025 (DiffusionNFT, arXiv 2509.16117). Samples come from the old policy's ODE; ``v+`` and ``v-`` are
no networks of their own. After each round the old weights become ``d old + (1 - d) new``,
``d = min(rate max(round - wait, 0), most)``. Without ``w`` the fixed point is
``v_old + (2 / beta) Cov(r, x1 - x0 | x_t)``: a smaller ``beta`` is a larger step. One round after the other, only
``kl_coef`` ends the drift: at the public 1e-4 the samples became nearly all alike (measured: diversity 0.37).

The public code's ``binary`` mode takes the sign of ``A`` before it divides by ``c``, so that with its ``c = 5``
the good weigh 0.6 and the bad 0.4; here 1 and 0. Its logged policy loss holds the KL term, ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.ppo import advantages
from prefenv.agent import Metrics, Requires
from prefenv.matching import MatchingAgent, blend_, matching_error, row_mean
from prefenv.policy import FlowPolicy
from prefenv.rollout import Rollout


def optimality(advantage: Tensor, clip: float, binary: bool = False) -> Tensor:
    """``r = clip(A / c, -1, 1) / 2 + 1/2`` in [0, 1], ``(B,)``; binary: 1 where ``A > 0``, else 0."""
    if binary:
        return (advantage > 0).to(advantage.dtype)
    return (advantage / clip).clamp(-1, 1) / 2 + 0.5


def old_decay(step: int, rate: float, wait: int, most: float) -> float:
    """``d``: how much of the old policy is kept after a round."""
    return min(rate * max(step - wait, 0), most)


def nft_loss(
    x_t: Tensor, t: Tensor, x1: Tensor, velocity: Tensor, old: Tensor, r: Tensor, beta: float
) -> Tensor:
    """``(r l(x^+) + (1 - r) l(x^-)) / beta`` of each row, ``(B,)``.

    Args:
        x_t: Points, ``(B, *event_shape)``.
        t: Their times, ``(B,)``; 1 = data.
        x1: The samples they lead to.
        velocity: The model's.
        old: The old policy's.
        r: How good each sample is, in [0, 1], ``(B,)``.
        beta: How far the implicit policies lean.
    """
    left = (1 - t).view(-1, *[1] * (x_t.dim() - 1))

    def error(v: Tensor) -> Tensor:
        gap = x_t + left * v - x1
        return row_mean(gap.square()) / row_mean(gap.detach().abs()).clamp_min(1e-5)

    plus, minus = torch.lerp(old, velocity, beta), torch.lerp(old, velocity, -beta)
    return (r * error(plus) + (1 - r) * error(minus)) / beta


class NFT(MatchingAgent):
    """DiffusionNFT."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``nft``.

        Args:
            beta: How far the implicit policies lean; smaller is a larger step.
            adv_clip: Standard deviations above the mean at which a sample is wholly good; the paper takes 5.
            binary: Above the mean is wholly good, the rest wholly bad.
            kl_coef: Weight of the velocity's distance to the reference's.
            rate: Growth of the old policy's decay per round.
            wait: Rounds without any.
            most: Largest decay.
            lr: Adam's learning rate.
            updates: Gradient steps per round.
            batch: Samples per gradient step.
            max_grad_norm: Largest gradient norm.
        """

        beta: float = 1.0
        adv_clip: float = 1.0
        binary: bool = False
        kl_coef: float = 0.2
        rate: float = 1e-3
        wait: int = 0
        most: float = 0.5
        lr: float = 1e-4
        updates: int = 20
        batch: int = 128
        max_grad_norm: float = 1.0

    name: ClassVar[str] = "nft"
    requires: ClassVar[Requires] = Requires()
    persistent: ClassVar[tuple[str, ...]] = ("model", "optimizer", "old")

    def build(self) -> None:
        super().build()
        self.old = self.reference.frozen()

    def behaviour(self) -> FlowPolicy:
        """The old policy's ODE."""
        return self.env.policy(self.old, self.kernel())

    def update(self, rollout: Rollout) -> Metrics:
        cfg = self.config
        self.remember(rollout)
        advantage = advantages(rollout.judgement, cfg.adv_clip)
        told = advantage.nonzero()[:, 0]
        metrics = {"policy_loss": 0.0, "drift": 0.0}
        for _ in range(cfg.updates if len(told) else 0):
            rows = told[self.draw(len(told), cfg.batch)]
            at = self.points(rows)
            r = optimality(advantage[rows], cfg.adv_clip, cfg.binary)
            velocity, old = self.velocity(self.model, at), self.velocity(self.old, at)
            policy = (
                cfg.adv_clip * nft_loss(at.x, at.t, at.sample, velocity, old, r, cfg.beta).mean()
            )
            drift = matching_error(velocity, self.velocity(self.reference, at)).mean()
            self.descend(policy + cfg.kl_coef * drift)
            metrics["policy_loss"] += float(policy.detach()) / cfg.updates
            metrics["drift"] += float(drift.detach()) / cfg.updates
        blend_(self.old, self.model, old_decay(self.rounds, cfg.rate, cfg.wait, cfg.most))
        return metrics
