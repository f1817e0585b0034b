"""The generator as a Stable-Baselines3 actor-critic: its kernel is the distribution of actions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from prefenv.policy import At, FlowPolicy
from prefenv.tasks.conditions import rows_of


class StepDistribution(DiagGaussianDistribution):
    """The kernel's Gaussian; a step without noise is its mean, with a log-probability of 0 (a ratio of 1)."""

    def of(self, mean: Tensor, std: Tensor) -> StepDistribution:
        """Set means ``(n, D)`` and standard deviations ``(n, 1)``, 0 = no noise."""
        self.noisy = std[:, 0] > 0
        # A stand-in of 1 where there is no noise: its gradient, masked below, must not be NaN.
        self.proba_distribution(mean, std.where(std > 0, 1.0).log())
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        return super().log_prob(actions).where(self.noisy, 0.0)

    def sample(self) -> Tensor:
        return super().sample().where(self.noisy[:, None], self.mode())


class FlowActorCritic(ActorCriticPolicy):
    """A trainable copy of the generator as actor: mean = the kernel's, std = the kernel's at the row's ``t``.

    The kernel's std cannot be learned, so a Gaussian's entropy is a constant; what SB3 weighs with ``ent_coef`` is
    the anchor instead, ``-mean |v - v_ref|^2`` on rows without noise, which no log-probability reaches.

    Args:
        args: SB3's: observation space, action space, learning-rate schedule.
        reference: The generator to copy, with its kernel and steps.
        anchored: Whether the anchor is wanted; it costs evaluations of the reference.
        kwargs: SB3's.
    """

    def __init__(self, *args: Any, reference: FlowPolicy, anchored: bool = False, **kwargs: Any):
        self.reference, self.anchored = reference, anchored
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.flow = self.reference.flow.clone().requires_grad_(True)
        self.walk = FlowPolicy(
            self.flow, self.reference.kernel, self.reference.steps, shift=self.reference.shift
        )
        times = self.walk.times[:-1].float().to(self.flow.device)
        self.edges = (times[1:] + times[:-1]) / 2  # bucketize: the step that starts at a row's t
        # SB3's features: the observation's parts side by side, a class one-hot.
        self.critic = nn.Sequential(nn.Linear(self.features_dim, 64), nn.Tanh(), nn.Linear(64, 1))
        make: Any = self.optimizer_class
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _rows(self, obs: Any) -> At:
        """States ``(n, *event_shape)``, the step that each is at, and its condition."""
        x = obs["x"].view(-1, *self.flow.event_shape)
        return x, torch.bucketize(obs["t"][:, 0], self.edges), self._condition(obs)

    @property
    def classes(self) -> int:
        """Number of classes that are conditions; 0 = there are none, or they are vectors."""
        spaces: Any = self.observation_space
        space = spaces.spaces.get("condition")
        return int(space.n) if isinstance(space, Discrete) else 0

    def _condition(self, obs: Any) -> Tensor | None:
        """Conditions as a network wants them: SB3's buffers make floats of classes, ``(n, 1)``."""
        if (condition := obs.get("condition")) is None:
            return None
        return condition.reshape(-1).long() if self.classes else condition

    def _dist(self, obs: Any) -> StepDistribution:
        mean, std = self.walk.gaussian(*self._rows(obs))
        return StepDistribution(mean[0].numel()).of(mean.flatten(1), std.view(-1, 1))

    def _anchor(self, obs: Any, dist: StepDistribution) -> Tensor:
        """``-mean |v - v_ref|^2``, ``(n,)``; 0 for rows with noise."""
        x, index, condition = (rows_of(z, ~dist.noisy) for z in self._rows(obs))
        assert x is not None and index is not None
        with torch.no_grad():
            mean, _ = self.reference.gaussian(x, index, condition)
        b = self.walk.table.b.to(x)[index]
        change = (dist.mode()[~dist.noisy] - mean.flatten(1)) / b[:, None]
        anchor = x.new_zeros(len(dist.noisy))
        return anchor.masked_scatter(~dist.noisy, -change.square().mean(1))

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        dist = self._dist(obs)
        actions = dist.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs), dist.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dist = self._dist(obs)
        entropy = self._anchor(obs, dist) if self.anchored else None
        return self.predict_values(obs), dist.log_prob(actions), entropy

    def get_distribution(self, obs: Any) -> DiagGaussianDistribution:
        return self._dist(obs)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self._dist(observation).get_actions(deterministic=deterministic)

    def predict_values(self, obs: Any) -> Tensor:
        parts = [obs["x"], obs["t"]]
        if (condition := self._condition(obs)) is not None:
            classes = self.classes
            parts.append(F.one_hot(condition, classes).float() if classes else condition)
        return self.critic(torch.cat(parts, 1))
