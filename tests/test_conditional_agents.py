"""Agents on tasks with conditions: a sample stays with its condition, and every agent learns them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from probes import noises, quick
from test_conditions import TASKS, every_task, make

from agents.best_of_n import BestOfN
from agents.pfm import PFM, transport_pairs, within
from prefenv.errors import ConfigError
from prefenv.registry import AGENTS, lookup
from prefenv.testing.probe import ConditionalProbe, probe_env, turn


def test_matching_never_crosses_conditions():
    g = torch.Generator().manual_seed(0)
    c = torch.randint(3, (64,), generator=g)
    source, target = torch.randn(64, 2, generator=g), torch.randn(64, 2, generator=g)
    # The condition is written into the samples, far less than what the transport would gain by crossing.
    source[:, 1], target[:, 1] = 0.01 * c, 0.01 * c
    y0, y1 = transport_pairs(source, target, c)
    assert torch.equal((100 * y0[:, 1]).round(), (100 * y1[:, 1]).round())
    assert torch.equal(y0, source) and torch.equal(y1.sort(0).values, target.sort(0).values)
    crossing = transport_pairs(source, target)
    assert not torch.equal((100 * crossing[0][:, 1]).round(), (100 * crossing[1][:, 1]).round())
    for i in range(3):
        want = transport_pairs(source[c == i], target[c == i])[1]
        assert torch.equal(y1[c == i], want), "the optimum within each condition"


@every_task
def test_partners_are_of_the_same_condition_evenly(task):
    c = task.fixed_conditions()[:3]
    source = c[torch.tensor([0, 1, 2, 0, 1, 0])]
    wanted = c[torch.tensor([1, 0, 2])].repeat(3000, *[1] * (c.dim() - 1))
    rows = within(source, wanted, torch.Generator().manual_seed(0))
    assert torch.equal(source[rows], wanted)
    share = rows.bincount(minlength=6) / 3000
    for group in ([0, 3, 5], [1, 4], [2]):
        assert share[group].tolist() == pytest.approx([1 / len(group)] * len(group), abs=0.04)


@pytest.mark.parametrize("coupling", ["pair", "pool", "ot"])
@pytest.mark.parametrize("source", ["reference", "rejected"])
def test_pfm_keeps_sources_and_targets_of_one_condition(coupling, source, monkeypatch):
    """Centres are far apart, so a pair that crossed conditions would be longer than any that did not."""
    agent = PFM(make_probe(0.01), PFM.Config(coupling=coupling, source=source, updates=3), seed=0)
    seen = []
    monkeypatch.setattr(
        "agents.pfm.pfm_loss", lambda v, u: seen.append(u) or (v - u).square().mean(1)
    )
    agent.learn(128)
    assert len(seen) == 6 and max(float(u.norm(dim=1).max()) for u in seen) < 0.2


def test_pool_rows_keep_their_condition():
    task = ConditionalProbe(std=0.01)
    for name, key in (
        ("rft", "accepted"),
        ("best-of-n", "samples"),
        ("kto", "sample"),
        ("pfm", "target"),
    ):
        agent = lookup("agent", name)(make_probe(0.01), seed=0).learn(128)
        pool = agent.pool
        gap = pool[key] - task.centre(pool["condition"])
        assert len(gap) and float(gap.norm(dim=1).max()) < 0.1, name


def make_probe(std=0.3, rows=64):
    return probe_env(turn(1, std), rows, task=ConditionalProbe(std=std))[0]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("name", AGENTS)
def test_agents_save_and_go_on_exactly(task, name, tmp_path):
    cls = quick(name)

    def env():
        return make(
            task, 8, max(4, cls.requires.panel_size), control=cls.control, kernel="flow-sde"
        )

    agent = cls(env(), seed=1).learn(8)
    agent.save(tmp_path / "a.zip")
    loaded = cls.load(tmp_path / "a.zip", env())
    x, asked = noises(6), task.draw_conditions(6, torch.Generator().manual_seed(0))
    for one in (agent, loaded):
        one.learn(8)
    assert torch.equal(agent.sample(x, asked), loaded.sample(x, asked))
    assert bool(agent.sample(x, asked).isfinite().all())
    observation, _ = agent.env.reset(seed=5)
    action, _ = agent.predict(observation)
    assert action.shape == observation["x"].shape and np.isfinite(action).all()


def test_who_cannot_learn_conditions_says_so():
    class OldSample(BestOfN):
        def sample(self, noise):
            return noise

    with pytest.raises(ConfigError, match="a task with conditions"):
        OldSample(make_probe())
