"""``d3po``: direct preference optimisation of the log-probabilities of stochastic flow steps, step by step.

    L = -log sigmoid( beta (min(log rho_w, log(1 + eps)) - max(log rho_l, log(1 - eps))) ),
    rho = p_theta(x_u | x_t) / p_ref(x_u | x_t),   w preferred to l in one panel, averaged over pairs and steps

Yang et al. 2023 (D3PO, arXiv 2311.13231). The public code clamps both ratios to ``[1 - eps, 1 + eps]`` on both
sides (``clamp="two-sided"``): its gradient is zero outside the band even where the ratio moved the wrong way.
The default here is one-sided: a winner that has risen enough and a loser that has fallen enough rest, anything
on its way back is still pulled. The paper averages log-probabilities over the D dimensions, so its band belongs
to the D-th root of the ratio; here they are summed, and the band of the summed log-ratio is D times as wide.

``margin`` subtracts ``margin (r_w - r_l)`` inside the sigmoid: what was judged much better must become more likely
by more (Amini et al. 2024, ODPO, arXiv 2402.10571). 0, as in the paper, asks the same of every pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefenv.agent import Agent, Metrics, Requires
from prefenv.kernels import Kernel
from prefenv.rollout import Rollout
from prefenv.tasks.conditions import rows_of

Clamp = Literal["one-sided", "two-sided", "none"]


def d3po_loss(
    log_ratio_w: Tensor,
    log_ratio_l: Tensor,
    beta: float,
    eps: float,
    clamp: Clamp = "one-sided",
    dim: int = 1,
    margin: Tensor | float = 0.0,
) -> Tensor:
    """The pairwise loss of each pair and step, ``(N,)``.

    Args:
        log_ratio_w: ``log p_theta - log p_ref`` of the preferred sample's step.
        log_ratio_l: The same of the other.
        beta: Temperature.
        eps: Half width of the ratio's band.
        clamp: ``one-sided``, ``two-sided`` (as the public code) or ``none``.
        dim: Dimensions that the log-ratios are summed over; the band belongs to one of them.
        margin: What the sigmoid's argument must exceed, a number or one for each pair ``(P,)``.
    """
    low, high = dim * math.log(1 - eps), dim * math.log(1 + eps)
    if clamp == "one-sided":
        log_ratio_w, log_ratio_l = log_ratio_w.clamp(max=high), log_ratio_l.clamp(min=low)
    elif clamp == "two-sided":
        log_ratio_w, log_ratio_l = log_ratio_w.clamp(low, high), log_ratio_l.clamp(low, high)
    return -F.logsigmoid(beta * (log_ratio_w - log_ratio_l) - margin)


def preferred_pairs(judgement: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    """All pairs of a round that differ by more than ``tie``.

    Args:
        judgement: ``(m, K)``, NaN = no answer.
        tie: Largest difference that counts as equal.

    Returns:
        Rows of the preferred and of the other, ``(P,)`` each, counted over the flat ``m K`` rows.
    """
    k = judgement.shape[1]
    better = judgement[:, :, None] - judgement[:, None, :] > tie
    panel, w, l = better.nonzero(as_tuple=True)
    return panel * k + w, panel * k + l


class D3PO(Agent):
    """D3PO on stochastic flow steps."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``d3po``.

        Args:
            lr: Adam's learning rate.
            beta: Temperature of the preference, for summed log-probabilities.
            eps: Half width of the band of the ratio's D-th root (the paper's 0.1).
            clamp: ``one-sided``, ``two-sided`` or ``none``.
            anchor: Weight of the velocity's drift from the reference on the deterministic steps.
            tie: Judgements that differ by no more than this are a tie and teach nothing.
            margin: What a pair's log-odds must exceed, for each unit by which its judgements differ.
            epochs: Passes over each round.
            minibatches: Optimiser steps per pass.
            max_grad_norm: Largest gradient norm.
            kernel: The stochastic step; by default only those before t = 0.3125, where the
                class is decided (the first 8 of 16 on the shapes grid).
        """

        lr: float = 8e-4
        beta: float = 0.1
        eps: float = 0.1
        clamp: Clamp = "one-sided"
        anchor: float = 2.0
        tie: float = 0.05
        margin: float = 0.0
        epochs: int = 1
        minibatches: int = 2
        max_grad_norm: float = 1.0
        kernel: Kernel = Kernel("flow-sde", 0.7, (0.0, 0.3125))

    name: ClassVar[str] = "d3po"
    requires: ClassVar[Requires] = Requires(panel_size=2, log_prob=True)

    def build(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr, fused=True)
        self.frozen = self.env.policy(self.reference, self.kernel())

    @property
    def offline(self) -> bool:
        """Both ratios are to the reference, whoever made the steps: the paper's way of two steps is offline."""
        return True

    def update(self, rollout: Rollout) -> Metrics:
        cfg, steps = self.config, self.policy.stochastic_steps
        winner, loser = preferred_pairs(rollout.panels(rollout.judgement), cfg.tie)
        gap = rollout.judgement[winner] - rollout.judgement[loser]
        batch, rows = rollout.transitions(steps), rollout.path.shape[1]
        if len(winner) == 0:
            return {"loss": 0.0, "pairs": 0.0, "accuracy": 0.0}
        dim = rollout.noise[0].numel()
        with torch.no_grad():
            reference = self.frozen.log_prob(batch.x, batch.index, batch.x_next, batch.condition)
        self.env.ledger.nfe += len(batch.x)
        losses, right = [], []
        for _ in range(cfg.epochs):
            # A minibatch is a share of the pairs with all their steps; each row is evaluated once.
            order = torch.randperm(len(winner), generator=self.generator, device=self.device)
            for part in order.chunk(cfg.minibatches):
                w, l = winner[part], loser[part]
                used, place = torch.cat([w, l]).unique(return_inverse=True)
                pick = (
                    torch.arange(len(steps), device=self.device)[:, None] * rows + used
                ).flatten()
                log_prob = self.policy.log_prob(
                    batch.x[pick],
                    batch.index[pick],
                    batch.x_next[pick],
                    rows_of(batch.condition, pick),
                )
                ratio = (log_prob - reference[pick]).view(len(steps), len(used))
                ratio_w, ratio_l = ratio[:, place[: len(w)]], ratio[:, place[len(w) :]]
                margin = cfg.margin * gap[part]
                loss = d3po_loss(ratio_w, ratio_l, cfg.beta, cfg.eps, cfg.clamp, dim, margin).mean()
                if cfg.anchor:
                    loss = loss + cfg.anchor * self.drift(rollout, len(pick))
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.max_grad_norm)
                self.optimizer.step()
                losses.append(float(loss.detach()))
                right.append(float((ratio_w > ratio_l).float().mean()))
                self.env.ledger.nfe += len(pick)
        return {
            "loss": sum(losses) / len(losses),
            "pairs": float(len(winner)),
            "accuracy": sum(right) / len(right),
        }
