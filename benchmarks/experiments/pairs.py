"""pairs: only which of two is better, 1,024 times.

Why: it is what most people are asked. Two rolls are compared too, and one of them is called the better: an answer
tells an order and never how good the better one is. Methods that need reward gradients cannot take part.

Found (10 seeds): methods that fit what was chosen, and are above 0.9 in ``basic``, fall to 0.21 to 0.40
(``rft``, ``rwr``, ``mapo``, ``dspo``) and ``pfm`` to 0.33 to 0.59: the better of two rolls is a roll. ``kto``
(0.93 to 0.96) does not, nor do ``dgpo`` (0.85 to 0.88) and ``flow-dpo`` (0.79 to 0.87). ``learned-reward``
reached 0.97 to 0.98 with nine seeds and 0.48 with one; ``best-of-n`` is as uneven (0.41 to 0.97).
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 2048, "panel_size": 2, "oracle": "s-curve:answer=best"}, seeds=10
)
