"""basic: S curve against Swiss roll, with answers in plenty.

Why: every method should do this; where one does not, no other result of it means much. 4,096 judged samples are
more than it takes, so the score tells where a method ends, and the curve how soon it gets there.

Found (10 seeds): twenty of 21 methods score 0.80 and more; ``adjoint`` (0.32, interval 0.13 to 0.64) depends on
its seed. ``kto`` (0.98), ``learned-reward`` and ``best-of-n`` (0.97) end within 0.03 of the optimum. The end
tells methods apart less than ``few`` does.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment({"queries": 4096, "panel_size": 4}, seeds=10)
