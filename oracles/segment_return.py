"""``segment-return``: prefers segments by what they truly earn, played in the env from the state they are for.

    score(y | x) = (r_0 + ... + r_{H-1}) / H,    r_h = the env's rewards for y's actions from state x

The preference of PFM's offline-RL experiment (Kim et al. 2024, arXiv 2405.20234, section 5.3), whose public code
labels pairs without looking at them. After an end the rewards are 0. A sample's numbers outside [-1, 1] are cut,
as the env would. Accepted from the data's own mean reward. It has no gradient.

A state is set from the observation alone, so that any state that a model is asked for can be played. Where that
does not bring the same observation back, the env is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from prefenv.errors import ConfigError
from prefenv.networks import needed
from prefenv.oracle import Answer, ScriptedOracle
from prefenv.tasks import Task
from prefenv.tasks.segments import Segments


def set_pendulum(env: Any, observation: np.ndarray) -> None:
    """Observation ``(cos, sin, speed)``."""
    env.state = np.array([np.arctan2(observation[1], observation[0]), observation[2]])


def set_mujoco(env: Any, observation: np.ndarray) -> None:
    """Observation ``(positions, velocities)``, positions without the place along the way."""
    hidden = env.model.nq + env.model.nv - len(observation)
    if hidden < 0:
        raise ConfigError("it shows more than positions and velocities")
    cut = env.model.nq - hidden
    env.set_state(np.concatenate([np.zeros(hidden), observation[:cut]]), observation[cut:])


def setter(env: Any) -> Callable[[Any, np.ndarray], None]:
    """How an env's state is set from its observation.

    Raises:
        ConfigError: It does not bring the observation back.
    """
    way = set_mujoco if hasattr(env, "set_state") else set_pendulum
    for seed in range(3):
        observation = env.reset(seed=seed)[0]
        try:
            env.reset(seed=seed + 10)
            way(env, np.asarray(observation, np.float64))
            again = env._get_obs()
        except Exception as error:  # whatever an unknown env raises when it is set
            raise ConfigError(f"its state cannot be set from its observation ({error})") from None
        if np.shape(again) != observation.shape or not np.allclose(again, observation, atol=1e-5):
            raise ConfigError("its observation does not tell its state")
    return way


class SegmentReturn(ScriptedOracle):
    """The mean reward of a segment.

    Args:
        task: The segments task.
        answer: ``score``, ``choose``, ``best`` or ``extremes``.

    Raises:
        ConfigError: Another task, or an env whose observation does not tell its state.
    """

    conditional = True

    def __init__(self, task: Task, answer: Answer = "score"):
        super().__init__(task, answer)
        self.differentiable = False
        if not isinstance(task, Segments):
            raise ConfigError(f"segment-return plays segments, not {task.name!r}")
        self.segments = task
        self.env: Any = gym.make(task.env, disable_env_checker=True).unwrapped
        try:
            self.place = setter(self.env)
        except ConfigError as error:
            raise ConfigError(f"segment-return cannot play {task.env}: {error}") from None
        self.threshold = float(task.steps.rewards.mean())

    def score(self, samples: Tensor, condition: Tensor | None = None) -> Tensor:
        states = self.segments.observations(needed(condition).cpu().double()).numpy()
        actions = self.segments.actions(samples)
        told = [self.earned(*row) for row in zip(states, actions, strict=True)]
        return torch.tensor(told, dtype=torch.float32).to(samples.device) / actions.shape[1]

    def earned(self, observation: np.ndarray, actions: np.ndarray) -> float:
        """Sum of the rewards for actions ``(H, *a)`` from a state."""
        self.place(self.env, observation)
        total = 0.0
        for action in actions:
            _, reward, terminated, *_ = self.env.step(action)
            total += float(reward)
            if terminated:
                break
        return total
