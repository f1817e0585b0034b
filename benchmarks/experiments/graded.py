"""graded: a continuous preference, and a stated temperature.

Why: "the more the better" has no right answer until somebody says how much KL a reward is worth. The oracle rates
how far a shape is turned to the left; the optimum is the tilt ``p* ~ p_ref exp(r / beta)`` at three temperatures,
a truncated exponential of the turn, known exactly by importance weights. A method that overshoots loses here as
much as one that lags. Agents that have a temperature read it from the task, the others keep their settings.

Found (5 seeds): ``learned-reward`` scores 0.77 to 0.95 at all three temperatures, the mean of no other reaches
0.62. At beta = 0.3, where little may be moved, what follows the reward at any price is further from the optimum
than the untouched reference: ``draft`` (-4.6 to -5.0), ``nft`` (-1.1 to -1.3), ``flow-dpo`` (-0.9 to -1.0).
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 4, "oracle": "pose:of=turn"},
    {str(beta): {"task": f"shapes:beta={beta}"} for beta in (0.05, 0.1, 0.3)},
    n_reference=65536,
    n=4096,
)
