"""modes: eight Gaussians, two preferred with unequal mass.

Why: a method that is paid for reward alone may give up the rarer of two good answers. The oracle likes two
opposite modes of the ring, of which the reference makes three to one; the optimum keeps both in that proportion.
Samples are points of the plane, so this is also the cheapest experiment.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment({"queries": 2048, "panel_size": 4, "task": "gaussians"})
