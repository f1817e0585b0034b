"""thin: data with hardly any noise, where the noise of stochastic samplers shows.

Why: methods that need log-probabilities sample with noise, and noise that a sampler leaves behind is learned as
part of the shape. The point noise is 0.005 instead of 0.03, so that it cannot hide.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {
        "queries": 2048,
        "panel_size": 4,
        "task": "shapes:noise=0.005",
        "checkpoint": "shapes-thin",
    }
)
