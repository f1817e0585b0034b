"""A reward learned from few judgements, on a graph of the generator's own unlabelled samples.

**Graph.** A few hundred *anchors* (k-means++) cover the pool; a sample is a mixture ``z`` of its nearest anchors, so
a function of samples is its values ``f`` at the anchors, ``r(x) = z(x) f``. Two anchors are neighbours as far as
pool samples lie between them, ``W = Z'Z`` without its diagonal (an anchor graph: Liu, He & Chang 2010, ICML). With
``lambda, U`` the spectrum of ``I - D^-1/2 W D^-1/2``, member ``k`` of the ensemble is the Gaussian process

    f ~ m + s GP(0, C_k),   C_k = corr(U diag((lambda + lambda_k)^-2) U'),   s = range of the answers / 2

(Matern on a graph: Borovitskiy et al. 2021, AISTATS): about ``k`` numbers describe it. What no sample connects, as
two kinds of shapes, is independent; along what is connected, few answers go far.

**Answers** may be wrong: ``y_i ~ (1 - e) N(r(x_i), sigma^2) + e U(range)``, fitted by EM (``q_i`` = probability that
answer ``i`` was meant; ``sigma`` and ``e`` are estimated too). The members are averaged with weights
``exp(sum_i log p(y_i | all others))``, the leave-one-out density in closed form (Yao et al. 2018, Bayesian Analysis).

**Questions** are the anchors whose answers are expected to leave the least variance in sum over the anchors
(transductive experimental design: Yu, Bi & Tresp 2006, ICML), one after the other:
``argmax_a |C_a|^2 / (C_aa + sigma^2)``, then ``C`` is conditioned on the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def kmeans(x: Tensor, count: int, generator: torch.Generator, steps: int = 10) -> Tensor:
    """``count`` centres of points ``(n, D)``: k-means++ (Arthur & Vassilvitskii 2007) and Lloyd's steps."""
    first = torch.randint(len(x), (1,), generator=generator, device=x.device)
    chosen, square = [first], torch.full_like(x[:, 0], math.inf)
    for _ in range(count - 1):
        square = torch.minimum(square, (x - x[chosen[-1]]).square().sum(1))
        chosen.append(torch.multinomial(square + 1e-12, 1, generator=generator))
    centre = x[torch.cat(chosen)]
    for _ in range(steps):
        near = torch.cdist(x, centre).argmin(1)
        number = torch.bincount(near, minlength=count)[:, None]
        total = torch.zeros_like(centre).index_add_(0, near, x)
        centre = torch.where(number > 0, total / number.clamp_min(1), centre)
    return centre


def mixture(x: Tensor, anchors: Tensor, near: int = 5) -> Tensor:
    """Weights ``(n, m)`` of each point's ``near`` nearest anchors: ``1 - d^2 / d_next^2``, summing to 1; float64."""
    distance, index = torch.cdist(x, anchors).double().topk(near + 1, largest=False)
    square = distance.square()
    weight = (1 - square[:, :-1] / square[:, -1:].clamp_min(1e-12)).clamp_min(1e-9)
    weight = weight / weight.sum(1, keepdim=True)
    return weight.new_zeros(len(x), len(anchors)).scatter_(1, index[:, :-1], weight)


def graph_factors(z: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Factors ``F_k`` ``(m, m)`` of the members' correlations, ``C_k = F_k F_k'``, from mixtures ``(n, m)``."""
    link = z.T @ z
    link = link - link.diag().diag()
    scale = link.sum(1).clamp_min(1e-9).rsqrt()
    eye = torch.eye(len(link), dtype=z.dtype, device=z.device)
    value, vector = torch.linalg.eigh(eye - scale[:, None] * link * scale)
    value = value.clamp_min(1e-6)
    factors = [vector / (value + value[k - 1]) for k in sizes]
    return [f / f.norm(dim=1, keepdim=True) for f in factors]


@dataclass
class Belief:
    """What is believed of the reward at the anchors.

    Args:
        mean: ``(m,)``.
        covariance: ``(m, m)``.
        noise: Variance of an answer that was meant.
        meant: Probability that each answer was meant, ``(n,)``.
        weight: Weights of the members, ``(members,)``.
    """

    mean: Tensor
    covariance: Tensor
    noise: float
    meant: Tensor
    weight: Tensor


def fit_member(
    factor: Tensor, z: Tensor, y: Tensor, steps: int = 20
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One Gaussian process with wrong answers, by EM, for answers in units of half their range.

    Args:
        factor: ``F``, ``(m, m)``.
        z: Mixtures of the judged samples, ``(n, m)``.
        y: Answers ``(n,)`` within a range of 2, less their mean.
        steps: EM steps.

    Returns:
        Mean ``(m,)``, factor of the covariance ``(m, m)``, noise variance, ``q`` ``(n,)`` and the leave-one-out
        log-density.
    """
    phi = z @ factor
    n, m = phi.shape
    eye = torch.eye(m, dtype=z.dtype, device=z.device)
    meant, noise, wrong = torch.ones_like(y), y.var(correction=0).clamp_min(1e-4), 0.1
    for _ in range(steps):
        root = torch.linalg.cholesky(eye + phi.T @ (phi * meant[:, None]) / noise)
        half = torch.linalg.solve_triangular(root, phi.T, upper=False)  # (m, n)
        beta = torch.cholesky_solve((phi.T @ (meant * y) / noise)[:, None], root)[:, 0]
        mean, var = phi @ beta, half.square().sum(0)
        square = (y - mean).square() + var
        right = (1 - wrong) * (-square / (2 * noise)).exp() / (2 * math.pi * noise).sqrt()
        meant = right / (right + wrong / 2)
        noise = ((meant * square).sum() / meant.sum().clamp_min(1)).clamp_min(1e-3)
        wrong = float(((1 - meant).sum() + 1) / (n + 10))
    pull = (var * meant / noise).clamp_max(1 - 1e-6)
    left_mean, left_var = (mean - pull * y) / (1 - pull), var / (1 - pull) + noise
    right = (-(y - left_mean).square() / (2 * left_var)).exp() / (2 * math.pi * left_var).sqrt()
    score = ((1 - wrong) * right + wrong / 2).log().sum()
    spread = torch.linalg.solve_triangular(root, factor.T, upper=False).T
    return factor @ beta, spread, noise, meant, score


def fit(factors: list[Tensor], z: Tensor, y: Tensor) -> Belief:
    """The ensemble's belief after answers ``y`` ``(n,)`` about samples of mixtures ``z`` ``(n, m)``."""
    m = z.shape[1]
    y = y.to(z)
    unit = float((y.max() - y.min()) / 2) if len(y) else 0.0
    if unit < 1e-6:
        centre = float(y.mean()) if len(y) else 0.0
        prior = sum(f @ f.T for f in factors) / len(factors)
        even = torch.full((len(factors),), 1 / len(factors), dtype=z.dtype)
        return Belief(z.new_full((m,), centre), prior, 1e-2, torch.ones_like(y), even)
    centre = y.mean()
    fits = [fit_member(f, z, (y - centre) / unit) for f in factors]
    weight = torch.stack([score for *_, score in fits]).softmax(0)
    mean = sum(w * f[0] for w, f in zip(weight, fits))
    covariance = sum(
        w * (f[1] @ f[1].T + torch.outer(f[0] - mean, f[0] - mean)) for w, f in zip(weight, fits)
    )
    noise = float(sum(w * f[2] for w, f in zip(weight, fits)))
    meant = sum(w * f[3] for w, f in zip(weight, fits))
    return Belief(centre + unit * mean, covariance * unit**2, noise * unit**2, meant, weight)
