"""HIL-DD's published toy checkpoint (github mathfirst/HIL-DD, ``rectified_model_ckp1.pt``) as a reference of ours.

A ``.pt`` file is a pickle, which may run code; only its plain tensors are read (``weights_only``), and only if
their names and shapes are the network's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefenv.checkpoints import load_tensors, save_checkpoint
from prefenv.errors import CheckpointError
from prefenv.flow import RectifiedFlow
from prefenv.registry import make_task
from prefenv.set_networks import HilDDVelocity
from prefenv.train import measure

TASK = "clouds:net=hil-dd"


def read_hil_dd(path: Path) -> dict[str, Tensor]:
    """The network's tensors by name, on the CPU.

    Raises:
        CheckpointError: No file, not plain tensors, or of another network.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken pickle raises is anybody's guess
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} does not hold plain tensors: {reason}") from None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} has no tensors under model_state_dict: not HIL-DD's file")
    network = HilDDVelocity()
    load_tensors(network, state, path)
    return network.state_dict()


def import_hil_dd(path: Path, out: Path, task: str = TASK) -> dict[str, Any]:
    """Write the published checkpoint as a reference of the clouds task; returns its card.

    Args:
        path: The published file.
        out: The reference, a .safetensors file.
        task: With the noise that it is measured at: ``clouds:net=hil-dd,noise=0.28``.
    """
    made = make_task(task)
    flow: Any = made.flow()
    flow.field.field.load_state_dict(read_hil_dd(path))
    frozen: RectifiedFlow = flow.frozen()
    card = {
        "source": "github mathfirst/HIL-DD, toy-experiment",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "task": task,
        **measure(frozen, made),
    }
    save_checkpoint(out, frozen, made, card)
    return card
