"""``prefenv ...``: the command line. A user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

import prefenv
from prefenv import cli_feedback
from prefenv.cli_bench import Bench, Report
from prefenv.cli_label import Label
from prefenv.cli_play import Play
from prefenv.cli_run import Align, Demo, Train
from prefenv.errors import ConfigError, PrefenvError
from prefenv.registry import lookup, names


@dataclass(frozen=True)
class List:
    """List the tasks, agents and oracles that are known by name.

    Args:
        json: Print them as one JSON object.
    """

    json: bool = False

    def run(self) -> int:
        """Run it."""
        if self.json:
            print(json.dumps({f"{kind}s": names(kind) for kind in ("task", "agent", "oracle")}))
            return 0
        for kind in ("task", "agent", "oracle"):
            print(f"{kind}s")
            for name in names(kind):
                module = sys.modules[lookup(kind, name).__module__]
                line = (module.__doc__ or "").strip().splitlines()[0]
                print(f"  {name:<12} {line.replace('``', '').removeprefix(name + ': ')}")
        return 0


@dataclass(frozen=True)
class CheckAgent:
    """Check an agent, built in or your own: what it owes, and how it learns.

    Small experiments on a mixture of two Gaussians, a few seconds in all: same seed, same bits; books, budget and
    saving; whether opposite preferences move it opposite ways, ties not at all, and each judgement its own sample;
    whether it replays what it sampled. One line each: ok, FAIL with what is wrong and how to mend it, or - where
    the check is for another kind of agent. Exit code 0, or 2 if one failed.

    Example: prefenv check-agent your_package.awr:AWR

    Args:
        agent: Its name, or ``module:Class`` (the current folder is searched too).
        only: Names of the checks to make, ``--only direction ties``; default: all.
        seed: Where the seeds begin; a sound agent passes with any.
        json: Print the outcomes as one JSON object, and nothing else, on stdout.
    """

    agent: Annotated[str, tyro.conf.Positional]
    only: tuple[str, ...] = ()
    seed: int = 0
    json: bool = False

    def run(self) -> int:
        """Run it."""
        from prefenv.testing import ContractError, check_agent
        from prefenv.testing.agent import CHECKS, Outcome

        outcomes: list[Outcome] = []

        def tell(outcome: Outcome) -> None:
            outcomes.append(outcome)
            mark = "FAIL" if outcome.failure else "-" if outcome.skipped else "ok"
            about = (CHECKS[outcome.check].__doc__ or "").splitlines()[0].replace("``", "")
            if not self.json:
                text = outcome.failure or outcome.skipped or about
                print(f"{mark:<4} {outcome.check:<10} {text}", flush=True)

        with contextlib.suppress(ContractError):
            check_agent(lookup("agent", self.agent), tell, only=self.only, seed=self.seed)
        failed = [o.check for o in outcomes if o.failure]
        if self.json:
            told = [dataclasses.asdict(o) for o in outcomes]
            print(json.dumps({"agent": self.agent, "passed": not failed, "checks": told}))
        if failed:
            raise ConfigError(f"{self.agent} fails {', '.join(failed)}")
        if not self.json:
            passed = sum(not o.skipped for o in outcomes)
            print(f"{self.agent}: {passed} checks passed")
        return 0


COMMANDS: dict[str, Callable[..., object]] = {
    "align": Align,
    "play": Play,
    "demo": Demo,
    "train": Train,
    "bench": Bench,
    "label": Label,
    "list": List,
    "check-agent": CheckAgent,
    "report": Report,
    **cli_feedback.COMMANDS,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        0; 1 if runs of a benchmark failed; 2 for a mistake or a failed check, told in one line on stderr; 130 for
        Ctrl-C.
    """
    sys.path.insert(0, "")  # a user's own module:Class lies where they are
    if "OMP_NUM_THREADS" not in os.environ:
        # Networks this small gain little from a second thread, and lose tenfold where others use the cores.
        torch.set_num_threads(1)
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--version"], ["-V"]):
        print(f"prefenv {prefenv.__version__} (torch {torch.__version__})")
        return 0
    if argv[:2] == ["import", "hil-dd"]:  # in two words too; answers in such a file: ./hil-dd
        argv = ["import-hil-dd", *argv[2:]]
    try:
        command = _parse(argv)
        return command.run()
    except PrefenvError as error:
        print(f"prefenv: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prefenv: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _parse(argv: list[str]):
    """The command that ``argv`` asks for.

    tyro's boxed errors become one line that keeps what they say.

    Raises:
        ConfigError: The arguments cannot be read.
        SystemExit: Help was asked for.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="prefenv", description=prefenv.__doc__, args=argv
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = "".join(c if c not in "╭╮╰╯│─" else " " for c in errors.getvalue()).split()
        raise ConfigError(" ".join(words) or "cannot read the command line; try --help") from None


if __name__ == "__main__":
    raise SystemExit(main())
