"""pairs: only which of two is better, 1,024 times.

Why: it is what most people are asked. Two rolls are compared too, and one of them is called the better: an answer
tells an order and never how good the better one is. Methods that need reward gradients cannot take part.

Found so far (3 seeds): methods that fit what was chosen, and were at 0.90 to 0.95 in ``basic``, fall to 0.23 to
0.44 (``rft``, ``rwr``, ``mapo``, ``dspo``, ``pfm``): the better of two rolls is a roll. ``kto`` (0.94 to 0.96) and
``best-of-n`` (0.85 to 0.97) do not. ``learned-reward`` reached 0.97, 0.98 and 0.48.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 2048, "panel_size": 2, "oracle": "s-curve:answer=best"}, seeds=10
)
