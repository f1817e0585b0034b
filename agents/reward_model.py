"""A reward learned from few answers, on the generator's own unlabelled samples.

**Anchors.** A few hundred (k-means++) cover the samples. A reward is its values ``f`` at the anchors, elsewhere
``r(x) = z(x) f`` with ``z`` the weights that best rebuild ``x`` from the nearest ones (locally linear embedding,
Roweis & Saul 2000). Gaussian processes ``f ~ GP(mean, unit^2 C)``, ``unit`` = range of the answers / 2:

    graph   C = corr(U diag((lambda + lambda_k)^-2) U'),   lambda, U the spectrum of I - D^-1/2 W D^-1/2
    plain   C_ab = exp(-|a - b|^2 / 2 l^2)

In the graph two anchors are linked as far as samples lie between them (anchor graph: Liu, He & Chang 2010, ICML);
the process is a Matern one on it (Borovitskiy et al. 2021, AISTATS) that about ``k`` numbers describe. What no
sample connects is independent in it, and along what is connected one answer goes far: this is what one question
lives on, and nothing is known of classes. The plain ones, smooth in the coordinates, win by their evidence where
many ratings follow a continuous preference.

**Answers** may be wrong: ``y_i ~ (1 - e) N(r(x_i), s unit^2) + e U(range)``. ``q_i``, the probability that answer
``i`` was meant, and the belief are found in turn (EM); the members are averaged by their evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = (2, 4, 8, 16, 32)
LENGTHS = (0.5, 1.0, 2.0, 4.0)
NOISES = (1e-5, 1e-3, 1e-2, 1e-1, 0.5)
PLAIN = -3.0  # nats by which a plain member must be the better one


def kmeans(x: Tensor, count: int, generator: torch.Generator, steps: int = 10) -> Tensor:
    """``count`` centres of points ``(n, D)``: k-means++ (Arthur & Vassilvitskii 2007) and Lloyd's steps."""
    index = torch.randint(len(x), (1,), generator=generator, device=x.device)
    chosen, square = [index], torch.full_like(x[:, 0], torch.inf)
    for _ in range(count - 1):
        square = torch.minimum(square, (x - x[index]).square().sum(1))
        index = torch.multinomial(square + 1e-12, 1, generator=generator)
        chosen.append(index)
    centre = x[torch.cat(chosen)]
    for _ in range(steps):
        near = torch.cdist(x, centre).argmin(1)
        members = torch.nn.functional.one_hot(near, count).to(x.dtype)
        number = members.sum(0)[:, None]
        centre = torch.where(number > 0, members.T @ x / number.clamp_min(1), centre)
    return centre


def mixture(x: Tensor, anchors: Tensor, near: int = 5) -> Tensor:
    """Weights ``(n, m)``, float64, of each point's ``near`` nearest anchors: ``1 - d^2 / d_next^2``, sum 1."""
    near = min(near, len(anchors) - 1)
    distance, index = torch.cdist(x, anchors).double().topk(near + 1, largest=False)
    square = distance.square()
    weight = (1 - square[:, :-1] / square[:, -1:].clamp_min(1e-12)).clamp_min(1e-9)
    weight = weight / weight.sum(1, keepdim=True)
    return weight.new_zeros(len(x), len(anchors)).scatter_(1, index[:, :-1], weight)


def rebuild(x: Tensor, anchors: Tensor, near: int = 6, ridge: float = 0.05) -> Tensor:
    """Weights ``(n, m)``, float64, sum 1, that best rebuild each point from its ``near`` nearest anchors.

    Unlike a mixture they go on beyond the anchors, so that a linear function is continued and not cut off.
    """
    near = min(near, len(anchors))
    index = torch.cdist(x, anchors).topk(near, largest=False).indices
    gap = anchors[index].double() - x[:, None].double()
    gram = gap @ gap.mT
    level = ridge * gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-12)
    eye = torch.eye(near, dtype=gram.dtype, device=x.device)
    weight = torch.linalg.solve(gram + level[:, None, None] * eye, gram.new_ones(len(x), near))
    weight = weight / weight.sum(1, keepdim=True)
    return weight.new_zeros(len(x), len(anchors)).scatter_(1, index, weight)


def plain_factors(anchors: Tensor, rank: int = 64) -> Tensor:
    """Factors ``(len(LENGTHS), m, rank)`` of the plain members; lengths in median distances of the anchors."""
    distance = torch.cdist(anchors, anchors).double()
    unit = distance[distance > 0].median()
    found = []
    for length in LENGTHS:
        value, vector = torch.linalg.eigh((-((distance / (length * unit)) ** 2) / 2).exp())
        found.append(vector[:, -rank:] * value[-rank:].clamp_min(0).sqrt())
    factors = torch.stack(found)
    return factors / factors.norm(dim=2, keepdim=True).clamp_min(1e-12)


def graph_factors(z: Tensor, sizes: Sequence[int] = SIZES, rank: int = 64) -> Tensor:
    """Factors ``F_k`` ``(len(sizes), m, rank)`` of the members' correlations ``C_k = F_k F_k'``.

    Args:
        z: Mixtures of the samples, ``(n, m)``.
        sizes: The members' ``k``.
        rank: Eigenvectors kept, the smoothest.
    """
    link = z.T @ z
    link = link - link.diag().diag()
    scale = link.sum(1).clamp_min(1e-9).rsqrt()
    eye = torch.eye(len(link), dtype=z.dtype, device=z.device)
    value, vector = torch.linalg.eigh(eye - scale[:, None] * link * scale)
    value, vector = value[:rank].clamp_min(1e-6), vector[:, :rank]
    factors = torch.stack([vector / (value + value[min(k, len(value)) - 1]) for k in sizes])
    return factors / factors.norm(dim=2, keepdim=True).clamp_min(1e-12)


@dataclass
class Belief:
    """What is believed of the reward, at the anchors.

    Args:
        mean: ``(m,)``.
        covariance: ``(m, m)``, of the members and between them.
        noise: Variance of an answer that was meant.
        meant: Probability that each answer was meant, ``(n,)``.
        weight: The members' weights ``(k, noises)``.
    """

    mean: Tensor
    covariance: Tensor
    noise: float
    meant: Tensor
    weight: Tensor


def members(
    factors: Tensor, z: Tensor, y: Tensor, precision: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Posteriors of ``f = F b, b ~ N(0, I)`` given ``y_i ~ N(z_i f, noise / precision_i)``, all members at once.

    Args:
        factors: ``(k, m, rank)``.
        z: ``(n, m)``.
        y: ``(n,)``.
        precision: ``(n,)``.
        noise: ``(s,)``.

    Returns:
        Means ``(k, s, m)``, factors of the covariances ``(k, s, m, rank)``, and log-evidence ``(k, s)`` up to
        what all members share.
    """
    weighted = z * precision[:, None]
    inner = factors.mT @ (weighted.T @ z) @ factors  # (k, r, r)
    right = factors.mT @ (weighted.T @ y)  # (k, r)
    eye = torch.eye(inner.shape[-1], dtype=z.dtype, device=z.device)
    scaled = right[:, None] / noise[:, None]  # (k, s, r)
    root = torch.linalg.cholesky(eye + inner[:, None] / noise[:, None, None])
    half = torch.linalg.solve_triangular(root, scaled[..., None], upper=False)
    spread = torch.linalg.solve_triangular(root, factors.mT[:, None], upper=False).mT
    misfit = (precision * y.square()).sum() / noise - half.square().sum((-2, -1))
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + precision.sum() * noise.log()
    return (spread @ half)[..., 0], spread, -0.5 * (misfit + log_det)


def fit(
    factors: Tensor,
    z: Tensor,
    y: Tensor,
    prior: Tensor | None = None,
    steps: int = 8,
    wrong: float = 0.1,
) -> Belief:
    """The ensemble's belief.

    Args:
        factors: Of the members' correlations, ``(k, m, rank)``.
        z: Mixtures of the judged samples, ``(n, m)``.
        y: Their answers ``(n,)``.
        prior: Of the members, nats ``(k,)``; None = all alike.
        steps: EM steps.
        wrong: Expected share of wrong answers, worth ten answers.
    """
    noise = torch.tensor(NOISES, dtype=z.dtype, device=z.device)
    y, lead = y.to(z), z.new_zeros(len(factors)) if prior is None else prior.to(z)
    unit = float(y.max() - y.min()) / 2 if len(y) else 0.0
    if unit < 1e-6:  # nothing is known but, at most, one number
        centre = float(y.mean()) if len(y) else 0.0
        even = (lead.softmax(0)[:, None] / len(noise)).expand(-1, len(noise))
        cover = torch.einsum("k,kmr,knr->mn", lead.softmax(0), factors, factors)
        return Belief(z.new_full(z.shape[1:], centre), cover, 1e-2, torch.ones_like(y), even)
    centre, meant, share = y.mean(), torch.ones_like(y), wrong
    y = (y - centre) / unit

    def believe(meant: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        means, spread, evidence = members(factors, z, y, meant, noise)
        weight = (evidence + lead[:, None]).flatten().softmax(0).view_as(evidence)
        mean = (weight[..., None] * means).sum((0, 1))
        gap = means - mean
        covariance = torch.einsum("ks,ksmr,ksnr->mn", weight, spread, spread)
        covariance = covariance + torch.einsum("ks,ksm,ksn->mn", weight, gap, gap)
        return weight, mean, covariance, (weight.sum(0) * noise).sum()

    for _ in range(steps - 1):
        _, mean, covariance, level = believe(meant)
        var = ((z @ covariance) * z).sum(1) + level
        right = (
            (1 - share) * (-(y - z @ mean).square() / (2 * var)).exp() / (2 * math.pi * var).sqrt()
        )
        meant = right / (right + share / 2)
        share = float(((1 - meant).sum() + 10 * wrong) / (len(y) + 10))
    weight, mean, covariance, level = believe(meant)
    return Belief(centre + unit * mean, unit**2 * covariance, unit**2 * float(level), meant, weight)


def conditioned(covariance: Tensor, z: Tensor, noise: float) -> Tensor:
    """A covariance ``(m, m)`` after answers to samples of mixtures ``z`` ``(n, m)``, whatever they are."""
    for row in z:
        column = covariance @ row
        covariance = covariance - torch.outer(column, column) / (row @ column + noise)
    return covariance


def choose(
    belief: Belief,
    z: Tensor,
    square: Tensor,
    times: Tensor,
    count: int,
    label: Tensor | None = None,
    panel: int = 1,
) -> Tensor:
    """Which samples to ask about, ``(count,)``: those whose answers leave the least variance at the anchors.

    Transductive experimental design (Yu, Bi & Tresp 2006, ICML), greedily: anchor ``argmax |C_a|^2 / (C_aa + s)``,
    the sample nearest to it that was asked least often, ``C`` conditioned on its answer. Every anchor counts
    alike: counting them by their weight in the tilt starved other kinds of questions and lowered the score.

    Args:
        belief: What is believed.
        z: Mixtures of the samples, ``(n, m)``.
        square: Squared distances of samples and anchors, ``(n, m)``.
        times: How often each sample was asked, ``(n,)``.
        count: How many, at most n.
        label: Which condition each sample is of, ``(n,)``; a panel asks about one.
        panel: So many in a row are a panel.
    """
    c, times, chosen = belief.covariance.clone(), times.clone(), []
    far = 2 * float(square.max()) + 1
    for i in range(count):
        value, cost = c.square().sum(1) / (c.diag() + belief.noise), far * times
        if label is not None and i % panel:
            # The rest of a panel: samples of its condition, and the anchors where they are at home.
            same = label == label[chosen[-1]]
            near = torch.zeros_like(value, dtype=torch.bool)
            near[square[same].argmin(1)] = True
            value, cost = value.where(near, -torch.inf), cost.where(same, torch.inf)
        anchor = int(value.argmax())
        pick = int((square[:, anchor] + cost).argmin())
        chosen.append(pick)
        times[pick] += 1
        c = conditioned(c, z[pick : pick + 1], belief.noise)
    return torch.tensor(chosen, device=z.device)
