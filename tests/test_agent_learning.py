"""All agents learn toward what is preferred, from a seed, and book what they spend.

Every registered agent is tested by being registered. ``probes.QUICK`` may give it settings for the probe.
"""

from __future__ import annotations

import math

import pytest
import torch
from every_agent import (
    VARIANTS,
    differ,
    every_agent,
    every_variant,
    everything,
    learned,
    log_prob_agents,
)
from probes import (
    BY_DIFFERENCE,
    QUICK,
    ROWS,
    constant,
    left,
    noises,
    probe_agent,
    same,
    share,
    silent,
    sometimes,
    trained,
    weights,
    world,
)

from prefenv.registry import lookup, names
from prefenv.testing.probe import ProbeVelocity, right


@every_agent
def test_learning_moves_toward_what_is_preferred_and_back_when_reversed(name):
    _, level = QUICK.get(name, ({}, None))
    reached, sides = [], []
    for answer in (right, left):
        agent = probe_agent(name, answer)
        assert share(agent) == pytest.approx(0.5, abs=0.03)
        assert agent.learn(10 * ROWS) is agent
        reached.append(share(agent))
        sides.append(float(agent.sample(noises())[:, 0].mean()))
    assert sides[0] != sides[1], "what is preferred matters"
    if level is not None:
        assert sides[0] > sides[1], "the mean moved the right way"
        assert reached[0] > level and reached[1] < 1 - level, reached


@pytest.mark.parametrize("name", [n for n in names("agent") if n in BY_DIFFERENCE])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_equal_judgements_teach_nothing(name, value):
    agent = probe_agent(name, constant(value))
    before, samples = weights(agent.model), agent.sample(noises())
    agent.learn(4 * ROWS)
    assert same(before, weights(agent.model)) and torch.equal(samples, agent.sample(noises()))
    assert agent.env.ledger.queries == 4 * ROWS, "they were asked all the same"


@every_agent
@pytest.mark.parametrize("answer", [silent, sometimes])
def test_missing_answers_do_not_break_it(name, answer):
    agent = probe_agent(name, answer)
    start = agent.sample(noises())
    agent.learn(2 * ROWS)
    after = agent.sample(noises())
    assert bool(after.isfinite().all()) and agent.rounds == 2
    if answer is silent:
        assert torch.equal(start, after)
    # Answers that come later are learned from; contrary ones, since those that agree need teach nothing.
    agent.env.desk._oracle.answer = left
    agent.learn(2 * ROWS)
    assert bool(agent.sample(noises()).isfinite().all())
    assert not torch.equal(agent.sample(noises()), after)


@every_agent
def test_gradient_at_the_reference_is_finite_and_not_zero(name):
    """With lr 0 the gradient of the last step stays where it was taken: at the reference."""
    if "lr" not in lookup("agent", name).Config.__dataclass_fields__:
        pytest.skip("has no learning rate")
    agent = probe_agent(name, lr=0.0)
    before = weights(agent.model)
    agent.learn(2 * ROWS)
    assert same(before, weights(agent.model))
    grads = torch.cat([p.grad.flatten() for p in trained(agent) if p.grad is not None])
    assert bool(grads.isfinite().all()) and float(grads.norm()) > 1e-4


@pytest.mark.parametrize("name", log_prob_agents)
def test_ratio_is_one_before_the_first_step(name):
    """The model that collected and the one that is asked say the same; d3po's loss is then log 2."""
    seen = []
    probe_agent(name, lr=0.0).learn(3 * ROWS, callback=lambda _, m: seen.append(m))
    for metrics in seen:
        assert metrics.get("ratio_error", 0.0) < 1e-3
        if name == "d3po":
            assert metrics["pairs"] > 10 and metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
        if name == "ppo":
            assert metrics["clipped"] == 0
    if name == "ppo":
        narrow = probe_agent(name, epochs=4, clip_range=0.01)
        narrow.learn(ROWS, callback=lambda _, m: seen.append(m))
        assert seen[-1]["ratio_error"] < 1e-3 and seen[-1]["clipped"] > 0.1, "of the first step"


def test_ratio_error_is_the_first_steps_even_when_its_loss_is_zero():
    """Equal judgements after others: the loss is 0, but Adam's momentum moves the model between minibatches."""
    agent, seen = probe_agent("ppo", anchor=0.0, minibatches=8), []
    agent.learn(4 * ROWS)
    agent.env.desk._oracle.answer = constant(0.5)
    agent.learn(ROWS, callback=lambda _, m: seen.append(m))
    assert seen[0]["loss"] == 0 and seen[0]["ratio_error"] < 1e-3


@every_agent
def test_reference_is_untouched_bit_by_bit(name):
    env, _ = world(name)
    before = weights(env.reference.flow)
    agent = probe_agent(name, env=env)
    start = [p.detach().clone() for p in trained(agent)]
    agent.learn(5 * ROWS)
    assert agent.reference is env.reference.flow
    assert same(before, weights(env.reference.flow)) and not same(start, trained(agent))
    assert not any(p.requires_grad for p in env.reference.flow.parameters())


@every_agent
def test_ledger_has_every_question_and_every_evaluation(name):
    for variant, settings in VARIANTS:
        if variant != name:
            continue
        env, oracle = world(name)
        agent = probe_agent(name, env=env, **settings)
        before = ProbeVelocity.evaluated
        agent.learn(3 * ROWS)
        assert oracle.queries == env.ledger.queries == 3 * ROWS
        gradient = agent.requires.gradient  # asked of each sample alone
        assert oracle.panels == env.ledger.panels == 3 * ROWS // (1 if gradient else 4)
        assert ProbeVelocity.evaluated - before == env.ledger.nfe
        assert env.ledger.gradients == (3 * ROWS if gradient else 0)
        assert oracle.peeks == 0 < env.ledger.seconds


@every_agent
def test_predict_plays_the_model_in_the_env(name):
    """Stable-Baselines3's way of acting (as ``evaluate_policy`` calls it) ends in ``sample``."""
    agent = learned(name)
    observation, _ = agent.env.reset(options={"noise": noises(ROWS)})
    for _ in range(agent.env.steps if agent.control == "state" else 1):
        action, _ = agent.predict(observation, state=None, episode_start=None, deterministic=True)
        observation, *_, info = agent.env.step(action)
    final = torch.stack([torch.as_tensor(row["x"]) for row in info["final_obs"]])
    torch.testing.assert_close(final, agent.sample(noises(ROWS)), rtol=1e-4, atol=1e-5)


@every_agent
def test_samples_are_a_function_of_their_noise(name):
    agent = learned(name)
    state = everything(agent)
    samples = agent.sample(noises(100))
    assert torch.equal(samples, agent.sample(noises(100))) and not samples.requires_grad
    torch.testing.assert_close(samples[:7], agent.sample(noises(100)[:7]), rtol=1e-4, atol=1e-5)
    assert differ(state, agent) is None, "sampling changes nothing"


# Seeds


@every_variant
def test_same_seed_same_bits(name, settings):
    runs = {}
    for run, seed in (("one", 3), ("again", 3), ("other", 4)):
        torch.rand(len(runs))
        agent = probe_agent(name, seed=seed, **settings).learn(2 * ROWS)
        runs[run] = everything(agent), agent.sample(noises(50))
    assert differ(runs["one"][0], runs["again"][0]) is None
    assert not torch.equal(runs["one"][1], runs["other"][1])


@every_agent
def test_agents_leave_the_global_generator_alone(name):
    before = torch.get_rng_state()
    agent = probe_agent(name)
    agent.learn(2 * ROWS)
    agent.sample(noises(5))
    assert torch.equal(before, torch.get_rng_state())
