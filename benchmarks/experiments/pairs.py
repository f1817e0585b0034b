"""pairs: only which of two is better, 1,024 times.

Why: it is what most people are asked. Two rolls are compared too, and one of them is called the better: an answer
tells an order and never how good the better one is. Methods that need reward gradients cannot take part.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 2048, "panel_size": 2, "oracle": "s-curve:answer=best"}, seeds=10
)
