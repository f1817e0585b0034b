"""``adjoint``: Adjoint Matching, a regression whose solution is ``p_ref exp(r / beta)``; needs reward gradients.

    X_u = a X_t + b v_theta(X_t, t) + std z,         a memoryless kernel: X_1 tells nothing about X_0
    ~a_1 = -grad r(X_1) / beta,   ~a_t = (a I + b dv_ref(X_t, t) / dx)^T ~a_u          (the lean adjoint)
    L = sum_t | b (v_theta - v_ref)(X_t, t) / std + std ~a |^2,        X and ~a without gradient

Domingo-Enrich et al. 2024 (arXiv 2409.08861), for any Gaussian step ``(a, b, std)``: with the memoryless kernel of
``prefenv.kernels`` it is the paper's ``|(2 / sigma) (v - v_ref) + sigma ~a|^2`` times the step, with ``ddim`` at
level 1 the DDPM form of Microsoft's soc-fine-tuning-sd. Its sign is the paper's: a descent step follows the
reward (the public flow-density-control has the other one, and keeps the first quarter of the steps, not the last).

In the paper ~a is ~a_t, of the start of the step (``adjoint="start"``). The derivative of the discrete objective
``E[-r / beta + sum |b (v - v_ref)|^2 / (2 std^2)]`` is the one of its end: with that the mean of a Gaussian moves
by exactly the tilt at any number of steps, with the paper's by 0.85 of it at 16 steps.

The last step of ``ddim`` has no noise and no target, so ``anchor`` holds its velocity (measured on shapes, two
seeds: rate 0.73 and 0.92, without it 0.26 and 0.55). There the rate climbs and falls back from round to round, and
the targets' size varies 15-fold: the reward has a gradient almost only at the border of the two classes, which a
round of 128 samples seldom shows. That this is the cause is likely, not proven.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics, Requires
from prefenv.kernels import Affine, Kernel
from prefenv.rollout import Rollout
from prefenv.tasks.conditions import rows_of


def lean_adjoint(
    velocity: Callable[[Tensor, int], Tensor], path: Tensor, table: Affine, terminal: Tensor
) -> tuple[Tensor, Tensor]:
    """Backwards along a path: ``~a_k = (a_k I + b_k dv/dx (x_k))^T ~a_(k+1)``.

    Args:
        velocity: The reference's, ``(x, k) -> v(x, t_k)``.
        path: States ``(K + 1, B, *event_shape)``.
        table: ``a`` and ``b`` of the K steps.
        terminal: ``~a_K``, ``(B, *event_shape)``.

    Returns:
        The adjoint ``(K + 1, B, *event_shape)`` and the velocities met ``(K, B, *event_shape)``.
    """
    adjoint, met = [terminal], []
    for k in reversed(range(len(path) - 1)):
        with torch.enable_grad():
            x = path[k].detach().requires_grad_(True)
            v = velocity(x, k)
            (pulled,) = torch.autograd.grad(v, x, adjoint[-1])
        adjoint.append(float(table.a[k]) * adjoint[-1] + float(table.b[k]) * pulled)
        met.append(v.detach())
    return torch.stack(adjoint[::-1]), torch.stack(met[::-1])


def adjoint_loss(change: Tensor, adjoint: Tensor, b: Tensor, std: Tensor) -> Tensor:
    """``|b (v - v_ref) / std + std ~a|^2``, summed over dimensions, ``(N,)``; ``b`` and ``std`` broadcast."""
    return (b * change / std + std * adjoint).square().flatten(1).sum(1)


class AdjointMatching(Agent):
    """Adjoint Matching."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``adjoint``.

        Args:
            lr: Adam's learning rate.
            beta: Temperature of the optimum; None = the task's, which is what the score is measured against.
            adjoint: Of which end of a step the adjoint is: ``end`` = exact for the steps as they are taken,
                ``start`` = the paper's.
            epochs: Passes over each round.
            minibatches: Optimiser steps per pass.
            anchor: Weight of the velocity's drift from the reference on the deterministic steps.
            max_grad_norm: Largest gradient norm.
            kernel: The stochastic step: memoryless, or the optimum is another one.
        """

        lr: float = 3e-4
        beta: float | None = None
        adjoint: Literal["end", "start"] = "end"
        epochs: int = 2
        minibatches: int = 4
        anchor: float = 100.0
        max_grad_norm: float = 1.0
        kernel: Kernel = Kernel("ddim", 1.0)

    name: ClassVar[str] = "adjoint"
    requires: ClassVar[Requires] = Requires(gradient=True, log_prob=True)

    def build(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr, fused=True)

    def update(self, rollout: Rollout) -> Metrics:
        cfg, policy, steps = self.config, self.policy, self.policy.stochastic_steps
        assert rollout.gradient is not None
        beta = self.env.task.beta if cfg.beta is None else cfg.beta
        adjoint, reference = lean_adjoint(
            lambda x, k: self.reference.velocity(x, float(policy.times[k]), rollout.condition),
            rollout.path,
            policy.table,
            -rollout.gradient / beta,
        )
        self.env.ledger.nfe += reference.shape[0] * reference.shape[1]
        told = ~rollout.judgement.isnan()
        batch = rollout.transitions(steps)
        later = 1 if cfg.adjoint == "end" else 0
        target = adjoint[torch.tensor(steps) + later].flatten(0, 1)
        reference = reference[torch.tensor(steps)].flatten(0, 1)
        shape = (-1, *[1] * (reference.dim() - 1))
        b, std = (c.to(reference)[batch.index].view(shape) for c in policy.table[1:])
        use = told.repeat(len(steps)).nonzero()[:, 0]
        total, count = 0.0, 0
        for _ in range(cfg.epochs if len(use) else 0):
            order = use[torch.randperm(len(use), generator=self.generator, device=self.device)]
            for part in order.chunk(cfg.minibatches):
                t = policy.times.to(batch.x)[batch.index[part]]
                condition = rows_of(batch.condition, part)
                change = self.model.velocity(batch.x[part], t, condition) - reference[part]
                loss = adjoint_loss(change, target[part], b[part], std[part]).mean()
                if cfg.anchor:
                    loss = loss + cfg.anchor * self.drift(rollout, len(told))
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.max_grad_norm)
                self.optimizer.step()
                total, count = total + float(loss.detach()), count + 1
                self.env.ledger.nfe += len(part)
        return {
            "loss": total / max(count, 1),
            "adjoint": float(target.flatten(1).norm(dim=1).mean()),
        }
