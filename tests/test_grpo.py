"""``grpo``: golden numbers of Flow-GRPO, DanceGRPO, GRPO-Guard and Precise; brute force; windows that slide."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from probes import ROWS, close, noises, probe_agent, share
from torch.distributions import Independent, Normal, kl_divergence

import agents.grpo
from agents.grpo import divergence_loss, group_advantages, guard_loss
from agents.ppo import gaussian_kl, ppo_loss
from prefenv.envs import FlowVectorEnv
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel, gaussian_log_prob
from prefenv.rollout import collect
from prefenv.testing.probe import Probe, ProbeOracle, ProbeVelocity, probe_env


@pytest.fixture
def g(tensors):
    return tensors("03_policy_losses")


@pytest.fixture
def step(g):
    """One stochastic step of 4 rows and D = 32: std, h, our log-ratio and KL to the old policy, and everything."""
    std = (g["grpo_s"] * g["grpo_sqrt_neg_dt"]).expand(4)
    mean = g["grpo_mean"].clone().requires_grad_(True)
    wide = std.view(4, 1, 1, 1)
    log_prob = gaussian_log_prob(g["grpo_prev_sample"], mean, wide)
    old = gaussian_log_prob(g["grpo_prev_sample"], g["grpo_mean_old"], wide)
    kl_old = gaussian_kl(mean, g["grpo_mean_old"], wide)
    return mean, std, g["grpo_sqrt_neg_dt"].square().expand(4), log_prob, old, kl_old, g


def panels_of(prompts, values):
    """Values of one prompt as one panel, filled up with NaN; and where each value went."""
    out = torch.full((int(prompts.max()) + 1, len(prompts)), math.nan, dtype=values.dtype)
    place = (prompts, torch.arange(len(prompts)))
    out[place] = values
    return out, place


# Advantages


@pytest.mark.parametrize(
    ("spread", "name"),
    [("group", "flowgrpo_adv_grpo"), ("global", "flowgrpo_adv_grpo_globalstd")],
)
def test_flow_grpo_advantages_match_golden(g, spread, name):
    panels, place = panels_of(g["ddpo_prompts_1"], g["ddpo_rewards_1"])
    advantage = group_advantages(panels, 1e9, spread)
    close(advantage[place], g[name])
    assert float(advantage[panels.isnan()].abs().max()) == 0


def test_dance_advantages_match_golden(g):
    panels = g["dance_rewards"].view(-1, int(g["dance_num_generations"]))
    close(group_advantages(panels, 1e9, "unbiased").flatten(), g["dance_adv"])


@pytest.mark.parametrize("spread", ["group", "global", "unbiased"])
def test_advantages_are_what_brute_force_finds(spread):
    rng = np.random.default_rng(1)
    panels = rng.normal(size=(60, 5))
    panels[rng.random((60, 5)) < 0.3] = np.nan
    panels[0], panels[1, 1:] = np.nan, np.nan
    got = group_advantages(torch.as_tensor(panels), 1.3, spread).numpy()
    everything = panels[~np.isnan(panels)]
    clipped = 0
    for row, out in zip(panels, got, strict=True):
        seen = ~np.isnan(row)
        assert (out[~seen] == 0).all()
        if spread == "global":
            scale = everything.std() + 1e-4
        elif spread == "group":
            scale = row[seen].std() + 1e-4 if seen.any() else 1.0
        else:
            scale = row[seen].std(ddof=1) + 1e-8 if seen.sum() > 1 else 1.0
        want = (row[seen] - row[seen].mean()) / scale if seen.any() else row[seen]
        clipped += int((np.abs(want) > 1.3).sum())
        np.testing.assert_allclose(out[seen], want.clip(-1.3, 1.3), rtol=1e-12, atol=1e-15)
    assert clipped > 3


@pytest.mark.parametrize("spread", ["group", "global", "unbiased"])
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3])
def test_a_tie_has_no_advantage_at_all(spread, value):
    for k in (2, 3, 4, 7):
        assert torch.equal(
            group_advantages(torch.full((5, k), value), 5.0, spread), torch.zeros(5, k)
        )
    silent = torch.full((3, 4), math.nan)
    assert torch.equal(group_advantages(silent, 5.0, spread), torch.zeros(3, 4))


# The clipped ratio and the KL


def test_ratio_and_policy_loss_match_golden(step):
    """Golden log-probabilities are means over D = 32, ours are sums: the ratio is the D-th power."""
    _, _, _, log_prob, old, _, g = step
    close((log_prob / 32).detach(), g["grpo_logp"])
    close(old / 32, g["grpo_old_logp"])
    close(((log_prob - old) / 32).exp().detach(), g["grpo_ratio"])
    clip = float(g["grpo_clip_range"])
    loss = ppo_loss(g["grpo_logp"], g["grpo_old_logp"], g["grpo_advantages"], clip)
    close(loss.mean(), g["grpo_policy_loss"])


def test_coded_kl_is_not_the_gaussian_one(step):
    """Flow-GRPO divides by s^2 without the step's length h and by D; its Wan script by D only."""
    mean, std, h, _, _, _, g = step
    true = gaussian_kl(mean.detach(), g["grpo_mean_ref"], std.view(4, 1, 1, 1))
    close(true, g["true_gaussian_kl_per_sample_summed"])
    wide = std.view(4, 1, 1, 1).expand_as(mean)
    ours, reference = (Independent(Normal(m.detach(), wide), 3) for m in (mean, g["grpo_mean_ref"]))
    close(true, kl_divergence(ours, reference))
    close((true * h / 32).mean(), g["grpo_kl_coded"])
    close((true / 32).mean(), g["wan_kl_coded"])
    assert float(true.mean()) == pytest.approx(0.15217617, rel=1e-6)
    assert float(g["grpo_kl_coded"]) == pytest.approx(0.00066577, rel=1e-5)


def test_gradient_of_the_whole_loss_matches_golden(step):
    """Policy loss plus beta times the coded KL, by our functions: beta h / D of the true one."""
    mean, std, h, log_prob, old, _, g = step
    advantage, clip = g["grpo_advantages"], float(g["grpo_clip_range"])
    loss = ppo_loss(log_prob / 32, old / 32, advantage, clip).mean()
    kl = gaussian_kl(mean, g["grpo_mean_ref"], std.view(4, 1, 1, 1))
    loss = loss + float(g["grpo_beta"]) * (kl * h / 32).mean()
    close(loss.detach(), g["grpo_loss"])
    close(torch.autograd.grad(loss, mean)[0], g["grpo_grad_mean"])


# GRPO-Guard and Precise


def guarded(log_prob, old, kl_old, std, h, g):
    """Our loss on the golden step, averaged over D as there."""
    clip = float(g["grpo_clip_range"])
    return guard_loss((log_prob - old) / 32, g["grpo_advantages"], kl_old / 32, std, h, clip)


def test_guard_matches_golden_row_by_row(step):
    _, std, h, log_prob, old, kl_old, g = step
    close((kl_old / 32).detach(), g["guard_ratio_mean_bias_rowwise"])
    close((std * (log_prob - old + kl_old) / 32).exp().detach(), g["guard_ratio_rowwise"])
    close(guarded(log_prob, old, kl_old, std, h, g).detach(), g["guard_policy_loss_rowwise"])
    wide = 1e9
    ratio = guard_loss((log_prob - old) / 32, torch.ones(4), kl_old / 32, std, torch.ones(4), wide)
    close(-ratio.detach(), g["guard_ratio_rowwise"])


def test_public_guard_averages_its_bias_over_the_batch(step):
    """Both numbers: 2.52251 as coded, 2.52271 as meant; and the coded gradient, through the bias too."""
    mean, std, h, log_prob, old, kl_old, g = step
    ours = guarded(log_prob, old, kl_old, std, h, g).mean()
    coded = guarded(log_prob, old, kl_old.mean().expand(4), std, h, g).mean()
    close(coded.detach(), g["guard_policy_loss"])
    close(ours.detach(), g["guard_policy_loss_rowwise"].mean())
    assert abs(float(ours.detach() - coded.detach())) > 1e-4
    close((std * ((log_prob - old) / 32 + kl_old.mean() / 32)).exp().detach(), g["guard_ratio"])
    kl = gaussian_kl(mean, g["grpo_mean_ref"], std.view(4, 1, 1, 1))
    whole = coded + float(g["grpo_beta"]) * (kl * h / 32).mean()
    close(whole.detach(), g["guard_loss"])
    close(torch.autograd.grad(whole, mean)[0], g["guard_grad_mean"])


def test_precise_is_the_guard_divided_by_the_velocitys_weight(step):
    """Its FLUX.2 adapter; ``|dm / dv|`` is our kernel's ``b``."""
    _, std, _, log_prob, old, kl_old, g = step
    weight = g["precise_abs_dmean_dv"].expand(4)
    loss = guarded(log_prob, old, kl_old, std, weight, g)
    close(loss.mean().detach(), g["precise_flux2_policy_loss"])
    close((std * (log_prob - old + kl_old) / 32).exp().detach(), g["precise_flux2_ratio"])
    t, u = 1 - float(g["grpo_sigma"]), 1 - float(g["grpo_sigma_next"])
    _, b, noise = Kernel("flow-sde", 0.7).coefficients(t, u)
    close(b, g["precise_abs_dmean_dv"])
    close(noise, std[0])


def test_guard_ratio_of_a_sum_is_the_noise_times_the_move():
    """``std (log ratio + |dm|^2 / 2 std^2) = z . dm``: no bias, whatever the std."""
    rng = torch.Generator().manual_seed(0)
    z, move = torch.randn(2, 6, 5, generator=rng, dtype=torch.float64)
    std = torch.linspace(0.1, 2, 6, dtype=torch.float64)[:, None]
    old = torch.zeros(6, 5, dtype=torch.float64)
    x = old + std * z
    log_ratio = gaussian_log_prob(x, move, std) - gaussian_log_prob(x, old, std)
    one = torch.ones(6, dtype=torch.float64)
    loss = guard_loss(log_ratio, -one, gaussian_kl(move, old, std), std[:, 0], 0.5 * one, 1e9)
    close(loss.log(), (z * move).sum(1) - math.log(0.5))


# Flow-DPPO


def test_divergence_leaves_out_only_what_moves_on_too_far():
    log_ratio = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.3, -0.3], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 0.0])
    kl_old = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.49, 0.5])
    loss = divergence_loss(log_ratio, advantage, kl_old, 0.5)
    up, down = math.exp(0.3), math.exp(-0.3)
    close(loss.detach(), torch.tensor([0.0, up, 0.0, -down, -up, 0.0]), 1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
    close(grad, loss.detach(), 1e-6)


def test_divergence_has_no_clip():
    """A ratio far away, whose density has not moved, is learned from; the clip would stop it."""
    log_ratio = torch.tensor([2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(
        divergence_loss(log_ratio, torch.ones(1), torch.zeros(1), 0.1), log_ratio
    )
    assert float(grad) == pytest.approx(-math.exp(2))
    (grad,) = torch.autograd.grad(
        ppo_loss(log_ratio, torch.zeros(1), torch.ones(1), 0.2), log_ratio
    )
    assert float(grad) == 0


# The agent


def gradient(agent, rollout):
    """What one whole-batch update does to the weights' gradients (lr 0)."""
    metrics = agent.update(rollout)
    return torch.cat([p.grad.flatten() for p in agent.model.parameters()]), metrics


STILL = {
    "lr": 0.0,
    "epochs": 1,
    "minibatches": 1,
    "anchor": 0.0,
    "kl_coef": 0.0,
    "max_grad_norm": 1e9,
}


def test_first_gradient_of_every_trust_is_the_policy_gradient():
    """At the old policy: ``-A d log p``; guarded, ``-A z . dm / h``, with z and m put together by hand."""
    agents = {t: probe_agent("grpo", trust=t, **STILL) for t in ("clip", "divergence", "guard")}
    rollout = collect(agents["clip"].env, agents["clip"].policy)
    grads = {t: gradient(a, rollout)[0] for t, a in agents.items()}
    torch.testing.assert_close(grads["clip"], grads["divergence"], rtol=1e-4, atol=1e-6)
    assert float(grads["clip"].norm()) > 1e-3
    agent = agents["clip"]
    steps = agent.policy.stochastic_steps
    batch = rollout.transitions(steps)
    a, b, std = (c.float()[batch.index][:, None] for c in agent.policy.table)
    t = batch.index / agent.env.steps
    mean = a * batch.x + b * agent.model.velocity(batch.x, t)
    z = ((batch.x_next - mean) / std).detach()
    advantage = group_advantages(rollout.panels(rollout.judgement), 5.0, "global").flatten()
    for trust, scale in (("clip", 1 / std), ("guard", torch.full_like(std, agent.env.steps))):
        loss = -(advantage[batch.row, None] * z * mean * scale).sum(1).mean()
        by_hand = torch.autograd.grad(loss, list(agent.model.parameters()), retain_graph=True)
        flat = torch.cat([x.flatten() for x in by_hand])
        torch.testing.assert_close(grads[trust], flat, rtol=1e-3, atol=1e-5)


def test_the_panel_is_the_group():
    """What is added to a whole panel's judgements changes nothing; ppo's advantage is the round's."""
    made = collect(probe_env(num_envs=ROWS)[0], probe_agent("grpo").policy)
    made.judgement = (torch.arange(ROWS) * 7 % 5) / 4
    lifted = collect(probe_env(num_envs=ROWS)[0], probe_agent("grpo").policy)
    lifted.judgement = made.judgement + torch.arange(ROWS // 4).repeat_interleave(4)
    for name, settings, alike in (("grpo", {"spread": "group"}, True), ("ppo", {}, False)):
        grads = []
        for rollout in (made, lifted):
            assert torch.equal(rollout.path, made.path)
            grads.append(gradient(probe_agent(name, **STILL, **settings), rollout)[0])
        assert torch.allclose(*grads, rtol=1e-4, atol=1e-6) is alike


def test_kl_is_the_closed_form_of_a_shifted_model():
    """A velocity moved by c moves a step's mean by ``b c``; what is far from the reference is drawn back."""
    agent = probe_agent("grpo", **{**STILL, "kl_coef": 0.1})
    with torch.no_grad():
        agent.model.field.change.out.bias += 0.3
    rollout = collect(agent.env, agent.policy)
    rollout.judgement = torch.zeros(ROWS)
    grad, metrics = gradient(agent, rollout)
    _, b, std = agent.policy.table
    want = np.mean(
        [(float(b[i]) * 0.3 / float(std[i])) ** 2 for i in agent.policy.stochastic_steps]
    )
    assert metrics["kl"] == pytest.approx(want, rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.1 * want, rel=1e-4)
    bias = agent.model.field.change.out.bias.grad
    close(bias, torch.full((2,), 0.1 * want / 0.3), 1e-4)


VARIANTS = [
    {"kernel": Kernel("constant", 0.5), "spread": "unbiased", "kl_coef": 0.0},
    {"kernel": Kernel("cps", 0.7)},
    {"kernel": Kernel("precise", 1.0), "spread": "group"},
    {"trust": "guard", "anchor": 1.0},
    {"trust": "divergence", "divergence": 0.1},
    {"slide": 1, "window": 2, "kernel": Kernel("flow-sde", 0.7, (0.0, 0.5))},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(s))
def test_every_variant_learns_and_books_what_it_spends(settings):
    seen = []
    agent = probe_agent("grpo", **{"lr": 5e-3, **settings})
    before = ProbeVelocity.evaluated
    agent.learn(12 * ROWS, callback=lambda _, m: seen.append(m))
    assert ProbeVelocity.evaluated - before == agent.env.ledger.nfe
    assert share(agent) > 0.8
    assert all(m["ratio_error"] < 1e-3 for m in seen)


def test_window_slides_in_a_circle():
    kernel = Kernel("flow-sde", 0.7, (0.0, 0.7))  # 6 of 8 steps
    agent, seen = probe_agent("grpo", slide=2, window=4, kernel=kernel), []

    for agent.rounds in range(8):
        rollout = collect(agent.env, agent.behaviour())
        seen.append(rollout.log_prob.ne(0).any(1).nonzero()[:, 0].tolist())
        assert agent.update(rollout)["ratio_error"] < 1e-3
    first, second, third = [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]
    assert seen == [first, first, second, second, third, third, first, first]
    still = probe_agent("grpo", kernel=kernel)
    assert still.behaviour() is still.policy and still.policy.stochastic_steps == list(range(6))


def test_window_slides_over_the_steps_that_have_noise():
    """On a grid that is not uniform, with a kernel whose last step has none, and a window that is too large."""
    task, reference = replace(Probe(), shift=2.0), RectifiedFlow(ProbeVelocity())
    env = FlowVectorEnv(
        ROWS,
        task=task,
        oracle=ProbeOracle(task),
        reference=reference,
        panel_size=4,
        steps=8,
        device="cpu",
    )
    agent = probe_agent("grpo", env=env, slide=1, window=3, kernel=Kernel("cps", 0.5, (0.2, 1.0)))
    steps = agent.frozen.stochastic_steps
    assert steps[-1] == 6 and agent.frozen.times[steps[0]] >= 0.2
    for start in range(len(steps) - 2):
        agent.rounds = start
        assert agent.behaviour().stochastic_steps == steps[start : start + 3]
    agent.rounds = len(steps) - 2
    assert agent.behaviour().stochastic_steps == steps[:3]
    wide = probe_agent("grpo", slide=1, window=99)
    wide.rounds = 5
    assert wide.behaviour().stochastic_steps == wide.frozen.stochastic_steps


def test_sliding_goes_on_after_a_save(tmp_path):
    settings = {"slide": 1, "window": 2, "trust": "guard"}
    whole = probe_agent("grpo", **settings).learn(4 * ROWS)
    agent = probe_agent("grpo", **settings).learn(2 * ROWS)
    agent.save(tmp_path / "a.zip")
    loaded = type(agent).load(tmp_path / "a.zip", probe_env(num_envs=ROWS)[0]).learn(2 * ROWS)
    assert torch.equal(whole.sample(noises()), loaded.sample(noises()))


@pytest.mark.parametrize(
    "wrong",
    [{"spread": "all"}, {"trust": "me"}, {"slide": -1}, {"window": 0}],
    ids=lambda w: next(iter(w)),
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        probe_agent("grpo", **wrong)


def test_a_kernel_without_noise_is_refused():
    for kernel in (Kernel("flow-sde", 0.0), Kernel("flow-sde", 0.7, (0.3, 0.3))):
        with pytest.raises(ConfigError, match="needs a step with noise"):
            probe_agent("grpo", kernel=kernel)


def test_anchor_leaves_alone_what_another_round_trains():
    """A step of the kernel's window is not drawn back in the rounds that make it without noise."""
    kernel = Kernel("flow-sde", 0.7, (0.0, 0.5))
    agent = probe_agent("grpo", slide=1, window=1, kernel=kernel, lr=0.0, kl_coef=0.0)
    anchored, drawn = [], agent.reference.velocity

    def watch(x, t, condition=None):
        anchored.extend(t.tolist())
        return drawn(x, t, condition)

    agent.reference.velocity = watch
    agent.learn(3 * ROWS)
    assert set(anchored) == {0.5, 0.625, 0.75, 0.875}


@pytest.mark.parametrize("trust", ["guard", "divergence"])
def test_distance_to_the_old_policy_is_that_of_the_model_that_collected(trust, monkeypatch):
    """0 in the first step of a round; then from the means that the weights had before it."""
    agent = probe_agent("grpo", trust=trust, lr=5e-3, minibatches=1, epochs=3)
    name, seen = f"{trust}_loss", []
    objective = getattr(agents.grpo, name)

    def watch(log_ratio, advantage, kl_old, *rest):
        t = torch.cat([torch.full((ROWS,), i / 8) for i in steps])
        with torch.no_grad():
            gap = agent.model.velocity(x, t) - old.velocity(x, t)
        _, b, std = (c.float()[steps].repeat_interleave(ROWS)[:, None] for c in agent.policy.table)
        want = (b * gap / std).square().sum(1) / 2
        seen.append((kl_old.detach().sort().values, want.sort().values))
        return objective(log_ratio, advantage, kl_old, *rest)

    agent.learn(2 * ROWS)
    monkeypatch.setattr(agents.grpo, name, watch)
    steps, old = agent.policy.stochastic_steps, agent.model.clone()
    rollout = collect(agent.env, agent.behaviour())
    x = rollout.transitions(steps).x
    agent.update(rollout)
    assert [float(got.max()) > 1e-6 for got, _ in seen] == [False, True, True]
    for got, want in seen:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
