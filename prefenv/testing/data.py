"""Nested data of environments (dicts, tuples, arrays, tensors): walk it, copy it, compare it, spoil it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from prefenv.errors import PrefenvError


class ContractError(AssertionError, PrefenvError):
    """A part breaks its contract; the message names the mistake and its mend."""


def need(holds: Any, message: str) -> None:
    """Raise ``ContractError(message)`` unless ``holds``."""
    if not holds:
        raise ContractError(message)


def leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All arrays, tensors and scalars in nested data, with the path to each."""
    objects = isinstance(data, np.ndarray) and data.dtype == object
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif objects or isinstance(data, (tuple, list)):
        for i, value in enumerate(data):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path, data


def copied(data: Any) -> Any:
    """Independent nested data, tensors as arrays, lists as tuples."""
    if isinstance(data, dict):
        return {key: copied(value) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return tuple(copied(value) for value in data)
    return data.detach().cpu().numpy().copy() if isinstance(data, Tensor) else copy.deepcopy(data)


def difference(one: Any, other: Any, tolerance: float = 0.0) -> str | None:
    """Path to the first leaf in which two pieces of copied data differ, or None."""
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    if odd := ours.keys() ^ theirs.keys():
        return min(odd)
    for path, value in ours.items():
        a, b = np.asarray(value), np.asarray(theirs[path])
        if a.shape != b.shape:
            return path
        numbers = a.dtype.kind in "fiub" and b.dtype.kind in "fiub"
        if not (np.allclose(a, b, tolerance, tolerance, True) if numbers else np.all(a == b)):
            return path
    return None


def row_of(data: Any, row: int) -> Any:
    """One row of batched data (a dict of arrays, or an array)."""
    return {k: row_of(v, row) for k, v in data.items()} if isinstance(data, dict) else data[row]


def spoil(data: Any) -> None:
    """Overwrite everything in nested data, as its owner may."""
    for _, leaf in leaves(data):
        if isinstance(leaf, Tensor):
            leaf.fill_(1)
        elif isinstance(leaf, np.ndarray) and leaf.flags.writeable:
            leaf.fill(1)
