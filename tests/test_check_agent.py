"""``check_agent`` passes every agent that is registered, and catches those that are broken on purpose."""

from __future__ import annotations

import math
import pickle
import time
import zipfile
from dataclasses import dataclass

import pytest
import torch

from prefenv.agent import Agent, Requires
from prefenv.device import stratified_uniform
from prefenv.errors import PrefenvError
from prefenv.registry import lookup, names
from prefenv.testing import ContractError, check_agent

CHECKS = [
    "settings", "needs", "metrics", "ledger", "reference", "model", "samples", "seeds", "saving", "silence",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", names("agent"))
def test_registered_agents_pass(name):
    told, began = [], time.process_time()
    assert check_agent(lookup("agent", name), told.append) == told == CHECKS
    assert time.process_time() - began < 20


class Good(Agent):
    """Regression on what is better than a running mean."""

    @dataclass(frozen=True)
    class Config:
        """Settings.

        Args:
            lr: Learning rate.
            updates: Steps per round.
        """

        lr: float = 1e-3
        updates: int = 2

    name = "good"
    persistent = ("model", "optimizer", "baseline")

    def build(self):
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr)
        self.baseline = torch.zeros(())

    def weight(self, judgement):
        if not bool((~judgement.isnan()).any()):
            return torch.zeros_like(judgement)
        self.baseline = 0.5 * self.baseline + 0.5 * judgement.nanmean()
        return (judgement - self.baseline).clamp_min(0).nan_to_num(0.0)

    def update(self, rollout):
        weight, loss = self.weight(rollout.judgement), torch.zeros(())
        for _ in range(self.config.updates):
            loss = (weight * self.residual(rollout.samples)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"loss": float(loss.detach())}

    def residual(self, x1):
        x0 = torch.randn(x1.shape, generator=self.generator)
        self.env.ledger.nfe += len(x1)
        return self.model.residual(x0, x1, stratified_uniform(len(x1), self.generator))


def test_the_unbroken_one_passes():
    assert check_agent(Good) == CHECKS


class NotAnAgent:
    name = "not"


class Nameless(Good):
    name = Agent.name


class WrongRequires(Good):
    requires = {"panel_size": 2}


class NoUpdate(Agent):
    name = "no-update"


class PlainConfig(Good):
    class Config:
        lr = 1.0


class Undocumented(Good):
    @dataclass(frozen=True)
    class Config(Good.Config):
        """Settings.

        Args:
            lr: Learning rate.
            updates: Steps per round.
        """

        zeal: float = 1.0


class NoDefault(Good):
    @dataclass(frozen=True)
    class Config:
        """Settings.

        Args:
            lr: Learning rate.
        """

        lr: float


class TakesAnyPanel(Good):
    requires = Requires(panel_size=2)

    def _check(self):
        pass


class NeedsNoiseSilently(Good):
    def update(self, rollout):
        steps = [0]
        batch = rollout.transitions(steps)
        self.policy.log_prob(batch.x, batch.index, batch.x_next)
        return super().update(rollout)


class NeedsGradientSilently(Good):
    def update(self, rollout):
        self.env.desk.gradient(rollout.samples)
        return super().update(rollout)


class NanMetric(Good):
    def update(self, rollout):
        return {**super().update(rollout), "gap": math.nan}


class TensorMetric(Good):
    def update(self, rollout):
        super().update(rollout)
        return {"loss": torch.zeros(())}


class GlobalNoise(Good):
    def residual(self, x1):
        self.env.ledger.nfe += len(x1)
        return self.model.residual(torch.randn(x1.shape), x1, torch.rand(len(x1)))


class OffPolicy(Good):
    def update(self, rollout):
        return {**super().update(rollout), "ratio_error": 0.2}


class Crash(Good):
    def update(self, rollout):
        return {"loss": rollout.zeal}


class Bypass(Good):
    def update(self, rollout):
        self.env.desk._oracle.judge(rollout.samples[None, :4])
        return super().update(rollout)


class Peek(Good):
    def weight(self, judgement):
        self.env.desk._oracle.score(torch.zeros(1, 2))
        return super().weight(judgement)


class Uncounted(Good):
    def residual(self, x1):
        residual = super().residual(x1)
        self.env.ledger.nfe -= len(x1)
        return residual


class TrainsTheReference(Good):
    def build(self):
        self.model = self.reference.requires_grad_(True)
        super().build()


class SwapsTheReference(Good):
    def update(self, rollout):
        metrics = super().update(rollout)
        self.env.reference.flow.load_state_dict(self.model.state_dict())
        return metrics


class LearnsNothing(Good):
    def build(self):
        super().build()
        self.optimizer = torch.optim.Adam(self.reference.clone().parameters())


class WrongShape(Good):
    def sample(self, noise):
        return super().sample(noise)[:, :1]


class DrawsInSample(Good):
    def sample(self, noise):
        return super().sample(noise) + torch.randn(noise.shape, generator=self.generator)


class BatchNormed(Good):
    def sample(self, noise):
        x = super().sample(noise)
        return x - x.mean(0)


class GradientsInSample(Good):
    def sample(self, noise):
        return self.model.integrate(noise, self.env.steps)


class OtherChain(Good):
    def chain(self):
        return [self.reference]

    @torch.no_grad()
    def sample(self, noise):
        return self.env.policy(self.model).sample(noise)


class IgnoresTheSeed(Good):
    def __init__(self, env, config=None, *, seed=0):
        super().__init__(env, config, seed=0)


class CountsAcrossAgents(Good):
    made = 0

    def build(self):
        super().build()
        CountsAcrossAgents.made += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= CountsAcrossAgents.made


class ForgetsPerCall(Good):
    def learn(self, total_queries, **options):
        self.build()
        return super().learn(total_queries, **options)


class Unrestorable(Good):
    persistent = ("model", "optimizer")


class UnrestorableOptimizer(Good):
    persistent = ("model", "baseline")


class HiddenCounter(Good):
    seen = 0

    def weight(self, judgement):
        self.seen += 1
        return super().weight(judgement) / self.seen


class Pickles(Good):
    def save(self, path):
        torch.save(self.state(), path)


class BarePickle(Good):
    def save(self, path):
        path.write_bytes(pickle.dumps(self.state()["rounds"]))


class PickleInside(Good):
    def save(self, path):
        super().save(path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("extra.pkl", pickle.dumps(1))


class ForgetsItsWeights(Good):
    @classmethod
    def load(cls, path, env):
        return cls(env)


class NanOnSilence(Good):
    def weight(self, judgement):
        self.baseline = 0.5 * self.baseline + 0.5 * judgement.mean()
        return (judgement - self.baseline).clamp_min(0)


class NanOnTies(Good):
    def weight(self, judgement):
        weight = super().weight(judgement)
        known = judgement[~judgement.isnan()]
        return weight / (known.amax() - known.amin()) if len(known) else weight


BROKEN = [
    (NotAnAgent, "settings", "no subclass of prefenv.agent.Agent"),
    (Nameless, "settings", "no name of its own"),
    (WrongRequires, "settings", "requires must be"),
    (NoUpdate, "settings", r"does not define update\(rollout\)"),
    (PlainConfig, "settings", "no dataclass"),
    (Undocumented, "settings", "does not document zeal"),
    (NoDefault, "settings", "without a default: lr"),
    (TakesAnyPanel, "needs", "requires panels of 2, but took"),
    (NeedsNoiseSilently, "needs", "NoLogProbError"),
    (NeedsGradientSilently, "needs", "NotDifferentiableError"),
    (NanMetric, "needs", "NonFiniteError.*gap became nan"),
    (TensorMetric, "metrics", "plain numbers, not 'loss'"),
    (GlobalNoise, "metrics", "global generator"),
    (OffPolicy, "metrics", "ratio_error is 0.2"),
    (Crash, "needs", r"AttributeError in test_check_agent.py, line \d+: .*zeal"),
    (Bypass, "ledger", "judged 72 samples in 18 panels, the ledger has 64 in 16"),
    (Peek, "ledger", r"score\(\)"),
    (Uncounted, "ledger", "the ledger has 512:"),
    (TrainsTheReference, "reference", "changed the agent's reference"),
    (SwapsTheReference, "reference", "reference, at"),
    (LearnsNothing, "model", "left the samples as they were"),
    (WrongShape, "samples", r"not \(16, 1\)"),
    (DrawsInSample, "samples", "draws random numbers"),
    (BatchNormed, "samples", "other rows of its batch"),
    (GradientsInSample, "samples", "carry gradients"),
    (OtherChain, "samples", r"flows of chain\(\)"),
    (IgnoresTheSeed, "seeds", "two seeds learned the same"),
    (CountsAcrossAgents, "seeds", "draw everything from self.generator"),
    (ForgetsPerCall, "seeds", "in two calls"),
    (Unrestorable, "saving", "goes on differently.*persistent"),
    (UnrestorableOptimizer, "saving", "goes on differently.*persistent"),
    (HiddenCounter, "saving", "goes on differently.*persistent"),
    (Pickles, "saving", "never a pickle"),
    (BarePickle, "saving", "must write a zip"),
    (PickleInside, "saving", "extra.pkl"),
    (ForgetsItsWeights, "saving", "differs from the saved one"),
    (NanOnSilence, "silence", "NonFiniteError"),
    (NanOnTies, "silence", "NonFiniteError|became NaN"),
]


@pytest.mark.parametrize(("cls", "check", "words"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_broken_agents_are_caught(cls, check, words):
    passed = []
    with pytest.raises(ContractError, match=f"(?s)^{check}: .*({words})") as caught:
        check_agent(cls, passed.append)
    assert passed == CHECKS[: CHECKS.index(check)], "the checks before it passed"
    assert isinstance(caught.value, PrefenvError), "the command line tells it in one line"


def test_the_cause_of_a_crash_is_kept():
    with pytest.raises(ContractError) as caught:
        check_agent(Crash)
    assert isinstance(caught.value.__cause__, AttributeError)
