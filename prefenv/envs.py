"""The environment: the state is a point on the path from noise to a shape, the action is the next point.

The MDP of DDPO (Black et al. 2023, arXiv 2305.13301) in the direction of a flow. Observation
``Dict(x: Box(D,), t: Box(1,))``; action ``Box(D,)``; dynamics ``x <- action``; after ``steps`` steps the sample
is finished, ``terminated=True``, and the reward is the oracle's judgement. ``FlowVectorEnv`` is the real one
(batched, torch inside); ``FlowEnv`` is its one-row view.
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from prefenv import plotting
from prefenv.checkpoints import load_checkpoint
from prefenv.device import make_generator, resolve_device
from prefenv.errors import ConfigError, NonFiniteError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.oracle import Desk, Ledger, Oracle
from prefenv.policy import FlowPolicy
from prefenv.registry import make_oracle, make_task

Control = Literal["state", "noise"]


class FlowVectorEnv(VectorEnv):
    """Many rows at once, all at the same time ``t``; rows that finish together form the panels.

    Args:
        num_envs: Rows; a multiple of ``panel_size``.
        task: Name of the task, or the task itself.
        oracle: Name of the oracle (settings may follow, ``s-curve:answer=choose``) or an ``Oracle``; None = the
            task's default.
        panel_size: Samples shown together.
        steps: Steps from noise to data.
        control: ``state`` = the action is the next state; ``noise`` = one step, the action is the initial noise
            and the reference carries it to a sample.
        kernel: Kernel of ``reference``, by name or itself.
        kl_coef: Cost of leaving the reference: adds ``-kl_coef (|a - m_ref|^2 / (2 std^2) - D/2)`` to each
            step's reward, in ``noise`` control with ``m_ref = 0, std = 1``. Needs std > 0 at every step.
        max_queries: Budget of judged samples; None = no limit.
        checkpoint: Reference file; None = the task's own.
        reference: A flow to use instead of a checkpoint.
        device: Where the reference and the states live.
        array: ``numpy``, or ``torch`` to stay on the device.
        render_mode: ``rgb_array``, ``human``, ``ansi`` or None.

    Raises:
        ConfigError: Settings that do not fit together.
        UnknownNameError: Unknown task, oracle or kernel.
        CheckpointError: The reference cannot be loaded.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array", "human", "ansi"],
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: Any = "shapes",
        oracle: str | Oracle | None = None,
        panel_size: int = 1,
        steps: int = 16,
        control: Control = "state",
        kernel: str | Kernel = "flow-sde",
        kl_coef: float = 0.0,
        max_queries: int | None = None,
        checkpoint: str | None = None,
        reference: RectifiedFlow | None = None,
        device: str = "auto",
        array: Literal["numpy", "torch"] = "numpy",
        render_mode: str | None = None,
    ):
        self.task = make_task(task) if isinstance(task, str) else task
        self.device = resolve_device(device)
        self.num_envs, self.panel_size, self.steps = num_envs, panel_size, steps
        self.control, self.kl_coef, self.array = control, float(kl_coef), array
        self.render_mode = render_mode
        self._check(num_envs, panel_size)
        flow = load_checkpoint(checkpoint, self.task).flow if reference is None else reference
        kernel = Kernel(kernel) if isinstance(kernel, str) else kernel
        self._generator = make_generator(0, self.device)
        self.reference = FlowPolicy(flow.frozen().to(self.device), kernel, steps, self._generator)
        deterministic = len(self.reference.stochastic_steps) < steps
        if self.kl_coef and control == "state" and deterministic:
            raise ConfigError(
                "kl_coef needs a kernel with noise at every step (flow-sde, memoryless or constant, full "
                "window): the path KL to a deterministic step is infinite"
            )
        if not isinstance(oracle, Oracle):
            oracle = make_oracle(oracle or self.task.default_oracle, self.task)
        self.ledger = Ledger(max_queries)
        self.desk = Desk(oracle, self.ledger)
        self._spaces()
        self._x: Tensor | None = None
        self._i = 0
        self._shown: Tensor | None = None
        self._window: plotting.Window | None = None
        self.judgement = torch.full((num_envs,), torch.nan, device=self.device)
        self.clipped = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def _check(self, num_envs: int, panel_size: int) -> None:
        if panel_size < 1 or num_envs < 1 or num_envs % panel_size:
            raise ConfigError(
                f"num_envs={num_envs} must be a positive multiple of panel_size={panel_size}: "
                "rows that finish together form the panels"
            )
        for name, value, allowed in (
            ("control", self.control, ("state", "noise")),
            ("array", self.array, ("numpy", "torch")),
            ("render_mode", self.render_mode, (None, *self.metadata["render_modes"])),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, not {value!r}")
        if not 0 <= self.kl_coef < float("inf"):
            raise ConfigError(f"kl_coef must be finite and at least 0, not {self.kl_coef}")

    def _spaces(self) -> None:
        dim, bound = int(np.prod(self.task.event_shape)), float(self.task.bound)
        state = Box(-bound, bound, (dim,), np.float32)
        self.single_observation_space = Dict({"x": state, "t": Box(0.0, 1.0, (1,), np.float32)})
        self.single_action_space = Box(-bound, bound, (dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    # The core, in tensors: begin, advance, judge. Agents use it; reset and step are its Gymnasium face.

    def begin(self, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Start new samples.

        Args:
            noise: Initial noises ``(num_envs, *event_shape)``; None = drawn from the env's generator.

        Returns:
            States ``(num_envs, *event_shape)`` and conditions (None: this task has none).
        """
        shape = (self.num_envs, *self.task.event_shape)
        if noise is None:
            noise = torch.randn(shape, generator=self._generator, device=self.device)
        else:
            noise = torch.as_tensor(noise, dtype=torch.float32, device=self.device).clone()
            if noise.numel() != self.num_envs * int(np.prod(self.task.event_shape)):
                raise ConfigError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        bound = self.task.bound
        self._x, self._i = noise.reshape(shape).clamp(-bound, bound), 0
        self.clipped = torch.zeros_like(self.clipped)
        self.judgement = torch.full_like(self.judgement, torch.nan)
        return self._x, None

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Take the action ``(num_envs, *event_shape)``; returns the new states and rewards ``(num_envs,)``.

        Raises:
            NonFiniteError: The action holds NaN or infinity; the state is as it was.
            BudgetSpentError: The samples are finished and the oracle's budget is not enough.
            ConfigError: No sample is under way.
        """
        if self._x is None:
            raise ConfigError("call reset() before step(): no sample is under way")
        action = action.to(self.device, torch.float32).reshape(self._x.shape)
        bound = self.task.bound
        extent = float(action.abs().amax())
        if not extent < float("inf"):
            raise NonFiniteError("the action holds NaN or infinity; the state was not changed")
        reward = self._kl_reward(action) if self.kl_coef else action.new_zeros(self.num_envs)
        outside = (action.abs() > bound).flatten(1).sum(1) if extent > bound else 0
        state = action.clamp(-bound, bound)
        last = self.control == "noise" or self._i + 1 == self.steps
        self.ledger.nfe += self.num_envs * (self.steps if self.control == "noise" else 1)
        if last:
            if self.control == "noise":
                state = self.reference.sample(state)
            self.judgement = self.judge(state)
            reward = reward + self.judgement.nan_to_num(0.0)
        self.clipped = self.clipped + outside
        self._x, self._i = (None if last else state), self._i + 1
        return state, reward

    def judge(self, samples: Tensor) -> Tensor:
        """Ask the oracle about any samples ``(m K, *event_shape)``, booked like all questions; ``(m K,)``."""
        if len(samples) % self.panel_size:
            raise ConfigError(
                f"{len(samples)} samples do not fill panels of {self.panel_size}; give a multiple"
            )
        return self.desk.judge(samples.unflatten(0, (-1, self.panel_size))).flatten()

    def _kl_reward(self, action: Tensor) -> Tensor:
        if self.control == "noise":
            gap, std = action, 1.0
        else:
            assert self._x is not None
            v = self.reference.velocity(self._x, self._i)
            self.ledger.nfe += self.num_envs
            gap, std = action - self.reference.mean(self._x, v, self._i), self.reference.std(self._i)
        square = gap.flatten(1).square()
        return -self.kl_coef * (square.sum(1) / (2 * std**2) - square.shape[1] / 2)

    # The Gymnasium face.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start new samples; ``options={"noise": (num_envs, D)}`` gives shared-noise comparisons."""
        if seed is not None or self._np_random is None:
            super().reset(seed=seed)
            self.seed_noise(int(self.np_random.integers(2**63 - 1)))
        x, _ = self.begin((options or {}).get("noise"))
        self._show(x)
        return self._observation(x, 0), {}

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Move every row to its action; finished rows start anew in the same step (SAME_STEP).

        Returns:
            Observations, rewards, terminated, truncated (never), and info: ``clipped`` (coordinates of each row
            clipped so far), and at the end ``judged`` (rows that got an answer), ``final_obs`` and ``final_info``.
        """
        x, reward = self.advance(torch.as_tensor(actions))
        self._show(x)
        done = self._x is None
        info: dict[str, Any] = {"clipped": self._face(self.clipped.clone())}
        observation = self._observation(x, self.steps if done else self._i)
        if done:
            info["judged"] = self._face(~self.judgement.isnan())
            info["final_info"] = {k: info[k] for k in ("judged", "clipped")}
            info["final_obs"] = self._rows(observation)
            info["_final_obs"] = info["_final_info"] = np.ones(self.num_envs, bool)
            observation = self._observation(self.begin()[0], 0)
        ended = torch.full((self.num_envs,), done, device=self.device)
        face = self._face
        return observation, face(reward.double()), face(ended), face(torch.zeros_like(ended)), info

    def seed_noise(self, seed: int) -> None:
        """Seed the generator of initial noises and of ``reference``'s steps."""
        self._generator.manual_seed(seed)

    def _face(self, values: Tensor) -> Any:
        return values if self.array == "torch" else values.cpu().numpy()

    def _observation(self, x: Tensor, i: int) -> dict[str, Any]:
        t = torch.full((self.num_envs, 1), i / self.steps, device=self.device)
        return {"x": self._face(x.flatten(1).clone()), "t": self._face(t)}

    def _rows(self, observation: dict[str, Any]) -> Any:
        """Final observations: a dict of tensors, or Gymnasium's object array with one dict per row."""
        if self.array == "torch":
            return observation
        rows = np.empty(self.num_envs, dtype=object)
        rows[:] = [
            dict(zip(observation, row, strict=True))
            for row in zip(*observation.values(), strict=True)
        ]
        return rows

    def _show(self, x: Tensor) -> None:
        if self.render_mode is not None:
            self._shown = x
        if self.render_mode == "human":
            self._window = self._window or plotting.Window()
            self._window.draw(self.task, x[:16].cpu().numpy())

    def render(self) -> Any:
        """Pictures of the rows as they are now; a finished sample is shown until the next step.

        Returns:
            ``rgb_array``: a tuple of ``(H, W, 3)`` uint8, one per row; ``ansi``: a tuple of strings; else None.
        """
        if self.render_mode in (None, "human"):
            return None
        if self._shown is None:
            raise ConfigError("call reset() before render(): there is nothing to show")
        draw = plotting.frame if self.render_mode == "rgb_array" else plotting.text
        return tuple(draw(self.task, row) for row in self._shown.cpu().numpy())

    def close_extras(self, **kwargs: Any) -> None:
        """Close the window, if one is open."""
        if self._window is not None:
            self._window.close()
            self._window = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_window": None}


class FlowEnv(gym.Env):
    """One row of ``FlowVectorEnv`` as a plain ``gymnasium.Env``: same settings, same dynamics, no autoreset.

    Args:
        options: Any of ``FlowVectorEnv``'s but ``num_envs``, ``panel_size`` and ``array``.
    """

    metadata: dict[str, Any] = {
        "render_modes": FlowVectorEnv.metadata["render_modes"],
        "render_fps": FlowVectorEnv.metadata["render_fps"],
    }

    def __init__(self, render_mode: str | None = None, **options: Any):
        for name in ("num_envs", "panel_size", "array"):
            if options.pop(name, None) not in (None, 1, "numpy"):
                raise ConfigError(f"{name} belongs to the batched env: use gym.make_vec instead")
        self._vec = FlowVectorEnv(1, render_mode=render_mode, **options)
        self.render_mode = render_mode
        self.observation_space = self._vec.single_observation_space
        self.action_space = self._vec.single_action_space

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._vec, name)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start a new sample; ``options={"noise": (D,)}`` sets its noise."""
        if seed is not None or self._np_random is None:
            super().reset(seed=seed)
            self._vec.seed_noise(int(self.np_random.integers(2**63 - 1)))
        x, _ = self._vec.begin((options or {}).get("noise"))
        self._vec._show(x)
        return self._row(x, 0), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move to the action; ``info`` holds ``clipped`` and at the end ``judged``."""
        vec = self._vec
        x, reward = vec.advance(torch.as_tensor(action))
        vec._show(x)
        done = vec._x is None
        info: dict[str, Any] = {"clipped": int(vec.clipped[0])}
        if done:
            info["judged"] = not bool(vec.judgement.isnan())
        return self._row(x, vec.steps if done else vec._i), float(reward[0]), done, False, info

    def _row(self, x: Tensor, i: int) -> dict[str, np.ndarray]:
        return {k: v[0] for k, v in self._vec._observation(x, i).items()}

    def render(self) -> Any:
        """One ``(H, W, 3)`` uint8 picture, one string, or None."""
        frames = self._vec.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Close the window, if one is open."""
        self._vec.close()
