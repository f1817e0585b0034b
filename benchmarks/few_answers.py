"""What few answers are worth to ``learned-reward``: one question, wrong answers, continuous preferences.

    python -m benchmarks.few_answers         about 20 minutes on one core; finished runs are not repeated

Five statements, each over its seeds: what was asked for, what was reached, and how often. Writes
``few_answers.jsonl`` (a line a run) and ``few_answers.md`` to ``benchmarks/results/``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.pages import keep, spread
from prefenv.evaluation import Judge
from prefenv.registry import make_agent
from prefenv.runs import RunConfig, align

RESULTS = Path(__file__).parent / "results"
RARE = {"task": "shapes:s_rate=0.025", "checkpoint": "shapes-rare"}
BASE = RunConfig(agent="learned-reward", device="cpu")


@dataclass(frozen=True)
class Statement:
    """One claim about a run.

    Args:
        text: What is asked, in words.
        config: The run.
        wanted: Least value of each number of its evaluation.
        times: In so many of ten seeds.
        n_reference: Reference samples behind the optimum; more where the optimum is rare or near the reference.
        n: Samples of each side of the score's distances.
    """

    text: str
    config: RunConfig
    wanted: dict[str, float]
    times: int = 9
    n_reference: int = 16384
    n: int = 2048

    def judge(self) -> Judge:
        """What scores its runs."""
        return self.config.judge(n_reference=self.n_reference, n=self.n)


def _run(**settings: Any) -> RunConfig:
    return dataclasses.replace(BASE, **settings)


STATEMENTS = {
    "one-question": Statement(
        "one question (4 samples, accepted or not), reference with 23 % S curves",
        _run(queries=4, oracle="s-curve:answer=choose"),
        {"preferred_rate": 0.98, "score": 0.95},
    ),
    "one-question-rare": Statement(
        "one question, reference with 2 % S curves",
        _run(queries=4, oracle="s-curve:answer=choose", **RARE),
        {"preferred_rate": 0.90, "score": 0.90},
        n_reference=65536,
    ),
    "wrong-answers": Statement(
        "48 labels, 20 % of them flipped",
        _run(queries=48, rows=16, teacher="mistake=0.2,answer=choose"),
        {"preferred_rate": 0.95},
    ),
    "graded-turn": Statement(
        "48 ratings of how far a shape is turned, tilt at beta 0.1",
        _run(queries=48, rows=16, oracle="pose:of=turn"),
        {"score": 0.85},
        n_reference=65536,
        n=8192,
    ),
    "graded-size": Statement(
        "48 ratings of how large a shape is, tilt at beta 0.1",
        _run(queries=48, rows=16, oracle="pose:of=size"),
        {"score": 0.85},
        n_reference=65536,
        n=8192,
    ),
}


@dataclass(frozen=True)
class Args:
    """Measure what few answers are worth.

    Args:
        seeds: Runs of each statement, seeds from 0.
        panels: First questions that are looked at, seeds from 0.
        work: Folder of the run directories.
        out: Folder of the results.
    """

    seeds: int = 10
    panels: int = 100
    work: Path = Path("runs/few_answers")
    out: Path = RESULTS


def first_question(judge: Judge, seed: int) -> int:
    """How many of the first four samples shown the oracle accepts; nothing is asked."""
    config = _run(queries=4, seed=seed, **RARE)
    agent: Any = make_agent("learned-reward", config.make_env(), seed=seed)
    picked = agent.question()
    return int((judge.oracle.score(agent.pool[0][picked]) >= judge.oracle.threshold).sum())


def main(args: Args) -> None:
    """Run what is missing, and write the results."""
    rows: list[dict[str, Any]] = []
    lines = [
        "# What few answers are worth to `learned-reward`",
        "",
        f"`python -m benchmarks.few_answers`, seeds 0 to {args.seeds - 1}. Median (range); *held* = "
        "seeds in which all of the wanted numbers were reached. The score of the optimum against itself is what "
        "sampling noise leaves.",
        "",
        "| statement | wanted | held | preferred rate | score | optimum's score | residual / reference's |",
        "|---" * 7 + "|",
    ]
    judges = {}
    for name, statement in STATEMENTS.items():
        judge = judges[name] = statement.judge()
        mine: list[dict[str, Any]] = []
        for seed in tqdm(range(args.seeds), desc=name, unit="run"):
            config = dataclasses.replace(statement.config, seed=seed)
            summary = align(config, args.work / name / f"seed{seed}", judge=judge)
            mine.append({"statement": name, **summary})
        held = sum(all(r[k] >= v for k, v in statement.wanted.items()) for r in mine)
        for row in mine:
            row["residual_ratio"] = row["residual"] / row["reference_residual"]
        keys = ("preferred_rate", "score", "optimum_score", "residual_ratio")
        wanted = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in statement.wanted.items())
        cells = [spread([r[k] for r in mine]) for k in keys]
        aim = f"{wanted} in {statement.times} of 10"
        lines.append(f"| {statement.text} | {aim} | {held} of {args.seeds} | {' | '.join(cells)} |")
        rows += mine
    bar = tqdm(range(args.panels), desc="first questions", unit="seed")
    shown = [first_question(judges["one-question-rare"], seed) for seed in bar]
    rate = float((judges["one-question-rare"].rewards >= 0.5).float().mean())
    told = sum(0 < n < 4 for n in shown)
    rows.append({"statement": "first-question", "accepted": shown})
    lines += [
        "",
        f"**First questions** with the reference of 2 % S curves: {told} of {args.panels} show some but not all "
        f"S curves (wanted: 95 of 100). Four random samples would in {1 - (1 - rate) ** 4:.0%}.",
    ]
    print(keep(args.out, "few_answers", lines, rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
