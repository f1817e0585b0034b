"""``rwr``: golden numbers of ORW-CFM-W2, its public code's permuted weights, and the optimum it converges to."""

from __future__ import annotations

import math

import pytest
import torch
from probes import ROWS, close, noises, probe_agent, silent, weights

from agents.rwr import reward_weights, rwr_loss
from prefenv.matching import matching_error
from prefenv.networks import GaussianVelocity
from prefenv.testing.probe import right


@pytest.fixture
def orw(golden):
    return {
        k: torch.as_tensor(v) for k, v in golden("04f_orw_cfm_w2").items() if v.dtype.kind in "fiub"
    }


def parts(g, kind):
    """Errors, distances and parameters of the golden linear network ``v = W x + t c``."""
    w, c = (g[k].clone().requires_grad_(True) for k in ("net_W", "net_c"))
    x, t = g[f"{kind}_xt"].flatten(1), g[f"{kind}_t"][:, None]
    velocity, reference = x @ w.T + t * c, x @ g["ref_W"].T + t * g["ref_c"]
    error = matching_error(velocity, g[f"{kind}_ut"].flatten(1))
    return error, matching_error(velocity, reference), (w, c)


def test_loss_and_gradients_match_golden(orw):
    tau, alpha = float(orw["temperature"]), float(orw["w2_coefficient"])
    weight = reward_weights(orw["reward"], tau, normalise=False)
    close(weight, orw["weights"])
    error, drift, parameters = parts(orw, "independent")
    close(error.mean().detach(), orw["independent_fm_loss"])
    close(drift.mean().detach(), orw["independent_w2_loss"])
    loss = rwr_loss(error, weight, drift, alpha).mean()
    close(loss.detach(), orw["independent_loss"])
    grad_w, grad_c = torch.autograd.grad(loss, parameters)
    close(grad_w, orw["independent_grad_W"])
    close(grad_c, orw["independent_grad_c"])


def test_the_golden_points_are_ours(orw):
    """Independent coupling: row i's noise with row i's sample, at its time."""
    x0, x1, t = orw["independent_x0_in"], orw["x1"], orw["independent_t"].view(-1, 1, 1, 1)
    close(torch.lerp(x0, x1, t), orw["independent_xt"])
    close(x1 - x0, orw["independent_ut"])


def test_public_transport_puts_weights_on_other_samples(orw):
    """Both numbers: 3.0230 as coded, 2.8455 with each weight on the sample that earned it."""
    tau, alpha = float(orw["temperature"]), float(orw["w2_coefficient"])
    weight = reward_weights(orw["reward"], tau, normalise=False)
    error, drift, _ = parts(orw, "ot_as_coded")
    as_coded = rwr_loss(error, weight, drift, alpha).mean().detach()
    moved = weight[orw["ot_row_to_sample_index"]]
    aligned = rwr_loss(error, moved, drift, alpha).mean().detach()
    close(as_coded, orw["ot_as_coded_loss"])
    close(aligned, orw["ot_loss_with_aligned_weights_derived"])
    assert round(float(as_coded), 4) == 3.0230 and round(float(aligned), 4) == 2.8455


def test_ours_keep_each_weight_with_its_sample():
    """Every point's sample, and the weight it is given, belong to the same row of the pool."""
    agent, seen = probe_agent("rwr", tau=3.0), []
    velocity = agent.velocity
    agent.velocity = lambda flow, at: seen.append(at.sample) or velocity(flow, at)
    losses, descend = [], agent.descend
    agent.descend = lambda loss: losses.append(float(loss.detach())) or descend(loss)
    agent.learn(ROWS)
    pool = agent.pool["sample"]
    answers = agent.pool["judgement"]
    torch.testing.assert_close(answers, right(pool))
    weight = (3 * answers).exp() / (3 * answers).exp().mean()
    at_first = seen[0]
    index = (at_first[:, None] == pool).all(-1).float().argmax(1)
    assert torch.equal(pool[index], at_first)
    torch.testing.assert_close(
        reward_weights(right(pool), 3.0)[index], weight[index], rtol=1e-5, atol=1e-6
    )


def test_weights_are_normalised_over_what_was_answered():
    reward = torch.tensor([0.0, math.nan, 1.0, 2.0])
    raw = torch.tensor([1.0, 0.0, math.e, math.e**2])
    close(reward_weights(reward, 1.0, normalise=False), raw, 1e-6)
    close(reward_weights(reward, 1.0), 3 * raw / raw.sum(), 1e-6)
    close(reward_weights(reward + 1000, 1.0), 3 * raw / raw.sum(), 1e-6)
    assert torch.equal(reward_weights(torch.full((3,), math.nan), 1.0), torch.zeros(3))


def test_its_minimiser_is_the_tilted_model():
    """Reference N(0, 1), reward x, weight exp(tau x): the optimum N(tau, 1) has no gradient."""
    tau, n = 0.7, 400_000
    rng = torch.Generator().manual_seed(3)
    x1, x0 = torch.randn(2, n, 1, generator=rng, dtype=torch.float64)
    weight = reward_weights(x1[:, 0], tau)
    for time in (0.1, 0.5, 0.8):
        t = torch.full((n,), time, dtype=torch.float64)
        x = torch.lerp(x0, x1, t[:, None])

        def gradient(mean, x=x, t=t):
            exact = GaussianVelocity(torch.tensor([mean]).double(), torch.ones(1).double())
            change = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            velocity = exact(x, t) + change[0] + change[1] * x
            loss = rwr_loss(matching_error(velocity, x1 - x0), weight, torch.zeros(()), 0.0)
            return torch.autograd.grad(loss.mean(), change)[0]

        assert float(gradient(tau).abs().max()) < 0.02
        assert float(gradient(0.0).abs().max()) > 0.2, "the reference is not"


def test_regulariser_draws_back_to_the_reference():
    """Its weight alone moves nothing at the reference; far from it, it does, and it is counted."""
    changed = []
    for alpha in (0.0, 100.0):
        agent = probe_agent("rwr", alpha=alpha, lr=3e-3)
        agent.learn(2 * ROWS)
        before = agent.env.ledger.nfe
        agent.learn(2 * ROWS)
        changed.append((float((agent.sample(noises()) - start(agent)).square().mean()), before))
    assert changed[1][0] < 0.25 * changed[0][0], changed
    cfg, rounds = agent.config, ROWS * agent.env.steps
    assert changed[1][1] - changed[0][1] == 2 * cfg.updates * cfg.batch
    assert changed[0][1] == 2 * (rounds + cfg.updates * cfg.batch)


def start(agent):
    return agent.env.policy(agent.reference).sample(noises())


def test_offline_it_reaches_the_share_of_the_optimum():
    """Preferred mass of ``p* ~ p_ref exp(tau r)``, from 20,000 weighted samples of the reference."""
    tau = 2.0
    agent = probe_agent("rwr", tau=tau, lr=2e-3, updates=10, batch=512)
    x = agent.env.policy(agent.reference).sample(noises(20_000))
    tilt = (tau * right(x)).softmax(0)
    want = float(tilt[x[:, 0] > 0].sum())
    agent.learn(40 * ROWS)
    got = float((agent.sample(noises(5000))[:, 0] > 0).float().mean())
    assert 0.85 < want < 0.87 and got == pytest.approx(want, abs=0.025), (got, want)


def test_online_the_tilts_add_up():
    shares = []
    for proposals, memory in (("reference", 0), ("model", 1)):
        agent = probe_agent(
            "rwr", tau=2.0, lr=2e-3, updates=10, batch=512, proposals=proposals, memory=memory
        )
        agent.learn(30 * ROWS)
        shares.append(float((agent.sample(noises(5000))[:, 0] > 0).float().mean()))
    assert shares[1] > shares[0] + 0.05, shares


def test_silence_is_no_weight():
    agent = probe_agent("rwr", silent)
    before = weights(agent.model)
    agent.learn(2 * ROWS)
    assert all(map(torch.equal, before, weights(agent.model)))
