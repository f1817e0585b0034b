"""few: twelve answers, three panels of four.

Why: people answer tens of questions, not thousands; this is what the toy asks of its user. The reference makes
23 % S curves, so a panel shows none in one of three cases.

Found so far (IQM of 10 seeds): ``best-of-n`` (0.97, interval 0.83 to 0.98) and ``learned-reward`` (0.95, 0.90 to
0.98) are nearly at the optimum, the next is ``mapo`` (0.65, 0.34 to 0.76). Those two fit a judge to the answers,
and label the model's own samples with it (one seed of ten ends at -0.31 all the same). Methods that move in small
steps (log-probabilities, reward gradients) stay below 0.1; a model that learned nothing scores 0.03.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment({"queries": 12, "panel_size": 4}, seeds=10)
