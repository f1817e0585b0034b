"""What agents share that learn by matching velocities on finished samples, without log-probabilities.

A finished sample ``x1``, a fresh noise ``x0`` and a time ``t`` make a point ``x_t = (1 - t) x0 + t x1`` with the
target ``u = x1 - x0``. The matching error ``e = |v(x_t, t) - u|^2 / D`` stands in for ``-log p(x1)``. No path is
needed, so proposals come from the ODE, and any sample that was ever judged can be learned from again.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from prefenv.agent import Agent
from prefenv.device import stratified_uniform
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.policy import FlowPolicy
from prefenv.rollout import Rollout
from prefenv.tasks.conditions import rows_of


class Points(NamedTuple):
    """Points on the way from noise to samples: ``x_t``, ``t`` ``(B,)``, ``u``, samples and conditions."""

    x: Tensor
    t: Tensor
    target: Tensor
    sample: Tensor
    condition: Tensor | None = None

    def rows(self, index: Tensor) -> Points:
        """Some of them."""
        condition = rows_of(self.condition, index)
        return Points(
            self.x[index], self.t[index], self.target[index], self.sample[index], condition
        )


def row_mean(values: Tensor) -> Tensor:
    """Mean over everything but the rows, ``(B,)``."""
    return values.flatten(1).mean(1)


def matching_error(velocity: Tensor, target: Tensor) -> Tensor:
    """``|v - u|^2 / D`` of each row, ``(B,)``."""
    return row_mean((velocity - target).square())


@torch.no_grad()
def blend_(average: RectifiedFlow, flow: RectifiedFlow, decay: float) -> None:
    """``average <- decay average + (1 - decay) flow``, weight by weight."""
    torch._foreach_lerp_(list(average.parameters()), list(flow.parameters()), 1 - decay)


class MatchingAgent(Agent):
    """Base of the matching agents: ODE proposals, a pool of judged samples, and one optimiser step.

    Its ``Config`` has ``lr`` and ``max_grad_norm``. It may have ``proposals``, ``model`` (online, the default) or
    ``reference`` (offline), and ``memory``, the rounds that the pool keeps (1 is the default, 0 = all).
    """

    persistent: ClassVar[tuple[str, ...]] = ("model", "optimizer", "pool")

    def kernel(self) -> Kernel:
        return Kernel("ode")

    def build(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr, fused=True)
        self.frozen = self.env.policy(self.reference, Kernel("ode"))
        self.pool: dict[str, Tensor] = {}

    def behaviour(self) -> FlowPolicy:
        offline = getattr(self.config, "proposals", "model") == "reference"
        return self.frozen if offline else self.policy

    def remember(self, rollout: Rollout) -> None:
        """Put a round into the pool: ``sample``, ``judgement`` and, where there is one, ``condition``."""
        new = {"sample": rollout.samples, "judgement": rollout.judgement}
        if rollout.condition is not None:
            new["condition"] = rollout.condition
        keep = getattr(self.config, "memory", 1) * len(rollout.judgement)
        pool = {k: torch.cat([self.pool[k], v]) if self.pool else v for k, v in new.items()}
        self.pool = {k: v[-keep:] for k, v in pool.items()}

    def draw(self, n: int, size: int) -> Tensor:
        """``size`` random indices below ``n``, with replacement."""
        return torch.randint(n, (size,), generator=self.generator, device=self.device)

    def points(
        self, rows: Tensor, *, shared: int = 1, window: tuple[float, float] = (0.0, 1.0)
    ) -> Points:
        """Points of the pool's rows at fresh noises and times.

        Args:
            rows: Indices into the pool, ``(B,)``.
            shared: So many rows in a row share their noise and time.
            window: Times are ``from <= t < to``, by the law of the reference's training, scaled.
        """
        x1, groups = self.pool["sample"][rows], len(rows) // shared
        condition = rows_of(self.pool.get("condition"), rows)
        x0 = torch.randn(groups, *x1.shape[1:], generator=self.generator, device=self.device)
        x0 = x0.repeat_interleave(shared, 0)
        u = stratified_uniform(groups, self.generator) ** self.env.task.train.early
        t = torch.lerp(u.new_tensor(window[0]), u.new_tensor(window[1]), u)
        t = t.repeat_interleave(shared)
        s = t.view(-1, *[1] * (x1.dim() - 1))
        return Points(torch.lerp(x0, x1, s), t, x1 - x0, x1, condition)

    def drift_beyond(self, horizon: float, n: int) -> Tensor:
        """Mean squared change of the velocity against the reference, at ``n`` points of the pool past ``horizon``.

        It keeps the end of the path, which decides no class any more, as the reference has it.
        """
        rows = self.draw(len(self.pool["sample"]), n)
        at = self.points(rows, window=(horizon, 1.0))
        return matching_error(
            self.velocity(self.model, at), self.velocity(self.reference, at)
        ).mean()

    def velocity(self, flow: Any, at: Points) -> Tensor:
        """``v(x_t, t)``, booked; only the model's carries gradients."""
        self.env.ledger.nfe += len(at.x)
        with torch.set_grad_enabled(flow is self.model):
            return flow.velocity(at.x, at.t, at.condition)

    def descend(self, loss: Tensor) -> float:
        """One optimiser step down the loss; returns its value."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach())
