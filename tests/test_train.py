"""Training a reference: seeded, and the committed checkpoint is what its command makes."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import torch

from prefenv.checkpoints import load_checkpoint
from prefenv.cli_run import Train
from prefenv.errors import NonFiniteError
from prefenv.registry import make_task, names
from prefenv.tasks import TrainConfig
from prefenv.train import measure, train_reference

TASK = make_task("shapes:samples=256")  # measuring takes longer than these trainings


each_task = pytest.mark.parametrize(
    "task", [make_task(n) for n in names("task")], ids=names("task")
)


# Measuring takes half a minute where samples are large or the network is a U-Net (test_digits.py holds that card
# against fewer samples).
QUICK = ("shapes", "gaussians")
each_task_small = pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=[] if task.name in QUICK else [pytest.mark.slow])
        for task in map(make_task, names("task"))
    ],
    ids=names("task"),
)


def weights(trained):
    return torch.nn.utils.parameters_to_vector(trained.flow.parameters())


def test_same_seed_same_weights_other_seed_other():
    config = TrainConfig(iterations=4, batch=16)
    a, b, c = (train_reference(TASK, config, seed=s, progress=False) for s in (0, 0, 1))
    assert torch.equal(weights(a), weights(b))
    assert not torch.equal(weights(a), weights(c))


def test_training_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    train_reference(TASK, TrainConfig(iterations=2, batch=8), progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_the_loss_falls():
    """A short training is already far below the untrained network's likelihood."""
    short = train_reference(TASK, TrainConfig(iterations=150, batch=128), progress=False)
    start = train_reference(TASK, TrainConfig(iterations=1, batch=8, lr=1e-12), progress=False)
    assert short.card["log_likelihood_nats"] > start.card["log_likelihood_nats"] + 20


def test_a_training_that_blows_up_is_named():
    with pytest.raises(NonFiniteError, match="lower lr"):
        train_reference(TASK, TrainConfig(iterations=200, batch=8, lr=1e30), progress=False)


@each_task_small
def test_the_committed_card_tells_the_truth(task):
    """The card's measurements are those of the committed weights, and it names its command."""
    committed = load_checkpoint(None, task)
    again = measure(committed.flow, task)
    for key, value in again.items():
        if isinstance(value, dict):
            assert committed.card[key] == pytest.approx(value, abs=2e-3), key
        elif isinstance(value, float):
            assert committed.card[key] == pytest.approx(value, rel=0.02), key
    words = shlex.split(committed.card["command"])
    assert words[:4] == ["prefenv", "train", "--task", task.name]
    seed = int(words[words.index("--seed") + 1]) if "--seed" in words else Train().seed
    assert seed == committed.card["seed"]
    assert committed.card["iterations"] == task.train.iterations


@each_task
def test_the_reference_makes_what_the_task_promises(task):
    """Its classes in the data's shares, and samples as clean as the data."""
    card = load_checkpoint(None, task).card
    assert card["class_rate"] == pytest.approx(card["class_rate_data"], abs=0.06)
    assert card["residual"] < 1.3 * card["residual_data"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@each_task
def test_the_committed_checkpoint_is_what_its_command_makes(task):
    """Train one from scratch: rates, residual and likelihood as on the committed card."""
    committed = load_checkpoint(None, task).card
    made = train_reference(task, seed=committed["seed"], progress=False).card
    assert made["class_rate"] == pytest.approx(committed["class_rate"], abs=0.015)
    assert made["residual"] == pytest.approx(committed["residual"], rel=0.1)
    assert made["log_likelihood_nats"] == pytest.approx(committed["log_likelihood_nats"], abs=2.0)
    assert dataclasses.asdict(task.train)["iterations"] == made["iterations"]
