"""``grpo``: the clipped policy gradient of stochastic flow steps, with the panel as the group.

    L = E[ max(-A rho, -A clip(rho, 1 - c, 1 + c)) ] + kl_coef E[ |m - m_ref|^2 / (2 std^2) ],
    A_k = (r_k - mean r) / (std r + 1e-4)  over the K of a panel,   rho = p_theta(x_u | x_t) / p_old(x_u | x_t)

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) at ``spread="global"``: the std is the whole round's. DanceGRPO
(Xue et al. 2025, 2505.07818): ``kernel=Kernel("constant")``, ``spread="unbiased"``. MixGRPO (Li et al. 2025,
2507.21802): ``slide``. GRPO-Guard (Wang et al. 2025, 2510.22319), ``trust="guard"``, with ``h`` the step's length:

    log rho = std (log p_theta - log p_old + |m - m_old|^2 / (2 std^2)),   the surrogate divided by h

Flow-DPPO (Ping et al. 2026, 2606.11025), ``trust="divergence"``: no clip; a step is left out where it moves on
(rho > 1 with A > 0, or rho < 1 with A < 0) although ``|m - m_old|^2 / (2 std^2) >= divergence`` already.

Everything is summed over the D dimensions, where the papers average: their clip is ours / D. The KL is the true
one of the two Gaussians; Flow-GRPO's code leaves out ``h``, so that its KL is ``h / D`` of it. GRPO-Guard's code
averages its bias over the whole batch; here each row has its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agents.ppo import PPO, averaged, gaussian_kl, moved, ppo_loss
from prefenv.agent import Metrics, Requires
from prefenv.errors import ConfigError
from prefenv.kernels import Kernel, gaussian_log_prob
from prefenv.policy import FlowPolicy
from prefenv.rollout import Rollout

Spread = Literal["group", "global", "unbiased"]
Trust = Literal["clip", "guard", "divergence"]


def group_advantages(judgement: Tensor, clip: float, spread: Spread = "group") -> Tensor:
    """Advantages of panels ``(m, K)`` relative to each panel's mean, ``(m, K)``; 0 where there was no answer.

    Args:
        judgement: NaN = no answer.
        clip: Largest absolute advantage.
        spread: What they are divided by: ``group`` = the panel's std (ddof 0) + 1e-4, ``global`` = the std of all
            answers (ddof 0) + 1e-4, ``unbiased`` = the panel's std (ddof 1) + 1e-8.
    """
    # In float64, where the mean of equal float32 values is exact: a tie must teach nothing, not rounding errors.
    told, r = ~judgement.isnan(), judgement.double()
    gap = (r - r.nanmean(1, keepdim=True)).nan_to_num(0.0)
    square, count = gap.square(), told.sum(1, keepdim=True)
    if spread == "global":
        seen = r[told]
        scale = (seen.std(correction=0) if len(seen) else seen.new_zeros(())) + 1e-4
    elif spread == "group":
        scale = (square.sum(1, keepdim=True) / count.clamp_min(1)).sqrt() + 1e-4
    else:
        scale = (square.sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt() + 1e-8
    return (gap / scale).clamp(-clip, clip).to(judgement.dtype)


def guard_loss(
    log_ratio: Tensor, advantage: Tensor, kl_old: Tensor, std: Tensor, step: Tensor, clip: float
) -> Tensor:
    """GRPO-Guard's clipped surrogate, ``(N,)``; ratios and gradients are of the same size at every step.

    Args:
        log_ratio: ``log p_theta - log p_old``, ``(N,)``.
        advantage: ``(N,)``.
        kl_old: ``|m - m_old|^2 / (2 std^2)``, summed over dimensions where the log-ratio is, ``(N,)``.
        std: Of each step, ``(N,)``.
        step: What it is divided by, ``(N,)``: the step's length h (Tencent's Precise takes ``|dm / dv|``).
        clip: How far the normalised ratio may move.
    """
    normalised = std * (log_ratio + kl_old)
    return ppo_loss(normalised, torch.zeros_like(normalised), advantage, clip) / step


def divergence_loss(
    log_ratio: Tensor, advantage: Tensor, kl_old: Tensor, divergence: float
) -> Tensor:
    """Flow-DPPO's surrogate ``-A rho``, ``(N,)``; 0 where the step moves on and ``kl_old >= divergence``."""
    onward = (log_ratio * advantage).detach() > 0
    dropped = onward & (kl_old.detach() >= divergence)
    return (-advantage * log_ratio.exp()).masked_fill(dropped, 0.0)


class GRPO(PPO):
    """Flow-GRPO and its relatives."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``grpo``.

        Args:
            lr: Adam's learning rate.
            clip_range: How far a ratio may move before its gradient stops (``clip`` and ``guard``).
            epochs: Passes over each round.
            minibatches: Optimiser steps per pass.
            adv_clip: Largest absolute advantage.
            spread: What a panel's advantages are divided by: ``group``, ``global`` or ``unbiased``.
            trust: What keeps the policy near the old one: ``clip``, ``guard`` or ``divergence``.
            divergence: Largest KL of a step to the old policy, in nats (``divergence``).
            slide: Rounds until the stochastic window moves on by one step, in a circle; 0 = it stays. The
                anchor holds only what lies outside the kernel's own window.
            window: Stochastic steps at a time, out of the kernel's, when it slides.
            kl_coef: Weight of the Gaussian KL to the reference, per step.
            anchor: Weight of the velocity's drift from the reference on the kernel's deterministic steps.
            max_grad_norm: Largest gradient norm.
            kernel: The stochastic step; by default only the early steps are stochastic.
        """

        lr: float = 3e-4
        clip_range: float = 0.2
        epochs: int = 2
        minibatches: int = 2
        adv_clip: float = 5.0
        spread: Spread = "global"
        trust: Trust = "clip"
        divergence: float = 0.02
        slide: int = 0
        window: int = 4
        kl_coef: float = 0.02
        anchor: float = 10.0
        max_grad_norm: float = 1.0
        kernel: Kernel = Kernel("flow-sde", 0.7, (0.0, 0.3125))

    name: ClassVar[str] = "grpo"
    requires: ClassVar[Requires] = Requires(panel_size=2, log_prob=True)

    def build(self) -> None:
        cfg = self.config
        if cfg.spread not in ("group", "global", "unbiased"):
            raise ConfigError(f"grpo: spread is group, global or unbiased, not {cfg.spread!r}")
        if cfg.trust not in ("clip", "guard", "divergence"):
            raise ConfigError(f"grpo: trust is clip, guard or divergence, not {cfg.trust!r}")
        if cfg.slide < 0 or cfg.window < 1:
            raise ConfigError("grpo: slide must be at least 0 and window at least 1")
        self.prepare()

    def noisy(self) -> list[int]:
        """The steps that have noise in this round."""
        cfg, steps = self.config, self.frozen.stochastic_steps
        if not cfg.slide:
            return steps
        start = self.rounds // cfg.slide % max(1, len(steps) - cfg.window + 1)
        return steps[start : start + cfg.window]

    def behaviour(self) -> FlowPolicy:
        """The model with noise in this round's window; outside it, its ODE."""
        if not self.config.slide:
            return self.policy
        steps, times = self.noisy(), self.policy.times.tolist()
        kernel = replace(self.config.kernel, window=(times[steps[0]], times[steps[-1] + 1]))
        return self.env.policy(self.model, kernel, self.generator)

    def update(self, rollout: Rollout) -> Metrics:
        cfg, policy, seen = self.config, self.policy, []
        batch = rollout.transitions(self.noisy())
        judgement = rollout.panels(rollout.judgement)
        advantage = group_advantages(judgement, cfg.adv_clip, cfg.spread).flatten()[batch.row]
        step, old_mean = policy.times.diff().to(advantage)[batch.index], batch.x
        if cfg.trust != "clip":
            with torch.no_grad():
                old_mean, _ = policy.gaussian(batch.x, batch.index, batch.condition)
            self.env.ledger.nfe += len(batch.x)
        for part in self.minibatches(len(step)):
            at, gain = batch.at(part), advantage[part]
            mean, std = policy.gaussian(*at)
            log_prob, old = gaussian_log_prob(batch.x_next[part], mean, std), batch.log_prob[part]
            if cfg.trust == "clip":
                loss = ppo_loss(log_prob, old, gain, cfg.clip_range)
            else:
                kl_old = gaussian_kl(mean, old_mean[part], std)
                if cfg.trust == "guard":
                    scales = std.flatten(), step[part]
                    loss = guard_loss(log_prob - old, gain, kl_old, *scales, cfg.clip_range)
                else:
                    loss = divergence_loss(log_prob - old, gain, kl_old, cfg.divergence)
            metrics = self.descend(loss.mean(), rollout, at, mean, std)
            seen.append({**metrics, **moved((log_prob - old).detach(), cfg.clip_range)})
        return averaged(seen)
