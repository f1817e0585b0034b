"""The demo's table, figures and folders, and the README's example."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from prefenv.cli import main
from prefenv.demo import folder_of
from prefenv.evaluation import Judge
from prefenv.registry import names

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quick(monkeypatch):
    """Evaluation with few samples, and one thread."""
    torch.set_num_threads(1)
    init = Judge.__init__

    def small(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "n_reference": 2048, "n": 128})

    monkeypatch.setattr(Judge, "__init__", small)


def test_demo_writes_a_table_and_two_figures(tmp_path, capsys, quick):
    argv = ["demo", "--out", str(tmp_path), "--queries", "32", "--agents", "d3po", "ppo"]
    assert main([*argv, "--workers", "2"]) == 0
    text = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["agent", "reference", "d3po", "ppo", "optimum (beta 0.1)"]
    assert (tmp_path / "table.md").read_text() in text
    for name in ("shapes.png", "frontier.png"):
        picture = imread(tmp_path / name)
        assert picture.ndim == 3 and picture[..., :3].std() > 0.01
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    assert summary["queries"] == 32
    # A second demo reads the finished runs: nothing is made again.
    before = (tmp_path / "ppo" / "model.safetensors").stat().st_mtime_ns
    assert main([*argv, "--json", "--workers", "1"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [r["agent"] for r in runs] == ["d3po", "ppo"]
    assert (tmp_path / "ppo" / "model.safetensors").stat().st_mtime_ns == before


def test_each_task_has_a_folder_of_its_own():
    """``make demo`` and then ``make demo TASK=digits`` meet no run of the other."""
    tasks = [*names("task"), "shapes:points=16", "clouds:points=16"]
    folders = [folder_of(task) for task in tasks]
    assert folders[0] == Path("runs/demo") and len(set(folders)) == len(tasks)
    assert folders[-1] == Path("runs/demo-clouds-points-16")


def test_a_failing_agent_is_one_line(tmp_path, capsys, quick):
    argv = ["demo", "--out", str(tmp_path), "--queries", "32", "--agents", "ppo:lr=1e30"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "lower lr" in err and "Traceback" not in err and out == ""


def test_the_readme_example_runs_as_it_stands():
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.S)
    assert code
    scope: dict = {}
    exec(compile(code.group(1), "README.md", "exec"), scope)
    assert scope["shapes"].shape == (8, 64, 2)
    assert scope["env"].unwrapped.ledger.queries == 2048
