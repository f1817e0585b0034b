"""``benchmarks.speed``: what it compares is the same work, and its table says what was measured. Not the times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import speed, speed_memory
from benchmarks.speed_rollout import bare_rollout, env_rollout, graph_rollout
from benchmarks.speed_timing import Fact, Found, Row, interleave, pair
from benchmarks.speed_training import plain_training
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.registry import make_oracle
from prefenv.tasks import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick run as a user starts it: what it printed, and the files it kept."""
    out = tmp_path_factory.mktemp("speed")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--quick", "--out", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, (out / "speed.md").read_text(), json.loads((out / "speed.json").read_text())


def test_quick_run_measures_everything(quick):
    printed, page, kept = quick
    assert printed.strip() == page.strip()
    assert {"rows", "facts", "memory", "command", "date", "machine", "versions"} == kept.keys()
    sections = " ".join(row["section"] for row in kept["rows"])
    for word in ("Rollout", "SyncVectorEnv", "Stable-Baselines3", "Reference training"):
        assert word in sections
    for row in kept["rows"]:
        assert 0 < row["least"] <= row["ratio"] <= row["most"] and row["goal"] is None
        assert f"| {row['ours']} | {row['base']} |" in page
    for memory in kept["memory"]:
        assert 50 < memory["imports"] < memory["peak"]


def test_what_must_hold_holds(quick):
    facts = {fact["what"]: fact for fact in quick[2]["facts"]}
    assert all(fact["holds"] for fact in facts.values())
    for word in (
        "env and bare loop",
        "clip fraction",
        "approximate KL",
        "ratio - 1",
        "transitions",
    ):
        assert any(word in what for what in facts)


def test_the_quick_run_keeps_nothing_by_itself(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "results")
    row = Row("A", "ours", "base", [(1.0, 2.0)], goal=3.0)
    monkeypatch.setattr(speed, "measure", lambda size, device: (Found([row]), []))
    assert speed.main(["--quick"]) == 0 and not list(tmp_path.iterdir())
    row.goal = 3.0
    assert speed.main([]) == 0
    assert "**missed**" in (tmp_path / "results" / "speed.md").read_text()
    assert json.loads((tmp_path / "results" / "speed.json").read_text())["rows"][0]["met"] is False
    wrong = Found([row], [Fact("same work", float("nan"), 1.0)])
    monkeypatch.setattr(speed, "measure", lambda size, device: (wrong, []))
    assert speed.main(["--quick"]) == 1
    assert "**NO**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("goal", "unit", "met", "said"),
    [
        (2.0, "throughput", True, "≥ 2x | 2.00 | 1.00 to 4.00 | met"),
        (2.1, "throughput", False, "≥ 2.1x | 2.00 | 1.00 to 4.00 | **missed**"),
        (None, "throughput", None, "– | 2.00 | 1.00 to 4.00 | –"),
        (0.5, "time", True, "≤ 0.5x its time | 0.50 | 0.25 to 1.00 | met"),
        (0.4, "time", False, "≤ 0.4x its time | 0.50 | 0.25 to 1.00 | **missed**"),
    ],
)
def test_goals_are_held_against_the_median_ratio(goal, unit, met, said):
    row = Row("A", "ours", "base", [(0.001, 0.001), (0.001, 0.004), (0.002, 0.004)], goal, unit)
    assert row.met is met
    assert said in speed.line(row)
    assert speed.line(row).endswith("| 1.0 | 4.0 |")


def test_cases_take_turns_and_the_first_turn_is_not_counted():
    seen: list[str] = []
    cases = {name: lambda name=name: seen.append(name) for name in "abc"}
    seconds = interleave(cases, 2, torch.device("cpu"))
    assert seen == list("abcabcabc")
    assert [len(s) for s in seconds.values()] == [2, 2, 2]
    assert pair(seconds, "a", "c") == list(zip(seconds["a"], seconds["c"], strict=True))


# The same work on both sides


@pytest.mark.parametrize("per_row", [True, False])
def test_the_bare_loop_makes_the_reference_samples(per_row):
    env = FlowVectorEnv(8, array="torch", device="cpu")
    noise = torch.randn(8, 64, 2)
    bare = bare_rollout(env, per_row)
    torch.testing.assert_close(bare(noise), env.reference.sample(noise), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    drawn = bare()
    assert drawn.shape == (8, 64, 2) and float((drawn - bare()).abs().max()) > 0.1


def test_every_call_of_a_rollout_is_one_episode():
    env = FlowVectorEnv(4, array="torch", device="cpu")
    loop = env_rollout(env, env.reference)
    for number in (1, 2, 3):
        info = loop()
        assert bool(info["judged"].all()) and env.ledger.queries == 4 * number
    given = np.zeros((4, 128), np.float32)
    assert not bool(env_rollout(env, env.reference, given)()["final_obs"]["x"].any())


def test_plain_training_is_training(monkeypatch):
    """It lowers the loss on the task's data, as ``train_reference`` would."""
    task = FlowVectorEnv(1, device="cpu").task
    network = task.network()
    monkeypatch.setattr(type(task), "network", lambda self: network)
    x1, _ = task.data(256, make_generator(1))
    x0, t = torch.randn_like(x1), torch.rand(256)

    def loss() -> float:
        with torch.no_grad():
            v = network(torch.lerp(x0, x1, t[:, None, None]), t)
        return float((v - (x1 - x0)).square().mean())

    before = loss()
    plain_training(task, TrainConfig(iterations=30, batch=64), "cpu")
    assert loss() < 0.8 * before


def test_memory_is_a_process_of_its_own():
    """What the measuring process holds is not in it."""
    ballast = np.ones(600 * 2**20, np.uint8)
    assert speed_memory.high_water() > 600 and ballast.any()
    small, large = (speed_memory.measure("collect", rows, "cpu") for rows in (16, 2048))
    assert small["peak"] < 600
    path = 17 * 2048 * 128 * 4 / 2**20
    assert path < large["peak"] - large["imports"] < path + 200
    assert small["peak"] - small["imports"] < path


# Stable-Baselines3


@pytest.fixture
def sb3():
    pytest.importorskip("stable_baselines3")
    from benchmarks import sb3

    return sb3


def test_vec_env_tells_sb3_what_finished(sb3):
    core = FlowVectorEnv(4, steps=3, device="cpu")
    env = sb3.FlowVecEnv(core)
    env.seed(5)
    observation = env.reset()
    again = FlowVectorEnv(4, steps=3, device="cpu").reset(seed=5)[0]
    assert np.array_equal(observation["x"], again["x"])
    actions = np.random.default_rng(0).normal(size=(3, 4, 128)).astype(np.float32)
    for i in range(3):
        observation, reward, done, infos = env.step(actions[i])
        assert done.dtype == bool and done.tolist() == [i == 2] * 4
        assert len({id(info) for info in infos}) == 4
        if i < 2:
            assert infos == [{}] * 4
    score = make_oracle("s-curve", core.task).score(torch.tensor(actions[2]).view(4, 64, 2))
    np.testing.assert_allclose(reward, score, rtol=1e-5)
    for row, info in enumerate(infos):
        assert np.array_equal(info["terminal_observation"]["x"], actions[2, row])
        assert info["terminal_observation"]["t"] == [1.0]
        assert info["TimeLimit.truncated"] is False
        assert not np.array_equal(observation["x"][row], actions[2, row])
    assert (observation["t"] == 0).all()


def test_vec_env_has_sb3s_other_methods(sb3):
    from stable_baselines3.common.vec_env import VecMonitor

    env = sb3.FlowVecEnv(FlowVectorEnv(4, steps=2, device="cpu"))
    assert env.get_attr("steps") == [2] * 4 and env.get_attr("steps", [0, 1]) == [2] * 2
    env.set_attr("render_mode", "ansi")
    assert env.env.render_mode == "ansi"
    assert env.env_is_wrapped(VecMonitor) == [False] * 4
    assert env.env_method("close") == [None] * 4 and env.get_attr("num_envs", 2) == [4]
    watched = VecMonitor(env)
    watched.reset()
    for _ in range(2):
        *_, infos = watched.step(np.zeros((4, 128), np.float32))
    assert [info["episode"]["l"] for info in infos] == [2] * 4
    watched.close()


def test_sb3_acts_as_the_generator_and_knows_its_log_probabilities(sb3):
    env = FlowVectorEnv(4, device="cpu")
    model, _ = sb3.make_ppo(env, 16, 1, lr=0.0)
    observation, _ = env.reset(seed=0)
    for i in range(env.steps):
        ours, _ = env.reference.predict(observation, deterministic=False)
        mean, _ = model.predict(observation, deterministic=True)
        tensors = {k: torch.as_tensor(v) for k, v in observation.items()}
        x = tensors["x"].view(4, 64, 2)
        there = env.reference.mean(x, env.reference.velocity(x, i), i).flatten(1)
        np.testing.assert_allclose(mean, there, rtol=1e-4, atol=1e-4)
        _, log_prob, _ = model.policy.evaluate_actions(tensors, torch.as_tensor(ours))
        index = torch.full((4,), i)
        expected = env.reference.log_prob(x, index, torch.as_tensor(ours).view(4, 64, 2))
        torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-2)
        drawn, _, said = model.policy(tensors)
        again = env.reference.log_prob(x, index, drawn.view(4, 64, 2))
        torch.testing.assert_close(said, again, rtol=1e-4, atol=1e-2)
        observation, *_ = env.step(ours)


def test_with_learning_rate_0_sb3_replays_what_it_collected(sb3):
    """And it notices when it does not: the clip fraction of a changed network is not 0."""
    model, rollout = sb3.make_ppo(FlowVectorEnv(8, device="cpu"), 32, 2, lr=0.0)
    before = [p.clone() for p in model.policy.parameters()]
    rollout()
    assert model.rollout_buffer.full and model.rollout_buffer.actions.shape == (16, 8, 128)
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    logged = model.logger.name_to_value
    assert logged["train/clip_fraction"] == 0 and abs(logged["train/approx_kl"]) < 1e-6
    rollout()
    torch.nn.init.normal_(model.policy.flow.field.out.bias, std=0.3)
    model.train()
    assert logged["train/clip_fraction"] > 0.5


def test_sb3_learns_with_it(sb3):
    model, rollout = sb3.make_ppo(FlowVectorEnv(8, device="cpu"), 32, 1, lr=1e-3)
    flow, critic = model.policy.flow.field, model.policy.critic
    before = flow.out.weight.clone(), critic[0].weight.clone()
    rollout()
    model.train()
    assert not torch.equal(flow.out.weight, before[0])
    assert not torch.equal(critic[0].weight, before[1])
    assert not any(p.requires_grad for p in model.env.env.reference.flow.parameters())


# CUDA


@pytest.mark.cuda
def test_the_whole_rollout_as_one_graph_is_the_eager_rollout():
    env = FlowVectorEnv(64, array="torch", device="cuda")
    eager = env_rollout(env, env.reference)
    replay = graph_rollout(env.reference, torch.randn(64, 64, 2, device="cuda"))
    for _ in range(3):
        noise = torch.randn(64, 64, 2, device="cuda")
        there = eager(noise)["final_obs"]["x"]
        torch.testing.assert_close(replay(noise).flatten(1), there, rtol=1e-4, atol=1e-4)
    drawn = replay().clone()
    assert float((drawn - replay()).abs().max()) > 0.1, "new noise"
