"""``learned-reward``: the reward model against dense Gaussian processes, and what one question teaches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from probes import left, noises, probe_agent, share

from agents.learned_reward import softmax_among
from agents.reward_model import (
    LENGTHS,
    PLAIN,
    Belief,
    choose,
    fit,
    graph_factors,
    kmeans,
    members,
    mixture,
    plain_factors,
    rebuild,
)
from prefenv.testing.probe import ConditionalProbe, probe_env, right, turn

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n=300, gap=20.0, seed=0):
    """Two far clouds in the plane, and which is which."""
    side = torch.arange(n) % 2
    return torch.randn(n, 2, generator=rng(seed)) + gap * side[:, None], side


@pytest.fixture
def graph():
    x, side = clusters()
    anchors = kmeans(x, 24, rng())
    return x, side, anchors, mixture(x, anchors)


# The reward model


def test_kmeans_finds_the_centres_of_clouds_and_covers_a_rare_one():
    x, side = clusters(200)
    rare = torch.cat([x, torch.tensor([[0.0, 90.0], [0.1, 90.0]])])
    centres = kmeans(rare, 3, rng(3))
    want = torch.stack([x[side == 0].mean(0), x[side == 1].mean(0), torch.tensor([0.05, 90.0])])
    torch.testing.assert_close(
        centres[centres.sum(1).argsort()], want[want.sum(1).argsort()], rtol=0.0, atol=1e-4
    )


def test_mixture_is_local_and_sums_to_one(graph):
    x, _, anchors, z = graph
    torch.testing.assert_close(z.sum(1), torch.ones(len(x), dtype=F64))
    assert bool((z >= 0).all()) and int((z > 0).sum(1).max()) == 5
    near = torch.cdist(x, anchors).topk(5, largest=False).indices
    assert bool((z.gather(1, near) > 0).all()), "the five nearest, and no others"
    at_anchor = mixture(anchors, anchors)
    assert bool((at_anchor.argmax(1) == torch.arange(24)).all())


def test_kinds_that_no_sample_connects_are_independent(graph):
    x, side, anchors, z = graph
    kind = (anchors.sum(1) > 20).long()
    for factor in graph_factors(z):
        c = factor @ factor.T
        torch.testing.assert_close(c.diag(), torch.ones(24, dtype=F64))
        apart = c[kind == 0][:, kind == 1]
        assert float(apart.abs().max()) < 1e-6
    rough = graph_factors(z)[0] @ graph_factors(z)[0].T
    assert float(rough[kind == 0][:, kind == 0].mean()) > 0.5, "within a kind one answer goes far"


def test_correlations_are_the_graphs_matern_process(graph):
    """Against numpy, with all eigenvectors kept: links between two anchors only, none of an anchor to itself."""
    z = graph[3].numpy()
    link = z.T @ z
    np.fill_diagonal(link, 0.0)
    half = np.diag(link.sum(1) ** -0.5)
    value, vector = np.linalg.eigh(np.eye(24) - half @ link @ half)
    value = value.clip(1e-6)
    cover = vector @ np.diag((value + value[3]) ** -2.0) @ vector.T
    scale = np.diag(cover) ** -0.5
    (factor,) = graph_factors(graph[3], (4,))
    np.testing.assert_allclose(
        (factor @ factor.T).numpy(), cover * np.outer(scale, scale), atol=1e-9
    )


def test_rebuilding_continues_a_linear_function_beyond_the_anchors(graph):
    """A mixture of anchors cuts it off at the last of them."""
    x, _, anchors, z = graph
    near, slope = x[:150:2], torch.tensor([1.0, -2.0])
    edge = near[(near @ slope).argsort()[-3:]]
    weight = rebuild(edge, anchors, near=3, ridge=1e-6)
    torch.testing.assert_close(weight.sum(1), torch.ones(3, dtype=F64))
    at_anchors = (anchors @ slope).double()
    torch.testing.assert_close(weight @ at_anchors, (edge @ slope).double(), rtol=0, atol=1e-3)
    assert bool((mixture(edge, anchors) @ at_anchors < (edge @ slope) - 0.1).any())
    assert int((rebuild(x, anchors) != 0).sum(1).max()) == 6


def test_plain_members_are_squared_exponentials_of_the_distance(graph):
    anchors = graph[2]
    distance = torch.cdist(anchors, anchors).double()
    unit = distance[distance > 0].median()
    for factor, length in zip(plain_factors(anchors), LENGTHS, strict=True):
        want = (-(distance**2) / (2 * (length * unit) ** 2)).exp()
        torch.testing.assert_close(factor @ factor.T, want, rtol=0, atol=1e-6)


def test_ratings_of_a_smooth_preference_are_learned_and_one_mark_is_spread(graph):
    """Plain members win by their evidence where answers follow the coordinates, graph members from few marks."""
    x, side, anchors, z = graph
    plain = plain_factors(anchors)
    factors = torch.cat([graph_factors(z), plain])
    prior = torch.tensor([0.0] * 5 + [PLAIN] * len(plain))
    asked, wave = torch.randperm(300, generator=rng())[:40], (x[:, 0] / 4).sin() + x[:, 1] / 10
    told = fit(factors, rebuild(x[asked], anchors), wave[asked], prior)
    assert float(told.weight[5:].sum()) > 0.9
    assert float((rebuild(x, anchors) @ told.mean - wave).square().mean().sqrt()) < 0.15
    one = fit(factors, rebuild(x[:4], anchors), side[:4], prior)
    assert float(one.weight[:5].sum()) > 0.9
    assert bool(((rebuild(x, anchors) @ one.mean > 0.5) == (side == 1)).all())
    even, led = (fit(factors, z[:4], side[:4], p, steps=1).weight for p in (0 * prior, prior))
    want = even * prior.double().exp()[:, None]
    torch.testing.assert_close(led, want / want.sum())


def test_members_are_the_dense_gaussian_process(graph):
    _, _, _, z = graph
    factors, y = graph_factors(z, (2, 8)), torch.randn(6, generator=rng(), dtype=F64)
    asked, precision = z[:6], torch.rand(6, generator=rng(1), dtype=F64) + 0.5
    noise = torch.tensor([0.01, 0.3], dtype=F64)
    mean, spread, _ = members(factors, asked, y, precision, noise)
    for k, factor in enumerate(factors):
        prior = factor @ factor.T
        for s, level in enumerate(noise):
            cover = asked @ prior @ asked.T + (level / precision).diag()
            gain = prior @ asked.T @ torch.linalg.inv(cover)
            torch.testing.assert_close(mean[k, s], gain @ y)
            torch.testing.assert_close(
                spread[k, s] @ spread[k, s].T, prior - gain @ asked @ prior, rtol=1e-6, atol=1e-8
            )
    _, _, evidence = members(factors, asked, y, torch.ones(6, dtype=F64), noise)
    for k, factor in enumerate(factors):
        for s, level in enumerate(noise):
            cover = asked @ factor @ factor.T @ asked.T + level * torch.eye(6, dtype=F64)
            law = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=F64), cover)
            want = law.log_prob(y) + 3 * math.log(2 * math.pi)
            torch.testing.assert_close(evidence[k, s], want)


def test_one_wrong_answer_among_many_is_found(graph):
    _, side, _, z = graph
    y = side[:40].to(F64)
    y[7] = 1 - y[7]
    belief = fit(graph_factors(z), z[:40], y)
    right_ones = torch.arange(40) != 7
    assert float(belief.meant[7]) < 0.05 < 0.9 < float(belief.meant[right_ones].min())
    said = z @ belief.mean
    assert bool(((said > 0.5) == (side == 1)).all())


def test_nothing_known_and_equal_answers_are_survived(graph):
    *_, z = graph
    factors = graph_factors(z)
    empty = fit(factors, z[:0], torch.empty(0))
    assert bool((empty.mean == 0).all()) and bool(empty.covariance.isfinite().all())
    equal = fit(factors, z[:3], torch.full((3,), 0.3))
    torch.testing.assert_close(equal.mean, torch.full((24,), 0.3, dtype=F64))


def test_question_leaves_the_least_variance(graph):
    """Against brute force over all anchors; a second one is chosen as if the first were answered."""
    x, _, anchors, z = graph
    belief = fit(graph_factors(z), z[:0], torch.empty(0))
    square, times = torch.cdist(x, anchors).square(), torch.zeros(len(x))
    eye = torch.eye(24, dtype=F64)
    left_over = []
    for a in range(24):
        column = belief.covariance @ eye[a]
        c = belief.covariance - torch.outer(column, column) / (column[a] + belief.noise)
        left_over.append(float(c.trace()))
    best = min(range(24), key=left_over.__getitem__)
    picked = choose(belief, z, square, times, 2)
    assert int(picked[0]) == int(square[:, best].argmin())
    assert float((x[picked[0]] - x[picked[1]]).norm()) > 10, "the other cloud next"
    assert not times.any(), "what was handed in stays as it was"


def test_repeated_questions_go_to_samples_asked_least():
    x, _ = clusters(20)
    anchors = x[:2]
    z, square = mixture(x, anchors), torch.cdist(x, anchors).square()
    belief = Belief(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), 0.1, torch.ones(0), z[:1])
    picked = choose(belief, z, square, torch.zeros(20), 20)
    assert sorted(picked.tolist()) == list(range(20)), "each once before any twice"


# The agent


def small(answer=right, **settings):
    settings = {"pool": 512, "anchors": 32, "growth": 2, "lr": 5e-3, **settings}
    return probe_agent("learned-reward", answer, quick=False, **settings)


@pytest.mark.parametrize(("answer", "level"), [(right, 0.95), (left, 0.05)])
def test_one_question_of_four_samples_is_enough(answer, level):
    agent = small(answer, num_envs=4)
    assert share(agent) == pytest.approx(0.5, abs=0.03)
    agent.learn(4)
    assert len({s > 0 for s in agent.shown[:, 0].tolist()}) == 2, "both kinds were shown"
    after = share(agent)
    assert after > level if level > 0.5 else after < level
    ledger = agent.env.ledger
    assert (ledger.panels, ledger.queries) == (1, 4)
    pool = agent.size * 512 * agent.env.steps
    assert ledger.nfe == pool + 400 * 128, "unlabelled samples are free of questions, not of work"


def test_tilt_is_self_normalised_importance():
    agent = small(num_envs=4, beta=0.5)
    agent.grow()
    reward = torch.randn(32, generator=rng(), dtype=F64)
    weight = agent.tilt(reward)
    want = (agent.mixtures[0] @ reward / 0.5).exp()
    torch.testing.assert_close(weight, want / want.sum())


def test_questions_are_counted_by_sample():
    agent = small(num_envs=4)
    agent.grow()
    pool = agent.pool[0]
    double = pool[5].clone()
    double[1] += 1  # the same first number, another sample
    counts = agent.asked(torch.stack([pool[3], pool[3], pool[7], double, pool[0] + 9]))
    assert counts.nonzero().flatten().tolist() == [3, 7] and counts[[3, 7]].tolist() == [2, 1]


def test_what_is_believed_follows_the_answers_and_a_restore():
    agent = small(num_envs=4).learn(4)
    one, state = agent.believe(), agent.state()
    assert agent.believe() is one, "nothing was answered in between"
    agent.learn(4)
    assert not torch.equal(agent.believe().mean, one.mean)
    torch.testing.assert_close(agent.restore(state).believe().mean, one.mean)


def test_answers_that_agree_train_nothing_again():
    agent, seen = small(lambda p: right(p).round()), []
    agent.learn(2 * 64, callback=lambda _, m: seen.append(m))
    assert "loss" in seen[0] and seen[0]["moved"] > 0.3
    assert "loss" not in seen[1] and seen[1]["moved"] <= agent.config.tolerance


def test_pool_is_the_same_after_a_restore():
    one = small(num_envs=4)
    one.learn(4)
    two = small(num_envs=4).restore(one.state())
    two.prepare()
    assert torch.equal(one.pool[0], two.pool[0]) and torch.equal(one.anchors, two.anchors)
    assert one.env.ledger.nfe == two.env.ledger.nfe
    assert torch.equal(one.sample(noises()), two.sample(noises()))
    state = one.state()
    one.grow()
    one.restore(state).prepare()
    assert len(one.pool) == len(one.mixtures) == one.size, "going back leaves no later part"


# Conditions


def conditional(num_envs=64, **settings):
    settings = {"pool": 480, "anchors": 32, "growth": 1, "lr": 5e-3, **settings}
    env = probe_env(turn(1), num_envs, panel_size=4, task=ConditionalProbe())[0]
    return probe_agent("learned-reward", env=env, quick=False, **settings)


def test_softmax_among_is_a_softmax_of_each_label():
    logit = torch.randn(60, generator=rng(), dtype=F64) * 300
    label = torch.arange(60) % 3
    got = softmax_among(logit, label)
    for k in range(3):
        torch.testing.assert_close(got[label == k], logit[label == k].softmax(0) / 3)
    uneven = softmax_among(torch.zeros(4, dtype=F64), torch.tensor([0, 1, 1, 1]))
    assert uneven.tolist() == [0.25] * 4, "equal rewards leave the pool as it is"


def test_tilt_is_of_each_condition_by_itself():
    """What one condition's samples earn more than another's moves no weight between them."""
    agent = conditional()
    agent.grow()
    asked = agent.conditions[0]
    assert torch.equal(asked, agent.drawn(0)) and set(asked.tolist()) == {0, 1, 2}
    reward = torch.randn(32, generator=rng(), dtype=F64)
    weight, share = agent.tilt(reward), asked.bincount() / len(asked)
    each = torch.stack([weight[asked == k].sum() for k in range(3)])
    torch.testing.assert_close(each, share.double())
    inside = (agent.mixtures[0] @ reward / agent.beta)[asked == 1].softmax(0)
    torch.testing.assert_close(weight[asked == 1] / each[1], inside)


def test_samples_and_answers_keep_their_conditions():
    agent = conditional().learn(64)
    task = agent.env.task
    for samples, asked in ((agent.pool[0], agent.conditions[0]), (agent.shown, agent.told)):
        gap = (samples - task.centre(asked)).norm(dim=1)
        assert float(gap.max()) < 5 * task.std, "in its own condition's cloud"
    panels = agent.told.view(-1, 4)
    assert torch.equal(panels, panels[:, :1].expand(-1, 4)), "a panel asks about one condition"
    assert len(set(panels[:, 0].tolist())) == 3, "and all are asked about"


def test_the_rest_of_a_panel_is_chosen_among_its_condition():
    x, side = clusters(40)
    anchors = kmeans(x, 8, rng())
    z, square = rebuild(x, anchors), torch.cdist(x, anchors).square()
    belief = Belief(torch.zeros(8, dtype=F64), torch.eye(8, dtype=F64), 0.1, torch.ones(0), z[:1])
    picked = choose(belief, z, square, torch.zeros(40), 8, side, 4)
    kinds = side[picked].view(2, 4)
    assert torch.equal(kinds, kinds[:, :1].expand(2, 4)) and kinds[0, 0] != kinds[1, 0]
    assert len(set(picked.tolist())) == 8
    free = choose(belief, z, square, torch.zeros(40), 8)
    assert len(set(side[free].view(2, 4)[0].tolist())) == 2, "without conditions both at once"
