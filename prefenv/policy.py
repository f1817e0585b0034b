"""A flow with a kernel, acting in the environment.

``FlowPolicy`` is to ``FlowVectorEnv`` what a Stable-Baselines3 policy is to its env: it maps observations to
actions.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefenv.device import make_generator
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow, time_grid
from prefenv.kernels import Kernel, Reduction, gaussian_log_prob
from prefenv.networks import VelocityAt
from prefenv.tasks.conditions import to_device

# States, the steps that start there, and the conditions, where there are any.
At = tuple[Tensor, Tensor, Tensor | None]


class FlowPolicy:
    """A flow that walks a grid of times from 0 to 1 with a kernel.

    Args:
        flow: The velocity field and its ODE.
        kernel: How a stochastic step is drawn.
        steps: Steps from noise to data.
        generator: Source of the steps' noise; None = a new one, seed 0, on the flow's device.
        shift: Of the grid, see ``time_grid``; 1 = equal steps.
    """

    def __init__(
        self,
        flow: RectifiedFlow,
        kernel: Kernel | None = None,
        steps: int = 16,
        generator: torch.Generator | None = None,
        shift: float = 1.0,
    ):
        self.flow = flow
        self.kernel = kernel or Kernel()
        self.steps, self.shift = steps, float(shift)
        self.generator = generator or make_generator(0, flow.device)
        self.times = time_grid(steps, shift)
        self.table = self.kernel.coefficients(self.times[:-1], self.times[1:])
        self._lengths = self.times.diff().tolist()
        self._rows = [tuple(float(c) for c in row) for row in zip(*self.table, strict=True)]
        self._forget()

    def _forget(self) -> None:
        # The frozen flow's velocities with what they were made from; its parameters; what ``hold`` holds.
        self._cache: tuple[Any, list[VelocityAt]] = (None, [])
        self._tables: tuple[Any, list[Any]] = (None, [])
        self._held: tuple[Any, list[VelocityAt]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_tables", "_held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def stochastic_steps(self) -> list[int]:
        """Indices of the steps that have a log-probability."""
        return [i for i, (_, _, std) in enumerate(self._rows) if std > 0]

    def std(self, i: int) -> float:
        """Standard deviation of step ``i``; 0 = deterministic."""
        return self._rows[i][2]

    @contextmanager
    def hold(self, x: Tensor, condition: Tensor | None = None) -> Generator[None, None, None]:
        """While open, the weights stay as they are: what depends on time alone is computed once, not per step."""
        outer = self._held
        with torch.no_grad():
            fields = None if condition is not None else self._frozen(x)
            self._held = (condition, fields or self._at(x, condition))
        try:
            yield
        finally:
            self._held = outer

    def velocity(self, x: Tensor, i: int, condition: Tensor | None = None) -> Tensor:
        """``v(x, t_i)`` without gradient. A frozen flow's time embeddings are computed once and kept."""
        with torch.no_grad():
            if self._held is not None and self._held[0] is condition:
                return self._held[1][i](x)
            fields = None if condition is not None else self._frozen(x)
            if fields is None:
                return self.flow.velocity(x, float(self.times[i]), condition)
            return fields[i](x)

    def _at(self, x: Tensor, condition: Tensor | None) -> list[VelocityAt]:
        return self.flow.field.at(self.times[:-1].to(x), condition)

    def _frozen(self, x: Tensor) -> list[VelocityAt] | None:
        """The velocities of a frozen flow, made once and kept; None for a flow that can be trained."""
        weights = self._weights()
        if any(p.requires_grad for p in weights):
            return None
        # Frozen weights change only by load_state_dict and averaging, which bump their versions.
        key = (self.flow, x.device, x.dtype, sum(p._version for p in weights))
        if self._cache[0] != key:
            self._cache = (key, self._at(x, None))
        return self._cache[1]

    def _weights(self) -> list[Tensor]:
        # Walking the modules would cost a tenth of a small step, so their tables of parameters are kept.
        if self._tables[0] is not self.flow:
            self._tables = (self.flow, [m._parameters for m in self.flow.modules()])
        return [p for table in self._tables[1] for p in table.values() if p is not None]

    def mean(self, x: Tensor, v: Tensor, i: int) -> Tensor:
        """Mean of step ``i`` from ``x`` with velocity ``v``; differentiable in both."""
        a, b, _ = self._rows[i]
        return torch.add(x, v, alpha=b) if a == 1.0 else torch.add(a * x, v, alpha=b)

    def act(
        self, x: Tensor, i: int, condition: Tensor | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The next state and its log-probability ``(B,)`` (None for a deterministic step)."""
        v = self.velocity(x, i, condition)
        _, b, std = self._rows[i]
        if deterministic or std == 0:
            return torch.add(x, v, alpha=self._lengths[i] if deterministic else b), None
        mean = self.mean(x, v, i)
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
        action = torch.add(mean, noise, alpha=std)
        return action, gaussian_log_prob(action, mean, x.new_tensor(std))

    def gaussian(
        self, x: Tensor, index: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means ``(B, *event_shape)`` and stds of steps ``index`` ``(B,)`` from ``x``, for training.

        The mean carries gradients to the parameters; it is the same function that ``act`` draws from.
        """
        v = self.flow.velocity(x, self.times.to(x)[index], condition)
        shape = (-1, *[1] * (x.dim() - 1))
        a, b, std = (c.to(x)[index].view(shape) for c in self.table)
        return a * x + b * v, std

    def log_prob(
        self,
        x: Tensor,
        index: Tensor,
        x_next: Tensor,
        condition: Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """Log-probability ``(B,)`` of steps ``index`` ``(B,)`` from ``x`` to ``x_next``, with gradient."""
        return gaussian_log_prob(x_next, *self.gaussian(x, index, condition), reduction)

    def predict(
        self,
        observation: dict[str, Any],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """As in Stable-Baselines3: actions for observations, and the (unused) state.

        Args:
            observation: ``x`` ``(D,)`` or ``(n, D)`` with ``t`` ``(1,)`` or ``(n, 1)``, and ``condition`` where
                there is one, numpy or torch.
            state: Unused.
            episode_start: Unused.
            deterministic: Take the ODE's step instead of the kernel's draw.

        Returns:
            Actions of the kind and shape of ``observation["x"]``, and ``state``.
        """
        given = observation["x"]
        weights = self._weights()
        device = weights[0].device if weights else self.flow.device
        x = torch.as_tensor(given, dtype=torch.float32, device=device)
        times = [float(t) for t in torch.aminmax(torch.as_tensor(observation["t"]))]
        i = last = self.steps
        if 0 <= times[0] <= times[1] <= 1:
            # The inverse of time_grid: how many steps lie behind a time.
            i, last = (round(self.shift * t / (1 - t + self.shift * t) * self.steps) for t in times)
        if i >= self.steps or last != i:
            raise ConfigError("predict wants rows at one common time of its grid, 0 <= t < 1")
        rows = x.reshape(-1, *self.flow.event_shape)
        condition = observation.get("condition")
        if condition is not None:
            condition = torch.as_tensor(condition).to(device)
            shape = (-1,) if not condition.is_floating_point() else (len(rows), -1)
            condition = condition.reshape(shape)
        action = self.act(rows, i, condition, deterministic)[0].reshape(x.shape)
        return (action.cpu().numpy() if isinstance(given, np.ndarray) else action), state

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Finished samples by the ODE, ``(n, *event_shape)``: deterministic in the noise."""
        x, condition = noise.to(self.flow.device), to_device(condition, self.flow.device)
        with self.hold(x, condition):
            for i in range(self.steps):
                x, _ = self.act(x, i, condition, deterministic=True)
        return x
