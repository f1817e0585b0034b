"""Run directories: what they hold, that they resume exactly, that nothing is half written."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from prefenv.checkpoints import load_checkpoint
from prefenv.errors import CheckpointError, ConfigError, RunError
from prefenv.evaluation import Judge
from prefenv.packing import unpack
from prefenv.registry import make_oracle, make_task
from prefenv.runs import RunConfig, align

SMALL = RunConfig(agent="d3po", queries=96, panel_size=4, rows=16, seed=3, device="cpu")
KEYS = {
    "agent", "env", "oracle", "seed", "queries", "panels", "nfe", "seconds", "device",
    "reference_preferred_rate", "preferred_rate", "score", "optimum_score", "kl_nats",
    "frontier_kl_nats", "residual", "diversity",
}  # fmt: skip


@pytest.fixture(scope="module")
def judge():
    torch.set_num_threads(1)
    task = make_task("shapes")
    flow = load_checkpoint(None, task).flow
    return Judge(flow, task, make_oracle("s-curve", task), n_reference=2048, n=128)


def timeless(summary):
    return {k: v for k, v in summary.items() if k != "seconds"}


def same_model(a, b):
    first, second = (unpack(f / "model.safetensors")["parts"]["model"] for f in (a, b))
    return all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_directory_is_complete_and_repeatable(tmp_path, judge):
    one = align(SMALL, tmp_path / "one", judge=judge)
    two = align(SMALL, tmp_path / "two", judge=judge)
    assert one.keys() >= KEYS
    assert timeless(one) == timeless(two)
    assert same_model(tmp_path / "one", tmp_path / "two")
    assert one["queries"] == 96 and one["panels"] == 24
    files = {p.name for p in (tmp_path / "one").iterdir()}
    assert files == {
        "config.json", "versions.json", "metrics.jsonl", "model.safetensors", "summary.json", "shapes.png",
    }  # fmt: skip
    lines = [json.loads(x) for x in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [x["round"] for x in lines] == [1, 2, 3, 4, 5, 6]
    assert [x["queries"] for x in lines] == [16, 32, 48, 64, 80, 96]


def test_a_finished_run_is_read_not_repeated(tmp_path, judge):
    first = align(SMALL, tmp_path, judge=judge)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert align(SMALL, tmp_path, judge=judge) == first
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("agent", ["pfm", "ppo"])  # all others' saving: test_agent_saving.py
def test_an_interrupted_run_goes_on_and_comes_out_the_same(tmp_path, judge, agent, monkeypatch):
    monkeypatch.setattr("prefenv.runs._SAVE_SECONDS", 0.0)
    config = dataclasses.replace(SMALL, agent=agent)

    def interrupt(agent, metrics):
        if agent.rounds == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(config, tmp_path / "cut", judge=judge, callback=interrupt)
    assert (tmp_path / "cut" / "state.safetensors").exists()
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = align(config, tmp_path / "cut", judge=judge)
    whole = align(config, tmp_path / "whole", judge=judge)
    assert timeless(resumed) == timeless(whole)
    assert same_model(tmp_path / "cut", tmp_path / "whole")
    rounds = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["round"] for r in rounds] == [1, 2, 3, 4, 5, 6]


def test_kill_9_loses_nothing_that_was_saved(tmp_path, judge):
    code = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "import prefenv.runs as r; r._SAVE_SECONDS = 0.0\n"
        "from pathlib import Path\n"
        f"config = r.RunConfig(**{dataclasses.asdict(SMALL)!r})\n"
        "r.align(config, Path(sys.argv[1]), judge=object(), callback=lambda a, m: time.sleep(0.2))\n"
    )
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    deadline = time.monotonic() + 60
    while not (folder / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 1 <= unpack(folder / "state.safetensors")["rounds"] < 6
    (folder / ".state.safetensors.half").write_bytes(b"what a kill within a write leaves")
    resumed = align(SMALL, folder, judge=judge)
    assert timeless(resumed) == timeless(align(SMALL, tmp_path / "whole", judge=judge))
    assert not list(folder.glob(".*"))


def test_another_run_in_the_folder_is_refused(tmp_path, judge):
    align(SMALL, tmp_path, judge=judge)
    other = dataclasses.replace(SMALL, seed=4)
    with pytest.raises(RunError, match="another run"):
        align(other, tmp_path, judge=judge)


def test_an_unwritable_folder_is_refused_before_any_question(tmp_path, judge):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        align(SMALL, tmp_path / "file" / "run", judge=judge)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_damaged_records_are_named(tmp_path, judge, name):
    align(SMALL, tmp_path, judge=judge)
    (tmp_path / name).write_text("{")
    with pytest.raises(RunError, match="damaged"):
        align(SMALL, tmp_path, judge=judge)


def test_a_truncated_state_is_named(tmp_path, judge):
    def stop(agent, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(SMALL, tmp_path, judge=judge, callback=stop)
    (tmp_path / "state.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(CheckpointError, match="safetensors"):
        align(SMALL, tmp_path, judge=judge)


@pytest.mark.parametrize(
    "wrong",
    [
        {"queries": 0},
        {"queries": -4},
        {"panel_size": 0},
        {"panel_size": 5},
        {"rows": 6},
        {"rows": 20},
        {"rows": 0},
    ],
)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ConfigError):
        dataclasses.replace(SMALL, **wrong)


@pytest.mark.parametrize(
    ("queries", "panel", "rows"),
    [(4096, 4, 128), (12, 4, 4), (4, 4, 4), (1000, 4, 20), (64, 16, 16)],
)
def test_a_budget_fills_its_rounds_exactly(queries, panel, rows):
    config = RunConfig(agent="ppo", queries=queries, panel_size=panel)
    assert config.num_envs() == rows
    assert queries % rows == 0


def test_the_name_hashes_the_settings():
    assert SMALL.name == dataclasses.replace(SMALL).name
    assert SMALL.name != dataclasses.replace(SMALL, queries=192).name
    assert SMALL.name.startswith("d3po-shapes-s3-")
