"""An agent's state: taken out, put back, and kept in a file, so that a run goes on exactly where it stopped."""

from __future__ import annotations

import dataclasses
import io
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from prefenv.checkpoints import write_atomic
from prefenv.errors import CheckpointError
from prefenv.kernels import Kernel
from prefenv.packing import pack, unpack

if TYPE_CHECKING:
    from typing_extensions import Self


class Resumable:
    """The part of an agent that saves and loads it.

    Attributes:
        persistent: Names of the attributes that are its state: modules, optimisers, generators, tensors or values.
    """

    name: ClassVar[str]
    Config: ClassVar[Any]
    persistent: ClassVar[tuple[str, ...]]
    env: Any
    config: Any
    seed: int
    rounds: int
    generator: torch.Generator
    device: torch.device

    def state(self) -> dict[str, Any]:
        """All that is needed to go on exactly from here, as a tree of tensors and JSON values."""
        return {
            "agent": self.name,
            "config": _plain(dataclasses.asdict(self.config)),
            "seed": self.seed,
            "rounds": self.rounds,
            "generators": [g.get_state() for g in self._generators()],
            "ledger": self.env.ledger.counts(),
            "parts": {name: _get(getattr(self, name)) for name in self.persistent},
        }

    def restore(self, state: dict[str, Any]) -> Self:
        """Go on from a ``state``.

        Raises:
            CheckpointError: It is another agent's, was made with other settings, or does not fit this env.
        """
        _owned(state, self.name, "this state")
        if state.get("config") != _plain(dataclasses.asdict(self.config)):
            raise CheckpointError(f"this state of {self.name} was made with other settings")
        try:
            for name, value in state["parts"].items():
                setattr(self, name, _set(getattr(self, name), value, self.device))
            for generator, value in zip(self._generators(), state["generators"], strict=True):
                generator.set_state(value)
            self.rounds, self.seed = state["rounds"], state["seed"]
            for key, value in state["ledger"].items():
                setattr(self.env.ledger, key, value)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"this state of {self.name} does not fit here (another task, network or device?): {error}"
            ) from error
        return self

    def _generators(self) -> list[torch.Generator]:
        own = [self.generator, self.env._generator, self.env.reference.generator]
        if self.env.task.condition is not None:
            own.append(self.env.condition_generator)
        return [*own, *self.env.desk.generators]

    def save(self, path: str | Path) -> None:
        """Write the agent as a zip of safetensors and JSON (never pickle), whole or not at all."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("state.safetensors", pack(self.state()))
        write_atomic(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path, env: Any) -> Self:
        """An agent as it was saved, in an env of the same task.

        Raises:
            CheckpointError: The file is missing, broken or another agent's.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                with zipfile.ZipFile(path) as archive:
                    inner = Path(archive.extract("state.safetensors", folder))
            except (OSError, KeyError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"{path} is no saved agent ({error})") from None
            state = unpack(inner)
        _owned(state, cls.name, path)
        try:
            config, seed = _config(cls.Config, state["config"]), state["seed"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} holds settings that {cls.name} has not: {error}"
            ) from None
        make: Any = cls
        return make(env, config, seed=seed).restore(state)


def _owned(state: Any, name: str, what: Any) -> None:
    """Refuse what is no state of the agent ``name``."""
    owner = state.get("agent") if isinstance(state, dict) else None
    if owner != name:
        raise CheckpointError(f"{what} is of {owner!r}, not of {name!r}")


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _config(cls: Any, values: dict[str, Any]) -> Any:
    """A ``Config`` from plain values; a nested kernel is a dict."""
    fields = dict(values)
    if isinstance(kernel := fields.get("kernel"), dict):
        fields["kernel"] = Kernel(kernel["name"], kernel["level"], tuple(kernel["window"]))
    return cls(**fields)


def _get(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part.state_dict() if hasattr(part, "state_dict") else part


def _set(part: Any, value: Any, device: torch.device) -> Any:
    if isinstance(part, torch.Generator):
        part.set_state(value)
        return part
    if hasattr(part, "load_state_dict"):
        part.load_state_dict(value)
        return part
    return _to(value, device)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value
