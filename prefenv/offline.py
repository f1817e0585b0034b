"""The two-step way: make samples of the reference, have them judged elsewhere, learn from the answers.

``make_samples`` fills a feedback store with questions; whoever answers them (a page, a person, another program)
does so there; ``rounds`` turns the answered ones into rollouts, and ``study`` feeds them to an agent as ``learn``
would. Only **offline** agents can learn so: those that ask about samples of the untouched reference anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefenv.agent import Agent
from prefenv.device import make_generator
from prefenv.errors import ConfigError, FeedbackError
from prefenv.feedback import FeedbackStore, Panel, Sample, model_hash
from prefenv.feedback.files import Feedback, read_feedback
from prefenv.policy import FlowPolicy
from prefenv.rollout import Rollout
from prefenv.tasks import Task
from prefenv.tasks.conditions import from_texts, panels_of, to_text


def need_offline(agent: Agent) -> None:
    """Refuse an agent that must ask while it learns.

    Raises:
        ConfigError: It is online.
    """
    if not agent.offline:
        raise ConfigError(
            f"{agent.name} is online: it must ask about its own samples while it learns, and cannot learn from "
            "answers that were given before; take an offline agent, or align it without --feedback"
        )


def origin(policy: FlowPolicy) -> dict[str, Any]:
    """How a policy's samples are made, as plain values: steps, shift and kernel."""
    kernel = {**dataclasses.asdict(policy.kernel), "window": list(policy.kernel.window)}
    return {"steps": policy.steps, "shift": policy.shift, "kernel": kernel}


@torch.no_grad()
def make_samples(
    store: FeedbackStore,
    policy: FlowPolicy,
    count: int,
    panel_size: int,
    *,
    seed: int = 0,
    paths: bool = False,
    task: str | Task | None = None,
    progress: Callable[[list[Panel]], None] = lambda panels: None,
) -> None:
    """Put ``count`` samples of a policy as questions into a store; the same call again adds nothing.

    Args:
        store: Where they go.
        policy: Who makes them.
        count: Number of samples, a multiple of ``panel_size``.
        panel_size: Samples shown together.
        seed: Seed of their noises and steps.
        paths: Keep all states and log-probabilities, for agents that need them.
        task: The task, for its conditions (one drawn for each panel), or its name.
        progress: Called with each few panels.

    Raises:
        ConfigError: The panels do not divide the samples.
    """
    if count < 1 or panel_size < 1 or count % panel_size:
        raise ConfigError(f"{count} samples do not fill panels of {panel_size}; give a multiple")
    device = policy.flow.device
    policy.generator.set_state(make_generator(seed, device, "steps").get_state())
    kind = None if isinstance(task, str) else task
    known = {
        "task": task if kind is None else kind.name,
        "model": model_hash(policy.flow),
        "seed": seed,
        "info": origin(policy),
    }
    generator, size = make_generator(seed, device, "sample"), panel_size * max(1, 64 // panel_size)
    asking = make_generator(seed, stream="sample conditions")
    for first in range(0, count, size):
        n = min(size, count - first)
        x = torch.randn(n, *policy.flow.event_shape, generator=generator, device=device)
        condition = None
        if kind is not None and kind.condition is not None:
            drawn = kind.draw_conditions(n // panel_size, asking)
            known["condition"] = [to_text(c) for c in drawn]
            condition = drawn.repeat_interleave(panel_size, 0).to(device)
        path, log_prob = [x], []
        for i in range(policy.steps):
            x, told = policy.act(x, i, condition)
            path.append(x)
            log_prob.append(torch.zeros(n, device=device) if told is None else told)

        def group(values: Tensor) -> Tensor:
            return values.unflatten(0, (-1, panel_size))

        more = (group(torch.stack(path, 1)), group(torch.stack(log_prob, 1))) if paths else ()
        progress(store.ask(group(x), group(path[0]), *more, **known))


def read_shape(path: str) -> dict[str, int]:
    """The ``queries`` (samples of answered panels) and ``panel_size`` of a feedback file or folder.

    Raises:
        FeedbackError: It cannot be read, holds no answers, or panels of several sizes.
    """
    answers = read_feedback(path).answers()
    sizes = sorted({len(panel.samples) for panel, _ in answers})
    if len(sizes) != 1:
        what = f"panels of sizes {sizes}: agents learn from one size" if sizes else "no answers"
        raise FeedbackError(f"{path} has {what}")
    return {"queries": len(answers) * sizes[0], "panel_size": sizes[0]}


def rounds(feedback: Feedback, agent: Agent) -> list[Rollout]:
    """Answered panels as rounds of the agent's env, ``num_envs`` rows each.

    Raises:
        ConfigError: The agent is online.
        FeedbackError: The samples are not this task's, or lack the noises or paths that the agent needs.
    """
    need_offline(agent)
    env, needs, known = agent.env, agent.requires, {s.id: s for s in feedback.samples}
    rows = [(known[name], by[name]) for p, by in feedback.answers() for name in p.samples]
    made, model = origin(env.policy(agent.reference, agent.kernel())), model_hash(agent.reference)
    for sample, _ in rows:
        if sample.x.shape != env.task.event_shape:
            raise FeedbackError(
                f"sample {sample.id} has shape {sample.x.shape}, {env.task.name} has {env.task.event_shape}"
            )
        if not (needs.log_prob or needs.noise):
            continue
        way = sample.path is not None and sample.info == made
        if sample.model != model or sample.noise is None or (needs.log_prob and not way):
            raise FeedbackError(
                f"{agent.name} learns from how samples were made, and {sample.id} was not made by this reference "
                f"in its way: make samples with prefenv sample --agent {agent.name}"
            )
    n = env.num_envs
    return [
        _rollout(rows[i : i + n], agent, needs.log_prob) for i in range(0, len(rows) - n + 1, n)
    ]


def _rollout(rows: list[tuple[Sample, float | None]], agent: Agent, paths: bool) -> Rollout:
    """Judged samples as a round: with all states, or with noise (NaN where it is not known) and sample alone."""
    states, log_probs = [], []
    for sample, _ in rows:
        noise = np.full_like(sample.x, np.nan) if sample.noise is None else sample.noise
        states.append(sample.path if paths else np.stack([noise, sample.x]))
        log_probs.append(sample.log_prob if paths else np.zeros(1, np.float32))
    judgement = torch.tensor([float("nan") if v is None else v for _, v in rows])
    device, condition = agent.device, None
    if (kind := agent.env.task.condition) is not None:
        condition = from_texts([sample.condition for sample, _ in rows], kind).to(device)
        panels_of(condition, agent.env.panel_size)
    return Rollout(
        torch.from_numpy(np.stack(states, 1)).to(device),
        torch.from_numpy(np.stack(log_probs, 1)).to(device),
        judgement.to(device),
        judgement.nan_to_num(0.0).to(device),
        agent.env.panel_size,
        condition,
    )


def study(agent: Agent, rollouts: list[Rollout], **options: Any) -> Agent:
    """Learn from rounds that were judged before, from where the agent stopped; options as of ``Agent.learn``."""

    def feed(number: int) -> Rollout:
        rollout = rollouts[number]
        agent.env.ledger.charge(
            len(rollout.judgement) // rollout.panel_size, len(rollout.judgement)
        )
        return rollout

    agent.feed = feed
    left = sum(len(r.judgement) for r in rollouts[agent.rounds :])
    return agent.learn(left, **options) if left else agent
