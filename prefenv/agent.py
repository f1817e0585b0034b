"""Agents: what moves model A toward what the oracle prefers.

``Agent.learn`` owns the loop: collect a round, let the oracle judge it, ``update``, call back. A new agent is
one file: a dataclass ``Config``, what it ``requires``, and ``update(rollout)``.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from prefenv.device import make_generator
from prefenv.envs import Control, FlowVectorEnv
from prefenv.errors import ConfigError, NonFiniteError, RequiresError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.policy import FlowPolicy
from prefenv.resume import Resumable
from prefenv.rollout import Rollout, collect
from prefenv.tasks.conditions import rows_of, to_device

Metrics = dict[str, float]
Callback = Callable[["Agent", Metrics], Any]


@dataclass(frozen=True)
class Requires:
    """What an agent needs of its environment.

    Args:
        panel_size: Fewest samples of a panel it can learn from.
        gradient: Whether it asks for reward gradients; its rollouts then carry them.
        log_prob: Whether it needs stochastic steps.
        noise: Whether it learns from the noise that a sample was made from.
    """

    panel_size: int = 1
    gradient: bool = False
    log_prob: bool = False
    noise: bool = False


class Agent(Resumable):
    """Base of all agents.

    A subclass defines ``Config`` and ``update``; it may also override ``chain`` (the flows that carry noise
    to a sample, by default the trained copy of the reference alone), ``kernel`` and ``behaviour``. One whose
    samples are no flow's has an empty ``chain`` and overrides ``sample``, and ``kl_bound`` if it knows one. One
    that brings a loop of its own overrides ``round`` instead of ``update``.

    Args:
        env: A ``FlowVectorEnv`` with the agent's ``control``, as ``gym.make_vec`` makes it.
        config: The agent's settings; None = its defaults.
        seed: Seed of everything random in the agent; the env's noises are seeded from it too.

    Attributes:
        name: Its name in the registry.
        requires: What it needs of the environment.
        control: What its actions are, the env's ``control``: next states, or initial noises.
        rows: Samples of one round, where nobody says otherwise.
        persistent: Names of the attributes that hold what it has learned.
        feed: Where a round of a number comes from, if not from the env (``prefenv.offline``).
    """

    @dataclass(frozen=True)
    class Config:
        """No settings."""

    name: ClassVar[str] = "agent"
    requires: ClassVar[Requires] = Requires()
    control: ClassVar[Control] = "state"
    rows: ClassVar[int] = 128
    persistent: ClassVar[tuple[str, ...]] = ("model", "optimizer")

    def __init__(self, env: Any, config: Any = None, *, seed: int = 0):
        self.env: FlowVectorEnv = getattr(env, "unwrapped", env)
        self.config: Any = config or self.Config()
        self.seed = seed
        self._check()
        self.device = self.env.device
        self.reference: RectifiedFlow = self.env.reference.flow
        self.generator = make_generator(seed, self.device)
        self.model: Any = self.reference.clone().requires_grad_(True).train()
        self.optimizer: Any = None
        self.rounds = 0
        self.feed: Callable[[int], Rollout] | None = None
        self.env.reset(seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.build()
        self.policy = self.env.policy(self.model, self.kernel(), self.generator)

    def _check(self) -> None:
        if not isinstance(self.env, FlowVectorEnv):
            raise ConfigError(
                f"agents learn in a FlowVectorEnv (gym.make_vec), not in {type(self.env).__name__}"
            )
        if self.env.control != self.control:
            raise ConfigError(
                f"{self.name} acts on {self.control}s: make the env with control={self.control!r}"
            )
        if self.env.panel_size < self.requires.panel_size:
            raise RequiresError(
                f"{self.name} learns from panels of at least {self.requires.panel_size}, "
                f"not of {self.env.panel_size}: raise panel_size"
            )
        if self.requires.gradient and not self.env.desk.differentiable:
            raise RequiresError(f"{self.name} needs an oracle with a reward gradient")
        takes = inspect.signature(self.sample).parameters
        if self.env.task.condition is not None and "condition" not in takes:
            raise RequiresError(
                f"{self.name} cannot learn {self.env.task.name!r}, a task with conditions: take another agent"
            )
        if self.requires.log_prob and self.kernel().name == "ode":
            raise RequiresError(f"{self.name} needs a stochastic kernel")

    # What a subclass writes.

    def kernel(self) -> Kernel:
        """The kernel it samples with; by default its ``Config``'s, else the env's."""
        return getattr(self.config, "kernel", None) or self.env.reference.kernel

    def build(self) -> None:
        """Make what it trains besides ``model`` (seeded); by default nothing."""

    def behaviour(self) -> FlowPolicy:
        """The policy that makes the next round's samples: by default the model's own."""
        return self.policy

    @property
    def offline(self) -> bool:
        """Whether it can learn from samples of the reference that were judged elsewhere: it asks of no others."""
        return self.behaviour().flow is self.reference

    @property
    def ahead(self) -> bool:
        """Whether it may be asked on while it still learns: it is offline, and leaves the loop to ``round``."""
        return self.offline and type(self).round is Agent.round

    def ask(self, pending: Sequence[Rollout] = ()) -> Rollout:
        """Play one round of ``env.num_envs`` judged samples.

        Args:
            pending: Rounds that were asked and not yet learned from, for agents that choose what they ask.
        """
        return collect(self.env, self.behaviour(), gradient=self.requires.gradient)

    def update(self, rollout: Rollout) -> Metrics:
        """Learn from one judged round; returns what should be logged."""
        raise NotImplementedError

    def round(self) -> tuple[Tensor, Metrics]:
        """Play one round of ``env.num_envs`` judged samples and learn from it.

        Returns:
            The judgements ``(num_envs,)``, NaN = no answer, and what should be logged.
        """
        rollout = self.ask() if self.feed is None else self.feed(self.rounds)
        return rollout.judgement, self.update(rollout)

    def chain(self) -> list[RectifiedFlow]:
        """The flows that carry noise to a sample of model B, one after the other.

        Empty where model B is no chain of flows (it selects, or steers the noise): it then has no likelihood.
        """
        return [self.model]

    def kl_bound(self) -> float:
        """An upper bound of ``KL(B || A)`` in nats that is known without a likelihood; NaN = none is."""
        return float("nan")

    # What they all have.

    def drift(self, rollout: Rollout, n: int) -> Tensor:
        """Mean squared change of the velocity against the reference, a scalar with gradient.

        Taken at ``n`` random states of the rollout's deterministic steps, where a Gaussian KL would be infinite:
        it keeps the end of the path, which no log-probability reaches, as the reference has it.
        """
        flat = rollout.path[:-1].flatten(0, 1)
        free = [i for i in range(self.env.steps) if self.policy.std(i) == 0]
        if not free:
            return flat.new_zeros(())
        rows = rollout.path.shape[1]
        pick = torch.randint(len(free) * rows, (n,), generator=self.generator, device=self.device)
        index = torch.tensor(free, device=self.device)[pick // rows]
        x, t = flat[index * rows + pick % rows], self.policy.times.to(flat)[index]
        condition = rows_of(rollout.condition, pick % rows)
        self.env.ledger.nfe += 2 * n
        with torch.no_grad():
            target = self.reference.velocity(x, t, condition)
        return (self.model.velocity(x, t, condition) - target).square().mean()

    def learn(
        self,
        total_queries: int,
        *,
        progress_bar: bool = False,
        callback: Callback | None = None,
    ) -> Agent:
        """Learn from ``total_queries`` more judged samples, in rounds of ``env.num_envs``.

        Args:
            total_queries: Judged samples to spend; what does not fill a round is left unspent.
            progress_bar: Show a bar on stderr.
            callback: Called with the agent and the round's metrics after every round; False stops.

        Raises:
            ConfigError: The budget does not cover one round.
            NonFiniteError: A metric became NaN or infinite.
            BudgetSpentError: The env's own ``max_queries`` is spent.
        """
        ledger, rows = self.env.ledger, self.env.num_envs
        if total_queries < rows:
            raise ConfigError(
                f"{total_queries} queries do not fill one round of {rows} samples; "
                "give more queries or a smaller num_envs"
            )
        stop = ledger.queries + total_queries
        bar = tqdm(
            total=total_queries,
            desc=self.name,
            unit="query",
            disable=None if progress_bar else True,
        )
        with bar:
            while ledger.queries + rows <= stop:
                began, before = time.perf_counter(), ledger.queries
                judgement, metrics = self.round()
                ledger.seconds += time.perf_counter() - began
                self.rounds += 1
                judged = judgement[~judgement.isnan()]
                mean = float(judged.mean()) if len(judged) else 0.0
                metrics = {"judgement": mean, **metrics}
                for key, value in metrics.items():
                    if not abs(value) < float("inf"):
                        raise NonFiniteError(f"{self.name}: {key} became {value}; lower lr")
                bar.update(ledger.queries - before)
                bar.set_postfix(judgement=f"{mean:.3f}")
                if callback is not None and callback(self, metrics) is False:
                    break
        return self

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Samples of model B from noises ``(n, *event_shape)``: deterministic in the noise.

        Args:
            noise: What they are made from.
            condition: Of each sample, ``(n, ...)``, where the task has conditions.
        """
        x, condition = noise.to(self.device), to_device(condition, self.device)
        for flow in self.chain():
            x = self.env.policy(flow).sample(x, condition)
        return x

    def predict(
        self,
        observation: dict[str, Any],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[Any, Any]:
        """As in Stable-Baselines3: the model's action in the env."""
        return self.policy.predict(observation, state, episode_start, deterministic)
