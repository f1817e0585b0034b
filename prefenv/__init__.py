"""prefenv: a rectified-flow generator as a Gymnasium environment, for preference alignment.

Importing it registers the environments (``gym.make("prefenv/Shapes-v0")``, ``gym.make_vec(...)``).
"""

import gymnasium as gym

from prefenv.registry import make_agent, make_oracle, make_task, names

__version__ = "0.1.0"
__all__ = ["make_agent", "make_oracle", "make_task"]

for _task in names("task"):
    gym.register(
        id=f"prefenv/{_task.capitalize()}-v0",
        entry_point="prefenv.envs:FlowEnv",
        vector_entry_point="prefenv.envs:FlowVectorEnv",
        kwargs={"task": _task},
    )
