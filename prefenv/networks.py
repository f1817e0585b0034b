"""Velocity networks: ``v(x, t[, condition])``.

A network is any :class:`VelocityField`. Sampling shares one ``t`` among all rows of a batch, so a field may
turn its time embedding into a bias once per step instead of once per row: :meth:`VelocityField.at` returns
one function ``x -> v`` for each time, and :class:`VelocityMLP` overrides it with exactly that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefenv.errors import ConfigError

VelocityAt = Callable[[Tensor], Tensor]


class VelocityField(nn.Module):
    """Base of all velocity fields. A subclass writes ``forward``.

    Args:
        event_shape: Shape of one sample.
    """

    def __init__(self, event_shape: Sequence[int]):
        super().__init__()
        self.event_shape = tuple(int(n) for n in event_shape)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The velocity at ``x``.

        Args:
            x: Points on the path, ``(B, *event_shape)``.
            t: Time in [0, 1], a scalar or ``(B,)``; 0 = noise, 1 = data.
            condition: Of each row, where the task has one: classes ``(B,)`` or vectors ``(B, dim)``.

        Returns:
            Velocities, ``(B, *event_shape)``.
        """
        raise NotImplementedError

    def at(self, times: Tensor, condition: Tensor | None = None) -> list[VelocityAt]:
        """One function ``x -> v(x, t)`` for each of ``times`` ``(K,)``, for parameters as they are now.

        Where gradients are off, a field may copy its parameters: the functions then never record a gradient.
        """
        return [lambda x, t=t: self(x, t, condition) for t in times]  # type: ignore[misc]

    def plain(self) -> VelocityField:
        """What flow matching trains: the field itself, or the one inside that it guides."""
        return self


class GuidedVelocity(VelocityField):
    """Classifier-free guidance: ``v_null + weight (v_cond - v_null)`` (Ho & Salimans 2022, arXiv 2207.12598).

    One evaluation of it, in the ledger too, is one of both.

    Args:
        field: A field that knows a null condition.
        null: Conditions to as many null ones.
        weight: 1 = the field itself; above, samples are more typical of their condition.
    """

    def __init__(self, field: VelocityField, null: Callable[[Tensor], Tensor], weight: float = 1.0):
        super().__init__(field.event_shape)
        self.field, self.null, self.weight = field, null, float(weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.weight == 1.0 or condition is None:
            return self.field(x, t, condition)
        both = torch.cat([condition, self.null(condition)])
        twice = t.repeat(2) if t.dim() else t
        told, silent = self.field(torch.cat([x, x]), twice, both).chunk(2)
        return torch.lerp(silent, told, self.weight)

    def at(self, times: Tensor, condition: Tensor | None = None) -> list[VelocityAt]:
        if self.weight == 1.0:
            return self.field.at(times, condition)
        return super().at(times, condition)

    def plain(self) -> VelocityField:
        return self.field


def needed(condition: Tensor | None) -> Tensor:
    """The condition of a field that is nothing without one.

    Raises:
        ConfigError: It is missing.
    """
    if condition is None:
        raise ConfigError("this velocity is conditional: give the condition of each row")
    return condition


class VelocityMLP(VelocityField):
    """A residual MLP: pre-norm blocks ``h + W2 silu(W1 norm(h))``, time and condition in the first bias.

    Args:
        event_shape: Shape of one sample; flattened inside.
        width: Channels of the hidden layers.
        blocks: Residual blocks.
        frequencies: Sine and cosine features of ``t``, geometric from 1 to 100 rad.
        classes: Number of conditions; 0 = none.
        vector: Length of a condition that is a vector (NaN = not given); 0 = none.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 256,
        blocks: int = 3,
        frequencies: int = 32,
        classes: int = 0,
        vector: int = 0,
    ):
        super().__init__(event_shape)
        dim = math.prod(self.event_shape)
        self.options = {
            "width": width,
            "blocks": blocks,
            "frequencies": frequencies,
            "classes": classes,
            "vector": vector,
        }
        self.inp = nn.Linear(dim, width)
        self.time = nn.Linear(2 * frequencies, width, bias=False)
        self.label = nn.Embedding(classes, width) if classes else None
        self.given = nn.Linear(vector, width) if vector else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.ups = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        frequency = torch.exp(torch.linspace(0.0, math.log(100.0), frequencies))
        self.register_buffer("frequency", frequency, persistent=False)

    def _bias(self, t: Tensor, condition: Tensor | None) -> Tensor:
        """First-layer bias from time and condition, ``(*t.shape, width)`` or ``(B, width)``."""
        angle = t.to(self.inp.weight.dtype)[..., None] * self.get_buffer("frequency")
        bias = self.time(torch.cat([angle.sin(), angle.cos()], -1)) + self.inp.bias
        if self.label is not None:
            return bias + self.label(needed(condition))
        if self.given is not None:
            c = needed(condition)
            known = ~c.isnan().any(-1, keepdim=True)
            return bias + self.given(c.nan_to_num()) * known
        return bias

    def _body(self, x: Tensor, bias: Tensor) -> Tensor:
        inplace = not torch.is_grad_enabled()
        flat = x.flatten(1)
        weight = self.inp.weight.t()
        h = torch.addmm(bias, flat, weight) if bias.dim() == 1 else flat @ weight + bias
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            r = down(F.silu(up(norm(h)), inplace=inplace))
            h = h.add_(r) if inplace else h + r
        return self.out(F.silu(self.norm(h), inplace=inplace)).view_as(x)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._body(x, self._bias(t, condition))

    @torch.no_grad()
    def _snapshot(self) -> Callable[[Tensor, Tensor], Tensor]:
        """``_body`` without gradient, on copies of the weights of now; stored (in, out) they multiply faster."""

        def copy(linear: Any) -> tuple[Tensor, Tensor]:
            return linear.bias.clone(), linear.weight.t().contiguous()

        def scale(norm: Any) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
            return norm.normalized_shape, norm.weight.clone(), norm.bias.clone(), norm.eps

        layers = zip(self.norms, self.ups, self.downs, strict=True)
        blocks = [(scale(norm), *copy(up), *copy(down)) for norm, up, down in layers]
        (_, inp), last, (out_bias, out) = copy(self.inp), scale(self.norm), copy(self.out)

        def run(x: Tensor, bias: Tensor) -> Tensor:
            h = torch.addmm(bias, x.flatten(1), inp)
            for norm, up_bias, up, down_bias, down in blocks:
                r = F.silu(torch.addmm(up_bias, F.layer_norm(h, *norm), up), inplace=True)
                h.add_(down_bias).addmm_(r, down)
            h = F.silu(F.layer_norm(h, *last), inplace=True)
            return torch.addmm(out_bias, h, out).view_as(x)

        @torch.no_grad()
        def body(x: Tensor, bias: Tensor) -> Tensor:
            rows = 512 * torch.get_num_threads()
            if x.device.type != "cpu" or len(x) <= rows:
                return run(x, bias)
            # Hidden layers of so few rows stay in a CPU's cache.
            biases = bias.split(rows) if bias.dim() == 2 else [bias] * -(-len(x) // rows)
            return torch.cat([run(*part) for part in zip(x.split(rows), biases, strict=True)])

        return body

    def at(self, times: Tensor, condition: Tensor | None = None) -> list[VelocityAt]:
        if condition is None:
            biases = self._bias(times, None)
        else:
            biases = self._bias(times[:, None].expand(-1, len(condition)), condition)
        body = self._body if torch.is_grad_enabled() else self._snapshot()
        return [lambda x, b=b: body(x, b) for b in biases]  # type: ignore[misc]


class DataPrediction(VelocityField):
    """A network that says what the sample will be, ``D(x, t)``: ``v(x, t) = (D(x, t) - x) / max(1 - t, closest)``.

    For ``D = E[x1 | x_t = x]`` this is the same velocity. The point noise in ``x`` then need not pass through the
    hidden layers, so that a network narrower than the sample does (Li & He 2025, arXiv 2511.13720).

    Args:
        network: ``D``.
        closest: Least ``1 - t`` that it is divided by.
    """

    def __init__(self, network: VelocityField, closest: float = 0.05):
        super().__init__(network.event_shape)
        self.network, self.closest = network, closest

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        left = (1 - t.to(x.dtype)).clamp_min(self.closest).reshape(-1, *[1] * (x.dim() - 1))
        return (self.network(x, t, condition) - x) / left

    def at(self, times: Tensor, condition: Tensor | None = None) -> list[VelocityAt]:
        left = (1 - times).clamp_min(self.closest).tolist()
        sight = self.network.at(times, condition)
        return [lambda x, d=d, h=h: (d(x) - x) / h for d, h in zip(sight, left, strict=True)]  # type: ignore[misc]


class GaussianVelocity(VelocityField):
    """The exact velocity of data ``N(mean, std^2)``, independent coordinates: the closed form for tests.

    ``v(x, t) = m + (t s^2 - (1 - t)) / ((1 - t)^2 + t^2 s^2) (x - t m)``.

    Args:
        mean: ``event_shape`` or broadcastable to it.
        std: Standard deviations, broadcastable to ``event_shape``.
        event_shape: Shape of one sample.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Tensor | float, std: Tensor | float, event_shape: Sequence[int] = (1,)
    ):
        super().__init__(event_shape)
        self.register_buffer("mean", torch.as_tensor(mean).expand(self.event_shape).clone())
        self.register_buffer("std", torch.as_tensor(std).expand(self.event_shape).clone())

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        t = t.to(x.dtype).reshape(-1, *[1] * len(self.event_shape))
        var = (1 - t) ** 2 + (t * self.std) ** 2
        slope = (t * self.std**2 - (1 - t)) / var
        return self.mean + slope * (x - t * self.mean)


class MixtureVelocity(VelocityField):
    """The exact velocity of data ``sum_k w_k N(c_k, std^2 I)``, points of the plane or any space.

    ``x_t`` is the mixture of ``N(t c_k, var I)``, ``var = (1 - t)^2 + t^2 std^2``. With ``r_k(x, t)`` its
    responsibilities, ``v(x, t) = sum_k r_k [c_k + (t std^2 - (1 - t)) / var (x - t c_k)]``.

    Args:
        centres: ``(K, D)``.
        std: Standard deviation of every component, per coordinate.
        weights: ``(K,)``, sum 1.
    """

    centres: Tensor
    log_weights: Tensor

    def __init__(self, centres: Tensor, std: float, weights: Tensor):
        super().__init__(centres.shape[1:])
        self.std = std
        self.register_buffer("centres", centres)
        self.register_buffer("log_weights", weights.log())

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        t = t.to(x.dtype).reshape(-1, 1)
        var = (1 - t) ** 2 + (t * self.std) ** 2
        offset = x[:, None] - t[..., None] * self.centres
        share = (self.log_weights - offset.square().sum(-1) / (2 * var)).softmax(-1)
        centre = share @ self.centres
        return centre + (t * self.std**2 - (1 - t)) / var * (x - t * centre)
