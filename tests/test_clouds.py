"""The clouds task: scikit-learn's clouds, an equivariant network, Chamfer distances, and the field's metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import cKDTree

from oracles.s_cloud import SCloud
from prefenv.checkpoints import load_checkpoint
from prefenv.device import make_generator
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow, time_grid
from prefenv.networks import MixtureVelocity
from prefenv.point_clouds import (
    chamfer,
    chamfer_matrix,
    coverage,
    minimum_matching_distance,
    nearest_neighbour_accuracy,
)
from prefenv.policy import FlowPolicy
from prefenv.registry import make_task
from prefenv.set_networks import HilDDVelocity, Rescaled, RescaledFlow, SetVelocity
from prefenv.tasks import clouds
from prefenv.tasks.clouds import ROLL, S_CURVE, Clouds, curve, scale_to_range, template
from prefenv.tasks.shapes import Shapes

TASK = Clouds()


@pytest.fixture(scope="module")
def data():
    x, kind = Clouds(s_rate=0.5).data(200, make_generator(0))
    return x, kind, TASK.residuals(x)


# The data


class Given(np.random.RandomState):
    """scikit-learn's random numbers, given."""

    def __init__(self, u):
        super().__init__(0)
        self.u = u

    def uniform(self, *args, size=None, **kwargs):
        return self.u.reshape(size)


@pytest.mark.parametrize("kind", [ROLL, S_CURVE])
def test_curves_are_sklearns(kind):
    datasets = pytest.importorskip("sklearn.datasets")
    make = (datasets.make_swiss_roll, datasets.make_s_curve)[kind]
    u = np.random.default_rng(0).uniform(size=2 * 400)
    # The roll draws its angle and its depth, the S its angle and its depth, in this order.
    first = iter((u[:400], u[400:]))

    class Two(Given):
        def uniform(self, *args, size=None, **kwargs):
            got = next(first) if size != (2, 400) else u
            return got.reshape(size)

    theirs = make(400, noise=0.0, random_state=Two(u))[0][:, [0, 2]]
    ours = curve(kind, torch.from_numpy(u[:400]))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


@pytest.mark.parametrize("kind", [ROLL, S_CURVE])
def test_clouds_are_sklearns_in_law(kind, data):
    """Each coordinate's distribution, and the thickness, against scikit-learn's own noisy clouds."""
    datasets = pytest.importorskip("sklearn.datasets")
    make = (datasets.make_swiss_roll, datasets.make_s_curve)[kind]
    theirs = []
    for seed in range(100):
        x = torch.from_numpy(make(400, noise=0.1, random_state=seed)[0][:, [0, 2]])
        theirs.append(scale_to_range(x))
    theirs = torch.stack(theirs).float()
    ours = data[0][data[1] == kind]
    for axis in (0, 1):
        a, b = ours[..., axis].flatten().numpy(), theirs[..., axis].flatten().numpy()
        assert stats.ks_2samp(a, b).statistic < 0.015
    mine = [float(TASK.residuals(x)[:, kind].mean()) for x in (ours, theirs)]
    assert mine[0] == pytest.approx(mine[1], rel=0.02)


def test_scaling_is_joint_and_shares_are_as_stated(data):
    x, kind, _ = data
    assert x.shape == (200, 400, 2) and int(kind.sum()) == 100
    extremes = x.flatten(1).aminmax(dim=1)
    torch.testing.assert_close(extremes.min, -torch.ones(200))
    torch.testing.assert_close(extremes.max, torch.ones(200))
    assert float(x.amax(1).amin()) < 0.9, "only one of the axes reaches the end"
    assert float(TASK.data(100, make_generator(0))[1].float().mean()) == pytest.approx(0.2)
    assert Clouds(net="hil-dd").share == 0.5


@pytest.mark.parametrize(
    "settings", [{"net": "mlp"}, {"s_rate": 1.5}, {"noise": 0.0}, {"points": 2}]
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(ConfigError, match="clouds:"):
        Clouds(**settings)


# Distances


def brute(x, y, power):
    there, back = cKDTree(y).query(x)[0], cKDTree(x).query(y)[0]
    return (there**power).mean() + (back**power).mean()


@pytest.mark.parametrize("power", [1, 2])
def test_chamfer_is_that_of_a_tree_search(power, data):
    x, y = data[0][:3].double(), data[0][3:7, :150].double()
    got = chamfer_matrix(x, y, power)
    want = [[brute(a.numpy(), b.numpy(), power) for b in y] for a in x]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)
    torch.testing.assert_close(chamfer(y[:, None], x, power).T, got)


def test_chamfer_matches_golden(golden):
    g = golden("10_metrics")
    a, b = torch.from_numpy(g["clouds_A"]), torch.from_numpy(g["clouds_B"])
    squared, plain = g["chamfer_sq_sum_of_means_derived"], g["chamfer_l1_sum_of_means_derived"]
    np.testing.assert_allclose(chamfer(a, b, 2).numpy(), squared, rtol=1e-9)
    np.testing.assert_allclose(chamfer(a, b, 1).numpy(), plain, rtol=1e-9)


def test_chamfer_sees_no_order_and_has_a_gradient(data):
    x, y = data[0][0].double(), data[0][1].double()
    shuffled = x[torch.randperm(400)]
    torch.testing.assert_close(chamfer(shuffled, y), chamfer(x, y))
    assert float(chamfer(x, shuffled)) == 0
    few = x[:6].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda p: chamfer(p, y[:5], 1), few)
    same = x[:6].clone().requires_grad_(True)
    chamfer(same, x[:6], 1).backward()
    assert bool(torch.isfinite(same.grad).all())


def metrics(a, b):
    aa, ab, bb = chamfer_matrix(a, a), chamfer_matrix(a, b), chamfer_matrix(b, b)
    return nearest_neighbour_accuracy(aa, ab, bb), coverage(ab), minimum_matching_distance(ab)


def test_metrics_of_known_cases(data):
    x, kind = data[0][:, ::10], data[1]
    rolls, curves = x[kind == ROLL], x[kind == S_CURVE]
    accuracy, covered, _ = metrics(rolls[:40], curves[:40])
    assert accuracy == 1.0, "two classes are told apart always"
    alike, covered_alike, near = metrics(rolls[:40], rolls[40:80])
    assert 0.3 < alike < 0.7, "one law: a coin"
    assert covered_alike > covered
    same = metrics(rolls[:40], rolls[:40])
    assert same[1:] == (1.0, 0.0)
    assert same[0] == 0.0, "a copy's nearest neighbour is its original"
    collapsed = metrics(rolls[:1].expand(40, -1, -1), rolls[40:80])
    assert collapsed[1] == 1 / 40 and collapsed[2] > near
    mixed = torch.cat([rolls[:20], curves[:20]])
    assert (
        metrics(rolls[:40], mixed)[2] > metrics(torch.cat([rolls[40:60], curves[40:60]]), mixed)[2]
    )


def test_metrics_by_brute_force():
    rng = np.random.default_rng(0)
    full = rng.uniform(size=(13, 13))
    full = torch.from_numpy(full + full.T)
    n = 6
    right = 0
    for i in range(13):
        others = [j for j in range(13) if j != i]
        j = min(others, key=lambda j: float(full[i, j]))
        right += (j < n) == (i < n)
    got = nearest_neighbour_accuracy(full[:n, :n], full[:n, n:], full[n:, n:])
    assert got == pytest.approx(right / 13)
    xy = full[:n, n:]
    assert coverage(xy) == len({min(range(7), key=lambda j: float(xy[i, j])) for i in range(n)}) / 7
    want = sum(min(float(xy[i, j]) for i in range(n)) for j in range(7)) / 7
    assert minimum_matching_distance(xy) == pytest.approx(want)


# Quality and the oracle


def test_classes_are_told_apart(data):
    x, kind, residuals = data
    assert torch.equal(TASK.classify(x), kind)
    own, other = (residuals.gather(1, k[:, None])[:, 0] for k in (kind, 1 - kind))
    assert float(own.max()) < 0.05 and float(other.min()) > 0.15
    assert torch.equal(TASK.residual(x), own)
    half = chamfer(x[0].double(), template(int(kind[0])), 1) / 2
    assert float(own[0]) == pytest.approx(float(half), rel=1e-4)


def test_templates_lie_in_the_middle_of_the_data(data):
    """Equally spaced, and no other scale or shift of the template is nearer to the data, by more than 10 %."""
    x, kind, residuals = data
    for k in (ROLL, S_CURVE):
        step = template(k).diff(dim=0).norm(dim=1)
        assert float(step.max() / step.min()) < 1.1
        mine, own = x[kind == k].double(), float(residuals[kind == k, k].mean())
        for scale in (0.97, 1.03):
            moved = chamfer(mine[:30], scale * template(k), 1) / 2
            assert float(moved.mean()) > 0.95 * own


def test_oracle_by_hand(data):
    x, kind, _ = data
    oracle = SCloud(TASK)
    score = oracle.score(x)
    roll, s = (chamfer(x.double(), template(k), 2) / 2 for k in (ROLL, S_CURVE))
    want = roll / (roll + s) / (1 + s / 0.1**2)
    torch.testing.assert_close(score.double(), want, rtol=1e-5, atol=1e-6)
    assert float(score[kind == S_CURVE].min()) > 0.7 and float(score[kind == ROLL].max()) < 0.01
    order = torch.randperm(400)
    torch.testing.assert_close(oracle.score(x[:, order]), score, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="judges the clouds task"):
        SCloud(Shapes())
    with pytest.raises(ConfigError, match="width"):
        SCloud(TASK, width=0)


def test_embedding_forgets_the_order_and_keeps_the_class(data):
    x, kind, _ = data
    z = TASK.embed(x)
    torch.testing.assert_close(TASK.embed(x[:, torch.randperm(400)]), z)
    far = torch.cdist(z, z)
    same = kind[:, None] == kind
    assert float(far[~same].mean()) > 2.5 * float(far[same].mean())
    assert torch.equal(kind[far.fill_diagonal_(9.0).argmin(1)], kind), "nearest neighbours"
    # A cloud that is shifted by 0.3 is 0.3 away, whatever the direction.
    moved = TASK.embed(x[:1] + torch.tensor([0.3, 0.0]))
    assert float((moved - z[:1]).norm()) == pytest.approx(0.3, rel=1e-4)


# The network


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SetVelocity((20, 2), width=16, blocks=2, frequencies=4).double()
        torch.nn.init.normal_(network.out.weight)
    return network.requires_grad_(False)


def test_network_is_equivariant(network):
    x, t = torch.randn(3, 20, 2).double(), torch.rand(3).double()
    order = torch.randperm(20)
    v = network(x, t)
    torch.testing.assert_close(network(x[:, order], t), v[:, order])
    assert float((network(x[:, order], t) - v).abs().max()) > 0.01


def test_points_see_each_other_and_rows_do_not(network):
    x, t = torch.randn(3, 20, 2).double(), torch.rand(3).double()
    v, moved = network(x, t), x.clone()
    moved[1, 7] += 3
    w = network(moved, t)
    assert bool(((w - v)[1, :7].abs().amax(1) > 1e-4).all()), "every other point of the cloud"
    assert torch.equal(w[[0, 2]], v[[0, 2]])


def test_network_takes_one_time_or_one_a_row_and_any_number_of_points(network):
    x = torch.randn(3, 20, 2).double()
    t = torch.tensor(0.3).double()
    torch.testing.assert_close(network(x, t), network(x, t.expand(3)))
    torch.testing.assert_close(network.at(t[None])[0](x), network(x, t))
    assert network(x[:, :5], t).shape == (3, 5, 2)


@torch.no_grad()
def test_many_sets_are_taken_in_parts(network):
    x, t = torch.randn(37, 20, 2).double(), torch.rand(37).double()
    whole = network._body(x, t)
    torch.testing.assert_close(network(x, t), whole)
    torch.testing.assert_close(network(x, t[0]), network._body(x, t[:1].expand(37)))


def test_hil_dd_network_is_not_equivariant():
    net = HilDDVelocity((20, 2), width=8).requires_grad_(False)
    torch.nn.init.normal_(net.layernorm1.weight)
    x, order = torch.randn(3, 20, 2), torch.randperm(20)
    t = torch.tensor(0.5)
    assert float((net(x[:, order], t) - net(x, t)[:, order]).abs().max()) > 0.01


# Other noises


def wide(std):
    """The exact field of a mixture of two for noise of ``std``: that of ``x / std``, times ``std``."""

    class Wide(MixtureVelocity):
        def forward(self, x, t, condition=None):
            return std * super().forward(x / std, t)

    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    return Wide(centres / std, 0.2 / std, torch.tensor([0.3, 0.7]).double())


def test_rescaled_field_is_the_exact_one_of_unit_noise():
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    exact = MixtureVelocity(centres, 0.2, torch.tensor([0.3, 0.7]).double())
    x = torch.randn(50, 2).double()
    for t in (0.0, 0.2, 0.7, 1.0):
        time = torch.tensor(t).double()
        torch.testing.assert_close(Rescaled(wide(0.28), 0.28)(x, time), exact(x, time))


def test_euler_steps_are_those_of_the_original():
    """Equal steps of ``t`` are the grid of ``shift = std``, and every step is the same."""
    std, field = 0.28, wide(0.28)
    noise = torch.randn(20, 2).double()
    x = RectifiedFlow(field).integrate(std * noise, 10)
    y = FlowPolicy(RescaledFlow(Rescaled(field, std)), steps=10, shift=std).sample(noise)
    torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
    u = time_grid(10, std)
    torch.testing.assert_close(std * u / (1 - u + std * u), time_grid(10))


def test_matching_error_is_that_of_the_original():
    std, field = 0.28, wide(0.28)
    noise, x1, t = torch.randn(9, 2).double(), torch.randn(9, 2).double(), torch.rand(9).double()
    ours = RescaledFlow(Rescaled(field, std)).residual(noise, x1, t)
    torch.testing.assert_close(ours, RectifiedFlow(field).residual(std * noise, x1, t))


# The reference


def test_reference_makes_clouds_of_both_classes():
    """In the data's share, and by the field's metrics near the data."""
    flow = load_checkpoint(None, TASK).flow
    noise = torch.randn(48, 400, 2, generator=make_generator(1))
    x = FlowPolicy(flow, steps=16, shift=TASK.shift).sample(noise)
    kind = TASK.classify(x)
    assert 0.08 < float(kind.double().mean()) < 0.35
    real, _ = TASK.data(24, make_generator(2))
    accuracy, covered, near = metrics(x[:24], real)
    bare = metrics(torch.rand(24, 400, 2) * 2 - 1, real)
    assert accuracy < bare[0] and covered > bare[1] and near < bare[2] / 5


def test_settings_reach_the_task():
    task = make_task("clouds:net=hil-dd,noise=0.25")
    assert task.shift == 0.25 and task.samples == 64 and task.event_shape == (400, 2)
    assert isinstance(task.flow(), RescaledFlow)


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(data):
    x = data[0][:10]
    net = SetVelocity((400, 2))
    torch.nn.init.normal_(net.out.weight)
    t = torch.tensor(0.4)
    torch.testing.assert_close(
        TASK.residuals(x.cuda()).cpu(), TASK.residuals(x), rtol=1e-4, atol=1e-5
    )
    want = net(x, t)
    torch.testing.assert_close(net.cuda()(x.cuda(), t.cuda()).cpu(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(TASK.embed(x.cuda()).cpu(), TASK.embed(x), rtol=1e-4, atol=1e-5)


def test_the_card_compares_sets_by_the_fields_metrics(monkeypatch):
    """Two sets of data are alike; copies of one cloud cover one; clouds drawn together are told apart."""
    monkeypatch.setattr(clouds, "SET", 16)
    task = make_task("clouds:s_rate=0.5")
    x, y = (task.data(16, torch.Generator().manual_seed(i))[0] for i in (0, 1))
    alike, one, small = (task.compare(z, y) for z in (x, x[:1].expand_as(x), 0.5 * x))
    assert 0.2 <= alike["1-NNA"] <= 0.8 and alike["COV"] > 0.3
    assert one["COV"] == round(1 / 16, 3) and one["MMD"] > alike["MMD"]
    assert small["1-NNA"] == 1.0 and small["MMD"] > 10 * alike["MMD"]


def test_the_committed_card_has_them():
    card = load_checkpoint(None, make_task("clouds")).card
    made, data = card["set_metrics"], card["set_metrics_of_data"]
    assert made["1-NNA"] > 0.6 > data["1-NNA"] > 0.35, (
        "the reference can be told from data, data cannot"
    )
    assert made["COV"] < data["COV"] and made["MMD"] > data["MMD"]
