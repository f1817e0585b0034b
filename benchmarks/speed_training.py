"""Speed of training: our ``ppo`` against Stable-Baselines3's, and a step of reference training."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

import prefenv.train
from agents.ppo import PPO
from benchmarks.speed_timing import Case, Fact, Found, Row, interleave, pair
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.flow import RectifiedFlow
from prefenv.kernels import Kernel
from prefenv.rollout import collect
from prefenv.sb3 import make_ppo
from prefenv.tasks import Task, TrainConfig


def against_sb3(rows: int, batch: int, epochs: int, rounds: int, device: str) -> Found:
    """Our PPO and SB3's on the same network, kernel, number of transitions, minibatches and epochs.

    The learning rate is 0 in both: the arithmetic is the same, every round measures the same weights, and what was
    collected must replay with a ratio of 1.
    """
    kernel = Kernel(
        "flow-sde", 0.7
    )  # every step is stochastic, so both learn from every transition
    env, face = (FlowVectorEnv(rows, kernel=kernel, device=device) for _ in range(2))
    minibatches = rows * env.steps // batch
    ours = PPO(
        env,
        PPO.Config(lr=0.0, epochs=epochs, minibatches=minibatches, anchor=0.0, kernel=kernel),
        seed=0,
    )
    theirs, their_rollout = make_ppo(face, batch, epochs, lr=0.0, seed=0)
    fused, fused_rollout = make_ppo(face, batch, epochs, lr=0.0, seed=0)
    fused.policy.optimizer = torch.optim.Adam(
        fused.policy.parameters(), lr=0.0, eps=1e-5, fused=True
    )
    fused_rollout()
    kept: dict[str, Any] = {}
    cases: dict[str, Case] = {
        "rollout": lambda: kept.update(rollout=collect(env, ours.policy)),
        "SB3 rollout": their_rollout,
        "update": lambda: kept.update(metrics=ours.update(kept["rollout"])),
        "SB3 update": theirs.train,
        "SB3 update, its Adam fused": fused.train,
    }
    seconds = interleave(cases, rounds, env.device)

    section = (
        f"ppo and Stable-Baselines3's PPO, {rows} rows x {env.steps} steps, minibatches of {batch} x "
        f"{epochs} epochs, {env.device.type}"
    )
    found = [
        Row(section, "rollout", "SB3 rollout", pair(seconds, "rollout", "SB3 rollout"), 1.0),
        Row(section, "update", "SB3 update", pair(seconds, "update", "SB3 update"), 1.0),
        *[
            Row(section, "update", base, pair(seconds, "update", base))
            for base in ("SB3 update, its Adam fused",)
        ],
    ]
    logged = {k: float(v) for k, v in theirs.logger.name_to_value.items()}
    used = len(kept["rollout"].transitions(ours.policy.stochastic_steps).x)
    learnt = theirs.rollout_buffer.buffer_size * theirs.rollout_buffer.n_envs
    return Found(
        found,
        [
            Fact(f"{section}: SB3's clip fraction", logged["train/clip_fraction"], 1e-6),
            Fact(f"{section}: SB3's approximate KL", abs(logged["train/approx_kl"]), 1e-6),
            Fact(f"{section}: our ratio - 1", kept["metrics"]["ratio_error"], 1e-3),
            Fact(f"{section}: difference in transitions", abs(used - learnt), 0),
        ],
    )


def plain_training(task: Task, config: TrainConfig, device: str) -> None:
    """The training loop as it is usually written: default Adam, the average of the weights in a Python loop."""
    rng = make_generator(0)
    flow = RectifiedFlow(task.network()).to(device)
    average = flow.clone()
    optimizer = torch.optim.Adam(flow.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.iterations
    )
    for _ in range(config.iterations):
        x1 = task.data(config.batch, rng)[0].to(device)
        x0 = torch.randn_like(x1)
        t = torch.rand(len(x1), device=device)
        s = t[:, None, None]
        v = flow.field((1 - s) * x0 + s * x1, t)
        loss = ((v - (x1 - x0)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), flow.parameters(), strict=True):
                a.mul_(config.ema).add_(p, alpha=1 - config.ema)


def reference_training(iterations: int, rounds: int, device: str) -> Found:
    """``train_reference`` itself against the plain loop, ``iterations`` steps each."""
    task = FlowVectorEnv(1, device=device).task
    config = TrainConfig(iterations=iterations)
    cases: dict[str, Case] = {
        "train_reference": lambda: prefenv.train.train_reference(
            task, config, device=device, progress=False
        ),
        "plain loop": lambda: plain_training(task, config, device),
    }
    with patch.object(prefenv.train, "measure", lambda *_: {}):  # the card is no part of a step
        seconds = interleave(cases, rounds, torch.device(device))
    each = [(a / iterations, b / iterations) for a, b in pair(seconds, *cases)]
    section = f"Reference training, one step of batch {config.batch}, {device}"
    return Found([Row(section, "train_reference", "plain loop", each, 0.9, "time")])
