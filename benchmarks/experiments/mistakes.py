"""mistakes: a share of the answers is wrong.

Why: annotators slip. Each of 1,024 samples is accepted or rejected, and the teacher says the opposite of what it
means with probability 0, 0.1, 0.2 or 0.4. At 0.4 a label carries 3 % of a bit, and only averaging helps.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 4},
    {str(rate): {"teacher": f"mistake={rate},answer=choose"} for rate in (0.0, 0.1, 0.2, 0.4)},
)
