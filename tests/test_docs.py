"""The examples of CONTRIBUTING.md run as they stand there."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import pytest
import torch

from prefenv.registry import lookup, make_agent

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def load(file: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Write an example to a folder of its own and import it as ``example_<name>``."""
    name = f"example_{Path(file).stem}"
    (folder / f"{name}.py").write_text(BLOCKS[file], encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_example_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("agents/awr.py", tmp_path, monkeypatch)
    residual, judgement = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 0.2, torch.nan])
    e = torch.e
    torch.testing.assert_close(
        module.awr_loss(residual, judgement, 0.2), torch.tensor((1 + 2 * e) / (1 + e))
    )

    env = gym.make_vec("prefenv/Shapes-v0", num_envs=64, device="cpu")
    agent = make_agent("example_awr:AWR:temperature=0.1", env, seed=0)
    assert agent.config.temperature == 0.1
    noise = torch.randn(64, 64, 2, generator=torch.Generator().manual_seed(1))
    oracle = lookup("oracle", "s-curve")(env.unwrapped.task)
    before = oracle.score(agent.sample(noise)).mean()
    agent.learn(640)
    assert oracle.score(agent.sample(noise)).mean() > before + 0.02


def test_example_agent_passes_check_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("agents/awr.py", tmp_path, monkeypatch)
    prefenv = [sys.executable, "-c", "from prefenv.cli import main; main()"]
    command = [*prefenv, "check-agent", "example_awr:AWR"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_example_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("oracles/upright.py", tmp_path, monkeypatch)
    env = gym.make_vec(
        "prefenv/Shapes-v0", num_envs=4, device="cpu", oracle="example_upright:Upright"
    )
    tall, wide = torch.randn(2, 64, 2) * torch.tensor([[[1.0, 3.0]], [[3.0, 1.0]]])
    judged = env.unwrapped.judge(torch.stack([tall, wide]))
    assert judged[0] > 0.6 > 0.4 > judged[1]


def test_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`((?:prefenv|agents|oracles|benchmarks|checkpoints)/[\w/.-]*)`", PAGE))
    missing = [n for n in named - BLOCKS.keys() if "name" not in n and not (ROOT / n).exists()]
    assert named
    assert not missing
