"""``check_oracle``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from prefenv.oracle import Oracle, judged, scored
from prefenv.tasks.conditions import rows_of
from prefenv.testing.data import need


def check_oracle(
    oracle: Oracle,
    samples: Tensor,
    condition: Tensor | None = None,
    *,
    low: float = -float("inf"),
    high: float = float("inf"),
) -> None:
    """Check an oracle: shapes, values, panel sizes, order, randomness, gradient, and that it only looks.

    Args:
        oracle: The oracle.
        samples: Samples to judge, ``(n, *event_shape)``, at least two panels of its size.
        condition: For a conditional oracle, the condition of each, ``(n, ...)``.
        low: Least judgement it may give.
        high: Greatest judgement it may give.

    Raises:
        ContractError: The oracle breaks the contract.
    """
    size, n = oracle.panel_size, len(samples)
    need(
        size is None or (isinstance(size, int) and size > 0),
        f"panel_size must be a positive int, or None for any, not {size!r}",
    )
    need(size is None or n >= 2 * size, f"give check_oracle two panels, {2 * (size or 1)} samples")
    need(
        np.isfinite(oracle.threshold), f"threshold must be a finite number, not {oracle.threshold}"
    )
    sources = oracle.generators
    need(
        isinstance(sources, tuple) and all(isinstance(g, torch.Generator) for g in sources),
        f"generators must be a tuple of torch.Generators, not {sources!r}",
    )
    need(
        condition is not None or not oracle.conditional,
        "a conditional oracle is checked with conditions: give check_oracle those of the samples",
    )
    for k in [size] if size else sorted({1, 2, 3, n // 2}):
        panels = samples[: n // k * k].unflatten(0, (-1, k))
        _check_judgement(oracle, panels, rows_of(condition, slice(0, len(panels))), low, high)
    if hasattr(oracle, "score"):
        values = scored(oracle, samples, condition)
        need(
            values.shape == (n,) and bool(values.isfinite().all()),
            f"score() must give one finite value per sample, {(n,)}, not {tuple(values.shape)}",
        )
    if oracle.differentiable:
        need(size in (None, 1), "a differentiable oracle is asked one by one: panel_size None or 1")
        _check_gradient(oracle, samples, condition)


def _check_judgement(
    oracle: Oracle, panels: Tensor, condition: Tensor | None, low: float, high: float
) -> None:
    m, k = panels.shape[:2]
    kept = panels.clone()

    def judge(asked: Tensor, of: Tensor | None = condition) -> Tensor:
        with torch.no_grad():
            return judged(oracle, asked, of)

    answer = judge(panels)
    need(torch.equal(kept, panels), "judge() changed the samples it was shown: work on a copy")
    need(isinstance(answer, Tensor), f"judge() must return a tensor, not {type(answer).__name__}")
    need(
        answer.shape == (m, k),
        f"judge() of panels {tuple(panels.shape)} must return {(m, k)}, not {tuple(answer.shape)}",
    )
    need(
        answer.is_floating_point(), f"judgements must be floating, not {answer.dtype}: use .float()"
    )
    need(
        answer.device == panels.device,
        f"the samples are on {panels.device}, the judgements on {answer.device}",
    )
    told = answer[~answer.isnan()]
    need(
        bool(told.isfinite().all()) and bool(((told >= low) & (told <= high)).all()),
        f"judgements must be NaN (no answer) or in [{low}, {high}], not {told.tolist()[:8]}",
    )
    if oracle.nondeterministic:
        _check_generators(oracle, judge, panels)
        return
    answer = answer.clone()
    order = torch.arange(k).roll(1).flip(0)
    here, turned, first = (
        condition,
        rows_of(condition, torch.arange(m).flip(0)),
        rows_of(condition, slice(1)),
    )
    for asked, of, expected, mend in (
        (
            panels,
            here,
            answer,
            "asked twice, judge() answered differently: set nondeterministic = True",
        ),
        (panels[:, order], here, answer[:, order], "judgements depend on the order within a panel"),
        (panels.flip(0), turned, answer.flip(0), "judgements depend on the order of the panels"),
        (panels[:1], first, answer[:1], "a panel is judged differently beside other panels"),
    ):
        same = torch.allclose(judge(asked, of), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        need(same, f"{mend} (panels of {k})")


def _check_generators(oracle: Oracle, judge: Callable[[Tensor], Tensor], panels: Tensor) -> None:
    """With its generators as they were, an oracle answers as it did. One without (a person) owes nothing."""
    states = [g.get_state() for g in oracle.generators]
    first = judge(panels).clone()
    for generator, state in zip(oracle.generators, states, strict=True):
        generator.set_state(state)
    need(
        not states or torch.equal(first.nan_to_num(-1.0), judge(panels).nan_to_num(-1.0)),
        "its generators as they were, judge() answered differently: draw from them alone",
    )


def _check_gradient(oracle: Oracle, samples: Tensor, condition: Tensor | None) -> None:
    """``autograd`` through ``judge`` against central differences, along the gradient and across it."""
    x = samples.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        reward = judged(oracle, x[:, None], condition)[:, 0]
        need(
            reward.requires_grad,
            "differentiable = True, but judge() carries no gradient: no .item(), numpy or no_grad inside",
        )
        (grad,) = torch.autograd.grad(reward.sum(), x, allow_unused=True)
    need(grad is not None, "differentiable = True, but judgements do not depend on the samples")
    need(bool(grad.isfinite().all()), "the gradient of a judgement is NaN or infinite")
    norm = grad.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
    along = grad / norm.clamp_min(1e-12)
    across = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    across = across / across.flatten(1).norm(dim=1).view_as(norm)
    size = float(samples.flatten(1).norm(dim=1).mean())
    with torch.no_grad():
        for direction in (along, across):
            h = 1e-3 * size * direction
            up, down = (
                judged(oracle, (samples + s * h)[:, None], condition)[:, 0] for s in (1, -1)
            )
            told = (grad * h).flatten(1).sum(1)
            error = ((up - down) / 2 - told).abs()
            bound = 0.05 * (grad * h).flatten(1).norm(dim=1) + 1e-5 * (1 + reward.abs())
            need(
                bool((error <= bound).all()),
                f"the gradient disagrees with finite differences by up to {float(error.max()):.2g} (change in "
                "judgement over a small step): is something detached?",
            )
