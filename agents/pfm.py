"""``pfm``: preference flow matching, a second flow that carries what was rejected to what was preferred.

    L = E_{t ~ U, (y-, y+) ~ D} | v(y_t, t) - (y+ - y-) |^2,   y_t = (1 - t) y- + t y+ + sigma eps
    sample:  y ~ pi_ref (untouched),  dy = v(y, t) dt  from 0 to 1

Kim et al. 2024, Algorithm 1 (arXiv 2405.20234). Pairs keep the order (rejected, preferred): the public code's
loaders hand them over the other way round, which flows from preferred to rejected.

Inference starts from ``pi_ref``, but Algorithm 1 trains from the rejected ``p0``: what is good already was never
a source, and is carried away (the paper's distribution mismatch). ``source="reference"`` trains from what
inference starts from. ``applications`` re-applies the trained flow; ``iterate`` freezes it after so many rounds,
samples from the composed generator, asks again, and trains the next flow (the paper's iterative PFM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from agents.d3po import preferred_pairs
from prefenv.agent import Agent, Metrics, Requires
from prefenv.device import stratified_uniform
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.policy import FlowPolicy
from prefenv.rollout import Rollout
from prefenv.tasks.conditions import group, rows_of


def pfm_point(
    source: Tensor, target: Tensor, t: Tensor, sigma: float, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """``y_t`` and the velocity to be learned there, ``y+ - y-``; ``t`` is ``(B,)``."""
    s = t.view(-1, *[1] * (source.dim() - 1))
    return (1 - s) * source + s * target + sigma * eps, target - source


def pfm_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """``|v - u|^2`` averaged over everything but the rows, ``(B,)``."""
    return (velocity - target).square().flatten(1).mean(1)


def transport_pairs(
    source: Tensor, target: Tensor, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two batches ``(B, ...)`` re-paired at the least total squared distance (every row once).

    With conditions ``(B, ...)``, the same of both batches row by row, no pair has two.
    """
    cost = torch.cdist(source.flatten(1), target.flatten(1)).square()
    if condition is not None:
        label = group(condition)
        cost = cost + (label[:, None] != label) * (len(cost) * cost.max() + 1)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return source[torch.as_tensor(rows)], target[torch.as_tensor(columns)]


def within(source: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """For each condition of ``target`` ``(B, ...)`` a random row of ``source`` ``(n, ...)`` with the same one.

    Every condition of ``target`` has to be among those of ``source``.
    """
    label = group(torch.cat([source, target]))
    rows, wanted = label[: len(source)], label[len(source) :]
    order, count = rows.argsort(), rows.bincount(minlength=int(label.max()) + 1)
    u = torch.rand(len(target), generator=generator, device=target.device)
    place = (u * count[wanted]).long().clamp(max=count[wanted] - 1)
    return order[(count.cumsum(0) - count)[wanted] + place]


class Refined(FlowPolicy):
    """The reference's ODE whose last step also passes the preference flows: one policy for the env."""

    def __init__(
        self, reference: RectifiedFlow, flows: list[RectifiedFlow], steps: int, shift: float
    ):
        super().__init__(reference, Kernel("ode"), steps, shift=shift)
        self.then = [FlowPolicy(f, Kernel("ode"), steps, shift=shift) for f in flows]

    def act(
        self, x: Tensor, i: int, condition: Tensor | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        action, log_prob = super().act(x, i, condition, deterministic)
        if i == self.steps - 1:
            for policy in self.then:
                action = policy.sample(action, condition)
        return action, log_prob


class PFM(Agent):
    """Preference flow matching on top of the untouched reference."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``pfm``.

        Args:
            source: Where the flow starts in training: ``reference`` = any sample of the generator, ``rejected`` =
                the rejected sample of each pair (Algorithm 1).
            coupling: ``pair`` = the two of one panel (Algorithm 1); ``pool`` = sources and preferred samples of
                all panels, drawn independently; ``ot`` = the same, matched in each batch by optimal transport, as
                the public code does. None ever crosses conditions: the last two pair within each.
            sigma: Noise on the path (the public code's 0.1).
            tie: Judgements that differ by no more than this are a tie and make no pair.
            margin: A pair's preferred sample must be judged at least the oracle's threshold.
            lr: AdamW's learning rate.
            updates: Gradient steps per round.
            batch: Pairs per gradient step.
            applications: Times the trained flow is applied at inference.
            iterate: Rounds after which the flow is frozen, resampled from and asked about anew; 0 = never.
            warm_start: Start the flow from the reference's weights instead of fresh ones.
        """

        source: Literal["reference", "rejected"] = "rejected"
        coupling: Literal["pair", "pool", "ot"] = "ot"
        sigma: float = 0.0
        tie: float = 0.05
        margin: bool = True
        lr: float = 3e-4
        updates: int = 30
        batch: int = 128
        applications: int = 1
        iterate: int = 0
        warm_start: bool = True

    name: ClassVar[str] = "pfm"
    requires: ClassVar[Requires] = Requires(panel_size=2)
    persistent: ClassVar[tuple[str, ...]] = ("model", "optimizer", "frozen_flows", "pool")

    def build(self) -> None:
        if self.config.applications < 1:
            raise ConfigError(
                f"pfm: applications must be at least 1, not {self.config.applications}"
            )
        self.frozen_flows: list[dict[str, Tensor]] = []
        self.fresh()

    def fresh(self) -> None:
        """Start the next preference flow, with no pairs."""
        if self.config.warm_start:
            self.model = self.reference.clone().requires_grad_(True).train()
        else:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed + len(self.frozen_flows))
                self.model = RectifiedFlow(self.env.task.network()).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, fused=True)
        empty = torch.empty(0, *self.env.task.event_shape, device=self.device)
        self.pool: dict[str, Any] = {"source": empty, "target": empty}

    def chain(self) -> list[RectifiedFlow]:
        """Reference, then every frozen flow, then the one in training, each ``applications`` times."""
        flows = [self._thaw(state) for state in self.frozen_flows]
        if len(self.pool["target"]):
            flows.append(self.model)
        return [self.reference, *(f for f in flows for _ in range(self.config.applications))]

    def _thaw(self, state: dict[str, Tensor]) -> RectifiedFlow:
        flow = self.model.clone()
        flow.load_state_dict(state)
        return flow.frozen()

    @property
    def offline(self) -> bool:
        return not self.config.iterate

    def behaviour(self) -> FlowPolicy:
        """The generator before the flow in training: the reference, or the last iteration's."""
        flows = [self._thaw(state) for state in self.frozen_flows]
        repeated = [f for f in flows for _ in range(self.config.applications)]
        return Refined(self.reference, repeated, self.env.steps, self.env.task.shift)

    def predict(
        self,
        observation: dict[str, Any],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[Any, Any]:
        policy = Refined(self.reference, self.chain()[1:], self.env.steps, self.env.task.shift)
        return policy.predict(observation, state, episode_start, deterministic)

    def update(self, rollout: Rollout) -> Metrics:
        cfg, samples = self.config, rollout.samples
        asked = rollout.condition
        frozen = len(self.frozen_flows) * cfg.applications
        self.env.ledger.nfe += frozen * len(samples) * self.env.steps
        winner, loser = preferred_pairs(rollout.panels(rollout.judgement), cfg.tie)
        if cfg.margin:
            good = rollout.judgement[winner] >= self.env.desk.threshold
            winner, loser = winner[good], loser[good]
        pairs = float(len(winner))
        if cfg.coupling != "pair":
            winner, loser = winner.unique(), loser.unique()
            if cfg.source == "reference":
                loser = torch.arange(len(samples), device=self.device)
        elif cfg.source == "reference":
            loser = self.draw(asked, rows_of(asked, winner), len(samples), len(winner))
        new = {"source": samples[loser], "target": samples[winner]}
        if asked is not None:
            new |= {"source_condition": asked[loser], "condition": asked[winner]}
        old = self.pool
        self.pool = {k: torch.cat([old[k], v]) if k in old else v for k, v in new.items()}
        metrics = {"pairs": pairs, "loss": self.fit()}
        if cfg.iterate and (self.rounds + 1) % cfg.iterate == 0 and len(self.pool["target"]):
            self.frozen_flows.append({k: v.clone() for k, v in self.model.state_dict().items()})
            self.fresh()
        return metrics

    def draw(self, source: Tensor | None, wanted: Tensor | None, n: int, size: int) -> Tensor:
        """``size`` random rows of ``n``; where conditions are given, of those wanted."""
        if source is not None and wanted is not None:
            return within(source, wanted, self.generator)
        return torch.randint(n, (size,), generator=self.generator, device=self.device)

    def fit(self) -> float:
        """``updates`` gradient steps on all pairs so far; returns the mean loss."""
        cfg, sources, targets = self.config, self.pool["source"], self.pool["target"]
        if not len(targets) or not len(sources):
            return 0.0
        total = 0.0
        for _ in range(cfg.updates):
            i = j = self.draw(None, None, len(targets), cfg.batch)
            asked = rows_of(self.pool.get("condition"), i)
            if cfg.coupling != "pair":
                having = self.pool.get("source_condition")
                j = self.draw(having, asked, len(sources), cfg.batch)
            y0, y1 = sources[j], targets[i]
            if cfg.coupling == "ot":
                y0, y1 = transport_pairs(y0, y1, asked)
            eps = torch.randn(y0.shape, generator=self.generator, device=self.device)
            t = stratified_uniform(cfg.batch, self.generator)
            y_t, u = pfm_point(y0, y1, t, cfg.sigma, eps)
            loss = pfm_loss(self.model.velocity(y_t, t, asked), u).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            total += float(loss.detach())
        self.env.ledger.nfe += cfg.updates * cfg.batch
        return total / cfg.updates
