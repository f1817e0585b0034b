"""Defects of published code, each planted in a small agent: ``check_agent`` names every one of them.

Most agents here are one of ours with the public code's line put back. The first word of a sentence is the check.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from probes import with_defaults

from agents.adjoint import AdjointMatching
from agents.d3po import D3PO, preferred_pairs
from agents.dpok import DPOK
from agents.flow_dpo import FlowDPO
from agents.pfm import PFM
from agents.ppo import advantages, gaussian_kl, ppo_loss
from agents.rwr import RWR, reward_weights
from prefenv.agent import Agent, Requires
from prefenv.kernels import Kernel, gaussian_log_prob
from prefenv.matching import MatchingAgent, matching_error
from prefenv.testing import ContractError, check_agent


class PolicyGradient(Agent):
    """A sound one, in as few lines as show where the defects go."""

    @dataclass(frozen=True)
    class Config:
        """Settings.

        Args:
            lr: Learning rate.
            kl_coef: Weight of the KL to the reference.
        """

        lr: float = 3e-4
        kl_coef: float = 0.01

    name = "policy-gradient"
    requires = Requires(log_prob=True)

    def kernel(self):
        return Kernel("flow-sde", 0.7)

    def build(self):
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr)

    def update(self, rollout):
        batch, total = rollout.transitions(self.policy.stochastic_steps), 0.0
        advantage = self.advantage(rollout.judgement)[batch.row]
        with torch.no_grad():
            old_mean, _ = self.policy.gaussian(batch.x, batch.index)
            reference = self.env.policy(self.reference, self.kernel())
            ref_mean, _ = reference.gaussian(batch.x, batch.index)
        for _ in range(2):
            for part in torch.randperm(len(batch.x), generator=self.generator).chunk(2):
                mean, std = self.gaussian(batch.x[part], batch.index[part])
                log_prob = gaussian_log_prob(batch.x_next[part], mean, std)
                old = batch.log_prob[part]
                bias = self.bias(gaussian_kl(mean, old_mean[part], std))
                loss = ppo_loss(log_prob + bias, old, advantage[part], 0.2).mean()
                kl = self.kl(log_prob, old, gaussian_kl(mean, ref_mean[part], std))
                self.optimizer.zero_grad()
                (loss + self.config.kl_coef * kl).backward()
                self.optimizer.step()
                total += float(loss.detach()) / 4
        self.env.ledger.nfe += 4 * len(batch.x)
        return {"loss": total}

    def advantage(self, judgement):
        return advantages(judgement, 5.0)

    def gaussian(self, x, index):
        return self.policy.gaussian(x, index)

    def bias(self, kl_old):
        """GRPO-Guard adds the KL to the old policy to each row's log-ratio."""
        return kl_old

    def kl(self, log_prob, old, kl):
        return kl.mean()


class TwoGrids(PolicyGradient):
    """ReinFlow: samples at ``linspace(0, 1 - 1/K, K)``, asks for log-probabilities at ``linspace(0, 1, K)``."""

    name = "two-grids"

    def gaussian(self, x, index):
        steps, (a, b, std) = self.env.steps, (c[index][:, None] for c in self.policy.table)
        return a * x + b * self.model.velocity(x, torch.linspace(0, 1, steps)[index]), std


class BatchKL(PolicyGradient):
    """yk7333/d3po, ``train_dpok.py``: the KL of two softmaxes over the batch, to the old policy.

    It is exactly zero for a batch of one, its default, and never compares with the reference.
    """

    name = "batch-kl"

    def kl(self, log_prob, old, kl):
        p, q = log_prob.log_softmax(0), old.log_softmax(0)
        return (p.exp() * (p - q)).sum()


class BatchMean(PolicyGradient):
    """GRPO-Guard (flow_grpo's fork): the bias is reduced over an empty list of dimensions, so over the batch."""

    name = "batch-mean"

    def bias(self, kl_old):
        return kl_old.mean()


class TruncatedAdvantages(PolicyGradient):
    """ddpo-pytorch's tracker: ``np.empty_like(rewards)`` is an array of integers where the rewards are."""

    name = "truncated-advantages"

    def advantage(self, judgement):
        whole = bool((judgement == judgement.round()).all())
        advantage = super().advantage(judgement)
        return advantage.trunc() if whole else advantage


class ShuffledAdvantages(PolicyGradient):
    """Samples are shuffled before training and their advantages are not (the order that ORW's coupling loses)."""

    name = "shuffled-advantages"

    def advantage(self, judgement):
        return super().advantage(judgement)[
            torch.randperm(len(judgement), generator=self.generator)
        ]


class DeadLogProb(D3PO):
    """RareSense/rlhf-flow-diffusion: samples by deterministic Euler, log-probability with a constant variance.

    ``log p = -|x_next - m|^2 / (2 1e-4)``, and ``x_next = m`` exactly: its gradient is zero for winner and loser.
    """

    name = "dead-log-prob"
    requires = Requires(panel_size=2)

    def kernel(self):
        return Kernel("ode")

    def update(self, rollout):
        winner, loser = preferred_pairs(rollout.panels(rollout.judgement), self.config.tie)
        if len(winner) == 0:
            return {"loss": 0.0}
        steps = list(range(self.env.steps))
        batch = rollout.transitions(steps)
        with torch.no_grad():
            target = self.policy.gaussian(batch.x, batch.index)[0]
        mean, _ = self.policy.gaussian(batch.x, batch.index)
        self.env.ledger.nfe += 2 * len(batch.x)
        log_ratio = -(target - mean).square().sum(1).view(len(steps), -1) / 2e-4
        loss = -F.logsigmoid(0.1 * (log_ratio[:, winner] - log_ratio[:, loser])).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}


class InversionDPO(MatchingAgent):
    """Inversion-DPO: ``beta/2 (D_w - D_l)``, ``D = |v - v_ref|^2``: the gradient at the reference is zero."""

    @dataclass(frozen=True)
    class Config:
        """Settings.

        Args:
            lr: Learning rate.
            max_grad_norm: Largest gradient norm.
        """

        lr: float = 1e-4
        max_grad_norm: float = 1.0

    name = "inversion-dpo"
    requires = Requires(panel_size=2)

    def update(self, rollout):
        self.remember(rollout)
        winner, loser = preferred_pairs(rollout.panels(rollout.judgement), 0.05)
        if len(winner) == 0:
            return {"loss": 0.0}
        at = self.points(torch.stack([winner, loser], 1).flatten(), shared=2)
        gap = matching_error(self.velocity(self.model, at), self.velocity(self.reference, at))
        return {"loss": self.descend(-F.logsigmoid(50 * (gap[::2] - gap[1::2])).mean())}


class TwoSidedD3PO(D3PO):
    """yk7333/d3po: ratios clamped to ``[1 - eps, 1 + eps]`` on both sides, with no minimum or maximum."""

    name = "two-sided-d3po"
    Config = with_defaults(D3PO.Config, clamp="two-sided")


class TwoSidedDPOK(DPOK):
    """google-research's DPOK: ``-A clip(rho)`` without PPO's maximum."""

    name = "two-sided-dpok"
    Config = with_defaults(DPOK.Config, clamp="two-sided")


class PermutedWeights(RWR):
    """orw-cfm: the optimal-transport coupling re-samples the ``x1``, and the weights keep the old order."""

    name = "permuted-weights"

    def update(self, rollout):
        self.remember(rollout)
        weight = reward_weights(self.pool["judgement"], self.config.tau)
        total = 0.0
        for _ in range(self.config.updates):
            coupled = self.draw(len(weight), self.config.batch)
            rows = self.draw(len(weight), self.config.batch)
            at = self.points(coupled)
            error = matching_error(self.velocity(self.model, at), at.target)
            total += self.descend((weight[rows] * error).mean())
        return {"loss": total / self.config.updates}


class ReversedPairs(PFM):
    """jadehaus/preference-flow-matching: loaders hand over (positive, negative) as (source, target)."""

    name = "reversed-pairs"
    Config = with_defaults(PFM.Config, coupling="pair", margin=False)

    def fit(self):
        self.pool = {"source": self.pool["target"], "target": self.pool["source"]}
        try:
            return super().fit()
        finally:
            self.pool = {"source": self.pool["target"], "target": self.pool["source"]}


class ConstantLabels(PFM):
    """The same repository's robot data: both branches swap, so trajectory 0 is always the positive one."""

    name = "constant-labels"
    Config = with_defaults(PFM.Config, coupling="pair", margin=False)

    def update(self, rollout):
        first = torch.zeros_like(rollout.panels(rollout.judgement))
        first[:, 0] = 1.0
        return super().update(replace(rollout, judgement=first.flatten()))


class WrongSign(AdjointMatching):
    """flow-density-control's Adjoint Matching: a descent step opposes the reward."""

    name = "wrong-sign"

    def update(self, rollout):
        return super().update(replace(rollout, gradient=-rollout.gradient))


class WinnersWithWinners(FlowDPO):
    """flow_grpo's DPO: winners then losers in one stack, split into batches, halves of a batch paired."""

    name = "winners-with-winners"

    def update(self, rollout):
        self.remember(rollout)
        winner, loser = preferred_pairs(rollout.panels(rollout.judgement), self.config.tie)
        loss = 0.0
        for batch in torch.cat([winner, loser]).chunk(2) if len(winner) > 1 else ():
            one, other = batch[: len(batch) // 2 * 2].chunk(2)
            at = self.points(torch.stack([one, other], 1).flatten(), shared=2)
            loss += self.descend(self.objective(at)[0].mean())
        return {"loss": loss}


class TiesArbitrary(FlowDPO):
    """flow_grpo's DPO: the first and the last of a group when sorted, whether or not they differ."""

    name = "ties-arbitrary"

    def update(self, rollout):
        order = rollout.panels(rollout.judgement).argsort(dim=1, stable=True).argsort(1)
        return super().update(replace(rollout, judgement=order.float().flatten()))


DEFECTS = [
    (DeadLogProb, "model", "the log-probability of a deterministic sample has none"),
    (InversionDPO, "model", "nor has |v - v_ref|^2"),
    (TwoSidedD3PO, "correction", "a ratio clamped on both sides"),
    (TwoSidedDPOK, "correction", "a ratio clamped on both sides"),
    (BatchKL, "leash", "zero for a batch of one"),
    (PermutedWeights, "direction", "judgements do not stay with their samples"),
    (ShuffledAdvantages, "credit", "rewards left their samples on the way"),
    (TwoGrids, "replay", "two grids of times"),
    (ReversedPairs, "direction", "its pairs are reversed"),
    (ConstantLabels, "direction", "its labels are constant"),
    (WrongSign, "direction", "the loss has the wrong sign"),
    (WinnersWithWinners, "direction", "winners paired with winners"),
    (TiesArbitrary, "ties", "a tie has no winner"),
    (TruncatedAdvantages, "credit", "advantages are cut to whole numbers"),
    (BatchMean, "rows", "averaged (or normalised) over the whole batch"),
]


@pytest.mark.parametrize(("cls", "check", "words"), DEFECTS, ids=[d[0].__name__ for d in DEFECTS])
def test_the_checker_names_it(cls, check, words):
    with pytest.raises(ContractError) as caught:
        check_agent(cls, only=(check,))
    told = dict(line.split(": ", 1) for line in str(caught.value).splitlines())
    assert check in told, told
    assert words in told[check]


def test_the_sound_one_passes():
    """So what is found in its children is the defect that was planted."""
    check_agent(PolicyGradient)
