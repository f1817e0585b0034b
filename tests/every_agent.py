"""All registered agents, to be tested alike; and how to compare two."""

from __future__ import annotations

import functools

import pytest
from probes import (
    ROWS,
    probe_agent,
)

from prefenv.agent import Agent
from prefenv.registry import lookup, names
from prefenv.testing.data import copied, difference

every_agent = pytest.mark.parametrize("name", names("agent"))
log_prob_agents = [n for n in names("agent") if lookup("agent", n).requires.log_prob]
# Settings that carry more from round to round than the defaults do.
VARIANTS = [
    *[(name, {}) for name in names("agent")],
    ("pfm", {"iterate": 1, "warm_start": False}),
    ("pfm", {"coupling": "pair", "sigma": 0.1, "source": "reference", "iterate": 3}),
    ("ppo", {"kl_coef": 0.1, "reduction": "mean"}),
    ("d3po", {"clamp": "none", "epochs": 2}),
    ("draft", {"truncation": "random", "beta": 0.1}),
    ("draft", {"truncation": "refl", "last": 4}),
    ("sb3-ppo", {"ent_coef": 0.0, "n_epochs": 1}),
]
every_variant = pytest.mark.parametrize(
    ("name", "settings"),
    VARIANTS,
    ids=lambda v: v if isinstance(v, str) else "-".join(v) or "default",
)


@functools.cache
def learned(name):
    """An agent that has learned two rounds; for tests that only look at it."""
    return probe_agent(name).learn(2 * ROWS)


def everything(agent):
    """All that an agent carries, but the clock."""
    state = agent.state()
    ledger = {k: v for k, v in state["ledger"].items() if k != "seconds"}
    return copied({**state, "ledger": ledger})


def differ(one, other):
    """Where two agents' states (or agents) differ, bit by bit, or None."""
    return difference(*(everything(a) if isinstance(a, Agent) else a for a in (one, other)))
