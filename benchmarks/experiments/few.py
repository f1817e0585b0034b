"""few: twelve answers, three panels of four.

Why: people answer tens of questions, not thousands; this is what the toy asks of its user. The reference makes
23 % S curves, so a panel shows none in one of three cases.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment({"queries": 12, "panel_size": 4}, seeds=10)
