"""The demo on other tasks: what the task says is shown, short names, and classes above their columns."""

from __future__ import annotations

import json

import pytest

from prefenv import plotting
from prefenv.checkpoints import load_checkpoint
from prefenv.cli import main
from prefenv.demo import labels
from prefenv.evaluation import Judge
from prefenv.figures import frontier_figure, shapes_figure
from prefenv.policy import FlowPolicy
from prefenv.registry import TASKS, agent_config, make_oracle, make_task
from prefenv.runs import RunConfig


@pytest.mark.parametrize("name", TASKS)
def test_every_tasks_demo_can_be_made(name):
    shown = make_task(name).demo
    assert len(shown.agents) == 4
    for agent in shown.agents:
        agent_config(agent)
    config = RunConfig(agent=shown.agents[0], task=name, queries=shown.queries, rows=shown.rows)
    assert config.queries % config.num_envs() == 0


@pytest.mark.parametrize("name", TASKS)
def test_every_reference_was_made_within_fifteen_minutes_on_a_cpu(name):
    card = load_checkpoint(None, make_task(name)).card
    assert card["device"] == "cpu" and 0 < card["seconds"] < 900
    assert f"prefenv train --task {name}" in card["command"]


def test_names_are_short_where_they_can_be():
    def named(*agents):
        return labels([RunConfig(agent=a) for a in agents])

    assert named("kto:batch=32", "ppo") == ["kto", "ppo"]
    assert named("kto:batch=32", "kto", "ppo") == ["kto:batch=32", "kto", "ppo"]


def test_demo_takes_agents_and_budget_from_the_task(monkeypatch, tmp_path, capsys):
    asked = []

    def demo(out, agents, config, workers):
        asked.append((tuple(agents), config.oracle, config.queries, config.num_envs()))
        return "", []

    monkeypatch.setattr("prefenv.demo.demo", demo)
    for more in ([], ["--queries", "256"], ["--agents", "rft"]):
        assert main(["demo", "--task", "digits", "--out", str(tmp_path), "--json", *more]) == 0
    shown = make_task("digits").demo
    assert asked[0] == (shown.agents, "legible", shown.queries, shown.rows)
    assert asked[1][2:] == (256, 8), "a budget of one's own is spent in about 32 rounds"
    assert asked[2][0] == ("rft",)
    assert [json.loads(x) for x in capsys.readouterr().out.splitlines()] == [{"runs": []}] * 3


def test_a_sheet_of_digits_says_which_was_asked_for():
    task = make_task("digits")
    flow = load_checkpoint(None, task).flow
    oracle = make_oracle("jpeg", task)
    judge = Judge(flow, task, oracle, steps=2, n_reference=2000, n=500)
    figure = shapes_figure(judge, {"same": FlowPolicy(flow, steps=2, shift=task.shift)})
    heads = [t for t in figure.texts if t.get_color() == plotting.GREY]
    assert [t.get_text() for t in heads] == list("0123456789")
    assert len(figure.axes) == 20
    for j, head in enumerate(heads):
        for axes in (figure.axes[j], figure.axes[10 + j]):
            box = axes.get_position()
            assert head.get_position()[0] == pytest.approx((box.x0 + box.x1) / 2, abs=1e-6)
            assert head.get_position()[1] > box.y1
    first = [axes.images[0].get_array() for axes in (figure.axes[3], figure.axes[13])]
    assert (first[0] == first[1]).all(), "the same noise and digit, the same model"
    entry = {"agent": "same", "reward": 0.9, "kl_nats": 1.0, "kl_stderr": 0.1}
    drawn = frontier_figure([entry], judge)
    drawn.canvas.draw()
    assert drawn.axes[0].get_position().width > 0.5, "the names leave room for the picture"
