"""The package as a stranger gets it: built, installed away from the repository, used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prefenv

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"prefenv", "agents", "oracles", "benchmarks"}

USE = """
import json
import gymnasium as gym
import agents, benchmarks, oracles, prefenv, prefenv.checkpoints

env = gym.make_vec("prefenv/Shapes-v0", num_envs=2, device="cpu")
observation, info = env.reset(seed=0)
action, _ = env.unwrapped.reference.predict(observation)
observation, reward, terminated, truncated, info = env.step(action)
print(json.dumps({
    "files": [m.__file__ for m in (prefenv, prefenv.checkpoints, agents, oracles, benchmarks)],
    "checkpoint": str(prefenv.checkpoints.shipped(env.unwrapped.task.name)),
    "version": prefenv.__version__,
    "shape": observation["x"].shape,
}))
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in another folder, with nothing in the environment that leads back to the repository."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive, so that both are tried."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert len(list(out.glob("prefenv-*.tar.gz"))) == 1
    (path,) = out.glob("prefenv-*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of an environment that holds the wheel and borrows everything else from this one.

    The path line in a ``.pth`` file puts this environment's packages last on the path and, unlike a site
    folder, does not read the ``.pth`` files in there, so an editable install of the repository stays out.
    """
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, "--quiet", wheel, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    here = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(here) + "\n")
    return python.parent


def test_wheel_holds_the_rooms_and_the_references(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == ROOMS
    for reference in (ROOT / "checkpoints").glob("*.safetensors"):
        assert f"prefenv/checkpoints/{reference.name}" in names
        assert f"prefenv/checkpoints/{reference.stem}.md" in names
    for file in ROOT.glob("prefenv/**/*.py"):
        assert file.relative_to(ROOT).as_posix() in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {f"oracles/web/page/{n}" for n in ("index.html", "page.js", "page.css")} <= names
    assert not [n for n in names if n.startswith(("benchmarks/results/", "oracles/pictures/"))]


def test_installed_package_works_from_another_folder(clean: Path, tmp_path: Path) -> None:
    got = json.loads(run(clean / "python", "-c", USE, cwd=tmp_path).stdout)
    for file in (*got["files"], got["checkpoint"]):
        assert Path(file).is_relative_to(clean.parent)
    assert Path(got["files"][1]).name == "checkpoints.py"
    assert got["version"] == prefenv.__version__
    assert got["shape"] == [2, 128]


def test_installed_command(clean: Path, tmp_path: Path) -> None:
    assert "usage: prefenv" in run(clean / "prefenv", "--help", cwd=tmp_path).stdout
    listed = run(clean / "prefenv", "list", cwd=tmp_path).stdout
    assert "shapes" in listed
    assert "s-curve" in listed
    assert not list(tmp_path.iterdir())
