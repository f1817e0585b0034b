"""Playing a vector env and keeping copies of what it returned, to be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from prefenv.testing.data import copied, difference, leaves, need, spoil

Act = Callable[[VectorEnv, Any], Any]


def actions_of(env: VectorEnv, observation: Any, act: Act | None) -> Any:
    """Actions of the kind of the observations (arrays or tensors)."""
    if act is not None:
        return act(env, observation)
    action = env.action_space.sample()
    _, like = next(leaves(observation))
    return torch.as_tensor(action, device=like.device) if isinstance(like, Tensor) else action


def play(
    env: VectorEnv,
    seed: int | None,
    act: Act | None,
    *,
    steps: int = 0,
    max_steps: int = 0,
    spoiling: bool = False,
    first: Any = None,
) -> list[Any]:
    """Copies of what reset and the steps returned.

    Args:
        env: Who plays.
        seed: Seed of the reset; None = go on from the observation ``first``.
        act: As in ``check_vector_env``.
        steps: Steps to play; 0 = until every row has finished, as long again, and one more.
        max_steps: When to give up on that.
        spoiling: Overwrite what was returned, and actions once they are used.
        first: See ``seed``.
    """
    env.action_space.seed(seed or 0)
    raw = [(first, {}) if seed is None else env.reset(seed=seed)]
    kept = [copied(raw[0])]
    finished = np.zeros(env.num_envs, bool)
    while len(raw) <= (steps or max_steps):
        action = actions_of(env, raw[-1][0], act)
        if spoiling:
            spoil(raw[-1])
        raw.append(env.step(action))
        kept.append(copied(raw[-1]))
        if spoiling:
            spoil(action)
        need(len(raw[-1]) == 5, "step() returns observation, reward, terminated, truncated, info")
        _, _, terminated, truncated, _ = kept[-1]
        finished |= np.asarray(terminated, bool) | np.asarray(truncated, bool)
        if not steps and finished.all():
            steps = 2 * (len(raw) - 1) + 1
    need(steps, f"not every row ended in {max_steps} steps; end the episode or raise max_steps")
    for i, (mine, then) in enumerate(zip(raw, kept, strict=True)):
        path = None if spoiling else difference(copied(mine), then)
        need(
            path is None,
            f"what call {i} returned{path} was changed by a later call: return a new array every time",
        )
    return kept
