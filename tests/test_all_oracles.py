"""Every oracle that has a name keeps the contract; ``prefenv check-oracle`` says so, or what is wrong."""

from __future__ import annotations

import pytest
import torch

from oracles.s_curve import SCurve
from prefenv.cli import main
from prefenv.device import make_generator
from prefenv.feedback import FeedbackStore, Judgement
from prefenv.oracle import Oracle
from prefenv.registry import ORACLES, TASKS, lookup, make_oracle, make_task, make_teacher
from prefenv.reward import RewardEnsemble, save_reward
from prefenv.tasks.shapes import Shapes
from prefenv.testing import ContractError, check_oracle

TASK = Shapes()
DIGITS = ("legible", "aesthetic", "jpeg")
PERSONS = {
    n for n in ORACLES if hasattr(lookup("oracle", n), "play")
}  # who would have to sit there


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """What the named oracles need to be made."""
    folder = tmp_path_factory.mktemp("oracles")
    samples, _ = TASK.data(24, make_generator(0))
    with FeedbackStore(folder / "feedback.sqlite") as store:
        for panel in store.ask(samples.unflatten(0, (-1, 2))):
            store.answer(Judgement(panel.samples, (1, 0)))
    save_reward(
        folder / "reward.safetensors", RewardEnsemble((64, 2), generator=make_generator(0)), {}
    )
    return {
        "replay": f":path={folder / 'feedback.sqlite'}",
        "learned": f":path={folder / 'reward.safetensors'}",
        "jury": ":members=s-curve+s-curve",
    }


DEFAULTS = {make_task(t).default_oracle: t for t in TASKS}


@pytest.mark.parametrize("name", sorted(ORACLES.keys() - PERSONS))
def test_named_oracles_keep_the_contract(name, settings, capsys):
    task = make_task("digits" if name in DIGITS else DEFAULTS.get(name, "shapes"))
    samples, kind = task.data(24, make_generator(0))
    text, asked = name + settings.get(name, ""), None if task.condition is None else kind
    oracle = make_oracle(text, task)
    check_oracle(oracle, samples, asked, low=0, high=1)
    assert main(["check-oracle", text, "--task", task.name]) == 0
    assert "all checks passed" in capsys.readouterr().out
    check_oracle(make_teacher("beta=2,mistake=0.1", oracle), samples, asked, low=0, high=1)


class Moody(SCurve):
    """Says that it is random, and draws from where nobody can see."""

    nondeterministic = True

    def __init__(self, task):
        super().__init__(task)
        self.generators = (torch.Generator(),)

    def judge(self, panels):
        return torch.rand(panels.shape[:2])


def test_random_oracles_draw_from_their_generators():
    samples, _ = TASK.data(24, make_generator(0))
    oracle = Moody(TASK)
    oracle.differentiable = False
    with pytest.raises(ContractError, match="draw from them alone"):
        check_oracle(oracle, samples)
    oracle.generators = ()
    check_oracle(oracle, samples)
    oracle.generators = [torch.Generator()]
    with pytest.raises(ContractError, match="tuple of torch.Generators"):
        check_oracle(oracle, samples)


class Upset(Oracle):
    def judge(self, panels):
        return panels.mean((2, 3)) / 0


def test_check_oracle_command_says_what_is_wrong(capsys):
    assert main(["check-oracle", "test_all_oracles:Upset"]) == 1
    assert "judgements must be NaN (no answer) or in" in capsys.readouterr().err
    assert main(["check-oracle", "nobody"]) == 2
    assert "unknown oracle 'nobody'" in capsys.readouterr().err
