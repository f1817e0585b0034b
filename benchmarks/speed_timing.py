"""How ``benchmarks.speed`` measures: cases taken in turns, ratios round by round, goals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

Case = Callable[[], Any]
Seconds = dict[str, list[float]]


@dataclass
class Row:
    """One comparison.

    Args:
        section: Heading of its table.
        ours: What is measured.
        base: What it is held against.
        seconds: Seconds of both, one pair a round.
        goal: The ratio wanted; None = shown for orientation only.
        unit: ``throughput`` = base's time / our time, more is better; ``time`` = the inverse, less is better.
    """

    section: str
    ours: str
    base: str
    seconds: list[tuple[float, float]]
    goal: float | None = None
    unit: str = "throughput"

    @property
    def ratios(self) -> list[float]:
        """The ratio of each round."""
        return [b / a if self.unit == "throughput" else a / b for a, b in self.seconds]

    @property
    def met(self) -> bool | None:
        """Whether the median ratio reaches the goal."""
        if self.goal is None:
            return None
        ratio = median(self.ratios)
        return ratio >= self.goal if self.unit == "throughput" else ratio <= self.goal


@dataclass
class Fact:
    """What must hold for a comparison to be fair: a number, and the largest it may be."""

    what: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether it holds (NaN does not)."""
        return self.value <= self.most


@dataclass
class Found:
    """What was found."""

    rows: list[Row] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    def add(self, other: Found) -> None:
        """Take in what another section found."""
        self.rows += other.rows
        self.facts += other.facts


def interleave(cases: dict[str, Case], rounds: int, device: torch.device) -> Seconds:
    """Seconds of every case, taken in turns, ``rounds`` times after one turn to warm up.

    CPU time of the process on a CPU, so that the machine's other jobs count little; on a GPU wall time up to the
    end of the last kernel.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    seconds: Seconds = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            start = clock()
            case()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def pair(seconds: Seconds, ours: str, base: str) -> list[tuple[float, float]]:
    """The seconds of two cases, round by round."""
    return list(zip(seconds[ours], seconds[base], strict=True))
