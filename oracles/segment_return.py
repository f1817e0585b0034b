"""``segment-return``: prefers segments by what they truly earn, played in the env from the state they are for.

    score(y | x) = sigmoid((R(y | x) - R(0 | x)) / s),    R = mean of the env's rewards for actions from state x

The preference of PFM's offline-RL experiment (Kim et al. 2024, arXiv 2405.20234, section 5.3), whose public code
labels pairs without looking at them. Of two segments for one state, the one of larger true return scores higher;
``R(0 | x)``, doing nothing, makes states comparable, and ``s`` is the standard deviation of the data's own gains.
Accepted from 1/2: better than nothing. After an end the rewards are 0. A sample's numbers outside [-1, 1] are cut,
as the env would. It has no gradient.

A state is set from the observation alone, so that any state that a model is asked for can be played. Where that
does not bring the same observation back, the env is refused; states of the beginning are tried. What an
observation cuts off is lost: Hopper shows velocities within +-10 only, and a faster state is played from 10
(about one step in eight of its medium and expert behaviour, none of the random one).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from prefenv.device import make_generator
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


class Player:
    """The control task, for segments from any state.

    Args:
        task: The segments task.

    Raises:
        ConfigError: Its observation does not tell its state.
    """

    def __init__(self, task: Segments):
        self.task = task
        self.env: Any = gym.make(task.env, disable_env_checker=True).unwrapped
        try:
            self.place = setter(self.env)
        except ConfigError as error:
            raise ConfigError(f"segment-return cannot play {task.env}: {error}") from None

    def returns(self, samples: Tensor, condition: Tensor) -> Tensor:
        """``R(y | x)`` of segments ``(n, H, a)`` for conditions ``(n, o)``, ``(n,)`` float64."""
        states = self.task.observations(condition.cpu().double()).numpy()
        actions = self.task.actions(samples)
        told = [self.earned(*row) for row in zip(states, actions, strict=True)]
        return torch.tensor(told, dtype=torch.float64) / self.task.horizon

    def gains(self, samples: Tensor, condition: Tensor) -> Tensor:
        """``R(y | x) - R(0 | x)``, ``(n,)`` float64."""
        known, which = condition.cpu().unique(dim=0, return_inverse=True)
        still = self.returns(samples.new_zeros(len(known), *samples.shape[1:]), known)
        return self.returns(samples, condition) - still[which]

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


@lru_cache(maxsize=8)
def spread(task: Segments) -> float:
    """Standard deviation of the gains of 256 segments of the data."""
    gains = Player(task).gains(*task.data(256, make_generator(0, stream="segment-return")))
    return max(float(gains.std()), 1e-6)


class SegmentReturn(ScriptedOracle):
    """What a segment earns.

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
        self.player, self.scale = Player(task), spread(task)

    def score(self, samples: Tensor, condition: Tensor | None = None) -> Tensor:
        gains = self.player.gains(samples, needed(condition))
        return (gains / self.scale).sigmoid().to(samples)
