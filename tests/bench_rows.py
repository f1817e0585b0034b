"""Made-up rows of a benchmark, as the runner writes them: for tests, and to look at the figures."""

from __future__ import annotations

import numpy as np

from benchmarks.report_rows import Described

NAMES = (
    "best-of-n", "rft", "hil-dd", "pfm", "d3po", "ppo", "grpo", "dpok", "flow-dpo", "dspo", "kto", "mapo", "nft",
    "awm", "dgpo", "rwr", "adjoint", "draft", "noise", "sb3-ppo", "learned-reward",
)  # fmt: skip
VARIANTS = {
    "basic": ("",),
    "few": ("16", "64", "256"),
    "pairs": ("",),
    "rare": ("0.1", "0.02"),
    "graded": ("",),
    "mistakes": ("0", "0.1", "0.2", "0.4"),
    "noisy": ("0.1", "0.3"),
    "proxy": ("",),
    "thin": ("",),
    "coarse": ("",),
    "size": ("16", "64", "256"),
    "modes": ("",),
}
GRADIENT = ("adjoint", "draft")  # refuse what has no gradient
SELECTS = ("best-of-n", "noise")  # know no KL, the first a bound


def experiments(names=tuple(VARIANTS)):
    return {n: Described(f"What does {n} ask?", VARIANTS[n]) for n in names}


def frontier(spread=0.3, start=0.3):
    """Of a reward that is normal under the reference, up to 1."""
    reward = np.linspace(start, 1.0, 60)
    return {
        "reward": list(reward),
        "kl": list(((reward - start) / spread) ** 2 / 2),
        "reference_reward": start,
        "optimum_reward": 0.92,
        "optimum_kl": ((0.92 - start) / spread) ** 2 / 2,
    }


def row(experiment, variant, agent, seed, score, rng, budget=1024):
    reward = 0.3 + 0.6 * min(max(score, 0), 1)
    least = (reward - 0.3) ** 2 / 0.18
    looks = np.linspace(0.2, 1, 5)
    speed = rng.uniform(1, 6)
    learned = score * (1 - np.exp(-speed * looks)) / (1 - np.exp(-speed))
    proxy = experiment == "proxy"
    fall = np.where(proxy, 0.5 * (looks - 0.4).clip(0) * rng.uniform(0, 1.5), 0)
    return {
        "experiment": experiment,
        "variant": variant,
        "agent": agent,
        "seed": seed,
        "name": f"{agent}-{experiment}-s{seed}-abcd{seed}",
        "command": f"prefenv align --agent {agent} --queries {budget} --panel-size 4 --seed {seed}",
        "beta": 0.1,
        "budget": budget,
        "score": score,
        "optimum_score": 0.99,
        "preferred_rate": min(max(score, 0), 1),
        "reference_preferred_rate": 0.23,
        "reward": reward,
        "reference_reward": 0.3,
        "optimum_reward": 0.92,
        "kl_nats": None if agent in SELECTS else least * rng.uniform(2, 20) + 0.05,
        "kl_stderr": None if agent in SELECTS else 0.05,
        "kl_bound_nats": 1.8 if agent == "best-of-n" else None,
        "frontier_kl_nats": least,
        "residual": 0.03,
        "reference_residual": 0.02,
        "diversity": 1.0,
        "optimum_effective_size": 3398.0,
        "panels": budget // 4,
        "queries": budget,
        "gradients": 0,
        "nfe": 16 * budget,
        "seconds": 5.0,
        "cpu_seconds": 10.0 / speed,
        "curve": [
            [q * budget, q * 10 / speed, s - f, 0.3 + 0.6 * (s - f), 0.3 + q * 0.6 if proxy else None]
            for q, s, f in zip(looks, learned, fall, strict=True)
        ],
        "versions": {"prefenv": "0.1.0", "torch": "2.13.0"},
        "machine": "two cores of a test",
    }  # fmt: skip


def failed(experiment, variant, agent, seed, **why):
    """A row without numbers: ``error=...`` or ``refused=...``."""
    whole = row(experiment, variant, agent, seed, 0.5, np.random.default_rng(0))
    kept = (
        "experiment",
        "variant",
        "agent",
        "seed",
        "name",
        "command",
        "budget",
        "versions",
        "machine",
    )
    return {**{k: whole[k] for k in kept}, **why}


def rows(agents=NAMES, names=tuple(VARIANTS), seeds=5, chance=0):
    """A benchmark: agents of different skill, two that refuse where there is no gradient, one that crashed."""
    rng, found = np.random.default_rng(chance), []
    skill = dict(zip(agents, rng.uniform(0.3, 1.0, len(agents)), strict=True))
    for i, name in enumerate(names):
        for j, variant in enumerate(VARIANTS[name]):
            hardness = 0.03 * i + 0.12 * j
            for agent in agents:
                for seed in range(seeds):
                    if agent in GRADIENT and name in ("pairs", "mistakes"):
                        why = "needs the reward's gradient, which this oracle has not"
                        found.append(failed(name, variant, agent, seed, refused=why))
                        continue
                    if (agent, name, seed) == ("mapo", "noisy", 1):
                        found.append(
                            failed(name, variant, agent, seed, error="NonFiniteError: loss")
                        )
                        continue
                    score = skill[agent] - hardness + rng.normal(0, 0.04)
                    budget = int(variant) if name == "few" else 1024
                    found.append(row(name, variant, agent, seed, min(score, 0.99), rng, budget))
    return found
