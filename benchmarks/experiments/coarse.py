"""coarse: 2, 4, 8 or 16 sampling steps.

Why: steps are what a sample costs, and a stochastic step's noise and a linearised likelihood ratio grow with its
length. Reference, agent and optimum are all sampled with the same number. With two steps the reference makes
hardly an S curve (one good one in 600), so that the optimum wants many of its samples.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 4},
    {str(steps): {"steps": steps} for steps in (2, 4, 8, 16)},
    n_reference=131072,
)
