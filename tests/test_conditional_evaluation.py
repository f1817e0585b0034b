"""Evaluation where there are conditions: optimum, score and frontier, condition by condition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from probes import Chain, euler_gain, gaussian_kl
from test_conditions import TASKS

from prefenv.evaluation import Judge
from prefenv.flow import RectifiedFlow
from prefenv.networks import VelocityField
from prefenv.optimum import energy_square, frontier, frontier_kl
from prefenv.policy import FlowPolicy
from prefenv.testing.probe import Toward


class Moved(VelocityField):
    """The exact velocity of each condition's Gaussian, moved left by ``shift`` standard deviations."""

    def __init__(self, task, shift):
        super().__init__((2,))
        self.field, self.shift = task.network(), shift

    def forward(self, x, t, condition=None):
        task = self.field.task
        m = task.centre(condition)
        by = self.shift * task.std * torch.stack([-m[:, 1], m[:, 0]], 1)
        return self.field(x - t.reshape(-1, 1) * by, t, condition) + by


def chain(task, shift):
    return RectifiedFlow(Moved(task, shift))


# Euler's 16 steps make the Gaussians narrower; in units of ``std``, the variance, and so the optimum's shift.
NARROW = (euler_gain(0.3) / 0.3) ** 2


class Model(Chain):
    """Flows that are told the condition."""

    def sample(self, noise, condition=None):
        for flow in self.flows:
            noise = FlowPolicy(flow, steps=self.steps).sample(noise, condition)
        return noise


@pytest.fixture(scope="module")
def judge():
    task = TASKS["classes"]
    return Judge(chain(task, 0.0), task, Toward(task), n_reference=24_000, n=1200)


def test_the_optimum_has_its_closed_form_under_each_condition(judge):
    """``p*_c = N(m_c + std left / beta, std^2)``; pooled over conditions the shifts cancel."""
    task, left = judge.task, judge.optimum_label
    n = len(judge.optimum)
    assert left.unique().tolist() == [0, 1, 2]
    told = task.toward(judge.optimum, left)
    assert float(told.mean()) == pytest.approx(NARROW, abs=5 / math.sqrt(n))
    for c in range(3):
        gap = judge.optimum[left == c].mean(0) - task.centre(torch.tensor(c))
        a = 2 * math.pi * c / 3
        want = NARROW * task.std * torch.tensor([-math.sin(a), math.cos(a)])
        assert float((gap - want).norm()) < 5 * task.std / math.sqrt(n / 3)
    assert judge.optimum_reward == pytest.approx(NARROW, rel=0.06)
    assert judge.optimum_kl == pytest.approx(NARROW / 2, rel=0.1)
    assert judge.optimum_score > 0.8


def test_models_are_scored_condition_by_condition(judge):
    task = judge.task
    model = Model(chain(task, NARROW))
    best = judge.evaluate(model)
    cov = task.std**2 * torch.eye(2)
    one = gaussian_kl(torch.tensor([NARROW * task.std, 0.0]), cov, torch.zeros(2), cov)
    assert abs(best.kl_nats - one) < 3 * best.kl_stderr < 0.3
    assert best.score > 0.8 and best.reward == pytest.approx(NARROW, abs=0.1)
    assert best.frontier_kl_nats == pytest.approx(NARROW / 2, rel=0.2)
    assert best.diversity == pytest.approx(1, abs=0.1)
    same = judge.evaluate(Model(chain(task, 0.0)), kl=False)
    assert abs(same.score) < 0.15 and same.frontier_kl_nats < 0.01

    class Crossed(Model):
        def sample(self, noise, condition=None):
            return super().sample(noise, (condition + 1) % 3)

    crossed = judge.evaluate(Crossed(chain(task, NARROW)), kl=False)
    assert crossed.score < -1, "the same samples altogether, but of other conditions"


def test_the_frontier_is_the_mean_over_conditions():
    """Two conditions, two rewards each: ``R(b)`` and ``KL(b)`` by hand, not those of the pooled rewards."""
    rewards, beta = torch.tensor([[0.0, 1.0], [4.0, 6.0]]), 0.8
    reward, kl = frontier(rewards, torch.tensor([beta]))
    want_r, want_kl = [], []
    for low, high in rewards.tolist():
        z = (math.exp(low / beta) + math.exp(high / beta)) / 2
        r = (low * math.exp(low / beta) + high * math.exp(high / beta)) / (2 * z)
        want_r.append(r)
        want_kl.append(r / beta - math.log(z))
    assert float(reward) == pytest.approx(sum(want_r) / 2)
    assert float(kl) == pytest.approx(sum(want_kl) / 2)
    assert frontier_kl(rewards, float(reward)) == pytest.approx(float(kl), rel=1e-6)
    assert frontier_kl(rewards, 3.5) == math.inf and frontier_kl(rewards.flatten(), 3.5) < 1


def test_vectors_are_evaluated_too():
    task = TASKS["vector"]
    judge = Judge(chain(task, 0.0), task, Toward(task), n_reference=8000, n=800)
    assert judge.conditions.shape == (16, 2) and len(judge.noise) == 800
    noise, asked = judge.shown(20)
    assert torch.equal(asked[:16], judge.conditions) and len(noise.unique(dim=0)) == 20
    assert judge.optimum_reward == pytest.approx(NARROW, abs=0.1)


def test_energy_squares_are_unbiased_under_the_mean():
    """Between alike samples they are positive and negative alike; a root of each would be biased up."""
    g = torch.Generator().manual_seed(0)
    squares = [
        energy_square(torch.randn(40, 2, generator=g), torch.randn(40, 2, generator=g))
        for _ in range(200)
    ]
    assert abs(np.mean(squares)) < 3 * np.std(squares) / math.sqrt(200) and min(squares) < 0
