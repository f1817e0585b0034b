"""HIL-DD's toy as ``benchmarks/clouds.py`` measures it: its noises, its screens, and the committed course."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import clouds
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.registry import agent_config, make_task
from prefenv.tasks.clouds import Clouds

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("size", "std"), [(4, 0.281), (6, 0.271), (16, 0.256), (64, 0.240), (256, 0.221)]
)
def test_noise_of_a_batch_has_the_scale_that_the_toys_code_gives(size, std):
    """The numbers were measured on the toy's own code."""
    task = make_task("clouds:net=hil-dd")
    rng = make_generator(0, stream=f"size {size}")
    z = task.noise * clouds.screens(task, 1024 // size, size, rng)
    batches = z.unflatten(0, (-1, size)).flatten(1)
    torch.testing.assert_close(batches.amin(1), -torch.ones(len(batches)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batches.amax(1), torch.ones(len(batches)), rtol=1e-5, atol=1e-5)
    assert float(batches.std(1).mean()) == pytest.approx(std, abs=0.012)


@pytest.fixture
def toy():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = Clouds(net="hil-dd", points=20)
        flow = task.flow()
    env = FlowVectorEnv(
        4, task=task, oracle=clouds.Heard(task, "choose"), reference=flow, panel_size=4, steps=5,
        device="cpu",
    )  # fmt: skip
    text = "benchmarks.clouds:Toy:lr=1e-3,updates=1,horizon=1.0,times=4,data_batch=64"
    return clouds.Toy(env, agent_config(text), seed=0)


def test_a_screen_comes_from_frozen_a_and_is_booked(toy):
    with torch.no_grad():
        for p in toy.model.parameters():
            p.mul_(0.5)
    rollout = toy.ask()
    reach = 1 / toy.env.task.noise
    assert float(rollout.noise.amax()) == pytest.approx(reach, rel=1e-5)
    assert float(rollout.noise.amin()) == pytest.approx(-reach, rel=1e-5)
    torch.testing.assert_close(rollout.samples, toy.env.policy(toy.reference).sample(rollout.noise))
    counts = toy.env.ledger.counts()
    assert (counts["panels"], counts["queries"], counts["nfe"]) == (1, 4, 20)
    assert torch.equal(rollout.judgement, toy.env.desk._oracle.last.flatten())


def test_real_clouds_are_matched_from_less_noise_than_a_screen(toy):
    """The barrier's noise is narrower than a screen's; with equal ones the S curves come faster."""
    real = toy.noise_like(torch.empty(256, 20, 2))
    screen = torch.cat([toy.ask().noise for _ in range(16)])
    assert real.shape == (256, 20, 2)
    assert float(real.std()) < 0.8 * float(screen.std())


def test_committed_course_is_that_of_the_toys_code():
    """At the toy's own settings: near the two courses that its code took, panel by panel."""
    rows = [json.loads(x) for x in (RESULTS / "clouds.jsonl").read_text().splitlines()]
    mine = [r for r in rows if r["agent"] == "hil-dd" and r["steps"] == 100]
    assert {r["seed"] for r in mine} == set(range(5))
    for k in range(clouds.PANELS + 1):
        theirs = [course[k] for course in clouds.ORIGINAL.values()]
        got = [r["s_rate"] for r in mine if r["informative"] == k]
        assert min(theirs) - 0.16 <= sum(got) / len(got) <= max(theirs) + 0.16, k
