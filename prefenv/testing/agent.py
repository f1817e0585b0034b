"""``check_agent``: what every agent owes, tried on a small probe (``prefenv.testing.probe``)."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics, Requires
from prefenv.envs import FlowVectorEnv
from prefenv.errors import ConfigError
from prefenv.testing.data import ContractError, copied, difference, need
from prefenv.testing.probe import Answer, ProbeOracle, ProbeVelocity, probe_env, right

ROWS, ROUNDS = 32, 2


def check_agent(cls: type, progress: Callable[[str], None] | None = None) -> list[str]:
    """Check an agent class: settings, metrics, ledger, reference, samples, seeds, saving, missing answers.

    It learns a few rounds with its default settings on a probe, a mixture of two Gaussians, in seconds. It need
    not become good at it: that is for its own tests to show.

    Args:
        cls: The class, a subclass of ``prefenv.agent.Agent``.
        progress: Called with the name of each check that passed.

    Returns:
        The names of the checks, all passed.

    Raises:
        ContractError: The agent breaks the contract; the message names the mistake and its mend.
    """
    trial, passed = _Trial(cls), []
    for name, check in _CHECKS.items():
        try:
            check(trial)
        except ContractError as error:
            raise ContractError(f"{name}: {error}") from error.__cause__
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise ContractError(
                f"{name}: {type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}: {error}"
            ) from error
        passed.append(name)
        if progress is not None:
            progress(name)
    return passed


@dataclasses.dataclass
class _Run:
    """An agent that has learned, and what was seen meanwhile."""

    agent: Any
    env: FlowVectorEnv
    oracle: ProbeOracle
    start: Tensor
    metrics: list[Metrics]
    evaluated: int

    def state(self) -> dict[str, Any]:
        """What it has learned and spent, comparable, and its samples."""
        state = self.agent.state()
        ledger = {k: v for k, v in state["ledger"].items() if k != "seconds"}
        return copied({**state, "ledger": ledger, "samples": self.agent.sample(_noise())})


def _noise() -> Tensor:
    return torch.randn(16, 2, generator=torch.Generator().manual_seed(1))


def _bits(flow: torch.nn.Module) -> dict[str, Any]:
    return copied({k: v.clone() for k, v in flow.state_dict().items()})


class _Trial:
    def __init__(self, cls: Any):
        self.cls = cls
        self.run: _Run

    def make(
        self, seed: int = 0, answer: Answer = right, **settings: Any
    ) -> tuple[Agent, ProbeOracle]:
        requires = self.cls.requires
        panel_size = settings.pop("panel_size", max(4, requires.panel_size))
        rows = -(-ROWS // panel_size) * panel_size
        env, oracle = probe_env(answer, rows, panel_size=panel_size, **{**self.given(), **settings})
        return self.cls(env, seed=seed), oracle

    def given(self) -> dict[str, Any]:
        """The env's settings that this agent asks for."""
        return {"differentiable": self.cls.requires.gradient, "control": self.cls.control}

    def learn(self, *calls: int, **settings: Any) -> _Run:
        """Make an agent and let it learn so many rounds in each call."""
        agent, oracle = self.make(**settings)
        start, metrics = agent.sample(_noise()), []
        before = ProbeVelocity.evaluated
        for rounds in calls:
            agent.learn(rounds * agent.env.num_envs, callback=lambda _, m: metrics.append(m))
        evaluated = ProbeVelocity.evaluated - before
        return _Run(agent, agent.env, oracle, start, metrics, evaluated)

    # The checks, in order.

    def settings(self) -> None:
        """Its name, what it requires, and a documented dataclass of settings."""
        cls = self.cls
        need(
            isinstance(cls, type) and issubclass(cls, Agent),
            f"{cls!r} is no subclass of prefenv.agent.Agent",
        )
        need(
            isinstance(cls.name, str) and cls.name and cls.name != Agent.name,
            f"{cls.__name__} has no name of its own: write name: ClassVar[str] = '...'",
        )
        need(
            isinstance(cls.requires, Requires),
            f"requires must be a prefenv.agent.Requires, not {cls.requires!r}",
        )
        need(
            cls.update is not Agent.update or cls.round is not Agent.round,
            f"{cls.__name__} does not define update(rollout)",
        )
        config = cls.Config
        need(
            isinstance(config, type) and dataclasses.is_dataclass(config),
            f"{cls.__name__}.Config is no dataclass: decorate it with @dataclass(frozen=True)",
        )
        missing = [
            f.name
            for f in dataclasses.fields(config)
            if f.init
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        need(not missing, f"Config fields without a default: {', '.join(missing)}")
        texts = [inspect.cleandoc(c.__doc__ or "").partition("Args:")[2] for c in config.__mro__]
        told = set(re.findall(r"^ +(\w+): *\S", "\n".join(texts), re.MULTILINE))
        silent = [f.name for f in dataclasses.fields(config) if f.name not in told]
        need(
            not silent,
            f"Config does not document {', '.join(silent)}: a line '{(silent or ['x'])[0]}: ...' under 'Args:' in "
            "its docstring; the command line's help is made of them",
        )

    def needs(self) -> None:
        """It learns in an env that gives no more than it ``requires``, and refuses one that gives less."""
        requires = self.cls.requires
        if requires.panel_size > 1:
            try:
                self.make(panel_size=1)
            except ConfigError:
                pass
            else:
                raise ContractError(
                    f"it requires panels of {requires.panel_size}, but took an env with panels of 1: call "
                    "super().__init__(), which refuses with a ConfigError"
                )
        kernel = "flow-sde" if requires.log_prob else "ode"
        run = self.learn(1, panel_size=requires.panel_size, kernel=kernel)
        finite = bool(run.agent.sample(_noise()).isfinite().all())
        need(finite, f"NaN after one round in an env that gives just what it requires: {requires}")

    def metrics(self) -> None:
        """Every round's ``update`` tells finite numbers, and draws nothing from the global generator."""
        before = torch.get_rng_state()
        self.run = run = self.learn(ROUNDS)
        untouched = torch.equal(before, torch.get_rng_state())
        need(
            untouched,
            "learning draws from torch's global generator, or seeds it: use self.generator (networks belong "
            "into build(), which is seeded)",
        )
        need(len(run.metrics) == ROUNDS, f"{ROUNDS} rounds called back {len(run.metrics)} times")
        for metrics in run.metrics:
            for key, value in metrics.items():
                need(
                    isinstance(key, str) and isinstance(value, int | float),
                    f"update() must return names and plain numbers, not {key!r}: {value!r} (use float())",
                )
        error = run.metrics[0].get("ratio_error", 0.0)
        need(
            error < 1e-3,
            f"ratio_error is {error:.2g} before the first step, not 0: the model that collected and the model "
            "that is asked afterwards must say the same log-probability of the same step",
        )

    def ledger(self) -> None:
        """What it spent is what it booked."""
        run, ledger = self.run, self.run.env.ledger
        need(
            (run.oracle.panels, run.oracle.queries) == (ledger.panels, ledger.queries),
            f"the oracle judged {run.oracle.queries} samples in {run.oracle.panels} panels, the ledger has "
            f"{ledger.queries} in {ledger.panels}: ask through env.judge or env.desk.gradient only",
        )
        need(not run.oracle.peeks, "it read the oracle's score(), which is for evaluation only")
        need(
            ledger.queries <= ROUNDS * run.env.num_envs,
            f"learn({ROUNDS * run.env.num_envs}) spent {ledger.queries} queries",
        )
        need(
            0 < run.evaluated <= ledger.nfe,
            f"the network was evaluated on {run.evaluated} rows, the ledger has {ledger.nfe}: add the rows of "
            "every forward pass of training, self.env.ledger.nfe += len(x)",
        )

    def reference(self) -> None:
        """The reference stays as it was, bit by bit."""
        run, (fresh, _) = self.run, probe_env()
        for what, flow in (("agent", run.agent.reference), ("env", run.env.reference.flow)):
            path = difference(_bits(fresh.reference.flow), _bits(flow))
            need(
                path is None,
                f"learning changed the {what}'s reference, at {path}: train self.model, a copy",
            )

    def model(self) -> None:
        """What it learned can be seen in its samples."""
        need(
            not torch.equal(self.run.agent.sample(_noise()), self.run.start),
            f"{ROUNDS} rounds of judgements that differ left the samples as they were: does an optimiser hold "
            "self.model's parameters, and does chain() hold what was trained?",
        )

    def samples(self) -> None:
        """Samples are finite, a function of their noise, row by row, and those of ``chain``."""
        agent, noise = self.run.agent, _noise()
        before = agent.generator.get_state()
        samples = agent.sample(noise)
        need(
            isinstance(samples, Tensor) and samples.shape == noise.shape,
            f"sample() of noises {tuple(noise.shape)} must return as many samples, not "
            f"{tuple(getattr(samples, 'shape', ()))}",
        )
        need(bool(samples.isfinite().all()), "samples are NaN or infinite after a few rounds")
        need(not samples.requires_grad, "samples carry gradients: decorate sample() with no_grad")
        need(
            torch.equal(samples, agent.sample(noise))
            and torch.equal(before, agent.generator.get_state()),
            "sample() draws random numbers: it must be a function of the noise",
        )
        need(
            torch.allclose(samples[:5], agent.sample(noise[:5]), atol=1e-5),
            "a sample depends on the other rows of its batch",
        )
        x, flows = noise, agent.chain()
        for flow in flows:
            x = agent.env.policy(flow).sample(x)
        need(
            not flows or torch.allclose(samples, x, atol=1e-4),
            "sample() does not pass the noise through the flows of chain(), of which the KL is measured: override "
            "chain() rather than sample(), or let it be empty: model B then has no likelihood",
        )

    def seeds(self) -> None:
        """Same seed, same bits, in one call or two; another seed, other bits."""
        state = self.run.state()
        torch.rand(1)
        for calls, mend in (
            ((ROUNDS,), "draw everything from self.generator"),
            ((1, ROUNDS - 1), "learn() in two calls is not learn() in one: keep nothing per call"),
        ):
            path = difference(state, self.learn(*calls).state())
            need(path is None, f"two runs with the same seed differ at {path}: {mend}")
        other = self.learn(ROUNDS, seed=1).state()
        need(
            difference(state["samples"], other["samples"]) is not None,
            "two seeds learned the same: hand the seed on to super().__init__()",
        )

    def saving(self) -> None:
        """Saved and loaded in a fresh env it is the same, and goes on as if nothing had happened."""
        half = self.learn(ROUNDS // 2)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "agent.zip"
            half.agent.save(path)
            need(zipfile.is_zipfile(path), "save() must write a zip of safetensors and JSON")
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            need(
                all(n.endswith((".safetensors", ".json")) for n in names),
                f"save() wrote {', '.join(names)}: only safetensors and JSON, never a pickle",
            )
            env, oracle = probe_env(
                right,
                half.env.num_envs,
                panel_size=half.env.panel_size,
                **self.given(),
            )
            loaded = self.cls.load(path, env)
        again = _Run(loaded, env, oracle, half.start, [], 0)
        path = difference(half.state(), again.state())
        need(path is None, f"a loaded agent differs from the saved one at {path}")
        loaded.learn((ROUNDS - ROUNDS // 2) * env.num_envs)
        path = difference(self.run.state(), again.state())
        need(
            path is None,
            f"a loaded agent goes on differently, at {path}: name everything that it carries from round to round "
            "in `persistent`",
        )

    def silence(self) -> None:
        """Answers that are missing, or all equal, do not break it."""

        def some(panels: Tensor) -> Tensor:
            return right(panels).masked_fill(panels[..., 1] > 0, torch.nan)

        for what, answer in (
            ("no answer at all", lambda p: torch.full(p.shape[:2], torch.nan)),
            ("half of the answers", some),
            ("equal answers", lambda p: torch.full(p.shape[:2], 0.3)),
        ):
            samples = self.learn(2, answer=answer).agent.sample(_noise())
            need(
                bool(samples.isfinite().all()),
                f"with {what} the samples became NaN: a judgement may be NaN (no answer), and all may be equal",
            )


_CHECKS: dict[str, Callable[[_Trial], None]] = {
    "settings": _Trial.settings,
    "needs": _Trial.needs,
    "metrics": _Trial.metrics,
    "ledger": _Trial.ledger,
    "reference": _Trial.reference,
    "model": _Trial.model,
    "samples": _Trial.samples,
    "seeds": _Trial.seeds,
    "saving": _Trial.saving,
    "silence": _Trial.silence,
}
