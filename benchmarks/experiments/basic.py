"""basic: S curve against Swiss roll, with answers in plenty.

Why: every method should do this; where one does not, no other result of it means much. 4,096 judged samples are
more than it takes, so the score tells where a method ends, and the curve how soon it gets there.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment({"queries": 4096, "panel_size": 4}, seeds=10)
