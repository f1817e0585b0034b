"""Many runs on the cores of one machine, a line of a log each: what is in the log is not run again."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prefenv.evaluation import Judge
from prefenv.runs import RunConfig

Work = Callable[..., dict[str, Any]]
_judge: Judge | None = None


def _start(judge: Judge) -> None:
    global _judge
    torch.set_num_threads(1)
    _judge = judge


def _run(work: Work, task: tuple[Any, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"task": list(task)}
    try:
        return {**row, **work(_judge, *task)}
    except Exception as error:  # one crash is a result, and not the end of the others
        return {**row, "error": f"{type(error).__name__}: {error}"}


def gather(
    work: Work, tasks: Iterable[tuple[Any, ...]], log: Path, workers: int | None = None
) -> list[dict[str, Any]]:
    """Do ``work(judge, *task)`` for every task that the log does not hold, one thread each.

    Args:
        work: A function of a module; returns plain values.
        tasks: Plain values each; what a line of the log is known by.
        log: JSON lines, appended to as runs finish: Ctrl-C loses only the runs under way.
        workers: Processes; None = one per core.

    Returns:
        All lines of the log, each with its ``task`` and what ``work`` returned, or its ``error``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines]
    done = [row["task"] for row in rows]
    todo = [task for task in tasks if list(task) not in done]
    if not todo:
        return rows
    context, count = multiprocessing.get_context("spawn"), workers or len(os.sched_getaffinity(0))
    judge = RunConfig().judge()
    with ProcessPoolExecutor(count, context, _start, (judge,)) as pool, log.open("a") as out:
        futures = [pool.submit(_run, work, task) for task in todo]
        try:
            for future in tqdm(as_completed(futures), total=len(todo), unit="run"):
                rows.append(future.result())
                out.write(json.dumps(rows[-1]) + "\n")
                out.flush()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return rows
