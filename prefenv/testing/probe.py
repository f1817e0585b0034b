"""A task small enough for checks and known exactly: two Gaussians in the plane, left and right.

The reference is the exact velocity of the mixture plus a small network that is zero in the beginning, so nothing
has to be trained: model A makes both sides equally often, and whatever an agent changes is its own doing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefenv.envs import FlowVectorEnv
from prefenv.flow import RectifiedFlow
from prefenv.networks import VelocityField, VelocityMLP
from prefenv.oracle import Oracle
from prefenv.tasks import Task

Answer = Callable[[Tensor], Tensor]


class ProbeVelocity(VelocityField):
    """The velocity of an even mixture of ``N(+-centre, std^2 I)``, plus a network that starts at zero.

    ``v = sum_k p(k | x_t) (m_k + (t s^2 - (1 - t)) / S_t (x - t m_k))``, ``S_t = (1 - t)^2 + t^2 s^2``.

    Args:
        centre: The right one's mean; the left one's is its mirror image.
        std: Standard deviation of each.

    Attributes:
        evaluated: Rows evaluated so far, by all instances together.
        watch: Called as ``watch(field, x, t, v)`` at every evaluation; returns the velocity to go on with.
    """

    evaluated: ClassVar[int] = 0
    watch: ClassVar[Callable[[VelocityField, Tensor, Tensor, Tensor], Tensor] | None] = None
    means: Tensor

    def __init__(self, centre: tuple[float, float] = (1.0, 0.0), std: float = 0.3):
        super().__init__((2,))
        mean = torch.tensor(centre)
        self.register_buffer("means", torch.stack([-mean, mean]), persistent=False)
        self.std = std
        self.change = VelocityMLP((2,), width=32, blocks=1, frequencies=4)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        ProbeVelocity.evaluated += len(x)
        s = t.reshape(-1, 1)
        var = (1 - s) ** 2 + (s * self.std) ** 2
        slope = (s * self.std**2 - (1 - s)) / var
        gap = x[:, None] - s[..., None] * self.means
        share = (-gap.square().sum(-1) / (2 * var)).softmax(-1)
        exact = (share[..., None] * (self.means + slope[..., None] * gap)).sum(1)
        v, watch = exact + self.change(x, t), ProbeVelocity.watch
        return v if watch is None else watch(self, x, t, v)


@dataclass(frozen=True)
class Probe(Task):
    """The probe: half of the samples lie around (-1, 0), half around (1, 0)."""

    name: str = "probe"
    default_oracle: str = ""
    classes: tuple[str, ...] = ("left", "right")

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (2,)

    def network(self) -> ProbeVelocity:
        return ProbeVelocity()

    def data(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        kind = torch.randint(2, (n,), generator=generator)
        x = 0.3 * torch.randn(n, 2, generator=generator)
        return x + torch.stack([2.0 * kind - 1, torch.zeros(n)], 1), kind

    def residual(self, x: Tensor) -> Tensor:
        return (x - torch.stack([x[:, 0].sign(), 0 * x[:, 1]], 1)).norm(dim=1)

    def classify(self, x: Tensor) -> Tensor:
        return (x[:, 0] > 0).long()

    def draw(self, axes: Any, x: Any, color: str) -> None:
        axes.scatter(*x, color=color)


def right(samples: Tensor) -> Tensor:
    """How far to the right, in (0, 1): ``sigmoid(4 x)``; at least 0.5 on the right-hand side."""
    return (4 * samples[..., 0]).sigmoid()


def left(samples: Tensor) -> Tensor:
    """The mirror image of ``right``."""
    return (-4 * samples[..., 0]).sigmoid()


def constant(value: float) -> Answer:
    """The same answer to everything."""
    return lambda panels: torch.full(panels.shape[:2], value)


class ProbeOracle(Oracle):
    """An oracle that remembers what it was asked.

    Args:
        task: The probe.
        answer: Panels ``(m, K, 2)`` to judgements ``(m, K)``.
        differentiable: Whether it gives reward gradients.

    Attributes:
        panels: Panels judged.
        queries: Samples judged.
        peeks: Times that the true score was read, which is not for agents.
    """

    def __init__(self, task: Task, answer: Answer = right, differentiable: bool = False):
        super().__init__(task)
        self.answer, self.differentiable = answer, differentiable
        self.panels = self.queries = self.peeks = 0

    def judge(self, panels: Tensor) -> Tensor:
        self.panels += len(panels)
        self.queries += panels.shape[0] * panels.shape[1]
        return self.answer(panels)

    def score(self, samples: Tensor) -> Tensor:
        self.peeks += 1
        return self.answer(samples[:, None])[:, 0]


def probe_env(
    answer: Answer = right,
    num_envs: int = 32,
    *,
    differentiable: bool = False,
    panel_size: int = 4,
    steps: int = 8,
    **settings: Any,
) -> tuple[FlowVectorEnv, ProbeOracle]:
    """The probe's env, with a fresh reference and a fresh oracle, and that oracle.

    Args:
        answer: What the oracle answers.
        num_envs: Rows.
        differentiable: Whether the oracle gives reward gradients.
        panel_size: Samples shown together.
        steps: Steps from noise to data.
        settings: More of ``FlowVectorEnv``'s.
    """
    task = Probe()
    oracle = ProbeOracle(task, answer, differentiable)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = RectifiedFlow(task.network())
    env = FlowVectorEnv(
        num_envs,
        task=task,
        oracle=oracle,
        reference=reference,
        panel_size=panel_size,
        steps=steps,
        device="cpu",
        **settings,
    )
    return env, oracle
