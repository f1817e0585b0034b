"""Tables of the report; a cell is text with ``**bold**`` and code in backticks, as Markdown has it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.report_rows import Bench, Row, finished, finite, in_order, trouble
from benchmarks.statistics import Estimate


@dataclass(frozen=True)
class Table:
    """Heads and rows of cells."""

    head: list[str]
    rows: list[list[str]]


def interval(e: Estimate) -> str:
    """``0.93 [0.91, 0.95]``; without an interval the value alone, without a value nothing."""
    if not finite(e.value):
        return ""
    ends = f" [{e.low:.2f}, {e.high:.2f}]" if finite(e.low) else ""
    return f"{e.value:.2f}{ends}"


def value(e: Estimate) -> str:
    """``0.93``, or nothing."""
    return f"{e.value:.2f}" if finite(e.value) else ""


def leader(column: dict[str, Estimate]) -> str | None:
    """The best agent, where its interval lies above every other's; else None, also where one has none."""
    known = {a: e for a, e in column.items() if finite(e.value)}
    best = max(known, key=lambda a: known[a].value, default=None)
    others = [e.high for a, e in known.items() if a != best]
    if best is None or not others or not all(known[best].low > high for high in others):
        return None
    return best


def score_table(bench: Bench, cell: Callable[[Estimate], str] = interval) -> Table:
    """Scores of agents (rows, the best first) over all experiments and in each, written by ``cell``."""
    columns = {"all": bench.overall}
    columns |= {n: {a: bench.scores[a, n] for a in bench.agents} for n in bench.variants}
    best = {n: leader(column) for n, column in columns.items()}
    crashed = {(r["agent"], r["experiment"]) for r in bench.without_score if "refused" not in r}
    rows = []
    for agent in bench.agents:
        line = [f"`{agent}`", _bold(interval(bench.overall[agent]), best["all"] == agent)]
        for name in bench.variants:
            text = _bold(cell(bench.scores[agent, name]), best[name] == agent)
            text = "refused" if bench.refused(agent, name) else text
            line.append(f"{text} †" if (agent, name) in crashed else text)
        rows.append(line)
    optimum = ["optimum", ""]
    for name in bench.variants:
        known = [r["optimum_score"] for r in bench.rows if r["experiment"] == name and finished(r)]
        optimum.append(f"{statistics.median(known):.2f}" if known else "")
    return Table(["agent", *columns], [*rows, optimum])


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


QUALITY: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "preferred rate": ("{:.3f}", lambda r: r["preferred_rate"]),
    "residual / reference's": ("{:.2f}", lambda r: r["residual"] / r["reference_residual"]),
    "diversity": ("{:.2f}", lambda r: r["diversity"]),
    "KL (nats)": ("{:.1f}", lambda r: r["kl_nats"]),
    "KL at most": ("{:.1f}", lambda r: r["kl_bound_nats"]),
    "frontier KL": ("{:.2f}", lambda r: r["frontier_kl_nats"]),
    "queries": ("{:.0f}", lambda r: r["queries"]),
    "network evaluations": ("{:.0f}", lambda r: r["nfe"]),
    "CPU seconds": ("{:.1f}", lambda r: r["cpu_seconds"]),
}


def quality_table(bench: Bench) -> Table:
    """Medians over all finished runs of an agent of what a score does not tell."""
    rows = []
    for agent in bench.agents:
        runs = [r for name in bench.variants for r in bench.runs(agent, name)]
        line = [f"`{agent}`"]
        for form, read in QUALITY.values():
            known = [v for v in map(read, runs) if v is not None and finite(v)]
            line.append(form.format(statistics.median(known)) if known else "")
        rows.append(line)
    return Table(["agent", *QUALITY], rows)


def experiment_table(bench: Bench) -> Table:
    """What each experiment asks, and how much was run of it."""
    rows = []
    for name, variants in bench.variants.items():
        mine = [r for r in bench.rows if r["experiment"] == name]
        rows.append(
            [
                f"`{name}`",
                bench.questions[name],
                ", ".join(in_order(v for v in variants if v)),
                _several(r["budget"] for r in mine if "budget" in r),
                _several(r["beta"] for r in mine if "beta" in r),
                str(len({r["seed"] for r in mine})),
                str(len(mine)),
            ]
        )
    return Table(["experiment", "question", "variants", "budget", "beta", "seeds", "runs"], rows)


def _several(values: Iterable[float]) -> str:
    return ", ".join(f"{v:,}" for v in sorted(set(values)))


def trouble_table(bench: Bench) -> Table:
    """Runs that failed or were refused, those with the same reason together."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in bench.without_score:
        kind = "refused" if "refused" in row else "failed"
        found.setdefault((kind, row["agent"], row["experiment"], trouble(row)), []).append(row)
    rows = [
        [kind, f"`{agent}`", f"`{name}`", _several_names(r["variant"] for r in group), str(len(group)), why]
        for (kind, agent, name, why), group in sorted(found.items())
    ]  # fmt: skip
    return Table(["", "agent", "experiment", "variants", "runs", "why"], rows)


def _several_names(values: Iterable[str]) -> str:
    return ", ".join(in_order(sorted(set(values) - {""})))


def missing_table(bench: Bench) -> Table:
    """Agents without a score over all experiments, and what they have not run."""
    rows = []
    for agent in bench.agents:
        lacks = [
            f"{name} {variant}".strip()
            for name, variants in bench.variants.items()
            for variant in variants
            if (name, variant, agent) not in bench.by_stratum
        ]
        if lacks:
            rows.append([f"`{agent}`", ", ".join(lacks)])
    return Table(["agent", "has no run of"], rows)


def frontier_table(bench: Bench) -> Table:
    """Runs whose KL is below the frontier's."""
    rows = [
        [
            f"`{r['name']}`",
            f"{r['reward']:.3f}",
            f"{r['kl_nats']:.3f} ± {1.96 * r['kl_stderr']:.3f}",
            f"{r['frontier_kl_nats']:.3f}",
        ]
        for r in bench.above_frontier
    ]
    return Table(["run", "reward", "KL (nats)", "frontier KL"], rows)


def places(bench: Bench) -> dict[str, str]:
    """Letters for the machines and versions that runs were made with, by ``place(row)``."""
    found = dict.fromkeys(place(r) for r in bench.rows)
    return {text: f"P{i}" for i, text in enumerate(found, 1)}


def place(row: Row) -> str:
    """Machine and versions of a run, as text."""
    versions = row.get("versions") or {}
    return json.dumps([row.get("machine", ""), *(f"{k} {v}" for k, v in versions.items())])


def place_table(bench: Bench) -> Table:
    """Machines and versions."""
    rows = []
    for text, letter in places(bench).items():
        machine, *versions = json.loads(text)
        rows.append([letter, str(machine), ", ".join(versions)])
    return Table(["place", "machine", "versions"], rows)


def run_table(bench: Bench, *, every_seed: bool) -> Table:
    """The command of every run, or of the first seed of each stratum with all its seeds named."""
    letters, rows = places(bench), []
    for name, variants in bench.variants.items():
        for variant in variants:
            for agent in bench.agents:
                runs = bench.by_stratum.get((name, variant, agent), [])
                for group in [[r] for r in runs] if every_seed else [runs] if runs else []:
                    scores = (f"{r['score']:.3f}" if finished(r) else "none" for r in group)
                    where = dict.fromkeys(letters[place(r)] for r in group)
                    seeds = " ".join(str(r["seed"]) for r in group)
                    command = f"`{group[0].get('command', '')}`"
                    rows.append(
                        [name, variant, agent, seeds, " ".join(scores), " ".join(where), command]
                    )
    command = "command" if every_seed else "command of the first seed"
    return Table(["experiment", "variant", "agent", "seed", "score", "place", command], rows)
