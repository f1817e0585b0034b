"""The environment: the state is a point on the path from noise to a shape, the action is the next point.

``FlowVectorEnv`` is the real one (batched, torch inside); ``FlowEnv`` is its one-row view. Both are Gymnasium's
face of ``prefenv.mdp``. Observation ``Dict(x: Box(D,), t: Box(1,)[, condition])``, the condition a class or a
vector where the task has one; action ``Box(D,)``; dynamics ``x <- action``; after ``steps`` steps the sample is
finished, ``terminated=True``, and the reward is the oracle's judgement.
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
from prefenv.errors import ConfigError
from prefenv.mdp import Control, FlowMDP, one_of

__all__ = ["Control", "FlowEnv", "FlowVectorEnv"]
RENDER_MODES = ["rgb_array", "human", "ansi"]


def _start(options: dict[str, Any] | None) -> tuple[Any, Any]:
    """The initial noises and the conditions that reset's options ask for; None = none."""
    options = dict(options or {})
    start = options.pop("noise", None), options.pop("condition", None)
    if options:
        raise ConfigError(
            f"unknown reset option {next(iter(options))!r}: there are 'noise' and, where the task has conditions, "
            "'condition' (all rows start together)"
        )
    return start


class FlowVectorEnv(FlowMDP, VectorEnv):
    """Many rows at once, all at the same time ``t``; rows that finish together form the panels.

    Args:
        num_envs: Rows; a multiple of ``panel_size``.
        array: ``numpy``, or ``torch`` to stay on the device.
        render_mode: ``rgb_array``, ``human``, ``ansi`` or None.
        settings: ``FlowMDP``'s: ``task``, ``oracle``, ``panel_size``, ``steps``, ``control``, ``kernel``,
            ``kl_coef``, ``max_queries``, ``checkpoint``, ``reference``, ``device``.

    Raises:
        ConfigError: Settings that do not fit together.
        UnknownNameError: Unknown task, oracle or kernel.
        CheckpointError: The reference cannot be loaded.
    """

    metadata: dict[str, Any] = {
        "render_modes": RENDER_MODES,
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        array: Literal["numpy", "torch"] = "numpy",
        render_mode: str | None = None,
        **settings: Any,
    ):
        one_of("array", array, ("numpy", "torch"))
        one_of("render_mode", render_mode, (None, *RENDER_MODES))
        super().__init__(num_envs, **settings)
        self.array, self.render_mode = array, render_mode
        dim, bound = int(np.prod(self.task.event_shape)), float(self.task.bound)
        state = Box(-bound, bound, (dim,), np.float32)
        spaces: dict[str, gym.Space] = {"x": state, "t": Box(0.0, 1.0, (1,), np.float32)}
        if self.task.condition is not None:
            spaces["condition"] = self.task.condition.space()
        self.single_observation_space = Dict(spaces)
        self.single_action_space = Box(-bound, bound, (dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._shown: Tensor | None = None
        self._window: plotting.Window | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start new samples; ``options={"noise": (num_envs, D)}`` gives shared-noise comparisons.

        ``options={"condition": ...}``, ``(num_envs, ...)`` or one for all rows, asks for what is to be made.
        """
        start = _start(options)
        if seed is not None or self._np_random is None:
            super().reset(seed=seed)
            self.seed_noise(int(self.np_random.integers(2**63 - 1)))
        x, _ = self.begin(*start)
        self._show(x)
        return self._observation(x, 0), {}

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Move every row to its action; finished rows start anew in the same step (SAME_STEP).

        Returns:
            Observations, rewards, terminated, truncated (never), and info: ``clipped`` (coordinates of each row
            clipped so far), and at the end ``judgement`` (NaN = no answer), ``judged`` (rows that got one),
            ``final_obs`` and ``final_info``.
        """
        x, reward = self.advance(actions)
        self._show(x)
        done = self._x is None
        info: dict[str, Any] = {"clipped": self._face(self.clipped.clone())}
        observation = self._observation(x, self.steps if done else self._i)
        if done:
            info["judgement"] = self._face(self.judgement)
            info["judged"] = self._face(~self.judgement.isnan())
            info["final_info"] = {k: info[k] for k in ("judged", "clipped")}
            info["final_obs"] = self._rows(observation)
            info["_final_obs"] = info["_final_info"] = np.ones(self.num_envs, bool)
            observation = self._observation(self.begin()[0], 0)
        ended = torch.full((self.num_envs,), done, device=self.device)
        face = self._face
        return observation, face(reward.double()), face(ended), face(torch.zeros_like(ended)), info

    def _face(self, values: Tensor) -> Any:
        return values if self.array == "torch" else values.cpu().numpy()

    def _observation(self, x: Tensor, i: int) -> dict[str, Any]:
        shape, dtype = (self.num_envs, 1), torch.float32
        t = torch.full(shape, float(self.reference.times[i]), dtype=dtype, device=self.device)
        observation = {"x": self._face(x.flatten(1).clone()), "t": self._face(t)}
        if self.condition is not None:
            observation["condition"] = self._face(self.condition.clone())
        return observation

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
        "render_modes": RENDER_MODES,
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
        """Start a new sample; ``options={"noise": (D,), "condition": ...}`` sets its noise and condition."""
        start = _start(options)
        if seed is not None or self._np_random is None:
            super().reset(seed=seed)
            self._vec.seed_noise(int(self.np_random.integers(2**63 - 1)))
        x, _ = self._vec.begin(*start)
        self._vec._show(x)
        return self._row(x, 0), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move to the action; ``info`` holds ``clipped`` and at the end ``judged``."""
        vec = self._vec
        x, reward = vec.advance(action)
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
        self._vec.close_extras()
