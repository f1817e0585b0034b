"""Training a task's reference (model A) from scratch, and the card that says what came out."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prefenv.checkpoints import save_checkpoint, write_atomic
from prefenv.device import make_generator, resolve_device, stratified_uniform
from prefenv.divergence import SHIFT
from prefenv.errors import ConfigError, NonFiniteError
from prefenv.flow import RectifiedFlow
from prefenv.policy import FlowPolicy
from prefenv.tasks import Classes, Task, TrainConfig
from prefenv.tasks.conditions import rows_of


@dataclass(frozen=True)
class Trained:
    """A trained reference and its card."""

    flow: RectifiedFlow
    card: dict[str, Any]


def train_reference(
    task: Task,
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Trained:
    """Fit a flow to the task's data by flow matching.

    AdamW with a one-cycle schedule and clipped gradients; the checkpoint is the average of the weights.

    Args:
        task: What to generate.
        config: How; None = the task's own settings.
        seed: Seed of weights, data and noise.
        device: Where.
        progress: Show a bar on stderr.

    Raises:
        NonFiniteError: The loss became NaN or infinite.
    """
    config = config or task.train
    if config.iterations < 1 or config.batch < 1:
        raise ConfigError(
            f"iterations and batch must be at least 1, not {config.iterations}, {config.batch}"
        )
    where = resolve_device(device)
    data_rng, rng = make_generator(seed, stream="data"), make_generator(seed, where, "noise")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = task.flow().to(where)
    average, plain = flow.frozen(), RectifiedFlow(flow.field.plain())
    weights: list[torch.Tensor] = list(flow.parameters())
    averages: list[torch.Tensor] = list(average.parameters())
    optimizer = torch.optim.AdamW(
        weights, lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.iterations
    )
    began, smooth = time.perf_counter(), float("nan")
    bar = tqdm(
        range(config.iterations), desc=f"train {task.name}", disable=None if progress else True
    )
    for i in bar:
        x, kind = task.data(config.batch, data_rng)
        x1 = x.to(where)
        x0 = torch.randn(x1.shape, generator=rng, device=where)
        t = stratified_uniform(len(x1), rng) ** config.early
        loss = plain.residual(x0, x1, t, dropped(task, config, kind.to(where), rng)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(averages, weights, 1 - config.ema)
        if i % 100 == 0 or i + 1 == config.iterations:
            value = float(loss.detach())
            if not value < float("inf"):
                raise NonFiniteError(f"the training loss became {value} at iteration {i}; lower lr")
            smooth = value if i == 0 else 0.8 * smooth + 0.2 * value
            bar.set_postfix(loss=f"{smooth:.4f}")
    seconds = time.perf_counter() - began
    card = {
        "command": f"prefenv {shlex.join(sys.argv[1:])}" if "prefenv" in sys.argv[0] else "python",
        "seed": seed,
        "seconds": round(seconds, 1),
        "iterations": config.iterations,
        "device": str(where),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **measure(average, task),
    }
    return Trained(average.frozen(), card)


def dropped(
    task: Task, config: TrainConfig, condition: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | None:
    """The data's conditions to train with, a share ``drop`` of them null; None where the task has none."""
    if task.condition is None or not config.drop:
        return None if task.condition is None else condition
    out = torch.rand(len(condition), generator=generator, device=condition.device) < config.drop
    out = out.view(-1, *[1] * (condition.dim() - 1))
    return torch.where(out, task.condition.null(condition), condition)


def measure(flow: RectifiedFlow, task: Task, steps: int = 16) -> dict[str, Any]:
    """What a reference does: class rates, residuals beside the data's own, held-out likelihood.

    From ``task.samples`` samples. ``log_likelihood_nats`` is the mean of a sixteenth as many fresh ones of data,
    by RK4 (32 steps, shorter near the data). Where the task has conditions, the samples are of the data's.
    """
    n = task.samples
    rng = make_generator(10_000)
    noise = torch.randn(n, *task.event_shape, generator=rng)
    data, kind = task.data(n, rng)
    asked = None if task.condition is None else kind.to(flow.device)
    samples = FlowPolicy(flow, steps=steps, shift=task.shift).sample(noise, asked).cpu()
    with torch.no_grad():
        fine = flow.integrate(noise.to(flow.device), steps, "heun", condition=asked).cpu()
    log_prob = flow.log_prob(
        data[: n // 16].to(flow.device),
        32,
        shift=SHIFT,
        condition=rows_of(asked, slice(n // 16)),
        generator=make_generator(0, flow.device),
    )
    if task.condition is not None:
        kind = task.classify(data)

    def rates(index: torch.Tensor) -> dict[str, float]:
        return {c: round(float((index == k).float().mean()), 4) for k, c in enumerate(task.classes)}

    def median(x: torch.Tensor) -> float:
        return round(float(task.residual(x).median()), 4)

    extra: dict[str, Any] = {}
    if found := task.compare(samples, data):
        fresh = task.data(n, make_generator(10_001))[0]
        extra = {"set_metrics": found, "set_metrics_of_data": task.compare(fresh, data)}
    if isinstance(task.condition, Classes) and asked is not None and task.classes:
        right = task.classify(samples) == asked.cpu()
        extra |= {"asked_class_rate": round(float(right.float().mean()), 4)}
    return {
        "sampler": f"euler, {steps} steps, shift {task.shift}",
        "class_rate": rates(task.classify(samples)),
        "class_rate_heun": rates(task.classify(fine)),
        "class_rate_data": rates(kind),
        "residual": median(samples),
        "residual_heun": median(fine),
        "residual_data": median(data),
        "log_likelihood_nats": round(float(log_prob.mean()), 2),
        **extra,
    }


def save_reference(path: Path, trained: Trained, task: Task) -> None:
    """Write the checkpoint and, beside it, its card as Markdown."""
    save_checkpoint(path, trained.flow, task, trained.card)
    title = f"Reference for `{task.name}` (model A)"
    save_card(path, title, (task.__doc__ or "").splitlines()[0], trained.card)


def save_card(path: Path, title: str, about: str, card: dict[str, Any]) -> None:
    """Write a card as Markdown beside a checkpoint: a title, a line, and a table."""
    lines = [f"# {title}", "", about, "", "| what | value |", "|---|---|"]
    for key, value in card.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        lines.append(f"| {key.replace('_', ' ')} | {shown} |")
    write_atomic(path.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
