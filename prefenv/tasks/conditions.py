"""What samples are conditioned on: a class (the prompt), or a vector (a state).

Conditions travel as tensors with one row a sample, ``(B,)`` integers or ``(B, dim)`` floats. A **null** condition,
for classifier-free guidance, says nothing: class ``n``, or a vector of NaN.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from prefenv.errors import ConfigError


@dataclass(frozen=True)
class Classes:
    """One of ``n`` classes: integers 0 to n - 1, ``(B,)``; ``n`` is the null."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one condition."""
        return ()

    @property
    def width(self) -> int:
        """Length of a condition's features."""
        return self.n

    def space(self) -> Discrete:
        """Where one observation's condition lies."""
        return Discrete(self.n)

    def network(self, null: bool) -> dict[str, int]:
        """The options of ``VelocityMLP`` for it; with ``null``, a label more."""
        return {"classes": self.n + null}

    def tensor(self, values: Any) -> Tensor:
        """Values as int64.

        Raises:
            ConfigError: They are no classes.
        """
        found = torch.as_tensor(values)
        if found.is_floating_point() and not torch.equal(found, found.round()):
            raise ConfigError(f"conditions are classes 0 to {self.n - 1}, not fractions or NaN")
        found = found.long()
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < self.n:
            raise ConfigError(f"conditions are classes 0 to {self.n - 1}, not {found.tolist()}")
        return found

    def features(self, condition: Tensor) -> Tensor:
        """One-hot rows ``(B, n)``, float32."""
        return F.one_hot(condition, self.n).float()

    def null(self, condition: Tensor) -> Tensor:
        """As many null conditions."""
        return torch.full_like(condition, self.n)


@dataclass(frozen=True)
class Vector:
    """A vector of ``dim`` numbers within ``bound``: floats ``(B, dim)``; NaN is the null."""

    dim: int
    bound: float = 10.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one condition."""
        return (self.dim,)

    @property
    def width(self) -> int:
        """Length of a condition's features."""
        return self.dim

    def space(self) -> Box:
        """Where one observation's condition lies."""
        return Box(-self.bound, self.bound, (self.dim,), np.float32)

    def network(self, null: bool) -> dict[str, int]:
        """The options of ``VelocityMLP`` for it, which takes NaN for the null."""
        return {"vector": self.dim}

    def tensor(self, values: Any) -> Tensor:
        """Values as float32.

        Raises:
            ConfigError: They lie outside the bound, or are not finite.
        """
        found = torch.as_tensor(values, dtype=torch.float32)
        if found.numel() and not float(found.abs().amax()) <= self.bound:
            raise ConfigError(f"conditions must be finite and within {self.bound}")
        return found

    def features(self, condition: Tensor) -> Tensor:
        """The vectors themselves."""
        return condition

    def null(self, condition: Tensor) -> Tensor:
        """As many null conditions."""
        return torch.full_like(condition, torch.nan)


Condition = Classes | Vector


def rows_of(condition: Tensor | None, index: Any) -> Tensor | None:
    """Some rows of conditions, where there are any."""
    return None if condition is None else condition[index]


def to_device(condition: Tensor | None, device: torch.device) -> Tensor | None:
    """Conditions, where there are any, on a device."""
    return None if condition is None else condition.to(device)


def panels_of(condition: Tensor | None, panel_size: int) -> Tensor | None:
    """The conditions of panels ``(m, ...)`` from those of their rows ``(m K, ...)``.

    Raises:
        ConfigError: The samples of a panel have several.
    """
    if condition is None:
        return None
    panels = condition.unflatten(0, (-1, panel_size))
    if not torch.equal(panels, panels[:, :1].expand_as(panels)):
        raise ConfigError("a panel compares samples of one condition: give its rows the same one")
    return panels[:, 0]


def group(condition: Tensor) -> Tensor:
    """Which rows have equal conditions: numbers from 0, ``(B,)``."""
    return condition.unique(dim=0, return_inverse=True)[1]


def to_text(condition: Tensor) -> str:
    """One condition as JSON, the prompt of a feedback file."""
    return json.dumps(condition.tolist())


def from_texts(texts: Sequence[str | None], kind: Condition) -> Tensor:
    """Conditions from their JSON.

    Raises:
        ConfigError: They cannot be read, or are not of this kind.
    """
    try:
        values = [json.loads(text or "") for text in texts]
        found = kind.tensor(values)
    except (ValueError, TypeError, RuntimeError):
        raise ConfigError("the samples' conditions are missing or cannot be read") from None
    if found.shape[1:] != kind.shape:
        raise ConfigError(f"the samples' conditions have shape {tuple(found.shape[1:])}")
    return found
