"""The loop that all agents share: budgets, callbacks, what they require; and who imports whom."""

from __future__ import annotations

import ast
import importlib
import io
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from every_agent import (
    differ,
    every_agent,
    log_prob_agents,
)
from probes import (
    ROWS,
    constant,
    probe_agent,
    silent,
)

from prefenv.agent import Agent, Requires
from prefenv.errors import BudgetSpentError, ConfigError, NonFiniteError
from prefenv.kernels import Kernel
from prefenv.packing import pack, unpack
from prefenv.registry import AGENTS, lookup, make_agent
from prefenv.testing.probe import probe_env

ROOT = Path(__file__).resolve().parents[1]


class Idle(Agent):
    """Learns nothing and says what it is told."""

    @dataclass(frozen=True)
    class Config:
        """None."""

        loss: float = 1.0

    name = "idle"

    def update(self, rollout):
        return {"loss": self.config.loss}


def idle(env=None, **settings):
    return Idle(env or probe_env(num_envs=8)[0], Idle.Config(**settings))


def test_budget_is_spent_in_whole_rounds():
    agent = idle()
    with pytest.raises(ConfigError, match="7 queries do not fill one round of 8"):
        agent.learn(7)
    agent.learn(31)
    assert agent.env.ledger.queries == 24 and agent.rounds == 3
    agent.learn(8)
    assert agent.env.ledger.queries == 32, "a later call has a budget of its own"


def test_the_envs_own_budget_ends_in_an_error_that_names_it():
    agent = idle(probe_env(num_envs=8, max_queries=20)[0])
    with pytest.raises(BudgetSpentError, match="20"):
        agent.learn(80)
    assert agent.env.ledger.queries == 16 and agent.rounds == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_stops_learning(value):
    with pytest.raises(NonFiniteError, match="idle: loss became (nan|inf|-inf)"):
        idle(loss=value).learn(8)


def test_a_learning_rate_far_too_large_is_told():
    with pytest.raises(NonFiniteError, match="ppo"):
        probe_agent("ppo", lr=1e30).learn(4 * ROWS)


def test_callback_sees_every_round_and_stops_with_false():
    seen = []

    def callback(agent, metrics):
        seen.append((agent.rounds, agent.env.ledger.queries, metrics))
        return len(seen) < 3

    agent = idle().learn(80, callback=callback)
    assert [s[:2] for s in seen] == [(1, 8), (2, 16), (3, 24)] and agent.env.ledger.queries == 24
    assert all(set(s[2]) == {"judgement", "loss"} for s in seen)
    idle().learn(24, callback=lambda *_: seen.append(None))
    assert len(seen) == 6, "None goes on"


def test_judgement_in_the_metrics_is_the_mean_of_the_answers():
    seen = []
    for answer in (constant(0.25), silent, lambda p: torch.tensor([[1.0, math.nan, 0.0, 0.5]] * 2)):
        idle(probe_env(answer, 8)[0]).learn(8, callback=lambda _, m: seen.append(m["judgement"]))
    assert seen == [0.25, 0.0, 0.5]


def test_progress_bar_shows_on_a_terminal_only(capsys, monkeypatch):
    idle().learn(16, progress_bar=True)
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for progress_bar in (False, True):
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        idle().learn(16, progress_bar=progress_bar)
        assert ("idle" in screen.getvalue()) is progress_bar
    assert "16/16" in screen.getvalue() and "judgement=0." in screen.getvalue()


@every_agent
def test_panels_too_small_are_refused(name):
    cls = lookup("agent", name)
    if cls.requires.panel_size == 1:
        cls(
            probe_env(
                num_envs=4,
                panel_size=1,
                differentiable=cls.requires.gradient,
                control=cls.control,
            )[0]
        )
        return
    with pytest.raises(ConfigError, match=f"{name} learns from panels of at least 2, not of 1"):
        cls(probe_env(num_envs=4, panel_size=1)[0])


def test_other_needs_are_checked():
    class Greedy(Idle):
        requires = Requires(gradient=True)

    with pytest.raises(ConfigError, match="reward gradient"):
        Greedy(probe_env()[0])
    Greedy(probe_env(differentiable=True)[0])
    for name in log_prob_agents:
        with pytest.raises(ConfigError, match="stochastic kernel"):
            probe_agent(name, kernel=Kernel("ode"))
    with pytest.raises(ConfigError, match="control='state'"):
        idle(probe_env(control="noise")[0])
    with pytest.raises(ConfigError, match=r"FlowVectorEnv.*not in FlowEnv"):
        Idle(gym.make("prefenv/Shapes-v0", device="cpu"))


def test_kernel_of_the_env_is_used_where_the_config_has_none():
    env, _ = probe_env(num_envs=8, kernel=Kernel("constant", 0.2))
    assert idle(env).policy.kernel == Kernel("constant", 0.2)


def test_agents_by_name_with_settings():
    env, _ = probe_env()
    agent = make_agent("ppo:clip_range=0.3,epochs=2", env, seed=9)
    assert (agent.config.clip_range, agent.config.epochs, agent.seed) == (0.3, 2, 9)
    assert agent.config == replace(type(agent).Config(), clip_range=0.3, epochs=2)
    with pytest.raises(ConfigError, match="zeal"):
        make_agent("ppo:zeal=1", env)


def test_wrapped_envs_are_unwrapped():
    wrapped = gym.make_vec("prefenv/Shapes-v0", num_envs=4, panel_size=4, device="cpu")
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(wrapped)
    agent = make_agent("hil-dd:updates=1,data_batch=8", wrapped)
    agent.learn(4)
    assert agent.env is wrapped.unwrapped and wrapped.unwrapped.ledger.queries == 4


def test_base_agent_wants_an_update():
    with pytest.raises(NotImplementedError):
        Agent(probe_env(num_envs=8)[0]).learn(8)


def test_unpacked_states_are_plain(tmp_path):
    """What ``runs`` writes between rounds: ``pack(state())`` and back."""
    agent = probe_agent("pfm", iterate=1).learn(2 * ROWS)
    (tmp_path / "state").write_bytes(pack(agent.state()))
    other = probe_agent("pfm", iterate=1).restore(unpack(tmp_path / "state"))
    assert differ(agent, other) is None and len(other.frozen_flows) == 2


# Who may import whom


def imports(path):
    """Every module a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module


def test_prefenv_reaches_agents_and_oracles_through_the_registry_only():
    rooms = {"agents", "oracles", "benchmarks", "tests", "probes"}
    files = sorted((ROOT / "prefenv").rglob("*.py"))
    assert len(files) > 20
    for path in files:
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & rooms, f"{path} imports {used & rooms}"
        if path.name == "registry.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("agents.", "oracles.")), f"{path}:{node.lineno}"


def test_agents_import_prefenv_and_each_other_only():
    for path in sorted((ROOT / "agents").glob("*.py")):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"oracles", "benchmarks", "tests", "probes"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"_oracle", "score"}, f"{path}:{node.lineno} peeks"


def test_every_agent_in_the_room_is_registered_and_says_its_equation():
    for path in (ROOT / "agents").glob("*.py"):
        module = importlib.import_module(f"agents.{path.stem}")
        for cls in vars(module).values():
            own = isinstance(cls, type) and cls.__module__ == module.__name__
            if own and issubclass(cls, Agent) and "name" in vars(cls):
                assert lookup("agent", cls.name) is cls, f"{path} is not in the registry"
    for name in AGENTS:
        text = sys.modules[lookup("agent", name).__module__].__doc__
        assert lookup("agent", name).name == name
        assert text.startswith(f"``{name}``: ") and " = " in text, name
