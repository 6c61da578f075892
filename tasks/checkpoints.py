"""What a checkpoint was trained for: its task and its classes, against those of the data set."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import ImageNetInfo

from loading.walking import composed, order_in_doubt
from models.build import is_ours
from utils.errors import UsageError, UserError

from .base import Task
from .registry import TASKS, task_named

_logger = logging.getLogger(__name__)


def task_of_checkpoint(checkpoint: Mapping[str, Any]) -> Task:
    """The task that a checkpoint was trained for; if it says nothing, its parameters tell."""
    name = checkpoint.get("task")
    if isinstance(name, str) and (name in TASKS or is_ours(checkpoint.get("args"))):
        return task_named(name)
    for task in TASKS.values():  # it says nothing, or is another program's, for which it is a word
        if task.recognises(checkpoint):
            return task
    return task_named("classification")


def check_task(checkpoint: Mapping[str, Any], task: Task, source: str) -> None:
    """Raise UsageError when a checkpoint was trained for another task than the data set's."""
    trained = task_of_checkpoint(checkpoint).name
    if trained != task.name:
        raise UsageError(f"{source} was trained for {trained}; the data set is of {task.name}")


def check_classes(checkpoint: Mapping[str, Any], class_names: Sequence[str], source: str) -> None:
    """Raise UserError if a checkpoint was trained on classes other than `class_names`.

    One that does not name its classes takes the data set's; what speaks against that is logged.
    """
    recorded = checkpoint.get("class_names")
    if not recorded:
        _log_taken_names(class_names, source)
        return
    if [composed(name) for name in recorded] == [composed(name) for name in class_names]:
        return
    if len(recorded) != len(class_names):
        difference = f"{len(recorded)} classes, the data set has {len(class_names)}"
    else:
        pairs = enumerate(zip(recorded, class_names, strict=True))
        label, (before, now) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        difference = (
            f"other classes than the data set's: class {label} was {before!r}, here it is {now!r}"
        )
        if sorted(recorded) == sorted(class_names):
            difference += ", the same in another order"
    raise UserError(
        f"{source} was trained on {difference}; evaluate on the --data-set of its training, or "
        "fine-tune it first with --method dense --model-path"
    )


def _log_taken_names(class_names: Sequence[str], source: str) -> None:
    if not class_names:
        return
    imagenet = ImageNetInfo("imagenet-1k").label_names()
    if (shown := order_in_doubt(class_names)) is not None:
        _logger.warning(
            "%s does not name its classes, which are taken to be in the order of the folders as "
            "text: %s; if it was trained in the order of their numbers, write these with equally "
            "many digits (01, 02, ..., 10)",
            source,
            shown,
        )
    elif len(class_names) == len(imagenet) and sorted(class_names) != sorted(imagenet):
        _logger.warning(
            "%s does not name its 1000 classes; if they are ImageNet's, the folders must be called "
            "by WordNet's numbers, n01440764 to n15075141: by other names they come in another "
            "order; here class 0 is %r",
            source,
            class_names[0],
        )
    else:
        _logger.info(
            "%s does not name its classes: they are taken to be those of the data set, %s to %s",
            source,
            class_names[0],
            class_names[-1],
        )
