"""The four agents' mathematics: golden numbers of the public code, closed forms, and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from probes import ROWS, close, constant, left, noises, probe_agent, same, share, weights

from agents.d3po import d3po_loss, preferred_pairs
from agents.hil_dd import barrier_weight, choice_labels, listwise_loss
from agents.pfm import Refined, pfm_loss, pfm_point, transport_pairs
from agents.ppo import advantages, gaussian_kl, ppo_loss
from prefenv.errors import ConfigError
from prefenv.rollout import Rollout, collect
from prefenv.testing.probe import ProbeVelocity, probe_env, right


def a_rollout(samples, judgement, panel_size=4):
    """A finished round: one step, from zero noise."""
    path = torch.stack([torch.zeros_like(samples), samples])
    judgement = torch.as_tensor(judgement)
    return Rollout(path, torch.zeros(1, len(samples)), judgement, judgement, panel_size)


# ppo


@pytest.fixture
def ddpo(tensors):
    return {
        k.removeprefix("ddpo_"): v for k, v in tensors("03_policy_losses").items() if "ddpo_" in k
    }


def test_ppo_loss_and_gradient_match_golden(ddpo):
    log_prob = ddpo["logp"].clone().requires_grad_(True)
    advantage = ddpo["advantages"].clamp(-ddpo["adv_clip_max"], ddpo["adv_clip_max"])
    assert float((advantage - ddpo["advantages"]).abs().max()) > 1, "the clip is felt"
    close((log_prob - ddpo["old_logp"]).exp().detach(), ddpo["ratio"])
    loss = ppo_loss(log_prob, ddpo["old_logp"], advantage, float(ddpo["clip_range"]))
    close(loss.detach(), ddpo["loss_per_sample"])
    close(loss.mean().detach(), ddpo["loss"])
    (grad,) = torch.autograd.grad(loss.mean(), log_prob)
    close(grad, ddpo["grad_logp"])


def test_ppo_stops_only_what_has_moved_far_enough(ddpo):
    """A ratio beyond the clip has no gradient where it moved the right way, and all of it where it did not."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    log_prob = ratio.log().requires_grad_(True)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    (grad,) = torch.autograd.grad(
        ppo_loss(log_prob, torch.zeros(4), advantage, 0.2).sum(), log_prob
    )
    close(grad, torch.tensor([0.0, 1.5, 0.0, -0.5]), 1e-6)


def test_advantages_match_golden_trackers(ddpo):
    """Batch statistics before a prompt has ``min_count`` rewards, its own statistics from then on."""
    reward, prompt = ddpo["rewards_1"], ddpo["prompts_1"]
    batch, few = advantages(reward, 1e9), 0
    for p in prompt.unique():
        row = prompt == p
        if int(row.sum()) < int(ddpo["min_count"]):
            close(batch[row], ddpo["adv_1"][row])
            few += 1
        else:
            close(advantages(reward[row], 1e9), ddpo["adv_1"][row])
    assert few == 1


def test_advantages_skip_what_was_not_answered_and_are_clipped():
    reward = torch.tensor([1.0, math.nan, 2.0, 6.0, math.nan])
    got = advantages(reward, 1.2)
    z = (np.array([1.0, 2, 6]) - 3) / (np.std([1, 2, 6]) + 1e-6)
    close(got, torch.tensor([z[0], 0.0, z[1], 1.2, 0.0], dtype=torch.float32), 1e-6)
    assert torch.equal(advantages(torch.full((3,), math.nan), 5.0), torch.zeros(3))


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1 / 3, 1e6])
def test_equal_rewards_have_no_advantage_at_all(value):
    """Not even a rounding error's worth: Adam would make a whole step of it."""
    for n in (5, 64, 100, 129):
        assert torch.equal(advantages(torch.full((n,), value), 5.0), torch.zeros(n))


def test_gaussian_kl_matches_golden(tensors):
    g = tensors("03_policy_losses")
    std = (g["grpo_s"] * g["grpo_sqrt_neg_dt"]).view(1, 1, 1, 1)
    close(
        gaussian_kl(g["grpo_mean"], g["grpo_mean_ref"], std),
        g["true_gaussian_kl_per_sample_summed"],
    )


def shifted(name, shift=0.3, **settings):
    """An agent whose model's velocity is the reference's plus a constant, and that learns nothing (lr 0)."""
    agent = probe_agent(name, lr=0.0, **settings)
    with torch.no_grad():
        agent.model.field.change.out.bias += shift
    return agent


def test_kl_metric_is_the_closed_form_of_a_shifted_model():
    """Mean of a step moves by ``b c``: its KL is ``D (b c)^2 / 2 std^2``, averaged over the stochastic steps."""
    seen = []
    agent = shifted("ppo", kl_coef=1.0, epochs=1, minibatches=1, anchor=0.0)
    agent.learn(ROWS, callback=lambda _, m: seen.append(m))
    steps, (_, b, std) = agent.policy.stochastic_steps, agent.policy.table
    want = np.mean([2 * float(b[i] * 0.3) ** 2 / (2 * float(std[i]) ** 2) for i in steps])
    assert len(steps) == 3 and seen[0]["kl"] == pytest.approx(want, rel=1e-4)
    still = probe_agent("ppo", lr=0.0, kl_coef=1.0)
    still.learn(ROWS, callback=lambda _, m: seen.append(m))
    assert seen[1]["kl"] < 1e-9


@pytest.mark.parametrize("name", ["ppo", "d3po"])
def test_drift_is_the_mean_squared_change_of_velocity(name):
    agent = shifted(name)
    rollout = collect(agent.env, agent.policy)
    assert float(agent.drift(rollout, 50).detach()) == pytest.approx(0.3**2, rel=1e-5)
    assert float(probe_agent(name).drift(rollout, 50).detach()) == 0


@pytest.mark.parametrize("name", ["ppo", "d3po"])
def test_anchor_draws_a_moved_model_back(name):
    """With nothing to prefer, only the anchor is left; it needs a tie that is no tie to d3po."""
    answer = (lambda p: right(p).round()) if name == "d3po" else constant(0.5)
    agent = probe_agent(
        name, answer, lr=1e-3, anchor=10.0, **({"beta": 1e-6} if name == "d3po" else {})
    )
    with torch.no_grad():
        agent.model.field.change.out.bias += 0.5
    change = []
    for _ in range(6):
        with torch.no_grad():
            change.append(float(agent.drift(collect(agent.env, agent.policy), 400)))
        agent.learn(ROWS)
    assert change[-1] < 0.9 * change[0] and change == sorted(change, reverse=True), change


def test_mean_reduction_is_the_ratio_of_one_dimension():
    """Loss of ``sum`` and of ``mean`` agree near 1, with log-probabilities and clip range divided by D."""
    seen = []
    for reduction in ("sum", "mean"):
        agent = shifted(
            "ppo", 0.001, reduction=reduction, epochs=1, minibatches=1, anchor=0.0, clip_range=1e-9
        )
        rollout = collect(agent.env, probe_agent("ppo").policy)
        seen.append(agent.update(rollout))
    assert seen[0]["ratio_error"] == pytest.approx(2 * seen[1]["ratio_error"], rel=0.05)
    assert seen[0]["clipped"] == seen[1]["clipped"] > 0.9


# d3po


@pytest.fixture
def d3po(tensors):
    """Golden pairs that are no ties, as (winner's, loser's log-ratios), the rows, and everything."""
    g = {k.removeprefix("d3po_"): v for k, v in tensors("03_policy_losses").items() if "d3po_" in k}
    row = g["h"][:, 0] != 0
    first = g["h"][:, 0] > 0
    ratios = torch.stack([g["logp0"] - g["ref_logp0"], g["logp1"] - g["ref_logp1"]])
    w = torch.where(first, ratios[0], ratios[1])[row]
    l = torch.where(first, ratios[1], ratios[0])[row]
    grads = torch.stack([g["grad_logp0"], g["grad_logp1"]])
    want = torch.where(first, grads, grads.flip(0))[:, row]
    return w, l, row.nonzero()[:, 0].tolist(), want, g


def gradients(w, l, g, clamp):
    """Of the mean over the golden batch of 8, to the winner's and the loser's log-probability."""
    w, l = w.clone().requires_grad_(True), l.clone().requires_grad_(True)
    loss = d3po_loss(w, l, float(g["beta"]), float(g["eps"]), clamp)
    return loss.detach(), torch.stack(torch.autograd.grad(loss.sum() / 8, (w, l)))


def test_two_sided_d3po_loss_and_gradient_match_golden(d3po):
    w, l, rows, want, g = d3po
    loss, grad = gradients(w, l, g, "two-sided")
    close(loss, g["loss_per_sample"][rows])
    close(grad, want)
    ties = [i for i in range(8) if i not in rows]
    close(g["loss_per_sample"][ties], torch.full((len(ties),), math.log(2), dtype=torch.float64))
    close((loss.sum() + len(ties) * math.log(2)) / 8, g["loss"])


def test_one_sided_differs_exactly_where_a_ratio_left_the_band_the_wrong_way(d3po):
    """Row 2: the preferred sample fell to exp(-0.3). Public code: gradient 0; here it is pulled back."""
    w, l, rows, _, g = d3po
    low, high = math.log(1 - float(g["eps"])), math.log(1 + float(g["eps"]))
    loss, grad = gradients(w, l, g, "two-sided")
    other_loss, other_grad = gradients(w, l, g, "one-sided")
    wrong_way = (w < low) | (l > high)
    differs = loss != other_loss
    assert torch.equal(differs, wrong_way)
    assert torch.equal((grad != other_grad).any(0), wrong_way)
    assert [r for r, d in zip(rows, differs.tolist(), strict=True) if d] == [2]
    i, beta = rows.index(2), float(g["beta"])
    assert float(grad[0, i]) == 0.0
    by_hand = -beta / (1 + math.exp(beta * (float(w[i]) - float(l[i])))) / 8
    assert float(other_grad[0, i]) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand == pytest.approx(-0.00635428, rel=1e-5)
    # Row 3: the preferred sample rose to exp(0.3), far enough: at rest in both.
    assert float(w[rows.index(3)]) > high
    assert float(grad[0, rows.index(3)]) == float(other_grad[0, rows.index(3)]) == 0


def test_no_clamp_is_plain_dpo():
    w, l = torch.tensor([3.0, -2.0, 0.0]), torch.tensor([-1.0, 5.0, 0.0])
    close(d3po_loss(w, l, 0.7, 0.1, "none"), (1 + (-0.7 * (w - l)).exp()).log(), 1e-6)


def test_band_of_a_sum_is_as_wide_as_its_dimensions():
    """The golden clamp of each of D equal dimensions, beta shared among them."""
    each = torch.linspace(-0.5, 0.5, 11)
    zero, dim = torch.zeros(11), 6
    for clamp in ("one-sided", "two-sided"):
        one = d3po_loss(each, zero, 0.6, 0.1, clamp)
        close(d3po_loss(dim * each, dim * zero, 0.1, 0.1, clamp, dim), one, 1e-6)
        assert len(one.unique()) < 11, "the band is felt"


def test_preferred_pairs_are_all_that_brute_force_finds():
    rng = torch.Generator().manual_seed(3)
    judgement = (torch.rand(20, 5, generator=rng) * 4).round() / 4
    judgement[torch.rand(20, 5, generator=rng) < 0.2] = math.nan
    w, l = preferred_pairs(judgement, 0.3)
    j = judgement.numpy()
    want = {
        (p * 5 + a, p * 5 + b)
        for p in range(20)
        for a, b in itertools.permutations(range(5), 2)
        if j[p, a] - j[p, b] > 0.3
    }
    got = list(zip(w.tolist(), l.tolist(), strict=True))
    assert set(got) == want and len(got) == len(want) > 50


# hil-dd


def test_listwise_loss_matches_golden(tensors):
    g = tensors("06_hildd_toy")
    d = g["residual_d_f64"][None]
    close(listwise_loss(d, g["labels"].double()[None])[0], g["pref_loss_f64"])
    close(listwise_loss(d, g["label_table"]), g["pref_loss_table_f64"])
    close(listwise_loss(3 * d, g["label_table"], 3.0), g["pref_loss_table_f64"])


def test_barrier_weight_matches_golden(tensors):
    g = tensors("06_hildd_toy")
    dot, square, loss = g["grad_f_dot_g_f64"], g["grad_g_sqnorm_f64"], g["pref_loss_f64"]
    assert float(torch.minimum(loss, square)) == float(g["phi_f64"]), "phi is |grad g|^2 here"
    close(barrier_weight(dot, square, loss), g["barrier_coef_f64"])


def test_barrier_weight_keeps_its_promise():
    """Along ``grad f + lambda grad g`` g falls at least at the rate phi, with the least lambda that does it."""
    rng = torch.Generator().manual_seed(0)
    f, g = torch.randn(2, 200, 6, generator=rng, dtype=torch.float64)
    g[0] = 0
    value = torch.rand(200, generator=rng, dtype=torch.float64) * 12
    dot, square = (f * g).sum(1), g.square().sum(1)
    weight = barrier_weight(dot, square, value)
    phi = torch.minimum(value, square)
    rate = ((f + weight[:, None] * g) * g).sum(1)
    assert bool((rate >= phi - 1e-9).all()) and bool((weight >= 0).all())
    close(rate[weight > 0], phi[weight > 0])
    assert float(weight[0]) == 0 and 5 < int((weight == 0).sum()) < 180
    assert bool((phi < square).any()) and bool((phi == square).any())


def test_step_goes_along_both_gradients():
    """The gradient that the optimiser is given, against one that is put together by hand."""
    agent = probe_agent("hil-dd", lr=0.0)
    x = noises(32)
    t = torch.full((32,), 0.3)

    def losses():
        d = agent.model.residual(x, x.flip(0), t).view(8, 4)
        label = torch.eye(4).repeat(2, 1)
        return agent.model.residual(x, x.roll(1, 0), t).mean(), listwise_loss(d, label).mean()

    metrics = agent.step(*losses())
    got = torch.cat([p.grad.flatten() for p in agent.model.parameters()])
    grads = [
        torch.cat([v.flatten() for v in torch.autograd.grad(loss, list(agent.model.parameters()))])
        for loss in losses()
    ]
    f, g = grads
    value = losses()[1].detach()
    weight = max(float((torch.minimum(value, g @ g) - f @ g) / (g @ g)), 0.0)
    close(got, f + weight * g, 1e-6)
    assert metrics["barrier"] == pytest.approx(weight, rel=1e-4)
    assert metrics["preference_loss"] == pytest.approx(float(value), rel=1e-6)


def test_residuals_average_the_flow_residual_over_times():
    agent = probe_agent("hil-dd", times=4, horizon=0.6)
    noise, sample = noises(10), noises(20)[10:]
    want = torch.zeros(10)
    for t in (0.0, 0.15, 0.3, 0.45):
        x = (1 - t) * noise + t * sample
        v = agent.model.velocity(x, t)
        want += (v - (sample - noise)).square().mean(1) / 4
    close(agent.residuals(noise, sample), want, 1e-5)


def test_choice_labels():
    nan = math.nan
    judgement = torch.tensor(
        [
            [0.9, 0.1, 0.6, 0.2],
            [0.1, 0.2, 0.3, 0.4],
            [0.5, 0.6, 0.7, 0.8],
            [nan] * 4,
            [0.9, nan, 0.1, 0.2],
        ]
    )
    label, informative = choice_labels(judgement, 0.5)
    assert label[0].tolist() == [0.5, 0, 0.5, 0] and informative.tolist() == [True] + [False] * 4
    assert label[2].sum() == 1 and not label[[1, 3]].any()


@pytest.mark.parametrize(
    "judgement",
    [[0.9, 0.8, 0.6, 0.5], [0.1, 0.2, 0.3, 0.4], [math.nan] * 4, [0.9, math.nan, 0.1, 0.2]],
    ids=["all-chosen", "none-chosen", "no-answer", "half-answered"],
)
def test_uninformative_panels_leave_hil_dd_as_it_was(judgement):
    agent = probe_agent("hil-dd")
    before = weights(agent.model)
    metrics = agent.update(a_rollout(noises(8), judgement * 2))
    assert metrics == {"informative": 0.0} and same(before, weights(agent.model))
    told = agent.update(a_rollout(noises(8), [0.9, 0.8, 0.6, 0.1] * 2))
    assert told["informative"] == 2 and not same(before, weights(agent.model))


# pfm


@pytest.mark.parametrize("sigma", ["0", "0.1", "0.5"])
def test_pfm_points_match_golden(tensors, sigma):
    g = tensors("07_pfm")
    y_t, u = pfm_point(g["y_minus"], g["y_plus"], g["t"], float(sigma), g["eps"])
    close(y_t, g[f"pair_sigma{sigma}_y_t"])
    close(u, g["pair_u_t"])
    back, against = pfm_point(g["y_plus"], g["y_minus"], g["t"], float(sigma), g["eps"])
    close(back, g[f"reversed_as_in_loaders_sigma{sigma}_y_t"])
    close(against, g["reversed_as_in_loaders_u_t"])


def test_pfm_flows_from_rejected_to_preferred_and_the_loaders_do_not(tensors):
    """What ``fit`` fed its network: the paper's direction makes progress, the released loaders' goes back."""
    g = tensors("07_pfm")
    forth = g["y_plus"] - g["y_minus"]
    sides = {
        "paper_direction": ("y_minus", "y_plus"),
        "as_called_by_loaders": ("y_plus", "y_minus"),
    }
    progress = {}
    for case, (source, target) in sides.items():
        y0 = g[source][g[f"{case}_fit_source_row"]]
        y1 = g[target][g[f"{case}_fit_target_row"]]
        y_t, u = pfm_point(y0, y1, g[f"{case}_fit_t"], 0.0, torch.zeros_like(y0))
        close(y_t, g[f"{case}_fit_y_t"])
        close(u, g[f"{case}_fit_u_t"])
        close(pfm_loss(torch.zeros_like(u), u).mean(), g[f"{case}_fit_loss"])
        axis = forth.mean(0) / forth.mean(0).norm()
        progress[case] = float((u @ axis).mean()), float(g[f"{case}_fit_mean_progress"])
    ours, theirs = zip(*progress.values(), strict=True)
    assert ours[0] > 0 > ours[1] and theirs[0] > 0 > theirs[1]


def test_transport_pairs_match_golden_and_brute_force(tensors):
    g = tensors("07_pfm")
    y0, y1 = transport_pairs(g["y_minus"], g["y_plus"])
    plan = g["ot_plan_yminus_to_yplus"]
    rows = [(g["y_minus"] == row).all(1).nonzero().item() for row in y0]
    columns = [(g["y_plus"] == row).all(1).nonzero().item() for row in y1]
    assert sorted(rows) == sorted(columns) == list(range(6)), "a permutation: every row once"
    assert bool((plan[rows, columns] > 0.16).all()), "the exact plan's support"
    cost = torch.cdist(g["y_minus"], g["y_plus"]).square().numpy()
    best = min(sum(cost[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6)))
    assert float((y1 - y0).square().sum()) == pytest.approx(best, rel=1e-9)
    assert float((g["y_plus"] - g["y_minus"]).square().sum()) > best + 1e-3, "re-pairing is felt"


def test_transport_pairs_of_whole_shapes():
    source, target = torch.randn(2, 9, 4, 2)
    y0, y1 = transport_pairs(source, target)
    assert y0.shape == y1.shape == (9, 4, 2)
    assert torch.equal(y1.flatten(1).sort(0)[0], target.flatten(1).sort(0)[0])


def pool_of(judgement, **settings):
    """Rows of the samples that became sources and targets; every sample is its row's number."""
    agent = probe_agent("pfm", updates=1, **settings)
    samples = torch.arange(float(len(judgement)))[:, None].expand(-1, 2).contiguous()
    agent.update(a_rollout(samples, judgement))
    return tuple(agent.pool[k][:, 0].int().tolist() for k in ("source", "target"))


# Two panels; 0.02 apart is a tie.
TWO = [0.9, 0.1, 0.11, 0.6, 0.2, math.nan, 0.4, 0.45]


def test_pairs_of_one_panel_keep_their_order():
    source, target = pool_of(TWO, coupling="pair", margin=False)
    pairs = {(0, 1), (0, 2), (0, 3), (3, 1), (3, 2), (6, 4), (7, 4)}
    assert set(zip(target, source, strict=True)) == pairs and len(target) == 7
    source, target = pool_of(TWO, coupling="pair")
    assert set(zip(target, source, strict=True)) == {p for p in pairs if p[0] in (0, 3)}, (
        "the margin"
    )


@pytest.mark.parametrize("coupling", ["pool", "ot"])
def test_pools_hold_every_preferred_and_every_rejected_sample_once(coupling):
    source, target = pool_of(TWO, coupling=coupling, margin=False)
    assert sorted(target) == [0, 3, 6, 7] and sorted(source) == [1, 2, 3, 4]
    assert pool_of(TWO, coupling=coupling)[1] == [0, 3]


def test_sources_may_be_any_sample_of_the_reference():
    assert pool_of(TWO, coupling="pool", source="reference")[0] == list(range(8))
    source, target = pool_of(TWO * 50, coupling="pair", source="reference", margin=False)
    assert len(source) == len(target) == 7 * 50
    assert len(set(source)) > 150 and max(source) > 300, "from all rows"
    in_panel = [s // 4 == t // 4 for s, t in zip(source, target, strict=True)]
    assert sum(in_panel) < 60, "not from the pair's own panel"


@pytest.mark.parametrize("coupling", ["pair", "pool", "ot"])
@pytest.mark.parametrize("source", ["reference", "rejected"])
def test_every_coupling_moves_toward_the_preferred(coupling, source):
    for answer, sign in ((right, 1), (left, -1)):
        agent = probe_agent("pfm", answer, coupling=coupling, source=source)
        agent.learn(4 * ROWS)
        y = agent.reference.integrate(noises(500), 8)
        moved = agent.sample(noises(500)) - y
        assert sign * float(moved[:, 0].mean()) > 0.2
        assert sign * (share(agent) - 0.5) > 0.25


def test_chain_is_the_reference_and_then_the_flows():
    agent = probe_agent("pfm", applications=3)
    assert len(agent.chain()) == 1 and agent.chain()[0] is agent.reference
    untouched = weights(agent.reference)
    assert torch.equal(
        agent.sample(noises(50)), agent.env.policy(agent.reference).sample(noises(50))
    )
    agent.learn(ROWS)
    chain = agent.chain()
    assert len(chain) == 4 and chain[0] is agent.reference
    assert all(flow is agent.model for flow in chain[1:])
    x = noises(50)
    for flow in chain:
        x = flow.integrate(x, 8)
    close(agent.sample(noises(50)), x.detach(), 1e-5)
    assert same(untouched, weights(agent.reference))


@pytest.mark.parametrize("warm_start", [True, False])
def test_iteration_freezes_asks_again_and_starts_anew(warm_start):
    agent = probe_agent("pfm", iterate=2, applications=2, warm_start=warm_start, updates=5)
    agent.learn(2 * ROWS)
    assert (
        len(agent.frozen_flows) == 1 and len(agent.chain()) == 3 and not len(agent.pool["target"])
    )
    frozen = [v.clone() for v in agent.frozen_flows[0].values()]
    fresh = weights(agent.model)
    assert same(fresh, weights(agent.reference)) is warm_start and not same(fresh, frozen)
    agent.learn(ROWS)
    assert len(agent.chain()) == 5
    agent.learn(ROWS)
    assert len(agent.frozen_flows) == 2 and len(agent.chain()) == 5
    assert same(frozen, list(agent.frozen_flows[0].values())), "a frozen flow stays as it is"
    x = noises(ROWS)
    policy = agent.behaviour()
    for i in range(agent.env.steps):
        x, log_prob = policy.act(x, i)
        assert log_prob is None
    close(x, agent.sample(noises(ROWS)), 1e-5)
    assert float((x - agent.env.policy(agent.reference).sample(noises(ROWS))).abs().max()) > 0.1


def test_fresh_flows_do_not_depend_on_the_global_generator():
    models = []
    for seed in (1, 2):
        agent = probe_agent("pfm", iterate=1, warm_start=False, updates=2)
        torch.manual_seed(seed)
        agent.learn(2 * ROWS)
        models.append(weights(agent.model))
    assert same(*models)
    assert not same(models[0], weights(probe_agent("pfm", warm_start=False).model)), "each its own"


def test_evaluations_of_frozen_flows_are_booked():
    agent = probe_agent("pfm", iterate=1, applications=2, updates=3)
    ledger = agent.env.ledger
    for frozen in range(3):
        before, booked = ProbeVelocity.evaluated, ledger.nfe
        agent.learn(ROWS)
        assert ProbeVelocity.evaluated - before == ledger.nfe - booked
        assert ledger.nfe - booked == ROWS * 8 * (1 + 2 * frozen) + 3 * agent.config.batch


def test_no_applications_are_refused():
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        probe_agent("pfm", applications=0)


def test_refined_is_the_reference_until_its_last_step():
    env, _ = probe_env(num_envs=ROWS)
    agent = probe_agent("pfm", env=env)
    agent.learn(2 * ROWS)
    policy = Refined(agent.reference, [agent.model], env.steps, env.task.shift)
    x = noises(20)
    for i in range(env.steps):
        plain, _ = env.reference.act(x, i, deterministic=True)
        x, _ = policy.act(x, i)
        assert torch.allclose(plain, x, atol=1e-6) is (i < env.steps - 1)
    close(x, agent.sample(noises(20)), 1e-5)
