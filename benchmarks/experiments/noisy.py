"""noisy: a Bradley-Terry teacher at three temperatures.

Why: it is the model of people that most methods assume. Of two samples the better is named with probability
``sigmoid(b (r_1 - r_2))``: for a roll against a clean S curve 0.71 at b = 1, 0.86 at 2 and 0.99 at 5. Here doubt
depends on how alike the two are, which plain mistakes do not.

Found so far (one seed, a hint only): at b = 1 ``learned-reward`` (0.99), ``kto`` (0.88), ``best-of-n`` (0.74) and
``nft`` (0.73) learn, all others end below 0.45.
"""

from benchmarks.experiments import Experiment

EXPERIMENT = Experiment(
    {"queries": 1024, "panel_size": 2},
    {str(certainty): {"teacher": f"beta={certainty}"} for certainty in (1, 2, 5)},
)
