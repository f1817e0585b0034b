"""Feedback in files: round trips lose nothing, what is not valid is refused with its line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefenv.cli import main
from prefenv.errors import FeedbackError
from prefenv.feedback import FeedbackStore, Judgement, Panel, Retraction, Sample
from prefenv.feedback.files import Feedback, dump, load, read_feedback, read_jsonl, write_jsonl
from prefenv.feedback.formats import export_feedback, import_feedback


def fill(store: FeedbackStore, size: int = 3, panels: int = 5) -> None:
    """Questions with every kind of sample and answer: choices, a tie, a skip, parts, an undo, two annotators."""
    x = torch.randn(panels, size, 3, 2, generator=torch.Generator().manual_seed(size))
    path = torch.cat([torch.zeros(2, size, 4, 3, 2), x[:2, :, None]], 2)
    store.ask(x[:2], -x[:2], path, path[..., 0, 0][..., 1:], task="toy", model="m", seed=3)
    store.ask(x[2:], condition="a prompt", info={"steps": 4, "kernel": {"window": [0.0, 0.5]}})
    for who in ("ann", "Bob / 2"):
        for i, panel in enumerate(store.panels()):
            scores = [0.25 * j for j in range(size)]
            if i == 1:
                scores = [0.5] * size
            if i == 2:
                scores = [None] * size
            if i == 3:
                scores[0] = None
            store.answer(Judgement(panel.samples[::-1], tuple(scores), who, 0.1 + i))
    store.undo("ann")


def same(one: Feedback, other: Feedback) -> bool:
    """Equal to the bit: arrays, order, times, everything."""
    assert [s.id for s in one.samples] == [s.id for s in other.samples]
    for a, b in zip(one.samples, other.samples, strict=True):
        for name, value in vars(a).items():
            if isinstance(value, np.ndarray):
                assert value.tobytes() == getattr(b, name).tobytes(), name
            else:
                assert value == getattr(b, name), name
    return one.panels == other.panels and one.events == other.events


def by_panel(feedback: Feedback) -> dict[str, dict[str, float | None]]:
    """Answers by panel, whatever the order in which it was shown."""
    return {panel.id: scores for panel, scores in feedback.answers()}


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        fill(store)
        yield store


# JSONL


def test_jsonl_round_trip_loses_nothing(store, tmp_path):
    before = dump(store)
    assert len(before.judgements()) == 9 and any(isinstance(e, Retraction) for e in before.events)
    write_jsonl(before, tmp_path / "all.jsonl")
    assert same(before, read_jsonl(tmp_path / "all.jsonl"))
    with FeedbackStore(tmp_path / "other.sqlite") as other:
        load(other, read_feedback(tmp_path / "all.jsonl"))
        load(other, read_feedback(tmp_path / "all.jsonl"))
        assert same(before, dump(other)), "read twice, kept once"
        assert other.judgements() == store.judgements() == before.judgements()
    write_jsonl(dump(store), tmp_path / "again.jsonl")
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert same(read_feedback(tmp_path), before), "a folder is its feedback.sqlite"


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_any_float32_survives_jsonl(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("f") / "f.jsonl"
    write_jsonl(Feedback([Sample(np.array(values, np.float32))]), path)
    assert read_jsonl(path).samples[0].x.tobytes() == np.array(values, "<f4").tobytes()


SAMPLE = {"kind": "sample", "x": [1.0]}
NAME = Sample(np.ones(1)).id
JUDGED = {"kind": "judgement", "samples": [NAME], "scores": [1], "id": "j", "time": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "Expecting value"),
        ([1], "not a JSON object"),
        ({"kind": "verdict"}, "unknown kind 'verdict'"),
        ({**SAMPLE, "colour": "red"}, r"unknown keys of a sample: \['colour'\]"),
        ({**SAMPLE, "id": "0" * 16}, "another content"),
        ({"kind": "sample"}, "missing 1 required"),
        ({"kind": "panel", "samples": ["b"]}, r"no sample \['b'\]"),
        ({**JUDGED, "scores": [1, 0]}, "2 scores for 1 samples"),
        ({**JUDGED, "scores": ["good"]}, "could not convert"),
        ({**JUDGED, "scores": "1"}, "scores must be a list"),
        ({**JUDGED, "annotator": 3}, "annotator must be a text"),
        ({"kind": "retraction", "judgement": "x"}, "no judgement 'x'"),
    ],
)
def test_lines_that_are_not_valid(tmp_path, line, message):
    path = tmp_path / "f.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    head = '{"kind": "feedback", "version": 1}\n' + json.dumps(SAMPLE) + "\n"
    path.write_text(head + json.dumps(JUDGED) + "\n")
    assert len(read_jsonl(path).judgements()) == 1
    path.write_text(head + text + "\n")
    with pytest.raises(FeedbackError, match=f"f.jsonl, line 3: .*{message}"):
        read_jsonl(path)


def test_the_first_line_says_the_version(tmp_path):
    path = tmp_path / "f.jsonl"
    for text, message in (
        ('{"kind": "feedback", "version": 2}', "line 1: version 2; this prefenv reads 1"),
        (json.dumps(SAMPLE), "line 1: the first line must be"),
        ("", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(FeedbackError, match=message):
            read_jsonl(path)
    with pytest.raises(FeedbackError, match="no feedback file at .*missing"):
        read_feedback(tmp_path / "missing.jsonl")


# D3PO


def test_d3po_files_average_annotators(store, tmp_path):
    """A folder as its public code reads one: N x K numbers a file, one file an annotator."""
    folder, panels = tmp_path / "labels", store.panels()
    folder.mkdir()
    ann = [[0, 0, 1], [1, 0, 1], [0, 1, 0]]
    bob = [[0, 1, 1], [1, 1, 0]]  # ends early: the public code would cut ann's third row
    for name, rows in (("Cid", ann), ("Dan", bob)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    told = dict(import_feedback(folder, "d3po", dump(store)).answers())
    expected = [[0, 0.5, 1], [1, 0.5, 0.5], [0, 1, 0]]
    for panel, row in zip(panels, expected, strict=False):
        assert told[panel] == dict(zip(panel.samples, row, strict=True))
    assert len(told) == 3, "the public code's answer has min(3, 2) = 2 rows"


def test_d3po_round_trip(store, tmp_path):
    store.undo("ann")  # not every panel is answered by everybody
    before = dump(store)
    assert export_feedback(before, tmp_path / "d3po", "d3po") == 5
    files = sorted(p.name for p in (tmp_path / "d3po").iterdir())
    assert files == ["Bob%20%2F%202.json", "ann.json"]
    rows = json.loads((tmp_path / "d3po" / "ann.json").read_text())
    assert rows[0] == [0.5, 0.25, 0] and rows[1] == [0.5] * 3 and rows[4] is None
    back = import_feedback(tmp_path / "d3po", "d3po", before)
    assert by_panel(back) == by_panel(before)
    load(store, back)
    n = len(store.history())
    load(store, import_feedback(tmp_path / "d3po", "d3po", before))
    assert len(store.history()) == n, "read twice, kept once"


def test_d3po_files_that_do_not_fit(store, tmp_path):
    known, path = dump(store), tmp_path / "ann.json"
    for text, message in (
        ("[[1, 0, 0, 0]]", "row 0: expected 3 numbers"),
        ('[[1, 0, "x"]]', "row 0: expected 3 numbers"),
        (json.dumps([[0, 0, 1]] * 6), "at most 5 rows"),
        ("{", "ann.json"),
    ):
        path.write_text(text)
        with pytest.raises(FeedbackError, match=message):
            import_feedback(path, "d3po", known)
    path.unlink()
    with pytest.raises(FeedbackError, match="no .json file"):
        import_feedback(tmp_path, "d3po", known)
    with pytest.raises(FeedbackError, match="one size"):
        export_feedback(Feedback(panels=[Panel(("a",)), Panel(("a", "b"))]), tmp_path / "o", "d3po")


# TRL


@pytest.mark.parametrize("form", ["trl-pairs", "trl-labels"])
def test_trl_round_trip_loses_no_standing_answer(store, tmp_path, form):
    path, before = tmp_path / "trl.jsonl", dump(store)
    export_feedback(before, path, form)
    back = import_feedback(path, form, before)
    by_time = sorted(before.judgements(), key=lambda j: j.time)
    assert back.events == by_time, "order shown, annotator, seconds, ties and skips too"


def test_trl_rows_are_what_trl_reads(store, tmp_path):
    path, known = tmp_path / "trl.jsonl", dump(store)
    n = export_feedback(known, path, "trl-pairs")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # By hand: three distinct scores make 3 pairs, a tie and a skip none, two distinct scores 1; the undone none.
    assert n == len(rows) == 2 * (3 + 0 + 0 + 1) + 3
    assert {"prompt", "chosen", "rejected"} < rows[0].keys()
    assert {r["prompt"] for r in rows} == {"", "a prompt"}
    for row in rows:
        by = dict(zip(row["judgement"]["samples"], row["judgement"]["scores"], strict=True))
        assert by[row["chosen"]] > by[row["rejected"]]
    n = export_feedback(known, path, "trl-labels", threshold=0.5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert n == len(rows) == 2 * (3 + 3 + 0 + 2) + 3
    assert {"prompt", "completion", "label"} < rows[0].keys()
    assert sum(r["label"] for r in rows) == 2 * (1 + 3 + 0 + 1) + 1


def test_other_peoples_trl_files(store, tmp_path):
    known, path = dump(store), tmp_path / "trl.jsonl"
    a, b, c = (s.id for s in known.samples[:3])
    path.write_text(json.dumps({"prompt": "", "chosen": a, "rejected": b}) + "\n")
    (judgement,) = import_feedback(path, "trl-pairs", known).judgements()
    assert (judgement.samples, judgement.scores) == ((a, b), (1.0, 0.0))
    path.write_text(json.dumps({"prompt": "", "completion": c, "label": False}) + "\n")
    (judgement,) = import_feedback(path, "trl-labels", known).judgements()
    assert (judgement.samples, judgement.scores) == ((c,), (0.0,))
    path.write_text(json.dumps({"prompt": "", "chosen": "a text", "rejected": b}) + "\n")
    with pytest.raises(FeedbackError, match="not known: a text"):
        import_feedback(path, "trl-pairs", known)
    path.write_text('{"prompt": ""}\n')
    with pytest.raises(FeedbackError, match="trl.jsonl, line 1"):
        import_feedback(path, "trl-pairs", known)


# The commands


@pytest.mark.parametrize("form", ["jsonl", "d3po", "trl-pairs", "trl-labels"])
def test_export_and_import_commands(store, tmp_path, form, capsys):
    out, copy = tmp_path / "out" / ("x" if form == "d3po" else "x.jsonl"), tmp_path / "copy"
    assert main(["export", str(tmp_path), "--out", str(out), "--form", form]) == 0
    with FeedbackStore(copy / "feedback.sqlite") as other:
        if form != "jsonl":
            load(other, Feedback(store.samples(), store.panels()))
    assert main(["import", str(out), "--into", str(copy), "--form", form]) == 0
    assert "9 new answers" in capsys.readouterr().out
    with FeedbackStore(copy / "feedback.sqlite") as other:
        assert by_panel(dump(other)) == by_panel(dump(store))
    assert main(["export", str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert "no feedback file" in capsys.readouterr().err
