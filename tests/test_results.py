"""What the pages say is what the committed results say, and the benchmarks' own logic."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from benchmarks import (
    agents_page,
    clouds,
    few_answers,
    gaussians,
    objectives,
    pages,
    report,
    segments,
    tasks,
    tune,
)
from prefenv.registry import lookup, names

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "agents" / "README.md").read_text(encoding="utf-8")
BUILT_IN = [n for n in names("agent") if lookup("agent", n).__module__.startswith("agents.")]


def rows(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def test_every_agent_is_in_the_tables_and_has_its_paragraph():
    assert set(agents_page.TRAITS) == set(tune.SPACE) == set(BUILT_IN)
    told = re.findall(r"^\*\*`([\w-]+)`\*\*", PAGE, re.MULTILINE)
    assert sorted(told) == sorted(BUILT_IN)


def test_traits_agree_with_what_the_agents_require():
    for name, (feedback, _, _) in agents_page.TRAITS.items():
        requires = lookup("agent", name).requires
        assert (feedback == "reward gradients") == requires.gradient, name
        assert (feedback in ("pairs", "choices")) <= (requires.panel_size > 1), name


def test_page_of_the_agents_says_what_the_results_say():
    found = rows("bench/basic.jsonl")
    for name in BUILT_IN:
        assert agents_page.line(found, name) in PAGE
    assert agents_page.table(found)[1] in PAGE


def test_the_price_of_a_score_is_the_first_look_that_saw_it():
    row = {
        "curve": [[256, 1.0, 0.79, 0, None], [512, 2.0, 0.8, 0, None], [1024, 3.0, 0.7, 0, None]]
    }
    assert agents_page.soon(row) == 512
    assert agents_page.soon({"curve": row["curve"][:1]}) == float("inf")
    assert agents_page.line([], "ppo").count("no run") == 6


def test_tuning_gave_every_agent_the_same_number_of_trials_on_other_seeds():
    found = rows("tune.jsonl")
    tried = {r["task"][0] for r in found}
    trials = {n: {tuple(r["task"][1:3]) for r in found if r["task"][0] == n} for n in tried}
    assert len({frozenset(t) for t in trials.values()}) == 1 and tried == set(BUILT_IN)
    reported = {r["seed"] for r in rows("bench/basic.jsonl")}
    assert reported.isdisjoint({r["task"][2] for r in found})
    lines = (RESULTS / "tune.md").read_text().splitlines()
    for line in tune.table(found):
        assert line in lines
    usual = tune.Args()
    assert {r["task"][1] for r in found} == set(range(usual.trials)), "the command makes the page"
    assert {r["task"][3] for r in found} == {usual.queries}


def test_few_answers_page_says_what_the_results_say():
    text, found = (RESULTS / "few_answers.md").read_text(), rows("few_answers.jsonl")
    for name, statement in few_answers.STATEMENTS.items():
        mine = [r for r in found if r["statement"] == name]
        held = sum(all(r[k] >= v for k, v in statement.wanted.items()) for r in mine)
        line = next(x for x in text.splitlines() if x.startswith(f"| {statement.text} |"))
        assert f"| {held} of {len(mine)} |" in line
    (first,) = [r for r in found if r["statement"] == "first-question"]
    told = sum(0 < n < 4 for n in first["accepted"])
    assert f"{told} of {len(first['accepted'])} show some but not all" in text


def test_gaussians_page_says_what_the_results_say():
    lines, found = (RESULTS / "gaussians.md").read_text().splitlines(), rows("gaussians.jsonl")
    assert {r["method"] for r in found} == set(gaussians.METHODS)
    for method in gaussians.METHODS:
        assert gaussians.line(found, method) in lines
    for row in found:
        assert row["kl"] > row["frontier"] - 3 * row["kl_stderr"], (
            "no model lies above the frontier"
        )


def test_segments_page_says_what_the_results_say():
    text, found = (RESULTS / "segments.md").read_text(), rows("segments.jsonl")
    assert {r["method"] for r in found} == set(segments.METHODS)
    cases = {(r["env"], r["skill"]) for r in found}
    for case in cases:
        for method, made in segments.METHODS.items():
            mine = [r for r in found if (r["env"], r["skill"], r["method"]) == (*case, method)]
            assert sorted(r["seed"] for r in mine) == list(range(5))
            assert {r["agent"] for r in mine} == {made and made[0]}
    assert "\n".join(segments.table(found, "normalised")) in text
    assert "\n".join(segments.table(found, "segment_score", 3)) in text
    for row in found:
        known = segments.behaviour_returns(row["env"])
        low, high = (known[skill]["return"] for skill in ("random", "expert"))
        got = 100 * (sum(row["returns"]) / len(row["returns"]) - low) / (high - low)
        assert got == pytest.approx(row["normalised"], abs=0.1)


def test_clouds_page_says_what_the_results_say():
    lines, found = (RESULTS / "clouds.md").read_text().splitlines(), rows("clouds.jsonl")
    assert {r["agent"] for r in found} == set(clouds.AGENTS)
    for line in clouds.page(found):
        assert line in lines
    for name, steps in itertools.product(("hil-dd", "learned-reward"), (20, 100)):
        seeds = {r["seed"] for r in found if r["agent"] == name and r["steps"] == steps}
        assert seeds == set(range(5)), (name, steps)


def test_page_of_objectives_says_what_the_results_say():
    """And each objective moves its own measure its own way, with every seed."""
    lines, found = (RESULTS / "objectives.md").read_text().splitlines(), rows("objectives.jsonl")
    for line in objectives.table(found):
        assert line in lines
    (start,) = [r for r in found if r["agent"] is None]
    for name, (_, measure, sign) in objectives.OBJECTIVES.items():
        mine = [r for r in found if r["objective"] == name]
        assert [r["seed"] for r in mine] == [0, 1, 2]
        assert {r["agent"] for r in mine} == {objectives.AGENT}
        assert all(sign * (r[measure] - start[measure]) > 0 for r in mine), name


def test_page_of_other_tasks_says_what_the_results_say():
    folder = RESULTS / "tasks"
    lines = (folder / "tasks.md").read_text().splitlines()
    found = [row for path in folder.glob("*.jsonl") for row in rows(f"tasks/{path.name}")]
    assert {r["experiment"].split("@")[0] for r in found} == {"basic", "pairs"}
    assert not [r for r in found if "error" in r]
    for line in tasks.page(found):
        assert line in lines


# Logic


def test_a_run_that_failed_says_nothing_about_the_budget_of_the_others():
    found = rows("bench/basic.jsonl")
    lost = {k: found[0][k] for k in ("experiment", "variant", "agent", "seed", "name")}
    told = agents_page.table([{**lost, "error": "OutOfMemory: no"}, *found[1:]])
    assert told[1] == agents_page.table(found)[1]


def test_a_seed_that_failed_leaves_the_finished_ones_in_the_table():
    (good, *_) = [r for r in rows("tasks/basic@gaussians.jsonl") if r["agent"] == "ppo"]
    bad = {"agent": "ppo", "seed": 0, "error": "ValueError: no"}
    others = [{**good, "agent": "pfm", "score": 0.9}, {**bad, "agent": "kto"}]
    mine = [bad, {**good, "score": 0.5}, {**good, "score": 0.7}]
    lines = tasks.table([*mine, *others])[2:]
    assert [line.split("`")[1] for line in lines] == ["pfm", "ppo", "kto"]
    assert lines[1].startswith("| `ppo` | 0.60 (0.50 to 0.70) |")
    assert lines[1].endswith("| 2 (1 failed) |")
    assert "ValueError: no" in lines[2] and lines[2].endswith("| 0 (1 failed) |")
    assert {line.count("|") for line in lines} == {9}


def test_a_finished_part_is_not_made_again(tmp_path):
    made = []
    for _ in range(2):
        assert pages.once(tmp_path / "deep" / "part.json", lambda: made.append(1) or [1.5]) == [1.5]
    assert made == [1]


# Sentences

TOPICS = {
    "Few answers": "few",
    "Answers in plenty": "basic",
    "Only pairs": "pairs",
    "A rare preference": "rare",
    "A continuous preference": "graded",
    "Doubt": "noisy",
    "Two modes to keep": "modes",
}


@pytest.mark.parametrize(("title", "experiment"), TOPICS.items())
def test_a_score_that_is_told_with_its_interval_is_the_rows(title, experiment):
    """Every "`agent` (0.97, 0.83 to 0.98" of the conclusions."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    bullet = " ".join(text.split(f"- **{title}.**")[1].split("\n- **")[0].split())
    told = re.findall(r"`([\w-]+)`(?: highest)? \((\d\.\d\d), (\d\.\d\d) to (\d\.\d\d)", bullet)
    assert told, "the bullet names no score"
    found, _ = report.load(RESULTS / "bench")
    for agent, *numbers in told:
        e = found.scores[agent, experiment]
        assert [f"{v:.2f}" for v in (e.value, e.low, e.high)] == numbers, agent
