"""``benchmarks.speed``: what it compares is the same work, and its table says what was measured. Not the times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import speed, speed_memory
from benchmarks.speed_rollout import bare_rollout, env_rollout, graph_rollout
from benchmarks.speed_timing import Fact, Found, Row, interleave, pair
from benchmarks.speed_training import plain_training
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.tasks import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick run as a user starts it: what it printed, and the files it kept."""
    out = tmp_path_factory.mktemp("speed")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--quick", "--out", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, (out / "speed.md").read_text(), json.loads((out / "speed.json").read_text())


def test_quick_run_measures_everything(quick):
    printed, page, kept = quick
    assert printed.strip() == page.strip()
    assert {"rows", "facts", "memory", "command", "date", "machine", "versions"} == kept.keys()
    sections = " ".join(row["section"] for row in kept["rows"])
    for word in ("Rollout", "SyncVectorEnv", "Stable-Baselines3", "Reference training"):
        assert word in sections
    for row in kept["rows"]:
        assert 0 < row["least"] <= row["ratio"] <= row["most"] and row["goal"] is None
        assert f"| {row['ours']} | {row['base']} |" in page
    for memory in kept["memory"]:
        assert 50 < memory["imports"] < memory["peak"]


def test_what_must_hold_holds(quick):
    facts = {fact["what"]: fact for fact in quick[2]["facts"]}
    assert all(fact["holds"] for fact in facts.values())
    for word in (
        "env and bare loop",
        "clip fraction",
        "approximate KL",
        "ratio - 1",
        "transitions",
    ):
        assert any(word in what for what in facts)


def test_the_quick_run_keeps_nothing_by_itself(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "results")
    row = Row("A", "ours", "base", [(1.0, 2.0)], goal=3.0)
    monkeypatch.setattr(speed, "measure", lambda size, device: (Found([row]), []))
    assert speed.main(["--quick"]) == 0 and not list(tmp_path.iterdir())
    row.goal = 3.0
    assert speed.main([]) == 0
    assert "**missed**" in (tmp_path / "results" / "speed.md").read_text()
    assert json.loads((tmp_path / "results" / "speed.json").read_text())["rows"][0]["met"] is False
    wrong = Found([row], [Fact("same work", float("nan"), 1.0)])
    monkeypatch.setattr(speed, "measure", lambda size, device: (wrong, []))
    assert speed.main(["--quick"]) == 1
    assert "**NO**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("goal", "unit", "met", "said"),
    [
        (2.0, "throughput", True, "≥ 2x | 2.00 | 1.00 to 4.00 | met"),
        (2.1, "throughput", False, "≥ 2.1x | 2.00 | 1.00 to 4.00 | **missed**"),
        (None, "throughput", None, "– | 2.00 | 1.00 to 4.00 | –"),
        (0.5, "time", True, "≤ 0.5x its time | 0.50 | 0.25 to 1.00 | met"),
        (0.4, "time", False, "≤ 0.4x its time | 0.50 | 0.25 to 1.00 | **missed**"),
    ],
)
def test_goals_are_held_against_the_median_ratio(goal, unit, met, said):
    row = Row("A", "ours", "base", [(0.001, 0.001), (0.001, 0.004), (0.002, 0.004)], goal, unit)
    assert row.met is met
    assert said in speed.line(row)
    assert speed.line(row).endswith("| 1.0 | 4.0 |")


def test_cases_take_turns_and_the_first_turn_is_not_counted():
    seen: list[str] = []
    cases = {name: lambda name=name: seen.append(name) for name in "abc"}
    seconds = interleave(cases, 2, torch.device("cpu"))
    assert seen == list("abcabcabc")
    assert [len(s) for s in seconds.values()] == [2, 2, 2]
    assert pair(seconds, "a", "c") == list(zip(seconds["a"], seconds["c"], strict=True))


# The same work on both sides


@pytest.mark.parametrize("per_row", [True, False])
def test_the_bare_loop_makes_the_reference_samples(per_row):
    env = FlowVectorEnv(8, array="torch", device="cpu")
    noise = torch.randn(8, 64, 2)
    bare = bare_rollout(env, per_row)
    torch.testing.assert_close(bare(noise), env.reference.sample(noise), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    drawn = bare()
    assert drawn.shape == (8, 64, 2) and float((drawn - bare()).abs().max()) > 0.1


def test_every_call_of_a_rollout_is_one_episode():
    env = FlowVectorEnv(4, array="torch", device="cpu")
    loop = env_rollout(env, env.reference)
    for number in (1, 2, 3):
        info = loop()
        assert bool(info["judged"].all()) and env.ledger.queries == 4 * number
    given = np.zeros((4, 128), np.float32)
    assert not bool(env_rollout(env, env.reference, given)()["final_obs"]["x"].any())


def test_plain_training_is_training(monkeypatch):
    """It lowers the loss on the task's data, as ``train_reference`` would."""
    task = FlowVectorEnv(1, device="cpu").task
    network = task.network()
    monkeypatch.setattr(type(task), "network", lambda self: network)
    x1, _ = task.data(256, make_generator(1))
    x0, t = torch.randn_like(x1), torch.rand(256)

    def loss() -> float:
        with torch.no_grad():
            v = network(torch.lerp(x0, x1, t[:, None, None]), t)
        return float((v - (x1 - x0)).square().mean())

    before = loss()
    plain_training(task, TrainConfig(iterations=30, batch=64), "cpu")
    assert loss() < 0.8 * before


def test_memory_is_a_process_of_its_own():
    """What the measuring process holds is not in it."""
    ballast = np.ones(600 * 2**20, np.uint8)
    assert speed_memory.high_water() > 600 and ballast.any()
    small, large = (speed_memory.measure("collect", rows, "cpu") for rows in (16, 2048))
    assert small["peak"] < 600
    path = 17 * 2048 * 128 * 4 / 2**20
    assert path < large["peak"] - large["imports"] < path + 200
    assert small["peak"] - small["imports"] < path


# CUDA


@pytest.mark.cuda
def test_the_whole_rollout_as_one_graph_is_the_eager_rollout():
    env = FlowVectorEnv(64, array="torch", device="cuda")
    eager = env_rollout(env, env.reference)
    replay = graph_rollout(env.reference, torch.randn(64, 64, 2, device="cuda"))
    for _ in range(3):
        noise = torch.randn(64, 64, 2, device="cuda")
        there = eager(noise)["final_obs"]["x"]
        torch.testing.assert_close(replay(noise).flatten(1), there, rtol=1e-4, atol=1e-4)
    drawn = replay().clone()
    assert float((drawn - replay()).abs().max()) > 0.1, "new noise"
