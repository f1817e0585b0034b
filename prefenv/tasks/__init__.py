"""What is generated: one file a task."""

from prefenv.tasks.base import Task, TrainConfig
from prefenv.tasks.conditions import Classes, Vector

__all__ = ["Classes", "Task", "TrainConfig", "Vector"]
