"""Asked ahead: the next rounds wait for answers while the agent still learns from the last one.

    round n   is asked by the agent as it was after n - ahead rounds, while the rounds between them are pending

An agent can be asked so (``Agent.ahead``) where it learns from samples of the reference too: most ask about no
others, and then it makes no difference. ``learned-reward`` chooses among them by the answers of ``ahead`` rounds
before, knowing what is pending; ``d3po`` makes them with its model of then. One that must ask about its own newest
samples has to learn first.

Nothing depends on who is quicker, the people or the learning. A round's random numbers are seeded by its number
and are apart from those of learning, so the answers alone decide the state here too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from prefenv.agent import Agent, Callback
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.errors import ConfigError
from prefenv.play.course import Asked, Course, Person, same
from prefenv.play.records import PlayConfig
from prefenv.registry import lookup, make_agent, make_task, parse
from prefenv.rollout import Rollout


class Ahead(Course):
    """A course whose agent is asked ``ahead`` rounds before it has learned.

    Args:
        ahead: Rounds that may be asked and not yet learned from, next to the one that is learned from.
        course: As ``Course``.

    Raises:
        ConfigError: The agent has to learn first.
    """

    def __init__(self, ahead: int, agent: Agent, *course: Any):
        if not agent.ahead:
            raise ConfigError(
                f"{agent.name} asks about its own newest samples, so it must learn before it asks on: ahead=0"
            )
        self.ahead = ahead
        self.queue: list[tuple[Asked, Rollout]] = []
        super().__init__(agent, *course)

    def ask(self) -> list[Asked]:
        return [asked for asked, _ in self.queue]

    def _learn(self, panels: list[str], scores: Tensor, callback: Callback) -> None:
        agent, (asked, rollout) = self.agent, self.queue[0]
        same(asked.x, panels)
        judgement = scores.flatten().to(agent.device)
        reward = judgement.nan_to_num(0.0)

        def feed(_: int) -> Rollout:
            agent.env.ledger.charge(*scores.shape[:1], scores.numel())
            return dataclasses.replace(rollout, judgement=judgement, reward=reward)

        agent.feed = feed
        try:
            agent.learn(agent.env.num_envs, callback=callback)
        finally:
            agent.feed = None

    def _advance(self) -> None:
        first = len(self.learned)
        self.queue = [entry for entry in self.queue if entry[0].number >= first]
        while len(self.queue) <= self.ahead:
            self.queue.append(self._draw(first + len(self.queue)))

    def _draw(self, number: int) -> tuple[Asked, Rollout]:
        """What the agent asks now as round ``number``; only the pool it may make, and its cost, remain."""
        agent, ledger = self.agent, self.agent.env.ledger
        generators = agent._generators()
        kept, booked = [g.get_state() for g in generators], (ledger.panels, ledger.queries)
        for i, generator in enumerate(generators):
            fresh = make_generator(agent.seed, generator.device, f"round {number}, {i}")
            generator.set_state(fresh.get_state())
        self.person.away = True
        try:
            rollout = agent.ask([rollout for _, rollout in self.queue])
        finally:
            self.person.away = False
            for generator, state in zip(generators, kept, strict=True):
                generator.set_state(state)
            ledger.panels, ledger.queries = booked
        panels = rollout.panels(rollout.samples), rollout.panels(rollout.noise)
        return self._asked(*panels, number), rollout

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "queue": [_pack(*entry) for entry in self.queue]}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.queue = [_unpack(entry, self.agent.device) for entry in state["queue"]]


def _pack(asked: Asked, rollout: Rollout) -> dict[str, Any]:
    kept = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    told = {n: getattr(asked, n) for n in ("number", "by", "model", "learned")}
    return {"rollout": kept, "asked": told}


def _unpack(entry: dict[str, Any], device: Any) -> tuple[Asked, Rollout]:
    kept = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in entry["rollout"].items()}
    rollout = Rollout(**kept)
    x, noise = rollout.panels(rollout.samples), rollout.panels(rollout.noise)
    return Asked(x=x, noise=noise, **entry["asked"]), rollout


def make_course(
    config: PlayConfig,
    folder: Path,
    *,
    panels: int = 1,
    ahead: int | None = 0,
    reference: Any = None,
) -> Course:
    """An agent in an env whose oracle is people, fresh from its seed.

    Args:
        config: The settings.
        folder: Where states are kept.
        panels: Questions of a round.
        ahead: Rounds asked ahead; None = one, where the agent can be asked so.
        reference: Model A, instead of a checkpoint.

    Raises:
        ConfigError: Settings that do not fit together.
    """
    for name, value, least in (("panels", panels, 1), ("ahead", ahead or 0, 0)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is a whole number from {least}, not {value!r}")
    task = make_task(config.task)
    person = Person(task)
    env = FlowVectorEnv(
        config.panel_size * panels,
        task=task,
        oracle=person,
        panel_size=config.panel_size,
        steps=config.steps,
        control=lookup("agent", parse(config.agent)[0]).control,
        checkpoint=config.checkpoint,
        reference=reference,
        device=config.device,
    )
    agent: Agent = make_agent(config.agent, env, seed=config.seed)
    ahead = int(agent.ahead) if ahead is None else ahead
    record = {**config.record(), "panels": panels, "ahead": ahead}
    course = agent, person, folder, record, config.none_teaches
    return Ahead(ahead, *course) if ahead else Course(*course)
