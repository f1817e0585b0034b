"""Where tensors live and how they are seeded."""

from __future__ import annotations

import hashlib
import os

import torch

from prefenv.errors import ConfigError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` = CUDA where there is one, else the CPU.

    Raises:
        ConfigError: Not a device, or CUDA asked for and not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"{device!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch sees no CUDA here; use cpu")
    return found


def cores() -> int:
    """Cores that this process may use, where the system says so (Linux); else all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_generator(
    seed: int, device: torch.device | str = "cpu", stream: str = ""
) -> torch.Generator:
    """A seeded generator on ``device``: same seed and stream, same bits, on one device.

    Streams of one seed are independent of each other, and of ``torch.manual_seed`` with that seed.
    """
    digest = hashlib.sha256(f"prefenv/{stream}/{int(seed)}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))


def stratified_uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    """``n`` uniforms on [0, 1), one in each of ``n`` equal cells, in random order, on the generator's device.

    Each is U(0, 1) on its own; together they cover the interval evenly, so a batch's mean has less variance.
    """
    cells = torch.randperm(n, generator=generator, device=generator.device)
    return (cells + torch.rand(n, generator=generator, device=generator.device)) / n
