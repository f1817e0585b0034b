"""The segments task, its oracle, the files it reads, and its benchmark."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from benchmarks import segments as benchmark
from benchmarks.segments import METHODS, SKILLS, behaviour_returns, cell, play, table
from oracles.segment_return import Player, SegmentReturn, setter
from prefenv.checkpoints import save_checkpoint, shipped
from prefenv.errors import ConfigError
from prefenv.registry import make_oracle, make_task
from prefenv.tasks.base import own_name
from prefenv.tasks.segments import Behaviour, Segments, spaces

mujoco = pytest.importorskip("mujoco", reason="needs the extra prefenv[control]")
h5py = pytest.importorskip("h5py", reason="needs the extra prefenv[control]")


@pytest.fixture(scope="module")
def task():
    return make_task("segments")


@pytest.fixture(scope="module")
def hopper():
    return make_task("segments:env=Hopper-v5")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The data


def test_a_segment_never_crosses_an_episode():
    ends = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0], dtype=torch.bool)
    known = Behaviour(torch.zeros(8, 1), torch.zeros(8, 1), torch.zeros(8), ends)
    assert known.starts(3).tolist() == [0, 3, 4]
    assert known.starts(4).tolist() == [3] and not len(known.starts(5))
    assert known.starts(1).tolist() == list(range(8))


def test_data_are_consecutive_actions_and_the_state_they_begin_in(task):
    x, condition = task.data(200, seeded())
    assert x.shape == (200, 10, 1) and condition.shape == (200, 3) and float(x.abs().max()) <= 1
    steps = task.steps
    observed = task.observations(condition)
    for i in range(20):  # float16 states come more than once
        near = (steps.observations - observed[i]).norm(dim=1) < 1e-3
        found = [steps.actions[at : at + 10] for at in near.nonzero()[:, 0].tolist()]
        assert any(torch.equal(y, x[i]) for y in found)
    again, _ = task.data(200, seeded())
    assert torch.equal(x, again)


def test_conditions_are_standardised_and_come_back(task, hopper):
    for each in (task, hopper):
        _, condition = each.data(4000, seeded())
        assert condition.mean(0).abs().max() < 0.2 and (condition.std(0) - 1).abs().max() < 0.3
        observed = each.steps.observations[:50]
        torch.testing.assert_close(
            each.observations(each.standard(observed)), observed, atol=1e-4, rtol=1e-4
        )
        assert each.standard(1e6 * torch.ones(1, observed.shape[1])).max() == 10


def test_actions_are_in_the_envs_own_units(task):
    x = torch.tensor([[[-3.0]], [[-1.0]], [[0.5]], [[1.0]]])
    assert task.actions(x).ravel().tolist() == [-2, -2, 1, 2]


def test_residual_is_nought_for_real_segments_and_the_noises_length_for_noise(task):
    real = task.steps.actions[task.begin[:1] + torch.arange(10)][None]
    assert float(task.residual(real)) < 1e-3
    far = torch.full((1, 10, 1), 5.0)
    assert 4 <= float(task.residual(far)) <= 6
    assert task.classify(far).tolist() == [0]


def test_the_skills_are_as_good_as_their_names():
    for env_id in ("Pendulum-v1", "Hopper-v5"):
        known = [make_task(f"segments:env={env_id},skill={s}").steps for s in SKILLS]
        returns = [float(k.rewards.sum() / k.ends.sum()) for k in known]
        assert returns[0] < returns[1] < returns[2]
        told = behaviour_returns(env_id)
        for skill, got in zip(SKILLS, returns, strict=True):
            error = told[skill]["stderr"] * (told[skill]["episodes"] / 20) ** 0.5 + abs(got) / 20
            assert abs(got - told[skill]["return"]) < 4 * error


# Files


def arrays(n=40, o=3, a=1, scale=2.0, length=10):
    """D4RL's arrays: actions in the env's own units."""
    rng = np.random.default_rng(0)
    step = np.arange(1, n + 1)
    return {
        "observations": rng.normal(size=(n, o)).astype(np.float32),
        "actions": rng.uniform(-scale, scale, (n, a)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": step % length == 0,
    }


def write_d4rl(path, told):
    with h5py.File(path, "w") as file:
        for key, value in told.items():
            file[key] = value


def write_minari(folder, told, length=10):
    """A group an episode, whose last observation has no action."""
    path = folder / "data" / "main_data.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for k in range(len(told["rewards"]) // length):
            rows, group = slice(k * length, (k + 1) * length), file.create_group(f"episode_{k}")
            group["observations"] = np.concatenate(
                [told["observations"][rows], told["observations"][rows][:1]]
            )
            group["actions"], group["rewards"] = told["actions"][rows], told["rewards"][rows]
            group["terminations"], group["truncations"] = (
                told["terminals"][rows],
                told["timeouts"][rows],
            )
    return path


def test_d4rl_and_minari_files_are_read_alike(tmp_path):
    told = arrays(120)
    write_d4rl(tmp_path / "toy.hdf5", told)
    minari = write_minari(tmp_path / "toy" / "expert-v0", told)
    tasks = [Segments(data_path=str(p)) for p in (tmp_path / "toy.hdf5", minari)]
    assert [t.name for t in tasks] == ["segments+toy", "segments+toy-expert-v0"]
    assert all(len(t.begin) == 12 for t in tasks)
    for t in tasks:
        torch.testing.assert_close(t.steps.actions, torch.from_numpy(told["actions"]) / 2)
        torch.testing.assert_close(t.steps.rewards, torch.from_numpy(told["rewards"]))
    x, y = (t.data(7, seeded()) for t in tasks)
    assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pendulum-v1-medium.npz", "segments+pendulum-v1-medium"),
        ("a/hopper_medium-v2.hdf5", "segments+hopper_medium-v2"),
        ("/sets/mujoco/hopper/expert-v0/data/main_data.hdf5", "segments+hopper-expert-v0"),
        ("/sets/pendulum/expert-v0/data/../data/main_data.hdf5", "segments+pendulum-expert-v0"),
        ("main_data.hdf5", "segments+main_data"),
        ("/data/main_data.hdf5", "segments+main_data"),
    ],
)
def test_a_file_is_never_named_like_one_of_ours(path, name):
    assert own_name("segments", path) == name
    assert not shipped(name).exists()


def test_minaris_file_is_named_alike_from_everywhere(tmp_path, monkeypatch):
    path = write_minari(tmp_path / "toy" / "expert-v0", arrays())
    for folder in (path.parents[1], path.parent):
        monkeypatch.chdir(folder)
        task = Segments(data_path=str(path.relative_to(folder)))
        assert task.name == "segments+toy-expert-v0"
    assert not [p.name for p in shipped("segments").parent.iterdir() if "+" in p.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": np.zeros((40, 4))}, "Pendulum-v1 has"),
        ({"rewards": np.full(40, np.nan)}, "NaN"),
        ({"actions": np.full((40, 1), 2.1)}, "outside the bounds"),
        ({"timeouts": np.arange(40) % 5 == 0}, "no episode is 10 steps long"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, change, message):
    write_d4rl(tmp_path / "toy.hdf5", {**arrays(), **change})
    with pytest.raises(ConfigError, match=message):
        Segments(data_path=str(tmp_path / "toy.hdf5"))


def test_what_cannot_be_made_is_refused_with_the_mend(tmp_path):
    with pytest.raises(ConfigError, match="benchmarks.behaviour"):
        make_task("segments:skill=divine")
    with pytest.raises(ConfigError, match="cannot be made"):
        make_task("segments:env=NoSuchEnv-v0")
    with pytest.raises(ConfigError, match="no Box spaces"):
        make_task("segments:env=CartPole-v1")
    with pytest.raises(ConfigError, match="horizon"):
        make_task("segments:horizon=0")
    for content in (b"no zip", b"PK\x03\x04 cut off"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"no \.npz"):
            Segments(data_path=str(tmp_path / "bad.npz"))
    (tmp_path / "bad.hdf5").write_bytes(b"no hdf5")
    with pytest.raises(ConfigError, match="layout"):
        Segments(data_path=str(tmp_path / "bad.hdf5"))


# The oracle


def test_a_score_is_what_the_pendulums_equations_give(task):
    """Gymnasium's pendulum by hand: m = l = 1, g = 10, dt = 0.05."""
    x, condition = task.data(30, seeded())
    state = task.observations(condition.double())
    angle, speed = torch.atan2(state[:, 1], state[:, 0]), state[:, 2]
    total = torch.zeros(30, dtype=torch.float64)
    for u in (2 * x.double())[..., 0].unbind(1):
        wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
        total -= wrapped**2 + 0.1 * speed**2 + 0.001 * u**2
        speed = (speed + (15 * angle.sin() + 3 * u) * 0.05).clamp(-8, 8)
        angle = angle + speed * 0.05
    got = Player(task).returns(x, condition)
    torch.testing.assert_close(got, total / 10, atol=1e-4, rtol=1e-4)


def test_a_score_is_the_gain_over_doing_nothing_in_the_datas_own_unit(task):
    oracle, (x, condition) = make_oracle("segment-return", task), task.data(256, seeded(5))
    assert oracle.score(torch.zeros_like(x), condition).unique().tolist() == [oracle.threshold]
    gains = Player(task).returns(x, condition) - Player(task).returns(0 * x, condition)
    assert oracle.scale == pytest.approx(float(gains.std()), rel=0.2)
    want = 1 / (1 + torch.exp(-gains / oracle.scale))
    torch.testing.assert_close(oracle.score(x, condition).double(), want, atol=1e-6, rtol=1e-5)
    one = condition[:1].expand(2, -1)
    pair = oracle.score(x[:2], one), Player(task).returns(x[:2], one)
    assert pair[0].argmax() == pair[1].argmax()


@pytest.mark.parametrize("skill", ["random", "expert"])
def test_a_real_segment_earns_what_it_earned(skill):
    """The hopper's data, played again from its observations; float16 and contacts make it differ a little."""
    task = make_task(f"segments:env=Hopper-v5,skill={skill}")
    player = Player(task)
    first = task.begin[:: max(1, len(task.begin) // 60)]
    rows = first[:, None] + torch.arange(10)
    condition = task.standard(task.steps.observations[first])
    got = player.returns(task.steps.actions[rows], condition)
    want = task.steps.rewards[rows].mean(1).double()
    assert float((got - want).abs().median()) < 0.02 * float(want.std()) + 0.01
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.95


def test_a_segment_that_falls_earns_nothing_after(hopper):
    """A hopper laid flat ends at once: one step's reward, whatever the actions."""
    player = Player(hopper)
    flat = hopper.steps.observations[:1].clone()
    flat[:, 0], flat[:, 1] = 0.3, 1.4
    condition = (flat - hopper.steps.moments[0]) / hopper.steps.moments[1]
    x = torch.zeros(1, 10, 3)
    env = player.env
    player.place(env, flat[0].double().numpy())
    _, reward, ended, *_ = env.step(np.zeros(3))
    assert ended
    assert float(player.returns(x, condition)) == pytest.approx(reward / 10, abs=1e-4)


def test_the_same_question_has_the_same_answer_and_sees_only_what_is_cut(hopper):
    x, condition = hopper.data(6, seeded())
    oracle = make_oracle("segment-return", hopper)
    once = oracle.score(x, condition)
    assert torch.equal(once, oracle.score(x, condition))
    assert torch.equal(
        oracle.score(5 * x, condition), oracle.score((5 * x).clamp(-1, 1), condition)
    )
    back = oracle.score(x.flip(0), condition.flip(0)).flip(0)
    torch.testing.assert_close(once, back, atol=1e-6, rtol=0)


def test_an_env_whose_observation_hides_its_state_is_refused():
    env = gym.make("InvertedDoublePendulum-v5").unwrapped  # sines and cosines, and forces
    with pytest.raises(ConfigError, match="state"):
        setter(env)
    with pytest.raises(ConfigError, match="plays segments"):
        SegmentReturn(make_task("shapes"))


# Networks and the benchmark


def test_the_reference_is_as_good_as_what_it_cloned(task):
    """Played segments of model A earn what the data's own do, state by state."""
    from prefenv.checkpoints import load_checkpoint
    from prefenv.policy import FlowPolicy

    real, condition = task.data(400, seeded())
    policy = FlowPolicy(load_checkpoint(None, task).flow)
    made = policy.sample(torch.randn(real.shape, generator=seeded(1)), condition)
    player = Player(task)
    gap = player.returns(made, condition) - player.returns(real, condition)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 20 + 0.02
    assert shipped("segments").exists()


class Still:
    """A model that always plans the same: one value, or one for each env."""

    def __init__(self, value):
        self.value = value

    def sample(self, noise, condition):
        self.seen = condition
        return torch.zeros_like(noise) + torch.as_tensor(self.value).view(-1, 1, 1)


def alone(env_id, action, seed):
    """Return and length of an episode of one action, by a plain loop over the env."""
    env = gym.make(env_id)
    env.reset(seed=seed)
    rewards, done = [], False
    while not done:
        _, reward, ended, cut, _ = env.step(np.float32(action))
        rewards.append(float(reward))
        done = ended or cut
    return sum(rewards), len(rewards)


def test_playing_is_the_envs_own_course(task):
    """Returns of a constant action, episode by episode."""
    got = play("Pendulum-v1", task, Still(0.25), 3, seed=4)
    for k in range(3):
        assert got[k] == pytest.approx(alone("Pendulum-v1", [0.5], 4000 + k)[0], rel=1e-6)


def test_an_episode_that_ended_earns_no_more(hopper):
    """Hoppers fall at different times; each return stops there."""
    values = [1.0, -1.0, 0.0, 0.4]
    got = play("Hopper-v5", hopper, Still(values), 4, seed=1)
    want = [alone("Hopper-v5", [v] * 3, 1000 + k) for k, v in enumerate(values)]
    for mine, (total, _) in zip(got, want, strict=True):
        assert mine == pytest.approx(total, rel=1e-5)
    lengths = [length for _, length in want]
    assert max(lengths) > min(lengths) + 5


def test_the_table_has_a_line_for_each_behaviour_and_the_mean_of_means():
    rows = [
        {"env": e, "skill": "medium", "method": m, "normalised": v}
        for e, m, v in [
            ("A", "BC", 10),
            ("A", "BC", 20),
            ("A", "PFM", 40),
            ("B", "BC", 25),
            ("B", "PFM", 0),
        ]
    ]
    lines = table(rows, "normalised")
    assert lines[0] == "| behaviour | BC | PFM |"
    assert lines[2] == "| A, medium | 15.0 ± 7.1 | 40.0 |" and lines[-1] == "| mean | 20.0 | 20.0 |"
    assert cell([1.0]) == "1.0" and next(iter(METHODS)) == "BC"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A file of the pendulum's, and the benchmark's arguments for it; nothing is trained yet."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "toy.npz", **arrays(120))
    return benchmark.Args(
        envs=("Pendulum-v1",), data_path=Path("toy.npz"), returns=(-1200.0, -200.0),
        methods=("BC",), seeds=1, queries=2, episodes=1, work=tmp_path / "work", out=tmp_path / "out",
    )  # fmt: skip


def test_the_benchmark_takes_a_file(toy, capsys):
    with pytest.raises(
        ConfigError, match=r"train --task segments:env=Pendulum-v1,data_path=toy\.npz"
    ):
        benchmark.main(toy)
    task = make_task("segments:data_path=toy.npz")
    save_checkpoint(Path("checkpoints/segments+toy.safetensors"), task.flow(), task, {})
    benchmark.main(toy)
    (row,) = map(json.loads, (toy.out / "segments+toy.jsonl").read_text().splitlines())
    assert row["skill"] == task.name and row["normalised"] == (row["return"] + 1200) / 10
    page = (toy.out / "segments+toy.md").read_text()
    assert "--data-path toy.npz" in page and "uniform -1200, expert -200" in page
    assert "(segments+toy.png)" in page and (toy.out / "segments+toy.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"returns": None}, "--returns RANDOM EXPERT"),
        ({"data_path": None}, "--data-path FILE"),
        ({"envs": ("Pendulum-v1", "Hopper-v5")}, "--envs ID"),
        ({"returns": (0.0, -1.0)}, "the larger one"),
    ],
)
def test_a_file_wants_one_env_and_its_returns(toy, change, message):
    with pytest.raises(ConfigError, match=message):
        benchmark.checked(replace(toy, **change))


def test_a_finished_run_of_other_settings_is_another(toy, monkeypatch):
    case = ("Pendulum-v1", "medium", "PFM", 0)
    plain = replace(toy, data_path=None, returns=None)
    names = [benchmark.run_name(args, *case) for args in (plain, toy, replace(plain, episodes=2))]
    names.append(benchmark.run_name(replace(toy, returns=(0.0, 1.0)), *case))
    monkeypatch.setitem(METHODS, "PFM", ("pfm:lr=2e-3", 1))
    assert len({*names, benchmark.run_name(plain, *case)}) == 5


def test_spaces_are_looked_up_once():
    assert spaces("Pendulum-v1") is spaces("Pendulum-v1")


@pytest.mark.slow
def test_the_default_has_an_exact_optimum():
    """At the task's own beta enough of the reference survives in every state, and the optimum earns more."""
    from prefenv.runs import RunConfig

    judge = RunConfig(task="segments", device="cpu").judge()
    assert judge.optimum_reward > float(judge.rewards.mean()) + 0.005 and judge.distance > 0.1
