"""size: 16 to 256 points a shape, 32 to 512 dimensions.

Why: likelihood ratios, policy-gradient variance and mean KL all depend on the dimension, and images have many. The
network, the budget and the settings stay the same. The network, 256 wide, predicts the finished sample here: one
that predicts the velocity has to carry 512 dimensions of noise through itself, and fails (measured: residual 0.32
instead of 0.02 at 128 points).

Found so far (one seed, a hint only): from 32 to 512 dimensions no method breaks down. ``best-of-n`` (0.98 to
0.99), ``learned-reward`` (0.97 to 0.98), ``rft`` and ``awm`` do not change; ``ppo`` slides from 0.90 to 0.77.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 4},
    {
        str(points): {
            "task": f"shapes:points={points},predict=data",
            "checkpoint": f"shapes-{points}",
        }
        for points in (16, 32, 64, 128, 256)
    },
)
