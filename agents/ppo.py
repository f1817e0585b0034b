"""``ppo``: DDPO's clipped policy gradient on the log-probabilities of stochastic flow steps.

    L = E[ max(-A rho, -A clip(rho, 1 - c, 1 + c)) ] + kl_coef E[ |m - m_ref|^2 / (2 std^2) ],
    rho = exp(log p_theta(x_u | x_t) - log p_old(x_u | x_t)),   A = (r - mean r) / (std r + 1e-6)

Black et al. 2023 (DDPO, arXiv 2305.13301); for flows: Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470). The KL term
is the true Gaussian KL of the step to the *reference*, summed over dimensions. Log-probabilities are summed by
default, so ``rho`` is a likelihood ratio; with ``reduction="mean"`` it is its D-th root, and the clip range is
divided by D with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics, Requires
from prefenv.kernels import Kernel, Reduction
from prefenv.policy import FlowPolicy, Rollout


def advantages(reward: Tensor, clip: float) -> Tensor:
    """``(r - mean) / (std + 1e-6)`` over the answered rows (std with ddof 0), clipped; 0 for NaN."""
    seen = reward[~reward.isnan()]
    if len(seen) == 0:
        return torch.zeros_like(reward)
    scaled = (reward - seen.mean()) / (seen.std(correction=0) + 1e-6)
    return scaled.nan_to_num(0.0).clamp(-clip, clip)


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float
) -> Tensor:
    """The clipped surrogate, ``(N,)``: ``max(-A rho, -A clip(rho, 1 - c, 1 + c))``."""
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """``KL(N(mean, std^2) || N(reference_mean, std^2)) = |mean - reference_mean|^2 / (2 std^2)``, ``(N,)``."""
    return ((mean - reference_mean) / std).square().flatten(1).sum(1) / 2


class PPO(Agent):
    """DDPO / PPO on stochastic flow steps."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``ppo``.

        Args:
            lr: Adam's learning rate.
            clip_range: How far a ratio may move before its gradient stops, for summed log-probabilities.
            epochs: Passes over each round.
            minibatches: Optimiser steps per pass.
            adv_clip: Largest absolute advantage.
            kl_coef: Weight of the Gaussian KL to the reference, per step.
            anchor: Weight of the velocity's drift from the reference on the deterministic steps.
            max_grad_norm: Largest gradient norm.
            reduction: ``sum`` or ``mean`` of the log-probability over dimensions.
            kernel: The stochastic step; by default only the first 5 of 16 steps are stochastic.
        """

        lr: float = 2e-4
        clip_range: float = 0.2
        epochs: int = 3
        minibatches: int = 2
        adv_clip: float = 5.0
        kl_coef: float = 0.0
        anchor: float = 10.0
        max_grad_norm: float = 1.0
        reduction: Reduction = "sum"
        kernel: Kernel = Kernel("flow-sde", 0.7, (0.0, 0.3125))

    name: ClassVar[str] = "ppo"
    requires: ClassVar[Requires] = Requires(log_prob=True)

    def build(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr, fused=True)
        self.frozen = FlowPolicy(self.reference, self.kernel(), self.env.steps)

    def update(self, rollout: Rollout) -> Metrics:
        cfg, policy = self.config, self.policy
        batch = rollout.transitions(policy.stochastic_steps)
        dim = rollout.noise[0].numel() if cfg.reduction == "mean" else 1
        advantage = advantages(rollout.judgement, cfg.adv_clip)[batch.row]
        clip_range, old = cfg.clip_range / dim, batch.log_prob / dim
        total: dict[str, float] = {"loss": 0.0, "kl": 0.0, "clipped": 0.0, "ratio_error": 0.0}
        for epoch in range(cfg.epochs):
            order = torch.randperm(len(old), generator=self.generator, device=self.device)
            for part in order.chunk(cfg.minibatches):
                x, index = batch.x[part], batch.index[part]
                log_prob = policy.log_prob(x, index, batch.x_next[part], None, cfg.reduction)
                loss = ppo_loss(log_prob, old[part], advantage[part], clip_range).mean()
                kl = torch.zeros(())
                if cfg.kl_coef:
                    mean, std = policy.gaussian(x, index)
                    with torch.no_grad():
                        reference_mean, _ = self.frozen.gaussian(x, index)
                    kl = gaussian_kl(mean, reference_mean, std).mean()
                    loss = loss + cfg.kl_coef * kl
                if cfg.anchor:
                    loss = loss + cfg.anchor * self.drift(rollout, len(part))
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.max_grad_norm)
                self.optimizer.step()
                change = (log_prob.detach() - old[part]).exp() - 1
                if epoch == 0 and total["loss"] == 0.0:
                    total["ratio_error"] = float(change.abs().max())
                total["loss"] += float(loss.detach())
                total["kl"] += float(kl.detach())
                total["clipped"] += float((change.abs() > clip_range).float().mean())
                self.env.ledger.nfe += len(part) * (3 if cfg.kl_coef else 1)
        count = cfg.epochs * cfg.minibatches
        return {k: v if k == "ratio_error" else v / count for k, v in total.items()}
