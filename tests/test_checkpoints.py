"""Checkpoints: what is written comes back; what is broken, foreign or unsafe is refused by name."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefenv.checkpoints import load_checkpoint, save_checkpoint, shipped, write_atomic
from prefenv.errors import CheckpointError
from prefenv.networks import VelocityMLP
from prefenv.policy import FlowPolicy
from prefenv.registry import make_task, names
from prefenv.tasks.shapes import Shapes

CARD = {"seed": 3, "class_rate": {"roll": 0.75}, "note": 'quotes " and é'}


class Small(Shapes):
    """Shapes with a network that is quick to write."""

    def network(self):
        return VelocityMLP(self.event_shape, width=8, blocks=1, frequencies=2)


@pytest.fixture
def task():
    return Small(points=8)


@pytest.fixture
def flow(small_flow):
    return small_flow((8, 2), width=8, blocks=1, frequencies=2)


@pytest.fixture
def path(tmp_path, task, flow):
    """A good checkpoint, the only file of its folder."""
    file = tmp_path / "folder" / "small.safetensors"
    save_checkpoint(file, flow, task, CARD)
    return file


def edit(path, change, header=None):
    """Rewrite a checkpoint with other tensors or another header."""
    tensors = load_file(path)
    change(tensors)
    card = {"format": "prefenv-flow-1", "task": "shapes", "card": "{}", **(header or {})}
    save_file(tensors, path, card)


def test_round_trip_is_bit_equal(path, task, flow):
    loaded = load_checkpoint(path, task)
    assert loaded.card == CARD
    state, back = flow.state_dict(), loaded.flow.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[k], back[k]) for k in state)
    x = torch.randn(3, 8, 2)
    assert torch.equal(flow.integrate(x, 4), loaded.flow.integrate(x, 4))
    assert not any(p.requires_grad for p in loaded.flow.parameters())


@pytest.mark.parametrize("name", names("task"))
def test_the_committed_reference_loads_and_is_as_its_card_says(name):
    task = make_task(name)
    path = shipped(task.name)
    assert path.with_suffix(".md").is_file(), "a model card lies beside it"
    loaded = load_checkpoint(None, task)
    n = min(1024, task.samples // 4)
    card, noise = loaded.card, torch.randn(n, *task.event_shape)
    asked = None
    if task.condition is not None:
        asked = task.data(n, torch.Generator().manual_seed(0))[1]
    samples = FlowPolicy(loaded.flow, steps=16, shift=task.shift).sample(noise, asked)
    assert float(task.residual(samples).median()) == pytest.approx(card["residual"], rel=0.1)
    for k, label in enumerate(task.classes):
        share = float((task.classify(samples) == k).float().mean())
        assert share == pytest.approx(card["class_rate"][label], abs=0.06)


# What is refused


def test_missing_says_how_to_make_one(tmp_path, task):
    with pytest.raises(CheckpointError, match=r"no checkpoint.*prefenv train --task shapes"):
        load_checkpoint(tmp_path / "none.safetensors", task)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path, task)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 60, 0.5, 0.9, -1])
def test_truncated(path, task, keep):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(path, task)


def test_bytes_that_are_too_many(path, task):
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(path, task)


def test_another_tasks_reference(path, task):
    path = path.rename(path.with_name("shapes.safetensors"))
    edit(path, lambda tensors: None, {"task": "letters"})
    with pytest.raises(CheckpointError, match="task 'letters', not 'shapes'"):
        load_checkpoint(path, task)


def test_another_format(path, task):
    edit(path, lambda tensors: None, {"format": "something-else"})
    with pytest.raises(CheckpointError, match="prefenv-flow-1.*something-else"):
        load_checkpoint(path, task)
    save_file(load_file(path), path)
    with pytest.raises(CheckpointError, match="prefenv-flow-1.*None"):
        load_checkpoint(path, task)


def test_another_shape(path):
    with pytest.raises(CheckpointError, match=r"shape \(8, 16\), the network needs \(8, 20\)"):
        load_checkpoint(path, Small(points=10))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("field.out.bias"),
        lambda tensors: tensors.update({"field.out.bias_2": torch.zeros(16)}),
    ],
)
def test_missing_or_foreign_weights(path, task, change):
    edit(path, change)
    with pytest.raises(CheckpointError, match=r"does not fit the network: field\.out\.bias"):
        load_checkpoint(path, task)


def test_a_card_that_cannot_be_read(path, task):
    edit(path, lambda tensors: None, {"card": "{broken"})
    with pytest.raises(CheckpointError, match="card"):
        load_checkpoint(path, task)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(path, task, bad):
    edit(path, lambda tensors: tensors["field.out.bias"].__setitem__(3, bad))
    with pytest.raises(CheckpointError, match=r"field\.out\.bias holds NaN or infinity"):
        load_checkpoint(path, task)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.mark.parametrize("name", ["model.pt", "shapes.safetensors"])
@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_a_pickle_is_refused_and_its_code_is_not_run(tmp_path, task, name, write):
    path, mark = tmp_path / name, tmp_path / "ran"
    if write == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"model_state_dict": Bomb(mark)}, path)
    with pytest.raises(CheckpointError, match="never loaded"):
        load_checkpoint(path, task)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb was live"


# Writing


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, task, flow, where, monkeypatch):
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(path, flow, task, {"another": "card"})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    save_checkpoint(path, flow, task, {"another": "card"})
    assert load_checkpoint(path, task).card == {"another": "card"}


def test_an_interrupted_write_cleans_up_too(path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"half")
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() != b"half"


def test_files_get_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "new" / "file", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "new" / "file").stat().st_mode & 0o777 == 0o640


def test_the_header_is_plain_json(path):
    """Readable by any program: length, JSON, numbers."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert header["task"] == "shapes" and json.loads(header["card"]) == CARD


@pytest.mark.cuda
def test_a_flow_on_cuda_is_written_and_read(tmp_path, task, flow):
    path = tmp_path / "there.safetensors"
    save_checkpoint(path, flow.clone().cuda(), task, CARD)
    back = load_checkpoint(path, task).flow.state_dict()
    assert all(torch.equal(back[k], v) for k, v in flow.state_dict().items())


@pytest.mark.parametrize(
    "text",
    [
        "shapes",
        "shapes:s_rate=0.02",
        "digits:wrong=0.0,channels=8",
        "segments:env=Pendulum-v1,skill=expert",
    ],
)
def test_a_tasks_text_makes_it_again(text):
    """It is what the hint says when there is no checkpoint: a command that can be run."""
    task = make_task(text)
    assert make_task(task.text) == task
    settings = set(text.partition(":")[2].split(",")) - {"", "env=Pendulum-v1"}
    assert settings == set(task.text.partition(":")[2].split(",")) - {""}
