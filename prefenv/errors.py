"""Every error a user can cause, by name. The command line prints one line of it and exits with 2."""

from __future__ import annotations


class PrefenvError(Exception):
    """Base of all errors that name a mistake and its mend."""


class UnknownNameError(PrefenvError):
    """No task, agent, oracle or kernel goes by this name."""


class ConfigError(PrefenvError):
    """A setting is out of range, or two settings do not fit together."""


class RequiresError(ConfigError):
    """An agent asks more of an environment (panels, gradients, a stochastic kernel) than this one gives."""


class CheckpointError(PrefenvError):
    """A checkpoint is missing, broken, unsafe or made for another network."""


class BudgetSpentError(PrefenvError):
    """The oracle was asked for more than ``max_queries`` samples."""


class NonFiniteError(PrefenvError):
    """An action, a network output or a loss is NaN or infinite."""


class NoLogProbError(PrefenvError):
    """A deterministic step (std = 0) has no log-probability."""


class NotDifferentiableError(PrefenvError):
    """A reward gradient was asked of an oracle that has none."""


class RunError(PrefenvError):
    """A run directory cannot be written, or holds another run."""


class FeedbackError(PrefenvError):
    """A feedback file cannot be read or written, or what it holds is not valid."""
