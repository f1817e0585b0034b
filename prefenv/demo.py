"""The demonstration: four agents at one budget, one table, two figures."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prefenv.device import cores
from prefenv.evaluation import Judge
from prefenv.figures import frontier_figure, shapes_figure
from prefenv.packing import unpack
from prefenv.registry import make_agent, parse
from prefenv.runs import RunConfig, align

_COLUMNS = {
    "agent": ("agent", "{}"),
    "preferred_rate": ("preferred", "{:.3f}"),
    "score": ("score", "{:.3f}"),
    "reward": ("reward", "{:.3f}"),
    "kl_nats": ("KL (nats)", "{:.1f}"),
    "frontier_kl_nats": ("frontier", "{:.2f}"),
    "residual": ("residual", "{:.4f}"),
    "diversity": ("diversity", "{:.2f}"),
    "queries": ("queries", "{}"),
    "nfe": ("NFE", "{}"),
    "seconds": ("seconds", "{:.1f}"),
}
_judge: Judge | None = None


def _start(judge: Judge) -> None:
    global _judge
    torch.set_num_threads(1)
    _judge = judge


def _work(config: RunConfig, folder: Path) -> dict[str, Any]:
    return align(config, folder, judge=_judge)


def labels(configs: list[RunConfig]) -> list[str]:
    """What the runs are called: the agents' names, with their settings only where two share a name."""
    names = [parse(c.agent)[0] for c in configs]
    return [c.agent if names.count(n) > 1 else n for c, n in zip(configs, names, strict=True)]


def compare(
    configs: Iterable[RunConfig],
    folder: Path,
    judge: Judge,
    *,
    progress: bool = True,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Run several agents side by side, one thread each, and return their summaries in order.

    Args:
        configs: One run each.
        folder: Where their directories go, named as ``labels`` says.
        judge: What scores them all.
        progress: Show a bar on stderr.
        workers: Processes; None = one per core, no more than runs.
    """
    configs = list(configs)
    count = workers or max(1, min(len(configs), cores()))
    context = multiprocessing.get_context("spawn")
    results: dict[int, dict[str, Any]] = {}
    bar = tqdm(total=len(configs), desc="agents", unit="run", disable=None if progress else True)
    with bar, ProcessPoolExecutor(count, context, _start, (judge,)) as pool:
        # The longest first, so that the last worker is not left with it.
        names = labels(configs)
        futures = {
            pool.submit(_work, config, folder / name): i
            for i, (config, name) in enumerate(zip(configs, names, strict=True))
        }
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                bar.update()
                bar.set_postfix_str(names[futures[future]])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[i] for i in range(len(configs))]


def table(summaries: list[dict[str, Any]], judge: Judge) -> str:
    """One Markdown table: the reference, every agent, and the optimum."""
    accepted = judge.optimum_rewards() >= judge.oracle.threshold
    bounds = [
        {
            "agent": "reference",
            "preferred_rate": summaries[0]["reference_preferred_rate"],
            "score": 0.0,
            "reward": float(judge.rewards.mean()),
            "kl_nats": 0.0,
            "frontier_kl_nats": 0.0,
            "residual": summaries[0]["reference_residual"],
        },
        *summaries,
        {
            "agent": f"optimum (beta {judge.beta})",
            "preferred_rate": float(accepted.double().mean()),
            "score": judge.optimum_score,
            "reward": judge.optimum_reward,
            "kl_nats": judge.optimum_kl,
            "frontier_kl_nats": judge.optimum_kl,
            "residual": float(judge.task.residual(judge.optimum).median()),
            "diversity": 1.0,
        },
    ]
    rows = [[head for head, _ in _COLUMNS.values()]]
    for entry in bounds:
        rows.append(
            [
                f.format(entry[k]) if entry.get(k) is not None else ""
                for k, (_, f) in _COLUMNS.items()
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def folder_of(task: str) -> Path:
    """Where a task's demo goes if nobody says otherwise: ``runs/demo``, of another task ``runs/demo-TASK``."""
    other = "" if task == "shapes" else "-" + re.sub(r"\W+", "-", task)
    return Path(f"runs/demo{other}")


def demo(
    folder: Path,
    agents: Iterable[str],
    config: RunConfig,
    *,
    progress: bool = True,
    workers: int | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """Run the agents at ``config``'s budget; write ``table.md``, ``shapes.png`` and ``frontier.png``.

    Returns:
        The table and the summaries.
    """
    configs = [dataclasses.replace(config, agent=name) for name in agents]
    judge = configs[0].judge()
    summaries = compare(configs, folder, judge, progress=progress, workers=workers)
    names = labels(configs)
    summaries = [{**s, "agent": name} for s, name in zip(summaries, names, strict=True)]
    text = table(summaries, judge)
    (folder / "table.md").write_text(text + "\n")
    models = {}
    for config, name in zip(configs, names, strict=True):
        agent = make_agent(config.agent, config.make_env(), seed=config.seed)
        models[name] = agent.restore(unpack(folder / name / "model.safetensors"))
    shapes_figure(judge, models).savefig(folder / "shapes.png")
    frontier_figure(summaries, judge).savefig(folder / "frontier.png")
    return text, summaries
