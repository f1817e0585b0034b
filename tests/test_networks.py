"""Velocity networks: one time for all rows, one for each, and the functions ``at`` makes, are one function."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefenv.networks import DataPrediction, GaussianVelocity, VelocityField, VelocityMLP

TIMES = torch.tensor([0.0, 0.25, 0.5, 0.999])


@pytest.fixture(params=[(0, False), (3, False), (3, True)], ids=["plain", "3 classes", "data"])
def case(request, small_flow):
    """A field, points ``(5, 3, 2)``, and the condition of each row."""
    classes, data = request.param
    field = small_flow((3, 2), classes=classes).field
    if data:
        field = DataPrediction(field, 0.1)
    return field, torch.randn(5, 3, 2), torch.randint(3, (5,)) if classes else None


@pytest.mark.parametrize("grad", [True, False])
def test_at_equals_forward_with_one_time_and_with_one_per_row(case, grad):
    field, x, condition = case
    before = x.clone()
    with torch.set_grad_enabled(grad):
        functions = field.at(TIMES, condition)
        for t, f in zip(TIMES, functions, strict=True):
            scalar = field(x, t, condition)
            rows = field(x, t.expand(5), condition)
            torch.testing.assert_close(f(x), scalar, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rows, scalar, rtol=1e-5, atol=1e-6)
            assert scalar.requires_grad == grad
    assert torch.equal(x, before), "the fast path must not write into its input"
    assert len(functions) == len(TIMES)


def test_functions_made_without_gradient_keep_the_weights_of_then(case):
    field, x, condition = case
    with torch.no_grad():
        function = field.at(TIMES, condition)[1]
    before = function(x)
    assert not before.requires_grad
    with torch.no_grad():
        for p in field.parameters():
            p.add_(torch.randn_like(p))
    assert torch.equal(function(x), before)
    with torch.no_grad():
        torch.testing.assert_close(
            field.at(TIMES, condition)[1](x), field(x, TIMES[1], condition), rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("more", [0, 1, 700])
def test_many_rows_are_taken_in_parts(case, more):
    field, _, condition = case
    x = torch.randn(512 * torch.get_num_threads() + more, 3, 2)
    if condition is not None:
        condition = torch.randint(3, (len(x),))
    torch.testing.assert_close(
        field.at(TIMES, condition)[1](x), field(x, TIMES[1], condition), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_time_and_condition_matter(case):
    field, x, condition = case
    v = field(x, TIMES[1], condition)
    assert float((v - field(x, TIMES[2], condition)).abs().max()) > 1e-2
    if condition is not None:
        other = field(x, TIMES[1], (condition + 1) % 3)
        assert bool(((v - other).abs().flatten(1).amax(1) > 1e-2).all()), "of every row"


def test_rows_do_not_see_each_other(case):
    field, x, condition = case
    t = torch.linspace(0, 0.9, 5)
    together = field(x, t, condition)
    for i in range(5):
        one = slice(i, i + 1)
        alone = field(x[one], t[one], None if condition is None else condition[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 2), (2, 2, 2)])
def test_a_fresh_network_answers_zero_in_the_shape_of_its_input(shape):
    field, x = VelocityMLP(shape, width=8, blocks=1, frequencies=2), torch.randn(4, *shape)
    assert field.event_shape == shape
    out = field(x, torch.tensor(0.5))
    assert out.shape == x.shape and not bool(out.any())


def test_same_seed_same_network_and_same_answer():
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        field = VelocityMLP((3,), width=8, blocks=1, frequencies=2)
        torch.nn.init.normal_(field.out.weight)
        outs.append(field(torch.ones(2, 3), torch.tensor(0.3)))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_the_standard_size_is_the_measured_one():
    """0.47 M parameters at 64 points in the plane."""
    count = sum(p.numel() for p in VelocityMLP((64, 2)).parameters())
    assert count == pytest.approx(0.47e6, rel=0.05)


def test_options_rebuild_the_network(small_flow):
    field = small_flow((3, 2), classes=2).field
    twin = VelocityMLP(field.event_shape, **field.options)
    twin.load_state_dict(field.state_dict())
    x, c = torch.randn(4, 3, 2), torch.tensor([0, 1, 1, 0])
    assert torch.equal(twin(x, TIMES[1], c), field(x, TIMES[1], c))


def test_gradients_reach_every_parameter(case):
    field, x, condition = case
    field(x, torch.rand(5), condition).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in field.parameters())


def test_a_field_needs_only_forward():
    class Wave(VelocityField):
        def forward(self, x, t, condition=None):
            return torch.sin(x + t)

    x = torch.randn(4, 2)
    for t, f in zip(TIMES, Wave((2,)).at(TIMES), strict=True):
        assert torch.equal(f(x), torch.sin(x + t))


def test_gaussian_velocity_is_the_conditional_expectation():
    """``E[x1 - x0 | x_t]`` of a Gaussian pair is the regression of one on the other, slopes by moments."""
    mean, std = np.array([0.5, -1.0]), np.array([0.3, 2.0])
    field = GaussianVelocity(torch.as_tensor(mean), torch.as_tensor(std), (2,))
    x = torch.randn(6, 2, dtype=torch.float64)
    for t in (0.0, 0.3, 1.0):
        covariance, variance = t * std**2 - (1 - t), (1 - t) ** 2 + t**2 * std**2
        expected = mean + covariance / variance * (x.numpy() - t * mean)
        np.testing.assert_allclose(field(x, torch.tensor(t)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(case):
    field, x, condition = case
    here = field(x, TIMES[1], condition)
    field.cuda()
    there = condition if condition is None else condition.cuda()
    both = field(x.cuda(), TIMES[1].cuda(), there), field.at(TIMES.cuda(), there)[1](x.cuda())
    for out in both:
        torch.testing.assert_close(out.cpu(), here, rtol=1e-4, atol=1e-5)


def test_data_prediction_of_the_expected_sample_is_the_exact_velocity():
    """N(m, s^2): ``E[x1 | x_t = x] = m + t s^2 (x - t m) / ((1 - t)^2 + t^2 s^2)``."""
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0])

    class Expected(VelocityField):
        def forward(self, x, t, condition=None):
            t = t.reshape(-1, 1)
            gain = t * std**2 / ((1 - t) ** 2 + (t * std) ** 2)
            return mean + gain * (x - t * mean)

    x, t = torch.randn(64, 2), torch.rand(64) * 0.9
    got = DataPrediction(Expected((2,)), closest=0.05)(x, t)
    torch.testing.assert_close(got, GaussianVelocity(mean, std, (2,))(x, t), rtol=1e-4, atol=1e-4)
    late = DataPrediction(Expected((2,)), closest=0.5)
    torch.testing.assert_close(
        late(x, torch.tensor(0.9)), (Expected((2,))(x, torch.tensor(0.9)) - x) / 0.5
    )
