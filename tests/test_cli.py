"""The command line: JSON that is only JSON, one clear line and exit code 2 for a mistake."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefenv.checkpoints import load_checkpoint, shipped
from prefenv.cli import main
from prefenv.evaluation import Judge
from prefenv.registry import make_task, names

ALIGN = ["align", "--agent", "d3po", "--queries", "16", "--device", "cpu"]


@pytest.fixture
def quick(monkeypatch):
    """Evaluation with few samples."""
    torch.set_num_threads(1)
    init = Judge.__init__

    def small(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "n_reference": 2048, "n": 128})

    monkeypatch.setattr(Judge, "__init__", small)


def one_line(capsys, code, *words):
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("prefenv: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["align", "--agent", "dpo"], ["unknown agent 'dpo'", "d3po"]),
        (["align", "--oracle", "roll"], ["unknown oracle 'roll'", "s-curve"]),
        (["align", "--task", "shape"], ["unknown task 'shape'", "did you mean 'shapes'"]),
        (["align", "--agent", "no_such_module:X"], ["no_such_module"]),
        (["align", "--agent", "ppo:lrr=1"], ["lrr"]),
        (["align", "--agent", "ppo:lr"], ["ppo:lr"]),
        (["align", "--queries", "0"], ["positive"]),
        (["align", "--queries", "-8"], ["positive"]),
        (["align", "--queries", "10", "--panel-size", "4"], ["do not divide"]),
        (["align", "--panel-size", "0"], ["panels of 0"]),
        (["align", "--panel-size", "1", "--agent", "d3po"], ["panel_size"]),
        (["align", "--queries", "many"], ["--queries"]),
        (["align", "--no-such-option", "1"], ["no-such-option"]),
        (["align", "--device", "tpu9"], ["tpu9"]),
        (["align", "--checkpoint", "nowhere.safetensors"], ["no checkpoint", "prefenv train"]),
        (["align", "--oracle", "s-curve:width=-1"], ["width"]),
        (["align", "--oracle", "s-curve:answer=maybe"], ["answer"]),
        (["align", "--beta", "0"], ["beta"]),
        (["demo", "--agents", "nobody"], ["unknown agent"]),
        (["train", "--task", "nothing"], ["unknown task"]),
        (["train", "--task", "shapes:guidance=3.0"], ["'shapes' takes no guidance"]),
        (["train", "--task", "digits:channels=6"], ["multiple of 4", "not 6"]),
        (["train", "--iterations", "0"], ["iterations"]),
        (["train", "--out", "model.pt"], [".safetensors"]),
        (["check-agent", "nobody"], ["unknown agent"]),
        (["check-agent", "ppo", "--only", "tie"], ["no check is named 'tie'", "ties"]),
        (["dance"], ["dance"]),
        ([], []),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    one_line(capsys, main(argv), *words)
    assert not list(tmp_path.rglob("summary.json"))


def test_an_unwritable_folder(capsys, tmp_path, quick):
    (tmp_path / "file").write_text("")
    one_line(capsys, main([*ALIGN, "--out", str(tmp_path / "file" / "x")]), "cannot write")
    out = tmp_path / "file" / "x.safetensors"
    one_line(
        capsys,
        main(["train", "--task", "shapes:samples=256", "--iterations", "1", "--out", str(out)]),
        "cannot write",
    )


class Evil:
    """Pickles as a call that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def broken(kind, path):
    """A checkpoint broken in one way."""
    good = shipped("shapes")
    tensors, header = load_file(good), {"format": "prefenv-flow-1", "task": "shapes", "card": "{}"}
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:5000])
    elif kind == "renamed":
        save_file(tensors, path, {**header, "task": "digits"})
    elif kind == "wrong shape":
        save_file({**tensors, "field.out.bias": torch.zeros(3)}, path, header)
    elif kind == "not finite":
        save_file({**tensors, "field.out.bias": torch.full((128,), torch.nan)}, path, header)
    elif kind == "pickle":
        torch.save(Evil(path.with_name("ran")), path)


@pytest.mark.parametrize("kind", ["truncated", "renamed", "wrong shape", "not finite", "pickle"])
def test_a_bad_checkpoint(kind, capsys, tmp_path, quick):
    path = tmp_path / "bad.safetensors"
    broken(kind, path)
    argv = [*ALIGN, "--checkpoint", str(path), "--out", str(tmp_path / "run")]
    one_line(capsys, main(argv), "bad.safetensors")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_json_is_all_that_is_printed_and_repeats(capsys, tmp_path, quick):
    results = []
    for name in ("a", "b"):
        assert main([*ALIGN, "--json", "--out", str(tmp_path / name)]) == 0
        out, _ = capsys.readouterr()
        results.append(json.loads(out))
        assert out.count("\n") == 1
        on_disk = json.loads((tmp_path / name / "summary.json").read_text())
        assert on_disk == results[-1]
    for r in results:
        r.pop("seconds")
    assert results[0] == results[1]


def test_lists(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agents"] == names("agent") and "shapes" in found["tasks"]
    assert main(["list"]) == 0
    assert "s-curve" in capsys.readouterr().out


def test_check_agent_tells_each_check_on_a_line(capsys):
    only = ["--only", "budget", "correction", "leash"]
    assert main(["check-agent", "d3po", *only]) == 0
    out, err = capsys.readouterr()
    assert err == "" and [line.split()[:2] for line in out.splitlines()] == [
        ["ok", "budget"], ["ok", "correction"], ["-", "leash"], ["d3po:", "2"],
    ]  # fmt: skip
    assert main(["check-agent", "test_public_defects:TwoSidedD3PO", *only]) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["ok", "FAIL", "-"]
    assert "clamped on both sides" in out and "PPO's max" in out
    assert err == "prefenv: test_public_defects:TwoSidedD3PO fails correction\n"


def test_check_agent_as_json(capsys):
    assert main(["check-agent", "ppo", "--only", "settings", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    check = {"check": "settings", "failure": "", "skipped": ""}
    assert told == {"agent": "ppo", "passed": True, "checks": [check]}
    argv = ["check-agent", "test_public_defects:TwoSidedD3PO", "--only", "correction", "--json"]
    assert main(argv) == 2
    told = json.loads(capsys.readouterr().out)
    assert not told["passed"] and "both sides" in told["checks"][0]["failure"]


@pytest.mark.parametrize("command", ["align", "play", "demo", "train", "list", "check-agent"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: prefenv" in capsys.readouterr().out


def test_train_writes_a_checkpoint_that_loads(tmp_path, capsys):
    torch.set_num_threads(1)
    path = tmp_path / "shapes.safetensors"
    command = ["train", "--task", "shapes:samples=256", "--iterations", "3", "--out", str(path)]
    assert main([*command, "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert {"command", "seed", "seconds", "class_rate", "residual", "residual_data"} <= card.keys()
    loaded = load_checkpoint(path, make_task("shapes"))
    assert loaded.card == card
    assert "class rate" in path.with_suffix(".md").read_text()


def test_ctrl_c_in_training_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    """The signal comes in the third step; a subprocess would have to guess when that is."""
    steps, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert main(["train", "--out", str(tmp_path / "shapes.safetensors")]) == 130
    out, err = capsys.readouterr()
    assert len(steps) == 3 and "interrupted" in err and "Traceback" not in err and out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_blows_up_is_one_line(capsys, tmp_path, quick, monkeypatch):
    argv = [*ALIGN[:2], "d3po:lr=1e30", *ALIGN[3:], "--out", str(tmp_path)]
    one_line(capsys, main(argv), "lower lr")
    assert not (tmp_path / "summary.json").exists()
