"""The imperfect teacher: B-Pref's numbers for pairs, conservation laws for panels, exact resume."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from oracles.s_curve import SCurve
from oracles.teacher import Teacher, choice_probabilities, skipped, tied
from prefenv.agent import Agent
from prefenv.cli import main
from prefenv.errors import CheckpointError, ConfigError
from prefenv.oracle import Oracle, ScriptedOracle
from prefenv.packing import pack, unpack
from prefenv.registry import make_teacher
from prefenv.runs import RunConfig
from prefenv.tasks.shapes import Shapes
from prefenv.testing import check_oracle

TASK = Shapes()
CASES = ("oracle", "stoch", "stoch10", "myopic", "mistake", "equal", "skip", "all")


class Values(ScriptedOracle):
    """A sample is its own value: events of shape (1,)."""

    def score(self, samples):
        return samples[:, 0]


def teach(values, **settings):
    """Judgements ``(m, K)`` of panels that are worth ``values (m, K)``."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return Teacher(Values(TASK), **settings).judge(values[..., None])


# Against B-Pref


@pytest.mark.parametrize("case", CASES)
def test_pairs_agree_with_bpref(case, golden):
    """Skips, ties and the probability that the second one is chosen, all as the public code has them."""
    g = golden("08_bpref_teacher")
    beta, gamma, mistake, skip, equal, margin = g[f"{case}_beta_gamma_mistake_skip_equal_margin"]
    rewards = torch.from_numpy(np.stack([g["r1"], g["r2"]], 1))[..., 0]
    sums = rewards.sum(2)
    kept = ~skipped(sums, margin * skip)
    assert kept.nonzero()[:, 0].tolist() == g[f"{case}_kept_index"].tolist()
    assert torch.equal(tied(sums[kept], margin * equal), torch.tensor(g[f"{case}_equal_mask"]))
    # A path's discounted sums are its values; a finished sample has one reward, and gamma does nothing.
    weight = gamma ** torch.arange(rewards.shape[2]).flip(0)
    values = (rewards * weight).sum(2)[kept]
    ours = choice_probabilities(values, None if beta < 0 else beta, mistake)[:, 1]
    expected = torch.tensor(g[f"{case}_prob_label1_final_derived"])
    # Exact ties of a certain teacher: evenly ours, always the first theirs.
    even = (values[:, 0] == values[:, 1]) & bool(beta < 0)
    told = ~tied(sums[kept], margin * equal) & ~even
    torch.testing.assert_close(ours[told], expected[told], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours[even], torch.full_like(ours[even], 0.5))
    assert bool((expected[even & ~tied(sums[kept], margin * equal)] == mistake).all())


def test_thresholds_are_not_multiplied_twice(golden):
    """B-Pref multiplies skip by margin skip again after its first session: 0.4 acts as 0.16, and 7 stay, not 3."""
    g = golden("08_bpref_teacher")
    *_, skip, _, margin = g["skip_beta_gamma_mistake_skip_equal_margin"]
    sums = torch.from_numpy(np.stack([g["r1"], g["r2"]], 1)).sum((2, 3))
    ours, theirs = (int((~skipped(sums, t)).sum()) for t in (margin * skip, margin * skip * skip))
    assert ours == len(g["skip_kept_index"]) == 3 and theirs == 7
    answers = teach(sums, skip=float(skip), margin=float(margin))
    assert int((~answers.isnan()).all(1).sum()) == 3


# Laws of panels


@pytest.mark.parametrize("beta", [None, 0.0, 3.0])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_probabilities_of_panels(beta, k):
    values = torch.randn(50, k)
    p = choice_probabilities(values, beta, 0.0)
    torch.testing.assert_close(p.sum(1), torch.ones(50).double())
    assert torch.equal(p.argmax(1), values.argmax(1)) or beta == 0
    wrong = choice_probabilities(values, beta, 1.0)
    torch.testing.assert_close(wrong, (1 - p) / (k - 1))
    at = (k - 1) / k  # so often wrong, the answer says nothing
    even = choice_probabilities(values, beta, at)
    torch.testing.assert_close(even, torch.full_like(even, 1 / k))


def test_choices_come_as_often_as_they_should():
    values = torch.tensor([0.1, 0.5, 0.9])
    told = teach(values.expand(40_000, 3), beta=2.0, mistake=0.1)
    assert set(told.unique().tolist()) == {0.0, 1.0} and bool((told.sum(1) == 1).all())
    expected = choice_probabilities(values[None], 2.0, 0.1)[0]
    # Three standard errors of a share.
    error = 3 * (expected * (1 - expected) / len(told)).sqrt()
    assert bool(((told.double().mean(0) - expected).abs() < error).all())


def test_a_perfect_teacher_names_the_best():
    values = torch.rand(100, 4)
    assert torch.equal(teach(values), (values == values.amax(1, keepdim=True)).float())
    limit = teach(values, beta=1e6)
    assert torch.equal(limit, teach(values)), "beta -> infinity"
    shared = teach(torch.tensor([[0.5, 0.5, 0.1]]).expand(4000, 3)).mean(0)
    assert shared[2] == 0 and float(shared[0]) == pytest.approx(0.5, abs=0.03)


def test_ratings_are_choices_against_the_threshold():
    """Accepted with probability sigmoid(beta (S - threshold)), flipped by a mistake; the oracle accepts at 0.5."""
    for settings, expected in (
        ({"beta": 3.0}, 1 / (1 + math.exp(-3 * 0.2))),
        ({"mistake": 0.2}, 0.8),
        ({"beta": 3.0, "mistake": 0.2}, 0.2 + 0.6 / (1 + math.exp(-3 * 0.2))),
    ):
        rate = float(teach(torch.full((40_000, 1), 0.7), **settings).double().mean())
        assert rate == pytest.approx(expected, abs=3 * 0.5 / 200), settings
    panels = torch.tensor([[0.05, 0.45, 0.55, 0.9]])
    assert teach(panels, answer="choose").tolist() == [[0, 0, 1, 1]]
    assert teach(panels.T).T.tolist() == [[0, 0, 1, 1]]
    told = teach(panels, answer="choose", equal=0.1, skip=0.1)
    torch.testing.assert_close(told, torch.tensor([[torch.nan, 0.5, 0.5, 1]]), equal_nan=True)


def test_skips_and_ties_of_panels():
    values = [[0.0, 0.05, 0.1], [0.3, 0.35, 0.39], [0.3, 0.35, 0.41], [0.0, 0.05, 0.9]]
    told = teach(values, skip=0.1, equal=0.1)
    expected = [[torch.nan] * 3, [0.5] * 3, [0, 0, 1], [0, 0, 1]]
    torch.testing.assert_close(told, torch.tensor(expected), equal_nan=True)
    scaled = teach(np.array(values) * 100, skip=0.1, equal=0.1, margin=100)
    torch.testing.assert_close(scaled, told, equal_nan=True)


def test_what_the_oracle_does_not_answer_stays_open():
    class Shy(Oracle):
        def judge(self, panels):
            return panels[..., 0].masked_fill(panels[..., 0] < 0, torch.nan)

    panels = torch.tensor([[1.0, 2.0], [1.0, -1.0]])[..., None]
    told = Teacher(Shy(TASK)).judge(panels)
    torch.testing.assert_close(told, torch.tensor([[0, 1], [torch.nan] * 2]), equal_nan=True)


def test_same_seed_same_answers():
    values, settings = torch.rand(200, 4), {"beta": 2.0, "mistake": 0.2}
    one, other = teach(values, seed=1, **settings), teach(values, seed=1, **settings)
    assert torch.equal(one, other) and not torch.equal(one, teach(values, seed=2, **settings))
    teacher = Teacher(Values(TASK), seed=1, **settings)
    twice = [teacher.judge(values[..., None]) for _ in range(2)]
    assert torch.equal(twice[0], one) and not torch.equal(twice[1], one), (
        "asked again, it may differ"
    )


@pytest.mark.parametrize("answer", ["best", "choose"])
def test_it_is_an_oracle(answer):
    samples, _ = TASK.data(24, torch.Generator().manual_seed(0))
    teacher = Teacher(SCurve(TASK), 5.0, 0.1, 0.05, 0.05, answer=answer)
    check_oracle(teacher, samples, low=0, high=1)


def test_wrong_settings():
    oracle = SCurve(TASK)
    for settings, message in (
        ("beta=-1", "beta must be finite"),
        ("mistake=1.5", "probability"),
        ("skip=lots", "skip must be finite"),
        ("answer=score", "best or choose"),
        ("patience=1", "patience"),
        ("beta", "key=value"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_teacher(settings, oracle)
    assert make_teacher("", oracle).beta is None
    assert make_teacher("beta=2,mistake=0.1", oracle, seed=3).mistake == 0.1


# In a run

SMALL = RunConfig(
    agent="d3po", queries=64, rows=16, teacher="beta=2,mistake=0.3", steps=4, seed=100
)


def agent_of(config: RunConfig) -> Agent:
    from prefenv.registry import make_agent

    return make_agent(config.agent, config.make_env(), seed=config.seed)


def test_a_run_goes_on_exactly_with_the_teachers_doubts(tmp_path):
    whole, first, second = (agent_of(SMALL) for _ in range(3))
    seen: list[float] = []
    whole.learn(64, callback=lambda _, m: seen.append(m["judgement"]))
    first.learn(32)
    (tmp_path / "state").write_bytes(pack(first.state()))
    second.restore(unpack(tmp_path / "state"))
    second.learn(32)
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    plain = agent_of(RunConfig(**{**SMALL.__dict__, "teacher": None}))
    with pytest.raises(CheckpointError):
        plain.restore(whole.state())


def test_the_env_asks_the_teacher_and_the_judge_the_oracle(monkeypatch):
    env = RunConfig(teacher=SMALL.teacher, queries=4000, rows=16).make_env().unwrapped
    samples, _ = TASK.data(4000, torch.Generator().manual_seed(0))
    told = env.judge(samples).view(-1, 4).double()
    p = choice_probabilities(SCurve(TASK).score(samples).view(-1, 4), 2.0, 0.3)
    worth = (told * p).sum(1)  # how probable the choices were: its mean is E sum p^2
    assert float(worth.mean()) == pytest.approx(float(p.square().sum(1).mean()), abs=0.01)
    assert bool((told.sum(1) == 1).all()) and env.desk.nondeterministic
    monkeypatch.setattr("prefenv.runs.Judge", lambda flow, task, oracle, **_: oracle)
    assert type(SMALL.judge()) is SCurve


def test_runs_without_a_teacher_keep_their_record():
    plain = RunConfig(seed=100)
    assert "teacher" not in plain.record() and SMALL.record()["teacher"] == SMALL.teacher
    assert RunConfig(seed=100, teacher="").name != plain.name


def test_a_teacher_can_be_copied():
    values = torch.rand(50, 4, 1)
    teacher = Teacher(Values(TASK), beta=1.0)
    for copied in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(copied.judge(values), copy.deepcopy(teacher).judge(values))


def test_cli_says_what_is_wrong(capsys, tmp_path):
    assert main(["align", "--teacher", "beta=-2", "--out", str(tmp_path / "run")]) == 2
    assert "beta must be finite" in capsys.readouterr().err


@pytest.mark.cuda
def test_cuda_answers_the_same():
    values = torch.rand(200, 4, 1)
    here, there = (
        Teacher(Values(TASK), beta=2.0, seed=1).judge(v) for v in (values, values.cuda())
    )
    assert there.is_cuda and torch.equal(here, there.cpu())
