"""``Questions``: who is asked what. The feedback store keeps the answers; this keeps count of them.

A panel is **open** until ``overlap`` annotators have answered it (a skip is an answer). An annotator gets one
question at a time and has it for themselves for ``patience`` seconds after it was last sent to them. A
**question** is a panel in the order in which one annotator sees it, and its id is

    HMAC-SHA256(key, annotator, panel, how many answers the annotator has given to this panel before)

so nobody can name a question that was not put to them, the same answer sent twice is one, and after a restart the
same key gives the same ids: a page that was left open goes on. The order of the samples is drawn from the id.

With probability ``repeats`` an annotator is shown a panel again that they answered at least ``DISTANCE`` answers
ago. This measures self-consistency and is not told; only the first answer counts (``FeedbackStore.recall``).
"""

from __future__ import annotations

import hashlib
import hmac
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from prefenv.errors import PrefenvError
from prefenv.feedback import FeedbackStore, Judgement, Panel, Retraction

Answer = Literal["skip", "tie"] | Sequence[int]
DISTANCE = 5  # answers between a question and its repeat, so that it is not remembered


class Refused(PrefenvError):
    """An answer that is not kept; ``status`` is the HTTP status that says so."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Question:
    """A panel as one annotator sees it.

    Args:
        id: Its name, known only to who is asked.
        panel: Id of the panel.
        samples: Ids of its samples in the order shown.
    """

    id: str
    panel: str
    samples: tuple[str, ...]


def scores_of(answer: Answer, size: int) -> tuple[float | None, ...]:
    """Scores of the samples as shown: chosen 1, the rest 0; a tie 1/2 each; a skip None.

    Raises:
        Refused: It is none of these.
    """
    if answer == "skip":
        return (None,) * size
    if answer == "tie":
        return (0.5,) * size
    chosen = answer if isinstance(answer, list | tuple) else None
    if chosen is None or len(set(map(str, chosen))) != len(chosen):
        raise Refused(400, 'an answer is "skip", "tie", or the places of the chosen samples')
    if not all(type(i) is int and 0 <= i < size for i in chosen):
        raise Refused(400, f"the places of the samples are 0 to {size - 1}")
    return tuple(float(i in chosen) for i in range(size))


class Questions:
    """The open questions and their annotators. Threads may share it.

    Args:
        store: Where answers are kept.
        key: Secret that names are made with; the same after a restart.
        overlap: Annotators who answer each panel.
        repeats: Share of questions that are hidden repeats, in [0, 1).
        patience: Seconds that a question waits for its annotator before another may have it.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        store: FeedbackStore,
        key: str,
        overlap: int = 1,
        repeats: float = 0.0,
        patience: float = 180.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.store, self.overlap, self.repeats = store, overlap, repeats
        self.patience, self.clock, self._key = patience, clock, key.encode()
        self.changed = threading.Condition()
        self.panels = {p.id: p for p in store.panels()}
        self.open: dict[str, Panel] = {}
        self.held: dict[str, tuple[str, float]] = {}  # annotator -> panel, until
        self.known: dict[str, Judgement] = {}  # every judgement that ever was
        self.standing: dict[str, dict[str, Judgement]] = defaultdict(dict)  # by annotator and id
        self.given: Counter[tuple[str, str]] = Counter()  # answers ever, by annotator and panel
        self.total: Counter[str] = Counter()  # answers ever, by annotator
        self.again: dict[str, list[str]] = defaultdict(list)  # panels taken back, last in first out
        self.told: set[str] = set()  # panels whose answer the agent has had
        self.stale = False  # whether one of those was taken back
        self._who: dict[str, Counter[str]] = defaultdict(Counter)
        for event in store.history():
            self._apply(event)

    def _apply(self, event: Judgement | Retraction) -> None:
        if isinstance(event, Judgement):
            self.known[event.id] = event
            self.standing[event.annotator][event.id] = event
            self._who[event.panel][event.annotator] += 1
            self.given[event.annotator, event.panel] += 1
            self.total[event.annotator] += 1
        else:
            judgement = self.known[event.judgement]
            self._who[judgement.panel][judgement.annotator] -= 1
            del self.standing[judgement.annotator][judgement.id]

    # What the agent's side calls.

    def put(self, panels: Sequence[Panel]) -> None:
        """Open panels, in this order; those that are answered already stay closed."""
        with self.changed:
            for panel in panels:
                self.panels.setdefault(panel.id, panel)
                if not self.complete(panel.id):
                    self.open.setdefault(panel.id, panel)
            self.changed.notify_all()

    def withdraw(self) -> None:
        """Ask nothing more of what is open; what somebody is looking at may still be answered."""
        with self.changed:
            self.open.clear()
            self.stale = False

    def tell(self, panels: Iterable[str]) -> None:
        """Remember that the agent has had the answers to these panels: ``stale``, where one is taken back."""
        with self.changed:
            self.told.update(panels)

    def wait(self, panels: Sequence[Panel], closed: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all are answered; Ctrl-C interrupts. False where ``closed()`` came first."""
        with self.changed:
            while not all(self.complete(p.id) for p in panels):
                if closed():
                    return False
                self.changed.wait(0.25)
            self.told.update(p.id for p in panels)
        return True

    def complete(self, panel: str) -> bool:
        """Whether enough annotators have answered it."""
        return len(self.who(panel)) >= self.overlap

    def who(self, panel: str) -> set[str]:
        """The annotators whose answer to it stands."""
        return {a for a, n in self._who.get(panel, {}).items() if n}

    # What annotators call.

    def next(self, annotator: str) -> Question | None:
        """The annotator's question: the same until it is answered; None where there is none to ask."""
        with self.changed:
            panel = self._next(annotator)
            if panel is None:
                self.held.pop(annotator, None)
                return None
            self.held[annotator] = panel, self.clock() + self.patience
            return self._question(annotator, panel)

    def leave(self, annotator: str) -> None:
        """Give the annotator's open question up: another may have it at once."""
        with self.changed:
            self.held.pop(annotator, None)

    def _next(self, annotator: str) -> str | None:
        if again := self.again[annotator]:
            return again[-1]
        held = self.held.get(annotator, ("", 0.0))[0]
        if self._free(held, annotator):
            return held
        return self._repeat(annotator) or next(
            (p for p in self.open if self._free(p, annotator)), None
        )

    def _free(self, panel: str, annotator: str) -> bool:
        if panel not in self.open or annotator in (who := self.who(panel)):
            return False
        now = self.clock()
        others = {a for a, (p, until) in self.held.items() if p == panel and until > now}
        return len(who | others - {annotator}) < self.overlap

    def _repeat(self, annotator: str) -> str | None:
        """A panel to show again, drawn from how much was answered: a reload does not draw anew."""
        answers = [j.panel for j in self.standing[annotator].values()]
        rng = random.Random(self._digest("repeat", annotator, str(self.total[annotator])))
        if rng.random() >= self.repeats:
            return None
        times = Counter(answers)
        old = [p for p in answers[:-DISTANCE] if times[p] == 1 and p in self.panels]
        return rng.choice(old) if old else None

    def _digest(self, *parts: str) -> str:
        return hmac.new(self._key, "\0".join(parts).encode(), hashlib.sha256).hexdigest()

    def _question(self, annotator: str, panel: str) -> Question:
        name = self._digest("question", annotator, panel, str(self.given[annotator, panel]))
        samples = list(self.panels[panel].samples)
        random.Random(name).shuffle(samples)
        return Question(name, panel, tuple(samples))

    def answer(
        self, annotator: str, question: str, answer: Answer, seconds: float | None = None
    ) -> bool:
        """Keep an answer. When this returns it is on the disk. False where it was kept before.

        Raises:
            Refused: It answers nothing that was asked of this annotator, or was taken back, or came too late.
        """
        with self.changed:
            before = self.known.get(question)
            if before is not None and before.annotator == annotator:
                if question in self.standing[annotator]:
                    return False
                raise Refused(409, "this answer was taken back; the question is asked anew")
            asked = self._asked(annotator, question)
            again = self.again[annotator]
            mine = asked.panel in again or annotator in self.who(asked.panel)
            if not mine and self.complete(asked.panel):
                raise Refused(409, "somebody else has answered this meanwhile")
            scores = scores_of(answer, len(asked.samples))
            judgement = Judgement(asked.samples, scores, annotator, seconds, question)
            self.store.answer(judgement)
            self._apply(judgement)
            self.held.pop(annotator, None)
            if asked.panel in again:
                again.remove(asked.panel)
            if self.complete(asked.panel):
                self.open.pop(asked.panel, None)
            self.changed.notify_all()
            return True

    def _asked(self, annotator: str, question: str) -> Question:
        """The question of this id. Who knows it was asked, if only before a restart: nobody can make it up."""
        held = self.held.get(annotator, ("", 0.0))[0]
        for panel in filter(None, (held, *self.panels)):
            asked = self._question(annotator, panel)
            if hmac.compare_digest(asked.id.encode(), question.encode()):
                return asked
        raise Refused(404, "no such question was asked of you")

    def undo(self, annotator: str) -> Judgement | None:
        """Take back the annotator's last answer; it is their next question again. None where none is left."""
        with self.changed:
            retracted = self.store.undo(annotator)
            if retracted is None:
                return None
            self._apply(Retraction(retracted.id, annotator))
            panel = self.panels.get(retracted.panel) or Panel(retracted.samples)
            self.panels[panel.id] = panel
            if not self.complete(panel.id):
                self.open[panel.id] = panel
                self.stale |= panel.id in self.told
            self.again[annotator].append(panel.id)
            self.held.pop(annotator, None)
            self.changed.notify_all()
            return retracted
