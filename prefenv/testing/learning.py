"""Checks of how an agent learns: each one catches a defect that was published. Used by ``check_agent``.

Agents on the probe are asked to learn from answers whose effect is known: opposite ones, equal ones, few, whole
numbers. For agents on log-probabilities, ``Look`` sees which recorded states the update asks about and what
gradient each of them gets.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from prefenv.errors import ConfigError
from prefenv.testing.data import ContractError, need
from prefenv.testing.probe import (
    Answer,
    ConditionalProbe,
    ProbeVelocity,
    constant,
    left,
    right,
    turn,
)
from prefenv.testing.trial import ROUNDS, ROWS, Look, Trial, noises

SEEDS, MANY = range(4), 64
NOT_MOVED = "for agents that learn anything, see model"
NO_LOG_PROB = "for agents that require log_prob and learn in update()"


def model(trial: Trial) -> None:
    """Answers that differ move the samples: the gradient at the reference is not zero."""
    need(
        trial.moved > 0,
        "judgements that differ left the samples as they were: the gradient at the reference is zero (the "
        "log-probability of a deterministic sample has none there, nor has |v - v_ref|^2), the optimiser does not "
        "hold self.model's parameters, or chain() does not hold what was trained",
    )


def gain(trial: Trial, answer: Answer, seed: int, rounds: int) -> float:
    """By how much the samples' mean score, how far they lie to the right, rises in so many rounds."""
    agent, _ = trial.make(seed=seed, answer=answer, rows=MANY)
    noise = noises(512)
    before = right(agent.sample(noise)).mean()
    agent.learn(rounds * agent.env.num_envs)
    return float(right(agent.sample(noise)).mean() - before)


def clear(gaps: list[float]) -> bool:
    """All positive, and alike: four draws of noise are so in one case of a hundred."""
    return min(gaps) > max(gaps) / 3 > 0


def direction(trial: Trial) -> str | None:
    """What is preferred becomes more frequent, and less where the preference is reversed."""
    if not trial.moved:
        return NOT_MOVED
    up, down, gaps = [], [], []
    for rounds in (3, 12):  # what is not clear at once gets a longer chance
        up, down = (
            [gain(trial, answer, seed, rounds) for seed in SEEDS] for answer in (right, left)
        )
        gaps = [u - d for u, d in zip(up, down, strict=True)]
        need(
            any(gaps),
            "opposite answers taught it the very same: its labels are constant; let rollout.judgement decide "
            "which sample is the preferred one",
        )
        if clear(gaps) and sum(up) > 0 > sum(down):
            return None
    need(
        not clear([-g for g in gaps]),
        "it moves away from what is preferred: the loss has the wrong sign, or its pairs are reversed; the "
        "preferred sample comes first, and a descent step must make it more likely",
    )
    need(
        clear(gaps),
        "what is preferred does not become more frequent: judgements do not stay with their samples (weights left "
        "behind by a shuffle, a coupling that re-samples, winners paired with winners), or the gradient is lost",
    )
    raise ContractError(
        "it moves the same way whichever way the preference goes: something besides the judgements drives it"
    )


def ties(trial: Trial) -> str | None:
    """Equal answers, which have no order and no gradient, teach nothing."""
    requires = trial.cls.requires
    compares = requires.panel_size > 1 or requires.gradient
    if not compares and not trial.log_probs:
        return "for agents that learn by comparison, reward gradient or log-probability"
    if not trial.moved:
        return NOT_MOVED
    for value in (0.0, 0.3, 0.7) if compares else (0.0,):
        share = trial.learn(ROUNDS, answer=constant(value)).moved() / trial.moved
        need(
            share <= 0.01,
            f"answers that are all {value} moved the samples by {share:.0%} of what informative ones do: "
            "a tie has no winner and an advantage of zero no gradient; leave tied pairs and panels out",
        )
    return None


def replay(trial: Trial) -> str | None:
    """Recorded states are asked about at the times at which they were sampled."""
    if not trial.updates:
        return "for agents that learn in update()"
    look = trial.look(right)
    if look.stray is not None:
        step, own, asked = look.stray
        raise ContractError(
            f"the state of step {step} was sampled at t = {own:.4g} and is asked about at t = {asked:.4g}: "
            "sampling and training walk two grids of times; take self.policy.times"
        )
    need(
        not trial.log_probs or bool(look.points().any()),
        "it requires log-probabilities, but does not ask the model about the recorded states: "
        "rollout.transitions() has them, with their steps",
    )
    return None


def ratio(trial: Trial) -> str | None:
    """Before the first step the ratio of new to old likelihood is 1."""
    error = trial.run.metrics[0].get("ratio_error", 0.0)
    need(
        error < 1e-3,
        f"ratio_error is {error:.2g} before the first step, not 0: the model that collected and the model "
        "that is asked afterwards must say the same log-probability of the same step",
    )
    if not trial.log_probs:
        return NO_LOG_PROB
    error = trial.look(right).ratio_error
    need(
        error < 1e-3,
        f"self.policy's log-probabilities of the recorded steps are off by {error:.2g} before the first step: "
        "behaviour() and self.policy must have one kernel and one model",
    )
    return None


def few(panels: Tensor) -> Tensor:
    """The first four samples are judged, the others not."""
    rows = torch.arange(panels.shape[0] * panels.shape[1]).view(panels.shape[:2])
    return right(panels).masked_fill(rows >= 4, torch.nan)


def rating(panels: Tensor) -> Tensor:
    """Whole numbers 1 to 5, equally often, by the height of the sample."""
    return 1 + (5 * torch.special.ndtr(panels[..., 1] / 0.3)).floor().clamp(0, 4)


def credit(trial: Trial) -> str | None:
    """A judgement teaches the steps of its own sample, and no other's."""
    if not trial.log_probs:
        return NO_LOG_PROB
    look = trial.look(few)
    own, others = (force.sum() for force in look.force().tensor_split((4,), 1))
    need(
        float(others) <= 1e-4 * float(own),
        "one panel was judged, and the gradient fell on others: rewards left their samples on the way; index them "
        "with the same rows (transitions().row) as the states",
    )
    if trial.cls.requires.gradient:
        return None
    look = trial.look(rating, rows=MANY)
    judged = look.rollout.judgement
    panel = look.rollout.panels(judged).mean(1).repeat_interleave(look.rollout.panel_size)
    gap = (judged - judged.mean()).abs() / judged.std()
    between = look.points() & (gap > 0.3) & (gap < 0.95) & ((judged - panel).abs() > 0.4)
    lost = float((look.force()[between] == 0).float().mean()) if bool(between.any()) else 0.0
    need(
        lost < 0.6,
        f"with whole-number ratings, 1 to 5, {lost:.0%} of the steps whose rating is less than a deviation "
        "from the mean get no gradient: advantages are cut to whole numbers; compute them in floating point",
    )
    return None


def sides(panels: Tensor) -> Tensor:
    """1 on the right, -1 on the left."""
    return panels[..., 0].sign()


def wrong_way(look: Look, x: Tensor, v: Tensor, step: Tensor, row: Tensor) -> Tensor:
    """As if what was judged good had become less likely by half a gap, and what was bad more."""
    a, b = (c.to(x)[step][:, None] for c in look.agent.policy.table[:2])
    gap = look.rollout.path[step + 1, row] - a * x - b * v
    return -0.5 * look.rollout.judgement[row][:, None] * gap / b.clamp_min(1e-6)


def correction(trial: Trial) -> str | None:
    """What has moved the wrong way still has a gradient that brings it back."""
    if not trial.log_probs or trial.cls.requires.gradient:
        return f"{NO_LOG_PROB}, and need no reward gradient"
    plain, moved = (trial.look(sides, nudge, config=trial.free()) for nudge in (None, wrong_way))
    points = moved.points()
    weak = (moved.force() < 0.1 * plain.force())[points]
    lost = float(weak.float().mean()) if bool(points.any()) else 0.0
    need(
        lost < 0.6,
        f"of the steps that moved the wrong way {lost:.0%} get no gradient back: a ratio clamped on both sides is "
        "lost outside its band; take PPO's max(-A rho, -A clip(rho)), or clamp only the side that went far enough",
    )
    return None


def first_panel(look: Look, x: Tensor, v: Tensor, step: Tensor, row: Tensor) -> Tensor:
    """As if the model had moved by one standard deviation in the first panel."""
    _, b, std = (c.to(x)[step][:, None] for c in look.agent.policy.table)
    return (row < look.rollout.panel_size)[:, None] * std / b.clamp_min(1e-6)


def rows(trial: Trial) -> str | None:
    """A step's gradient depends on its own panel, not on how far the model moved in another."""
    if not trial.log_probs:
        return NO_LOG_PROB
    plain, moved = (trial.look(right, nudge) for nudge in (None, first_panel))
    others = slice(plain.rollout.panel_size, None)
    change = (moved.gradient - plain.gradient)[:, others].abs().amax()
    scale = plain.gradient[:, others].abs().amax()
    need(
        float(change) <= 1e-3 * float(scale),
        f"moving the model in one panel changes the gradients in others by {float(change / scale):.1%}: a term of "
        "each row is averaged (or normalised) over the whole batch; reduce it over the row's own dimensions",
    )
    return None


def pull(trial: Trial, size: int, weight: float, seed: int) -> tuple[float, bool]:
    """How far a displaced model comes back in rounds of one panel of ``size``, and whether it trained at all."""
    config = trial.free(kl_coef=weight)
    agent, _ = trial.make(config=config, rows=size, panel_size=size, seed=seed)
    x, t = noises(256), torch.linspace(0, 1, 256)

    @torch.no_grad()
    def distance() -> float:
        gap = agent.model.velocity(x, t) - agent.reference.velocity(x, t)
        return float(gap.square().mean())

    with torch.no_grad():
        agent.model.field.change.out.bias += 0.3
    before = distance()
    agent.learn(4 * size)
    return before - distance(), agent.env.ledger.nfe > 4 * size * agent.env.steps


def leash(trial: Trial) -> str | None:
    """A setting named ``kl_coef`` holds the model to the reference, even where a round is one panel."""
    fields = {f.name for f in dataclasses.fields(trial.cls.Config)}
    field = getattr(trial.run.agent.model, "field", None)
    if "kl_coef" not in fields or not trial.updates or not isinstance(field, ProbeVelocity):
        return "for flows with a setting named kl_coef that learn in update()"
    smallest = trial.cls.requires.panel_size
    for size in (smallest, max(4, smallest)):  # to some a single sample says nothing
        free, held = (
            [pull(trial, size, weight, seed) for seed in SEEDS] for weight in (0.0, 100.0)
        )
        if not any(trained for _, trained in held):
            continue
        back = [sum(p for p, _ in pulls) / len(pulls) for pulls in (free, held)]
        need(
            back[1] > max(0.0, 1.5 * back[0]),
            f"with one panel of {size} a round, kl_coef = 100 does not pull the model back to the reference: take "
            "the KL of each step's two Gaussians, model and reference, |m - m_ref|^2 / (2 std^2); one over the "
            "batch is zero for a batch of one, and one to the old policy holds nothing",
        )
        return None
    return "for agents that learn from one panel"


def conditions(trial: Trial) -> str | None:
    """On a task with conditions it learns what is wanted of each, or refuses it with a ``ConfigError``."""
    task, noise, asked = ConditionalProbe(), noises(510), torch.arange(510) % 3

    def learned(sign: float, seed: int, rounds: int) -> Tensor:
        agent, _ = trial.make(seed=seed, answer=turn(sign), rows=2 * ROWS, task=task)
        agent.learn(rounds * agent.env.num_envs)
        samples = agent.sample(noise, asked)
        need(bool(samples.isfinite().all()), "on a task with conditions the samples became NaN")
        return samples

    def aligned(seed: int, rounds: int) -> float:
        """Which share of what opposite answers change lies in each condition's own direction."""
        change = learned(1, seed, rounds) - learned(-1, seed, rounds)
        told = task.toward(task.centre(asked) + change, asked) * task.std
        return float(told.mean() / change.square().sum(1).mean().sqrt().clamp_min(1e-9))

    for seeds, rounds in ((2, 3), (4, 12)):  # what is not clear at once gets a longer chance
        try:
            shares = [aligned(seed, rounds) for seed in range(seeds)]
        except ConfigError:
            return "for agents that learn tasks with conditions"
        if not trial.moved or (min(shares) > 0 and sum(shares) / seeds > 0.4):
            return None
    raise ContractError(
        "what is preferred under each condition does not become more frequent under it: conditions do not stay "
        "with their samples; hand rollout.condition (transitions() has it too) to the model, shuffled alike"
    )
