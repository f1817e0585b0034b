"""What a policy did in the environment: ``collect`` plays one round and returns a ``Rollout``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prefenv.errors import ConfigError
from prefenv.policy import At, FlowPolicy
from prefenv.tasks.conditions import rows_of

if TYPE_CHECKING:
    from prefenv.envs import FlowVectorEnv


class Transitions(NamedTuple):
    """Steps of a rollout as one batch of N: states, next states, step index, log-probability, row, condition."""

    x: Tensor
    x_next: Tensor
    index: Tensor
    log_prob: Tensor
    row: Tensor
    condition: Tensor | None = None

    def at(self, pick: Tensor) -> At:
        """Where some of them start: what ``FlowPolicy.gaussian`` is asked about."""
        return self.x[pick], self.index[pick], rows_of(self.condition, pick)


@dataclass
class Rollout:
    """One round: every row is one sample, ``panel_size`` rows in a row are one panel.

    Args:
        path: States ``(steps + 1, B, *event_shape)``; ``path[0]`` is the noise.
        log_prob: ``(steps, B)``, summed over dimensions; 0 where the step is deterministic.
        judgement: ``(B,)``, NaN = no answer.
        reward: Return of each row, ``(B,)``: judgements (0 for no answer) and the env's KL cost.
        panel_size: Samples of a panel.
        condition: Of each row, ``(B, ...)``, one within a panel; None = the task has none.
        gradient: Reward gradients ``(B, *event_shape)`` of the samples, where they were asked for.
    """

    path: Tensor
    log_prob: Tensor
    judgement: Tensor
    reward: Tensor
    panel_size: int
    condition: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def noise(self) -> Tensor:
        """``(B, *event_shape)``."""
        return self.path[0]

    @property
    def samples(self) -> Tensor:
        """Finished samples, ``(B, *event_shape)``."""
        return self.path[-1]

    def transitions(self, steps: list[int]) -> Transitions:
        """The given steps of all rows as one flat batch, step by step."""
        index = torch.tensor(steps, device=self.path.device)
        rows = self.path.shape[1]
        return Transitions(
            self.path[index].flatten(0, 1),
            self.path[index + 1].flatten(0, 1),
            index.repeat_interleave(rows),
            self.log_prob[index].flatten(),
            row := torch.arange(rows, device=index.device).repeat(len(steps)),
            rows_of(self.condition, row),
        )

    def panels(self, values: Tensor) -> Tensor:
        """Rows ``(B, ...)`` grouped as panels ``(m, K, ...)``."""
        return values.unflatten(0, (-1, self.panel_size))


def collect(
    env: FlowVectorEnv, policy: FlowPolicy, *, gradient: bool = False, noise: Tensor | None = None
) -> Rollout:
    """Play one round with a policy: from noises to judged samples.

    Args:
        env: The environment, with ``control="state"``.
        policy: The generator; its steps must be the env's.
        gradient: Ask for the samples' reward gradient too: they are then judged one by one.
        noise: Where to begin, ``(num_envs, *event_shape)``; None = fresh noises of the env's.
    """
    if policy.steps != env.steps:
        raise ConfigError(f"the policy takes {policy.steps} steps, the environment {env.steps}")
    if not torch.equal(policy.times, env.times):
        raise ConfigError(
            "the policy walks another grid of times than the environment: use env.policy(flow)"
        )
    x, condition = env.begin(noise)
    path, reward = x.new_empty(policy.steps + 1, *x.shape), x.new_zeros(len(x))
    log_probs = x.new_zeros(policy.steps, len(x))
    path[0] = x
    with policy.hold(x, condition):
        for i in range(policy.steps):
            action, log_prob = policy.act(x, i, condition)
            x, step_reward = env.advance(action, gradient)
            path[i + 1] = x
            if log_prob is not None:
                log_probs[i] = log_prob
            reward = reward + step_reward
    return Rollout(
        path,
        log_probs,
        env.judgement.clone(),
        reward,
        env.panel_size,
        condition,
        env.gradient,
    )
