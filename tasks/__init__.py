"""What differs between tasks, and nothing else: one file per task, and what they share."""

from .base import Task
from .checkpoints import check_task, task_of_checkpoint
from .classification import CLASSIFICATION
from .experiment import Experiment
from .measures import Measure, Named
from .meters import Meter, ObjectMeter, ReductionMeter, exact_sum
from .registry import TASKS, register, task_named
from .segmentation import SEGMENTATION
from .video import VIDEO

__all__ = [
    "CLASSIFICATION",
    "SEGMENTATION",
    "TASKS",
    "VIDEO",
    "Experiment",
    "Measure",
    "Meter",
    "Named",
    "ObjectMeter",
    "ReductionMeter",
    "Task",
    "check_task",
    "exact_sum",
    "register",
    "task_named",
    "task_of_checkpoint",
]
