"""``kto``: golden numbers of the public code, its utilities, and that each class gives half of a batch."""

from __future__ import annotations

import math

import pytest
import torch
from probes import ROWS, close, probe_agent, weights

from agents.kto import gain_offset, kto_loss
from prefenv.matching import matching_error


@pytest.fixture
def g(tensors):
    return tensors("04g_dspo_mapo_kto")


UTILITIES = {
    "sigmoid": "sigmoid",
    "loss_averse": "loss-averse",
    "risk_seeking_3": "risk-seeking",
}


@pytest.mark.parametrize("offset", ["none", "sigmoid"])
@pytest.mark.parametrize("name", UTILITIES)
def test_loss_and_gradient_match_golden(g, name, offset):
    reference, accepted = matching_error(g["ref_pred"], g["target"]), g["kto_labels"] == 1
    close(reference, g["kto_err_ref"])
    for i, beta in enumerate(g["kto_beta"].tolist()):
        pred = g["model_pred"].clone().requires_grad_(True)
        gain = reference - matching_error(pred, g["target"])
        z = gain_offset(gain, accepted, "batch" if offset == "none" else "classes")
        # The public code divides a class's sum by its count + 1e-6.
        tolerance = 1e-9 if offset == "none" else 1e-5
        close(z, g[f"kto_{offset}_{name}_kl"][i], tolerance)
        weight = float(g["kto_lambda_d"]), float(g["kto_lambda_u"])
        loss = kto_loss(gain, accepted, z, beta, UTILITIES[name], weight).mean()
        close(loss.detach(), g[f"kto_{offset}_{name}_loss"][i], tolerance)
        if name == "sigmoid":
            grad = torch.autograd.grad(loss, pred)[0]
            close(grad, g[f"kto_{offset}_sigmoid_grad_model_pred"][i], tolerance)


def test_public_risk_seeking_1_is_averse_about_the_rejected(g):
    """It is ``-(2 l - 1) log sigmoid(-beta (g - z))``: ours where accepted, ours loss-averse where rejected."""
    reference, accepted = matching_error(g["ref_pred"], g["target"]), g["kto_labels"] == 1
    gain = reference - matching_error(g["model_pred"], g["target"])
    z, weight = gain_offset(gain, accepted), (float(g["kto_lambda_d"]), float(g["kto_lambda_u"]))
    coded_and_ours = []
    for i, beta in enumerate(g["kto_beta"].tolist()):
        close(z, g["kto_none_risk_seeking_1_kl"][i])
        seeking, averse = (
            kto_loss(gain, accepted, z, beta, u, weight) for u in ("risk-seeking", "loss-averse")
        )
        coded = torch.where(accepted, seeking, averse).mean()
        close(coded, g["kto_none_risk_seeking_1_loss"][i])
        coded_and_ours.append([round(float(x), 4) for x in (coded, seeking.mean())])
    assert coded_and_ours == [[-0.4985, -9.1231], [0.9774, 0.2636]]


def test_by_hand():
    gain, accepted = torch.tensor([0.3, 0.3, -0.1]), torch.tensor([True, False, False])
    got = kto_loss(gain, accepted, torch.tensor(0.1), 2.0, weight=(3.0, 5.0))
    sigmoid = [1 / (1 + math.exp(-y)) for y in (0.4, -0.4, 0.4)]
    want = [3 * (1 - sigmoid[0]), 5 * (1 - sigmoid[1]), 5 * (1 - sigmoid[2])]
    close(got, torch.tensor(want), 1e-6)
    assert float(gain_offset(gain, accepted)) == pytest.approx(0.5 / 3)
    assert float(gain_offset(gain, accepted, "classes")) == pytest.approx((0.3 + 0.1) / 2)
    assert float(gain_offset(-gain, accepted)) == 0, "clamped"


def test_it_draws_half_of_a_batch_from_each_class_and_none_from_the_unanswered():
    """A quarter is accepted, and of the rest some gave no answer."""

    def answer(panels):
        x = panels[..., 0]
        return torch.where(x > 1, 0.9, 0.2).masked_fill(x < -1, math.nan)

    agent, seen = probe_agent("kto", answer), []
    take = agent.points

    def spy(rows, **settings):
        seen.append((rows, settings))
        return take(rows, **settings)

    agent.points = spy
    metrics = []
    agent.learn(2 * ROWS, callback=lambda _, m: metrics.append(m))
    judged = agent.pool["judgement"]
    assert metrics[-1]["accepted"] == float((judged == 0.9).sum())
    main = [rows for rows, settings in seen if settings["window"][0] == 0]
    assert len(main) == 2 * agent.config.updates
    for rows in main:
        first, second = judged[rows].chunk(2)
        assert bool((first == 0.9).all()) and torch.allclose(second, torch.tensor(0.2))


def test_it_needs_both_classes():
    for value in (0.1, 0.9):
        agent = probe_agent("kto", lambda p, v=value: torch.full(p.shape[:2], v))
        before = weights(agent.model)
        agent.learn(ROWS)
        assert all(map(torch.equal, before, weights(agent.model)))
