"""Behaviour data for the task ``segments``: what agents of three skills did in a control task.

    python -m benchmarks.behaviour                      Pendulum-v1 and Hopper-v5
    python -m benchmarks.behaviour --envs Walker2d-v5   any other with Box spaces, by PPO's usual settings

``random`` acts uniformly. Stable-Baselines3's PPO is kept as it was at some moments on its way: ``expert`` is the
one with the largest return, ``medium`` the one nearest to the middle between both. All act stochastically, as in
D4RL (Fu et al. 2020, arXiv 2004.07219), and the arrays go by D4RL's names. Writes ``<env>-<skill>.npz`` and, with
the returns that a normalised return refers to, ``<env>.json`` to ``checkpoints/behaviour/``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tqdm import tqdm

from prefenv.checkpoints import write_atomic
from prefenv.runs import versions

FOLDER = Path(__file__).parents[1] / "checkpoints" / "behaviour"
MOMENTS = [2 ** (-k / 2) for k in range(12, -1, -1)]  # of the steps: 1/64, 1/45, ... 1/2, 0.71, 1
LOOKS = 20  # episodes that tell a moment's return


@dataclass(frozen=True)
class Course:
    """How an expert is trained.

    Args:
        steps: Steps in the env.
        envs: Envs side by side.
        settings: Other settings of Stable-Baselines3's PPO.
    """

    steps: int = 800_000
    envs: int = 8
    settings: dict[str, Any] = field(default_factory=lambda: {"n_steps": 256, "batch_size": 256})


COURSES = {
    "Pendulum-v1": Course(
        steps=200_000,
        envs=4,
        settings={"n_steps": 512, "batch_size": 256, "gamma": 0.9, "learning_rate": 1e-3},
    ),
}


Actor = Callable[[np.ndarray], np.ndarray]  # from observations (n, o) to actions (n, a)


@dataclass(frozen=True)
class Args:
    """Train the behaviour's agents and record what they do.

    Args:
        envs: Ids of control tasks with Box spaces.
        steps: Steps that are recorded of each skill.
        episodes: Episodes over which returns are averaged.
        seed: Seed of all.
        out: Folder of the data.
    """

    envs: tuple[str, ...] = ("Pendulum-v1", "Hopper-v5")
    steps: int = 20_000
    episodes: int = 50
    seed: int = 0
    out: Path = FOLDER


class Moments(BaseCallback):
    """Keeps PPO's weights and its observations' mean and variance at moments of its steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.due, self.kept = [round(share * steps) for share in MOMENTS], []

    def _on_step(self) -> bool:
        if len(self.kept) < len(self.due) and self.num_timesteps >= self.due[len(self.kept)]:
            self.keep()
        return True

    def keep(self) -> None:
        """Keep it as it is."""
        normal: Any = self.training_env
        state = {k: v.clone() for k, v in self.model.policy.state_dict().items()}
        moments = (normal.obs_rms.mean.copy(), normal.obs_rms.var.copy())
        self.kept.append((self.num_timesteps, state, moments))


def actors(env_id: str, seed: int) -> list[tuple[int, Actor]]:
    """PPO at some moments: steps and stochastic policy; actions outside the bounds are clipped, as PPO's are."""
    course = COURSES.get(env_id, Course())
    envs = VecNormalize(make_vec_env(env_id, course.envs, seed=seed))
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **course.settings)
    moments = Moments(course.steps)
    with tqdm(total=course.steps, desc=f"PPO {env_id}") as bar:
        follow = ConvertCallback(lambda local, _: bar.update(course.envs) or True)
        model.learn(course.steps, callback=[moments, follow])
    turn: dict[str, torch.Tensor] = {}  # whose weights the model has now

    def actor(state: dict[str, torch.Tensor], mean: np.ndarray, var: np.ndarray) -> Actor:
        def act(observations: np.ndarray) -> np.ndarray:
            nonlocal turn
            if turn is not state:
                model.policy.load_state_dict(state)
                turn = state
            seen = np.clip((observations - mean) / np.sqrt(var + 1e-8), -10, 10)
            return model.predict(seen.astype(np.float32))[0]

        return act

    return [(steps, actor(state, *known)) for steps, state, known in moments.kept]


def uniform(space: gym.spaces.Box, seed: int) -> Actor:
    """Uniform actions."""
    rng = np.random.default_rng(seed)
    return lambda o: rng.uniform(space.low, space.high, (len(o), *space.shape)).astype(np.float32)


def record(env_id: str, act: Actor, steps: int, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Whole episodes one after the other: at least so many steps, and at least so many episodes' returns.

    An episode that was cut at ``steps`` ends in a time-out.
    """
    env: Any = gym.make(env_id)
    rows, returns = [], []
    bar = tqdm(total=steps, desc=f"record {env_id}")
    observation, _ = env.reset(seed=seed)
    total = 0.0
    while len(rows) < steps or len(returns) < episodes:
        action = act(observation[None])[0]
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, terminated, truncated))
        bar.update()
        total, observation = total + float(reward), after
        if terminated or truncated:
            returns.append(total)
            total = 0.0
            observation, _ = env.reset()
    bar.close()
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    data = {k: np.array(v)[:steps] for k, v in zip(names, zip(*rows, strict=True), strict=True)}
    data["timeouts"][-1] |= not data["terminals"][-1]
    return {**data, "returns": np.array(returns)}


def make(env_id: str, args: Args) -> None:
    """All skills of an env."""
    began = time.perf_counter()
    space: Any = gym.make(env_id).action_space
    kept = [(0, uniform(space, args.seed)), *actors(env_id, args.seed)]
    torch.manual_seed(args.seed)
    returns = np.array(
        [record(env_id, act, 1, LOOKS, args.seed)["returns"].mean() for _, act in kept]
    )
    best = int(returns.argmax())
    middle = int(np.abs(returns - (returns[0] + returns[best]) / 2).argmin())
    known: dict[str, Any] = {}
    for skill, index in (("random", 0), ("medium", middle), ("expert", best)):
        steps, act = kept[index]
        data = record(env_id, act, args.steps, args.episodes, args.seed + 1)
        totals = data.pop("returns")
        small: Any = {
            k: v.astype(np.float16) if v.dtype.kind == "f" else v for k, v in data.items()
        }
        args.out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(args.out / f"{env_id.lower()}-{skill}.npz", **small)
        known[skill] = {
            "return": round(float(totals.mean()), 2),
            "stderr": round(float(totals.std(ddof=1) / len(totals) ** 0.5), 2),
            "episodes": len(totals),
            "ppo_steps": steps,
        }
        print(env_id, skill, known[skill], flush=True)
    known["moments"] = {
        steps: round(float(r), 1) for (steps, _), r in zip(kept, returns, strict=True)
    }
    known |= {"seed": args.seed, "seconds": round(time.perf_counter() - began), **versions()}
    write_atomic(args.out / f"{env_id.lower()}.json", (json.dumps(known, indent=1) + "\n").encode())


def main(args: Args) -> None:
    """Make the data of each env."""
    torch.set_num_threads(1)
    for env_id in args.envs:
        make(env_id, args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
