"""proxy: the agent sees a reward model, the score is by the true oracle.

Why: in practice the reward is learned, and a method that optimises well optimises its errors too
(over-optimisation: Gao et al. 2022, arXiv 2210.10760). The proxy is an ensemble trained on 64 rated panels of the
reference's own samples, so beyond them it guesses. Curves show the proxy's and the true reward over the run.

Found (5 seeds): one of 21 methods over-optimises badly: ``nft``'s true score (median) is 0.92 after 256 judged
samples and 0.44 after 2,048, while the proxy's mean goes on to 1.00. From their best look to the end, while the
proxy still rises, ``dgpo`` and ``flow-dpo`` lose something with every seed (median 0.10 and 0.06), ``d3po`` and
``grpo`` with four and three of five, ``noise`` 0.02 with every seed.

    python -m benchmarks.experiments.proxy        trains the proxy again: checkpoints/shapes-proxy.safetensors
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.experiments import Experiment
from prefenv.checkpoints import load_checkpoint, write_atomic
from prefenv.device import make_generator
from prefenv.feedback.files import Feedback
from prefenv.feedback.records import Judgement, Panel, Sample
from prefenv.policy import FlowPolicy
from prefenv.registry import make_oracle, make_task
from prefenv.reward import save_reward, train_reward

EXPERIMENT = Experiment(
    {"queries": 2048, "panel_size": 4, "oracle": "learned:path=shapes-proxy"},
)


def answers(panels: int = 64, seed: int = 0) -> Feedback:
    """The reference's samples in panels of 4, rated by the true oracle."""
    task = make_task("shapes")
    policy = FlowPolicy(load_checkpoint(None, task).flow, shift=task.shift)
    generator = make_generator(seed, stream="proxy")
    noise = torch.randn(panels, 4, *task.event_shape, generator=generator)
    x = policy.sample(noise.flatten(0, 1))
    scores = make_oracle("s-curve", task).score(x)
    feedback = Feedback()
    for shapes, told in zip(x.unflatten(0, (-1, 4)), scores.view(-1, 4).tolist(), strict=True):
        samples = [Sample(shape) for shape in shapes]
        panel = Panel(tuple(s.id for s in samples))
        feedback.samples += samples
        feedback.panels.append(panel)
        feedback.events.append(Judgement(panel.samples, tuple(told), "s-curve"))
    return feedback


if __name__ == "__main__":
    model, card = train_reward(answers())
    path = Path(__file__).parents[2] / "checkpoints" / "shapes-proxy.safetensors"
    save_reward(path, model, card)
    lines = [
        "# A reward model of `shapes`, for the experiment `proxy`",
        "",
        "An ensemble trained on 64 panels of model A's samples, rated by the `s-curve` oracle.",
        "",
        "| what | value |",
        "|---|---|",
        "| command | python -m benchmarks.experiments.proxy |",
        *(f"| {key.replace('_', ' ')} | {value} |" for key, value in card.items()),
    ]
    write_atomic(path.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
