"""``check_agent`` passes every agent that is registered, and catches those that are broken on purpose."""

from __future__ import annotations

import math
import pickle
import time
import zipfile
from dataclasses import dataclass, replace

import pytest
import torch
from probes import quick

from prefenv.agent import Agent, Requires
from prefenv.device import stratified_uniform
from prefenv.errors import BudgetSpentError, ConfigError, PrefenvError
from prefenv.kernels import Kernel
from prefenv.registry import lookup, names
from prefenv.testing import ContractError, Outcome, check_agent
from prefenv.testing.agent import CHECKS, FATAL
from prefenv.testing.probe import right

NAMES = list(CHECKS)
# The long ones: test_agent_learning.py and test_agent_saving.py prove the same of every registered agent, and the
# slow test makes them all.
ELSEWHERE = ("direction", "seeds", "saving")


@pytest.mark.parametrize("name", names("agent"))
def test_registered_agents_pass(name):
    only, told = [n for n in NAMES if n not in ELSEWHERE], []
    assert check_agent(quick(name), told.append, only=only) == told
    assert [o.check for o in told] == only and not any(o.failure for o in told)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", names("agent"))
def test_registered_agents_pass_every_check_as_they_are(name, seed):
    told, began = [], time.process_time()
    assert check_agent(lookup("agent", name), told.append, seed=seed) == told
    assert [o.check for o in told] == NAMES and not any(o.failure for o in told)
    assert time.process_time() - began < 60


def test_every_check_is_made_for_some_registered_agent():
    """A check that is skipped for all of them would prove nothing of any."""
    outcomes = check_agent(quick("d3po")) + check_agent(quick("ppo"), only=["leash"])
    assert {o.check for o in outcomes if not o.skipped} == CHECKS.keys()


@pytest.mark.parametrize("check", NAMES)
def test_every_check_says_what_it_is_about(check):
    """The command line prints it, on one line."""
    first = CHECKS[check].__doc__.splitlines()[0]
    assert 20 < len(first) < 110 and first.endswith(".")


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
    outcomes = check_agent(Good)
    for_others = {o.check for o in outcomes if o.skipped}
    assert for_others == {"ties", "ratio", "credit", "correction", "rows", "leash", "conditions"}


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


class ReferenceGetsGradients(Good):
    def residual(self, x1):
        self.reference.requires_grad_(True)
        x0 = torch.zeros_like(x1)
        self.env.ledger.nfe += len(x1)
        return super().residual(x1) + 0 * self.reference.residual(
            x0, x1, torch.rand(len(x1), generator=self.generator)
        )


class FillsTheLastRound(Good):
    def learn(self, total_queries, **options):
        rows = self.env.num_envs
        return super().learn(-(-total_queries // rows) * rows, **options)


class AsksOnCredit(Good):
    def learn(self, total_queries, **options):
        try:
            return super().learn(total_queries, **options)
        except BudgetSpentError:
            self.env.desk._oracle.judge(torch.zeros(2, 4, 2))
            return self


class Squeezes(Good):
    """HIL-DD's toy: ``t.squeeze()`` of a batch of one has no dimension left."""

    def residual(self, x1):
        x0 = torch.randn(x1.shape, generator=self.generator)
        self.env.ledger.nfe += len(x1)
        t = stratified_uniform(len(x1), self.generator).squeeze()
        return self.model.residual(x0, x1, t[: len(x1)])


class DeviationOfOne(Good):
    def weight(self, judgement):
        weight = super().weight(judgement)
        return weight / judgement.nan_to_num(0.0).std().clamp_min(1e-3)


class OwnTaste(Good):
    def update(self, rollout):
        taste = 3 * right(rollout.samples) + rollout.judgement
        return super().update(replace(rollout, judgement=taste))


class NeverReplays(Good):
    requires = Requires(log_prob=True)


class OtherKernel(Good):
    requires = Requires(log_prob=True)

    def behaviour(self):
        return self.env.policy(self.model, Kernel("flow-sde", 0.5), self.generator)


class OneCondition(Good):
    """Asks the model about everything under the first sample's condition."""

    def update(self, rollout):
        if rollout.condition is not None:
            rollout.condition = rollout.condition[:1].expand_as(rollout.condition)
        self.asked = rollout.condition
        return super().update(rollout)

    def residual(self, x1):
        x0 = torch.randn(x1.shape, generator=self.generator)
        self.env.ledger.nfe += len(x1)
        t = stratified_uniform(len(x1), self.generator)
        return self.model.residual(x0, x1, t, self.asked)


class ShuffledConditions(OneCondition):
    """Leaves the conditions behind where it turns the samples round."""

    def update(self, rollout):
        self.asked = rollout.condition
        if self.asked is not None:
            self.asked = self.asked.flip(0)
        return Good.update(self, rollout)


class OldSample(Good):
    """Written before there were conditions."""

    def sample(self, noise):
        return super().sample(noise)


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
    (OffPolicy, "ratio", "ratio_error is 0.2"),
    (Crash, "needs", r"AttributeError in test_check_agent.py, line \d+: .*zeal"),
    (Bypass, "ledger", "judged 72 samples in 18 panels, the ledger has 64 in 16"),
    (Peek, "ledger", r"score\(\)"),
    (Uncounted, "ledger", "the ledger has 512:"),
    (TrainsTheReference, "reference", "changed the agent's reference"),
    (SwapsTheReference, "reference", "reference, at"),
    (ReferenceGetsGradients, "reference", "gets gradients"),
    (FillsTheLastRound, "budget", "left unspent"),
    (AsksOnCredit, "budget", "is final"),
    (LearnsNothing, "model", "left the samples as they were"),
    (OwnTaste, "direction", "the same way whichever way the preference goes"),
    (NeverReplays, "replay", "does not ask the model about the recorded states"),
    (OtherKernel, "ratio", "one kernel and one model"),
    (Squeezes, "single", "mind squeeze"),
    (DeviationOfOne, "single", "deviation of one value"),
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
    (OneCondition, "conditions", "conditions do not stay with their samples"),
    (ShuffledConditions, "conditions", "conditions do not stay with their samples"),
    (NanOnTies, "silence", "NonFiniteError|became NaN"),
]


@pytest.mark.parametrize(("cls", "check", "words"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_broken_agents_are_caught(cls, check, words):
    told: list[Outcome] = []
    only = [*FATAL, check]
    with pytest.raises(ContractError, match=f"(?m)^{check}: .*({words})") as caught:
        check_agent(cls, told.append, only=only)
    assert [o.check for o in told if o.failure] == [check], "what else was looked at is in order"
    assert isinstance(caught.value, PrefenvError), "the command line tells it in one line"


def test_all_failures_are_told_a_line_each():
    class Twice(Uncounted, Peek, DrawsInSample):
        pass

    told = []
    with pytest.raises(ContractError) as caught:
        check_agent(Twice, told.append, only=("settings", "ledger", "samples", "saving"))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["ledger", "samples", "saving"]
    assert [f"{o.check}: {o.failure}" for o in told if o.failure] == lines


def test_what_cannot_learn_a_round_is_given_up():
    told = []
    with pytest.raises(ContractError):
        check_agent(Crash, told.append)
    assert [o.check for o in told] == ["settings", "needs"]


def test_unknown_checks_are_refused():
    with pytest.raises(ConfigError, match="no check is named 'tie': choose from settings, needs"):
        check_agent(Good, only=["tie"])


def test_every_check_has_an_agent_that_fails_it():
    from test_public_defects import DEFECTS

    assert {check for _, check, _ in [*BROKEN, *DEFECTS]} == CHECKS.keys()


def test_the_cause_of_a_crash_is_kept():
    with pytest.raises(ContractError) as caught:
        check_agent(Crash)
    assert isinstance(caught.value.__cause__, AttributeError)
