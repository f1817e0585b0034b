"""basic: S curve against Swiss roll, with answers in plenty.

Why: every method should do this; where one does not, no other result of it means much. 4,096 judged samples are
more than it takes, so the score tells where a method ends, and the curve how soon it gets there.

Found so far (3 seeds): twenty of 21 methods score above 0.75; ``adjoint`` does not (0.07 to 0.88).
``learned-reward``, ``kto`` and ``best-of-n`` end within 0.03 of the optimum. The end tells methods apart less than
``few`` does.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment({"queries": 4096, "panel_size": 4}, seeds=10)
