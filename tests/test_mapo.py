"""``mapo``: golden numbers of the public code, its 0 / 0, and that it has no reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from probes import ROWS, close, probe_agent

from agents.mapo import likelihood_proxy, mapo_loss
from prefenv.matching import matching_error


@pytest.fixture
def g(tensors):
    return tensors("04g_dspo_mapo_kto")


def test_loss_and_gradient_match_golden(g):
    for i, (beta, a) in enumerate(
        zip(g["mapo_beta"].tolist(), g["mapo_snr"].tolist(), strict=True)
    ):
        pred = g["model_pred"].clone().requires_grad_(True)
        error_w, error_l = matching_error(pred, g["target"]).chunk(2)
        close(error_w.detach(), g["mapo_err_w"])
        close(error_l.detach(), g["mapo_err_l"])
        loss, margin = mapo_loss(error_w, error_l, beta, a, float(g["mapo_T"]))
        close(loss.mean().detach(), g["mapo_loss"][i])
        close(beta * F.logsigmoid(margin).detach(), g["mapo_ratio_losses"][i])
        close(torch.autograd.grad(loss.mean(), pred)[0], g["mapo_grad_model_pred"][i])


def test_the_stand_in_is_smooth_where_the_public_code_divides_zero_by_zero():
    error = torch.tensor([0.0, 1e-12, 1e-5, 1e-3, 1.0], dtype=torch.float64, requires_grad=True)
    value = likelihood_proxy(error, 0.5)
    (slope,) = torch.autograd.grad(value.sum(), error)
    assert float(value[0].detach()) == 1 and float(slope[0]) == -0.25
    z = 0.5 * error.detach()[2:]
    close(value.detach()[2:], z / torch.expm1(z), 1e-12)
    exact = torch.special.expm1(z)
    close(slope[2:], 0.5 * (exact - z * z.exp()) / exact.square(), 1e-6)
    public = 0.5 * error[0].detach() / ((0.5 * error[0].detach()).exp() - 1)
    assert bool(public.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_far_from_the_mark_leave_value_and_gradient_finite(dtype):
    """Errors like these come of a network that predicts the finished sample, near the data."""
    z = torch.tensor([29.0, 31.0, 100.0, 1e3, 1e6], dtype=dtype, requires_grad=True)
    value = likelihood_proxy(z, 1.0)
    (slope,) = torch.autograd.grad(value.sum(), z)
    exact = z.detach().double()
    close(value.detach(), (exact * (-exact).exp() / -(-exact).expm1()).to(dtype), 1e-6)
    close(slope[:2], ((1 - exact) * (-exact).exp()).to(dtype)[:2], 1e-6)
    assert slope[2:].abs().max() < 1e-40 and bool(slope.isfinite().all())


def test_it_never_asks_the_reference():
    agent = probe_agent("mapo")
    agent.learn(ROWS)
    before = agent.env.ledger.nfe
    flow, agent.reference = agent.reference, None
    agent.learn(ROWS)
    agent.reference = flow
    cfg = agent.config
    assert agent.env.ledger.nfe - before == ROWS * agent.env.steps + 2 * cfg.updates * cfg.batch
