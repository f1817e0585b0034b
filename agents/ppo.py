"""``ppo``: DDPO's clipped policy gradient on the log-probabilities of stochastic flow steps.

    L = E[ max(-A rho, -A clip(rho, 1 - c, 1 + c)) ] + kl_coef E[ |m - m_ref|^2 / (2 std^2) ],
    rho = exp(log p_theta(x_u | x_t) - log p_old(x_u | x_t)),   A = (r - mean r) / (std r + 1e-6)

Black et al. 2023 (DDPO, arXiv 2305.13301); for flows: Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470). The KL term
is the true Gaussian KL of the step to the *reference*, summed over dimensions. Log-probabilities are summed by
default, so ``rho`` is a likelihood ratio; with ``reduction="mean"`` it is its D-th root, and the clip range is
divided by D. With ``ratio="path"`` there is one ratio (and one clip) for each sample, the product over its S
stochastic steps. The surrogate is then multiplied by D, divided by S: all four are the same update to first order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics, Requires
from prefenv.errors import ConfigError
from prefenv.kernels import Kernel, Reduction, gaussian_log_prob
from prefenv.policy import At
from prefenv.rollout import Rollout


def advantages(reward: Tensor, clip: float) -> Tensor:
    """``(r - mean) / (std + 1e-6)`` over the answered rows (std with ddof 0), clipped; 0 for NaN."""
    # In float64, where the mean of equal float32 values is exact: a tie must teach nothing, not rounding errors.
    seen = reward[~reward.isnan()].double()
    if len(seen) == 0:
        return torch.zeros_like(reward)
    scaled = (reward.double() - seen.mean()) / (seen.std(correction=0) + 1e-6)
    return scaled.nan_to_num(0.0).clamp(-clip, clip).to(reward.dtype)


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
            ratio: ``step`` = a ratio and a clip for each step; ``path`` = one for the whole path.
            kernel: The stochastic step; by default only those before t = 0.3125, where the
                class is decided (the first 8 of 16 on the shapes grid).
        """

        lr: float = 2e-4
        clip_range: float = 0.2
        epochs: int = 2
        minibatches: int = 2
        adv_clip: float = 5.0
        kl_coef: float = 0.0
        anchor: float = 10.0
        max_grad_norm: float = 1.0
        reduction: Reduction = "sum"
        ratio: Literal["step", "path"] = "step"
        kernel: Kernel = Kernel("flow-sde", 0.7, (0.0, 0.3125))

    name: ClassVar[str] = "ppo"
    requires: ClassVar[Requires] = Requires(log_prob=True)

    def build(self) -> None:
        cfg = self.config
        if cfg.reduction not in ("sum", "mean") or cfg.ratio not in ("step", "path"):
            raise ConfigError(
                f"ppo: reduction is sum or mean and ratio is step or path, not {cfg.reduction!r} and {cfg.ratio!r}"
            )
        self.prepare()

    def prepare(self) -> None:
        """The optimiser, and the reference as a policy."""
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr, fused=True)
        self.frozen = self.env.policy(self.reference, self.kernel())
        if not self.frozen.stochastic_steps:
            raise ConfigError(
                f"{self.name} needs a step with noise: raise the kernel's level or widen its window"
            )

    def update(self, rollout: Rollout) -> Metrics:
        cfg, policy = self.config, self.policy
        batch = rollout.transitions(policy.stochastic_steps)
        rows, path = len(rollout.judgement), cfg.ratio == "path"
        dim = rollout.noise[0].numel() if cfg.reduction == "mean" else 1
        advantage = advantages(rollout.judgement, cfg.adv_clip)
        clip_range, old = cfg.clip_range / dim, batch.log_prob / dim
        # A unit has one ratio: a step of a row, or a row with all its steps.
        starts = torch.arange(0, len(old), rows, device=self.device)[:, None]
        units = rows if path else len(old)
        scale, seen = dim * units / len(old), []
        for unit in self.minibatches(units):
            part = (starts + unit).flatten() if path else unit
            at = batch.at(part)
            mean, std = policy.gaussian(*at)
            log_prob = gaussian_log_prob(batch.x_next[part], mean, std, cfg.reduction)
            log_prob, before = (
                z.view(-1, len(unit)).sum(0) if path else z for z in (log_prob, old[part])
            )
            loss = ppo_loss(log_prob, before, advantage[unit % rows], clip_range).mean()
            metrics = self.descend(scale * loss, rollout, at, mean, std)
            seen.append({**metrics, **moved((log_prob - before).detach(), clip_range)})
        return averaged(seen)

    def minibatches(self, n: int) -> Iterator[Tensor]:
        """Indices below ``n`` in random order, ``epochs`` times over."""
        for _ in range(self.config.epochs):
            order = torch.randperm(n, generator=self.generator, device=self.device)
            yield from order.chunk(self.config.minibatches)

    def descend(self, loss: Tensor, rollout: Rollout, at: At, mean: Tensor, std: Tensor) -> Metrics:
        """One optimiser step down the surrogate, the KL of these steps to the reference, and the anchor."""
        cfg, kl = self.config, torch.zeros(())
        if cfg.kl_coef:
            with torch.no_grad():
                reference_mean, _ = self.frozen.gaussian(*at)
            kl = gaussian_kl(mean, reference_mean, std).mean()
            loss = loss + cfg.kl_coef * kl
        if cfg.anchor:
            loss = loss + cfg.anchor * self.drift(rollout, len(mean))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.max_grad_norm)
        self.optimizer.step()
        self.env.ledger.nfe += len(mean) * (2 if cfg.kl_coef else 1)
        return {"loss": float(loss.detach()), "kl": float(kl.detach())}


def moved(log_ratio: Tensor, clip_range: float) -> Metrics:
    """How far ratios are from 1: the share beyond the clip, and the largest, which is 0 before the first step."""
    change = (log_ratio.exp() - 1).abs()
    clipped = float((change > clip_range).float().mean())
    return {"clipped": clipped, "ratio_error": float(change.max())}


def averaged(seen: list[Metrics]) -> Metrics:
    """The mean of each metric over a round's optimiser steps; of ``ratio_error`` the first."""
    mean = {k: sum(m[k] for m in seen) / len(seen) for k in seen[0]}
    return {**mean, "ratio_error": seen[0]["ratio_error"]}
