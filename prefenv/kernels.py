"""Stochastic steps of a flow: Gaussian transitions ``N(mean, std^2 I)`` from time ``t`` to ``u``.

Every kernel here is affine in the point and the velocity, ``mean = a x + b v``, so one function of (t, u) that
returns ``(a, b, std)`` serves sampling, replay and training alike. With ``h = u - t``, posterior means
``x1^ = x + (1-t) v``, ``x0^ = x - t v`` and score ``s = (t v - x) / (1-t)``:

==============  ===============================================================  ==========================
kernel          mean                                                             std
==============  ===============================================================  ==========================
``ode``         x + h v                                                          0
``flow-sde``    x + h (v + sigma^2 s / 2), sigma = level sqrt((1-t) / t)          sigma sqrt(h)
``memoryless``  ``flow-sde`` at level sqrt(2)                                    sigma sqrt(h)
``constant``    x + h (v + sigma^2 s / 2), sigma = level                          sigma sqrt(h)
``cps``         u x1^ + sqrt((1-u)^2 - std^2) x0^                                (1-u) sin(level pi / 2)
``precise``     u x1^ + sqrt((1-u)^2 - std^2) x0^                                (1-u) sqrt(1 - rho^(level^2))
``ddim``        u x1^ + sqrt((1-u)^2 - std^2) x0^                                (1-u) sqrt(level tau)
==============  ===============================================================  ==========================

``rho = t (1-u) / (u (1-t))``, ``tau = 1 - rho^2``. ``flow-sde`` takes ``sigma(u)`` at ``t = 0``, where
``sigma(t)`` is infinite. Sources: Flow-GRPO (arXiv 2505.05470), Adjoint Matching (2409.08861), DanceGRPO
(2505.07818), Flow-CPS (2509.05952), Precise (Tencent-Hunyuan), DDIM (2010.02502) written for flows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefenv.errors import ConfigError, NoLogProbError, UnknownNameError

Reduction = Literal["sum", "mean"]
_LOG_2PI = math.log(2 * math.pi)


class Affine(NamedTuple):
    """``N(a x + b v, std^2 I)``: scalars, or ``(B,)`` tensors for rows at different times."""

    a: Tensor
    b: Tensor
    std: Tensor


def _with_score(t: Tensor, u: Tensor, sigma2: Tensor) -> Affine:
    """Euler-Maruyama of ``dX = (v + sigma^2 s / 2) dt + sigma dW``."""
    h = u - t
    w = sigma2 * h / (2 * (1 - t))
    return Affine(1 - w, h + w * t, (sigma2 * h).sqrt())


def _flow_sde(t: Tensor, u: Tensor, level: float) -> Affine:
    s = torch.where(t == 0, u, t)
    return _with_score(t, u, level**2 * (1 - t) / s)


def _from_std(t: Tensor, u: Tensor, std: Tensor) -> Affine:
    """The DDIM form: keep ``x1^``, replace part of ``x0^`` by fresh noise of the same size."""
    keep = ((1 - u).square() - std.square()).clamp_min(0).sqrt()
    return Affine(u + keep, u * (1 - t) - keep * t, std)


def _rho(t: Tensor, u: Tensor) -> Tensor:
    return t * (1 - u) / (u * (1 - t))


# name: (function of (t, u, level), default level). The table is the registry of kernels.
KERNELS: dict[str, tuple[Callable[[Tensor, Tensor, float], Affine], float]] = {
    "ode": (lambda t, u, level: Affine(torch.ones_like(t), u - t, torch.zeros_like(t)), 0.0),
    "flow-sde": (_flow_sde, 0.7),
    "memoryless": (lambda t, u, level: _flow_sde(t, u, math.sqrt(2)), math.sqrt(2)),
    "constant": (lambda t, u, level: _with_score(t, u, torch.full_like(t, level**2)), 0.3),
    "cps": (lambda t, u, level: _from_std(t, u, (1 - u) * math.sin(level * math.pi / 2)), 0.7),
    "precise": (
        lambda t, u, level: _from_std(t, u, (1 - u) * (1 - _rho(t, u) ** level**2).sqrt()),
        1.5,
    ),
    "ddim": (
        lambda t, u, level: _from_std(t, u, (1 - u) * (level * (1 - _rho(t, u) ** 2)).sqrt()),
        0.245,
    ),
}


@dataclass(frozen=True)
class Kernel:
    """A stochastic step. Outside its window it is the ODE's Euler step.

    Args:
        name: One of ``KERNELS``.
        level: The noise level in front of sigma; None = the kernel's own default. 0 is exactly Euler for
            ``flow-sde``, ``constant`` and ``ddim``. Range: ``cps`` and ``ddim`` [0, 1], the others >= 0;
            ``memoryless`` and ``ode`` take none.
        window: Steps that start at a time in ``[window[0], window[1])`` are stochastic.

    Raises:
        UnknownNameError: No such kernel.
        ConfigError: Level or window out of range.
    """

    name: str = "flow-sde"
    level: float | None = None
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.name not in KERNELS:
            raise UnknownNameError(
                f"unknown kernel {self.name!r}; choose one of {', '.join(KERNELS)}"
            )
        top = 1.0 if self.name in ("cps", "ddim") else math.inf
        if self.level is not None and not 0 <= self.level <= top:
            raise ConfigError(
                f"kernel {self.name} takes a noise level in [0, {top}], not {self.level}"
            )
        if self.level is not None and self.name in ("ode", "memoryless"):
            raise ConfigError(f"kernel {self.name} has no noise level to set; leave it out")
        if not 0 <= self.window[0] <= self.window[1] <= 1:
            raise ConfigError(f"a window is two times 0 <= from <= to <= 1, not {self.window}")

    def coefficients(self, t: Tensor | float, u: Tensor | float) -> Affine:
        """``(a, b, std)`` of the step from ``t`` to ``u``, float64, of the shape of ``t``."""
        t = torch.as_tensor(t, dtype=torch.float64)
        u = torch.as_tensor(u, dtype=torch.float64)
        function, default = KERNELS[self.name]
        inside = (t >= self.window[0]) & (t < self.window[1])
        noisy = function(t, u, default if self.level is None else self.level)
        plain = KERNELS["ode"][0](t, u, 0.0)
        return Affine(*(torch.where(inside, n, p) for n, p in zip(noisy, plain, strict=True)))

    def mean(self, x: Tensor, v: Tensor, t: Tensor | float, u: Tensor | float) -> Tensor:
        """The transition's mean, ``(B, *event)``."""
        c = self.coefficients(t, u)
        return _rows(c.a, x) * x + _rows(c.b, x) * v

    def std(self, t: Tensor | float, u: Tensor | float) -> Tensor:
        """The transition's standard deviation in every dimension; 0 where the step is deterministic."""
        return self.coefficients(t, u).std

    def sample(
        self,
        x: Tensor,
        v: Tensor,
        t: Tensor | float,
        u: Tensor | float,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``mean + std z``; ``z`` is ``noise`` or drawn from ``generator``."""
        if noise is None:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        c = self.coefficients(t, u)
        return _rows(c.a, x) * x + _rows(c.b, x) * v + _rows(c.std, x) * noise

    def log_prob(
        self,
        x: Tensor,
        v: Tensor,
        t: Tensor | float,
        u: Tensor | float,
        x_next: Tensor,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """``log N(x_next; mean, std^2 I)``, ``(B,)``, at least float32.

        Args:
            x: Points at ``t``, ``(B, *event)``.
            v: Velocities there.
            t: Start of the step, a scalar or ``(B,)``.
            u: End of the step.
            x_next: Points at ``u``.
            reduction: ``sum`` over dimensions (a log-density) or ``mean`` (its D-th part).

        Raises:
            NoLogProbError: The step is deterministic.
        """
        c = self.coefficients(t, u)
        return gaussian_log_prob(
            x_next, _rows(c.a, x) * x + _rows(c.b, x) * v, _rows(c.std, x), reduction
        )


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "sum") -> Tensor:
    """``log N(x; mean, std^2 I)`` of each row, ``(B,)``; ``std`` broadcasts against ``x``.

    Raises:
        NoLogProbError: ``std`` is 0 somewhere.
    """
    if bool((std <= 0).any()):
        raise NoLogProbError(
            "this step is deterministic (std = 0) and has no log-probability; "
            "use a stochastic kernel, or leave the step out"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = (x.to(dtype) - mean.to(dtype)) / std.to(dtype)
    each = (-0.5 * z.square() - std.to(dtype).log() - 0.5 * _LOG_2PI).flatten(1)
    return each.sum(1) if reduction == "sum" else each.mean(1)


def _rows(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient, a scalar or ``(B,)``, shaped to multiply ``x``."""
    c = c.to(device=x.device, dtype=x.dtype)
    return c.reshape(-1, *[1] * (x.dim() - 1)) if c.dim() else c
