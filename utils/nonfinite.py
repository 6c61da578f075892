"""Steps with a non-finite loss or gradient: skipped, counted, reported; too many end the run."""

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
    """The run cannot continue: gradients are not finite.

    `batches` holds each rank's image names on rank 0, and is empty elsewhere.
    """

    def __init__(self, what: str, batches: list[list[str]]):
        super().__init__(f"{what}; try a lower --lr, --clip-grad 1, or --amp off")
        self.batches = batches


class NonFiniteSteps:
    """Skips optimizer steps on the device, without making the host wait, and reports them later.

    The gradient that is checked is the mean over all ranks, so every rank decides alike.

    Args:
        describe: names the images of a batch's `indices`.
        stop: end the run at the first such step; the host then checks after every step.
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
        # Fused optimizers take a GradScaler's flag; for others the host must wait.
        self._on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        # Steps not yet looked at: flags (skipped, own loss not finite), indices of the batch.
        self._recent: deque[tuple[Tensor, Tensor]] = deque()
        self.in_a_row = 0  # steps skipped in a row, up to the last one looked at

    def step(self, norm: Tensor, loss: Tensor, indices: Tensor) -> Tensor:
        """Update the weights unless the gradient's norm is not finite; -> 1 for a skipped step.

        loss: of this rank's part, to tell which rank caused it. Raises NonFiniteError on every rank
        after too many in a row, or at the first one under `stop`.
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
        """Report the batches of recently skipped steps. Every rank must call it alike."""
        recent, self._recent = list(self._recent), deque()
        flags = torch.stack([flags for flags, _ in recent]).tolist() if recent else []
        for (skipped, own_loss), (_, indices) in zip(flags, recent, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if not skipped:
                continue
            what, batches = self._name(bool(own_loss), indices)
            # A GradScaler skips the first steps on purpose, until its scale is small enough.
            if self._stop and not self._scaler.is_enabled():
                raise NonFiniteError(what, batches)
            _logger.warning("step left out: %s", what)
            if self.in_a_row >= MOST_IN_A_ROW:
                raise NonFiniteError(
                    f"{self.in_a_row} steps in a row were left out; in the last one {what}", batches
                )

    def _name(self, own_loss: bool, indices: Tensor) -> tuple[str, list[list[str]]]:
        """Description of a skipped step, and all image names by rank; complete on rank 0 only."""
        reports = self._distributed.gather_objects((own_loss, self._describe(indices)))
        if reports is None:
            return "the gradient is not finite (rank 0 names the images)", []
        guilty = [names for bad, names in reports if bad]
        what = "the loss is not finite" if guilty else "the gradient is not finite"
        names = ", ".join(
            name for names in guilty or [names for _, names in reports] for name in names
        )
        return f"{what} on the batch of {names}", [names for _, names in reports]
