"""What the benchmarks' pages share: finished parts, medians with their ranges, a result's files, README marks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prefenv.checkpoints import write_atomic
from prefenv.runs import versions


def once(file: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds; where there is none yet, what ``make`` returns is kept in it, whole or not."""
    if not file.exists():
        write_atomic(file, json.dumps(make()).encode())
    return json.loads(file.read_text())


def spread(values: list[float], digits: int = 3) -> str:
    """Median and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def keep(
    folder: Path, name: str, lines: list[str], rows: Iterable[dict[str, Any]] | None = None
) -> str:
    """Write ``<name>.md`` with the versions below its lines and, where there are rows, ``<name>.jsonl``.

    Returns:
        The page's text.
    """
    told = ", ".join(f"{k} {v}" for k, v in versions().items())
    text = "\n".join([*lines, "", f"Versions: {told}.", ""])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    if rows is not None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return text


def update_readme(path: Path, table: list[str], note: str, name: str = "results") -> None:
    """Put the table between the README's marks of that name."""
    head, start, rest = path.read_text().partition(f"<!-- {name} -->")
    _, end, tail = rest.partition(f"<!-- /{name} -->")
    body = "\n".join(["", *table, "", note, ""])
    path.write_text(f"{head}{start}{body}{end}{tail}")
