"""Distances between unordered point clouds, and the field's metrics of a set of generated clouds.

    CD(x, y) = mean_i min_j |x_i - y_j|^p + mean_j min_i |x_i - y_j|^p,   p = 2, or 1

Chamfer distance as in Achlioptas et al. 2018 (arXiv 1707.02392), who define coverage and minimum matching distance
too; 1-NNA is from Lopez-Paz & Oquab 2017 (arXiv 1610.06545), for clouds Yang et al. 2019 (PointFlow, arXiv
1906.12320).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ENTRIES = 2**22  # distances held at a time


def directed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from every point to the nearest of the other cloud.

    Args:
        x: Clouds ``(..., P, D)``.
        y: Clouds ``(..., Q, D)``.

    Returns:
        ``(..., P)`` and ``(..., Q)``. Differentiable; where two points coincide the gradient is 0.
    """
    each = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return each.amin(-1), each.amin(-2)


def chamfer(x: Tensor, y: Tensor, power: int = 2) -> Tensor:
    """Chamfer distance of clouds ``(..., P, D)`` and ``(..., Q, D)``, ``(...)``."""
    there, back = directed(x, y)
    return (there**power).mean(-1) + (back**power).mean(-1)


def chamfer_matrix(x: Tensor, y: Tensor, power: int = 2) -> Tensor:
    """Chamfer distances of all clouds ``(n, P, D)`` to all others ``(m, Q, D)``, ``(n, m)``."""
    each = max(1, _ENTRIES // (x.shape[1] * y.shape[1] * len(y)))
    parts = [chamfer(part[:, None], y[None], power) for part in x.split(each)]
    return torch.cat(parts)


def nearest_neighbour_accuracy(xx: Tensor, xy: Tensor, yy: Tensor) -> float:
    """1-NNA: how often a cloud's nearest other cloud, of both sets together, is of its own set; 0.5 is best.

    Args:
        xx: Distances within the first set, ``(n, n)``.
        xy: From the first to the second, ``(n, m)``.
        yy: Within the second, ``(m, m)``.
    """
    n, far = len(xx), torch.inf
    whole = torch.cat([torch.cat([xx, xy], 1), torch.cat([xy.T, yy], 1)])
    own = torch.arange(len(whole), device=whole.device)
    nearest = whole.masked_fill(own[:, None] == own, far).argmin(1)
    return float(((nearest < n) == (own < n)).double().mean())


def coverage(xy: Tensor) -> float:
    """COV: share of the real clouds that are the nearest real one of some generated cloud; 1 is best.

    Args:
        xy: From generated ``n`` to real ``m``, ``(n, m)``.
    """
    return len(xy.argmin(1).unique()) / xy.shape[1]


def minimum_matching_distance(xy: Tensor) -> float:
    """MMD: mean distance of the real clouds to the nearest generated one; ``xy`` as in ``coverage``."""
    return float(xy.amin(0).double().mean())
