"""``learned-reward``: fit a reward to all answers so far, ask where it is uncertain, distil by self-matching.

    proposals   the reference's own samples, a pool that costs no question
    reward      r(x), an ensemble of Gaussian processes on the pool (``agents.reward_model``)
    question    the samples whose answers leave the least variance; before the first answer, the most diverse ones
    distil      L = sum_i w_i E_{x0, t} |v(x_t, t) - (x1_i - x0)|^2 / D,   w_i = softmax(E[r(x1_i)] / beta)

With the true reward the weighted pool is a sample of the optimum ``p* ~ p_ref exp(r / beta)`` (self-normalised
importance weights), and flow matching from independent noise makes it model B. For weighted matching see Peters &
Schaal 2007 and Fan et al. 2025 (ORW-CFM-W2, arXiv 2502.06061); a reward model between the person and the policy is
Christiano et al. 2017 (arXiv 1706.03741).

**Conditions.** The pool is drawn under conditions, ``GROUP`` samples and more of each; the reward is ``r(x, c)``,
of samples and conditions side by side; a panel asks about one; weights are a softmax among the samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.reward_model import (
    PLAIN,
    Belief,
    choose,
    conditioned,
    fit,
    graph_factors,
    kmeans,
    mixture,
    plain_factors,
    rebuild,
)
from prefenv.agent import Agent, Metrics
from prefenv.device import make_generator, stratified_uniform
from prefenv.rollout import Rollout
from prefenv.tasks.conditions import group, rows_of

GROUP = 16  # samples in a row that are made of one condition


def _effective(weight: Tensor) -> float:
    return float(1 / weight.square().sum())


def softmax_among(logit: Tensor, label: Tensor) -> Tensor:
    """Softmax among the rows of each label, times the label's share of all rows, ``(n,)``; the sum is 1."""
    top = logit.new_full((int(label.max()) + 1,), -torch.inf).scatter_reduce(
        0, label, logit, "amax"
    )
    weight = (logit - top[label]).exp()
    total = torch.zeros_like(top).index_add(0, label, weight)
    return weight / total[label] * label.bincount()[label] / len(label)


class LearnedReward(Agent):
    """An ensemble's reward, questions by its uncertainty, weighted matching of the reference's own samples."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``learned-reward``.

        Args:
            pool: Samples of the reference that proposals are chosen from.
            effective: Effective sample size wanted for matching; the pool grows until the weights have it ...
            growth: ... or until it is so many times as large.
            anchors: Anchors of the reward's graph.
            beta: Temperature of the tilt; None = the task's.
            tolerance: Total variation by which the weights must have moved before the model is trained again.
            updates: Optimiser steps each time the model is trained, from the reference's weights.
            batch: Samples of each optimiser step.
            lr: Adam's largest learning rate; it falls to zero by a cosine each time the model is trained.
        """

        pool: int = 4096
        effective: float = 2048.0
        growth: int = 8
        anchors: int = 128
        beta: float | None = None
        tolerance: float = 0.02
        updates: int = 400
        batch: int = 128
        lr: float = 1e-3

    name: ClassVar[str] = "learned-reward"
    persistent: ClassVar[tuple[str, ...]] = (
        "model",
        "size",
        "shown",
        "told",
        "answers",
        "times",
        "matched",
    )

    def build(self) -> None:
        cfg = self.config
        self.beta = self.env.task.beta if cfg.beta is None else cfg.beta
        self.size = 0  # of the pool; each is made from the seed alone, so only their number is kept
        task, kind = self.env.task, self.env.task.condition
        self.shown = torch.empty(0, *task.event_shape, device=self.device)
        # the conditions of what was shown
        self.told = None if kind is None else kind.tensor([]).view(0, *kind.shape).to(self.device)
        self.answers = torch.empty(0, device=self.device)
        self.times = torch.zeros(cfg.pool, device=self.device)  # each proposal was asked about
        self.matched = torch.zeros(cfg.anchors, dtype=torch.float64, device=self.device)
        self.pool: list[Tensor] = []
        self.conditions: list[Tensor] = []  # of the pool's parts, where the task has conditions
        self.mixtures: list[Tensor] = []
        self.believed: tuple[Tensor, Belief] | None = None  # and from which answers

    ahead: ClassVar[bool] = True  # the pool is the reference's

    def question(self, pending: Sequence[Rollout] = ()) -> Tensor:
        """The samples of the pool's first part that are worth asking about next, ``(num_envs,)`` indices.

        Of those that are pending no answer is known, but how much it will tell is.
        """
        if not self.size:
            self.grow()
        belief, times = self.believe(), self.times
        for rollout in pending:
            z = rebuild(self.points(rollout.samples, rollout.condition), self.anchors)
            belief = replace(belief, covariance=conditioned(belief.covariance, z, belief.noise))
            times = times + self.asked(rollout.samples)
        label = group(self.conditions[0]) if self.conditions else None
        count, panel = self.env.num_envs, self.env.panel_size
        return choose(belief, self.mixtures[0], self.distance, times, count, label, panel)

    def asked(self, samples: Tensor) -> Tensor:
        """How often each sample of the pool's first part is among ``samples``, ``(pool,)``."""
        x, pool = samples.flatten(1), self.pool[0].flatten(1)
        # Few agree in the first number; only those are compared.
        row, column = (x[:, :1] == pool[:, 0]).nonzero(as_tuple=True)
        found = column[(x[row] == pool[column]).all(1)]
        return found.bincount(minlength=len(pool)).to(self.times)

    def ask(self, pending: Sequence[Rollout] = ()) -> Rollout:
        """Ask; no episode is played."""
        picked = self.question(pending)
        path = torch.stack([self.noise(0)[picked], self.pool[0][picked]])
        condition = self.conditions[0][picked] if self.conditions else None
        judgement = self.env.judge(path[1], path[0], condition)
        reward, log_prob = judgement.nan_to_num(0.0), path.new_zeros(1, len(picked))
        return Rollout(path, log_prob, judgement, reward, self.env.panel_size, condition)

    def round(self) -> tuple[Tensor, Metrics]:
        """Ask, and learn from all answers so far."""
        rollout = self.ask() if self.feed is None else self.feed(self.rounds)
        if not self.size:
            self.grow()
        self.prepare()
        answered = ~rollout.judgement.isnan()
        self.times = self.times + self.asked(rollout.samples)
        self.shown = torch.cat([self.shown, rollout.samples[answered]])
        if self.told is not None and rollout.condition is not None:
            self.told = torch.cat([self.told, rollout.condition[answered]])
        self.answers = torch.cat([self.answers, rollout.judgement[answered]])
        return rollout.judgement, self.improve()

    def improve(self) -> Metrics:
        """Train the model again if the answers so far have moved the tilt."""
        cfg, belief = self.config, self.believe()
        weight = self.tilt(belief.mean)
        while _effective(weight) < cfg.effective and self.size < cfg.growth:
            self.grow()
            weight = self.tilt(belief.mean)
        moved = float((weight - self.tilt(self.matched)).abs().sum() / 2)
        metrics = {
            "effective_size": _effective(weight),
            "moved": moved,
            "wrong_share": float(1 - belief.meant.mean()) if len(belief.meant) else 0.0,
        }
        if moved > cfg.tolerance:
            metrics["loss"] = self.distil(weight, cfg.updates)
            self.matched = belief.mean
        return metrics

    def grow(self) -> None:
        """One more part of the pool, booked."""
        self.size += 1
        self.env.ledger.nfe += self.config.pool * self.env.steps
        self.prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the parts of the pool that a restore left missing, the anchors from the first; drop later ones."""
        cfg = self.config
        for parts in (self.pool, self.mixtures, self.conditions):
            del parts[self.size :]
        while len(self.pool) < self.size:
            part = len(self.pool)
            condition = self.drawn(part)
            sample = self.env.policy(self.reference).sample(self.noise(part), condition)
            if not self.pool and condition is not None:
                self.unit = self.weigh(sample, condition)
            flat = self.points(sample, condition)
            if not self.pool:
                rng = make_generator(self.seed, self.device, "anchors")
                self.anchors = kmeans(flat, cfg.anchors, rng)
                self.distance = torch.cdist(flat, self.anchors).square()
                plain = plain_factors(self.anchors)
                self.factors = torch.cat([graph_factors(mixture(flat, self.anchors)), plain])
                self.prior = torch.zeros(len(self.factors))
                self.prior[-len(plain) :] = PLAIN
            self.pool.append(sample)
            self.mixtures.append(rebuild(flat, self.anchors))
            if condition is not None:
                self.conditions.append(condition)

    def noise(self, part: int) -> Tensor:
        """What a part of the pool is made from, ``(pool, *event_shape)``."""
        rng = make_generator(self.seed, stream=f"pool {part}")
        noise = torch.randn(self.config.pool, *self.env.task.event_shape, generator=rng)
        return noise.to(self.device)

    def drawn(self, part: int) -> Tensor | None:
        """What the samples of a part of the pool are made of, ``(pool, ...)``; None without conditions."""
        task, pool = self.env.task, self.config.pool
        if task.condition is None:
            return None
        rng = make_generator(self.seed, stream=f"pool conditions {part}")
        each = task.draw_conditions(-(-pool // GROUP), rng)
        return each.repeat_interleave(GROUP, 0)[:pool].to(self.device)

    def points(self, samples: Tensor, condition: Tensor | None) -> Tensor:
        """Where samples lie, their conditions beside them, ``(n, d)``."""
        flat, kind = self.env.task.embed(samples), self.env.task.condition
        if kind is None or condition is None:
            return flat
        return torch.cat([flat, self.unit * kind.features(condition)], 1)

    def weigh(self, samples: Tensor, condition: Tensor) -> float:
        """The unit of conditions in which they vary as much as samples do."""
        kind: Any = self.env.task.condition
        told = kind.features(condition).var(0).sum().clamp_min(1e-12)
        return float((self.env.task.embed(samples).var(0).sum() / told).sqrt())

    def believe(self) -> Belief:
        """The reward as far as the answers tell; until others come it is what it was."""
        self.prepare()
        if self.believed is None or self.believed[0] is not self.answers:
            z = rebuild(self.points(self.shown, self.told), self.anchors)
            self.believed = (self.answers, fit(self.factors, z, self.answers, self.prior))
        return self.believed[1]

    def tilt(self, reward: Tensor) -> Tensor:
        """Self-normalised weights of the whole pool, from the reward at the anchors."""
        logit = torch.cat([z @ reward / self.beta for z in self.mixtures])
        if not self.conditions:
            return logit.softmax(0)
        return softmax_among(logit, group(torch.cat(self.conditions)))

    def distil(self, weight: Tensor, steps: int) -> float:
        """Train the model on the weighted pool; returns the mean loss."""
        cfg, pool, total = self.config, torch.cat(self.pool), 0.0
        asked = torch.cat(self.conditions) if self.conditions else None
        self.model.load_state_dict(self.reference.state_dict())
        optimizer = torch.optim.Adam(self.model.parameters(), lr=cfg.lr, fused=True)
        for step in range(steps):
            rate = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = cfg.lr * rate * min(1.0, (step + 1) / 10)
            index = torch.multinomial(weight, cfg.batch, replacement=True, generator=self.generator)
            x1 = pool[index]
            x0 = torch.randn(x1.shape, generator=self.generator, device=self.device)
            t = stratified_uniform(cfg.batch, self.generator)
            loss = self.model.residual(x0, x1, t, rows_of(asked, index)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach())
        self.env.ledger.nfe += steps * cfg.batch
        return total / steps
