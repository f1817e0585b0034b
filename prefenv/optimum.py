"""The best that can be had, from rewards of reference samples alone; and the distance to it.

With weights ``w_i ~ exp(r_i / b)`` on reference samples, the optimum ``p* ~ p_ref exp(r / b)`` has mean reward
``R(b) = sum w r`` and ``KL(b) = R / b - log mean exp(r / b)``: the frontier. Distances are energy distances
(Szekely & Rizzo 2013; the root, as in scipy).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefenv.errors import ConfigError


def frontier(rewards: Tensor, betas: Tensor, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The frontier's points at temperatures ``betas``: mean reward and KL in nats, each ``(len(betas),)``.

    Args:
        rewards: Of reference samples ``(n,)``, or of ``(C, n)``, those of each condition in a row.
        betas: Temperatures.
        mass: The reference's probability at each, ``(n,)``, sum 1; None = equal, for samples.
    """
    if rewards.dim() == 2:
        each = [torch.stack(frontier(row, betas)) for row in rewards]
        reward, kl = torch.stack(each).mean(0)
        return reward, kl
    r = rewards.double()
    log_mass = -math.log(len(r)) if mass is None else mass.double().log()
    scaled = r / betas.double()[:, None] + log_mass
    reward = (scaled.softmax(1) * r).sum(1)
    return reward, reward / betas.double() - scaled.logsumexp(1)


def frontier_kl(rewards: Tensor, reward: float, mass: Tensor | None = None) -> float:
    """The least KL in nats at which the mean reward can be ``reward``; 0 at or below the reference's own.

    Infinite above the largest reward that the reference was seen to make. The rest is as in ``frontier``.
    """
    own = rewards.double().mean() if mass is None else (mass.double() * rewards.double()).sum()
    if reward <= float(own):
        return 0.0
    if reward >= float(rewards.amax(-1).mean()):
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
    samples: Tensor, rewards: Tensor, beta: float, generator: torch.Generator, least: int = 100
) -> Tensor:
    """Independent draws of ``p*`` by rejection: a sample stays with probability ``exp((r - max r) / beta)``.

    Raises:
        ConfigError: Fewer than ``least`` are left, too few to say anything: beta is too small for this reference.
    """
    keep = ((rewards - rewards.max()) / beta).exp()
    chosen = samples[torch.rand(len(keep), generator=generator).to(keep.device) < keep]
    if len(chosen) < least:
        raise ConfigError(
            f"only {len(chosen)} of {len(samples)} reference samples survive the tilt at beta={beta}; "
            "raise beta or use more reference samples"
        )
    return chosen


def energy_distance(x: Tensor, y: Tensor) -> float:
    """The root of ``energy_square``, clipped at 0."""
    return math.sqrt(max(energy_square(x, y), 0.0))


def energy_square(x: Tensor, y: Tensor) -> float:
    """``2 E|X-Y| - E|X-X'| - E|Y-Y'|``, the energy distance's square, unbiased (U statistic).

    Args:
        x: Samples ``(n, ...)``; n >= 2.
        y: Samples ``(m, ...)``; m >= 2.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()

    def mean_distance(a: Tensor, b: Tensor, pairs: int) -> float:
        return sum(float(torch.cdist(part, b).sum()) for part in a.split(1024)) / pairs

    return (
        2 * mean_distance(x, y, len(x) * len(y))
        - mean_distance(x, x, len(x) * (len(x) - 1))
        - mean_distance(y, y, len(y) * (len(y) - 1))
    )
