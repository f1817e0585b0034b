"""``prefenv label``: the page over a folder of samples, as ``prefenv sample`` makes it. Nothing learns."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from oracles.web import oracle, play
from oracles.web.agreement import agreement
from prefenv.errors import FeedbackError
from prefenv.feedback import FeedbackStore
from prefenv.registry import make_task


def label(folder: Path, out: TextIO | None = None, **settings: Any) -> dict[str, Any]:
    """Ask people about all panels of a folder until they are answered, or Ctrl-C; returns a summary.

    Args:
        folder: Holds ``feedback.sqlite`` with samples and panels; or that file.
        out: Where the link goes; None = standard output.
        settings: Of ``WebOracle``: ``port``, ``overlap``, ``repeats``, ...

    Raises:
        FeedbackError: There is no such file, or it asks nothing.
    """
    out = out or sys.stdout
    path = folder / "feedback.sqlite" if folder.is_dir() else folder
    with FeedbackStore(path, readonly=True) as store:
        panels = store.panels()
        if not panels:
            raise FeedbackError(f"{path} asks nothing: make samples with prefenv sample")
        task = store.sample(panels[0].samples[0]).task
    web = oracle.WebOracle(make_task(task or "shapes"), str(path), **settings)
    try:
        print(f"Label at {web.start()}\nCtrl-C ends; all answers are kept.", file=out, flush=True)
        session = web.session
        session.questions.put(panels)
        session.board.phase = "asking"
        try:
            while session.questions.wait(panels):
                session.board.phase = "done"
                time.sleep(
                    play.LINGER
                )  # so that pages see the end, and the last answer can be taken back
                if all(session.questions.complete(p.id) for p in panels):
                    break
                session.board.phase = "asking"
        except KeyboardInterrupt:
            pass
        standing = session.store.judgements()
        return {
            "panels": len(panels),
            "answered": sum(session.questions.complete(p.id) for p in panels),
            "answers": len(standing),
            "annotators": sorted({j.annotator for j in standing}),
            "agreement": asdict(agreement(standing)),
            "feedback": str(path),
        }
    finally:
        web.close()
