"""Models, and the tasks that train them."""

from distopt.models import cifar10, digits
from distopt.models.task import Task

__all__ = ["TASKS", "Task", "cifar10", "digits"]

TASKS: dict[str, Task] = {task.name: task for task in (cifar10.TASK, digits.TASK)}
"""What `distopt train` offers, by name."""
