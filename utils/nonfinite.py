"""Steps whose gradient is not a finite number: left out, counted, named; too many in a row end the run."""

import logging
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import UserError

MOST_IN_A_ROW = 10

_logger = logging.getLogger(__name__)


class NonFiniteSteps:
    """Leaves out optimizer steps on the device, without a wait of the host, and looks at the record now and then.

    The gradient that is looked at is the mean over all ranks, so every rank decides alike.

    Args:
        describe: names the images of a batch's `indices`.
        stop: end the run at the first such step; the host then looks after every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                 describe: Callable[[Tensor], list[str]], stop: bool = False):
        self._optimizer, self._scaler, self._describe, self._stop = optimizer, scaler, describe, stop
        # Fused optimizers take the flag that a GradScaler would give them; for others the host must look.
        self._on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._recent: deque[tuple[Tensor, Tensor]] = deque()  # skipped flag, indices: since the last look
        self._in_a_row = 0

    def step(self, norm: Tensor, indices: Tensor) -> Tensor:
        """Update the weights unless the gradient's norm is not finite; -> 1 for a step that was left out.

        Raises UserError after too many in a row, or at the first under `stop`.
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
        self._recent.append((skipped, indices))
        if self._stop or len(self._recent) == MOST_IN_A_ROW:
            self.look()
        return skipped

    def look(self) -> None:
        """Read the record of the last steps; name the batches that were left out."""
        recent, self._recent = list(self._recent), deque()
        flags = torch.stack([flag for flag, _ in recent]).tolist() if recent else []
        for flag, (_, indices) in zip(flags, recent, strict=True):
            self._in_a_row = self._in_a_row + 1 if flag else 0
            if not flag:
                continue
            names = ", ".join(self._describe(indices))
            # A GradScaler leaves out the first steps on purpose, until its scale is small enough.
            if self._stop and not self._scaler.is_enabled():
                raise NonFiniteError(f"the gradient is not finite on the batch of {names}")
            _logger.warning("step left out: the gradient is not finite on the batch of %s", names)
            if self._in_a_row >= MOST_IN_A_ROW:
                raise NonFiniteError(f"the gradient was not finite in {self._in_a_row} steps in a row; last on {names}")


class NonFiniteError(UserError):
    """The run cannot go on: gradients are not finite."""

    def __init__(self, what: str):
        super().__init__(f"{what}; try a lower --lr, --clip-grad 1, or --amp off")
