"""``dpok``: policy gradient with a value baseline and the KL of every step to the reference.

    L = E[ max(-A rho, -A clip(rho, 1 - c, 1 + c)) ] + kl_coef E[ |m - m_ref|^2 / (2 std^2) ],
    A = r - V(x_t, t),   V = argmin E (V(x_t, t) - r)^2,   rho = p_theta(x_u | x_t) / p_old(x_u | x_t)

Fan et al. 2023 (DPOK, arXiv 2305.16381). The KL is the true one of the step's two Gaussians, to the *reference*,
summed over dimensions; its sum over the steps is at least the KL of the samples, so that at ``kl_coef = beta`` the
loss bounds the alignment problem ``E[r] - beta KL`` (its gradient takes the visited states as given, as in the
paper). The baseline is fitted after it was used: it does not know the round that it is subtracted from.

Public code differs in three ways. google-research's clamps the ratio without PPO's maximum
(``clamp="two-sided"``): the gradient is zero outside the band even where the ratio moved the wrong way. Its KL is
the mean square of the two predictions' difference, without the step's coefficient. The "DPOK" beside D3PO takes
the KL of two softmaxes over the *batch*, which is 0 for a batch of one, to the old policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from agents.ppo import PPO, averaged, moved, ppo_loss
from prefenv.agent import Metrics, Requires
from prefenv.errors import ConfigError
from prefenv.kernels import Kernel, gaussian_log_prob
from prefenv.rollout import Rollout

Clamp = Literal["one-sided", "two-sided"]


def dpok_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_range: float,
    clamp: Clamp = "one-sided",
) -> Tensor:
    """The surrogate of each step, ``(N,)``.

    Args:
        log_prob: Of the model.
        old_log_prob: Of the policy that drew the step.
        advantage: ``r - V(x_t, t)``.
        clip_range: Half width of the ratio's band.
        clamp: ``one-sided`` = PPO's maximum; ``two-sided`` = ``-A clip(rho)``, as the public code.
    """
    if clamp == "one-sided":
        return ppo_loss(log_prob, old_log_prob, advantage, clip_range)
    return -advantage * (log_prob - old_log_prob).exp().clamp(1 - clip_range, 1 + clip_range)


class Value(nn.Module):
    """``V(x, t)``: what a sample that passes ``x`` at ``t`` will be judged, ``(B,)``; 0 in the beginning.

    Args:
        dim: Numbers of a row of ``x``, the condition's features among them.
        width: Width of its two hidden layers.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.layers(torch.cat([x.flatten(1), t[:, None]], 1)))[:, 0]


class DPOK(PPO):
    """DPOK on stochastic flow steps."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``dpok``.

        Args:
            lr: Adam's learning rate.
            clip_range: How far a ratio may move before its gradient stops.
            clamp: ``one-sided`` or ``two-sided`` (as the public code).
            epochs: Passes over each round.
            minibatches: Optimiser steps per pass.
            kl_coef: Weight of the Gaussian KL to the reference, per step; judgements are not rescaled, so it is
                the alignment problem's beta.
            anchor: Weight of the velocity's drift from the reference on the deterministic steps.
            max_grad_norm: Largest gradient norm.
            value_lr: Adam's learning rate for the baseline; 0 = no baseline.
            value_updates: Its steps per round, each on the whole round.
            value_width: Width of its two hidden layers.
            kernel: The stochastic step; by default only the early steps are stochastic.
        """

        lr: float = 3e-4
        clip_range: float = 0.2
        clamp: Clamp = "one-sided"
        epochs: int = 2
        minibatches: int = 2
        kl_coef: float = 0.02
        anchor: float = 10.0
        max_grad_norm: float = 1.0
        value_lr: float = 1e-3
        value_updates: int = 10
        value_width: int = 64
        kernel: Kernel = Kernel("flow-sde", 0.7, (0.0, 0.3125))

    name: ClassVar[str] = "dpok"
    requires: ClassVar[Requires] = Requires(log_prob=True)
    persistent: ClassVar[tuple[str, ...]] = ("model", "optimizer", "value", "value_optimizer")

    def build(self) -> None:
        cfg = self.config
        if cfg.clamp not in ("one-sided", "two-sided"):
            raise ConfigError(f"dpok: clamp is one-sided or two-sided, not {cfg.clamp!r}")
        self.value = Value(self.env.task.width, cfg.value_width).to(self.device)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=cfg.value_lr)
        self.prepare()

    def update(self, rollout: Rollout) -> Metrics:
        cfg, policy, seen = self.config, self.policy, []
        batch = rollout.transitions(policy.stochastic_steps)
        judgement, rows = rollout.judgement[batch.row], self.env.task.rows(batch.x, batch.condition)
        told, t = ~judgement.isnan(), policy.times.to(batch.x)[batch.index]
        with torch.no_grad():
            advantage = (judgement - self.value(rows, t)).nan_to_num(0.0)
        for part in self.minibatches(len(batch.x)):
            at = batch.at(part)
            mean, std = policy.gaussian(*at)
            log_prob, old = gaussian_log_prob(batch.x_next[part], mean, std), batch.log_prob[part]
            loss = dpok_loss(log_prob, old, advantage[part], cfg.clip_range, cfg.clamp).mean()
            metrics = self.descend(loss, rollout, at, mean, std)
            seen.append({**metrics, **moved((log_prob - old).detach(), cfg.clip_range)})
        error = self.fit(rows[told], t[told], judgement[told])
        return {**averaged(seen), "value_error": error}

    def fit(self, x: Tensor, t: Tensor, judgement: Tensor) -> float:
        """Fit the baseline to a round's answers; returns its mean squared error before that."""
        losses = [0.0]
        for _ in range(self.config.value_updates if len(x) and self.config.value_lr else 0):
            loss = (self.value(x, t) - judgement).square().mean()
            self.value_optimizer.zero_grad()
            loss.backward()
            self.value_optimizer.step()
            losses.append(float(loss.detach()))
        return losses[:2][-1]
