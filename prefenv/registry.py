"""Names: the one place where ``prefenv`` reaches tasks, agents and oracles.

Built-in names are the three tables below (one line each). Third-party packages add theirs by the entry-point
groups ``prefenv.tasks``, ``prefenv.agents`` and ``prefenv.oracles``; a class can also be named directly as
``module:Class``. Settings follow the name: ``s-curve:answer=choose,width=0.2``.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from importlib import metadata
from typing import Any

import gymnasium as gym

from prefenv.errors import ConfigError, UnknownNameError
from prefenv.kernels import Kernel

TASKS = {
    "shapes": "prefenv.tasks.shapes:Shapes",
    "gaussians": "prefenv.tasks.gaussians:Gaussians",
    "clouds": "prefenv.tasks.clouds:Clouds",
    "digits": "prefenv.tasks.digits:Digits",
    "segments": "prefenv.tasks.segments:Segments",
}
AGENTS = {
    "hil-dd": "agents.hil_dd:HilDD",
    "pfm": "agents.pfm:PFM",
    "d3po": "agents.d3po:D3PO",
    "ppo": "agents.ppo:PPO",
    "grpo": "agents.grpo:GRPO",
    "dpok": "agents.dpok:DPOK",
    "flow-dpo": "agents.flow_dpo:FlowDPO",
    "dspo": "agents.dspo:DSPO",
    "kto": "agents.kto:KTO",
    "mapo": "agents.mapo:MaPO",
    "nft": "agents.nft:NFT",
    "awm": "agents.awm:AWM",
    "dgpo": "agents.dgpo:DGPO",
    "rwr": "agents.rwr:RWR",
    "best-of-n": "agents.best_of_n:BestOfN",
    "rft": "agents.rft:RFT",
    "adjoint": "agents.adjoint:AdjointMatching",
    "learned-reward": "agents.learned_reward:LearnedReward",
    "draft": "agents.draft:DRaFT",
    "sb3-ppo": "agents.sb3_ppo:SB3PPO",
    "noise": "agents.noise:NoiseSAC",
}
ORACLES = {
    "s-curve": "oracles.s_curve:SCurve",
    "replay": "oracles.replay:Replay",
    "pose": "oracles.pose:Pose",
    "two-modes": "oracles.two_modes:TwoModes",
    "s-cloud": "oracles.s_cloud:SCloud",
    "jury": "oracles.jury:Jury",
    "learned": "oracles.learned:Learned",
    "terminal": "oracles.terminal:Terminal",
    "window": "oracles.window:Window",
    "web": "oracles.web:WebOracle",
    "legible": "oracles.legible:Legible",
    "aesthetic": "oracles.aesthetic:Aesthetic",
    "jpeg": "oracles.jpeg:Jpeg",
    "segment-return": "oracles.segment_return:SegmentReturn",
}
_TABLES = {"task": TASKS, "agent": AGENTS, "oracle": ORACLES}


def names(kind: str) -> list[str]:
    """All names of a kind (``task``, ``agent`` or ``oracle``), built in and plugged in."""
    plugged = [e.name for e in metadata.entry_points(group=f"prefenv.{kind}s")]
    return [*_TABLES[kind], *(n for n in plugged if n not in _TABLES[kind])]


def lookup(kind: str, name: str) -> Any:
    """The class behind a name or a ``module:Class``.

    Raises:
        UnknownNameError: Nothing goes by this name; the message lists what does.
    """
    target = _TABLES[kind].get(name)
    if target is None and ":" in name:
        target = name
    for entry in metadata.entry_points(group=f"prefenv.{kind}s", name=name):
        target = target or entry.value
    if target is None:
        known = names(kind)
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(f"unknown {kind} {name!r}: choose one of {', '.join(known)}{hint}")
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UnknownNameError(f"cannot load {kind} {name!r}: {error}") from error


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """``name:key=value,key=value`` as a name and its settings; a value may be a tuple, ``scale=(0.8,1.2)``.

    A colon without ``=`` behind it belongs to a ``module:Class``.

    Raises:
        ConfigError: A setting is not of the form ``key=value``.
    """
    head, _, tail = text.rpartition(":")
    if not head or "=" not in tail:
        return text, {}
    settings = {}
    for part in re.split(r",(?![^()\[\]]*[)\]])", tail):  # not at the commas of a tuple
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ConfigError(f"cannot read {part!r} in {text!r}; write name:key=value,key=value")
        try:
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            settings[key.strip()] = value.strip()
    return head, settings


def make(kind: str, text: str, *args: Any, **extra: Any) -> Any:
    """Build what a text names, with its settings.

    Raises:
        UnknownNameError: Unknown name.
        ConfigError: Unknown or wrong settings.
    """
    name, settings = parse(text)
    cls = lookup(kind, name)
    try:
        inspect.signature(cls).bind(*args, **extra, **settings)
        return cls(*args, **extra, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind} {name!r}: {error}") from None


def env_id(task: str) -> str:
    """Gymnasium's id of a task's environment, ``prefenv/Shapes-v0``; a ``module:Class`` gets one when asked."""
    name = parse(task)[0]
    found = f"prefenv/{name.rpartition(':')[2].capitalize()}-v0"
    if found not in gym.registry:
        gym.register(
            id=found,
            entry_point="prefenv.envs:FlowEnv",
            vector_entry_point="prefenv.envs:FlowVectorEnv",
            kwargs={"task": name},
        )
    return found


def make_task(name: str) -> Any:
    """The task behind a name, with settings if the text has any.

    Raises:
        UnknownNameError: Unknown name.
        ConfigError: Unknown or wrong settings; guidance that nothing was trained for.
    """
    task = make("task", name)
    if task.guidance != 1 and not task.train.drop:
        raise ConfigError(
            f"task {parse(name)[0]!r} takes no guidance: its training drops no conditions; leave it out"
        )
    return task


def make_oracle(name: str, task: Any) -> Any:
    """The oracle behind a name, for a task."""
    return make("oracle", name, task)


def make_teacher(settings: str, oracle: Any, seed: int = 0) -> Any:
    """An imperfect teacher (``oracles.teacher``) of an oracle, from its settings: ``beta=2,mistake=0.1``.

    Raises:
        ConfigError: Unknown or wrong settings.
    """
    if settings and "=" not in settings:
        raise ConfigError(f"cannot read teacher {settings!r}; write key=value,key=value")
    name = "oracles.teacher:Teacher"
    given = {} if "seed" in parse(f"{name}:{settings}")[1] else {"seed": seed}
    return make("oracle", f"{name}:{settings}" if settings else name, oracle, **given)


def agent_config(name: str) -> Any:
    """The ``Config`` that a text names: the agent's defaults, and the settings behind the name.

    A kernel is a name, ``grpo:kernel=cps`` (at its own noise level, in the agent's window), or a name, a level
    and perhaps the ends of a window, ``grpo:kernel=("cps",0.5,0.0,1.0)``.

    Raises:
        UnknownNameError: Unknown agent.
        ConfigError: A setting that it does not have, or a wrong one.
    """
    plain, settings = parse(name)
    config = lookup("agent", plain).Config
    try:
        given, usual = settings.get("kernel"), getattr(config(), "kernel", None)
        if isinstance(usual, Kernel) and given is not None:
            kind, level, *window = given if isinstance(given, tuple) else (given, None)
            settings["kernel"] = Kernel(kind, level, tuple(window) or usual.window)
        return config(**settings)
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"agent {plain!r}: {error}") from None


def make_agent(name: str, env: Any, **kwargs: Any) -> Any:
    """The agent behind a name, on an environment.

    Args:
        name: Registered name or ``module:Class``, with settings of its ``Config``: ``ppo:clip_range=0.1``.
        env: A ``FlowVectorEnv``.
        kwargs: ``seed`` and whatever else the agent takes.
    """
    config = kwargs.pop("config", None) or agent_config(name)
    return lookup("agent", parse(name)[0])(env, config, **kwargs)
