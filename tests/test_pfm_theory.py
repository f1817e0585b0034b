"""Preference flow matching against its own theory (Kim et al. 2024), where it has closed forms.

On a line with the deterministic preference "more is better" everything is a law of the quantile ``u`` in [0, 1]:
the rejected of a pair has density ``2 (1 - u)``, the preferred ``2 u``, and the monotone map from one to the other
is ``f(u) = sqrt(1 - (1 - u)^2)``. Started from the reference, not the rejected, it gives a mean of ``pi / 4``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from probes import Linear, Plain, gaussian
from torch.special import ndtr

from agents.d3po import preferred_pairs
from agents.pfm import PFM, transport_pairs
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.networks import VelocityMLP


def monotone(u):
    return (1 - (1 - u).square()).sqrt()


class Line(Plain):
    """A line whose preference flow is quick to train."""

    def network(self):
        return VelocityMLP((1,), width=32, blocks=2, frequencies=8)


def trained(rounds, rows=2048, **settings):
    """``pfm`` on a line of standard normal samples, pairs judged by ``x``, and its quantiles."""
    task = Line()
    env = FlowVectorEnv(
        rows, task=task, oracle=Linear(task, [1.0]), reference=gaussian([0.0], [1.0]), panel_size=2, device="cpu",
    )  # fmt: skip
    config = replace(PFM.Config(), warm_start=False, margin=False, tie=0.0, **settings)
    agent = PFM(env, config, seed=0)
    agent.learn(rounds * rows)
    return agent


def quantiles(agent, n=4000):
    noise = torch.randn(n, 1, generator=make_generator(5))
    return ndtr(agent.sample(noise)[:, 0])


# The laws of a pair


def test_rejected_and_preferred_are_together_twice_the_reference():
    """``p0 + p1 = 2 p_ref``, ``p1 / p_ref = 2 F(y) <= 2``: bin by bin, from the agent's own pairs."""
    x = torch.randn(200_000, 1, generator=make_generator(0))
    winner, loser = preferred_pairs(x[:, 0].view(-1, 2), 0.0)
    assert torch.equal(torch.cat([winner, loser]).sort().values, torch.arange(len(x)))
    up, down = ndtr(x[winner, 0]), ndtr(x[loser, 0])
    assert float(down.mean()) == pytest.approx(1 / 3, abs=3e-3)
    assert float(up.mean()) == pytest.approx(2 / 3, abs=3e-3)
    middle = (torch.arange(10) + 0.5) / 10
    density = [torch.histc(v, 10, 0, 1) / len(v) * 10 for v in (down, up)]
    torch.testing.assert_close(density[0], 2 - 2 * middle, atol=0.05, rtol=0)
    torch.testing.assert_close(density[1], 2 * middle, atol=0.05, rtol=0)


def test_transport_of_the_pairs_is_the_monotone_map():
    """Minibatch transport on quantiles; from the reference once: pi / 4, twice: 0.945, three times: 0.993."""
    u = torch.rand(500, 2, generator=make_generator(0)).sort(1).values
    source, target = transport_pairs(u[:, :1], u[:, 1:])
    assert float((target - monotone(source)).abs().mean()) < 0.03
    grid = (torch.arange(100_000).double() + 0.5) / 100_000
    means = [float((grid := monotone(grid)).mean()) for _ in range(3)]
    assert means == pytest.approx([math.pi / 4, 0.9455, 0.9931], abs=5e-4)


def test_winners_of_winners():
    """Asked again about samples of ``p1^(n - 1)``, the winners' mean quantile is ``2^n / (2^n + 1)``."""
    u = torch.rand(2**18, generator=make_generator(0))
    for n in range(1, 5):
        winner, _ = preferred_pairs(u.view(-1, 2), 0.0)
        u = u[winner][torch.randperm(len(winner), generator=make_generator(n))]
        assert float(u.mean()) == pytest.approx(2**n / (2**n + 1), abs=4e-3), n


# The trained flow


def test_algorithm_1_lands_beyond_what_it_aims_at():
    """Trained from the rejected, started from the reference: not ``p1``'s 2/3 but pi / 4; applied twice 0.945."""
    agent = trained(3, coupling="ot", lr=4e-3, updates=100)
    once = quantiles(agent)
    assert float(once.mean()) == pytest.approx(math.pi / 4, abs=0.025)
    start = ndtr(torch.randn(4000, 1, generator=make_generator(5))[:, 0])
    assert float((once - monotone(start)).abs().mean()) < 0.04, "the map itself"
    agent.config = replace(agent.config, applications=2)
    assert float(quantiles(agent).mean()) == pytest.approx(0.945, abs=0.025)


@pytest.mark.parametrize("coupling", ["pool", pytest.param("ot", marks=pytest.mark.slow)])
def test_from_the_reference_it_lands_on_the_preferred_law_and_iterates_as_the_theory_says(coupling):
    """``source=reference``: 2/3 after one iteration, 4/5 after two, whatever the coupling."""
    batch = {"pool": 512, "ot": 128}[coupling]
    settings = {"source": "reference", "coupling": coupling, "lr": 4e-3, "updates": 100}
    agent = trained(6, iterate=3, batch=batch, **settings)
    chain = agent.chain()
    assert len(chain) == 3
    agent.frozen_flows, second = agent.frozen_flows[:1], agent.frozen_flows
    assert float(quantiles(agent).mean()) == pytest.approx(2 / 3, abs=0.025)
    agent.frozen_flows = second
    assert float(quantiles(agent).mean()) == pytest.approx(4 / 5, abs=0.025)
