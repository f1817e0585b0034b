"""Segments: ten actions in a row of a control task, asked for by the state they begin in: PFM's offline setting.

    sample     y = (a_0, ..., a_9), each action scaled to [-1, 1]
    condition  x = (observation - mean) / std, at the segment's beginning

The data is what an agent did: of three skills in two control tasks (``python -m benchmarks.behaviour``, which
trains the agents by Stable-Baselines3), or any file of D4RL's or Minari's layout. A model of it is a stochastic
policy that plans ten steps ahead (behaviour cloning); whoever prefers segments by their true return
(``segment-return``) asks for a better one. Kim et al. 2024 (arXiv 2405.20234, section 5.3) do so on D4RL; whether
what came out acts better is seen in the real env (``python -m benchmarks.segments``).

``beta`` is for Pendulum's medium behaviour; its random one wants 0.1. In Hopper's medium and expert behaviour some
states have a segment so much better than all others that, at a ``beta`` that moves anything, the exact optimum
cannot be drawn from the reference: evaluation refuses and says so, training does not need it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from prefenv.checkpoints import shipped
from prefenv.errors import ConfigError
from prefenv.networks import VelocityField, VelocityMLP
from prefenv.tasks.base import Demo, Task, TrainConfig, own_name
from prefenv.tasks.conditions import Vector

KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
NEAR = 2000  # real segments that a sample is compared with


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What an agent did, step after step.

    Args:
        observations: ``(N, o)`` float32, each before its step's action.
        actions: ``(N, a)`` float32, scaled to [-1, 1].
        rewards: ``(N,)`` float32.
        ends: ``(N,)`` bool, an episode's last steps.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    ends: Tensor

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the observations, ``(o,)`` each."""
        return self.observations.mean(0), self.observations.std(0).clamp_min(1e-3)

    def starts(self, horizon: int) -> Tensor:
        """Where a segment may begin: so many steps within one episode."""
        last = torch.nn.functional.pad(self.ends.long().cumsum(0), (1, 0))
        first = torch.arange(max(len(self.ends) - horizon + 1, 0))
        return first[last[first + horizon - 1] == last[first]]


def read_behaviour(path: Path) -> dict[str, np.ndarray]:
    """The five arrays of D4RL, from an ``.npz``, D4RL's ``.hdf5``, or Minari's ``.hdf5`` (a group an episode).

    Raises:
        ConfigError: The file cannot be read, holds something else, or h5py is missing.
    """
    if path.suffix == ".npz":
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return {key: file[key] for key in KEYS}
        except Exception as error:  # what a broken file raises is anybody's guess
            raise ConfigError(
                f"segments: {path} is no .npz with {', '.join(KEYS)} ({error})"
            ) from None
    try:
        import h5py
    except ImportError:
        raise ConfigError(
            "segments: .hdf5 files need h5py: pip install 'prefenv[control]'"
        ) from None
    try:
        with h5py.File(path) as file:
            if "actions" in file:
                return {key: np.asarray(file[key]) for key in KEYS}
            names = [k for k in file if k.startswith("episode_")]
            episodes = [_episode(file[k]) for k in sorted(names, key=lambda k: int(k[8:]))]
            return {key: np.concatenate([e[key] for e in episodes]) for key in KEYS}
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"segments: {path} has neither D4RL's nor Minari's layout ({error})"
        ) from None


def _episode(group: Any) -> dict[str, np.ndarray]:
    """One episode of Minari, whose observations are one more than its actions."""
    n = len(group["actions"])
    found = {key: np.asarray(group[key])[:n] for key in ("observations", "actions", "rewards")}
    ends = {"terminals": "terminations", "timeouts": "truncations"}
    found |= {key: np.asarray(group[name], bool) for key, name in ends.items()}
    found["timeouts"][-1] |= not found["terminals"][-1]
    return found


@lru_cache(maxsize=8)
def behaviour(path: Path, env_id: str) -> Behaviour:
    """A file's steps, its actions scaled by the env's bounds.

    Raises:
        ConfigError: The file is not of this env, or not finite.
    """
    arrays = read_behaviour(path)
    space = spaces(env_id)
    told = arrays["observations"], arrays["actions"].reshape(len(arrays["actions"]), -1)
    if told[0].shape[1:] != space[0].shape or told[1].shape[1:] != (int(np.prod(space[1].shape)),):
        raise ConfigError(
            f"segments: {path} has observations {told[0].shape[1:]} and actions {told[1].shape[1:]}, "
            f"{env_id} has {space[0].shape} and {space[1].shape}"
        )
    observations, actions, rewards = (
        torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in (*told, arrays["rewards"])
    )
    low, high = (torch.from_numpy(x.ravel()) for x in (space[1].low, space[1].high))
    actions = 2 * (actions - low) / (high - low) - 1
    if not all(bool(x.isfinite().all()) for x in (observations, actions, rewards)):
        raise ConfigError(f"segments: {path} holds NaN or infinite numbers")
    if float(actions.abs().max()) > 1.001:
        raise ConfigError(f"segments: actions of {path} lie outside the bounds of {env_id}")
    ends = torch.from_numpy(arrays["terminals"].astype(bool) | arrays["timeouts"].astype(bool))
    return Behaviour(observations, actions.clamp(-1, 1), rewards, ends)


@lru_cache(maxsize=8)
def spaces(env_id: str) -> tuple[gym.spaces.Box, gym.spaces.Box]:
    """Observation and action space of a control task.

    Raises:
        ConfigError: There is no such env here, or its spaces are no bounded boxes.
    """
    try:
        env = gym.make(env_id)
    except Exception as error:  # gymnasium's own, and whatever a missing extra raises
        raise ConfigError(
            f"segments: {env_id!r} cannot be made ({error}); MuJoCo's need pip install 'prefenv[control]'"
        ) from None
    observation, action = env.observation_space, env.action_space
    env.close()
    if not isinstance(observation, gym.spaces.Box) or not isinstance(action, gym.spaces.Box):
        raise ConfigError(f"segments: {env_id} has no Box spaces")
    if len(observation.shape) != 1 or not action.is_bounded():
        raise ConfigError(f"segments: {env_id} needs flat observations and bounded actions")
    return observation, action


@dataclass(frozen=True)
class Segments(Task):
    """The segments task.

    Args:
        env: Id of the control task.
        skill: ``random``, ``medium`` or ``expert``: whose behaviour, of those that come with the package.
        data_path: A file to take instead: ``.npz`` or ``.hdf5`` by D4RL's names, or Minari's ``main_data.hdf5``.
            The task is then named after it, ``segments+hopper_medium-v2`` (Minari's after its folders,
            ``segments+hopper-expert-v0``), and wants its own reference.
        horizon: Actions of a segment.
        width: Channels of the network.
    """

    name: str = "segments"
    default_oracle: str = "segment-return"
    beta: float = 0.03  # what one state's segments earn differs little beside what states differ by
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(iterations=4000, batch=512, lr=2e-3, early=1.0)
    )
    demo: Demo = field(
        default_factory=lambda: Demo(
            ("flow-dpo:lr=1e-3,updates=75", "pfm", "rft", "ppo"), 2048, 256
        )
    )
    env: str = "Pendulum-v1"
    skill: str = "medium"
    data_path: str | None = None
    horizon: int = 10
    width: int = 128

    def __post_init__(self) -> None:
        if (
            not isinstance(self.horizon, int)
            or not isinstance(self.width, int)
            or min(self.horizon, self.width) < 1
        ):
            raise ConfigError(
                f"segments: horizon and width are whole numbers from 1, not {self.horizon!r}, {self.width!r}"
            )
        if self.name == "segments":
            own = f"{self.env}-{self.skill}".lower()
            name = "segments" if own == "pendulum-v1-medium" else f"segments-{own}"
            if self.data_path is not None:
                name = own_name("segments", self.data_path)
            object.__setattr__(self, "name", name)
        object.__setattr__(self, "condition", Vector(spaces(self.env)[0].shape[0]))
        if not len(self.begin):
            raise ConfigError(f"segments: no episode is {self.horizon} steps long")

    @property
    def source(self) -> Path:
        """Where the data lies."""
        if self.data_path is not None:
            return Path(self.data_path)
        path = shipped(f"behaviour/{self.env.lower()}-{self.skill}", ".npz")
        if not path.exists():
            raise ConfigError(
                f"segments: there is no {self.skill!r} behaviour of {self.env} at {path}; make it with "
                f"python -m benchmarks.behaviour --envs {self.env}, or give data_path=FILE"
            )
        return path

    @property
    def steps(self) -> Behaviour:
        """The data, step after step."""
        return behaviour(self.source, self.env)

    @cached_property
    def begin(self) -> Tensor:
        """Steps at which a segment may begin."""
        return self.steps.starts(self.horizon)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.horizon, int(np.prod(spaces(self.env)[1].shape)))

    def network(self) -> VelocityField:
        assert isinstance(self.condition, Vector)
        return VelocityMLP(self.event_shape, width=self.width, vector=self.condition.dim)

    def data(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        first = self.begin[torch.randint(len(self.begin), (n,), generator=generator)]
        return self.cut(first), self.standard(self.steps.observations[first])

    def cut(self, first: Tensor) -> Tensor:
        """The data's segments that begin at steps ``(n,)``, ``(n, H, a)``."""
        return self.steps.actions[first[:, None] + torch.arange(self.horizon)]

    def standard(self, observations: Tensor) -> Tensor:
        """Observations ``(n, o)`` as conditions: standardised, and cut at 10 deviations."""
        mean, std = (m.to(observations) for m in self.steps.moments)
        return ((observations - mean) / std).clamp(-10, 10)

    def observations(self, condition: Tensor) -> Tensor:
        """The observations ``(n, o)`` behind conditions."""
        mean, std = (m.to(condition) for m in self.steps.moments)
        return mean + std * condition

    def actions(self, x: Tensor) -> np.ndarray:
        """Samples ``(n, H, a)`` as actions in the env's own units, within its bounds."""
        space = spaces(self.env)[1]
        unit = (x.detach().cpu().clamp(-1, 1).double().numpy() + 1) / 2
        return (space.low.ravel() + unit * (space.high - space.low).ravel()).reshape(
            *x.shape[:2], *space.shape
        )

    def residual(self, x: Tensor) -> Tensor:
        """Root mean square distance per number to the nearest of 2,000 real segments, ``(n,)``."""
        picked = self.begin[
            torch.linspace(0, len(self.begin) - 1, min(NEAR, len(self.begin))).long()
        ]
        real = self.cut(picked).flatten(1).to(x)
        return torch.cdist(x.flatten(1), real).amin(1) / real.shape[1] ** 0.5

    def draw(self, axes, x: np.ndarray, color: str) -> None:
        edges = np.arange(self.horizon + 1)
        for values in x.T:
            axes.stairs(values, edges, baseline=None, color=color, lw=1.2)
        axes.axhline(0, color="0.8", lw=0.5, zorder=0)
        axes.set(xlim=(-1, self.horizon + 1), ylim=(-1.3, 1.3), xticks=[], yticks=[])

    def points2d(self, x: np.ndarray) -> np.ndarray:
        """Points ``(H a, 2)``: time to the right, each action's value upwards."""
        time = np.linspace(-2, 2, self.horizon)
        return np.stack([np.repeat(time, x.shape[1]), 1.5 * np.asarray(x).ravel()], 1)
