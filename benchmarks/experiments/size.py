"""size: 16 to 256 points a shape, 32 to 512 dimensions.

Why: likelihood ratios, policy-gradient variance and mean KL all depend on the dimension, and images have many. The
network, the budget and the settings stay the same.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 4},
    {
        str(points): {"task": f"shapes:points={points}", "checkpoint": f"shapes-{points}"}
        for points in (16, 32, 128, 256)
    }
    | {"64": {}},
)
