"""How far an aligned model is from the best one: score, KL, frontier, quality, diversity.

The reference ``p_ref`` and the true reward ``r`` are known, so the optimum of ``E[r] - beta KL(p || p_ref)`` is
``p* ~ p_ref exp(r / beta)`` and the least KL at which a mean reward can be had (the frontier) follows from rewards
of reference samples: with ``w_i ~ exp(r_i / b)``, ``R(b) = sum w r`` and ``KL(b) = R / b - log mean exp(r / b)``.
A, B and p* are sampled by the same ODE sampler with the same number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prefenv.device import make_generator
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow, normal_log_prob
from prefenv.oracle import ScriptedOracle
from prefenv.policy import FlowPolicy
from prefenv.tasks import Task


class Generator(Protocol):
    """What can be evaluated: noises to samples, and the flows that do it (none = it has no likelihood).

    It may have a ``kl_bound() -> float`` too, an upper bound of its ``KL(B || A)``.
    """

    def sample(self, noise: Tensor) -> Tensor: ...
    def chain(self) -> list[RectifiedFlow]: ...


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``sqrt(2 E|X-Y| - E|X-X'| - E|Y-Y'|)``, unbiased under the root (U statistic), clipped at 0.

    Args:
        x: Samples ``(n, ...)``; n >= 2.
        y: Samples ``(m, ...)``; m >= 2.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()

    def mean_distance(a: Tensor, b: Tensor, pairs: int) -> float:
        return sum(float(torch.cdist(part, b).sum()) for part in a.split(1024)) / pairs

    square = (
        2 * mean_distance(x, y, len(x) * len(y))
        - mean_distance(x, x, len(x) * (len(x) - 1))
        - mean_distance(y, y, len(y) * (len(y) - 1))
    )
    return math.sqrt(max(square, 0.0))


def frontier(rewards: Tensor, betas: Tensor, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The frontier's points at temperatures ``betas``: mean reward and KL in nats, each ``(len(betas),)``.

    Args:
        rewards: Of reference samples, ``(n,)``.
        betas: Temperatures.
        mass: The reference's probability at each, ``(n,)``, sum 1; None = equal, for samples.
    """
    r = rewards.double()
    log_mass = -math.log(len(r)) if mass is None else mass.double().log()
    scaled = r / betas.double()[:, None] + log_mass
    reward = (scaled.softmax(1) * r).sum(1)
    return reward, reward / betas.double() - scaled.logsumexp(1)


def frontier_kl(rewards: Tensor, reward: float, mass: Tensor | None = None) -> float:
    """The least KL in nats at which the mean reward can be ``reward``; 0 at or below the reference's own.

    Infinite above the largest reward that the reference was seen to make. ``mass`` as in ``frontier``.
    """
    own = rewards.double().mean() if mass is None else (mass.double() * rewards.double()).sum()
    if reward <= float(own):
        return 0.0
    if reward >= float(rewards.max()):
        return math.inf
    low, high = -9.0, 9.0  # log10 of beta; the reward falls with beta
    for _ in range(100):
        middle = (low + high) / 2
        at, _ = frontier(rewards, torch.tensor([10.0**middle]), mass)
        low, high = (middle, high) if float(at) > reward else (low, middle)
    return float(frontier(rewards, torch.tensor([10.0**low]), mass)[1])


def optimum_weights(rewards: Tensor, beta: float) -> tuple[Tensor, float]:
    """Self-normalised weights of ``p*`` on reference samples ``(n,)``, and their effective sample size."""
    weight = (rewards.double() / beta).softmax(0)
    return weight, float(1 / weight.square().sum())


def optimum_samples(
    samples: Tensor, rewards: Tensor, beta: float, generator: torch.Generator
) -> Tensor:
    """Independent draws of ``p*`` by rejection: a sample stays with probability ``exp((r - max r) / beta)``.

    Raises:
        ConfigError: Too few are left to say anything (fewer than 100): beta is too small for this reference.
    """
    keep = ((rewards - rewards.max()) / beta).exp()
    chosen = samples[torch.rand(len(keep), generator=generator).to(keep.device) < keep]
    if len(chosen) < 100:
        raise ConfigError(
            f"only {len(chosen)} of {len(samples)} reference samples survive the tilt at beta={beta}; "
            "raise beta or use more reference samples"
        )
    return chosen


def chain_log_prob(
    flows: list[RectifiedFlow], noise: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Samples of a chain of flows from ``noise``, by RK4, and their log-likelihoods under it."""
    x, log_prob = noise, normal_log_prob(noise)
    for flow in flows:
        x, log_det = flow.integrate_with_log_det(x, steps, "rk4", generator=generator)
        log_prob = log_prob - log_det
    return x, log_prob


def kl_divergence(
    flows: list[RectifiedFlow],
    reference: RectifiedFlow,
    n: int = 256,
    steps: int = 16,
    seed: int = 0,
) -> tuple[float, float]:
    """``KL(B || A)`` in nats by the flows' log-likelihoods (RK4, Hutchinson), and its standard error."""
    device = reference.device
    rng = make_generator(seed, device, "evaluation kl")
    noise = torch.randn(n, *reference.event_shape, generator=rng, device=device)
    x, log_b = chain_log_prob(flows, noise, steps, rng)
    log_a = reference.log_prob(x, steps, "rk4", generator=rng)
    gap = (log_b - log_a).double()
    return float(gap.mean()), float(gap.std() / math.sqrt(n))


@dataclass(frozen=True)
class Evaluation:
    """What an aligned model is worth.

    Args:
        reference_preferred_rate: Share of the reference's samples that the oracle accepts.
        preferred_rate: The same of the model.
        reward: Mean true score of the model's samples.
        score: ``1 - D(B, p*) / D(A, p*)``, D the energy distance: 0 = the reference, 1 = the optimum.
        optimum_score: The score of ``p*`` against itself, two independent sets: what sampling noise leaves.
        beta: Temperature of ``p*``.
        kl_nats: ``KL(B || A)``; NaN where the model has no likelihood (it selects, or steers the noise).
        kl_stderr: Its standard error.
        kl_bound_nats: What ``KL(B || A)`` is at most, where the model knows that without a likelihood, else NaN.
        frontier_kl_nats: The least KL at the model's mean reward.
        residual: Median residual of the model's samples.
        reference_residual: The same of the reference.
        diversity: Mean distance between accepted samples, relative to that of ``p*``'s accepted samples; 1 = as
            diverse, NaN where ``p*`` has none.
        optimum_effective_size: Effective sample size behind ``p*``.
    """

    reference_preferred_rate: float
    preferred_rate: float
    reward: float
    score: float
    optimum_score: float
    beta: float
    kl_nats: float
    kl_stderr: float
    kl_bound_nats: float
    frontier_kl_nats: float
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
    """

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
        n_reference = n_reference or 2 * task.samples
        n = n or task.samples // 4
        rng = make_generator(0, stream="evaluation reference")
        noise = torch.randn(n_reference, *task.event_shape, generator=rng)
        policy = FlowPolicy(reference, steps=steps, shift=task.shift)
        self.samples = torch.cat([policy.sample(part).cpu() for part in noise.split(4096)])
        self.rewards = oracle.score(self.samples)
        chosen = optimum_samples(self.samples, self.rewards, self.beta, rng)
        half = min(n, len(chosen) // 2)
        self.optimum, other = chosen[:half], chosen[half : 2 * half]
        weight, self.effective_size = optimum_weights(self.rewards, self.beta)
        self.optimum_reward = float((weight * self.rewards).sum())
        self.optimum_kl = float(frontier(self.rewards, torch.tensor([self.beta]))[1])
        self.distance = self._distance(self.samples[:n])
        if self.distance == 0:
            raise ConfigError(
                f"at beta={self.beta} the optimum is no other than the reference: lower beta, or take an oracle "
                "that tells its samples apart"
            )
        self.spread = self._spread(self.optimum[self.optimum_rewards() >= oracle.threshold])
        self.optimum_score = self.score(other)
        model_noise = make_generator(0, stream="evaluation model")
        self.noise = torch.randn(n, *task.event_shape, generator=model_noise)

    def score(self, samples: Tensor) -> float:
        """``1 - D(samples, p*) / D(A, p*)``."""
        return 1 - self._distance(samples) / self.distance

    def _distance(self, samples: Tensor) -> float:
        return energy_distance(self.task.embed(samples), self.task.embed(self.optimum))

    def _spread(self, samples: Tensor) -> float:
        return _spread(self.task.embed(samples)) if len(samples) else 0.0

    def evaluate(self, model: Generator, *, kl: bool = True) -> Evaluation:
        """Evaluate a model; ``kl=False`` leaves the likelihoods out (NaN)."""
        samples = model.sample(self.noise).cpu()
        rewards = self.oracle.score(samples)
        accepted = rewards >= self.oracle.threshold
        nats, stderr, flows = math.nan, math.nan, model.chain()
        if kl and flows:
            nats, stderr = kl_divergence(flows, self.reference, self.task.samples // 32)
        reward = float(rewards.double().mean())
        return Evaluation(
            reference_preferred_rate=float((self.rewards >= self.oracle.threshold).double().mean()),
            preferred_rate=float(accepted.double().mean()),
            reward=reward,
            score=self.score(samples),
            optimum_score=self.optimum_score,
            beta=self.beta,
            kl_nats=nats,
            kl_stderr=stderr,
            kl_bound_nats=getattr(model, "kl_bound", lambda: math.nan)(),
            frontier_kl_nats=frontier_kl(self.rewards, reward),
            residual=float(self.task.residual(samples).median()),
            reference_residual=float(self.task.residual(self.samples).median()),
            diversity=self._spread(samples[accepted]) / self.spread if self.spread else math.nan,
            optimum_effective_size=self.effective_size,
        )

    def optimum_rewards(self) -> Tensor:
        """True scores of the optimum's samples."""
        return self.oracle.score(self.optimum)

    def frontier_curve(self, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and KLs of the frontier from the reference to near the best seen reward."""
        reward, kl = frontier(self.rewards, torch.logspace(2, -3, points))
        return reward.numpy(), kl.numpy()


def _spread(x: Tensor) -> float:
    """Mean distance between two samples; 0 for fewer than two."""
    if len(x) < 2:
        return 0.0
    return float(torch.pdist(x.flatten(1)[:2048]).mean())
