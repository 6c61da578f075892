"""Steps whose loss or gradient is not a finite number: left out, counted, named; too many in a row
end the run.
"""

import logging
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from .distributed import Distributed
from .errors import UserError

MOST_IN_A_ROW = 10

_logger = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """The run cannot go on: gradients are not finite. `batches` has each rank's image names on rank
    0, else nothing.
    """

    def __init__(self, what: str, batches: list[list[str]]):
        super().__init__(f"{what}; try a lower --lr, --clip-grad 1, or --amp off")
        self.batches = batches


class NonFiniteSteps:
    """Leaves out optimizer steps on the device, without a wait of the host, and looks at the record
    now and then.

    The gradient that is looked at is the mean over all ranks, so every rank decides alike.

    Args:
        describe: names the images of a batch's `indices`.
        stop: end the run at the first such step; the host then looks after every step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        distributed: Distributed,
        describe: Callable[[Tensor], list[str]],
        stop: bool = False,
    ):
        self._optimizer, self._scaler, self._distributed = optimizer, scaler, distributed
        self._describe, self._stop = describe, stop
        # Fused optimizers take the flag that a GradScaler would give them; for others the host must
        # look.
        self._on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._recent: deque[tuple[Tensor, Tensor]] = (
            deque()
        )  # flags (skipped, own loss bad), indices: not looked at
        self.in_a_row = 0  # steps left out at the end of what was looked at

    def step(self, norm: Tensor, loss: Tensor, indices: Tensor) -> Tensor:
        """Update the weights unless the gradient's norm is not finite; -> 1 for a step that was
        left out.

        loss: of this rank's part, to tell whose images did it.
        Raises NonFiniteError on every rank after too many in a row, or at the first under `stop`.
        """
        skipped = (~torch.isfinite(norm)).float()
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
        elif self._on_device:
            self._optimizer.found_inf = skipped
            self._optimizer.step()
        elif not skipped:
            self._optimizer.step()
        self._recent.append((torch.stack([skipped, (~torch.isfinite(loss)).float()]), indices))
        if self._stop or len(self._recent) == MOST_IN_A_ROW:
            self.look()
        return skipped

    def look(self) -> None:
        """Read the record of the last steps; name the batches that were left out. Every rank must
        call it alike.
        """
        recent, self._recent = list(self._recent), deque()
        flags = torch.stack([flags for flags, _ in recent]).tolist() if recent else []
        for (skipped, own_loss), (_, indices) in zip(flags, recent, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if not skipped:
                continue
            what, batches = self._name(bool(own_loss), indices)
            # A GradScaler leaves out the first steps on purpose, until its scale is small enough.
            if self._stop and not self._scaler.is_enabled():
                raise NonFiniteError(what, batches)
            _logger.warning("step left out: %s", what)
            if self.in_a_row >= MOST_IN_A_ROW:
                raise NonFiniteError(
                    f"{self.in_a_row} steps in a row were left out; in the last one {what}", batches
                )

    def _name(self, own_loss: bool, indices: Tensor) -> tuple[str, list[list[str]]]:
        """What to say of a step that was left out, and all image names by rank; both in full on
        rank 0 alone.
        """
        told = self._distributed.gather_objects((own_loss, self._describe(indices)))
        if told is None:
            return "the gradient is not finite (rank 0 names the images)", []
        guilty = [names for bad, names in told if bad]
        what = "the loss is not finite" if guilty else "the gradient is not finite"
        names = ", ".join(
            name for names in guilty or [names for _, names in told] for name in names
        )
        return f"{what} on the batch of {names}", [names for _, names in told]
