"""The task of CONTRIBUTING.md, as it stands there: trained, aligned and drawn."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from test_docs import load

from prefenv import plotting
from prefenv.checkpoints import load_checkpoint
from prefenv.envs import FlowVectorEnv
from prefenv.registry import ORACLES, TASKS, make_agent, make_oracle, make_task
from prefenv.runs import RunConfig, align
from prefenv.tasks import TrainConfig
from prefenv.train import save_reference, train_reference


@pytest.fixture
def ring(tmp_path, monkeypatch):
    """The two lines in the registry."""
    for table, file, name, cls in (
        (TASKS, "prefenv/tasks/ring.py", "ring", "Ring"),
        (ORACLES, "oracles/west.py", "west", "West"),
    ):
        module = load(file, tmp_path, monkeypatch)
        monkeypatch.setitem(table, name, f"{module.__name__}:{cls}")
    yield make_task("ring:samples=256")
    gym.registry.pop("prefenv/Ring-v0", None)


def test_example_task_is_trained_aligned_and_drawn(ring, tmp_path):
    x, kind = ring.data(4000, torch.Generator().manual_seed(0))
    clear = x[:, 0].abs() > 0.2
    assert torch.equal(ring.classify(x[clear]), kind[clear])
    assert float(kind.double().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(ring.residual(x).mean()) < 0.06

    trained = train_reference(ring, TrainConfig(iterations=200, batch=128), seed=0, device="cpu")
    path = tmp_path / "ring.safetensors"
    save_reference(path, trained, ring)
    assert "The ring task." in path.with_suffix(".md").read_text()
    assert load_checkpoint(path, ring).card["class_rate"].keys() == {"east", "west"}

    env = FlowVectorEnv(64, task=ring, checkpoint=str(path), panel_size=4, device="cpu")
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(1))
    agent = make_agent("rft:updates=10,batch=64,lr=3e-4", env, seed=0)
    west = make_oracle("west", ring)
    before = agent.sample(noise)
    agent.learn(192)
    after = agent.sample(noise)
    assert float(west.score(before).mean()) < 0.4
    assert float(west.score(after).mean()) > float(west.score(before).mean()) + 0.3
    near = [float(ring.residual(x).median()) for x in (before, after)]
    assert near[1] < near[0] + 0.1, "still near the ring"

    colors = [plotting.RED, plotting.GREEN]
    figure = plotting.overlays(ring, [before.numpy(), after.numpy()], colors, ["A", "B"])
    assert [len(a.collections[0].get_offsets()) for a in figure.axes] == [400, 400]


def test_a_task_without_a_name_is_aligned_by_its_module_and_class(ring, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where prefenv train writes is where its reference is looked for
    path = tmp_path / "checkpoints" / "ring.safetensors"
    save_reference(path, train_reference(ring, TrainConfig(50, 64), seed=0, device="cpu"), ring)
    where = f"{type(ring).__module__}:Ring"
    TASKS.pop("ring")
    config = RunConfig("best-of-n", task=f"{where}:samples=256", queries=64, device="cpu")
    assert config.name.startswith("best-of-n-Ring-s0-")
    summary = align(config, tmp_path / config.name)
    assert (summary["env"], summary["queries"]) == ("prefenv/Ring-v0", 64)
    assert gym.spec("prefenv/Ring-v0").kwargs == {"task": where}
