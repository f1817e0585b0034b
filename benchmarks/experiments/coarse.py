"""coarse: 2, 4, 8 or 16 sampling steps.

Why: steps are what a sample costs, and a stochastic step's noise and a linearised likelihood ratio grow with its
length. Reference, agent and optimum are all sampled with the same number. With two steps the reference makes
hardly an S curve (one good one in 130), so that the optimum wants many of its samples.

Found so far (one seed, a hint only): at two steps ``best-of-n`` falls to 0.38 (there is hardly an S curve to
choose), ``d3po``, ``dpok`` and ``noise`` to 0.14 to 0.21 and ``sb3-ppo`` to 0.01, while ``dgpo`` (0.94),
``kto`` and ``learned-reward`` (0.88) hold. From four steps on most methods are within 0.1 of what they reach
with sixteen.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 4},
    {str(steps): {"steps": steps} for steps in (2, 4, 8, 16)},
    n_reference=131072,
)
