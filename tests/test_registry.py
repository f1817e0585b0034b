"""Names, settings behind names, classes named directly, and plug-ins by entry points."""

from __future__ import annotations

import dataclasses
import inspect
from importlib import metadata

import gymnasium as gym
import pytest
import torch

from oracles.s_curve import SCurve
from prefenv import registry
from prefenv.errors import ConfigError, PrefenvError, UnknownNameError
from prefenv.kernels import Kernel
from prefenv.oracle import Oracle, judged
from prefenv.registry import agent_config, lookup, make_agent, make_oracle, make_task, names, parse
from prefenv.tasks import Task
from prefenv.tasks.shapes import Shapes


class Plain(Oracle):
    """An oracle of somebody else, reachable as ``test_registry:Plain`` only."""

    def __init__(self, task, answer=0.0):
        super().__init__(task)
        self.answer = answer


class Agent:
    """The least that ``make_agent`` needs."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        lr: float = 1e-4

    def __init__(self, env, config, seed=0):
        self.env, self.config, self.seed = env, config, seed


# What is registered loads


@pytest.mark.parametrize("name", names("task"))
def test_every_task_loads(name):
    task = make_task(name)
    assert isinstance(task, Task) and task.name == name
    assert task.default_oracle in names("oracle")
    assert task.network().event_shape == task.event_shape


@pytest.mark.parametrize("name", names("task"))
def test_every_default_oracle_judges_its_task(name):
    task = make_task(name)
    x, kind = task.data(6, torch.Generator())
    oracle = make_oracle(task.default_oracle, task)
    asked = None if task.condition is None else kind[::2]
    assert judged(oracle, x.view(3, 2, *task.event_shape), asked).shape == (3, 2)


@pytest.mark.parametrize("name", names("oracle"))
def test_every_oracle_loads(name):
    assert issubclass(lookup("oracle", name), Oracle)


@pytest.mark.parametrize("name", names("agent"))
def test_every_agent_loads(name):
    cls = lookup("agent", name)
    assert dataclasses.is_dataclass(cls.Config) and callable(cls.update)
    cls.Config()  # every setting has a default
    assert inspect.getmodule(cls).__doc__, "an agent's module states its equation"


def test_the_environments_are_registered():
    for name in names("task"):
        spec = gym.spec(f"prefenv/{name.capitalize()}-v0")
        assert spec.kwargs == {"task": name}


# Unknown names


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [("task", "shape", "shapes"), ("oracle", "scurve", "s-curve"), ("agent", "p-p-o", "ppo")],
)
def test_unknown_names_list_the_choices_and_the_nearest(kind, name, near):
    with pytest.raises(UnknownNameError, match=f"did you mean '{near}'") as caught:
        lookup(kind, name)
    assert all(choice in str(caught.value) for choice in names(kind))


def test_a_name_like_nothing_gets_no_suggestion():
    with pytest.raises(UnknownNameError) as caught:
        lookup("task", "qqqqqq")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no_such_module:Thing", "prefenv.oracle:NoSuchClass", ":Oracle", "prefenv.oracle:"]
)
def test_classes_that_are_not_there(name):
    with pytest.raises(UnknownNameError, match="cannot load oracle"):
        lookup("oracle", name)


# Settings


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("s-curve", "s-curve", {}),
        ("s-curve:answer=choose", "s-curve", {"answer": "choose"}),
        ("a:x=1,y=-2.5,z=True,w=None", "a", {"x": 1, "y": -2.5, "z": True, "w": None}),
        ("a: x = 1 , y = b c ", "a", {"x": 1, "y": "b c"}),
        ("a:x='1'", "a", {"x": "1"}),
        ("a:lr=1e-3", "a", {"lr": 1e-3}),
        ("a:x=b=c", "a", {"x": "b=c"}),
        ("a:x=", "a", {"x": ""}),
        ("pkg.mod:Class", "pkg.mod:Class", {}),
        ("pkg.mod:Class:x=1", "pkg.mod:Class", {"x": 1}),
    ],
)
def test_parse(text, name, settings):
    assert parse(text) == (name, settings)


@pytest.mark.parametrize("text", ["a:x=1,y", "a:=1", "a:1x=2", "a:x=1,,y=2", "a:x y=1"])
def test_what_cannot_be_parsed(text):
    with pytest.raises(ConfigError, match="name:key=value"):
        parse(text)


def test_settings_reach_the_class():
    oracle = make_oracle("s-curve:answer=choose,width=0.2", Shapes())
    assert isinstance(oracle, SCurve) and (oracle.answer, oracle.width) == ("choose", 0.2)
    assert make_task("shapes:points=32,s_rate=0.5").event_shape == (32, 2)


@pytest.mark.parametrize(
    "text",
    [
        "s-curve:colour=red",
        "s-curve:answer=rank",
        "s-curve:width=-1",
        "s-curve:width=abc",
        "s-curve:answer=[1]",
        "s-curve:task=1",
        "oracles.s_curve:SCurve:colour=red",
    ],
)
def test_wrong_settings_are_config_errors(text):
    with pytest.raises(ConfigError):
        make_oracle(text, Shapes())


def test_a_wrong_setting_is_named():
    with pytest.raises(ConfigError, match="oracle 's-curve'.*colour"):
        make_oracle("s-curve:colour=red", Shapes())


# Classes named directly, and agents


def test_a_class_can_be_named_by_its_module():
    oracle = make_oracle(f"{__name__}:Plain:answer=0.5", Shapes())
    assert type(oracle) is Plain and oracle.answer == 0.5


def test_make_agent_fills_the_config():
    agent = make_agent(f"{__name__}:Agent:lr=0.5", "env", seed=3)
    assert (agent.env, agent.config.lr, agent.seed) == ("env", 0.5, 3)
    base = Agent.Config(lr=0.25)
    assert make_agent(f"{__name__}:Agent", "env", config=base).config.lr == 0.25
    with pytest.raises(ConfigError, match="momentum"):
        make_agent(f"{__name__}:Agent:momentum=1", "env")


# Plug-ins


def test_entry_points_are_found(monkeypatch):
    """As another package's metadata would announce it."""
    entry = metadata.EntryPoint("plain", f"{__name__}:Plain", "prefenv.oracles")
    monkeypatch.setattr(
        registry.metadata,
        "entry_points",
        lambda group, name=None: [
            e for e in [entry] if e.group == group and name in (None, e.name)
        ],
    )
    assert names("oracle")[-1] == "plain" and "plain" not in names("task")
    assert type(make_oracle("plain:answer=1.0", Shapes())).__name__ == "Plain"
    with pytest.raises(UnknownNameError, match="s-curve, .*plain; did you mean 'plain'"):
        lookup("oracle", "plan")


def test_a_kernel_can_be_named_in_an_agents_settings():
    usual = agent_config("grpo").kernel
    assert agent_config("grpo:kernel=cps").kernel == Kernel("cps", None, usual.window)
    assert agent_config('grpo:kernel=("cps",0.5)').kernel == Kernel("cps", 0.5, usual.window)
    whole = agent_config('grpo:kernel=("constant",0.3,0.0,1.0)').kernel
    assert whole == Kernel("constant", 0.3, (0.0, 1.0))
    for wrong in ("nope", "3", '("cps",)', '("cps",0.5,0.1)', '("cps",7.0)'):
        with pytest.raises(PrefenvError, match=r"nope|3|unpack|index|level"):
            agent_config(f"grpo:kernel={wrong}")
