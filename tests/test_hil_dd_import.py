"""HIL-DD's published network: read safely, and the same numbers as its own code (golden array 06)."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN

from agents.hil_dd import barrier_weight, listwise_loss
from prefenv.checkpoints import load_checkpoint
from prefenv.cli import main
from prefenv.errors import CheckpointError
from prefenv.hil_dd import read_hil_dd
from prefenv.policy import FlowPolicy
from prefenv.registry import make_task
from prefenv.set_networks import HilDDVelocity, Rescaled, RescaledFlow
from prefenv.tasks.clouds import scale_to_range

FILE = GOLDEN.parent / "hildd" / "rectified_model_ckp1.pt"


@pytest.fixture(scope="module")
def published():
    if not FILE.is_file():
        pytest.skip(f"the published network is not beside this checkout: {FILE}")
    return read_hil_dd(FILE)


@pytest.fixture
def toy(golden):
    return {
        k: torch.from_numpy(v) if v.dtype.kind in "fi" else v
        for k, v in golden("06_hildd_toy").items()
    }


@pytest.fixture
def network(published):
    """In float64."""
    network = HilDDVelocity((400, 2)).double()
    network.load_state_dict(published)
    return network


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# The network


def test_velocities_match_golden(network, toy):
    got = network.at_index(toy["net_x"].double(), toy["net_time_index_used"].long())
    close(got, toy["net_v_f64"])


def test_time_index_is_not_cut_short(network, toy):
    """The public code's ``int(100 t)`` is one short at 53 and 59 of its sampler's 100 times; ours at none."""
    t = torch.arange(100) / 100
    theirs = toy["sampler_time_index_used"].long()
    assert (theirs != torch.arange(100)).nonzero()[:, 0].tolist() == [53, 59]
    x = toy["net_x"][:1].double()
    with torch.no_grad():
        ours = network(x.expand(100, -1, -1), t)
        close(ours, network.at_index(x.expand(100, -1, -1), torch.arange(100)))
        assert float((ours - network.at_index(x.expand(100, -1, -1), theirs)).abs().amax()) > 1e-3


def test_noise_is_scaled_as_one_batch(toy):
    close(scale_to_range(toy["noise_raw"], dims=3), toy["noise_scaled"], 1e-6)
    assert float(toy["z0"].std()) == pytest.approx(float(toy["z0_std"]), rel=1e-3)


# The sampler, in the toy's coordinates and in ours


@torch.no_grad()
def test_sampler_matches_golden(network, toy):
    x = toy["z0"].double()
    for i, index in enumerate(toy["sampler_time_index_used"].long()):
        if i in (10, 50):
            close(x, toy[f"proposal_step{i}_f64"], 1e-8)
        x = x + network.at_index(x, index) / 100
    close(x, toy["proposal_f64"], 1e-8)


@torch.no_grad()
def test_our_policy_walks_the_same_path(network, toy):
    """Noise of unit variance, our convention, the grid of ``shift = std``: the toy's Euler steps, every one."""
    task = make_task(f"clouds:net=hil-dd,noise={float(toy['z0_std'])}")
    flow = RescaledFlow(Rescaled(network, task.noise))
    noise = toy["z0"].double() / task.noise
    x = FlowPolicy(flow, steps=10, shift=task.shift).sample(noise)
    close(x, toy["proposal_spacing10_f64"], 1e-6)
    fine = FlowPolicy(flow, steps=100, shift=task.shift).sample(noise)
    clean = toy["z0"].double()
    for i in range(100):
        clean = clean + network.at_index(clean, torch.tensor(i)) / 100
    close(fine, clean, 1e-6)
    assert 0 < float((fine - toy["proposal_f64"]).abs().amax()) < 0.05, "the index cut short"


def test_rescaling_by_one_changes_nothing(network, toy):
    x, t = toy["net_x"].double(), toy["net_t"].double()
    close(Rescaled(network, 1.0)(x, t), network(x, t))


# One round of its preference learning


def flow_loss(network, toy):
    """The matching error of the real batch, by our flow in its own coordinates."""
    std = float(toy["z0_std"])
    real = toy["real_batch_unshuffled"][toy["real_permutation"].long()].double()
    flow = RescaledFlow(Rescaled(network, std))
    return flow.residual(toy["z0_real"].double() / std, real, toy["real_t"].double()).mean()


@torch.no_grad()
def test_flow_loss_and_preference_loss_match_golden(network, toy):
    close(flow_loss(network, toy), toy["flow_loss_f64"], 1e-6)
    d = toy["residual_d_f32"].double()
    close(listwise_loss(d, toy["labels"].double()), toy["pref_loss_f64"], 1e-6)
    close(listwise_loss(d.expand(6, 4), toy["label_table"]), toy["pref_loss_table_f64"], 1e-6)


@pytest.mark.slow
def test_one_round_matches_golden(network, toy):
    """Residuals over 100 times, and the barrier's weight of both gradients."""
    z0, proposal, d, gradient = toy["z0"].double(), toy["proposal_f64"], 0.0, []
    names = [str(n) for n in toy["param_names"]]
    parameters = [dict(network.named_parameters())[n] for n in names]
    index = toy["preference_time_index_used"].long()
    assert int((index != torch.arange(100)).sum()) == 11, "the public code's index, cut short"

    def residual(i):
        x = torch.lerp(z0, proposal, torch.tensor(i / 100, dtype=torch.float64))
        v = network.at_index(x, index[i])
        return (proposal - z0 - v).square().flatten(1).mean(1) / 100

    with torch.no_grad():
        d = sum(residual(i) for i in range(100))
        flow = RescaledFlow(Rescaled(network, float(toy["z0_std"])))
        noise = z0 / flow.field.std
        ours = sum(flow.residual(noise, proposal, torch.full((4,), i / 100)) for i in range(100))
    close(d.float(), toy["residual_d_f32"], 2e-5)
    close((ours / 100).float(), toy["residual_d_f32"], 2e-3)
    d.requires_grad_(True)
    g = listwise_loss(d, toy["labels"].double())
    (slope,) = torch.autograd.grad(g, d)
    for i in range(100):  # one time after the other: all at once would take 3 GB
        part = torch.autograd.grad((slope * residual(i)).sum(), parameters)
        gradient = [a + b for a, b in zip(gradient, part, strict=True)] if gradient else list(part)
    grad_f = torch.autograd.grad(flow_loss(network, toy), parameters)
    dot = sum((a * b).sum() for a, b in zip(grad_f, gradient, strict=True))
    square = sum(b.square().sum() for b in gradient)
    close(square, toy["grad_g_sqnorm_f64"], 1e-5)
    weight = barrier_weight(dot, square, g.detach())
    assert float(weight) == pytest.approx(float(toy["barrier_coef_f64"]), rel=1e-4)


# The command


def test_import_writes_a_reference(published, tmp_path, capsys):
    out = tmp_path / "toy.safetensors"
    assert main(["import-hil-dd", str(FILE), "--out", str(out), "--json"]) == 0
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() in capsys.readouterr().out
    flow = load_checkpoint(out, make_task("clouds:net=hil-dd,noise=0.25")).flow
    state = flow.field.field.state_dict()
    assert all(torch.equal(state[k], v) for k, v in published.items())
    with pytest.raises(CheckpointError, match="does not fit the network"):
        load_checkpoint(out, make_task("clouds"))


def test_import_hil_dd_is_a_command_in_two_words_too(tmp_path, capsys):
    missing = str(tmp_path / "model.pt")
    for words in (["import-hil-dd"], ["import", "hil-dd"]):
        assert main([*words, missing]) == 2
        assert capsys.readouterr().err == f"prefenv: no file {missing}\n"
    assert main(["import", "./hil-dd"]) == 2, "answers, in a file of that name"
    assert "--into" in capsys.readouterr().err


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def good(**change):
    return {"model_state_dict": {**HilDDVelocity((8, 2), width=4).state_dict(), **change}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda mark: {"model_state_dict": Bomb(mark)}, "plain tensors"),
        (lambda mark: {"weights": {}}, "model_state_dict"),
        (lambda mark: [1, 2], "model_state_dict"),
        (lambda mark: {"model_state_dict": {"fc1.weight": torch.zeros(2)}}, "does not fit"),
        (lambda mark: good(), r"shape \(4, 6\), the network needs \(256, 6\)"),
    ],
)
def test_other_files_are_refused_and_run_no_code(content, message, tmp_path, capsys):
    path, mark = tmp_path / "model.pt", tmp_path / "ran"
    torch.save(content(mark), path)
    assert main(["import-hil-dd", str(path), "--out", str(tmp_path / "x.safetensors")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    with pytest.raises(CheckpointError, match=message):
        read_hil_dd(path)
    assert not mark.exists() and not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", pickle.dumps([1])])
def test_broken_files_are_refused(content, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="plain tensors"):
        read_hil_dd(path)
    with pytest.raises(CheckpointError, match="no file"):
        read_hil_dd(tmp_path / "none.pt")
