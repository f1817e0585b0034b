"""Stable-Baselines3 on a ``FlowVectorEnv``: a batched ``VecEnv``, and the generator as PPO's policy.

SB3's own route to many rows is ``DummyVecEnv``, a Python loop over single environments; the adapter hands it the
batched environment instead. Any of its algorithms then learns as it always does::

    env = gym.make_vec("prefenv/Shapes-v0", num_envs=64, kernel="flow-sde")
    model = PPO(
        FlowActorCritic,
        FlowVecEnv(env.unwrapped),
        n_steps=16,
        gamma=1.0,
        policy_kwargs={"reference": env.unwrapped.reference},
    )
    model.learn(100_000)

SB3 draws from torch's and NumPy's global generators; ``seeded`` lends them, and gives them back as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from prefenv.envs import FlowVectorEnv
from prefenv.errors import ConfigError
from prefenv.policy import FlowPolicy
from prefenv.sb3_policy import FlowActorCritic


class FlowVecEnv(VecEnv):
    """A ``FlowVectorEnv`` (``array="numpy"``, SAME_STEP) as SB3's ``VecEnv``.

    ``infos[i]["judged"]`` of a finished row tells whether its reward is an answer; no answer is a reward of 0.

    Args:
        env: The environment.

    Attributes:
        judgement: Judgements of the last finished rows, float32 ``(num_envs,)``, NaN = no answer.

    Raises:
        ConfigError: The environment speaks torch.
    """

    def __init__(self, env: FlowVectorEnv):
        if env.array != "numpy":
            raise ConfigError(
                "Stable-Baselines3 speaks numpy: make the environment with array='numpy'"
            )
        self.env = env  # before super().__init__, which asks it for its render mode
        self.judgement = np.full(env.num_envs, np.nan, np.float32)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        observation, _ = self.env.reset(seed=self._seeds[0])
        self._reset_seeds()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(self._actions)
        done, infos = terminated | truncated, [{} for _ in range(self.num_envs)]
        if done.all():
            self.judgement = info["judgement"]
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = info["final_obs"][i]
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            infos[i]["judged"] = bool(info["judged"][i])
        return observation, reward, done, infos

    def close(self) -> None:
        self.env.close()

    def _count(self, indices: Any) -> int:
        return len(list(self._get_indices(indices)))

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kw: Any) -> list[Any]:
        return [getattr(self.env, method_name)(*args, **kw)] * self._count(indices)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self._count(indices)


class AnsweredReplay(ReplayBuffer):
    """A replay buffer of single rows that keeps only those whose last judgement is an answer.

    For one-step episodes (``control="noise"``): of longer ones it would drop the last step alone.

    Args:
        args: SB3's: size in rows, observation space, action space, device, number of environments.
        kwargs: SB3's.
    """

    ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

    def __init__(self, *args: Any, n_envs: int = 1, **kwargs: Any):
        super().__init__(*args, n_envs=1, **kwargs)

    def add(self, obs, next_obs, action, reward, done, infos) -> None:
        for i, info in enumerate(infos):
            if info["judged"]:
                row = slice(i, i + 1)
                super().add(obs[row], next_obs[row], action[row], reward[row], done[row], [info])

    def state_dict(self) -> dict[str, Any]:
        """What it holds, as a tree of tensors and JSON values."""
        arrays = {k: torch.from_numpy(getattr(self, k)[: self.size()].copy()) for k in self.ARRAYS}
        return {**arrays, "pos": self.pos, "full": self.full}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what a buffer of the same size held."""
        for name in self.ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name].cpu().numpy()
        self.pos, self.full = state["pos"], state["full"]


def begin(model: BaseAlgorithm) -> BaseCallback:
    """Make an algorithm ready for ``collect_rollouts`` and ``train`` outside ``learn``; it logs to memory only.

    Returns:
        The callback that ``collect_rollouts`` wants; it does nothing.
    """
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model._setup_learn(total_timesteps=1)[1]


@contextmanager
def seeded(generator: torch.Generator) -> Generator[None, None, None]:
    """Lend torch's and NumPy's global generators, seeded by a draw from ``generator``; they return untouched."""
    device = generator.device
    seed = int(torch.randint(2**32, (), generator=generator, device=device))
    before = np.random.get_state()  # noqa: NPY002 (what SB3 draws minibatches from)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


def make_ppo(
    env: FlowVectorEnv,
    batch_size: int,
    epochs: int,
    lr: float,
    *,
    reference: FlowPolicy | None = None,
    **settings: Any,
) -> tuple[PPO, Callable[[], Any]]:
    """SB3's PPO with the environment's generator as its policy, and a function that collects one round.

    Args:
        env: The environment, ``array="numpy"``; a round is one episode of every row.
        batch_size: Transitions of a minibatch.
        epochs: Passes over each round.
        lr: Learning rate.
        reference: The generator to copy and its kernel; None = the environment's.
        settings: More of SB3's ``PPO``.
    """
    options: dict[str, Any] = {"gamma": 1.0, "gae_lambda": 1.0, "max_grad_norm": 1.0, **settings}
    model = PPO(
        FlowActorCritic,
        FlowVecEnv(env),
        learning_rate=lr,
        n_steps=env.steps,
        batch_size=batch_size,
        n_epochs=epochs,
        device=env.device,
        policy_kwargs={
            "reference": reference or env.reference,
            "anchored": bool(settings.get("ent_coef")),
        },
        **options,
    )
    callback = begin(model)

    def collect() -> None:
        assert model.env is not None
        model.collect_rollouts(model.env, callback, model.rollout_buffer, env.steps)

    return model, collect
