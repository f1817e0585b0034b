"""What a person may type: one line to one ``Reply``, a pure function; whatever else comes is told in one line.

    0 3               the indices of the samples that they want: 1 for these, 0 for the rest
    (empty line)      none will do: 0 for all
    p 0.1 0.2 0 0.7   how much each is liked, from 0 to 1; those left out are 0
    u  s  q  ?        undo, skip, quit and keep, help

The toy's grammar (HIL-DD, ``pref_flow_toy.py``), less its crashes: there a bad token, an index out of range or
one named twice crashed or gave wrong weights, and a bare ``p`` made model B NaN. Commas are spaces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["scores", "undo", "skip", "quit", "help"]
KINDS: tuple[Kind, ...] = ("undo", "skip", "quit", "help")
WORDS: dict[str, Kind] = {**{k[0]: k for k in KINDS}, **{k: k for k in KINDS}, "?": "help"}
_INDEX = re.compile(r"[0-9]{1,4}")
_NUMBER = re.compile(r"([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})(e[-+]?[0-9]{1,3})?")
_GLUED = re.compile(r"\Ap(?=[0-9.])")  # p.5 is p .5
_SPACE = re.compile(r"[\s,;]+")


class BadReplyError(ValueError):
    """A line that is no answer; its text says in one line what is wrong and what is allowed."""


@dataclass(frozen=True)
class Reply:
    """What a line means.

    Args:
        kind: ``scores`` = a judgement; the rest are wishes.
        scores: One for each sample, in [0, 1]; only of ``scores``.
    """

    kind: Kind
    scores: tuple[float, ...] = ()


def allowed(size: int) -> str:
    """What may be typed about a panel of ``size`` samples, in one line."""
    some = f"numbers 0 to {size - 1} (as 0 {size - 1})" if size > 1 else "0"
    return (
        f"{some}, Enter = none will do, p and {size} numbers from 0 to 1, u undo, s skip, "
        "q quit and keep, ? help"
    )


def read(line: str, size: int) -> Reply:
    """What a line says about a panel of ``size`` samples.

    Raises:
        BadReplyError: It is no answer.
    """

    def bad(what: str) -> BadReplyError:
        return BadReplyError(f"{what}. Allowed: {allowed(size)}")

    line = _GLUED.sub("p ", line.strip().lower())
    tokens = [t for t in _SPACE.split(line) if t]
    if not tokens:
        return Reply("scores", (0.0,) * size)
    head, rest = tokens[0], tokens[1:]
    if head in WORDS:
        if rest:
            raise bad(f"{_quote(head)} stands alone")
        return Reply(WORDS[head])
    if head == "p":
        return Reply("scores", _liked(rest, size, bad))
    chosen: set[int] = set()
    for token in tokens:
        if not _INDEX.fullmatch(token):
            raise bad(f"cannot read {_quote(token)}")
        if (index := int(token)) >= size:
            raise bad(f"there is no sample {index}")
        if index in chosen:
            raise bad(f"{index} is named twice")
        chosen.add(index)
    return Reply("scores", tuple(float(i in chosen) for i in range(size)))


def _liked(tokens: list[str], size: int, bad) -> tuple[float, ...]:
    """The numbers behind a ``p``, with 0 for those left out."""
    if not tokens:
        raise bad("p wants numbers")
    if len(tokens) > size:
        raise bad(f"{len(tokens)} numbers for {size} samples")
    values = []
    for token in tokens:
        if not _NUMBER.fullmatch(token) or not 0 <= (value := float(token)) <= 1:
            raise bad(f"{_quote(token)} is no number from 0 to 1")
        values.append(value)
    if not any(values):
        raise bad("p with only zeros: an empty line says that none will do")
    return (*values, *[0.0] * (size - len(values)))


def write(reply: Reply) -> str:
    """A line that ``read`` understands as this reply."""
    if reply.kind != "scores":
        return reply.kind
    if set(reply.scores) <= {0.0, 1.0}:
        return " ".join(str(i) for i, s in enumerate(reply.scores) if s)
    return " ".join(["p", *map(repr, reply.scores)])


def _quote(token: str) -> str:
    """A token in one line, however odd."""
    return ascii(token if len(token) <= 20 else token[:20] + "...")
