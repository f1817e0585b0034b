"""Nested state as one safetensors file: tensors as tensors, the rest as JSON in the header. Never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from prefenv.checkpoints import read_safetensors
from prefenv.errors import CheckpointError

_FORMAT = "prefenv-state-1"


def pack(tree: Any) -> bytes:
    """Bytes of a tree of dicts and lists whose leaves are tensors or JSON values."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            key = str(len(tensors))
            tensors[key] = node.detach().cpu().clone().contiguous()
            return {"__tensor__": key}
        if isinstance(node, dict):
            # Keys keep their type (optimisers number their parameters).
            return {"__dict__": [[k, strip(v)] for k, v in node.items()]}
        if isinstance(node, list | tuple):
            return [strip(v) for v in node]
        return node

    header = {"format": _FORMAT, "tree": json.dumps(strip(tree))}
    return serialize(tensors, header)


def unpack(path: Path) -> Any:
    """The tree of a file that ``pack`` made.

    Raises:
        CheckpointError: Missing, broken, or not such a file.
    """
    tensors, header = read_safetensors(path, _FORMAT)

    def fill(node: Any) -> Any:
        if isinstance(node, list):
            return [fill(v) for v in node]
        if isinstance(node, dict):
            if "__tensor__" in node:
                return tensors[node["__tensor__"]]
            return {k: fill(v) for k, v in node["__dict__"]}
        return node

    try:
        return fill(json.loads(header["tree"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its tree cannot be read ({error!r})") from None
