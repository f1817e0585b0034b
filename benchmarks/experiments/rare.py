"""rare: the reference makes only 2 % of what is wanted.

Why: alignment matters most where the wanted thing is rare, and then most answers tell nothing: at first eleven of
twelve panels show no S curve at all. Methods that learn only from what was chosen starve.

Found (5 seeds): they do not, with 4,096 answers: ``rft`` (0.95 to 0.98) and ``learned-reward`` (0.96 to 0.98)
are nearest to the optimum. ``best-of-n``, which is nearly at the optimum elsewhere, stays at 0.21 to 0.25:
among sixteen samples of the reference there is often none to choose. ``hil-dd`` (0.29 to 0.80) depends on its
seed.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {
        "queries": 4096,
        "panel_size": 4,
        "task": "shapes:s_rate=0.025",
        "checkpoint": "shapes-rare",
    },
    n_reference=65536,
)
