"""A small LeNet that looks at digits, and how the two shipped ones are made.

LeCun et al. 1998 (LeNet-5): two convolutions with tanh and average pooling, two layers on top; smooth, so that a
reward gradient is one. ``python -m oracles.lenet`` trains, on pictures that the generator never saw,

- ``checkpoints/digits-judge.safetensors``: ten logits, which digit it is (``oracles/legible.py``);
- ``checkpoints/digits-aesthetic.safetensors``: one logit, a real picture or model A's (``oracles/aesthetic.py``).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save as serialize
from torch import Tensor, nn

from prefenv.checkpoints import (
    load_checkpoint,
    load_tensors,
    read_safetensors,
    shipped,
    write_atomic,
)
from prefenv.device import make_generator
from prefenv.errors import CheckpointError, ConfigError, PrefenvError
from prefenv.policy import FlowPolicy
from prefenv.registry import make_task
from prefenv.tasks import Task
from prefenv.tasks.digits import Digits
from prefenv.train import save_card

FORMAT = "prefenv-lenet-1"
JUDGE, AESTHETIC = "judge", "aesthetic"
ABOUT = {
    JUDGE: "A LeNet that tells the digits apart, for the oracle `legible`.",
    AESTHETIC: "A LeNet that tells real pictures from model A's, for the oracle `aesthetic`.",
}


class LeNet(nn.Module):
    """Pictures ``(n, 1, H, W)`` to logits ``(n, outputs)``.

    Args:
        size: ``(H, W)``, at least 4.
        outputs: Logits.
    """

    def __init__(self, size: Sequence[int], outputs: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.full = nn.Linear(32 * (size[0] // 4) * (size[1] // 4), 64)
        self.out = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(self.conv1(x).tanh(), 2)
        h = F.avg_pool2d(self.conv2(h).tanh(), 2)
        return self.out(self.full(h.flatten(1)).tanh())


def load(task: Task, kind: str, outputs: int, path: str | None = None) -> LeNet:
    """The network of a digits task, frozen.

    Args:
        task: The task.
        kind: ``judge`` or ``aesthetic``.
        outputs: Its logits.
        path: A file; None = the one that comes with the package.

    Raises:
        ConfigError: Another task.
        CheckpointError: Missing, broken, or of another task.
    """
    if not isinstance(task, Digits):
        raise ConfigError(f"this oracle looks at digits, not at {task.name!r}")
    file = shipped(f"{task.name}-{kind}") if path is None else Path(path)
    if not file.is_file():
        raise CheckpointError(f"no {kind} at {file}; make it with: {command(Args(task=task.text))}")
    tensors, header = read_safetensors(file, FORMAT)
    if (header.get("task"), header.get("kind")) != (task.name, kind):
        raise CheckpointError(f"{file} is no {kind} of {task.name}")
    model = LeNet(task.event_shape[1:], outputs)
    load_tensors(model, tensors, file)
    return model.requires_grad_(False).eval()


def fit(model: LeNet, loss: Callable[[], Tensor], steps: int) -> None:
    """Adam on a cosine, weights decayed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def made(task: Digits, judge_steps: int, seed: int, checkpoint: str | None) -> dict[str, Any]:
    """Both networks and their cards, by kind."""
    rng = make_generator(seed, stream="lenet")
    size = task.event_shape[1:]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge, aesthetic = LeNet(size, 10), LeNet(size, 1)

    def digit_loss() -> Tensor:
        x, digit = task.data(128, rng, "judge")
        return F.cross_entropy(judge(x), digit)

    fit(judge, digit_loss, judge_steps)
    flow = FlowPolicy(load_checkpoint(checkpoint, task).flow, shift=task.shift)

    def fake(n: int) -> Tensor:
        noise = torch.randn(n, *task.event_shape, generator=rng)
        return flow.sample(noise, task.draw_conditions(n, rng))

    pool, (real, digit) = fake(4096), task.data(2000, rng, "test")

    def real_loss() -> Tensor:
        x, _ = task.data(128, rng, "judge")
        y = pool[torch.randint(len(pool), (128,), generator=rng)]
        return F.softplus(-aesthetic(x)).mean() + F.softplus(aesthetic(y)).mean()

    fit(aesthetic, real_loss, judge_steps // 2)
    with torch.no_grad():
        right = float((judge(real).argmax(1) == digit).double().mean())
        gap = aesthetic(real) - aesthetic(fake(2000)).T
        auc = float((gap > 0).double().mean())
    return {
        JUDGE: (judge, {"test_accuracy": round(right, 4)}),
        AESTHETIC: (aesthetic, {"test_auc": round(auc, 4)}),
    }


@dataclass(frozen=True)
class Args:
    """Train the judge and the aesthetic of a digits task.

    Args:
        task: The task; settings may follow, ``digits:data_path=mnist.npz``.
        checkpoint: The task's reference; None = its own.
        out: Folder of the two files.
        steps: Optimiser steps of the judge.
        seed: Seed of everything random.
    """

    task: str = "digits"
    checkpoint: str | None = None
    out: Path = Path("checkpoints")
    steps: int = 2000
    seed: int = 0


def command(args: Args) -> str:
    """The command line of these arguments; defaults are left out."""
    given = [
        (f.name, getattr(args, f.name)) for f in fields(args) if getattr(args, f.name) != f.default
    ]
    words = [word for name, value in given for word in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "oracles.lenet", *words])


def main(args: Args) -> None:
    """Train and write them."""
    task = make_task(args.task)
    for kind, (model, card) in made(task, args.steps, args.seed, args.checkpoint).items():
        header = {"format": FORMAT, "task": task.name, "kind": kind, "card": json.dumps(card)}
        path = args.out / f"{task.name}-{kind}.safetensors"
        write_atomic(path, serialize(dict(model.state_dict()), header))
        save_card(
            path, f"The {kind} of `{task.name}`", ABOUT[kind], {"command": command(args), **card}
        )
        print(f"{path}: {card}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except PrefenvError as error:
        raise SystemExit(f"oracles.lenet: {error}") from None
