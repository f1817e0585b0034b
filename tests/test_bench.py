"""``prefenv bench``: experiments, jobs, engines, results; stopped, killed and resumed."""

from __future__ import annotations

import collections
import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import oracles
from benchmarks import bench, engines, experiments
from benchmarks import jobs as jobs_module
from benchmarks.bench import Results, jobs_of
from benchmarks.experiments import NAMES, load
from benchmarks.jobs import Job, code, jobs, work
from prefenv.checkpoints import load_checkpoint
from prefenv.cli import main
from prefenv.cli_bench import Bench
from prefenv.device import cores
from prefenv.errors import RunError, UnknownNameError
from prefenv.evaluation import Judge
from prefenv.registry import make_agent, make_oracle, make_task

# Experiments


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_what_it_asks_and_all_its_variants_can_be_run(name):
    experiment = load(name)
    text = experiments.module(name).__doc__
    assert text.startswith(f"{name}: ") and "Why: " in text
    assert experiments.question(name)[-1] == "."
    assert experiment.seeds >= 5
    seen = set()
    for variant in experiment.variants:
        config = experiment.config(variant, "ppo", 3)
        assert config.seed == 3 and config.queries == experiment.settings["queries"]
        seen.add(config.name)
        env = config.make_env()
        assert env.num_envs % env.panel_size == 0 and config.queries % env.num_envs == 0
        env.close()
    assert len(seen) == len(experiment.variants), "variants differ"


def test_unknown_experiment_is_named():
    with pytest.raises(UnknownNameError, match="choose one of basic, few"):
        load("basics")


def test_proxy_is_what_its_script_makes():
    """The committed proxy was trained on these answers."""
    from benchmarks.experiments.proxy import answers
    from prefenv.checkpoints import shipped
    from prefenv.reward import load_reward

    _, card = load_reward(shipped("shapes-proxy"))
    assert card["panels"] == 64 and card["feedback_digest"] == answers().digest()


# Jobs


def test_jobs_are_all_of_them_whole_seeds_first():
    found = list(jobs(("few", "noisy"), ("ppo", "pfm"), None))
    assert len(found) == len(set(found)) == 2 * (10 + 3 * 5)
    assert [(j.agent, j.seed) for j in found[:4]] == [
        ("ppo", 0), ("pfm", 0), ("ppo", 1), ("pfm", 1),
    ]  # fmt: skip
    assert [j.seed for j in jobs(("few",), ("ppo",), 2, 5)] == [5, 6]
    assert pickle.loads(pickle.dumps(found)) == found


def test_name_changes_with_the_agents_settings_only():
    one = Job("few", "", "ppo", 0)
    assert one.config.name == Job("few", "", "ppo", 0).config.name
    assert one.config.name != Job("few", "", "ppo:lr=1e-3", 0).config.name
    assert one.config.name != Job("basic", "", "ppo", 0).config.name


def test_a_line_says_which_code_made_it_and_its_name_does_not(tmp_path, monkeypatch):
    head, digest = JOBS[0].head(), code.__wrapped__
    assert head["code"] == code() == digest() and len(code()) == 12
    copy = shutil.copytree(Path(oracles.__file__).parent, tmp_path / "oracles")
    monkeypatch.setattr(oracles, "__path__", [str(copy)])
    assert digest() == code(), "where they lie does not matter"
    (copy / "README.md").write_text("words")
    assert digest() == code()
    with (copy / "jpeg.py").open("a") as file:
        file.write("# a word more\n")
    assert digest() != code()
    monkeypatch.setattr(jobs_module, "code", lambda: "0" * 12)
    assert JOBS[0].head()["name"] == head["name"]


def test_a_run_that_fails_is_a_line(tmp_path, monkeypatch):
    def broken(*_):
        raise ArithmeticError("two and\ntwo")

    monkeypatch.setattr(jobs_module, "_measure", broken)
    line = work(Job("few", "", "pfm", 0), tmp_path)
    assert line["error"] == "ArithmeticError: two and two" and line["agent"] == "pfm"


@pytest.fixture
def small_judge(monkeypatch):
    """Scores by few samples and without likelihoods."""

    @functools.cache
    def judge(experiment, variant):
        small = Judge.evaluate
        monkeypatch.setattr(Judge, "evaluate", lambda self, model: small(self, model, kl=False))
        config = load(experiment).config(variant, "ppo", 0)
        task = make_task(config.task)
        flow = load_checkpoint(config.checkpoint, task).flow
        return Judge(flow, task, make_oracle(config.oracle, task), n_reference=2048, n=256)

    monkeypatch.setattr(jobs_module, "judge_of", judge)
    return judge("few", "")


def test_an_agent_that_needs_gradients_is_refused_where_there_are_none(tmp_path, small_judge):
    line = work(Job("pairs", "", "draft", 0), tmp_path)
    assert "gradient" in line["refused"] and "error" not in line and "score" not in line


TIMES = ("seconds", "cpu_seconds")


def test_a_run_is_measured_on_the_way_and_at_the_end(tmp_path, small_judge):
    job = Job("few", "", "hil-dd", 0)
    line = work(job, tmp_path)
    queries = [point[0] for point in line["curve"]]
    assert queries == [4, 8, 12], "after every round: a round passes several marks"
    assert line["queries"] == line["budget"] == 12 and line["panels"] == 3
    agent = make_agent("hil-dd", job.config.make_env(), seed=0)
    agent.learn(12)
    samples = agent.sample(small_judge.noise).cpu()
    assert line["score"] == pytest.approx(small_judge.score(samples))
    assert line["reference_reward"] == pytest.approx(float(small_judge.rewards.mean()), abs=1e-6)
    assert line["optimum_reward"] == small_judge.optimum_reward
    cpu = [point[1] for point in line["curve"]]
    assert 0 < cpu[0] < cpu[1] < cpu[2] == line["cpu_seconds"]
    assert all(point[4] is None for point in line["curve"]), "no proxy"
    assert work(job, tmp_path) == line, "a finished directory is read"


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, small_judge, monkeypatch):
    job, real = Job("few", "", "hil-dd", 1), jobs_module.align
    whole = work(job, tmp_path / "whole")
    monkeypatch.setattr("prefenv.runs._SAVE_SECONDS", 0.0)

    def stopped(config, folder, judge, callback, picture):
        def after(agent, values):
            callback(agent, values)
            if agent.rounds == 2:
                raise KeyboardInterrupt

        return real(config, folder, judge=judge, callback=after, picture=picture)

    monkeypatch.setattr(jobs_module, "align", stopped)
    with pytest.raises(KeyboardInterrupt):
        work(job, tmp_path / "cut")
    monkeypatch.setattr(jobs_module, "align", real)
    resumed = work(job, tmp_path / "cut")
    assert [p[0] for p in resumed["curve"]] == [4, 8, 12]
    assert [p[2:] for p in resumed["curve"]] == [p[2:] for p in whole["curve"]]
    for key in whole.keys() - {"curve", *TIMES}:
        assert resumed[key] == whole[key], key


# Engines

JOBS = [Job("few", "", name, seed) for seed in (0, 1) for name in ("ppo", "pfm", "kto")]


def note(folder, job):
    """Leave a mark for every try, and say how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    tries = len(list(folder.glob(f"{job.agent}-{job.seed}-*")))
    (folder / f"{job.agent}-{job.seed}-{time.time_ns()}").touch()
    return tries


def quiet(job, folder):
    return {**job.head(), "try": note(folder, job)}


def events(engine, what, folder, workers=2):
    began, lines = collections.Counter(), {}
    for job, line in engine(functools.partial(what, folder=folder), JOBS, workers):
        if line is None:
            began[job] += 1
        else:
            assert job not in lines, "each once"
            lines[job] = line
    assert began == collections.Counter(JOBS)
    return lines


def test_local_engine_does_every_job_once(tmp_path):
    lines = events(engines.local, quiet, tmp_path)
    assert lines.keys() == set(JOBS) and not any("error" in x for x in lines.values())
    assert len(list(tmp_path.iterdir())) == len(JOBS)
    assert list(engines.local(quiet, [], 2)) == []


def poisons(job, folder):
    """``kto`` of seed 0 always kills its process, the first time with two others beside it."""
    tries, began = note(folder, job), time.monotonic()
    if job.seed or not tries:
        until(lambda: len({x.name[:3] for x in folder.glob(f"*-{job.seed}-*")}) == 3)
    if (job.agent, job.seed) == ("kto", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1 if job.seed or tries else 60)  # who is beside it does not come back the first time
    return {**job.head(), "try": tries, "span": (began, time.monotonic())}


def test_only_the_run_that_kills_its_process_is_blamed(tmp_path):
    lines = events(engines.local, poisons, tmp_path, workers=3)
    failed = {(j.agent, j.seed): x["error"] for j, x in lines.items() if "error" in x}
    assert failed.keys() == {("kto", 0)} and "process died" in failed["kto", 0]
    assert lines.keys() == set(JOBS)
    fine = {job: x for job, x in lines.items() if "error" not in x}
    assert {(j.agent, j.seed): x["try"] for j, x in fine.items()} == {
        ("ppo", 0): 1, ("pfm", 0): 1, ("ppo", 1): 0, ("pfm", 1): 0, ("kto", 1): 0,
    }, "seed 1 ran side by side, as each of it waits for the others"  # fmt: skip
    for job, line in fine.items():
        if line["try"]:  # the second time it was alone
            others = [x["span"] for other, x in fine.items() if other != job]
            assert all(end < line["span"][0] or line["span"][1] < start for start, end in others)


def test_cores_are_counted_where_nobody_says_which_are_ours(monkeypatch):
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


def until(holds, seconds=200):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


SLEEPER = """
import sys, time
from benchmarks import engines
from benchmarks.jobs import Job
import pathlib

def slow(job):
    pathlib.Path(sys.argv[1]).write_text(str(__import__("os").getpid()))
    time.sleep(60)

if __name__ == "__main__":
    list(engines.local(slow, [Job("few", "", "ppo", 0)], 1))
"""


def test_a_killed_benchmark_leaves_no_worker_behind(tmp_path):
    script, mark = tmp_path / "sleeper.py", tmp_path / "pid"
    script.write_text(SLEEPER)
    # The worker's own argument is the same file, so that both sides know where the mark is.
    parent = subprocess.Popen([sys.executable, str(script), str(mark)])
    until(lambda: mark.exists() and mark.read_text())
    worker = int(mark.read_text())
    parent.kill()
    parent.wait()
    until(lambda: not Path(f"/proc/{worker}").exists())


@pytest.mark.slow
def test_ray_cluster_of_two_nodes_loses_one_and_no_run(tmp_path):
    """Real processes: a head and a node that is killed while runs are under way on it."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        began, lines, mark = 0, [], tmp_path / "nodes" / node.node_id
        for job, line in engines.on_ray(functools.partial(placed, folder=tmp_path), JOBS, None):
            if line is not None:
                lines.append((job, line))
                continue
            began += 1
            if began == 2:
                until(mark.exists, 200)  # a run is under way there
                cluster.remove_node(node, allow_graceful=False)
        assert sorted(j.config.name for j, _ in lines) == sorted(j.config.name for j in JOBS)
        assert not any("error" in line for _, line in lines)
        assert node.node_id not in {line["node"] for _, line in lines}
        tries = len(list((tmp_path / "tries").iterdir()))
        assert tries == len(JOBS) + 1, "the killed node's run was done again, and no other"
    finally:
        ray.shutdown()
        cluster.shutdown()


def placed(job, folder):
    import ray

    node = ray.get_runtime_context().get_node_id()
    note(folder / "tries", job)
    (folder / "nodes").mkdir(exist_ok=True)
    (folder / "nodes" / node).touch()
    time.sleep(4)
    return {**job.head(), "node": node}


# Results


def line_of(job, **values):
    return {**job.head(), "score": 0.5, **values}


def test_results_are_read_back_and_a_torn_line_is_cut(tmp_path):
    results = Results(tmp_path)
    results.add(line_of(JOBS[0]))
    results.add(line_of(JOBS[1], score=0.7))
    path = tmp_path / "few.jsonl"
    path.write_text(path.read_text()[:-20])  # as a kill within a write leaves it
    again = Results(tmp_path)
    assert again.finished() == {("few", "", JOBS[0].config.name)}
    again.add(line_of(JOBS[1], score=0.8))
    assert [x["score"] for x in Results(tmp_path).lines()] == [0.5, 0.8]


def test_a_last_line_that_lacks_its_newline_only_is_kept(tmp_path):
    Results(tmp_path).add(line_of(JOBS[0]))
    path = tmp_path / "few.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    results = Results(tmp_path)
    assert len(results.lines()) == 1
    results.add(line_of(JOBS[1]))
    assert [x["agent"] for x in Results(tmp_path).lines()] == ["ppo", "pfm"]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"experiment": "few"}', "\udcff", ""])
def test_a_damaged_line_is_named_and_nothing_is_lost(bad, tmp_path, capsys):
    good = json.dumps(line_of(JOBS[0]))
    text = f"{good}\n{bad}\n{good}".encode(errors="surrogateescape")
    (tmp_path / "few.jsonl").write_bytes(text)
    assert main(["bench", "--out", str(tmp_path)]) == 2
    assert "few.jsonl, line 2: this is not the row of a run" in capsys.readouterr().err
    assert (tmp_path / "few.jsonl").read_bytes() == text


def test_another_file_is_not_taken_for_one_that_a_kill_cut_short(tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"mine": 1}')
    with pytest.raises(RunError, match=r"notes\.jsonl, line 1"):
        Results(tmp_path)
    assert (tmp_path / "notes.jsonl").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_frontiers_are_named_before_anything_is_run(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run_all", lambda *_: pytest.fail("hours of work"))
    (tmp_path / "frontier.json").write_text(text)
    assert main(["bench", "--out", str(tmp_path)]) == 2
    assert str(tmp_path / "frontier.json") in capsys.readouterr().err
    assert (tmp_path / "frontier.json").read_text() == text


def test_tidy_keeps_what_another_bench_wrote_and_variants_that_are_no_more(tmp_path):
    mine, other = Results(tmp_path), Results(tmp_path)
    first, last = next(iter(load("pairs").variants)), "0.7"
    for results, variant, seed in ((mine, last, 0), (mine, first, 1), (other, first, 0)):
        line = {**line_of(Job("pairs", first, "ppo", seed)), "variant": variant}
        results.add(line)
    mine.tidy([Job("pairs", first, "ppo", 0)])
    found = Results(tmp_path).lines()
    assert [(x["variant"], x["seed"]) for x in found] == [(first, 0), (first, 1), (last, 0)]
    assert mine.lines() == found


def test_tidy_sorts_and_keeps_the_last_line_of_a_run(tmp_path):
    results = Results(tmp_path)
    failed = {**JOBS[0].head(), "error": "ValueError: no"}
    for line in (line_of(JOBS[4]), failed, line_of(JOBS[1]), line_of(JOBS[0], score=0.9)):
        results.add(line)
    results.tidy(JOBS)
    found = Results(tmp_path).lines()
    assert [(x["agent"], x["seed"]) for x in found] == [("pfm", 0), ("pfm", 1), ("ppo", 0)]
    assert found[-1]["score"] == 0.9 and not any("error" in x for x in found)


def test_only_what_is_missing_or_failed_is_run(tmp_path, monkeypatch):
    results = Results(tmp_path)
    results.add(line_of(JOBS[0]))
    results.add({**JOBS[1].head(), "refused": "needs more"})
    results.add({**JOBS[2].head(), "error": "ValueError: no"})
    asked = []

    def engine(what, todo, workers):
        for job in todo:
            yield job, None
            asked.append(job)
            bad = job.agent == "pfm"
            yield job, {**job.head(), "error": "x"} if bad else line_of(job)

    monkeypatch.setitem(bench.ENGINES, "local", engine)
    counts = bench.run_all(JOBS, results, "local", 1, tmp_path)
    assert asked == JOBS[2:]
    assert counts == {"done": 3, "refused": 0, "failed": 1, "skipped": 2}


def test_command_line_runs_a_suite_and_says_what_failed(tmp_path, monkeypatch, capsys):
    def engine(what, todo, workers):
        for job in todo:
            yield job, None
            yield job, {**job.head(), "error": "Odd: x"} if job.agent == "kto" else line_of(job)

    monkeypatch.setitem(bench.ENGINES, "local", engine)
    monkeypatch.setattr(Results, "add_frontiers", lambda self, names: None)
    arguments = ["bench", "--agents", "ppo", "kto", "--out", str(tmp_path)]
    assert main(arguments) == 1, "some failed"
    out, err = capsys.readouterr()
    assert "9 runs done" in out and "9 failed" in out and "Odd: x" in out
    assert "few kto seed 2: Odd: x" in err and "left" in err
    assert main([*arguments, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["skipped"] == 9 and told["failed"] == 9, "failed runs are tried again"
    assert main(["bench", "--agents", "ppo", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["bench", "--agents", "poo", "--out", str(tmp_path)]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("--seeds", 0, 1),
        ("--seeds", -1, 1),
        ("--workers", 0, 1),
        ("--workers", -1, 1),
        ("--first-seed", -1, 0),
    ],
)
def test_numbers_that_are_too_small_are_refused(
    option, value, least, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench, "run_all", lambda *_: pytest.fail("nothing is to be run"))
    assert main(["bench", "--out", str(tmp_path / "new"), option, str(value)]) == 2
    err = capsys.readouterr().err
    assert f"{option} {value} " in err and err.endswith(f"from {least}\n")
    assert not (tmp_path / "new").exists()


def test_what_is_named_twice_is_run_once():
    twice = Bench(agents=("ppo", "kto", "ppo"), experiments=("pairs", "few", "pairs"), seeds=1)
    assert [(j.experiment, j.agent) for j in jobs_of(twice)] == [
        ("pairs", "ppo"), ("pairs", "kto"), ("few", "ppo"), ("few", "kto"),
    ]  # fmt: skip


def test_again_does_a_finished_run_anew_from_an_empty_directory(tmp_path, monkeypatch, capsys):
    def measure(job, home):
        home.mkdir(parents=True)  # an old one would be in the way
        return {"score": next(scores)}

    def engine(what, todo, workers):
        for job in todo:
            yield job, None
            yield job, what(job)

    scores = iter((0.1, 0.2))
    monkeypatch.setattr(jobs_module, "_measure", measure)
    monkeypatch.setitem(bench.ENGINES, "local", engine)
    monkeypatch.setattr(Results, "add_frontiers", lambda self, names: None)
    asked = ["bench", "--experiments", "few", "--agents", "ppo", "--seeds", "1", "--json"]
    told = []
    for more in ([], [], ["--again"]):
        assert main([*asked, "--out", str(tmp_path), *more]) == 0
        counts = json.loads(capsys.readouterr().out)
        told.append((counts["done"], counts["skipped"]))
    assert told == [(1, 0), (0, 1), (1, 0)]
    assert [x["score"] for x in Results(tmp_path).lines()] == [0.2]


def test_suites():
    quick, full = list(jobs_of(Bench())), list(jobs_of(Bench(suite="full")))
    assert {j.experiment for j in quick} == {"basic", "few", "pairs"}
    assert {j.seed for j in quick} == {0, 1, 2}
    assert {j.experiment for j in full} == set(NAMES)
    for name in ("basic", "few", "pairs"):
        assert {j.seed for j in full if j.experiment == name} == set(range(10))


def test_board_tells_the_state(tmp_path):
    board = bench.Board(JOBS, JOBS[1:])
    board.begin(JOBS[1])
    table = board.table()
    assert table.row_count == 1 and "pfm s0" in table.caption
    assert "not known" in board.time_left()
    board.end(JOBS[1], "failed", {"error": "x"})
    board.began -= 100
    assert "0:0" in board.time_left() and board.left == 4
