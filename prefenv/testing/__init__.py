"""Checks of the contracts, shipped for other people's plug-ins and used by our own tests.

Gymnasium has no checker for vector envs, and nobody has one for oracles. Each check returns nothing or raises a
``ContractError`` that names the mistake and its mend; none needs pytest::

    from prefenv.testing import check_agent, check_oracle, check_vector_env

    check_vector_env(lambda n: gym.make_vec("mine/Env-v0", num_envs=n), lambda: gym.make("mine/Env-v0"))
    check_oracle(MyOracle(task), samples)
    check_agent(MyAgent)

Run Gymnasium's and Stable-Baselines3's own ``check_env`` on the single env beside them.
"""

from prefenv.testing.agent import Outcome, check_agent
from prefenv.testing.data import ContractError
from prefenv.testing.oracle import check_oracle
from prefenv.testing.vector_env import check_vector_env

__all__ = ["ContractError", "Outcome", "check_agent", "check_oracle", "check_vector_env"]
