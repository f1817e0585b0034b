"""A flow with a kernel, acting in the environment; and what it did there.

``FlowPolicy`` is to ``FlowVectorEnv`` what a Stable-Baselines3 policy is to its env: it maps observations to
actions. ``collect`` plays one round and returns a ``Rollout``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefenv.device import make_generator
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel, Reduction, gaussian_log_prob

if TYPE_CHECKING:
    from prefenv.envs import FlowVectorEnv


class FlowPolicy:
    """A flow that walks the grid ``t_i = i / steps`` with a kernel.

    Args:
        flow: The velocity field and its ODE.
        kernel: How a stochastic step is drawn.
        steps: Steps from noise to data.
        generator: Source of the steps' noise; None = a new one, seed 0, on the flow's device.
    """

    def __init__(
        self,
        flow: RectifiedFlow,
        kernel: Kernel | None = None,
        steps: int = 16,
        generator: torch.Generator | None = None,
    ):
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, not {steps}")
        self.flow = flow
        self.kernel = kernel or Kernel()
        self.steps = steps
        self.generator = generator or make_generator(0, flow.device)
        self.times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        self.table = self.kernel.coefficients(self.times[:-1], self.times[1:])
        self._rows = [tuple(float(c) for c in row) for row in zip(*self.table, strict=True)]
        self._cache: tuple[Any, Any] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": (None, None)}

    @property
    def stochastic_steps(self) -> list[int]:
        """Indices of the steps that have a log-probability."""
        return [i for i, (_, _, std) in enumerate(self._rows) if std > 0]

    def std(self, i: int) -> float:
        """Standard deviation of step ``i``; 0 = deterministic."""
        return self._rows[i][2]

    def velocity(self, x: Tensor, i: int, condition: Tensor | None = None) -> Tensor:
        """``v(x, t_i)`` without gradient. A frozen flow's time embeddings are computed once and kept."""
        with torch.no_grad():
            if condition is not None or any(p.requires_grad for p in self.flow.parameters()):
                return self.flow.velocity(x, float(self.times[i]), condition)
            # Frozen weights change only by load_state_dict, which bumps their versions.
            key = (self.flow, self.flow.device, sum(p._version for p in self.flow.parameters()))
            if self._cache[0] != key:
                times = self.times[:-1].to(self.flow.device, torch.float32)
                self._cache = (key, self.flow.field.at(times))
            return self._cache[1][i](x)

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
            return torch.add(x, v, alpha=1.0 / self.steps if deterministic else b), None
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
            observation: ``x`` ``(D,)`` or ``(n, D)`` with ``t`` ``(1,)`` or ``(n, 1)``, numpy or torch.
            state: Unused.
            episode_start: Unused.
            deterministic: Take the ODE's step instead of the kernel's draw.

        Returns:
            Actions of the kind and shape of ``observation["x"]``, and ``state``.
        """
        given = observation["x"]
        x = torch.as_tensor(given, dtype=torch.float32, device=self.flow.device)
        t = torch.as_tensor(observation["t"]).reshape(-1)
        index = (t * self.steps).round().long()
        i = int(index[0])
        if not 0 <= i < self.steps or bool((index != i).any()):
            raise ConfigError("predict wants rows at one common time t = i / steps, 0 <= t < 1")
        condition = observation.get("condition")
        if condition is not None:
            condition = torch.as_tensor(condition).reshape(-1).to(self.flow.device)
        rows = x.reshape(-1, *self.flow.event_shape)
        action = self.act(rows, i, condition, deterministic)[0].reshape(x.shape)
        return (action.cpu().numpy() if isinstance(given, np.ndarray) else action), state

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Finished samples by the ODE, ``(n, *event_shape)``: deterministic in the noise."""
        x = noise.to(self.flow.device)
        for i in range(self.steps):
            x, _ = self.act(x, i, condition, deterministic=True)
        return x


class Transitions(NamedTuple):
    """Steps of a rollout as one batch of N: states, next states, step index, log-probability, row."""

    x: Tensor
    x_next: Tensor
    index: Tensor
    log_prob: Tensor
    row: Tensor


@dataclass
class Rollout:
    """One round: every row is one sample, ``panel_size`` rows in a row are one panel.

    Args:
        path: States ``(steps + 1, B, *event_shape)``; ``path[0]`` is the noise.
        log_prob: ``(steps, B)``, summed over dimensions; 0 where the step is deterministic.
        judgement: ``(B,)``, NaN = no answer.
        reward: Return of each row, ``(B,)``: judgements (0 for no answer) and the env's KL cost.
        panel_size: Samples of a panel.
        condition: Class of each row, or None.
    """

    path: Tensor
    log_prob: Tensor
    judgement: Tensor
    reward: Tensor
    panel_size: int
    condition: Tensor | None = None

    @property
    def noise(self) -> Tensor:
        """``(B, *event_shape)``."""
        return self.path[0]

    @property
    def samples(self) -> Tensor:
        """Finished samples, ``(B, *event_shape)``."""
        return self.path[-1]

    def transitions(self, steps: list[int]) -> Transitions:
        """The given steps of all rows as one flat batch, step by step."""
        index = torch.tensor(steps, device=self.path.device)
        rows = self.path.shape[1]
        return Transitions(
            self.path[index].flatten(0, 1),
            self.path[index + 1].flatten(0, 1),
            index.repeat_interleave(rows),
            self.log_prob[index].flatten(),
            torch.arange(rows, device=index.device).repeat(len(steps)),
        )

    def panels(self, values: Tensor) -> Tensor:
        """Rows ``(B, ...)`` grouped as panels ``(m, K, ...)``."""
        return values.unflatten(0, (-1, self.panel_size))


def collect(env: FlowVectorEnv, policy: FlowPolicy) -> Rollout:
    """Play one round with a policy: from fresh noises to judged samples.

    Args:
        env: The environment, with ``control="state"``.
        policy: The generator; its steps must be the env's.
    """
    if policy.steps != env.steps:
        raise ConfigError(f"the policy takes {policy.steps} steps, the environment {env.steps}")
    x, condition = env.begin()
    path, log_probs, reward = [x], [], x.new_zeros(len(x))
    for i in range(policy.steps):
        action, log_prob = policy.act(x, i, condition)
        x, step_reward = env.advance(action)
        path.append(x)
        log_probs.append(x.new_zeros(len(x)) if log_prob is None else log_prob)
        reward = reward + step_reward
    return Rollout(
        torch.stack(path),
        torch.stack(log_probs),
        env.judgement.clone(),
        reward,
        env.panel_size,
        condition,
    )
