"""How far an aligned model is from the best one: score, KL, frontier, quality, diversity.

The reference ``p_ref`` and the true reward ``r`` are known, so the optimum of ``E[r] - beta KL(p || p_ref)`` is
``p* ~ p_ref exp(r / beta)`` and the least KL at which a mean reward can be had (the frontier) follows from rewards
of reference samples: with ``w_i ~ exp(r_i / b)``, ``R(b) = sum w r`` and ``KL(b) = R / b - log mean exp(r / b)``.
A, B and p* are sampled by the same ODE sampler with the same number of steps.

**Conditions.** Where a task has them, all of this holds for each condition ``c`` of a fixed set of C (every class,
or some vectors), and what is reported is the mean over them:

    p*_c ~ p_ref(. | c) exp(r(., c) / beta),     D(B, p*)^2 = 1/C sum_c D(B_c, p*_c)^2
    frontier:  R(b) = 1/C sum_c R_c(b),  KL(b) = 1/C sum_c KL_c(b),  the least mean KL at a mean reward

Weights and rejection (and the largest reward in it) are each condition's own; so is diversity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prefenv.device import make_generator
from prefenv.divergence import kl_divergence
from prefenv.errors import ConfigError
from prefenv.estimates import frontier_kl_estimate, frontier_stderr
from prefenv.flow import RectifiedFlow
from prefenv.optimum import energy_square, frontier, optimum_samples, optimum_weights
from prefenv.oracle import ScriptedOracle, scored
from prefenv.policy import FlowPolicy
from prefenv.tasks import Task
from prefenv.tasks.conditions import rows_of


class Generator(Protocol):
    """What can be evaluated: noises to samples, and the flows that do it (none = it has no likelihood).

    It may have a ``kl_bound() -> float`` too, an upper bound of its ``KL(B || A)``. Of a conditional task it makes
    ``sample(noise, condition)``.
    """

    def sample(self, noise: Tensor) -> Tensor: ...
    def chain(self) -> list[RectifiedFlow]: ...


def made(model: Any, noise: Tensor, condition: Tensor | None) -> Tensor:
    """Samples of a model, of conditions where there are some."""
    return model.sample(noise) if condition is None else model.sample(noise, condition)


@dataclass(frozen=True)
class Evaluation:
    """What an aligned model is worth.

    Args:
        reference_preferred_rate: Share of the reference's samples that the oracle accepts.
        preferred_rate: The same of the model.
        reward: Mean true score of the model's samples.
        reward_stderr: Its standard error.
        score: ``1 - D(B, p*) / D(A, p*)``, D the energy distance: 0 = the reference, 1 = the optimum.
        optimum_score: The score of one further set of samples of ``p*``, at most 1.
        beta: Temperature of ``p*``.
        kl_nats: ``KL(B || A)``; NaN where the model has no likelihood (it selects, or steers the noise).
        kl_stderr: Its standard error.
        kl_bound_nats: What ``KL(B || A)`` is at most, where the model knows that without a likelihood, else NaN.
        frontier_kl_nats: The least KL at the model's mean reward.
        frontier_kl_stderr: Its standard error, the reward's among it; infinite where too few of the reference's
            samples have such rewards.
        residual: Median residual of the model's samples.
        reference_residual: The same of the reference.
        diversity: Mean distance between accepted samples, relative to that of ``p*``'s accepted samples; 1 = as
            diverse, NaN where ``p*`` has none.
        optimum_effective_size: Effective sample size behind ``p*``, of the condition that has the least.
    """

    reference_preferred_rate: float
    preferred_rate: float
    reward: float
    reward_stderr: float
    score: float
    optimum_score: float
    beta: float
    kl_nats: float
    kl_stderr: float
    kl_bound_nats: float
    frontier_kl_nats: float
    frontier_kl_stderr: float
    residual: float
    reference_residual: float
    diversity: float
    optimum_effective_size: float


class Judge:
    """Everything about a reference and an oracle that does not depend on the agent, computed once.

    Args:
        reference: Model A.
        task: Its task.
        oracle: The oracle with a true score.
        steps: Steps of the common sampler.
        beta: Temperature; None = the task's.
        n_reference: Reference samples behind the optimum and the frontier; None = twice ``task.samples``.
        n: Samples of each side of a distance; None = a quarter of ``task.samples``.

    Attributes:
        conditions: The fixed set ``(C, ...)``; None = the task has none.
        label: Which of them each of ``samples`` is of; likewise of ``optimum`` and ``noise``.
    """

    conditions: Tensor | None = None
    label: Tensor | None = None
    optimum_label: Tensor | None = None
    noise_label: Tensor | None = None

    def __init__(
        self,
        reference: RectifiedFlow,
        task: Task,
        oracle: Any,
        *,
        steps: int = 16,
        beta: float | None = None,
        n_reference: int | None = None,
        n: int | None = None,
    ):
        if not isinstance(oracle, ScriptedOracle):
            raise ConfigError("evaluation needs an oracle with a true score (a scripted one)")
        self.reference, self.task, self.oracle, self.steps = reference, task, oracle, steps
        self.beta = task.beta if beta is None else beta
        self.conditions = None if task.condition is None else task.fixed_conditions()
        count = 1 if self.conditions is None else len(self.conditions)
        n_reference, n = n_reference or 2 * task.samples, n or task.samples // 4
        rng = make_generator(0, stream="evaluation reference")
        self.label = self._labels([n_reference // count] * count)
        noise = torch.randn(n_reference // count * count, *task.event_shape, generator=rng)
        policy = FlowPolicy(reference, steps=steps, shift=task.shift)
        rows = torch.arange(len(noise)).split(4096)
        asked = self.asked(self.label)
        self.samples = torch.cat([policy.sample(noise[i], rows_of(asked, i)).cpu() for i in rows])
        self.rewards = scored(oracle, self.samples, asked)
        cases = list(
            zip(*(split(v, self.label) for v in (self.samples, self.rewards)), strict=True)
        )
        chosen = [optimum_samples(*case, self.beta, rng, max(10, 100 // count)) for case in cases]
        half = [min(n // count, len(x) // 2) for x in chosen]
        self.optimum = torch.cat([x[:h] for x, h in zip(chosen, half, strict=True)])
        other = torch.cat([x[h : 2 * h] for x, h in zip(chosen, half, strict=True)])
        self.optimum_label = self._labels(half)
        weights = [optimum_weights(r, self.beta) for _, r in cases]
        self.effective_size = min(size for _, size in weights)
        means = [float((w * r).sum()) for (w, _), (_, r) in zip(weights, cases, strict=True)]
        self.optimum_reward = sum(means) / count
        self.optimum_kl = float(frontier(self.table(), torch.tensor([self.beta]))[1])
        self.noise_label = self._labels([n // count] * count)
        begin = torch.cat([x[: n // count] for x, _ in cases])
        self.distance = self._distance(begin, self.noise_label)
        if self.distance == 0:
            raise ConfigError(
                f"at beta={self.beta} the optimum is no other than the reference: lower beta, or take an oracle "
                "that tells its samples apart"
            )
        good = self.optimum_rewards() >= oracle.threshold
        self.spread = self._spread(self.optimum[good], rows_of(self.optimum_label, good))
        self.optimum_score = 1 - self._distance(other, self.optimum_label) / self.distance
        model_noise = make_generator(0, stream="evaluation model")
        self.noise = torch.randn(n // count * count, *task.event_shape, generator=model_noise)

    def _labels(self, sizes: list[int]) -> Tensor | None:
        """Which condition each row is of, so many rows of each; None where there are none."""
        if self.conditions is None:
            return None
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))

    def asked(self, label: Tensor | None) -> Tensor | None:
        """The conditions of rows."""
        return None if label is None or self.conditions is None else self.conditions[label]

    def table(self) -> Tensor:
        """Rewards of the reference's samples, ``(n,)``, or ``(C, n)`` where there are conditions."""
        return self.rewards if self.label is None else torch.stack(split(self.rewards, self.label))

    def _distance(self, samples: Tensor, label: Tensor | None) -> float:
        """``sqrt(mean_c D_c^2)`` to the optimum."""
        points, optimum = self.task.embed(samples), self.task.embed(self.optimum)
        pairs = zip(split(points, label), split(optimum, self.optimum_label), strict=True)
        squares = [energy_square(x, y) for x, y in pairs]
        return math.sqrt(max(sum(squares) / len(squares), 0.0))

    def _spread(self, x: Tensor, label: Tensor | None) -> float:
        """Mean distance between two samples (of a condition, averaged over those that have two); 0 for fewer."""
        groups = [group for group in split(x, label) if len(group) > 1] if len(x) else []
        each = [float(torch.pdist(self.task.embed(group[:2048])).mean()) for group in groups]
        return sum(each) / len(each) if each else 0.0

    def score(self, samples: Tensor, rows: Any = slice(None)) -> float:
        """``1 - D(samples, p*) / D(A, p*)`` of samples made of ``noise[rows]``, in its order."""
        return 1 - self._distance(samples, rows_of(self.noise_label, rows)) / self.distance

    def shown(self, n: int) -> tuple[Tensor, Tensor | None]:
        """A few noises to draw samples of, and their conditions: each in turn."""
        if self.conditions is None:
            return self.noise[:n], None
        i, count = torch.arange(n), len(self.conditions)
        return self.noise[i % count * (len(self.noise) // count) + i // count], self.conditions[
            i % count
        ]

    def evaluate(self, model: Generator, *, kl: bool = True) -> Evaluation:
        """Evaluate a model; ``kl=False`` leaves the likelihoods out (NaN)."""
        asked = self.asked(self.noise_label)
        samples = made(model, self.noise, asked).cpu()
        rewards = scored(self.oracle, samples, asked)
        accepted = rewards >= self.oracle.threshold
        nats, stderr, flows = math.nan, math.nan, model.chain()
        if kl and flows:
            n = max(self.task.samples // 64, 8)
            nats, stderr = kl_divergence(flows, self.reference, n, conditions=self.conditions)
        reward = float(rewards.double().mean())
        reward_stderr = float(rewards.double().std() / math.sqrt(len(rewards)))
        least, least_stderr = frontier_kl_estimate(self.table(), reward, reward_stderr)
        spread = self._spread(samples[accepted], rows_of(self.noise_label, accepted))
        return Evaluation(
            reference_preferred_rate=float((self.rewards >= self.oracle.threshold).double().mean()),
            preferred_rate=float(accepted.double().mean()),
            reward=reward,
            reward_stderr=reward_stderr,
            score=self.score(samples),
            optimum_score=self.optimum_score,
            beta=self.beta,
            kl_nats=nats,
            kl_stderr=stderr,
            kl_bound_nats=getattr(model, "kl_bound", lambda: math.nan)(),
            frontier_kl_nats=least,
            frontier_kl_stderr=least_stderr,
            residual=float(self.task.residual(samples).median()),
            reference_residual=float(self.task.residual(self.samples).median()),
            diversity=spread / self.spread if self.spread else math.nan,
            optimum_effective_size=self.effective_size,
        )

    def optimum_rewards(self) -> Tensor:
        """True scores of the optimum's samples."""
        return scored(self.oracle, self.optimum, self.asked(self.optimum_label))

    def frontier_curve(self, points: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards and KLs of the frontier, and the rewards' errors, from the reference on.

        It ends where the weights rest on too few samples of the reference to say anything.
        """
        table, betas = self.table(), torch.logspace(2, -3, points)
        (reward, kl), (stderr, _) = frontier(table, betas), frontier_stderr(table, betas)
        known = stderr.isfinite()
        return reward[known].numpy(), kl[known].numpy(), stderr[known].numpy()


def split(values: Tensor, label: Tensor | None) -> list[Tensor]:
    """Rows by condition; all of them, where there are none."""
    return [values] if label is None else [values[label == i] for i in range(int(label.max()) + 1)]
