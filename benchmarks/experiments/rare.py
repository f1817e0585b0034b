"""rare: the reference makes only 2 % of what is wanted.

Why: alignment matters most where the wanted thing is rare, and then most answers tell nothing: at first eleven of
twelve panels show no S curve at all. Methods that learn only from what was chosen starve.
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
