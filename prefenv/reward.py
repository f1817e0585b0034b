"""A reward model from answers: an ensemble of small networks, trained by Bradley and Terry's likelihood.

    L = -E_{panel, i < j} [ q log sigmoid(r_i - r_j) + (1 - q) log sigmoid(r_j - r_i) ],   q = 1, 1/2 (tie) or 0

Bradley and Terry 1952; Christiano et al. 2017 (arXiv 1706.03741), whose ensemble it is: each member has its own
first weights and its own bootstrap of the panels. A rating (a panel of one, score s in [0, 1]) is a comparison
with the value 0: ``q = s``. Differences say nothing of a level, so two numbers are fitted at the end (Platt 1999):
``value = sigmoid(a mean r + b)`` predicts whether a score reached the threshold, and 1/2 is where that begins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from torch import Tensor, nn

from prefenv.checkpoints import load_tensors, read_safetensors, write_atomic
from prefenv.device import make_generator
from prefenv.errors import CheckpointError, ConfigError, FeedbackError
from prefenv.feedback.files import Feedback

FORMAT = "prefenv-reward-1"


@dataclass(frozen=True)
class RewardConfig:
    """How a reward model is trained.

    Args:
        members: Networks of the ensemble.
        width: Channels of their hidden layers.
        steps: Optimiser steps.
        batch: Panels per step and member.
        lr: AdamW's learning rate, on a cosine to 0.
        weight_decay: AdamW's.
        held_out: Share of the panels that is only for the card's accuracy.
        seed: Seed of everything random.
    """

    members: int = 5
    width: int = 128
    steps: int = 600
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.1
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.members, self.width, self.steps, self.batch) < 1 or not 0 <= self.held_out < 1:
            raise ConfigError(f"train-reward: a setting is out of range in {self}")


class RewardEnsemble(nn.Module):
    """Networks side by side, ``(n, *event_shape)`` to rewards ``(members, n)``.

    Args:
        event_shape: Shape of one sample; flattened inside.
        members: Networks.
        width: Channels of the two hidden layers.
        generator: Source of the first weights.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        members: int = 5,
        width: int = 128,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.event_shape = tuple(event_shape)
        sizes = [math.prod(self.event_shape), width, width, 1]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
            weight = torch.randn(members, n_in, n_out, generator=generator)
            self.weights.append(nn.Parameter(weight / math.sqrt(n_in)))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, n_out)))
        self.register_buffer("platt", torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1) if x.dim() == 1 + len(self.event_shape) else x.flatten(2)
        h = h.expand(len(self.biases[0]), *h.shape[-2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, F.silu(h) if i else h, weight)
        return h[..., 0]

    def value(self, x: Tensor, caution: float = 0.0) -> Tensor:
        """``sigmoid(a (mean r - caution std r) + b)`` of samples ``(n, *event_shape)``, ``(n,)``."""
        a, b = self.get_buffer("platt")
        reward = self(x)
        low = reward.mean(0)
        if caution and len(reward) > 1:
            low = low - caution * reward.std(0)
        return (a * low + b).sigmoid()


def bradley_terry_loss(reward: Tensor, score: Tensor) -> Tensor:
    """The mean negative log-likelihood of panels' answers, a scalar.

    Args:
        reward: ``(..., K)``.
        score: What was answered, ``(..., K)``, NaN = nothing; K = 1: in [0, 1].
    """
    if score.shape[-1] == 1:
        gap, q, told = reward, score, ~score.isnan()
    else:
        i, j = torch.triu_indices(score.shape[-1], score.shape[-1], 1, device=score.device)
        gap, difference = reward[..., i] - reward[..., j], score[..., i] - score[..., j]
        q, told = (difference.sign() + 1) / 2, ~difference.isnan()
    loss = F.binary_cross_entropy_with_logits(gap, q.nan_to_num(0.5), reduction="none")
    return (loss * told).sum() / told.sum().clamp_min(1)


def accuracy(reward: Tensor, score: Tensor) -> float:
    """Share of the differently scored pairs of panels ``(m, K)`` that rewards order alike; NaN for none."""
    better = score[:, :, None] > score[:, None] if score.shape[1] > 1 else score[:, :, None] >= 0.5
    higher = reward[:, :, None] > reward[:, None] if score.shape[1] > 1 else reward[:, :, None] > 0
    if score.shape[1] == 1:
        return float((better == higher)[~score.isnan()].double().mean())
    return float(higher[better].double().mean())


def panels_of(feedback: Feedback) -> tuple[Tensor, Tensor]:
    """Answered panels as samples ``(m, K, *event_shape)`` and scores ``(m, K)``, NaN = no answer.

    Raises:
        FeedbackError: No answers, panels or samples of several sizes, or samples of conditions.
    """
    if any(s.condition is not None for s in feedback.samples):
        raise FeedbackError("a reward model knows no conditions, and these samples have some")
    known = {s.id: torch.from_numpy(s.x.copy()) for s in feedback.samples}
    answers = feedback.answers()
    told = [[math.nan if (v := by[n]) is None else v for n in p.samples] for p, by in answers]
    sizes = {(len(p.samples), *(known[n].shape for n in p.samples)) for p, _ in answers}
    if len(sizes) != 1:
        raise FeedbackError(
            "a reward model wants answered panels of one size, and samples of one shape"
        )
    x = torch.stack([torch.stack([known[n] for n in p.samples]) for p, _ in answers])
    return x, torch.tensor(told)


def train_reward(
    feedback: Feedback,
    config: RewardConfig | None = None,
    *,
    threshold: float = 0.5,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[RewardEnsemble, dict[str, Any]]:
    """Train a reward model on what was answered.

    Args:
        feedback: Samples and answers.
        config: How.
        threshold: From what score on a sample counts as accepted.
        progress: Called after every step.

    Returns:
        The model, frozen, on the CPU, and its card: what it was trained on and how well it predicts.

    Raises:
        FeedbackError: The answers teach nothing.
    """
    config = config or RewardConfig()
    x, score = panels_of(feedback)
    generator = make_generator(config.seed, stream="reward")
    order = torch.randperm(len(x), generator=generator)
    n_test = int(config.held_out * len(x))
    test, train = order[:n_test], order[n_test:]
    told = score[train]
    varied = (told.nan_to_num(-torch.inf).amax(1) > told.nan_to_num(torch.inf).amin(1)).any()
    if not (varied if score.shape[1] > 1 else (~told.isnan()).any()):
        raise FeedbackError("the answers teach nothing: no panel has two different scores")
    if score.shape[1] == 1 and not bool(((told >= 0) & (told <= 1) | told.isnan()).all()):
        raise FeedbackError("ratings must lie in [0, 1] to teach a reward model")
    model = RewardEnsemble(x.shape[2:], config.members, config.width, generator)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    shape = (config.members, len(train))
    own = train[torch.randint(len(train), shape, generator=generator)]  # each member's bootstrap
    for _ in range(config.steps):
        pick = torch.randint(
            len(train), (config.members, min(config.batch, len(train))), generator=generator
        )
        rows = own.gather(1, pick)
        reward = model(x[rows].flatten(1, 2)).unflatten(1, (-1, x.shape[1]))
        loss = bradley_terry_loss(reward, score[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress()
    model.requires_grad_(False).eval()
    with torch.no_grad():
        reward = model(x.flatten(0, 1)).mean(0).view(x.shape[:2])
    _calibrate(model, reward[train], score[train], threshold)
    card = {
        **asdict(config),
        "panels": len(x),
        "panel_size": x.shape[1],
        "feedback_digest": feedback.digest(),
        "accuracy": accuracy(reward[train], score[train]),
        "held_out_accuracy": accuracy(reward[test], score[test]) if n_test else None,
    }
    return model, {k: None if v != v else v for k, v in card.items()}


def _calibrate(model: RewardEnsemble, reward: Tensor, score: Tensor, threshold: float) -> None:
    """Platt's two numbers: the logistic regression of acceptance on the reward, its slope at least 0.01.

    Platt's own smoothed labels keep the fit finite where the reward separates the two perfectly.
    """
    told = ~score.isnan()
    r, good = reward[told].double(), score[told] >= threshold
    n_good, n_bad = int(good.sum()), int((~good).sum())
    label = torch.where(good, (n_good + 1) / (n_good + 2), 1 / (n_bad + 2)).double()
    scale = r.std().clamp_min(1e-6) if len(r) > 1 else r.new_ones(())
    ab = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([ab], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logit = ab[0] * (r - r.mean()) / scale + ab[1]
        loss = F.binary_cross_entropy_with_logits(logit, label)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    slope = (ab[0].detach() / scale).clamp_min(0.01)
    model.get_buffer("platt").copy_(torch.stack([slope, ab[1].detach() - slope * r.mean()]))


def save_reward(path: Path, model: RewardEnsemble, card: dict[str, Any]) -> None:
    """Write a reward model: safetensors, its shape and card in the header."""
    members, _, width = model.weights[0].shape
    shape = {"event_shape": model.event_shape, "members": members, "width": width}
    header = {"format": FORMAT, "shape": json.dumps(shape), "card": json.dumps(card)}
    write_atomic(
        path, serialize({k: v.contiguous() for k, v in model.state_dict().items()}, header)
    )


def load_reward(path: Path) -> tuple[RewardEnsemble, dict[str, Any]]:
    """A reward model and its card.

    Raises:
        CheckpointError: Missing, broken or no reward model.
    """
    tensors, header = read_safetensors(path, FORMAT)
    try:
        model = RewardEnsemble(**json.loads(header["shape"]))
        card = json.loads(header["card"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({error!r})") from None
    load_tensors(model, tensors, path)
    return model.requires_grad_(False).eval(), card
