"""``winners``: flow matching on the best sample of every panel so far."""

from dataclasses import dataclass

from prefenv.agent import Requires
from prefenv.matching import MatchingAgent, matching_error


class Winners(MatchingAgent):
    @dataclass(frozen=True)
    class Config:
        """Settings of ``winners``.

        Args:
            lr: Adam's learning rate.
            updates: Gradient steps per round, on 128 samples each.
            proposals: Who makes the samples, ``model`` or ``reference``.
            memory: Rounds that are learned from, the last ones; 0 = all so far.
            max_grad_norm: Largest gradient norm.
        """

        lr: float = 1e-4
        updates: int = 20
        proposals: str = "reference"
        memory: int = 0
        max_grad_norm: float = 1.0

    name = "winners"
    requires = Requires(panel_size=2)

    def update(self, rollout):
        self.remember(rollout)
        judged = rollout.panels(self.pool["judgement"])
        low, high = judged.aminmax(dim=1, keepdim=True)
        won = ((judged == high) & (high > low)).flatten().nonzero()[:, 0]  # a tie has no winner
        for _ in range(self.config.updates if len(won) else 0):
            at = self.points(won[self.draw(len(won), 128)])
            self.descend(matching_error(self.velocity(self.model, at), at.target).mean())
        return {"winners": float(len(won))}
