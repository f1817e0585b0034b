"""graded: a continuous preference, and a stated temperature.

Why: "the more the better" has no right answer until somebody says how much KL a reward is worth. The oracle rates
how far a shape is turned to the left; the optimum is the tilt ``p* ~ p_ref exp(r / beta)`` at three temperatures,
a truncated exponential of the turn, known exactly by importance weights. A method that overshoots loses here as
much as one that lags. Agents that have a temperature read it from the task, the others keep their settings.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 4, "oracle": "pose:of=turn"},
    {str(beta): {"task": f"shapes:beta={beta}"} for beta in (0.05, 0.1, 0.3)},
    n_reference=65536,
    n=4096,
)
