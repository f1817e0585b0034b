"""``check_oracle`` notices oracles that are broken on purpose, and passes sound ones."""

from __future__ import annotations

import pytest
import torch

import prefenv
from prefenv.oracle import Oracle, ScriptedOracle
from prefenv.tasks.shapes import Shapes
from prefenv.testing import ContractError, check_oracle

TASK = Shapes()


class Sound(ScriptedOracle):
    """Closeness to the origin."""

    def score(self, samples):
        return -samples.square().flatten(1).mean(1)


class PairsOnly(Oracle):
    panel_size = 2

    def judge(self, panels):
        size = panels.flatten(2).norm(dim=2)
        return torch.where(size == size.amin(1, keepdim=True), 1.0, torch.nan)


class Flat(Sound):
    def judge(self, panels):
        return super().judge(panels).flatten()


class Whole(Sound):
    def judge(self, panels):
        return super().judge(panels).long()


class Listed(Sound):
    def judge(self, panels):
        return super().judge(panels).tolist()


class Infinite(Sound):
    def judge(self, panels):
        return super().judge(panels) / 0


class Meddling(Sound):
    def judge(self, panels):
        panels -= panels.mean()
        return super().judge(panels)


class FirstOfPanel(Sound):
    def judge(self, panels):
        return super().judge(panels) - torch.arange(panels.shape[1])


class FirstOfBatch(Sound):
    def judge(self, panels):
        return super().judge(panels) - torch.arange(len(panels))[:, None]


class BatchNormalised(Sound):
    def judge(self, panels):
        score = super().judge(panels)
        return score - score.mean()


class Moody(Sound):
    def judge(self, panels):
        score = super().judge(panels)
        return score + 0.1 * torch.randn(score.shape)


class Detached(Sound):
    def score(self, samples):
        return super().score(samples.detach())


class HalfDetached(Sound):
    def score(self, samples):
        return super().score(samples) + super().score(samples.detach())


class InfiniteSlope(Sound):
    def score(self, samples):
        return super().score(samples) + (samples - samples).abs().sqrt().flatten(1).sum(1)


class SlopedPairs(Sound):
    panel_size = 2


class ScoresInColumns(Sound):
    differentiable = False

    def judge(self, panels):
        return super().score(panels.flatten(0, 1)).view(panels.shape[:2])

    def score(self, samples):
        return super().score(samples)[:, None]


class NoThreshold(Sound):
    threshold = float("nan")


class EmptyPanels(Sound):
    panel_size = 0


@pytest.fixture
def shapes():
    return TASK.data(12, torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("answer", ["score", "choose", "best"])
def test_check_oracle_passes_our_own(answer, shapes):
    check_oracle(prefenv.make_oracle(f"s-curve:answer={answer}", TASK), shapes, low=0, high=1)
    check_oracle(Sound(TASK, answer), shapes)
    check_oracle(PairsOnly(TASK), shapes, low=1, high=1)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Flat, r"must return \(12, 1\), not \(12,\)"),
        (Whole, "must be floating, not torch.int64"),
        (Listed, "must return a tensor, not list"),
        (Infinite, r"must be NaN \(no answer\) or in"),
        (Meddling, "judge\\(\\) changed the samples"),
        (FirstOfPanel, "depend on the order within a panel"),
        (FirstOfBatch, "depend on the order of the panels"),
        (BatchNormalised, "judged differently beside other panels"),
        (Moody, "set nondeterministic = True"),
        (Detached, "carries no gradient"),
        (HalfDetached, "disagrees with finite differences"),
        (InfiniteSlope, "NaN or infinite"),
        (SlopedPairs, "panel_size None or 1"),
        (ScoresInColumns, "one finite value per sample"),
        (NoThreshold, "threshold must be a finite number"),
        (EmptyPanels, "panel_size must be a positive int"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_check_oracle_catches(cls, message, shapes):
    with pytest.raises(ContractError, match=message):
        check_oracle(cls(TASK), shapes)


def test_check_oracle_checks_the_range_and_wants_enough_samples(shapes):
    with pytest.raises(ContractError, match=r"or in \[0, 1\]"):
        check_oracle(Sound(TASK), shapes, low=0, high=1)
    with pytest.raises(ContractError, match="two panels, 4 samples"):
        check_oracle(PairsOnly(TASK), shapes[:3])


def test_check_oracle_lets_moody_oracles_be(shapes):
    moody = Moody(TASK)
    moody.nondeterministic, moody.differentiable = True, False
    check_oracle(moody, shapes)
