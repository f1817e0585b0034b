"""``best-of-n``: its candidates, its choice, its KL bound, and that inference asks nothing."""

from __future__ import annotations

import math

import pytest
import torch
from probes import (
    ROWS,
    Chain,
    Linear,
    Plain,
    gaussian,
    noises,
    probe_agent,
    share,
    silent,
    sometimes,
)
from scipy.integrate import quad
from scipy.stats import kstest, norm

from agents.best_of_n import BestOfN, candidates, keep_best, kl_bound
from prefenv.envs import FlowVectorEnv
from prefenv.errors import ConfigError
from prefenv.evaluation import Judge
from prefenv.rollout import Rollout
from prefenv.testing.probe import probe_env, right


def best(n=4, **settings):
    return probe_agent("best-of-n", n=n, **settings).learn(4 * ROWS)


def test_candidates_are_the_noise_itself_and_independent_normals():
    noise = noises(2000, 3)
    found = candidates(noise, 5, seed=0)
    assert found.shape == (2000, 5, 3) and torch.equal(found[:, 0], noise)
    for k in range(5):
        for d in range(3):
            assert kstest(found[:, k, d].numpy(), norm.cdf).pvalue > 1e-3
    # Rows, candidates and coordinates are uncorrelated, and so are the squares (a rotation's would not be).
    for values in (found.flatten(1), found.square().flatten(1)):
        gap = torch.corrcoef(values.T) - torch.eye(15)
        assert float(gap.abs().max()) < 5 / math.sqrt(2000)
    assert float(torch.corrcoef(torch.stack([found[:-1, 1, 0], found[1:, 1, 0]]))[0, 1]) < 0.1


def test_candidates_are_a_function_of_the_row_and_the_seed():
    noise = noises(10)
    found = candidates(noise, 3, seed=0)
    assert torch.equal(found[3:5], candidates(noise[3:5], 3, seed=0))
    assert torch.equal(found.flip(0), candidates(noise.flip(0), 3, seed=0))
    assert torch.equal(found, candidates(noise.double(), 3, seed=0).float())
    assert not torch.isclose(found[:, 1:], candidates(noise, 3, seed=1)[:, 1:]).any()
    nudged = candidates(noise.nextafter(noise + 1), 3, seed=0)
    assert not torch.isclose(found[:, 1:], nudged[:, 1:]).any(), "one bit is enough"


def test_keep_best_takes_the_first_of_equals():
    samples = torch.arange(12.0).view(3, 4, 1)
    value = torch.tensor([[0.0, 2, 1, 2], [5, 5, 5, 5], [-4, -3, -2, -1]])
    assert keep_best(samples, value).flatten().tolist() == [1, 4, 11]


@pytest.mark.parametrize("n", [1, 2, 4, 16, 100])
def test_kl_bound_is_the_integral_over_ranks(n):
    """The best of n has rank density ``n u^(n-1)``: its KL to the uniform is the KL where nothing ties."""

    def integrand(u):
        density = n * u ** (n - 1)
        return density * math.log(density) if density > 0 else 0.0

    assert kl_bound(n) == pytest.approx(quad(integrand, 0, 1)[0], abs=1e-8)


@pytest.mark.parametrize("n", [2, 5])
def test_kl_bound_holds_for_any_choice_by_one_number(n):
    """Ranks in a few levels, ties to the first: ``KL = sum_j P_j log(P_j / p_j)``, less than the bound."""
    last = 0.0
    for levels in (2, 5, 50, 5000):
        edge = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
        kept, prior = edge.pow(n).diff(), edge.diff()
        kl = float((kept * (kept / prior).log()).sum())
        assert last < kl < kl_bound(n) + 1e-12
        last = kl
    assert last == pytest.approx(kl_bound(n), rel=1e-2)


@pytest.mark.parametrize("n", [2, 4])
def test_it_samples_the_largest_of_n(n):
    """With ``J(x) = x_1`` in place of what it learned: the law of the maximum of n draws of the reference."""
    agent = best(n, first=False)
    agent.judge = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0)).requires_grad_(
        False
    )
    agent.judge[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
    policy = agent.env.policy(agent.reference)
    one = policy.sample(noises(40_000))[:, 0].sort().values
    x = agent.sample(noises())[:, 0].contiguous()
    rank = torch.searchsorted(one, x).double() / len(one)
    assert kstest(rank.numpy(), lambda u: u**n).pvalue > 1e-3
    assert kstest(rank.numpy(), lambda u: u ** (n + 1)).pvalue < 1e-3


def test_the_first_accepted_is_kept_and_the_best_of_none():
    agent = best()
    noise, policy = noises(400), agent.env.policy(agent.reference)
    tried = policy.sample(candidates(noise, 4, 0).flatten(0, 1))
    value = agent.judge(tried).detach().view(400, 4)
    tried = tried.view(400, 4, 2)
    got = agent.sample(noise)
    counts = [0, 0, 0]
    for i in range(400):
        accepted = [k for k in range(4) if value[i, k] >= 0.5]
        k = accepted[0] if accepted else int(value[i].argmax())
        torch.testing.assert_close(got[i], tried[i, k])
        counts[0 if not accepted else 1 if accepted[0] == 0 else 2] += 1
    assert min(counts) > 5, "no acceptance, the noise's own sample, a later one"
    always = best(first=False)
    torch.testing.assert_close(always.sample(noise), keep_best(tried, value))


@pytest.mark.parametrize("answer", [right, sometimes, lambda p: right(p).round()])
def test_it_learns_whom_to_keep(answer):
    agent = probe_agent("best-of-n", answer, n=8).learn(15 * ROWS)
    assert share(agent) == pytest.approx(1 - 0.5**8, abs=0.02)
    left = probe_agent("best-of-n", lambda p: 1 - answer(p), n=8).learn(15 * ROWS)
    assert share(left) == pytest.approx(0.5**8, abs=0.02)


def test_only_answers_are_learned_from():
    env, _ = probe_env(num_envs=8)
    agent = BestOfN(env, seed=0)
    judgement = torch.tensor([0.1, math.nan, 0.3, math.nan, 0.5, 0.6, math.nan, 0.8])
    path = torch.stack([torch.zeros(8, 2), noises(8)])
    metrics = agent.update(Rollout(path, torch.zeros(1, 8), judgement, judgement, 4))
    told = ~judgement.isnan()
    assert torch.equal(agent.pool["samples"], path[-1][told])
    assert torch.equal(agent.pool["judgement"], judgement[told])
    assert metrics["kl_bound"] == kl_bound(16) == agent.kl_bound()


def test_without_an_answer_it_is_the_reference():
    for agent in (probe_agent("best-of-n"), probe_agent("best-of-n", silent).learn(2 * ROWS)):
        reference = agent.env.policy(agent.reference).sample(noises())
        assert torch.equal(agent.sample(noises()), reference) and agent.kl_bound() == 0
    torch.testing.assert_close(best(1).sample(noises()), reference)
    assert best(1).kl_bound() == 0


def test_inference_asks_nothing():
    env, oracle = probe_env(num_envs=ROWS, max_queries=2 * ROWS)
    agent = probe_agent("best-of-n", env=env).learn(2 * ROWS)
    before = env.ledger.counts()
    agent.sample(noises())
    observation, _ = env.reset(options={"noise": noises(ROWS)})
    agent.predict(observation)
    assert before == env.ledger.counts() and oracle.queries == 2 * ROWS and env.ledger.left == 0


def test_evaluation_reports_a_bound_and_no_likelihood():
    task = Plain(dim=2)
    reference, oracle = gaussian([0.0, 0.0], [1.0, 1.0]), Linear(task, [1.0, 0.0], threshold=1.0)
    judge = Judge(reference, task, oracle, beta=1.0, n_reference=4096, n=512)
    env = FlowVectorEnv(64, task=task, oracle=oracle, reference=reference, device="cpu")
    agent = BestOfN(env, BestOfN.Config(n=4, first=False), seed=0).learn(64 * 16)
    found = judge.evaluate(agent)
    assert math.isnan(found.kl_nats) and math.isnan(found.kl_stderr)
    assert found.kl_bound_nats == kl_bound(4)
    # The mean of the largest of four standard normals, less what Euler's 16 steps take from the spread.
    assert found.reward == pytest.approx(1.0294 * 0.923, abs=0.06)
    assert found.frontier_kl_nats < found.kl_bound_nats, "no agent can lie above the frontier"
    plain = judge.evaluate(Chain(reference))
    assert math.isnan(plain.kl_bound_nats) and plain.kl_nats == pytest.approx(0, abs=1e-3)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="n must be at least 1"):
        probe_agent("best-of-n", n=0)
