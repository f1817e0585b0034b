"""``hil-dd``: the toy's own method, a listwise cross-entropy on flow residuals with a dynamic barrier.

    d_k = mean_t |x1^k - x0^k - v_B(t x1^k + (1 - t) x0^k, t)|^2 / D     (A's own noise x0^k and sample x1^k)
    g = -sum_k q_k log softmax(-d / temperature)_k,                      q = 1/m on the m chosen, 0 elsewhere
    f = flow-matching loss of B on real data
    phi = min(g, |grad g|^2),  lambda = max((phi - <grad f, grad g>) / |grad g|^2, 0)
    one Adam step along  grad f + lambda grad g

HIL-DD's toy experiment (github mathfirst/HIL-DD); barrier: Gong, Liu & Liu 2021 (NeurIPS). Proposals always
come from the frozen A. Chosen samples are fitted, the others pushed away; nothing but ``f`` ties B to the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics, Requires
from prefenv.device import make_generator, stratified_uniform
from prefenv.kernels import Kernel
from prefenv.policy import FlowPolicy
from prefenv.rollout import Rollout
from prefenv.tasks.conditions import rows_of


def listwise_loss(residual: Tensor, label: Tensor, temperature: float = 1.0) -> Tensor:
    """``-sum_k q_k log softmax(-d / temperature)_k`` of panels ``(m, K)``, ``(m,)``."""
    return -(label * (-residual / temperature).log_softmax(-1)).sum(-1)


def barrier_weight(f_dot_g: Tensor, g_square: Tensor, g: Tensor) -> Tensor:
    """The dynamic barrier's lambda from ``<grad f, grad g>``, ``|grad g|^2`` and ``g``; 0 if ``grad g`` is 0."""
    phi = torch.minimum(g, g_square)
    return torch.where(g_square > 0, (phi - f_dot_g) / g_square.clamp_min(1e-30), 0.0).clamp_min(0)


def choice_labels(judgement: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The toy's answers: 1/m on the m samples at or above the threshold.

    Args:
        judgement: ``(m, K)``, NaN = no answer.
        threshold: From where a sample is chosen.

    Returns:
        Labels ``(m, K)`` and which panels are informative ``(m,)``: all samples answered, some but not all
        chosen (the toy's empty answer means no update, and choosing all says nothing).
    """
    chosen = (judgement >= threshold).float()
    count = chosen.sum(1)
    told = ~judgement.isnan().any(1)
    return chosen / count.clamp_min(1)[:, None], told & (count > 0) & (count < judgement.shape[1])


class HilDD(Agent):
    """HIL-DD's toy update."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``hil-dd``.

        Args:
            lr: Adam's learning rate (its state is kept over the rounds); the toy takes 1e-3.
            updates: Adam steps per round; the toy takes one.
            times: Number of times ``t = i horizon / times`` at which residuals are averaged; the toy takes 100.
            horizon: Residuals are taken at times below this; the toy takes 1. The class of a shape is decided
                early, and pushing unchosen samples away later only ruins the shapes.
            temperature: Of the softmax; the toy takes 1.
            data_batch: Real samples for the flow loss; the toy takes 256.
            data_weight: Weight of the flow loss; the toy takes 1.
        """

        lr: float = 1e-4
        updates: int = 12
        times: int = 10
        horizon: float = 0.2
        temperature: float = 1.0
        data_batch: int = 512
        data_weight: float = 1.0

    name: ClassVar[str] = "hil-dd"
    requires: ClassVar[Requires] = Requires(panel_size=2, noise=True)

    def build(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr, fused=True)
        self.data_generator = make_generator(self.seed, stream="data")

    persistent: ClassVar[tuple[str, ...]] = ("model", "optimizer", "data_generator")

    def behaviour(self) -> FlowPolicy:
        """Frozen A by its ODE."""
        return self.env.policy(self.reference, Kernel("ode"))

    def update(self, rollout: Rollout) -> Metrics:
        cfg = self.config
        judgement = rollout.panels(rollout.judgement)
        label, informative = choice_labels(judgement, self.env.desk.threshold)
        if not bool(informative.any()):
            return {"informative": 0.0}
        noise = rollout.panels(rollout.noise)[informative].flatten(0, 1)
        sample = rollout.panels(rollout.samples)[informative].flatten(0, 1)
        label = label[informative]
        asked = rollout.condition
        if asked is not None:
            asked = rollout.panels(asked)[informative].flatten(0, 1)
        metrics: Metrics = {}
        for _ in range(cfg.updates):
            data, kind = self.env.task.data(cfg.data_batch, self.data_generator)
            data, kind = data.to(self.device), None if asked is None else kind.to(self.device)
            x0 = self.noise_like(data)
            t = self.times_of(data)
            f = cfg.data_weight * self.model.residual(x0, data, t, kind).mean()
            d = self.residuals(noise, sample, asked).view_as(label)
            g = listwise_loss(d, label, cfg.temperature)
            metrics = self.step(f, g.mean())
            self.env.ledger.nfe += len(data) + cfg.times * len(noise)
        return {"informative": float(informative.sum()), **metrics}

    def noise_like(self, x: Tensor) -> Tensor:
        """The noises that real samples ``x`` are matched from."""
        return torch.randn(x.shape, generator=self.generator, device=self.device)

    def times_of(self, x: Tensor) -> Tensor:
        """The times that real samples ``x`` are matched at."""
        return stratified_uniform(len(x), self.generator)

    def residuals(self, noise: Tensor, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """``d_k`` of each pair, ``(n,)``: the flow residual averaged over the times below the horizon."""
        n, k = len(noise), self.config.times
        t = torch.arange(k, device=self.device).repeat_interleave(n) * (self.config.horizon / k)
        x0, x1 = (x.repeat(k, *[1] * (x.dim() - 1)) for x in (noise, sample))
        each = rows_of(condition, torch.arange(n, device=self.device).repeat(k))
        return self.model.residual(x0, x1, t, each).view(k, n).mean(0)

    def step(self, f: Tensor, g: Tensor) -> Metrics:
        """One optimiser step along ``grad f + lambda grad g``."""
        parameters = list(self.model.parameters())
        grad_f = torch.autograd.grad(f, parameters)
        grad_g = torch.autograd.grad(g, parameters)
        dot = sum(((a * b).sum() for a, b in zip(grad_f, grad_g, strict=True)), g.new_zeros(()))
        square = sum((b.square().sum() for b in grad_g), g.new_zeros(()))
        weight = barrier_weight(dot, square, g.detach())
        for p, a, b in zip(parameters, grad_f, grad_g, strict=True):
            p.grad = a + weight * b
        self.optimizer.step()
        return {
            "flow_loss": float(f.detach()),
            "preference_loss": float(g.detach()),
            "barrier": float(weight),
        }
