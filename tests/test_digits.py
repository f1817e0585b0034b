"""The digits task, its U-Net, its judges and its benchmark."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks import digits as digits_benchmark
from benchmarks.digits import (
    COLUMNS,
    METHODS,
    PAIRS,
    RESULTS,
    Args,
    Bench,
    cell,
    config,
    page,
    part_name,
    table,
)
from oracles import lenet
from oracles.jpeg import jpeg_bytes
from oracles.lenet import LeNet
from prefenv import plotting
from prefenv.checkpoints import load_checkpoint, save_checkpoint, shipped
from prefenv.errors import CheckpointError, ConfigError
from prefenv.networks import GuidedVelocity
from prefenv.networks_unet import VelocityUNet
from prefenv.policy import FlowPolicy
from prefenv.registry import AGENTS, lookup, make_oracle, make_task
from prefenv.runs import RunConfig
from prefenv.tasks.digits import pictures
from prefenv.tasks.shapes import Shapes
from prefenv.testing import check_oracle


@pytest.fixture(scope="module")
def task():
    return make_task("digits")


@pytest.fixture(scope="module")
def real(task):
    """Pictures that neither the generator nor the judge was trained on, and their digits."""
    return task.data(300, torch.Generator().manual_seed(0), "test")


@pytest.fixture(scope="module")
def made(task):
    """Model A's samples, 30 of each digit."""
    asked = task.fixed_conditions().repeat(30)
    noise = torch.randn(300, *task.event_shape, generator=torch.Generator().manual_seed(0))
    return FlowPolicy(load_checkpoint(None, task).flow).sample(noise, asked), asked


# The data


def test_every_picture_is_in_one_part():
    parts = pictures()
    assert [len(parts[p][0]) for p in ("generator", "judge", "test")] == [998, 599, 200]
    kept = torch.cat([x.flatten(1) for x, _, _ in parts.values()]).double()
    all_of_them = torch.from_numpy(load_digits().data)
    order = [sorted(map(tuple, rows.tolist())) for rows in (kept, all_of_them)]
    assert order[0] == order[1]


def test_levels_keep_to_their_cells_and_some_labels_are_wrong(task):
    """A level is drawn uniformly within its own 17th of [-1, 1]: the level can be read back exactly."""
    x, told = task.data(1000, torch.Generator().manual_seed(0))
    assert x.shape == (1000, 1, 8, 8) and x.dtype == torch.float32 and float(x.abs().max()) <= 1
    level = ((x + 1) * 17 / 2).floor()
    levels, digits, _ = pictures()["generator"]
    known = dict(zip(map(tuple, levels.flatten(1).tolist()), digits.tolist(), strict=True))
    digit = torch.tensor([known[tuple(map(int, row))] for row in level.flatten(1).tolist()])
    assert float((told != digit).float().mean()) == pytest.approx(0.15, abs=0.04)
    gap = ((told - digit) % 10)[told != digit]
    assert gap.unique().tolist() == list(range(1, 10)), "any other digit"
    inside = ((x + 1) * 17 / 2) % 1
    assert float(inside.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(inside.std()) == pytest.approx(12**-0.5, abs=0.01)


def test_the_nearest_picture_tells_digit_and_distance(task, real):
    levels, digits, _ = pictures()["test"]
    x = (2 * (levels[:5].float() + 0.5) / 17 - 1)[:, None]
    assert torch.equal(task.classify(x), digits[:5])
    assert float(task.residual(x).max()) < 1e-3
    assert task.residual(x + 0.1).tolist() == pytest.approx([0.1] * 5, abs=1e-4)
    fresh, digit = make_task("digits:wrong=0.0").data(300, torch.Generator().manual_seed(1))
    assert float((task.classify(fresh) == digit).float().mean()) > 0.95
    assert float(task.residual(fresh).median()) > 0.1, "the generator's pictures are not among them"


def test_a_file_of_other_pictures_is_another_task(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (36, 28, 28), dtype=np.uint8), rng.integers(0, 10, 36)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y)
    task = make_task(f"digits:wrong=0.0,data_path={tmp_path / 'mnist.npz'}")
    assert task.name == "digits+mnist" and task.event_shape == (1, 28, 28)
    picture, digit = task.data(7, torch.Generator().manual_seed(0))
    levels = ((picture[:, 0] + 1) * 128).floor().numpy().astype(np.uint8)
    for row, d in zip(levels, digit.tolist(), strict=True):
        assert any(np.array_equal(row, a) and d == b for a, b in zip(x, y, strict=True))
    v = task.network()(picture, torch.tensor(0.5), digit)
    assert v.shape == picture.shape
    with pytest.raises(CheckpointError, match=r"digits\+mnist"):
        load_checkpoint(None, task)
    with pytest.raises(CheckpointError, match=r"task 'digits', not 'digits\+mnist'"):
        load_checkpoint(shipped("digits"), task)


def save(path, levels, digits, key="x_train"):
    """A file of pictures; its path as text."""
    np.savez(path, **{key: np.asarray(levels), "y_train": np.asarray(digits)})
    return str(path)


@pytest.mark.parametrize("name", ["digits", "shapes", "digits-judge"])
def test_a_file_named_like_one_of_ours_takes_nothing_of_ours(name, tmp_path):
    task = make_task(f"digits:data_path={save(tmp_path / f'{name}.npz', *RIGHT)}")
    assert task.name == f"digits+{name}"
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*digits\+"):
        load_checkpoint(None, task)
    with pytest.raises(CheckpointError, match=rf"lenet --task digits:data_path=\S*{name}\.npz"):
        make_oracle("legible", task)


RIGHT = np.arange(9 * 8 * 8).reshape(9, 8, 8) % 256, np.arange(9)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, np.float64])
def test_whole_numbers_are_levels_in_any_type(kind, tmp_path):
    x, y = RIGHT
    parts = pictures(save(tmp_path / "a.npz", x.astype(kind), y.astype(kind)))
    kept = sorted(map(tuple, torch.cat([p[0].flatten(1) for p in parts.values()]).tolist()))
    assert kept == sorted(map(tuple, x.reshape(9, -1).tolist()))
    assert {p[2] for p in parts.values()} == {255}
    assert sorted(torch.cat([p[1] for p in parts.values()]).tolist()) == list(range(9))


@pytest.mark.parametrize(
    ("levels", "digits", "message"),
    [
        (RIGHT[0] / 255, RIGHT[1], r"goes from 0 to 1: .* times 255"),
        (RIGHT[0] - 1, RIGHT[1], "goes from -1 to 254"),
        (RIGHT[0] + 1, RIGHT[1], "goes from 1 to 256"),
        (0 * RIGHT[0], RIGHT[1], "goes from 0 to 0"),
        (np.full((9, 8, 8), np.nan), RIGHT[1], "goes from nan"),
        (RIGHT[0], RIGHT[1] + 2, "y_train .* from 2 to 10"),
        (RIGHT[0], RIGHT[1] - 0.5, "y_train .* from -0.5 to 7.5"),
        (RIGHT[0], RIGHT[1][:8], r"y_train .* shape \(8,\)"),
        (RIGHT[0][:, :7], RIGHT[1], r"shape \(9, 7, 8\)"),
        (RIGHT[0][:, :, :7], RIGHT[1], r"shape \(9, 8, 7\)"),
        (RIGHT[0][:, :2], RIGHT[1], r"shape \(9, 2, 8\)"),
        (RIGHT[0][:8], RIGHT[1][:8], r"shape \(8, 8, 8\)"),
        (RIGHT[0].reshape(9, 64), RIGHT[1], r"shape \(9, 64\)"),
        (np.full((9, 8, 8), "ink"), RIGHT[1], "is no .npz"),
    ],
)
def test_a_file_of_something_else_is_refused(levels, digits, message, tmp_path):
    task = make_task(f"digits:data_path={save(tmp_path / 'a.npz', levels, digits)}")
    with pytest.raises(ConfigError, match=f"digits: .*{message}"):
        task.data(1, torch.Generator())


def test_a_broken_file_is_refused(tmp_path):
    save(tmp_path / "other.npz", *RIGHT, key="x")
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "short.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:500])
    np.save(tmp_path / "one.npy", RIGHT[0])
    for name in ("other.npz", "text.npz", "short.npz", "one.npy", "none.npz"):
        with pytest.raises(ConfigError, match="is no .npz"):
            pictures(str(tmp_path / name))


def test_pictures_are_drawn_with_their_ink_black(task, real):
    one = plotting.frame(task, real[0][0].numpy())
    assert one.shape == (128, 128, 3)
    level = ((real[0][0, 0] + 1) * 8.5).floor()
    dark = one[8:-8, 8:-8].mean(-1)
    cells = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(dark)[None].float(), 8)[0]
    assert float(torch.corrcoef(torch.stack([level.flatten(), -cells.flatten()]))[0, 1]) > 0.95
    assert len(plotting.text(task, real[0][0].numpy()).splitlines()) == 12


# The network


@pytest.fixture
def net():
    torch.manual_seed(0)
    field = VelocityUNet((1, 8, 8), 8, 11)
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return field


def test_the_network_looks_at_time_label_and_all_pixels(net):
    x, c = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 10])
    v = net(x, torch.tensor(0.3), c)
    assert v.shape == x.shape
    for other in (net(x, torch.tensor(0.6), c), net(x, torch.tensor(0.3), (c + 1) % 11)):
        assert bool(((v - other).flatten(1).abs().amax(1) > 1e-3).all())
    moved = x.clone()
    moved[:, :, 0, 0] += 1
    far = (net(moved, torch.tensor(0.3), c) - v)[..., -1, -1].detach()
    assert float(far.abs().min()) > 0, "a corner is felt in the opposite one"
    rows = torch.stack([net(x[i : i + 1], torch.tensor(0.3), c[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(rows, v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net(x, torch.full((4,), 0.3), c), v)


def test_it_begins_at_zero_and_wants_even_sizes():
    assert not VelocityUNet((1, 8, 8), 8)(
        torch.randn(2, 1, 8, 8), torch.tensor(0.5), torch.zeros(2).long()
    ).any()
    with pytest.raises(ConfigError, match="even"):
        VelocityUNet((1, 7, 8))
    for width in (6, 0, -4, 8.0):
        with pytest.raises(ConfigError, match="multiple of 4"):
            make_task(f"digits:channels={width}").network()
    with pytest.raises(ConfigError, match="conditional"):
        VelocityUNet((1, 8, 8), 8)(torch.zeros(1, 1, 8, 8), torch.tensor(0.5))


# The reference and the judges


def test_the_reference_makes_what_is_asked_and_could_be_better(task, made):
    x, asked = made
    nearest = float((task.classify(x) == asked).float().mean())
    card = load_checkpoint(None, task).card
    assert nearest == pytest.approx(card["asked_class_rate"], abs=0.07) and nearest > 0.7
    assert float(task.residual(x).median()) == pytest.approx(card["residual"], rel=0.1)
    score = make_oracle("legible", task).score(x, asked)
    assert 0.6 < float(score.mean()) < 0.98, "there is something to be preferred"


def test_guidance_makes_samples_more_typical(task, made):
    flow = load_checkpoint(None, task).flow
    assert isinstance(flow.field, GuidedVelocity) and flow.field.weight == 1.0
    guided = make_task("digits:guidance=2.0")
    noise = torch.randn(300, *task.event_shape, generator=torch.Generator().manual_seed(0))
    x = FlowPolicy(load_checkpoint(None, guided).flow).sample(noise, made[1])
    oracle = make_oracle("legible", task)
    assert float(oracle.score(x, made[1]).mean()) > float(oracle.score(*made).mean()) + 0.01


def test_the_judge_reads_pictures_it_never_saw(task, real):
    oracle, (x, digit) = make_oracle("legible", task), real
    each = torch.stack([oracle.score(x, torch.full_like(digit, k)) for k in range(10)], 1)
    torch.testing.assert_close(each.sum(1), torch.ones(300))
    assert float((each.argmax(1) == digit).float().mean()) > 0.93
    torch.testing.assert_close(oracle.score(x, digit), each.gather(1, digit[:, None])[:, 0])


def test_the_aesthetic_tells_real_pictures_from_model_a(task, real, made):
    oracle = make_oracle("aesthetic", task)
    a, b = oracle.score(real[0]), oracle.score(made[0])
    assert float((a[:, None] > b).float().mean()) > 0.6 and not oracle.conditional


def test_jpeg_bytes_are_those_of_the_file(task, real):
    x = torch.cat([real[0][:3], torch.full((1, 1, 8, 8), 3.0)])
    for picture, size in zip(x, jpeg_bytes(x, 90).tolist(), strict=True):
        file = io.BytesIO()
        levels = np.round((picture[0].clamp(-1, 1).numpy() + 1) * 127.5).astype(np.uint8)
        Image.fromarray(levels).save(file, "JPEG", quality=90)
        assert size == len(file.getvalue())
    small, large = make_oracle("jpeg", task), make_oracle("jpeg:prefer=large", task)
    torch.testing.assert_close(small.score(x) + large.score(x), torch.ones(4))
    flat = small.score(x)
    assert float(flat[3]) > 0.99 > float(flat[:3].max()), "a blank page is small"
    share = (small.score(real[0]) >= small.threshold).float().mean()
    assert 0.03 < float(share) < 0.2, "about one real picture in ten"
    assert float(small.score(real[0]).mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "name", ["legible", "legible:answer=extremes", "aesthetic", "jpeg", "jpeg:prefer=large"]
)
def test_the_oracles_keep_their_contract(task, real, name):
    if "extremes" in name:
        scores = make_oracle(name, task).judge(real[0][:12].unflatten(0, (3, 4)), real[1][:3])
        assert torch.equal(scores.isnan().sum(1), torch.full((3,), 2))
        assert torch.equal(scores.nansum(1), torch.ones(3))
        return
    check_oracle(make_oracle(name, task), real[0][:32], real[1][:32], low=0, high=1)


def test_other_tasks_and_settings_are_refused(task, tmp_path):
    for name in ("legible", "aesthetic", "jpeg"):
        with pytest.raises(ConfigError, match="looks at digits"):
            make_oracle(name, Shapes())
    with pytest.raises(ConfigError, match="wrong must lie"):
        make_task("digits:wrong=2")
    for name in ("jpeg:prefer=tiny", "jpeg:quality=99"):
        with pytest.raises(ConfigError, match="jpeg:"):
            make_oracle(name, task)
    with pytest.raises(CheckpointError, match=r"oracles\.lenet"):
        make_oracle(f"legible:path={tmp_path / 'none.safetensors'}", task)
    with pytest.raises(CheckpointError, match="no judge of digits"):
        make_oracle(f"legible:path={shipped('digits-aesthetic')}", task)


@pytest.fixture
def untrained(monkeypatch):
    """``oracles.lenet`` writes networks that were never trained."""

    def made(task, *_):
        size = task.event_shape[1:]
        return {lenet.JUDGE: (LeNet(size, 10), {}), lenet.AESTHETIC: (LeNet(size, 1), {})}

    monkeypatch.setattr(lenet, "made", made)


def test_the_judges_card_tells_the_command_that_made_it(tmp_path, monkeypatch, untrained):
    assert lenet.command(lenet.Args()) == "python -m oracles.lenet"
    assert "| python -m oracles.lenet |" in shipped("digits-judge", ".md").read_text()
    monkeypatch.chdir(tmp_path)
    argv = ["--task", "digits:data_path=my digits.npz", "--steps", "2", "--seed", "3"]
    save("my digits.npz", *RIGHT)
    args = tyro.cli(lenet.Args, args=argv)
    task = make_task(args.task)
    lenet.main(args)
    card = (tmp_path / "checkpoints/digits+my digits-judge.md").read_text()
    (told,) = re.findall(r"\| command \| python -m oracles\.lenet (.*) \|", card)
    assert shlex.split(told) == argv
    make_oracle("legible", task)


def test_a_lenet_looks_at_larger_pictures_too():
    assert LeNet((28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# In the house


def test_the_env_asks_for_digits():
    env = gym.make_vec("prefenv/Digits-v0", num_envs=4, panel_size=4, steps=2)
    observation, _ = env.reset(seed=0, options={"condition": 7})
    assert observation["condition"].tolist() == [7] * 4 and observation["x"].shape == (4, 64)
    for _ in range(2):
        observation, reward, *_, info = env.step(env.unwrapped.reference.predict(observation)[0])
    assert info["judged"].all() and ((reward >= 0) & (reward <= 1)).all()


def test_a_run_takes_the_task_its_own_oracle():
    assert RunConfig(task="digits").oracle == "legible" and RunConfig().oracle == "s-curve"
    env = RunConfig(task="digits:guidance=2.0", queries=32, panel_size=4).make_env().unwrapped
    assert env.reference.flow.field.weight == 2.0, "its settings reach the env"


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_learns_digits(name):
    cls = lookup("agent", name)
    env = gym.make_vec("prefenv/Digits-v0", num_envs=8, panel_size=4, steps=4, control=cls.control)
    agent = cls(env, seed=0).learn(8)
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert bool(agent.sample(noise, torch.arange(10)).isfinite().all())
    assert agent.env.ledger.queries == 8 and agent.env.ledger.nfe > 0


# The benchmark


def test_the_benchmark_measures_what_it_says(task, real):
    bench = Bench("digits", 2)
    got = bench.measure(*real)
    assert got["score"] > 0.9 and got["preferred_rate"] > 0.9
    assert got["nearest"] == 1.0 and got["residual"] < 0.05, "they are among the nearest"
    wrong = bench.measure(real[0], (real[1] + 1) % 10)
    assert wrong["score"] < 0.05 and wrong["nearest"] == 0.0
    assert bench.asked.tolist() == [*range(10)] * 2


def test_its_pairs_are_the_protocols():
    bench = Bench("digits", 1)
    for pairs, (size, _) in PAIRS.items():
        env = config(Args(queries=32), "data", pairs, 0).make_env().unwrapped
        env.reset(seed=0)
        x = env.reference.sample(env._x, env.condition)
        told = env.judge(x, None, env.condition).view(-1, size)
        score = bench.oracle.score(x, env.condition).view(-1, size)
        assert torch.equal((told == 1).long().argmax(1), score.argmax(1)), "the best is preferred"
        assert torch.equal((told == 0).long().argmax(1), score.argmin(1)), "the worst is rejected"
        assert bool(((told == 1).sum(1) == 1).all() & ((told == 0).sum(1) == 1).all())


def test_its_table_has_a_line_for_each_model():
    known = dict.fromkeys(("score", "preferred_rate", "nearest", "residual"), 0.5)
    rows = [{"model": "PFM", "pairs": "random", **known, "score": s} for s in (0.25, 0.75)]
    rows += [{"model": name, **known} for name in ("real", "reference")]
    lines = table(rows)
    assert lines[2] == "| real |  | " + " | ".join(["0.5000"] * 4) + " |"
    assert (
        lines[-1]
        == "| PFM | random | 0.5000 (0.2500 to 0.7500) | "
        + " | ".join([cell([0.5] * 2)] * 3)
        + " |"
    )
    assert len(lines) == 5


def test_its_parts_of_other_settings_are_others():
    case, args = ("PFM", "random", 0), Args()
    changes = (
        {"task": "digits:wrong=0.0"},
        {"pfm_updates": 1},
        {"applications": 1},
        {"per_digit": 1},
    )
    names = [part_name(a, *case) for a in (args, *(replace(args, **c) for c in changes))]
    names += [part_name(args, *other) for other in (("data", *case[1:]), (*case[:2], 1))]
    assert len(set(names)) == 7


def test_it_takes_its_task_through(tmp_path, monkeypatch, untrained):
    """Of other pictures: their sizes, their reference, their judge, from the env to the page."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    save("my.npz", rng.integers(0, 256, (90, 12, 12)), rng.integers(0, 10, 90))
    text = "digits:channels=4,data_path=my.npz"
    with pytest.raises(CheckpointError, match=r"digits\+my"):
        Bench(text, 1)
    task = make_task(text)
    save_checkpoint(Path("checkpoints/digits+my.safetensors"), task.flow(), task, {})
    lenet.main(lenet.Args(task=text))
    args = Args(task=text, seeds=1, queries=128, pfm_updates=1, applications=2, per_digit=1)
    monkeypatch.setattr(digits_benchmark, "METHODS", {"PFM": METHODS["PFM"]})
    digits_benchmark.main(replace(args, work=tmp_path / "work", out=tmp_path / "out"))
    found = (tmp_path / "out" / "digits+my.md").read_text()
    assert "at 12 x 12" in found and f"--task {text} --seeds 1 --queries 128`" in found
    assert "10 samples scored" in found and "| PFM x 2 | random |" in found
    assert "updates=1`" in found and (tmp_path / "out" / "digits+my.png").exists()


def results():
    return [json.loads(line) for line in (RESULTS / "digits.jsonl").read_text().splitlines()]


def test_the_page_says_what_the_results_say():
    rows, lines = results(), (RESULTS / "digits.md").read_text().splitlines()
    assert lines[: len(page(rows))] == page(rows)
    told = "\n".join(lines)
    for method, (agent, rounds) in METHODS.items():
        mine = [r for r in rows if r["model"] == method]
        text = agent.format(pfm_updates=Args.pfm_updates)
        assert {(r["agent"], r["rounds"]) for r in mine} == {(text, rounds)}
        assert sorted((r["pairs"], r["seed"]) for r in mine) == [
            (p, s) for p in PAIRS for s in (0, 1)
        ]
        assert f"{method}: `{text}`, rounds: {rounds}" in told


def test_the_rows_that_no_training_made_come_out_again(task):
    bench, rows = Bench("digits", Args.per_digit), results()
    policy = FlowPolicy(load_checkpoint(None, task).flow, shift=task.shift)
    again = bench.known("digits", policy.sample(bench.noise, bench.asked))
    for mine, known in zip(again, rows, strict=False):
        assert [mine.pop(c) for c in COLUMNS] == pytest.approx(
            [known.pop(c) for c in COLUMNS], rel=1e-3
        )
        assert mine == known
