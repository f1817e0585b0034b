"""A person as the oracle: the episode, what may be typed (``words``), drawing in text (``canvas``)."""

from prefenv.play.episode import Episode, Outcome, PlayConfig, Question

__all__ = ["Episode", "Outcome", "PlayConfig", "Question"]
