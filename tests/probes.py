"""Small worlds with known answers: agents on the probe, and Gaussians whose optimum has a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, make_dataclass, replace

import torch

from prefenv.flow import RectifiedFlow
from prefenv.networks import GaussianVelocity, VelocityField
from prefenv.oracle import ScriptedOracle
from prefenv.registry import lookup
from prefenv.tasks import Task
from prefenv.testing.probe import probe_env, right

ROWS = 64

# Settings under which an agent learns the probe in seconds, and the share of samples on the preferred side
# that it then reaches in 10 rounds. An agent that is not listed keeps its own settings and must only move.
MATCHING = {"lr": 5e-3, "updates": 12}
QUICK: dict[str, tuple[dict, float | None]] = {
    "hil-dd": (
        {"lr": 4e-3, "data_weight": 0.03, "data_batch": 64, "times": 3, "updates": 5},
        0.68,
    ),
    "pfm": ({"lr": 5e-3, "updates": 6, "batch": 64}, 0.9),
    "d3po": ({"lr": 5e-3, "eps": 0.5, "anchor": 0.1}, 0.7),
    "ppo": ({"lr": 5e-3}, 0.75),
    "grpo": ({"lr": 5e-3}, 0.68),
    "dpok": ({"lr": 5e-3}, 0.6),
    "flow-dpo": (MATCHING, 0.57),
    "dspo": (MATCHING, 0.9),
    "kto": (MATCHING, 0.6),
    "mapo": (MATCHING, 0.9),
    "nft": ({**MATCHING, "kl_coef": 0.05}, 0.95),
    "rwr": ({"lr": 2e-3, "updates": 12}, 0.9),
    "rft": ({"lr": 2e-3, "updates": 12}, 0.9),
    "best-of-n": ({"n": 8, "lr": 5e-3, "updates": 12, "batch": 64, "width": 32}, 0.95),
    "draft": ({"lr": 5e-3, "anchor": 0.1}, 0.8),
    "sb3-ppo": ({"lr": 5e-3, "batch_size": 128}, 0.7),
    "noise": ({"lr": 1e-2, "width": 32, "batch_size": 64, "gradient_steps": 16}, 0.8),
    "learned-reward": (
        {"pool": 512, "effective": 128.0, "anchors": 32, "updates": 80, "lr": 4e-3},
        0.85,
    ),
}
# To whom equal judgements teach nothing at all: those that learn from differences.
BY_DIFFERENCE = ("hil-dd", "pfm", "d3po", "ppo", "grpo", "flow-dpo", "dspo", "kto", "mapo", "nft")


def close(got, want, tolerance=1e-9):
    """Equal to a relative and absolute tolerance, in shape and type too."""
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=tolerance, atol=tolerance)


def left(samples):
    return 1 - right(samples)


def constant(value):
    return lambda panels: torch.full(panels.shape[:2], value)


def silent(panels):
    return torch.full(panels.shape[:2], math.nan)


def sometimes(panels):
    """No answer for about half of the samples."""
    return right(panels).masked_fill(panels[..., 1] > 0, math.nan)


def world(name, answer=right, num_envs=ROWS):
    """The probe's env as an agent asks for it, and its oracle."""
    cls = lookup("agent", name) if isinstance(name, str) else name
    return probe_env(answer, num_envs, differentiable=cls.requires.gradient, control=cls.control)


def quick(name):
    """A registered agent's class with the settings of ``QUICK`` as its defaults."""
    cls, settings = lookup("agent", name), QUICK.get(name, ({},))[0]
    return type(cls.__name__, (cls,), {"Config": with_defaults(cls.Config, **settings)})


def trained(agent) -> list[torch.nn.Parameter]:
    """The parameters of what it learns: the model's, or those of whatever it has instead."""
    if agent.chain():
        return list(agent.model.parameters())
    parts = [getattr(agent, name) for name in agent.persistent]
    return [p for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()]


def probe_agent(name, answer=right, *, seed=0, quick=True, num_envs=ROWS, env=None, **settings):
    """An agent on the probe; ``settings`` are its Config's."""
    cls = lookup("agent", name) if isinstance(name, str) else name
    config = replace(cls.Config(), **{**(QUICK.get(name, ({},))[0] if quick else {}), **settings})
    return cls(env or world(cls, answer, num_envs)[0], config, seed=seed)


def with_defaults(config, **settings):
    """A ``Config`` with other defaults."""
    fields = [(k, config.__annotations__[k], v) for k, v in settings.items()]
    made = make_dataclass("Config", fields, bases=(config,), frozen=True)
    made.__doc__ = config.__doc__
    return made


def noises(n=2000, dim=2):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(7))


def share(agent) -> float:
    """How many of its samples lie on the right."""
    return float((agent.sample(noises())[:, 0] > 0).float().mean())


def weights(module) -> list[torch.Tensor]:
    return [v.clone() for v in module.state_dict().values()]


def same(one, other) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# Gaussians


@dataclass(frozen=True)
class Plain(Task):
    """Points in space, without data or network of their own."""

    name: str = "plain"
    default_oracle: str = ""
    dim: int = 1

    @property
    def event_shape(self):
        return (self.dim,)

    def residual(self, x):
        return x.norm(dim=1)


class Linear(ScriptedOracle):
    """``r = a . x``."""

    def __init__(self, task, slope, threshold=0.0):
        super().__init__(task)
        self.slope, self.threshold = torch.as_tensor(slope), threshold

    def score(self, samples):
        return samples @ self.slope.to(samples)


class LinearVelocity(VelocityField):
    """``dx/dt = A x``: carries ``x`` to ``expm(A) x``."""

    def __init__(self, matrix):
        super().__init__((len(matrix),))
        self.register_buffer("matrix", matrix)

    def forward(self, x, t, condition=None):
        return x @ self.matrix.T


def gaussian(mean, std, dtype=torch.float32) -> RectifiedFlow:
    """The exact flow to ``N(mean, diag std^2)``."""
    mean, std = torch.broadcast_tensors(
        torch.as_tensor(mean, dtype=dtype), torch.as_tensor(std, dtype=dtype)
    )
    return RectifiedFlow(GaussianVelocity(mean, std, mean.shape))


def gaussian_kl(mean_b, cov_b, mean_a, cov_a) -> float:
    """``KL(N_b || N_a)`` in nats."""
    gap, inverse = mean_a - mean_b, torch.linalg.inv(cov_a)
    log_det = torch.logdet(cov_a) - torch.logdet(cov_b)
    return float(((inverse @ cov_b).trace() + gap @ inverse @ gap - len(gap) + log_det) / 2)


def euler_gain(std, steps=16) -> float:
    """Standard deviation that Euler's steps give the flow to ``N(m, std^2)``; its mean is exact."""
    times = [i / steps for i in range(steps)]
    rate = [(t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) for t in times]
    return math.prod(1 + r / steps for r in rate)


class Chain:
    """Flows as a model that can be evaluated."""

    def __init__(self, *flows, steps=16):
        self.flows, self.steps = list(flows), steps

    def chain(self):
        return self.flows

    def sample(self, noise):
        for flow in self.flows:
            noise = flow.integrate(noise, self.steps)
        return noise
