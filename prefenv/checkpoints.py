"""Trained references: safetensors with a model card in their header. Never pickle.

A checkpoint is ``<task>.safetensors``: tensors, and in the header the task, the network's class and options
and the card (how it was made, what it was measured to do). ``<task>.md`` shows the card to people.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from prefenv.errors import CheckpointError
from prefenv.flow import RectifiedFlow
from prefenv.tasks import Task

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the frozen flow and its card."""

    flow: RectifiedFlow
    card: dict[str, Any]


def shipped(name: str, suffix: str = ".safetensors") -> Path:
    """Where ``checkpoints/NAME.safetensors`` lies: in an installed package, beside it in the repository, or here.

    Here, in the current folder, is where ``prefenv train`` writes.
    """
    for folder in (_HERE / "checkpoints", _HERE.parent / "checkpoints", Path("checkpoints")):
        path = folder / f"{name}{suffix}"
        if path.exists():
            return path
    return path


def find(path: Path | str) -> Path:
    """The file that a setting means: a path, or the name of one of ours, such as ``shapes-rare``."""
    plain = Path(path)
    ours = shipped(plain.name)
    by_name = not plain.suffix and plain.parent == Path() and not plain.exists()
    return ours if by_name and ours.exists() else plain


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, flow: RectifiedFlow, task: Task, card: dict[str, Any]) -> None:
    """Write a flow as the task's reference."""
    header = {"format": "prefenv-flow-1", "task": task.name, "card": json.dumps(card)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in flow.state_dict().items()}
    write_atomic(path, serialize(tensors, header))


def read_safetensors(path: Path, want: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file of format ``want``.

    Raises:
        CheckpointError: Missing, truncated, not safetensors (a pickle, for one), or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); pickled checkpoints (.pt) are never loaded"
        ) from None
    if header.get("format") != want:
        raise CheckpointError(f"{path} is no {want} file but {header.get('format')!r}")
    return tensors, header


def load_checkpoint(path: Path | str | None, task: Task) -> Checkpoint:
    """The reference of a task.

    Args:
        path: A file, or the name of one that comes with the package; None = the task's own.
        task: The task it must belong to.

    Raises:
        CheckpointError: Missing, broken, unsafe, another task's, of other shapes, or not finite.
    """
    path = shipped(task.name) if path is None else find(path)
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}; make one with: prefenv train --task {task.text} --out {path}"
        )
    tensors, header = read_safetensors(path, "prefenv-flow-1")
    if header.get("task") != task.name:
        raise CheckpointError(
            f"{path} is a reference for task {header.get('task')!r}, not {task.name!r}"
        )
    flow = task.flow()
    load_tensors(flow, tensors, path)
    try:
        card = json.loads(header.get("card", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: its card cannot be read ({error})") from None
    return Checkpoint(flow.frozen(), card)


def load_tensors(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: Any) -> None:
    """Fill a module, strictly.

    Raises:
        CheckpointError: Names, shapes or values that do not fit.
    """
    wanted = module.state_dict()
    if missing := sorted(wanted.keys() ^ tensors.keys()):
        raise CheckpointError(f"{source} does not fit the network: {', '.join(missing[:3])} ...")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the network needs {tuple(wanted[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinity")
    module.load_state_dict(tensors)
