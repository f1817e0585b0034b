"""All agents are saved, loaded and go on as if nothing had happened; what is broken is refused."""

from __future__ import annotations

import zipfile

import pytest
import torch
from every_agent import (
    differ,
    every_agent,
    every_variant,
    learned,
)
from probes import (
    ROWS,
    noises,
    probe_agent,
    world,
)

from prefenv.checkpoints import save_checkpoint
from prefenv.errors import CheckpointError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.networks import VelocityMLP
from prefenv.packing import pack
from prefenv.registry import lookup
from prefenv.testing.probe import probe_env


@every_variant
def test_going_on_after_a_save_is_as_if_nothing_had_happened(name, settings, tmp_path):
    half = 2 if settings else 1  # some settings carry more from round to round
    whole = probe_agent(name, **settings).learn(2 * half * ROWS)
    agent = probe_agent(name, **settings).learn(half * ROWS)
    agent.save(tmp_path / "agent.zip")
    torch.rand(3)
    loaded = type(agent).load(tmp_path / "agent.zip", world(name)[0])
    assert loaded.config == agent.config and loaded.seed == agent.seed and loaded.rounds == half
    assert torch.equal(agent.sample(noises()), loaded.sample(noises()))
    assert differ(agent, loaded) is None
    loaded.learn(half * ROWS)
    assert differ(whole, loaded) is None
    assert torch.equal(whole.sample(noises()), loaded.sample(noises()))
    assert whole.env.ledger == loaded.env.ledger and loaded.env.ledger.queries == 2 * half * ROWS
    agent.learn(half * ROWS)
    assert differ(whole, agent) is None, "learn() goes on where it stopped"


@every_agent
def test_state_in_memory_restores_too(name):
    agent, other = learned(name), probe_agent(name, seed=5).learn(ROWS)
    other.restore(agent.state())
    assert torch.equal(agent.sample(noises()), other.sample(noises()))


def test_steps_of_the_envs_reference_go_on_too(tmp_path):
    """An agent may collect with the env's own reference, whose steps have a generator of their own."""

    class Borrower(lookup("agent", "ppo")):
        name = "borrower"

        def behaviour(self):
            return self.env.reference

    whole = probe_agent(Borrower).learn(2 * ROWS)
    probe_agent(Borrower).learn(ROWS).save(tmp_path / "a.zip")
    loaded = Borrower.load(tmp_path / "a.zip", probe_env(num_envs=ROWS)[0]).learn(ROWS)
    assert differ(whole, loaded) is None


@every_agent
def test_a_saved_agent_is_safetensors_and_nothing_else(name, tmp_path):
    learned(name).save(tmp_path / "deep" / "agent.zip")
    with zipfile.ZipFile(tmp_path / "deep" / "agent.zip") as archive:
        assert archive.testzip() is None and archive.namelist() == ["state.safetensors"]
        data = archive.read("state.safetensors")
    head = int.from_bytes(data[:8], "little")
    assert data[8:9] == b"{" and head < len(data)
    assert not data.startswith(b"\x80") and b"ctorch" not in data and b"builtins" not in data
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["agent.zip"]


@pytest.fixture
def saved(tmp_path):
    """A saved ppo."""
    path = tmp_path / "ppo.zip"
    probe_agent("ppo").learn(ROWS).save(path)
    return path


def test_a_broken_file_is_refused(saved, tmp_path):
    cls, env, data = lookup("agent", "ppo"), probe_env(num_envs=ROWS)[0], saved.read_bytes()
    bad = tmp_path / "bad.zip"
    for cut in (0, 1, 30, 1000, len(data) // 2, len(data) - 30, len(data) - 1):
        bad.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="no saved agent"):
            cls.load(bad, env)
    bad.write_bytes(data[: len(data) // 2] + b"x" + data[len(data) // 2 + 1 :])
    with pytest.raises(CheckpointError):
        cls.load(bad, env)
    for missing in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(CheckpointError, match="no saved agent"):
            cls.load(missing, env)


def test_a_pickle_or_another_safetensors_is_refused(saved, tmp_path):
    cls, (env, _) = lookup("agent", "ppo"), probe_env(num_envs=ROWS)
    torch.save({"agent": "ppo"}, tmp_path / "pickle.zip")
    with pytest.raises(CheckpointError, match="no saved agent"):
        cls.load(tmp_path / "pickle.zip", env)
    save_checkpoint(tmp_path / "flow", env.reference.flow, env.task, {})
    inside = {
        "a reference": (tmp_path / "flow").read_bytes(),
        "a list": pack([1, 2]),
        "too little": pack({"agent": "ppo"}),
        "no parts": pack(
            {"agent": "ppo", "config": probe_agent("ppo").state()["config"], "seed": 0}
        ),
        "unknown settings": pack({"agent": "ppo", "config": {"zeal": 1}, "seed": 0}),
    }
    for what, data in inside.items():
        with zipfile.ZipFile(tmp_path / "inside.zip", "w") as archive:
            archive.writestr("state.safetensors", data)
        with pytest.raises(CheckpointError):
            cls.load(tmp_path / "inside.zip", env)
            pytest.fail(what)


def test_another_agents_or_another_settings_state_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="'ppo'.*'d3po'"):
        lookup("agent", "d3po").load(saved, probe_env(num_envs=ROWS)[0])
    with pytest.raises(CheckpointError, match="'ppo'.*'pfm'"):
        probe_agent("pfm").restore(probe_agent("ppo").state())
    with pytest.raises(CheckpointError, match="other settings"):
        probe_agent("ppo", lr=1e-9).restore(probe_agent("ppo").state())
    window = Kernel("flow-sde", 0.7, (0.0, 0.5))
    with pytest.raises(CheckpointError, match="other settings"):
        probe_agent("ppo", kernel=window).restore(probe_agent("ppo").state())


def test_a_state_for_another_network_is_refused(saved):
    env, _ = probe_env(num_envs=ROWS)
    env.reference.flow = RectifiedFlow(VelocityMLP((2,), 8, 1, 2)).frozen()
    with pytest.raises(CheckpointError, match="does not fit here"):
        lookup("agent", "ppo").load(saved, env)


def test_kernel_and_tuples_in_a_config_come_back_as_they_were(tmp_path):
    kernel = Kernel("constant", 0.4, (0.125, 0.75))
    agent = probe_agent("ppo", kernel=kernel).learn(ROWS)
    agent.save(tmp_path / "a.zip")
    loaded = type(agent).load(tmp_path / "a.zip", probe_env(num_envs=ROWS)[0])
    assert loaded.config == agent.config and loaded.config.kernel == kernel
    assert loaded.policy.stochastic_steps == [1, 2, 3, 4, 5]
