"""What the checks of agents share: agents on the probe, what they learned, and a look inside one update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics
from prefenv.envs import FlowVectorEnv
from prefenv.rollout import Rollout
from prefenv.testing.data import copied
from prefenv.testing.probe import Answer, ProbeOracle, ProbeVelocity, probe_env, right

ROWS, ROUNDS = 32, 2
Nudge = Callable[["Look", Tensor, Tensor, Tensor, Tensor], Tensor]


def noises(n: int = 16) -> Tensor:
    """The noises that samples are compared at, ``(n, 2)``."""
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass
class Run:
    """An agent that has learned, and what was seen meanwhile."""

    agent: Any
    env: FlowVectorEnv
    oracle: ProbeOracle
    start: Tensor
    metrics: list[Metrics]
    evaluated: int

    def state(self) -> dict[str, Any]:
        """What it has learned and spent, comparable, and its samples."""
        state = self.agent.state()
        ledger = {k: v for k, v in state["ledger"].items() if k != "seconds"}
        return copied({**state, "ledger": ledger, "samples": self.agent.sample(noises())})

    def moved(self) -> float:
        """How far, root mean square, its samples moved."""
        return float((self.agent.sample(noises()) - self.start).square().mean().sqrt())


class Trial:
    """An agent class on trial.

    Args:
        cls: The class.
        seed: Where its seeds begin.
    """

    def __init__(self, cls: Any, seed: int = 0):
        self.cls, self.seed = cls, seed

    @property
    def updates(self) -> bool:
        """Whether it learns in ``update``, which can be watched, and not in a loop of its own."""
        return self.cls.round is Agent.round

    @property
    def log_probs(self) -> bool:
        """Whether it learns from log-probabilities, in ``update``."""
        return self.updates and self.cls.requires.log_prob

    def given(self) -> dict[str, Any]:
        """The env's settings that this agent asks for."""
        return {"differentiable": self.cls.requires.gradient, "control": self.cls.control}

    def make(
        self,
        seed: int = 0,
        answer: Answer = right,
        rows: int = ROWS,
        config: Any = None,
        **settings: Any,
    ) -> tuple[Agent, ProbeOracle]:
        """An agent in a fresh env of at least ``rows`` rows, and the env's oracle."""
        panel_size = settings.pop("panel_size", max(4, self.cls.requires.panel_size))
        rows = -(-rows // panel_size) * panel_size
        env, oracle = probe_env(answer, rows, panel_size=panel_size, **{**self.given(), **settings})
        return self.cls(env, config, seed=self.seed + seed), oracle

    def learn(self, *calls: int, **settings: Any) -> Run:
        """Make an agent and let it learn so many rounds in each call."""
        agent, oracle = self.make(**settings)
        start, metrics = agent.sample(noises()), []
        before = ProbeVelocity.evaluated
        for rounds in calls:
            agent.learn(rounds * agent.env.num_envs, callback=lambda _, m: metrics.append(m))
        evaluated = ProbeVelocity.evaluated - before
        return Run(agent, agent.env, oracle, start, metrics, evaluated)

    @cached_property
    def run(self) -> Run:
        """The plain run: default settings, informative answers."""
        return self.learn(ROUNDS)

    @cached_property
    def moved(self) -> float:
        """How far, root mean square, the samples moved in the plain run."""
        return self.run.moved()

    def free(self, **settings: Any) -> Any:
        """The default ``Config`` without what holds the model to the reference, and with ``settings``."""
        names = {f.name for f in dataclasses.fields(self.cls.Config)}
        off = {name: 0.0 for name in ("anchor", "kl_coef") if name in names}
        return dataclasses.replace(self.cls.Config(), **{**off, **settings})

    def look(self, answer: Answer, nudge: Nudge | None = None, **settings: Any) -> Look:
        """One round, and a look inside its update."""
        agent, _ = self.make(answer=answer, **settings)
        update, seen = agent.update, []

        def watched(rollout: Rollout) -> Metrics:
            seen.append(Look(agent, rollout, nudge))
            ProbeVelocity.watch = seen[-1].watch
            try:
                return update(rollout)
            finally:
                ProbeVelocity.watch = None

        agent.update = watched
        agent.learn(agent.env.num_envs)
        return seen[0]


class Stray(NamedTuple):
    """A recorded state that was asked about at another time than its own."""

    step: int
    own: float
    asked: float


class Look:
    """The first optimiser step of an update, as the probe's velocity sees it.

    A point is a state of the rollout's path. It is known by its bits, whatever the order in which an agent asks.

    Args:
        agent: Whose update it is.
        rollout: What the update is given.
        nudge: ``(look, x, v, step, row)`` of points to what is added to the model's velocity at the stochastic
            ones, in training only: as if the model had moved since it collected them.

    Attributes:
        asked: Which points the model was asked about in training, ``(steps, rows)``.
        gradient: The loss's gradient with respect to the velocity there, ``(steps, rows, 2)``.
        stray: The first point that was asked about at another time than its own, or None.
        ratio_error: Largest ``|log p - log p_recorded|`` of the recorded steps, asked of ``agent.policy``.
    """

    def __init__(self, agent: Agent, rollout: Rollout, nudge: Nudge | None = None):
        steps, rows = rollout.log_prob.shape
        self.agent, self.rollout, self.nudge = agent, rollout, nudge
        self.noisy = [i for i in range(steps) if bool(rollout.log_prob[i].any())]
        self.times = agent.env.times.tolist()
        self.asked = torch.zeros(steps, rows, dtype=torch.bool)
        self.gradient = torch.zeros(steps, rows, 2)
        self.stray: Stray | None = None
        self.ratio_error = 0.0
        self._place = {
            rollout.path[i, j].numpy().tobytes(): (i, j) for i in range(steps) for j in range(rows)
        }
        self._first: dict[int, bytes] = {}
        if self.noisy and agent.policy.stochastic_steps:
            batch = rollout.transitions(self.noisy)
            with torch.no_grad():
                told = agent.policy.log_prob(batch.x, batch.index, batch.x_next)
            self.ratio_error = float((told - batch.log_prob).abs().max())

    def watch(self, field: Any, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """See one evaluation (``ProbeVelocity.watch``)."""
        weights = list(field.parameters())
        if not (torch.is_grad_enabled() and v.requires_grad and weights[0].requires_grad):
            return v
        places = [self._place.get(p.numpy().tobytes()) for p in x.detach().float()]
        at = [k for k, place in enumerate(places) if place is not None]
        if not at:
            return v
        step, row = torch.tensor([place for place in places if place is not None]).unbind(1)
        times = t.detach().expand(len(x)) if t.numel() == 1 else t.detach().reshape(-1)
        for i, asked in zip(step.tolist(), times[at].tolist(), strict=True):
            if self.stray is None and abs(asked - self.times[i]) > 1e-5:
                self.stray = Stray(i, self.times[i], asked)
        bits = b"".join(p.detach().numpy().tobytes() for p in weights)
        if self._first.setdefault(id(field), bits) != bits:
            return v  # no longer the first step
        self.asked[step, row] = True
        if self.nudge is not None:
            noisy = torch.tensor([i in self.noisy for i in step.tolist()])
            change = torch.zeros_like(v)
            change[at] = (
                self.nudge(self, x.detach()[at], v.detach()[at], step, row) * noisy[:, None]
            )
            v = v + change

        def keep(gradient: Tensor) -> None:
            self.gradient.index_put_((step, row), gradient[at].detach(), accumulate=True)

        v.register_hook(keep)
        return v

    def force(self) -> Tensor:
        """The size of the gradient at each point, ``(steps, rows)``."""
        return self.gradient.norm(dim=-1)

    def points(self) -> Tensor:
        """The stochastic points that were asked about, ``(steps, rows)`` bool."""
        noisy = torch.zeros(len(self.asked), 1, dtype=torch.bool)
        noisy[self.noisy] = True
        return self.asked & noisy
