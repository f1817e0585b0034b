"""A run is one directory: what was asked, with what, what happened, what came out.

``config.json``, ``versions.json``, ``metrics.jsonl`` (a line a round), ``state.safetensors`` while it runs and
``model.safetensors`` when it is done, ``summary.json``, ``shapes.png``. A finished run is not repeated, a killed
one goes on from its last saved round, and comes out the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import gymnasium as gym

from prefenv.agent import Agent
from prefenv.checkpoints import load_checkpoint, write_atomic
from prefenv.device import resolve_device
from prefenv.errors import ConfigError, RunError
from prefenv.evaluation import Judge
from prefenv.feedback.files import read_feedback
from prefenv.figures import shapes_figure
from prefenv.offline import read_shape, rounds, study
from prefenv.oracle import ScriptedOracle
from prefenv.packing import pack, unpack
from prefenv.registry import (
    agent_config,
    env_id,
    lookup,
    make_agent,
    make_oracle,
    make_task,
    make_teacher,
    parse,
)

_ROUNDS = 32  # a budget is spent in about so many rounds
_SAVE_SECONDS = 1.0


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes; its hash is the run's name.

    Args:
        agent: Agent, by name; settings may follow, ``ppo:lr=1e-4``.
        oracle: Oracle, by name; settings may follow, ``s-curve:answer=choose``; empty = the task's own. It scores
            the agent too, or where it has no true score, the task's default oracle does.
        teacher: Settings of an imperfect teacher who answers in the oracle's place, ``beta=2,mistake=0.1``.
        feedback: Feedback file or folder that an offline agent learns from; budget and panel size are its own.
        task: Task, by name.
        queries: Budget: samples that the oracle judges.
        panel_size: Samples shown together.
        rows: Samples of one round; None = the budget in about 32 rounds.
        seed: Seed of everything random.
        steps: Steps from noise to sample.
        beta: Temperature of the optimum that scores the agent; None = the task's.
        checkpoint: Reference: a file, or the name of one of ours; None = the task's own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    agent: str = "ppo"
    oracle: str = ""
    task: str = "shapes"
    queries: int = 4096
    panel_size: int = 4
    rows: int | None = None
    seed: int = 0
    steps: int = 16
    beta: float | None = None
    checkpoint: str | None = None
    device: str = "auto"
    teacher: str | None = None
    feedback: str | None = None

    def __post_init__(self) -> None:
        if not self.oracle:
            object.__setattr__(self, "oracle", make_task(self.task).default_oracle)
        if self.feedback is not None:
            for name, value in read_shape(self.feedback).items():
                object.__setattr__(self, name, value)
        if self.queries < 1:
            raise ConfigError(
                f"a budget of {self.queries} queries asks nothing; give a positive number"
            )
        if self.panel_size < 1 or self.queries % self.panel_size:
            raise ConfigError(
                f"panels of {self.panel_size} do not divide {self.queries} queries; "
                "give a multiple of the panel size"
            )
        if self.rows is not None and (
            self.rows < 1 or self.rows % self.panel_size or self.queries % self.rows
        ):
            raise ConfigError(
                f"rounds of {self.rows} samples must be a multiple of panel_size={self.panel_size} "
                f"and divide {self.queries} queries"
            )

    @property
    def name(self) -> str:
        """``agent-task-sSEED-HASH``."""
        text = json.dumps(self.record(), sort_keys=True)
        agent, task = (parse(x)[0].rpartition(":")[2] for x in (self.agent, self.task))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{agent}-{task}-s{self.seed}-{digest}"

    def record(self) -> dict[str, Any]:
        """All settings as plain values, the agent's own defaults included: what ``config.json`` holds."""
        resolved = dataclasses.asdict(agent_config(self.agent))
        young = ("teacher", "feedback")  # younger than the first runs, which keep their names
        given = dataclasses.asdict(self).items()
        settings = {k: v for k, v in given if v is not None or k not in young}
        if self.feedback is not None:
            settings["feedback_digest"] = read_feedback(self.feedback).digest()
        return json.loads(json.dumps({**settings, "agent_config": resolved}))

    def num_envs(self) -> int:
        """Rows of a round: all panels fill rounds exactly, in about 32 rounds of at most the agent's rows."""
        if self.rows is not None:
            return self.rows
        panels = self.queries // self.panel_size
        most = max(
            1, min(lookup("agent", parse(self.agent)[0]).rows // self.panel_size, panels // _ROUNDS)
        )
        return self.panel_size * max(d for d in range(1, most + 1) if panels % d == 0)

    def judge(self, **sizes: int) -> Judge:
        """What scores this run's agent; ``sizes`` are ``Judge``'s ``n_reference`` and ``n``."""
        task = make_task(self.task)
        flow = load_checkpoint(self.checkpoint, task).flow.to(resolve_device(self.device))
        oracle = make_oracle(self.oracle, task)
        if not isinstance(oracle, ScriptedOracle):
            oracle = make_oracle(task.default_oracle, task)
        return Judge(flow, task, oracle, steps=self.steps, beta=self.beta, **sizes)

    def answerer(self) -> Any:
        """Who answers the env: the oracle, or its teacher, seeded with the run."""
        if self.teacher is None:
            return self.oracle
        return make_teacher(self.teacher, make_oracle(self.oracle, make_task(self.task)), self.seed)

    def make_env(self) -> Any:
        """The environment, with the budget as its limit."""
        lookup("task", parse(self.task)[0])  # its error is ours, not gymnasium's
        return gym.make_vec(
            env_id(self.task),
            task=self.task,
            num_envs=self.num_envs(),
            oracle=self.answerer(),
            panel_size=self.panel_size,
            steps=self.steps,
            control=lookup("agent", parse(self.agent)[0]).control,
            max_queries=self.queries,
            checkpoint=self.checkpoint,
            device=self.device,
        )


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("prefenv", "torch", "numpy", "gymnasium", "scipy")
    found = {p: metadata.version(p) for p in packages}
    return {"python": platform.python_version(), "platform": platform.platform(), **found}


def align(
    config: RunConfig,
    folder: Path,
    *,
    judge: Judge | None = None,
    progress: bool = False,
    callback: Callable[[Agent, dict[str, float]], Any] | None = None,
    picture: bool = True,
) -> dict[str, Any]:
    """Run one agent to the end of its budget and write its directory.

    Args:
        config: What to run.
        folder: The run's directory; made if missing, resumed if half done, read if finished.
        judge: What scores it; None = made here.
        progress: Show a bar on stderr.
        callback: Called after every round.
        picture: Draw ``shapes.png`` at the end.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        RunError: The directory cannot be written, or holds a run of another config.
    """
    done = _open(config, folder)
    if done is not None:
        return done
    env = config.make_env()
    agent: Agent = make_agent(config.agent, env, seed=config.seed)
    given = rounds(read_feedback(config.feedback), agent) if config.feedback is not None else None
    judge = judge or config.judge()  # takes seconds: after all that can be wrong
    state, metrics = folder / "state.safetensors", folder / "metrics.jsonl"
    if state.exists():
        agent.restore(unpack(state))
    lines = metrics.read_text().splitlines()[: agent.rounds] if metrics.exists() else []
    write_atomic(metrics, "".join(line + "\n" for line in lines).encode())
    saved = time.monotonic()

    with metrics.open("a") as log:

        def after(agent: Agent, values: dict[str, float]) -> Any:
            nonlocal saved
            entry = {"round": agent.rounds, **agent.env.ledger.counts(), **values}
            log.write(json.dumps(entry) + "\n")
            if time.monotonic() - saved > _SAVE_SECONDS:
                log.flush()
                write_atomic(state, pack(agent.state()))
                saved = time.monotonic()
            agent.env.desk.publish(agent, values)
            return callback(agent, values) if callback else None

        left = config.queries - agent.env.ledger.queries
        if given is not None:
            study(agent, given, progress_bar=progress, callback=after)
        elif left:
            agent.env.desk.publish(agent, {})
            agent.learn(left, progress_bar=progress, callback=after)
    summary = _summary(config, agent, judge)
    if picture:
        figure = shapes_figure(judge, {parse(config.agent)[0]: agent})
        figure.savefig(folder / "shapes.png")
    write_atomic(folder / "model.safetensors", pack(agent.state()))
    write_atomic(folder / "summary.json", _json(summary))
    for file in (state, *folder.glob(f".{state.name}.*")):  # a kill may leave a state half written
        file.unlink(missing_ok=True)
    env.close()
    return summary


def writable(folder: Path) -> None:
    """Make a folder and make sure that files can be written in it, before long work begins.

    Raises:
        RunError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from None


def _open(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """Make or check the directory; the summary if the run is finished."""
    record = folder / "config.json"
    plain = config.record()
    writable(folder)
    try:
        if record.exists():
            if json.loads(record.read_text()) != plain:
                raise RunError(f"{folder} holds another run; choose another --out, or remove it")
        else:
            write_atomic(folder / "versions.json", _json(versions()))
            write_atomic(record, _json(plain))
        finished = folder / "summary.json"
        return json.loads(finished.read_text()) if finished.exists() else None
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from None
    except json.JSONDecodeError:
        raise RunError(f"{folder} holds a damaged run; remove it and start again") from None


def _summary(config: RunConfig, agent: Agent, judge: Judge) -> dict[str, Any]:
    result = dataclasses.asdict(judge.evaluate(agent))
    # JSON has no NaN: what a model does not have (a likelihood, say) is null.
    result = {k: None if v != v else v for k, v in result.items()}
    return {
        "agent": config.agent,
        "env": env_id(config.task),
        "oracle": config.oracle,
        **({} if config.teacher is None else {"teacher": config.teacher}),
        "seed": config.seed,
        **agent.env.ledger.counts(),
        "device": str(agent.device),
        **result,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
