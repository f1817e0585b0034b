"""noisy: a Bradley-Terry teacher at three temperatures.

Why: it is the model of people that most methods assume. Of two samples the better is named with probability
``sigmoid(b (r_1 - r_2))``: for a roll against a clean S curve 0.71 at b = 1, 0.86 at 2 and 0.99 at 5. Here doubt
depends on how alike the two are, which plain mistakes do not.

Found (5 seeds): at b = 1 ``learned-reward`` (0.97 to 0.99), ``kto`` (0.75 to 0.88), ``nft`` (0.73 to 0.82) and
``best-of-n`` (0.90 on average, 0.52 with one seed) learn, and no seed of any other reaches 0.48. At b = 5 these
four and ``dgpo`` are above 0.8 on average; filtered matching (``dspo``, ``mapo``, ``rft``, ``rwr``) stays below
0.43 at any temperature, as it does in ``pairs``.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 2},
    {str(certainty): {"teacher": f"beta={certainty}"} for certainty in (1, 2, 5)},
)
