"""Where tensors live and how they are seeded."""

from __future__ import annotations

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


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A seeded generator on ``device``: same seed, same bits, on one device."""
    return torch.Generator(device=device).manual_seed(int(seed) % 2**63)


def stratified_uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    """``n`` uniforms on [0, 1), one in each of ``n`` equal cells, in random order, on the generator's device.

    Each is U(0, 1) on its own; together they cover the interval evenly, so a batch's mean has less variance.
    """
    cells = torch.randperm(n, generator=generator, device=generator.device)
    return (cells + torch.rand(n, generator=generator, device=generator.device)) / n
