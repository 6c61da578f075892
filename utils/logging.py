"""Logging: console, `log.txt` and `args.json`, averages, progress bar and TensorBoard."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from .distributed import Distributed
from .errors import UserError
from .files import atomic_file, finite, write_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)
NOT_PLOTTED = ("epoch", "n_parameters", "best_epoch")  # of the lines of log.txt


class _ConsoleHandler(logging.Handler):
    """Writes to standard output without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging(is_main: bool = True, level: int = logging.INFO) -> None:
    """One format for the whole program; ranks other than the main one only log errors."""
    handler = _ConsoleHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    )
    logging.basicConfig(level=level if is_main else logging.ERROR, handlers=[handler], force=True)


def write_args(output_dir: str | os.PathLike, args: argparse.Namespace, **more: Any) -> None:
    """Record the flags of the run in `args.json`, and `more` that follows from them."""
    write_json(Path(output_dir) / "args.json", vars(args) | more)


class EpochLog:
    """`log.txt`: one JSON object per line and epoch (key `epoch`), only complete lines.

    A resumed run may repeat some epochs: `resume_at` drops their lines, so that each epoch is
    listed once.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.path = Path(output_dir) / "log.txt"

    def append(self, record: dict[str, Any]) -> None:
        """Add an epoch's line. Non-finite numbers, which JSON cannot express, become null."""
        line = json.dumps(finite(record)) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def resume_at(self, epoch: int) -> None:
        """Keep the lines of the epochs before `epoch`; a line cut off by a kill is dropped too."""
        if not self.path.exists():
            return
        kept = [
            line
            for line in self.path.read_text(encoding="utf-8").splitlines()
            if _is_before(line, epoch)
        ]
        with atomic_file(self.path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())


def _is_before(line: str, epoch: int) -> bool:
    try:
        return json.loads(line)["epoch"] < epoch
    except (ValueError, KeyError, TypeError):
        return False


class Averages:
    """Means of named scalars over many steps.

    Tensors are summed on their device; the host waits only when the means are read.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}

    def update(self, count: int = 1, **means: Tensor | float) -> None:
        """Add means over `count` images each; tensors have one element and are summed in float64.

        A tensor that is not finite is left out, like the step that it comes from.
        """
        for name, mean in means.items():
            if isinstance(mean, Tensor):
                value = mean.detach().double().reshape(())
                finite = value.isfinite()
                total, counted = torch.where(finite, value, 0.0) * count, finite * count
            else:
                total, counted = float(mean) * count, count
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + counted

    def means(self, distributed: Distributed | None = None) -> dict[str, float]:
        """The means so far, in the order of the first update; with `distributed` over all ranks.

        Every rank must then call it, after updates under the same names. NaN if nothing was
        counted.
        """
        totals = torch.tensor(self._read(), dtype=torch.float64)
        if distributed is not None:
            totals = distributed.all_reduce_sum(totals)
        return dict(zip(self._sums, (totals[0] / totals[1]).tolist(), strict=True))

    def state_dict(self) -> dict[str, list]:
        """Sums and counts, so that an interrupted epoch ends with the same means."""
        return {name: list(pair) for name, *pair in zip(self._sums, *self._read(), strict=True)}

    def load_state_dict(self, state: dict[str, list]) -> None:
        self._sums = {name: total for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}

    def _read(self) -> tuple[list[float], list[float]]:
        """All sums and all counts, with a single wait for the device."""
        numbers = [*self._sums.values(), *self._counts.values()]
        tensors = [number for number in numbers if isinstance(number, Tensor)]
        read = iter(torch.stack([t.double() for t in tensors]).tolist() if tensors else [])
        values = [next(read) if isinstance(number, Tensor) else float(number) for number in numbers]
        return values[: len(self._sums)], values[len(self._sums) :]


class Progress:
    """Iterates and shows the progress: a bar on a terminal, else a line now and then.

    `status` returns the text after the bar. It is only called when something is shown, every
    `refresh_s` seconds on a terminal and every `line_s` elsewhere, so it may read numbers from the
    device.
    """

    _LINE = (
        "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} "
        "[{elapsed}, {remaining} left, {rate_fmt}]{postfix}"
    )

    def __init__(
        self,
        iterable: Iterable,
        description: str,
        *,
        total: int | None = None,
        initial: int = 0,
        status: Callable[[], str] | None = None,
        shown: bool = True,
        refresh_s: float = 2.0,
        line_s: float = 30.0,
        stream: TextIO | None = None,
    ):
        self._iterable, self._description = iterable, description
        self._initial, self._shown = initial, shown
        self._total = len(iterable) + initial if total is None else total  # type: ignore[arg-type]
        self._status = status or (lambda: "")
        self._refresh_s, self._line_s = refresh_s, line_s
        self._stream = stream or sys.stderr

    def __iter__(self) -> Iterator:
        if not self._shown:
            return iter(self._iterable)
        return self._with_bar() if self._stream.isatty() else self._with_lines()

    def _with_bar(self) -> Iterator:
        with tqdm(
            total=self._total,
            initial=self._initial,
            desc=self._description,
            file=self._stream,
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            due = time.monotonic()
            for item in self._iterable:
                yield item
                if time.monotonic() >= due:
                    bar.set_postfix_str(self._status(), refresh=False)
                    due = time.monotonic() + self._refresh_s
                bar.update()

    def _with_lines(self) -> Iterator:
        start = time.monotonic()
        due = start + self._line_s
        for done, item in enumerate(self._iterable, start=self._initial + 1):
            yield item
            if time.monotonic() >= due:
                elapsed = time.monotonic() - start
                line = tqdm.format_meter(
                    done,
                    self._total,
                    elapsed,
                    prefix=self._description,
                    postfix=self._status(),
                    initial=self._initial,
                    bar_format=self._LINE,
                )
                _logger.info("%s", line)
                due = time.monotonic() + self._line_s


def tensorboard_writer(
    output_dir: str | os.PathLike, distributed: Distributed, purge_step: int | None = None
) -> Optional["SummaryWriter"]:
    """A SummaryWriter on the main rank, None elsewhere.

    `purge_step` is the first step of a resumed run: TensorBoard then hides earlier entries from
    this step on.
    """
    if not distributed.is_main:
        return None
    # Imported here since it is slow, and only the main rank needs it.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(output_dir), purge_step=purge_step)
