"""What all agents have: learning toward what is preferred, seeds, budgets, saving, going on; and who imports whom.

Every registered agent is tested by being registered. ``probes.QUICK`` may give it settings for the probe.
"""

from __future__ import annotations

import ast
import functools
import importlib
import io
import math
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from probes import (
    BY_DIFFERENCE,
    QUICK,
    ROWS,
    constant,
    left,
    noises,
    probe_agent,
    same,
    share,
    silent,
    sometimes,
    trained,
    weights,
    world,
)

from prefenv.agent import Agent, Requires
from prefenv.checkpoints import save_checkpoint
from prefenv.errors import BudgetSpentError, CheckpointError, ConfigError, NonFiniteError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.networks import VelocityMLP
from prefenv.packing import pack, unpack
from prefenv.registry import AGENTS, lookup, make_agent, names
from prefenv.testing.data import copied, difference
from prefenv.testing.probe import ProbeVelocity, probe_env, right

ROOT = Path(__file__).resolve().parents[1]
every_agent = pytest.mark.parametrize("name", names("agent"))
log_prob_agents = [n for n in names("agent") if lookup("agent", n).requires.log_prob]
# Settings that carry more from round to round than the defaults do.
VARIANTS = [
    *[(name, {}) for name in names("agent")],
    ("pfm", {"iterate": 1, "warm_start": False}),
    ("pfm", {"coupling": "pair", "sigma": 0.1, "source": "reference", "iterate": 3}),
    ("ppo", {"kl_coef": 0.1, "reduction": "mean"}),
    ("d3po", {"clamp": "none", "epochs": 2}),
    ("draft", {"truncation": "random", "beta": 0.1}),
    ("draft", {"truncation": "refl", "last": 4}),
    ("sb3-ppo", {"ent_coef": 0.0, "n_epochs": 1}),
]
every_variant = pytest.mark.parametrize(
    ("name", "settings"),
    VARIANTS,
    ids=lambda v: v if isinstance(v, str) else "-".join(v) or "default",
)


@functools.cache
def learned(name):
    """An agent that has learned two rounds; for tests that only look at it."""
    return probe_agent(name).learn(2 * ROWS)


def everything(agent):
    """All that an agent carries, but the clock."""
    state = agent.state()
    ledger = {k: v for k, v in state["ledger"].items() if k != "seconds"}
    return copied({**state, "ledger": ledger})


def differ(one, other):
    """Where two agents' states (or agents) differ, bit by bit, or None."""
    return difference(*(everything(a) if isinstance(a, Agent) else a for a in (one, other)))


# Learning


@every_agent
def test_learning_moves_toward_what_is_preferred_and_back_when_reversed(name):
    _, level = QUICK.get(name, ({}, None))
    reached, sides = [], []
    for answer in (right, left):
        agent = probe_agent(name, answer)
        assert share(agent) == pytest.approx(0.5, abs=0.03)
        assert agent.learn(10 * ROWS) is agent
        reached.append(share(agent))
        sides.append(float(agent.sample(noises())[:, 0].mean()))
    assert sides[0] != sides[1], "what is preferred matters"
    if level is not None:
        assert sides[0] > sides[1], "the mean moved the right way"
        assert reached[0] > level and reached[1] < 1 - level, reached


@pytest.mark.parametrize("name", [n for n in names("agent") if n in BY_DIFFERENCE])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_equal_judgements_teach_nothing(name, value):
    agent = probe_agent(name, constant(value))
    before, samples = weights(agent.model), agent.sample(noises())
    agent.learn(4 * ROWS)
    assert same(before, weights(agent.model)) and torch.equal(samples, agent.sample(noises()))
    assert agent.env.ledger.queries == 4 * ROWS, "they were asked all the same"


@every_agent
@pytest.mark.parametrize("answer", [silent, sometimes])
def test_missing_answers_do_not_break_it(name, answer):
    agent = probe_agent(name, answer)
    start = agent.sample(noises())
    agent.learn(2 * ROWS)
    after = agent.sample(noises())
    assert bool(after.isfinite().all()) and agent.rounds == 2
    if answer is silent:
        assert torch.equal(start, after)
    # Answers that come later are learned from; contrary ones, since those that agree need teach nothing.
    agent.env.desk._oracle.answer = left
    agent.learn(2 * ROWS)
    assert bool(agent.sample(noises()).isfinite().all())
    assert not torch.equal(agent.sample(noises()), after)


@every_agent
def test_gradient_at_the_reference_is_finite_and_not_zero(name):
    """With lr 0 the gradient of the last step stays where it was taken: at the reference."""
    if "lr" not in lookup("agent", name).Config.__dataclass_fields__:
        pytest.skip("has no learning rate")
    agent = probe_agent(name, lr=0.0)
    before = weights(agent.model)
    agent.learn(2 * ROWS)
    assert same(before, weights(agent.model))
    grads = torch.cat([p.grad.flatten() for p in trained(agent) if p.grad is not None])
    assert bool(grads.isfinite().all()) and float(grads.norm()) > 1e-4


@pytest.mark.parametrize("name", log_prob_agents)
def test_ratio_is_one_before_the_first_step(name):
    """The model that collected and the one that is asked say the same; d3po's loss is then log 2."""
    seen = []
    probe_agent(name, lr=0.0).learn(3 * ROWS, callback=lambda _, m: seen.append(m))
    for metrics in seen:
        assert metrics.get("ratio_error", 0.0) < 1e-3
        if name == "d3po":
            assert metrics["pairs"] > 10 and metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
        if name == "ppo":
            assert metrics["clipped"] == 0
    if name == "ppo":
        narrow = probe_agent(name, epochs=4, clip_range=0.01)
        narrow.learn(ROWS, callback=lambda _, m: seen.append(m))
        assert seen[-1]["ratio_error"] < 1e-3 and seen[-1]["clipped"] > 0.1, "of the first step"


def test_ratio_error_is_the_first_steps_even_when_its_loss_is_zero():
    """Equal judgements after others: the loss is 0, but Adam's momentum moves the model between minibatches."""
    agent, seen = probe_agent("ppo", anchor=0.0, minibatches=8), []
    agent.learn(4 * ROWS)
    agent.env.desk._oracle.answer = constant(0.5)
    agent.learn(ROWS, callback=lambda _, m: seen.append(m))
    assert seen[0]["loss"] == 0 and seen[0]["ratio_error"] < 1e-3


@every_agent
def test_reference_is_untouched_bit_by_bit(name):
    env, _ = world(name)
    before = weights(env.reference.flow)
    agent = probe_agent(name, env=env)
    start = [p.detach().clone() for p in trained(agent)]
    agent.learn(5 * ROWS)
    assert agent.reference is env.reference.flow
    assert same(before, weights(env.reference.flow)) and not same(start, trained(agent))
    assert not any(p.requires_grad for p in env.reference.flow.parameters())


@every_agent
def test_ledger_has_every_question_and_every_evaluation(name):
    for variant, settings in VARIANTS:
        if variant != name:
            continue
        env, oracle = world(name)
        agent = probe_agent(name, env=env, **settings)
        before = ProbeVelocity.evaluated
        agent.learn(3 * ROWS)
        assert oracle.queries == env.ledger.queries == 3 * ROWS
        gradient = agent.requires.gradient  # asked of each sample alone
        assert oracle.panels == env.ledger.panels == 3 * ROWS // (1 if gradient else 4)
        assert ProbeVelocity.evaluated - before == env.ledger.nfe
        assert env.ledger.gradients == (3 * ROWS if gradient else 0)
        assert oracle.peeks == 0 < env.ledger.seconds


@every_agent
def test_predict_plays_the_model_in_the_env(name):
    """Stable-Baselines3's way of acting (as ``evaluate_policy`` calls it) ends in ``sample``."""
    agent = learned(name)
    observation, _ = agent.env.reset(options={"noise": noises(ROWS)})
    for _ in range(agent.env.steps if agent.control == "state" else 1):
        action, _ = agent.predict(observation, state=None, episode_start=None, deterministic=True)
        observation, *_, info = agent.env.step(action)
    final = torch.stack([torch.as_tensor(row["x"]) for row in info["final_obs"]])
    torch.testing.assert_close(final, agent.sample(noises(ROWS)), rtol=1e-4, atol=1e-5)


@every_agent
def test_samples_are_a_function_of_their_noise(name):
    agent = learned(name)
    state = everything(agent)
    samples = agent.sample(noises(100))
    assert torch.equal(samples, agent.sample(noises(100))) and not samples.requires_grad
    torch.testing.assert_close(samples[:7], agent.sample(noises(100)[:7]), rtol=1e-4, atol=1e-5)
    assert differ(state, agent) is None, "sampling changes nothing"


# Seeds


@every_variant
def test_same_seed_same_bits(name, settings):
    runs = {}
    for run, seed in (("one", 3), ("again", 3), ("other", 4)):
        torch.rand(len(runs))
        agent = probe_agent(name, seed=seed, **settings).learn(2 * ROWS)
        runs[run] = everything(agent), agent.sample(noises(50))
    assert differ(runs["one"][0], runs["again"][0]) is None
    assert not torch.equal(runs["one"][1], runs["other"][1])


@every_agent
def test_agents_leave_the_global_generator_alone(name):
    before = torch.get_rng_state()
    agent = probe_agent(name)
    agent.learn(2 * ROWS)
    agent.sample(noises(5))
    assert torch.equal(before, torch.get_rng_state())


# Saving


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


# The loop


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
