"""``prefenv bench --task NAME``: the same experiments elsewhere, rows apart, and nothing changed on shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench, jobs
from benchmarks.bench import jobs_of
from benchmarks.experiments import load
from benchmarks.jobs import Job, few
from prefenv.checkpoints import load_checkpoint
from prefenv.cli import main
from prefenv.cli_bench import Bench
from prefenv.errors import ConfigError, UnknownNameError
from prefenv.evaluation import Judge
from prefenv.registry import make_oracle, make_task

ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "bench"


def test_committed_rows_are_still_known_as_finished():
    """The hash of every run on shapes is what it was when it ran."""
    seen = {}
    for path in ROWS.glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            seen.setdefault((row["experiment"], row["variant"], row["agent"]), row)
    assert len(seen) > 50
    for row in seen.values():
        job = Job(row["experiment"], row["variant"], row["agent"], row["seed"])
        assert job.config.name == row["name"], row["name"]


def test_an_experiment_on_a_task_has_its_reference_and_its_oracle_answering_the_same_way():
    here, there = load("pairs").config("", "ppo", 0), load("pairs@digits").config("", "ppo", 0)
    assert (there.task, there.oracle, there.checkpoint) == ("digits", "legible:answer=best", None)
    assert (there.queries, there.panel_size) == (here.queries, here.panel_size)
    assert load("basic@clouds").config("", "ppo", 0).oracle == "s-cloud"
    assert load("mistakes@gaussians").variants == load("mistakes").variants
    clouds = make_task("clouds")
    assert load("basic@clouds").n_reference == 2 * clouds.samples, "its samples are expensive"


def test_every_run_says_the_command_that_makes_it_again():
    (job,) = jobs_of(Bench(experiments=("few",), task="digits", agents=("kto",), seeds=1))
    assert job == Job("few@digits", "", "kto", 0)
    assert "--experiments few@digits --agents kto" in job.command
    assert list(jobs_of(Bench(experiments=("few@digits",), agents=("kto",), seeds=1))) == [job]


@pytest.mark.parametrize("name", ["rare", "graded", "proxy", "size", "modes"])
def test_what_is_about_shapes_stays_there(name):
    with pytest.raises(ConfigError, match="stays on it"):
        jobs_of(Bench(experiments=(name,), task="digits"))


def test_unknown_names():
    for name, told in (("basics@digits", "unknown experiment 'basics'"), ("few@cloud", "clouds")):
        with pytest.raises(UnknownNameError, match=told):
            load(name)


def small(name):
    task = make_task(name)
    flow = load_checkpoint(None, task).flow
    # Of all oracles of digits jpeg moves the reference furthest, so that few samples tell.
    oracle = make_oracle("jpeg" if name == "digits" else task.default_oracle, task)
    steps = 2 if name == "digits" else 4
    return Judge(flow, task, oracle, n_reference=2000, n=500, steps=steps)


AGENT = "rft:updates=1,batch=8"


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, scored by few samples and without likelihoods."""
    made, whole = {}, Judge.evaluate

    def judge(experiment, variant):
        task = load(experiment).config(variant, "ppo", 0).task
        return made.setdefault(task, small(task))

    def engine(what, todo, workers):
        for job in todo:
            yield job, None
            yield job, what(job)

    monkeypatch.setattr(Judge, "evaluate", lambda self, model: whole(self, model, kl=False))
    monkeypatch.setattr(jobs, "judge_of", judge)
    monkeypatch.setattr(bench, "judge_of", judge)
    monkeypatch.setitem(bench.ENGINES, "local", engine)


def test_a_small_bench_runs_on_two_tasks_and_keeps_them_apart(tmp_path, here, capsys):
    asked = ["bench", "--experiments", "few", "--agents", AGENT, "--seeds", "1"]
    asked += ["--out", str(tmp_path), "--json"]
    for task in ([], ["--task", "gaussians"], ["--task", "gaussians"]):
        assert main([*asked, *task]) == 0
    counts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(c["done"], c["failed"], c["skipped"]) for c in counts] == [(1, 0, 0)] * 2 + [(0, 0, 1)]
    lines = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.jsonl")}
    assert lines.keys() == {"few", "few@gaussians"}
    assert lines["few"]["name"] == Job("few", "", AGENT, 0).config.name
    assert lines["few@gaussians"]["name"].startswith("rft-gaussians-s0-")
    # Each has a report of its own, which does not see the other.
    for task, score in (([], "few"), (["--task", "gaussians"], "few@gaussians")):
        assert main(["report", "--results", str(tmp_path), "--json", *task]) == 0
        told = json.loads(capsys.readouterr().out)["agents"][AGENT]
        assert told.keys() == {"all", score}
    assert (tmp_path / "report@gaussians" / "report.md").exists()
    assert main(["report", "--results", str(tmp_path), "--task", "digits"]) == 2
    assert "--task gaussians" in capsys.readouterr().err


def test_a_conditional_task_is_looked_at_condition_by_condition(tmp_path, here):
    """The same number of each digit; the score of all the noises is the score."""
    judge = small("digits")
    rows = few(judge, 50)
    assert judge.noise_label is not None
    assert judge.noise_label[rows].bincount().tolist() == [5] * 10
    samples = judge.samples[: len(judge.noise)]
    whole = few(judge, len(judge.noise))
    assert judge.score(samples, whole) == judge.score(samples)
    line = jobs.work(Job("few@digits", "", AGENT, 0), tmp_path)
    assert "error" not in line and [point[0] for point in line["curve"]] == [4, 8, 12]
