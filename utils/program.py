"""How a program ends: `run_main` tells mistakes of the user in one line and chooses the exit code."""

import errno
import logging
import os
import sys
from collections.abc import Callable

from .errors import UserError


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and end the process: mistakes of the user become one line on standard
    error.

    Exit code: what `main` returns (None: 0), the UserError's, 130 after Ctrl-C. A full or vanished
    disk and a lost process of a distributed run are told in one line too (exit code 1). Programming
    mistakes keep their trace.
    """
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = _tell("interrupted", 130)
    except Exception as error:
        message = _explain(error)
        if message is None:
            if _in_process_group():  # the trace, and then the same quick end
                logging.getLogger(__name__).critical(
                    "rank %s failed", os.environ.get("RANK", 0), exc_info=error
                )
                _leave(1)
            raise
        code = _tell(f"error{_rank()}: {message}", getattr(error, "exit_code", 1))
    _leave(code)


def _explain(error: Exception) -> str | None:
    """One line for an error that is not a programming mistake, else None."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        return f"cannot write: {os.strerror(error.errno)}{where}"
    if _in_process_group():
        from .distributed import peer_failure

        return peer_failure(error)
    return None


def _rank() -> str:
    return f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""


def _tell(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _in_process_group() -> bool:
    distributed = sys.modules.get(
        "torch.distributed"
    )  # asking must not import torch into a script without it
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave(code: int) -> None:
    if _in_process_group():
        # Left behind by an error: taking a process group down in order would wait for peers that
        # may never answer.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# Problems of the disk that can meet any write of a run, not only that of a checkpoint.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
