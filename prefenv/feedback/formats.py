"""Other people's forms of feedback: D3PO's JSON, and the two that TRL learns from.

**D3PO** (github yk7333/d3po): a folder, one JSON file for each annotator, each a list of N lists of K numbers (7
there), higher = better; the row is the panel, in the order of the samples. The public code cuts all files to the
shortest and then averages; here every answer counts, a file may end early, and averaging is the reader's business
(``FeedbackStore.recall``). A panel that someone did not answer is null, which the public code cannot read.

**TRL**: ``prompt, chosen, rejected`` (a line for each pair of a panel with different scores) and
``prompt, completion, label`` (a line for each scored sample). The prompt is the condition, samples go by their id.
Neither form has ties, skips, annotators: the whole judgement goes along under a key of its own, ``judgement``,
and judgements that make no line are put beside the file, in ``NAME.rest.jsonl``. So they come back whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from prefenv.checkpoints import write_atomic
from prefenv.errors import FeedbackError
from prefenv.feedback.files import Feedback, read_jsonl, write_jsonl
from prefenv.feedback.records import Judgement

Form = Literal["jsonl", "d3po", "trl-pairs", "trl-labels"]


def export_feedback(feedback: Feedback, path: Path, form: Form, threshold: float = 0.5) -> int:
    """Write feedback in a form; returns the number of rows (``jsonl``: of judgements).

    Args:
        feedback: What to write.
        path: The file; for ``d3po`` the folder.
        form: ``jsonl``, ``d3po``, ``trl-pairs`` or ``trl-labels``.
        threshold: From what score on a label is true.

    Raises:
        FeedbackError: The form cannot hold it.
    """
    if form == "jsonl":
        write_jsonl(feedback, path)
        return len(feedback.judgements())
    if form == "d3po":
        return _write_d3po(feedback, path)
    prompts = {s.id: s.condition or "" for s in feedback.samples}
    rows, rest = [], []
    for judgement in feedback.judgements():
        lines = (
            _pairs(judgement, prompts)
            if form == "trl-pairs"
            else _labels(judgement, prompts, threshold)
        )
        whole = {"judgement": dataclasses.asdict(judgement)}
        new = [{**line, **whole} for line in lines]
        rows += new
        rest += [] if new else [whole]
    for name, lines in ((path, rows), (_rest(path), rest)):
        write_atomic(name, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return len(rows)


def import_feedback(path: Path, form: Form, known: Feedback) -> Feedback:
    """Read a file of a form.

    Args:
        path: The file; for ``d3po`` a file or a folder of them.
        form: ``jsonl``, ``d3po``, ``trl-pairs`` or ``trl-labels``.
        known: What the file speaks of: its samples, and for ``d3po`` the panels, in the order of the rows.

    Raises:
        FeedbackError: It cannot be read or is not valid.
    """
    if form == "jsonl":
        return read_jsonl(path)
    events = list(_read_d3po(path, known) if form == "d3po" else _read_trl(path))
    samples = {s.id for s in known.samples}
    for event in events:
        if strange := [s for s in event.samples if s not in samples]:
            raise FeedbackError(f"{path} speaks of samples that are not known: {strange[0]}")
    return Feedback(events=list(events))


def _pairs(judgement: Judgement, prompts: dict[str, str]) -> Iterator[dict[str, Any]]:
    both = zip(judgement.samples, judgement.scores, strict=True)
    told = [(name, score) for name, score in both if score is not None]
    for chosen, high in told:
        for rejected, low in told:
            if high > low:
                yield {"prompt": prompts[chosen], "chosen": chosen, "rejected": rejected}


def _labels(
    judgement: Judgement, prompts: dict[str, str], threshold: float
) -> Iterator[dict[str, Any]]:
    for name, score in zip(judgement.samples, judgement.scores, strict=True):
        if score is not None:
            yield {"prompt": prompts[name], "completion": name, "label": score >= threshold}


def _rest(path: Path) -> Path:
    return path.with_name(f"{path.stem}.rest.jsonl")


def _read_trl(path: Path) -> Iterator[Judgement]:
    lines = [(path, n, line) for n, line in enumerate(_text(path).splitlines(), 1)]
    if (rest := _rest(path)).is_file():
        lines += [(rest, n, line) for n, line in enumerate(_text(rest).splitlines(), 1)]
    seen: dict[str, Judgement] = {}
    for name, number, line in lines:
        try:
            row = json.loads(line)
            judgement = _foreign(row) if "judgement" not in row else Judgement(**row["judgement"])
        except (ValueError, TypeError, KeyError, FeedbackError) as error:
            raise FeedbackError(f"{name}, line {number}: {error!r}") from None
        seen[judgement.id] = judgement
    yield from sorted(seen.values(), key=lambda j: j.time)


def _foreign(row: dict[str, Any]) -> Judgement:
    """A line that another program wrote."""
    if "completion" in row:
        return _named((row["completion"],), (float(row["label"]),))
    return _named((row["chosen"], row["rejected"]), (1.0, 0.0))


def _named(
    samples: tuple[str, ...], scores: tuple[float | None, ...], annotator: str = ""
) -> Judgement:
    """A judgement named by what it says, so that a file read twice is kept once."""
    text = json.dumps([annotator, samples, scores])
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Judgement(samples, scores, annotator, id=name)


def _write_d3po(feedback: Feedback, folder: Path) -> int:
    sizes = sorted({len(p.samples) for p in feedback.panels})
    if len(sizes) != 1:
        raise FeedbackError(f"D3PO's form holds panels of one size, not of {sizes}")
    last: dict[str, dict[str, Judgement]] = {}
    for judgement in feedback.judgements():
        last.setdefault(judgement.annotator, {})[judgement.panel] = judgement
    for annotator, given in last.items():
        rows = []
        for panel in feedback.panels:
            told = given.get(panel.id)
            by = dict(zip(told.samples, told.scores, strict=True)) if told else {}
            rows.append([by[name] for name in panel.samples] if told else None)
        name = quote(annotator or "anonymous", safe="")
        write_atomic(folder / f"{name}.json", json.dumps(rows).encode())
    return len(feedback.panels)


def _read_d3po(path: Path, known: Feedback) -> Iterator[Judgement]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FeedbackError(f"{path} holds no .json file")
    for file in files:
        try:
            rows = json.loads(_text(file))
        except ValueError as error:
            raise FeedbackError(f"{file}: {error}") from None
        if not isinstance(rows, list) or len(rows) > len(known.panels):
            raise FeedbackError(f"{file} must be a list of at most {len(known.panels)} rows")
        for i, (row, panel) in enumerate(zip(rows, known.panels, strict=False)):
            if row is None:
                continue
            numbers = isinstance(row, list) and all(
                v is None or isinstance(v, int | float) for v in row
            )
            if not numbers or len(row) != len(panel.samples):
                raise FeedbackError(f"{file}, row {i}: expected {len(panel.samples)} numbers")
            annotator = "" if file.stem == "anonymous" else unquote(file.stem)
            yield _named(panel.samples, tuple(row), annotator)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FeedbackError(f"cannot read {path}: {error}") from None
