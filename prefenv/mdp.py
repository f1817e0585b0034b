"""The decision process in tensors, without Gymnasium: begin, advance, judge.

The MDP of DDPO (Black et al. 2023, arXiv 2305.13301) in the direction of a flow: the state is a point on the
path from noise to a sample, the action is the next point, ``x <- action``. After ``steps`` steps the sample is
finished and the reward is the oracle's judgement. Agents use this core; ``prefenv.envs`` gives it
Gymnasium's face.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefenv.checkpoints import load_checkpoint
from prefenv.device import make_generator, resolve_device
from prefenv.errors import ConfigError, NonFiniteError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.oracle import Desk, Ledger, Oracle
from prefenv.policy import FlowPolicy
from prefenv.registry import make_oracle, make_task
from prefenv.tasks import Task
from prefenv.tasks.conditions import panels_of, to_device

Control = Literal["state", "noise"]


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a setting that is none of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {allowed}, not {value!r}")


class FlowMDP:
    """Many rows at once, all at the same time ``t``; rows that finish together form the panels.

    Args:
        num_envs: Rows; a multiple of ``panel_size``.
        task: Name of the task, or the task itself.
        oracle: Name of the oracle (settings may follow, ``s-curve:answer=choose``) or an ``Oracle``; None = the
            task's default.
        panel_size: Samples shown together; ``panel_size`` rows in a row are one panel.
        steps: Steps from noise to data.
        control: ``state`` = the action is the next state; ``noise`` = one step, the action is the initial noise
            and the reference carries it to a sample.
        kernel: Kernel of ``reference``, by name or itself.
        kl_coef: Cost of leaving the reference: adds ``-kl_coef (|a - m_ref|^2 / (2 std^2) - D/2)`` to each
            step's reward, in ``noise`` control with ``m_ref = 0, std = 1``. Needs std > 0 at every step.
        max_queries: Budget of judged samples; None = no limit.
        checkpoint: Reference: a file, or the name of one of ours; None = the task's own.
        reference: A flow to use instead of a checkpoint.
        device: Where the reference and the states live.

    Attributes:
        reference: Model A as a policy.
        ledger: What was spent.
        desk: The door to the oracle.
        judgement: Judgements of the last finished samples, ``(num_envs,)``, NaN = no answer.
        gradient: Their reward gradient ``(num_envs, *event_shape)``, where it was asked for.
        times: The grid of times of an episode, ``(steps + 1,)``, from 0 to 1.
        clipped: Coordinates of each row clipped to the task's bound in this episode, ``(num_envs,)``.
        noise: Initial noises ``(n, *event_shape)`` of the samples last put before the oracle; None = not known.
        condition: Of each row, ``(num_envs, ...)``, one for each panel; None = the task has none.

    Raises:
        ConfigError: Settings that do not fit together.
        UnknownNameError: Unknown task, oracle or kernel.
        CheckpointError: The reference cannot be loaded.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: str | Task = "shapes",
        oracle: str | Oracle | None = None,
        panel_size: int = 1,
        steps: int = 16,
        control: Control = "state",
        kernel: str | Kernel = "flow-sde",
        kl_coef: float = 0.0,
        max_queries: int | None = None,
        checkpoint: str | None = None,
        reference: RectifiedFlow | None = None,
        device: str | torch.device = "auto",
    ):
        if panel_size < 1 or num_envs < 1 or num_envs % panel_size:
            raise ConfigError(
                f"num_envs={num_envs} must be a positive multiple of panel_size={panel_size}: "
                "rows that finish together form the panels"
            )
        one_of("control", control, ("state", "noise"))
        if not 0 <= kl_coef < float("inf"):
            raise ConfigError(f"kl_coef must be finite and at least 0, not {kl_coef}")
        self.device = resolve_device(device)
        self.task: Task = make_task(task) if isinstance(task, str) else task
        self.num_envs, self.panel_size, self.steps = num_envs, panel_size, steps
        self.control, self.kl_coef = control, float(kl_coef)

        event = self.task.event_shape
        self._shapes: list[tuple[int, ...]] = [(num_envs, *event), (num_envs, math.prod(event))]
        if num_envs == 1:
            self._shapes += [event, (math.prod(event),)]

        flow = load_checkpoint(checkpoint, self.task).flow if reference is None else reference
        if flow.event_shape != event:
            raise ConfigError(
                f"the reference makes samples of shape {flow.event_shape}, task {self.task.name!r} has {event}"
            )
        kernel = Kernel(kernel) if isinstance(kernel, str) else kernel
        self._generator = make_generator(0, self.device)
        self.reference = self.policy(flow.frozen().to(self.device), kernel)
        self.times = self.reference.times
        if self.kl_coef and control == "state" and len(self.reference.stochastic_steps) < steps:
            raise ConfigError(
                "kl_coef needs a kernel with noise at every step (flow-sde, memoryless or constant, full "
                "window): the path KL to a deterministic step is infinite"
            )

        if oracle is None or isinstance(oracle, str):
            oracle = make_oracle(oracle or self.task.default_oracle, self.task)
        if not isinstance(oracle, Oracle):
            raise ConfigError(f"oracle must be a name or an Oracle, not {oracle!r}")
        if oracle.panel_size not in (None, panel_size):
            raise ConfigError(
                f"this oracle judges panels of {oracle.panel_size}: set panel_size={oracle.panel_size}, not "
                f"{panel_size}"
            )
        has = self.task.condition is not None
        if (oracle.conditional and not has) or (oracle.unconditional and has):
            need = (
                "judges samples of a condition" if oracle.conditional else "does not see conditions"
            )
            raise ConfigError(
                f"this oracle {need}, and task {self.task.name!r} has {'some' if has else 'none'}: take another"
            )
        self.ledger = Ledger(max_queries)
        self.desk = Desk(oracle, self.ledger)
        self._x: Tensor | None = None
        self._i = 0
        self.judgement = torch.full((num_envs,), torch.nan, dtype=torch.float32, device=self.device)
        self.gradient: Tensor | None = None
        self.noise: Tensor | None = None
        self._start: Tensor | None = None
        self.condition: Tensor | None = None
        self.condition_generator = make_generator(0, stream="conditions")
        self.clipped = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def policy(
        self,
        flow: RectifiedFlow,
        kernel: Kernel | None = None,
        generator: torch.Generator | None = None,
    ) -> FlowPolicy:
        """A flow as a policy on this env's grid of times."""
        return FlowPolicy(flow, kernel, self.steps, generator, self.task.shift)

    @torch.no_grad()
    def begin(self, noise: Any = None, condition: Any = None) -> tuple[Tensor, Tensor | None]:
        """Start new samples.

        Args:
            noise: Initial noises ``(num_envs, *event_shape)`` or ``(num_envs, D)``; None = drawn from the env's
                generator.
            condition: Of each row, ``(num_envs, ...)``, or one for all; None = drawn, one for each panel.

        Returns:
            States ``(num_envs, *event_shape)`` and conditions (None: this task has none).

        Raises:
            ConfigError: The noise has another shape, or the conditions are not the task's, one for each panel.
            NonFiniteError: The noise holds NaN or infinity.
        """
        if noise is None:
            noise = torch.randn(self._shapes[0], generator=self._generator, device=self.device)
        state, _ = self._clip(self._batch(noise, "noise"), "the noise")
        rows = self.num_envs, self.panel_size
        asked = self.task.conditions(condition, *rows, self.condition_generator)
        self.condition, self._x = to_device(asked, self.device), state
        self._start, self._i = self._x, 0
        self.clipped = torch.zeros_like(self.clipped)
        self.judgement = torch.full_like(self.judgement, torch.nan)
        return self._x, self.condition

    @torch.no_grad()
    def advance(self, action: Any, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Take a step. An error leaves state and ledger as they were, so that the next valid step goes on.

        Args:
            action: Next states ``(num_envs, *event_shape)`` or ``(num_envs, D)``; in ``noise`` control the
                initial noises.
            gradient: Ask for the reward gradient of what is finished, with its judgement: samples are then judged
                one by one.

        Returns:
            The new states ``(num_envs, *event_shape)`` and rewards ``(num_envs,)``.

        Raises:
            NonFiniteError: The action holds NaN or infinity, or the reference's network answered so.
            BudgetSpentError: The samples are finished and the oracle's budget is not enough.
            ConfigError: No sample is under way, or the action has another shape.
        """
        if self._x is None:
            raise ConfigError("call reset() before step(): no sample is under way")
        action = self._batch(action, "action")
        state, clipped = self._clip(action, "the action")
        reward = self._kl_reward(action) if self.kl_coef else action.new_zeros(self.num_envs)
        nfe = self.num_envs
        if self.control == "noise":
            self._start, sample = state, self.reference.sample(state, self.condition)
            state, outside = self._clip(sample, "the reference's sample (are its weights damaged?)")
            clipped, nfe = clipped + outside, nfe * self.steps
        elif self.kl_coef:
            nfe *= 2
        last = self.control == "noise" or self._i + 1 == self.steps
        if last:
            if gradient:
                self.noise = self._start
                self.judgement, self.gradient = self.desk.gradient(state, self.condition)
            else:
                self.gradient = None
                self.judgement = self.judge(state, self._start, self.condition)
            reward = reward + self.judgement.masked_fill(self.judgement.isnan(), 0.0)
        self.ledger.nfe += nfe
        self.clipped = self.clipped + clipped
        self._x, self._i = (None if last else state), self._i + 1
        return state, reward

    def judge(
        self, samples: Tensor, noise: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Ask the oracle about any samples ``(m K, *event_shape)``, booked like all questions; ``(m K,)``.

        Args:
            samples: Finished samples.
            noise: What they were made from, of the same shape, where that is known.
            condition: Of each sample, one for each panel, where the task has conditions.
        """
        if len(samples) % self.panel_size:
            raise ConfigError(
                f"{len(samples)} samples do not fill panels of {self.panel_size}; give a multiple"
            )
        if (condition is None) != (self.task.condition is None):
            need = "has none" if self.task.condition is None else "wants one for each sample"
            raise ConfigError(f"about the condition: task {self.task.name!r} {need}")
        asked = panels_of(condition, self.panel_size)
        self.noise = noise
        return self.desk.judge(samples.unflatten(0, (-1, self.panel_size)), asked).flatten()

    def seed_noise(self, seed: int) -> None:
        """Seed the generators of initial noises and, apart from them, of ``reference``'s steps and conditions."""
        for generator, stream in (
            (self._generator, "env"),
            (self.reference.generator, "steps"),
            (self.condition_generator, "conditions"),
        ):
            generator.set_state(make_generator(seed, generator.device, stream).get_state())

    def _batch(self, values: Any, what: str) -> Tensor:
        """Values as float32 rows ``(num_envs, *event_shape)`` on the device."""
        if not isinstance(values, Tensor):
            values = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        if (given := tuple(values.shape)) not in self._shapes:
            raise ConfigError(f"{what} has shape {given}, expected {self._shapes[1]}")
        return values.to(self.device, torch.float32).reshape(self._shapes[0])

    def _clip(self, x: Tensor, what: str) -> tuple[Tensor, Tensor | int]:
        """A copy inside the task's bound, and how many coordinates of each row lay outside."""
        bound = self.task.bound
        extent = float(x.abs().amax())
        if not extent < float("inf"):
            raise NonFiniteError(f"{what} holds NaN or infinity; the state was not changed")
        outside = (x.abs() > bound).flatten(1).sum(1) if extent > bound else 0
        return x.clamp(-bound, bound), outside

    def _kl_reward(self, action: Tensor) -> Tensor:
        """``-kl_coef (|a - m_ref|^2 / (2 std^2) - D/2)`` of each row, for the action as it was given."""
        if self.control == "noise":
            gap, std = action, 1.0
        else:
            assert self._x is not None
            v = self.reference.velocity(self._x, self._i, self.condition)
            gap = action - self.reference.mean(self._x, v, self._i)
            std = self.reference.std(self._i)
        square = gap.flatten(1).square()
        cost = self.kl_coef * (square.sum(1) / (2 * std**2) - square.shape[1] / 2)
        if not bool(cost.isfinite().all()):
            raise NonFiniteError(
                "the KL to the reference is not finite: the reference's network answered NaN, or the action "
                "is far outside its bounds; the state was not changed"
            )
        return -cost
