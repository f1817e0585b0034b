"""A stranger's agent in a package of its own: installed, found, run and checked by its name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "tests" / "plugin"
PAGE = (ROOT / "agents" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in installed, built by pip from its two files, without a network."""
    site, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command = [*pip, "--no-build-isolation", "--target", str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return site


def prefenv(site: Path, cwd: Path, *argv: str) -> str:
    """What the command prints, in a folder that is not the repository."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    command = [sys.executable, "-m", "prefenv.cli", *argv]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed(site, tmp_path):
    about = "flow matching on the best sample of every panel so far."
    assert re.search(rf"^  winners +{re.escape(about)}$", prefenv(site, tmp_path, "list"), re.M)
    assert json.loads(prefenv(site, tmp_path, "list", "--json"))["agents"][-1] == "winners"


def test_it_runs_and_learns(site, tmp_path):
    argv = ["align", "--agent", "winners:updates=10", "--queries", "64", "--panel-size", "4"]
    out = prefenv(
        site, tmp_path, *argv, "--seed", "100", "--device", "cpu", "--json", "--out", "run"
    )
    summary = json.loads(out)
    assert summary["queries"] == 64 and summary["panels"] == 16
    assert summary["preferred_rate"] > summary["reference_preferred_rate"] + 0.1
    assert (tmp_path / "run" / "summary.json").exists()


def test_it_passes_check_agent(site, tmp_path):
    told = json.loads(prefenv(site, tmp_path, "check-agent", "winners", "--json"))
    assert told["passed"] and len(told["checks"]) == 21
    made = {c["check"] for c in told["checks"] if not c["skipped"]}
    assert {"direction", "ties", "saving", "budget"} <= made


@pytest.mark.parametrize("file", ["prefenv_winners.py", "pyproject.toml"])
def test_the_page_shows_the_package_as_it_is(file):
    text = (PLUGIN / file).read_text(encoding="utf-8")
    assert f"# {file}\n{text}```" in PAGE


def test_the_agent_is_short():
    assert len((PLUGIN / "prefenv_winners.py").read_text(encoding="utf-8").splitlines()) <= 40
