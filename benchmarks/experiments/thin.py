"""thin: data with hardly any noise, where the noise of stochastic samplers shows.

Why: methods that need log-probabilities sample with noise, and noise that a sampler leaves behind is learned as
part of the shape. The point noise is 0.005 instead of 0.03, so that it cannot hide.

Found (5 seeds): stochastic steps as such are not what blurs. Everybody's shapes are further from clean ones than
the reference's (medians): ``draft`` 1.1 times, ``best-of-n`` and ``learned-reward`` 1.3, ``dpok`` 1.4, ``ppo``
1.6, but ``dspo`` and ``rwr``, which sample without noise, 1.8 and 2.0, ``d3po`` 2.4 and ``hil-dd`` 2.6.
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
