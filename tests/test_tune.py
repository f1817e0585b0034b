"""``benchmarks.tune``: what a trial draws, what its runs are worth, and a log that is not run twice."""

import json
import math

import pytest

from benchmarks.tune import FACTOR, LEAD, SPACE, Trial, best, draw, gather, table
from prefenv.registry import agent_config, names


def row(agent, trial, seed, score, ratio=1.0, **more):
    """A line of the log."""
    return {
        "task": [agent, trial, seed, 64], "settings": {"lr": trial}, "score": score,
        "residual_ratio": ratio, **more,
    }  # fmt: skip


def test_every_agent_is_tuned_in_as_many_settings():
    assert set(SPACE) == set(names("agent"))
    assert {len(x) for x in SPACE.values()} == {3}


@pytest.mark.parametrize("agent", SPACE)
def test_a_trial_draws_near_the_default_and_the_same_again(agent):
    assert draw(agent, 0) == {}
    drawn, config = draw(agent, 3), agent_config(agent)
    assert drawn == draw(agent, 3) != draw(agent, 4)
    for name, value in drawn.items():
        default = getattr(config, name)
        assert type(value) is type(default)
        if default:
            slack = 0.5 if isinstance(default, int) else 0.01 * default  # of rounding
            assert max(default / FACTOR, 1 if isinstance(default, int) else 0) - slack <= value
            assert value <= max(default * FACTOR, 1) + slack


def test_draws_reach_both_ends():
    found = [
        math.log(draw("ppo", trial)["lr"] / agent_config("ppo").lr, FACTOR)
        for trial in range(1, 200)
    ]
    assert min(found) < -0.9 and max(found) > 0.9 and abs(sum(found) / len(found)) < 0.15


def test_a_trial_is_worth_its_mean_and_counts_only_if_its_runs_came_back():
    rows = [
        row("ppo", 0, 100, 0.5),
        row("ppo", 0, 101, 0.7),
        row("ppo", 1, 100, 0.9, ratio=2.5),
        row("ppo", 1, 101, 0.9),
    ]
    rows += [row("ppo", 2, 100, 1.0), {"task": ["ppo", 2, 101, 64], "error": "NaN"}]
    assert best(rows) == {0: (pytest.approx(0.6), True), 1: (pytest.approx(0.9), False)}


@pytest.mark.parametrize(
    ("lead", "ratio", "verdict"),
    [
        (LEAD / 2, 1.0, "default stands"),
        (2 * LEAD, 1.0, "taken"),
        (2 * LEAD, 3.0, "default stands"),
    ],
)
def test_the_default_stands_unless_a_whole_trial_leads_by_more_than_chance(lead, ratio, verdict):
    rows = [row("ppo", 0, s, 0.6) for s in (100, 101)] + [
        row("ppo", 1, s, 0.6 + lead, ratio) for s in (100, 101)
    ]
    line = next(x for x in table(rows) if x.startswith("| `ppo` |"))
    assert line.endswith(f"| {verdict} |")


def test_a_crash_is_a_line_and_what_has_a_line_is_not_run_again(tmp_path):
    log = tmp_path / "log" / "tune.jsonl"
    lost = Trial("no-such-agent", 0, 100, 64)
    rows = gather([lost], log, 1)
    assert rows == [json.loads(log.read_text())]
    assert rows[0]["task"] == ["no-such-agent", 0, 100, 64] and "no-such-agent" in rows[0]["error"]
    assert gather([lost], log, 1) == rows and len(log.read_text().splitlines()) == 1
