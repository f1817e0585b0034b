"""Speed of rollouts: against the bare loop, against Gymnasium's vector env, and as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from benchmarks.speed_timing import Case, Fact, Found, Row, interleave, pair
from prefenv.envs import FlowEnv, FlowVectorEnv
from prefenv.policy import FlowPolicy
from prefenv.rollout import collect


def bare_rollout(env: FlowVectorEnv, per_row: bool = True) -> Callable[..., Tensor]:
    """Euler's method as a library's user writes it, with the env's network, times and number of rows."""
    network, times = env.reference.flow.field, env.reference.times.tolist()
    shape = (env.num_envs, *env.task.event_shape)
    times_shape = (env.num_envs,) if per_row else ()

    @torch.inference_mode()
    def loop(noise: Tensor | None = None) -> Tensor:
        x = torch.randn(shape, device=env.device) if noise is None else noise
        for t, u in zip(times[:-1], times[1:], strict=True):
            x = x + (u - t) * network(x, torch.full(times_shape, t, device=env.device))
        return x

    return loop


def env_rollout(
    env: Any, policy: FlowPolicy, actions: Any = None, steps: int = 0
) -> Callable[..., Any]:
    """One episode of every row; autoreset begins the next. Returns the last step's ``info``.

    ``policy`` acts for all rows at once, or ``actions`` are given again and again.
    """
    observation = env.reset(seed=0)[0]

    def loop(noise: Any = None) -> Any:
        nonlocal observation
        info: dict[str, Any] = {}
        if noise is not None:
            observation, _ = env.reset(options={"noise": noise})
        for _ in range(steps or policy.steps):
            act = actions
            if actions is None:
                act, _ = policy.predict(observation, deterministic=True)
            observation, _, _, _, info = env.step(act)
        return info

    return loop


def against_bare_loop(rows: int, goal: float, rounds: int, device: str) -> Found:
    """The generator as policy in the env, against the bare loop of the same network."""
    env, other = (FlowVectorEnv(rows, array="torch", device=device) for _ in range(2))
    face = FlowVectorEnv(rows, array="numpy", device=device)
    policy, bare = env.reference, bare_rollout(env)
    in_torch, in_numpy = env_rollout(env, policy), env_rollout(face, face.reference)
    noise = torch.randn(rows, *env.task.event_shape, device=env.device)

    end = bare(noise).flatten(1).cpu()
    ours = in_torch(noise)["final_obs"]["x"].cpu()
    faced = torch.as_tensor(np.stack([o["x"] for o in in_numpy(noise.cpu())["final_obs"]]))
    gap = max(float((end - x).abs().max()) for x in (ours, faced))

    cases: dict[str, Case] = {
        "bare inference_mode loop": bare,
        'env, array="torch"': in_torch,
        'env, array="numpy"': in_numpy,
        "collect: noise and log-probabilities, path kept": lambda: collect(other, policy),
        "reference.sample, no env": lambda: policy.sample(torch.randn_like(noise)),
        "bare loop, one t for all rows": bare_rollout(env, per_row=False),
    }
    base, *others = cases
    seconds = interleave(cases, rounds, env.device)
    section = f"Rollout of {env.steps} steps, {rows:,} rows, {env.device.type}"
    found = [
        Row(section, n, base, pair(seconds, n, base), goal if n.startswith("env") else None)
        for n in others
    ]
    return Found(found, [Fact(f"{section}: largest difference of env and bare loop", gap, 1e-3)])


def against_sync_vector_env(rows: int, rounds: int, device: str) -> Found:
    """The batched environment, against Gymnasium's loop over single ones; the policy is batched in both."""
    policy = FlowVectorEnv(1, device=device).reference
    cases: dict[str, Case] = {}

    def add(name: str, control: str, given: bool, steps: int = 0) -> None:
        options: dict[str, Any] = {"reference": policy.flow, "control": control, "device": device}
        env = FlowVectorEnv(rows, **options)
        sync = SyncVectorEnv(
            [partial(FlowEnv, **options)] * rows, autoreset_mode=AutoresetMode.SAME_STEP
        )
        shape = env.action_space.shape
        actions = np.random.default_rng(0).standard_normal(shape, np.float32) if given else None
        cases[name] = env_rollout(env, policy, actions, steps)
        cases[f"SyncVectorEnv: {name}"] = env_rollout(sync, policy, actions, steps)

    goals = {"the env's steps, actions given": 20.0, "whole rollout, generator as policy": 20.0}
    add("the env's steps, actions given", "state", given=True)
    add("whole rollout, generator as policy", "state", given=False)
    add('control="noise": the env runs the generator', "noise", given=True, steps=1)
    seconds = interleave(cases, rounds, torch.device(device))
    section = f"FlowVectorEnv and SyncVectorEnv of FlowEnv, {rows:,} rows, {device}"
    return Found(
        [
            Row(section, n, "SyncVectorEnv", pair(seconds, n, f"SyncVectorEnv: {n}"), goals.get(n))
            for n in cases
            if not n.startswith("Sync")
        ]
    )


def graph_rollout(policy: FlowPolicy, noise: Tensor) -> Callable[..., Tensor]:
    """All steps of ``policy.sample`` as one CUDA graph, for noises of this shape.

    What a replay returns is overwritten by the next one.
    """
    start = noise.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once must exist before the capture
        for _ in range(3):
            policy.sample(start)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        end = policy.sample(start)

    def replay(noise: Tensor | None = None) -> Tensor:
        if noise is None:
            start.normal_()
        else:
            start.copy_(noise)
        graph.replay()
        return end

    return replay


def as_one_graph(rows: int, rounds: int) -> Found:
    """The whole rollout as one CUDA graph, against the env's and the bare loop's."""
    env = FlowVectorEnv(rows, array="torch", device="cuda")
    noise = torch.randn(rows, *env.task.event_shape, device=env.device)
    replay, in_env = graph_rollout(env.reference, noise), env_rollout(env, env.reference)
    gap = float((replay(noise).flatten(1) - in_env(noise)["final_obs"]["x"]).abs().max())
    cases: dict[str, Case] = {"graph": replay, "env": in_env, "bare": bare_rollout(env)}
    seconds = interleave(cases, rounds, env.device)
    section = f"Rollout of {env.steps} steps as one CUDA graph, {rows:,} rows"
    names = {"env": 'env, array="torch"', "bare": "bare inference_mode loop"}
    found = [Row(section, "CUDA graph", b, pair(seconds, "graph", n)) for n, b in names.items()]
    return Found(found, [Fact(f"{section}: largest difference from the env", gap, 1e-4)])
