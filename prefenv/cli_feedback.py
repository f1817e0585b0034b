"""The commands of the two-step way (sample, label elsewhere, align) and of other people's feedback and oracles."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from prefenv.errors import ConfigError
from prefenv.feedback import FeedbackStore
from prefenv.feedback.files import dump, find, load, read_feedback
from prefenv.feedback.formats import Form, export_feedback, import_feedback
from prefenv.registry import make_oracle, make_task
from prefenv.reward import RewardConfig


@dataclass(frozen=True)
class Sample:
    """Make samples of the reference, as questions for whoever will label them: a folder of feedback and pictures.

    Example: prefenv sample --count 512 --out labels; prefenv label labels; prefenv align --feedback labels

    Args:
        count: Number of samples, a multiple of the panel size.
        out: The folder; more samples may be added to one that is there.
        agent: Offline agent that will learn from them, ``flow-dpo`` or another: they are made in its way, and with
            their paths where it needs them.
        task: Task, by name.
        panel_size: Samples shown together.
        seed: Seed of the noises.
        steps: Steps from noise to sample.
        checkpoint: Reference: a file, or the name of one of ours; None = the task's own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        pictures: Draw each sample as ``pictures/ID.png``.
        json: Print what was made as one JSON object, and nothing else, on stdout.
    """

    count: int
    out: Path
    agent: str = "flow-dpo"
    task: str = "shapes"
    panel_size: int = 4
    seed: int = 0
    steps: int = 16
    checkpoint: str | None = None
    device: str = "auto"
    pictures: bool = True
    json: bool = False

    def run(self) -> int:
        """Run it."""
        from prefenv.offline import make_samples, need_offline
        from prefenv.registry import make_agent
        from prefenv.runs import RunConfig, writable

        if self.count < 1 or self.panel_size < 1 or self.count % self.panel_size:
            raise ConfigError(
                f"{self.count} samples do not fill panels of {self.panel_size}; give a multiple"
            )
        oracle = make_task(self.task).default_oracle
        settings = {k: getattr(self, k) for k in ("agent", "task", "panel_size", "seed", "steps")}
        config = RunConfig(
            **settings,
            oracle=oracle,
            queries=self.panel_size,
            checkpoint=self.checkpoint,
            device=self.device,
        )
        agent = make_agent(self.agent, config.make_env(), seed=self.seed)
        need_offline(agent)
        writable(self.out)
        policy = agent.env.policy(agent.reference, agent.kernel())
        with (
            FeedbackStore(self.out / "feedback.sqlite") as store,
            tqdm(total=self.count, desc="samples", unit="sample") as bar,
        ):
            task = agent.env.task

            def after(panels: list) -> None:
                names = [name for panel in panels for name in panel.samples]
                if self.pictures:
                    for name in names:
                        self._draw(task, store.sample(name))
                bar.update(len(names))

            paths = agent.requires.log_prob
            make_samples(
                *(store, policy, self.count, self.panel_size),
                seed=self.seed,
                paths=paths,
                task=task,
                progress=after,
            )
            made = {"samples": len(store.samples()), "panels": len(store.panels())}
        if self.json:
            print(json.dumps({"out": str(self.out), **made}))
        else:
            print(f"{self.out} holds {made['samples']} samples in {made['panels']} panels")
        return 0

    def _draw(self, task, sample) -> None:
        import matplotlib.image

        from prefenv import plotting

        folder = self.out / "pictures"
        folder.mkdir(exist_ok=True)
        matplotlib.image.imsave(folder / f"{sample.id}.png", plotting.frame(task, sample.x))


@dataclass(frozen=True)
class Export:
    """Write feedback in a form that other programs read.

    Args:
        feedback: Feedback file, or the folder it lies in.
        out: The file; for d3po a folder, with one file for each annotator.
        form: ``jsonl`` (everything), ``d3po`` (N x K lists), ``trl-pairs`` (prompt, chosen, rejected) or
            ``trl-labels`` (prompt, completion, label).
        threshold: For trl-labels: from what score on a label is true.
    """

    feedback: Annotated[Path, tyro.conf.Positional]
    out: Path
    form: Form = "jsonl"
    threshold: float = 0.5

    def run(self) -> int:
        """Run it."""
        n = export_feedback(read_feedback(self.feedback), self.out, self.form, self.threshold)
        print(f"{n} rows written to {self.out}")
        return 0


@dataclass(frozen=True)
class Import:
    """Add feedback from another file to a feedback store; what it holds already is kept once.

    Args:
        source: The file; for d3po a file or a folder of them, one for each annotator.
        into: Feedback file, or the folder it lies in; made if the source brings its own samples (``jsonl``).
        form: ``jsonl``, ``d3po``, ``trl-pairs`` or ``trl-labels``.
    """

    source: Annotated[Path, tyro.conf.Positional]
    into: Path
    form: Form = "jsonl"

    def run(self) -> int:
        """Run it."""
        path = self.into if self.into.suffix else self.into / "feedback.sqlite"
        if self.form != "jsonl":
            path = find(self.into)
        with FeedbackStore(path) as store:
            before = len(store.judgements())
            load(store, import_feedback(self.source, self.form, dump(store)))
            print(f"{len(store.judgements()) - before} new answers in {path}")
        return 0


@dataclass(frozen=True)
class TrainReward(RewardConfig):
    """Train a reward model on answers, as an oracle for any agent: prefenv align --oracle learned:path=OUT.

    Args:
        feedback: Feedback file, or the folder it lies in.
        out: The reward model, a .safetensors file.
        threshold: From what score on a sample counts as accepted.
        json: Print the card as one JSON object, and nothing else, on stdout.
    """

    feedback: Path = Path("feedback.sqlite")
    out: Path = Path("reward.safetensors")
    threshold: float = 0.5
    json: bool = False

    def run(self) -> int:
        """Run it."""
        from prefenv.reward import save_reward, train_reward

        if self.out.suffix != ".safetensors":
            raise ConfigError(f"--out {self.out}: a reward model is a .safetensors file")
        config = RewardConfig(**{f.name: getattr(self, f.name) for f in fields(RewardConfig)})
        with tqdm(total=self.steps, desc="reward", unit="step") as bar:
            model, card = train_reward(
                read_feedback(self.feedback), config, threshold=self.threshold, progress=bar.update
            )
        save_reward(self.out, model, card)
        if self.json:
            print(json.dumps(card))
        else:
            told = card["held_out_accuracy"]
            print(
                f"{self.out}: orders {told or math.nan:.3f} of the held-out pairs as they were judged"
            )
        return 0


@dataclass(frozen=True)
class CheckOracle:
    """Check an oracle, built in or your own, against the contract.

    Args:
        oracle: Its name, or ``module:Class`` (the current folder is searched too); settings may follow.
        task: Task whose samples it judges.
    """

    oracle: Annotated[str, tyro.conf.Positional]
    task: str = "shapes"

    def run(self) -> int:
        """Run it."""
        from prefenv.device import make_generator
        from prefenv.testing import ContractError, check_oracle

        task = make_task(self.task)
        oracle = make_oracle(self.oracle, task)
        samples, kind = task.data(16 * (oracle.panel_size or 2), make_generator(0))
        try:
            check_oracle(oracle, samples, None if task.condition is None else kind)
        except ContractError as error:
            print(f"prefenv: {error}", file=sys.stderr)
            return 1
        print(f"{self.oracle}: all checks passed")
        return 0


@dataclass(frozen=True)
class ImportHilDD:
    """Read HIL-DD's published toy checkpoint as a reference.

    Then: prefenv align --task clouds:net=hil-dd --checkpoint OUT

    Args:
        source: The published file, rectified_model_ckp1.pt.
        out: The reference, a .safetensors file.
        json: Print its card as one JSON object, and nothing else, on stdout.
    """

    source: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("hil-dd.safetensors")
    json: bool = False

    def run(self) -> int:
        """Run it."""
        from prefenv.hil_dd import import_hil_dd

        if self.out.suffix != ".safetensors":
            raise ConfigError(f"--out {self.out}: a checkpoint is a .safetensors file")
        card = import_hil_dd(self.source, self.out)
        print(json.dumps(card) if self.json else f"written to {self.out}")
        return 0


COMMANDS: dict[str, Callable[..., object]] = {
    "sample": Sample,
    "export": Export,
    "import": Import,
    "import-hil-dd": ImportHilDD,
    "train-reward": TrainReward,
    "check-oracle": CheckOracle,
}
