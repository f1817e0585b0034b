"""Stable-Baselines3 on a ``FlowVectorEnv``: a batched ``VecEnv``, and the generator as an SB3 policy.

SB3's own route to many rows is ``DummyVecEnv``, a Python loop over single environments. The adapter hands it the
batched environment instead, so that what is compared with our ``ppo`` is SB3's algorithm, not that loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from prefenv.envs import FlowVectorEnv
from prefenv.policy import FlowPolicy


class FlowVecEnv(VecEnv):
    """A ``FlowVectorEnv`` (``array="numpy"``, SAME_STEP) as SB3's ``VecEnv``."""

    def __init__(self, env: FlowVectorEnv):
        self.env = env  # before super().__init__, which asks it for its render mode
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
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = info["final_obs"][i]
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
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


class FlowActorCritic(ActorCriticPolicy):
    """A trainable copy of the generator as actor: mean = the kernel's, std = the kernel's at the row's ``t``.

    Args:
        args: SB3's: observation space, action space, learning-rate schedule.
        reference: The generator to copy, with its kernel and steps.
        kwargs: SB3's.
    """

    def __init__(self, *args: Any, reference: FlowPolicy, **kwargs: Any):
        self.reference = reference
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.flow = self.reference.flow.clone().requires_grad_(True)
        self.walk = FlowPolicy(
            self.flow, self.reference.kernel, self.reference.steps, shift=self.reference.shift
        )
        times = self.walk.times[:-1].float().to(self.flow.device)
        self.edges = (times[1:] + times[:-1]) / 2  # bucketize: the step that starts at a row's t
        self.critic = nn.Sequential(nn.Linear(self.features_dim, 64), nn.Tanh(), nn.Linear(64, 1))
        make: Any = self.optimizer_class
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _dist(self, obs: Any) -> DiagGaussianDistribution:
        x = obs["x"].view(-1, *self.flow.event_shape)
        mean, std = self.walk.gaussian(x, torch.bucketize(obs["t"][:, 0], self.edges))
        gaussian = DiagGaussianDistribution(int(np.prod(self.flow.event_shape)))
        return gaussian.proba_distribution(mean.flatten(1), std.flatten(1).log())

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        dist = self._dist(obs)
        actions = dist.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs), dist.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, None]:
        return self.predict_values(obs), self._dist(obs).log_prob(actions), None

    def get_distribution(self, obs: Any) -> DiagGaussianDistribution:
        return self._dist(obs)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self._dist(observation).get_actions(deterministic=deterministic)

    def predict_values(self, obs: Any) -> Tensor:
        return self.critic(torch.cat([obs["x"], obs["t"]], 1))


def make_ppo(
    env: FlowVectorEnv, batch_size: int, epochs: int, lr: float
) -> tuple[PPO, Callable[[], Any]]:
    """SB3's PPO with the environment's generator as its policy, and a function that collects one round.

    Args:
        env: The environment, ``array="numpy"``; a round is one episode of every row.
        batch_size: Transitions of a minibatch.
        epochs: Passes over each round.
        lr: Learning rate.
    """
    model = PPO(
        FlowActorCritic,
        FlowVecEnv(env),
        learning_rate=lr,
        n_steps=env.steps,
        batch_size=batch_size,
        n_epochs=epochs,
        gamma=1.0,
        gae_lambda=1.0,
        max_grad_norm=1.0,
        seed=0,
        device=env.device,
        policy_kwargs={"reference": env.reference},
    )
    _, callback = model._setup_learn(total_timesteps=1, callback=None)

    def collect() -> None:
        assert model.env is not None
        model.collect_rollouts(model.env, callback, model.rollout_buffer, env.steps)

    return model, collect
