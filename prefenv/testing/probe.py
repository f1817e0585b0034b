"""Tasks small enough for checks and known exactly: two Gaussians in the plane, or one for each condition.

The reference is the exact velocity of the mixture plus a small network that is zero in the beginning, so nothing
has to be trained: model A makes both sides equally often, and whatever an agent changes is its own doing.
The conditional probe has a Gaussian around each condition's own centre, and its own preferred direction: together
they cancel, so what is learned of one condition is wrong for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefenv.envs import FlowVectorEnv
from prefenv.flow import RectifiedFlow
from prefenv.networks import VelocityField, VelocityMLP, needed
from prefenv.oracle import Oracle, ScriptedOracle
from prefenv.tasks import Classes, Task, Vector
from prefenv.tasks.conditions import Condition

Answer = Callable[..., Tensor]
THREE = Classes(3)


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

    def network(self) -> VelocityField:
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


class ConditionalVelocity(VelocityField):
    """The velocity of ``N(m_c, std^2 I)`` for each condition ``c``, plus a network that starts at zero.

    Args:
        task: Whose centres they are.
    """

    def __init__(self, task: ConditionalProbe):
        super().__init__((2,))
        self.task = task
        options = task.kind.network(False)
        self.change = VelocityMLP((2,), width=32, blocks=1, frequencies=4, **options)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        ProbeVelocity.evaluated += len(x)
        mean, s = self.task.centre(needed(condition)), t.reshape(-1, 1)
        var = self.task.std**2
        slope = (s * var - (1 - s)) / ((1 - s) ** 2 + s**2 * var)
        return mean + slope * (x - s * mean) + self.change(x, t, condition)


@dataclass(frozen=True)
class ConditionalProbe(Probe):
    """The conditional probe: a sample of condition ``c`` lies around ``m_c``; better is what lies left of it.

    The centres of classes are evenly spread on the unit circle; a vector is its own centre, within the square.

    Args:
        std: Standard deviation around the centre.
    """

    name: str = "conditional-probe"
    beta: float = 1.0
    condition: Condition | None = THREE
    std: float = 0.3

    @property
    def kind(self) -> Condition:
        """What the conditions are."""
        assert self.condition is not None
        return self.condition

    def network(self) -> VelocityField:
        return ConditionalVelocity(self)

    def centre(self, condition: Tensor) -> Tensor:
        """``m_c`` of conditions ``(n, ...)``, ``(n, 2)``."""
        if isinstance(self.condition, Vector):
            return condition
        angle = condition * (2 * torch.pi / self.kind.width)
        return torch.stack([angle.cos(), angle.sin()], -1)

    def data(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if isinstance(self.condition, Vector):
            condition = 2 * torch.rand(n, 2, generator=generator) - 1
        else:
            condition = torch.randint(self.kind.width, (n,), generator=generator)
        blur = self.std * torch.randn(n, 2, generator=generator)
        return self.centre(condition) + blur, condition

    def toward(self, samples: Tensor, condition: Tensor) -> Tensor:
        """Standard deviations by which samples ``(..., 2)`` lie left of their centre, as seen from the origin."""
        m = self.centre(condition)
        left = torch.stack([-m[..., 1], m[..., 0]], -1)
        left = left / left.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        return ((samples - m) * left).sum(-1) / self.std


class Toward(ScriptedOracle):
    """``r = toward``: then ``p*_c`` is ``N(m_c + left std / beta, std^2 I)``, ``KL = 1 / (2 beta^2)``."""

    conditional = True
    threshold = 0.0
    task: ConditionalProbe

    def score(self, samples: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.task.toward(samples, needed(condition))


def turn(sign: float = 1.0, std: float = 0.3) -> Answer:
    """``sigmoid(2 sign toward)`` of panels of the conditional probe of a ``std``, in (0, 1)."""

    def answer(panels: Tensor, condition: Tensor) -> Tensor:
        each = condition.repeat_interleave(panels.shape[1], 0)
        told = ConditionalProbe(std=std).toward(panels.flatten(0, 1), each)
        return (2 * sign * told).sigmoid().view(panels.shape[:2])

    return answer


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
        answer: Panels ``(m, K, 2)`` to judgements ``(m, K)``; of a task with conditions, panels and conditions.
        differentiable: Whether it gives reward gradients.

    Attributes:
        panels: Panels judged.
        queries: Samples judged.
        peeks: Times that the true score was read, which is not for agents.
    """

    def __init__(self, task: Task, answer: Answer = right, differentiable: bool = False):
        super().__init__(task)
        self.answer, self.differentiable = answer, differentiable
        self.conditional = task.condition is not None
        self.panels = self.queries = self.peeks = 0

    def judge(self, panels: Tensor, *condition: Tensor) -> Tensor:
        self.panels += len(panels)
        self.queries += panels.shape[0] * panels.shape[1]
        return self.answer(panels, *condition)

    def score(self, samples: Tensor, *condition: Tensor) -> Tensor:
        self.peeks += 1
        return self.answer(samples[:, None], *condition)[:, 0]


def probe_env(
    answer: Answer = right,
    num_envs: int = 32,
    *,
    differentiable: bool = False,
    panel_size: int = 4,
    steps: int = 8,
    task: Task | None = None,
    **settings: Any,
) -> tuple[FlowVectorEnv, ProbeOracle]:
    """The probe's env, with a fresh reference and a fresh oracle, and that oracle.

    Args:
        answer: What the oracle answers.
        num_envs: Rows.
        differentiable: Whether the oracle gives reward gradients.
        panel_size: Samples shown together.
        steps: Steps from noise to data.
        task: The probe, or (for answers to panels and conditions) the conditional one; None = the probe.
        settings: More of ``FlowVectorEnv``'s.
    """
    task = task or Probe()
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
