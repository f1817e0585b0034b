"""``draft``: ascends the reward itself, differentiated through the last K steps of the sampler.

    x_(k+1) = a_k x_k + b_k v_theta(x_k, t_k) + std_k z_k,    x_(N-K) without gradient
    dL / dtheta = -E[ (dx_N / dtheta)^T grad r(x_N) ] + anchor d/dtheta E |v_theta - v_ref|^2

DRaFT-K: Clark et al. 2023 (arXiv 2309.17400); ``last=None`` takes all steps, ``truncation="random"`` draws K anew
each time: AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739). The oracle is asked once for each sample, for the
judgement and its gradient; the rest is one vector-Jacobian product of the replayed steps. ``truncation="refl"``
is ReFL (Xu et al. 2023, arXiv 2304.05977): stop at a random one of the last K steps, go on to the data in one
step, ``x_1 = x_t + (1 - t) v_theta(x_t, t)``, and ask about that; the gradient is of this step alone.

DRaFT-LV is not here: its n noises a sample are n questions a sample, and questions are what we count.

The public codes (AlignProp, ImageReward) have no term that holds the model at the reference, only early stopping;
ReFL's paper has one, its code has not (zai-org/ImageReward#95). Here it is ``anchor``, the velocity's drift on the
steps without noise, and ``beta`` for the path's KL on those with noise; 0 for both is theirs. A truncated
gradient moves the early steps too, by the shared weights, but does not see what they decide. On shapes that is the
class: under the anchor the last 8 of 16 steps learn nothing (preferred rate 0.24), all 16 do (0.99).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics, Requires
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.policy import FlowPolicy
from prefenv.rollout import Rollout, collect
from prefenv.tasks.conditions import rows_of


def replay(
    policy: FlowPolicy,
    path: Tensor,
    last: int,
    reference: RectifiedFlow | None = None,
    condition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of a path with gradient to the flow's parameters, through its last steps.

    Args:
        policy: Who made the path; its noises are those of the path, for the weights as they are now.
        path: States ``(steps + 1, B, *event_shape)``.
        last: Steps that carry gradient, 1 to ``steps``.
        reference: What the path's KL is measured to; None = it is not.
        condition: Of each row, where there is one.

    Returns:
        ``x_N`` ``(B, *event_shape)`` and the KL of these steps' noisy ones in nats, ``(B,)``.
    """
    x = path[policy.steps - last]
    kl = x.new_zeros(len(x))
    for i in range(policy.steps - last, policy.steps):
        t = float(policy.times[i])
        mean = policy.mean(x, policy.flow.velocity(x, t, condition), i)
        if reference is not None and (std := policy.std(i)) > 0:
            there = policy.mean(x, reference.velocity(x, t, condition), i)
            kl = kl + ((mean - there) / std).square().flatten(1).sum(1) / 2
        # What the step added to its mean: its noise, and the rounding that a second evaluation brings.
        x = mean + (path[i + 1] - mean).detach()
    return x, kl


def predict(policy: FlowPolicy, x: Tensor, i: int, condition: Tensor | None = None) -> Tensor:
    """The data as seen from step ``i``: ``x + (1 - t) v(x, t)``, with gradient."""
    t = float(policy.times[i])
    return x + (1 - t) * policy.flow.velocity(x, t, condition)


def draft_loss(samples: Tensor, gradient: Tensor) -> Tensor:
    """``-mean <grad r, x_N>``: its derivative is minus that of the mean reward, at the samples asked about."""
    return -(gradient * samples).flatten(1).sum(1).mean()


class DRaFT(Agent):
    """Direct reward fine-tuning: DRaFT-K, AlignProp, ReFL."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``draft``.

        Args:
            lr: Adam's learning rate.
            last: K, the steps from the end that learn; None = all.
            truncation: ``fixed`` = always K steps; ``random`` = 1 to K of them, drawn each time; ``refl`` = one
                random step of the K, with the prediction of the data from there.
            beta: Price of a nat of the path's KL to the reference, on the noisy steps; 0 = none, as in the papers.
            anchor: Weight of the velocity's drift from the reference on the deterministic steps.
            anchor_batch: States at which the drift is taken.
            minibatches: Optimiser steps per round; each learns from other samples.
            max_grad_norm: Largest gradient norm.
            kernel: How samples are drawn to be judged; by default with noise where the class is decided, as
                ``ppo`` draws them.
        """

        lr: float = 3e-4
        last: int | None = None
        truncation: Literal["fixed", "random", "refl"] = "fixed"
        beta: float = 0.0
        anchor: float = 30.0
        anchor_batch: int = 256
        minibatches: int = 4
        max_grad_norm: float = 1.0
        kernel: Kernel = Kernel("flow-sde", 0.7, (0.0, 0.3125))

    name: ClassVar[str] = "draft"
    requires: ClassVar[Requires] = Requires(gradient=True)

    def build(self) -> None:
        cfg, steps = self.config, self.env.steps
        if cfg.truncation not in ("fixed", "random", "refl"):
            raise ConfigError(f"draft: truncation is fixed, random or refl, not {cfg.truncation!r}")
        self.last: int = steps if cfg.last is None else cfg.last
        if not 1 <= self.last <= steps:
            raise ConfigError(f"draft: last must be 1 to {steps}, the env's steps, not {cfg.last}")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=cfg.lr, fused=True)

    def round(self) -> tuple[Tensor, Metrics]:
        k = self.last
        if self.config.truncation != "fixed":
            k = 1 + int(torch.randint(k, (), generator=self.generator, device=self.device))
        refl = self.config.truncation == "refl"
        rollout = self.guess(k) if refl else collect(self.env, self.policy, gradient=True)
        return rollout.judgement, self.ascend(rollout, k)

    @torch.no_grad()
    def guess(self, k: int) -> Rollout:
        """A round of which the oracle sees what is predicted k steps before the end."""
        x, condition = self.env.begin()
        path = [x]
        with self.policy.hold(x, condition):
            for i in range(self.env.steps):
                path.append(self.policy.act(path[-1], i, condition)[0])
        start = self.env.steps - k
        predicted = predict(self.policy, path[start], start, condition)
        self.env.ledger.nfe += len(x) * (self.env.steps + 1)
        judgement, gradient = self.env.desk.gradient(predicted, condition)
        none = x.new_zeros(self.env.steps, len(x))
        return Rollout(
            torch.stack(path),
            none,
            judgement,
            judgement,
            self.env.panel_size,
            condition,
            gradient,
        )

    def ascend(self, rollout: Rollout, k: int) -> Metrics:
        """Optimiser steps up the reward, through the last k steps (``refl``: through the k-th from the end)."""
        cfg, refl, start = self.config, self.config.truncation == "refl", self.env.steps - k
        told = (~rollout.judgement.isnan()).nonzero()[:, 0]
        order = torch.randperm(len(told), generator=self.generator, device=self.device)
        total, parts = 0.0, told[order].chunk(cfg.minibatches) if len(told) else ()
        assert rollout.gradient is not None
        for part in parts:
            path, condition = rollout.path[:, part], rows_of(rollout.condition, part)
            if refl:
                end, kl = (
                    predict(self.policy, path[start], start, condition),
                    torch.zeros(1, device=self.device),
                )
            else:
                held = self.reference if cfg.beta else None
                end, kl = replay(self.policy, path, k, held, condition)
            loss = draft_loss(end, rollout.gradient[part]) + cfg.beta * kl.mean()
            noisy = [
                i for i in self.policy.stochastic_steps if i >= start and not refl and cfg.beta
            ]
            self.env.ledger.nfe += len(part) * ((1 if refl else k) + len(noisy))
            if cfg.anchor:
                loss = loss + cfg.anchor * self.drift(rollout, cfg.anchor_batch)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.max_grad_norm)
            self.optimizer.step()
            total += float(loss.detach()) / len(parts)
        slope = rollout.gradient.flatten(1).norm(dim=1).mean()
        return {"loss": total, "gradient": float(slope), "steps": k}
