"""The learned reward: Bradley and Terry's likelihood, what it predicts, its gradient, its file, and runs on it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from oracles.learned import Learned
from oracles.s_curve import SCurve
from prefenv.cli import main
from prefenv.device import make_generator
from prefenv.errors import CheckpointError, ConfigError, FeedbackError
from prefenv.feedback import Judgement, Panel, Sample
from prefenv.feedback.files import Feedback, write_jsonl
from prefenv.oracle import Desk, Ledger
from prefenv.reward import (
    RewardConfig,
    RewardEnsemble,
    accuracy,
    bradley_terry_loss,
    load_reward,
    save_reward,
    train_reward,
)
from prefenv.runs import RunConfig
from prefenv.tasks.shapes import Shapes
from prefenv.testing import check_oracle

TASK = Shapes()
QUICK = RewardConfig(steps=150, members=3, width=64)


def answered(n=200, k=4, answer="best", seed=0) -> Feedback:
    """Panels of real shapes, judged by the scripted oracle."""
    x, _ = TASK.data(n * k, make_generator(seed))
    panels = x.unflatten(0, (n, k))
    told = SCurve(TASK, answer).judge(panels)
    feedback = Feedback()
    for row, scores in zip(panels, told, strict=True):
        samples = [Sample(s.numpy()) for s in row]
        feedback.samples += samples
        feedback.panels.append(Panel(tuple(s.id for s in samples)))
        feedback.events.append(Judgement(feedback.panels[-1].samples, tuple(scores.tolist())))
    return feedback


@pytest.fixture(scope="module")
def trained():
    return train_reward(answered(), QUICK)


# The likelihood


def test_the_likelihood_of_pairs_ties_and_ratings():
    reward = torch.tensor([[1.0, 0.25]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-0.75))
    for score, expected in (
        ([1, 0], -math.log(p)),
        ([0, 0.1], -math.log(1 - p)),
        ([0.5, 0.5], -(math.log(p) + math.log(1 - p)) / 2),
    ):
        loss = bradley_terry_loss(reward, torch.tensor([score]).double())
        assert float(loss) == pytest.approx(expected, abs=1e-7)
    assert float(bradley_terry_loss(reward, torch.tensor([[1.0, torch.nan]]))) == 0
    rating = bradley_terry_loss(reward[:, :1], torch.tensor([[0.8]]).double())
    p = 1 / (1 + math.exp(-1))
    assert float(rating) == pytest.approx(-0.8 * math.log(p) - 0.2 * math.log(1 - p), abs=1e-7)


def test_a_panel_is_its_pairs():
    reward, score = torch.randn(5, 4).double(), torch.rand(5, 4).double()
    score[0, 1], score[2] = torch.nan, torch.nan
    each = [
        bradley_terry_loss(reward[m, [i, j]], score[m, [i, j]])
        for m in range(5)
        for i in range(4)
        for j in range(i)
        if not score[m, [i, j]].isnan().any()
    ]
    assert len(each) == 3 * 6 + 3
    torch.testing.assert_close(bradley_terry_loss(reward, score), torch.stack(each).mean())


def test_it_finds_the_rewards_that_made_the_answers():
    """Maximum likelihood of three samples' rewards, by Newton on counts, against the loss's own minimum."""
    truth = torch.tensor([0.0, 0.7, 1.5]).double()
    p = (truth[:, None] - truth).sigmoid()
    free = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=100)
    score = torch.eye(2).double()

    def closure():
        optimizer.zero_grad()
        loss = sum(
            p[i, j] * bradley_terry_loss(free[None, [i, j]], score[:1])
            + p[j, i] * bradley_terry_loss(free[None, [i, j]], score[1:])
            for i, j in ((0, 1), (0, 2), (1, 2))
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close((free - free[0]).detach(), truth, rtol=0, atol=1e-4)


def test_members_are_networks_of_their_own():
    model = RewardEnsemble((3, 2), 4, 8, make_generator(0))
    x = torch.randn(5, 3, 2)
    together = model(x)
    for e in range(4):
        h = x.flatten(1)
        for i, (w, b) in enumerate(zip(model.weights, model.biases, strict=True)):
            h = (torch.nn.functional.silu(h) if i else h) @ w[e] + b[e]
        torch.testing.assert_close(together[e], h[:, 0])
    apart = torch.randn(4, 5, 3, 2)
    torch.testing.assert_close(model(apart)[2], model(apart[2])[2])
    assert together.std(0).min() > 0


# Training


def test_it_predicts_answers_that_it_has_not_seen(trained):
    model, card = trained
    x, kind = TASK.data(1000, make_generator(9))
    value, truth = model.value(x), SCurve(TASK).score(x)
    assert float(((value >= 0.5) == (truth >= 0.5)).float().mean()) > 0.95
    assert card["held_out_accuracy"] > 0.8 and card["panels"] == 200
    assert accuracy(value.view(-1, 4), truth.view(-1, 4)) > 0.7, "cleaner ones too, more or less"
    wrong = accuracy(-value.view(-1, 4), truth.view(-1, 4))
    assert wrong < 0.3


def test_ratings_teach_too():
    model, card = train_reward(answered(400, 1, "choose"), QUICK)
    x, _ = TASK.data(500, make_generator(9))
    right = (model.value(x) >= 0.5) == (SCurve(TASK).score(x) >= 0.5)
    assert float(right.float().mean()) > 0.95 and card["held_out_accuracy"] > 0.9


def test_same_seed_same_bits(trained):
    again, card = train_reward(answered(), QUICK)
    for one, other in zip(
        trained[0].state_dict().values(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    assert card == trained[1]


def test_answers_that_teach_nothing():
    same = answered(8)
    ties = [Judgement(j.samples, (1,) * 4) for j in same.judgements()]
    skips = [Judgement(j.samples, (None,) * 4) for j in same.judgements()]
    for events, message in ((ties, "teach nothing"), (skips, "teach nothing"), ([], "of one size")):
        with pytest.raises(FeedbackError, match=message):
            train_reward(Feedback(same.samples, same.panels, events), QUICK)
    high = answered(8, 1)
    high.events = [Judgement(j.samples, (3.0,)) for j in high.judgements()]
    with pytest.raises(FeedbackError, match=r"lie in \[0, 1\]"):
        train_reward(high, QUICK)
    with pytest.raises(ConfigError, match="out of range"):
        RewardConfig(members=0)


# The oracle


@pytest.fixture
def path(trained, tmp_path):
    save_reward(tmp_path / "reward.safetensors", *trained)
    return str(tmp_path / "reward.safetensors")


def test_the_file_holds_it_whole(trained, path):
    model, card = load_reward(Path(path))
    assert card == trained[1]
    x = torch.randn(5, 64, 2)
    assert torch.equal(model.value(x), trained[0].value(x))
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["card"])["feedback_digest"] == answered().digest()


def test_it_is_a_differentiable_oracle(path):
    samples, _ = TASK.data(24, make_generator(3))
    for caution in (0.0, 1.0):
        oracle = Learned(TASK, path, caution)
        check_oracle(oracle, samples.double(), low=0, high=1)
        reward, gradient = Desk(oracle, Ledger()).gradient(samples)
        assert bool(gradient.flatten(1).any(1).all()) and reward.dtype == torch.float32
    told = [Learned(TASK, path, c).judge(samples[None]) for c in (0.0, 1.0)]
    assert bool((told[1] < told[0]).all()), "caution lowers what members disagree on"
    assert oracle.threshold == 0.5 and oracle.panel_size is None


def test_what_is_no_reward_model(path, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Learned(TASK, path + "x")
    with pytest.raises(CheckpointError, match="is no prefenv-reward-1"):
        Learned(TASK, "checkpoints/shapes.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(64, 2\), shapes has \(32, 2\)"):
        Learned(Shapes(points=32), path)
    with pytest.raises(ConfigError, match="caution"):
        Learned(TASK, path, -1.0)


def test_runs_on_it_are_scored_by_the_true_oracle(path, monkeypatch):
    config = RunConfig(agent="d3po", oracle=f"learned:path={path}", queries=64, rows=16, steps=4)
    env = config.make_env().unwrapped
    assert env.desk.differentiable
    monkeypatch.setattr("prefenv.runs.Judge", lambda flow, task, oracle, **_: oracle)
    assert type(config.judge()) is SCurve


def test_train_reward_command(tmp_path, capsys):
    write_jsonl(answered(40), tmp_path / "f.jsonl")
    out = tmp_path / "reward.safetensors"
    command = ["train-reward", "--feedback", str(tmp_path / "f.jsonl"), "--out", str(out)]
    assert main([*command, "--steps", "20", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["panels"], card["panel_size"], card["steps"]) == (40, 4, 20)
    assert load_reward(out)[1] == card
    assert main(["check-oracle", f"learned:path={out}"]) == 0
    assert main([*command[:3], "--out", str(tmp_path / "reward.pt")]) == 2
    assert main([*command[:2], str(tmp_path / "none.jsonl")]) == 2
    assert "no feedback file" in capsys.readouterr().err


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(path):
    samples, _ = TASK.data(8, make_generator(3))
    oracle = Learned(TASK, path)
    there = oracle.judge(samples[None].cuda())
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), oracle.judge(samples[None]), rtol=1e-4, atol=1e-5)
