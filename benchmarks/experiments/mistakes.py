"""mistakes: a share of the answers is wrong.

Why: annotators slip. Each of 1,024 samples is accepted or rejected, and the teacher says the opposite of what it
means with probability 0, 0.1, 0.2 or 0.4. At 0.4 a label carries 3 % of a bit, and only averaging helps.

Found so far (one seed, a hint only): with 40 % wrong ``learned-reward`` (0.98) and ``best-of-n`` (0.93) hardly
lose anything, ``nft`` (0.72) and ``kto`` (0.63) lose some, all others end below 0.4.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 4},
    {str(rate): {"teacher": f"mistake={rate},answer=choose"} for rate in (0.0, 0.1, 0.2, 0.4)},
)
