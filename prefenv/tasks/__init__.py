"""What is generated: one file a task."""

from prefenv.tasks.base import Task, TrainConfig

__all__ = ["Task", "TrainConfig"]
