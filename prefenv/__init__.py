"""prefenv: a rectified-flow generator as a Gymnasium environment, for preference alignment.

Importing it registers the environments (``gym.make("prefenv/Shapes-v0")``, ``gym.make_vec(...)``).
"""

from prefenv.registry import env_id, make_agent, make_oracle, make_task, names

__version__ = "0.1.0"
__all__ = ["make_agent", "make_oracle", "make_task"]

for _task in names("task"):
    env_id(_task)
