"""``check_agent``: what every agent owes, tried on a small probe (``prefenv.testing.probe``).

The contract is checked in ``prefenv.testing.contract``, how an agent learns in ``prefenv.testing.learning``.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from prefenv.errors import ConfigError
from prefenv.testing import contract, learning
from prefenv.testing.data import ContractError
from prefenv.testing.trial import Trial


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Args:
        check: Its name.
        failure: What is wrong and how to mend it; empty = nothing.
        skipped: For whom the check is, where it is not for this agent.
    """

    check: str
    failure: str = ""
    skipped: str = ""


def line(error: Exception) -> str:
    """Its message in one line."""
    return " ".join(str(error).split())


def check_agent(
    cls: type,
    progress: Callable[[Outcome], None] | None = None,
    *,
    only: Sequence[str] = (),
    seed: int = 0,
) -> list[Outcome]:
    """Check an agent class: its contract (settings, books, seeds, saving) and how it learns.

    It learns a few rounds with its default settings on a probe, a mixture of two Gaussians, in seconds. It need
    not become good at it, but every published defect that we know of is looked for. All checks are made, whatever
    fails; only an agent that cannot learn one round is given up there.

    Args:
        cls: The class, a subclass of ``prefenv.agent.Agent``.
        progress: Called with the outcome of each check as it is made.
        only: Names of the checks to make; empty = all of them.
        seed: Where the agents' seeds begin.

    Returns:
        The outcomes, none a failure.

    Raises:
        ContractError: The agent breaks the contract; the message has a line for each failure, with its mend.
        ConfigError: There is no check of a name in ``only``.
    """
    if unknown := [name for name in only if name not in CHECKS]:
        raise ConfigError(f"no check is named {unknown[0]!r}: choose from {', '.join(CHECKS)}")
    trial, outcomes, cause = Trial(cls, seed), [], None
    for name in [name for name in CHECKS if not only or name in only]:
        try:
            outcome = Outcome(name, skipped=CHECKS[name](trial) or "")
        except ContractError as error:
            outcome = Outcome(name, line(error))
            cause = cause or error.__cause__
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"in {Path(frame.filename).name}, line {frame.lineno}"
            outcome = Outcome(name, f"{type(error).__name__} {place}: {line(error)}")
            cause = cause or error
        outcomes.append(outcome)
        if progress is not None:
            progress(outcome)
        if outcome.failure and name in FATAL:
            break
    failures = [f"{o.check}: {o.failure}" for o in outcomes if o.failure]
    if failures:
        raise ContractError("\n".join(failures)) from cause
    return outcomes


CHECKS: dict[str, Callable[[Trial], str | None]] = {
    "settings": contract.settings,
    "needs": contract.needs,
    "metrics": contract.metrics,
    "ledger": contract.ledger,
    "budget": contract.budget,
    "reference": contract.reference,
    "samples": contract.samples,
    "seeds": contract.seeds,
    "saving": contract.saving,
    "silence": contract.silence,
    "single": contract.single,
    "conditions": learning.conditions,
    "model": learning.model,
    "direction": learning.direction,
    "ties": learning.ties,
    "replay": learning.replay,
    "ratio": learning.ratio,
    "credit": learning.credit,
    "correction": learning.correction,
    "rows": learning.rows,
    "leash": learning.leash,
}
# Without these no other check means anything.
FATAL = ("settings", "needs", "metrics")
