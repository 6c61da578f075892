"""The tasks by name."""

from utils.errors import UserError

from .base import Task

TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Make a task known under its name."""
    TASKS[task.name] = task
    return task


def task_named(name: str) -> Task:
    """Raises UserError for a name that is not registered."""
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; known are {', '.join(TASKS)}")
    return TASKS[name]
