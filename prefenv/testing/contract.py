"""Checks of what every agent owes: settings, books, seeds, saving. Used by ``check_agent``."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from prefenv.agent import Agent, Requires
from prefenv.errors import BudgetSpentError, ConfigError
from prefenv.testing.data import ContractError, copied, difference, need
from prefenv.testing.probe import constant, probe_env, right
from prefenv.testing.trial import ROUNDS, Run, Trial, noises


def bits(flow: torch.nn.Module) -> dict:
    """A flow's weights, comparable."""
    return copied({k: v.clone() for k, v in flow.state_dict().items()})


def settings(trial: Trial) -> None:
    """Its name, what it requires, and a documented dataclass of settings."""
    cls = trial.cls
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
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
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


def needs(trial: Trial) -> None:
    """It learns in an env that gives no more than it ``requires``, and refuses one that gives less."""
    requires = trial.cls.requires
    if requires.panel_size > 1:
        try:
            trial.make(panel_size=1)
        except ConfigError:
            pass
        else:
            raise ContractError(
                f"it requires panels of {requires.panel_size}, but took an env with panels of 1: call "
                "super().__init__(), which refuses with a ConfigError"
            )
    kernel = "flow-sde" if requires.log_prob else "ode"
    run = trial.learn(1, panel_size=requires.panel_size, kernel=kernel)
    finite = bool(run.agent.sample(noises()).isfinite().all())
    need(finite, f"NaN after one round in an env that gives just what it requires: {requires}")


def metrics(trial: Trial) -> None:
    """Every round's ``update`` tells finite numbers, and draws nothing from the global generator."""
    before = torch.get_rng_state()
    run = trial.run
    untouched = torch.equal(before, torch.get_rng_state())
    need(
        untouched,
        "learning draws from torch's global generator, or seeds it: use self.generator (networks belong "
        "into build(), which is seeded)",
    )
    need(len(run.metrics) == ROUNDS, f"{ROUNDS} rounds called back {len(run.metrics)} times")
    for told in run.metrics:
        for key, value in told.items():
            need(
                isinstance(key, str) and isinstance(value, int | float),
                f"update() must return names and plain numbers, not {key!r}: {value!r} (use float())",
            )


def ledger(trial: Trial) -> None:
    """What it spent is what it booked."""
    run, booked = trial.run, trial.run.env.ledger
    need(
        (run.oracle.panels, run.oracle.queries) == (booked.panels, booked.queries),
        f"the oracle judged {run.oracle.queries} samples in {run.oracle.panels} panels, the ledger has "
        f"{booked.queries} in {booked.panels}: ask through env.judge or env.desk.gradient only",
    )
    need(not run.oracle.peeks, "it read the oracle's score(), which is for evaluation only")
    need(
        booked.queries <= ROUNDS * run.env.num_envs,
        f"learn({ROUNDS * run.env.num_envs}) spent {booked.queries} queries",
    )
    need(
        0 < run.evaluated <= booked.nfe,
        f"the network was evaluated on {run.evaluated} rows, the ledger has {booked.nfe}: add the rows of "
        "every forward pass of training, self.env.ledger.nfe += len(x)",
    )


def reference(trial: Trial) -> None:
    """The reference stays as it was, bit by bit, and gets no gradient."""
    run, (fresh, _) = trial.run, probe_env()
    for what, flow in (("agent", run.agent.reference), ("env", run.env.reference.flow)):
        path = difference(bits(fresh.reference.flow), bits(flow))
        need(
            path is None,
            f"learning changed the {what}'s reference, at {path}: train self.model, a copy",
        )
        need(
            not any(p.requires_grad or p.grad is not None for p in flow.parameters()),
            f"the {what}'s reference gets gradients, which nobody wants: ask it within torch.no_grad()",
        )


def samples(trial: Trial) -> None:
    """Samples are finite, a function of their noise, row by row, and those of ``chain``."""
    agent, noise = trial.run.agent, noises()
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


def seeds(trial: Trial) -> None:
    """Same seed, same bits, in one call or two; another seed, other bits."""
    state = trial.run.state()
    torch.rand(1)
    for calls, mend in (
        ((ROUNDS,), "draw everything from self.generator"),
        ((1, ROUNDS - 1), "learn() in two calls is not learn() in one: keep nothing per call"),
    ):
        path = difference(state, trial.learn(*calls).state())
        need(path is None, f"two runs with the same seed differ at {path}: {mend}")
    other = trial.learn(ROUNDS, seed=1).state()
    need(
        not trial.moved or difference(state["samples"], other["samples"]) is not None,
        "two seeds learned the same: hand the seed on to super().__init__()",
    )


def saving(trial: Trial) -> None:
    """Saved and loaded in a fresh env it is the same, and goes on as if nothing had happened."""
    half = trial.learn(ROUNDS // 2)
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
            **trial.given(),
        )
        loaded = trial.cls.load(path, env)
    again = Run(loaded, env, oracle, half.start, [], 0)
    path = difference(half.state(), again.state())
    need(path is None, f"a loaded agent differs from the saved one at {path}")
    loaded.learn((ROUNDS - ROUNDS // 2) * env.num_envs)
    path = difference(trial.run.state(), again.state())
    need(
        path is None,
        f"a loaded agent goes on differently, at {path}: name everything that it carries from round to round "
        "in `persistent`",
    )


def silence(trial: Trial) -> None:
    """Answers that are missing, or all equal, do not break it."""

    def some(panels: Tensor) -> Tensor:
        return right(panels).masked_fill(panels[..., 1] > 0, torch.nan)

    for what, answer in (
        ("no answer at all", constant(torch.nan)),
        ("half of the answers", some),
        ("equal answers", constant(0.3)),
    ):
        samples = trial.learn(2, answer=answer).agent.sample(noises())
        need(
            bool(samples.isfinite().all()),
            f"with {what} the samples became NaN: a judgement may be NaN (no answer), and all may be equal",
        )


def single(trial: Trial) -> None:
    """A round of one panel, of the smallest size that it accepts, is survived."""
    size = trial.cls.requires.panel_size
    for what, answer in (("", right), (" of equal answers", constant(0.7))):
        agent, _ = trial.make(answer=answer, rows=size, panel_size=size)
        try:
            agent.learn(2 * size)
            finite = bool(agent.sample(noises()).isfinite().all())
        except Exception as error:
            raise ContractError(
                f"a round of one panel of {size}{what} raised {type(error).__name__} ({error}): mind squeeze(), "
                "and the standard deviation of one value"
            ) from error
        need(finite, f"a round of one panel of {size}{what} made the samples NaN")


def budget(trial: Trial) -> None:
    """No query beyond what ``learn`` was given, nor beyond the env's own budget."""
    agent, oracle = trial.make()
    rows = agent.env.num_envs
    agent.learn(rows + rows // 2)
    need(
        oracle.queries <= rows + rows // 2,
        f"learn({rows + rows // 2}) asked for {oracle.queries} judgements: what does not fill a round of {rows} "
        "is left unspent",
    )
    agent, oracle = trial.make(max_queries=rows)
    with contextlib.suppress(BudgetSpentError):
        agent.learn(2 * rows)
    need(
        oracle.queries <= rows,
        f"a budget of {rows} queries was answered with {oracle.queries}: a BudgetSpentError is final",
    )
