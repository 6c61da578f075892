"""How a program ends: `run_main` reports mistakes of the user in one line, and the exit code."""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from .errors import UsageError, UserError, first_line
from .startup import missing_package

# Launchers end the other processes as soon as one has ended: the one that has something to say must
# be the first.
HEAD_START = 3.0  # seconds


class Lasting:
    """A standard stream that outlives its reader, and whatever it cannot encode.

    When the reader goes away (`| head`, a `tee` that ends), all further output is lost without a
    word: a training does not end with its log. Characters that the encoding lacks are escaped.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a reader that is gone, or its terminal
            raise error
        # The descriptor, so that workers and what is written at exit go the same way.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._stream.flush()


def _outlive_readers() -> None:
    """Make the standard streams `Lasting`, unless a test has replaced them; one that the shell has
    closed (`>&-`) leads nowhere.
    """
    for name, own in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif getattr(sys, name) is own:
            setattr(sys, name, Lasting(own))


def run_main(main: Callable[[], int | None]) -> None:
    """Run a program's `main` and exit; mistakes of the user become one line on standard error.

    Exit code: what `main` returns (None: 0), the UserError's, 130 after Ctrl-C. A full or lost
    disk, a memory that is too small, a missing package and a lost process of a distributed run are
    reported in one line too (exit code 1). Programming errors keep their stack trace. Of several
    processes on a machine, which all have the same flags, the first one reports a UsageError and
    the others a while later: torchrun has ended them by then. Standard output and standard error
    become `Lasting`.
    """
    _outlive_readers()
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    except Exception as error:
        message = _describe(error)
        if message is None:
            if _in_process_group():  # print the trace, then exit at once as below
                logging.getLogger(__name__).critical(
                    "rank %s failed", os.environ.get("RANK", 0), exc_info=error
                )
                _leave(1)
            raise
        code = getattr(error, "exit_code", 1)
        if isinstance(error, UsageError) and _is_not_the_first():
            time.sleep(HEAD_START)
        _report(f"error{_rank()}: {message}", code)
    _leave(code)


def _describe(error: Exception) -> str | None:
    """One line for an error that is not a programming error, else None."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if lacking := missing_package(error):
        return lacking
    if _is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)[:200]}); try a smaller --batch-size, for a "
            "training with --accum-steps or --grad-checkpointing"
        )
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        return f"cannot write: {os.strerror(error.errno)}{where}"
    if _in_process_group():
        from .distributed import peer_failure

        return peer_failure(error)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, a GPU's or the host's as PyTorch reports them; torch is not imported for this."""
    of_gpu = type(error).__name__ == "OutOfMemoryError"
    return of_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _rank() -> str:
    rank = os.environ.get("RANK")  # clusters may set WORLD_SIZE alone
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return f" (rank {rank})" if rank and several else ""


def _is_not_the_first() -> bool:
    return bool(_rank()) and os.environ.get("LOCAL_RANK", "0") != "0"


def _report(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _in_process_group() -> bool:
    # Looked up, not imported: a program without torch must not import it for this.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave(code: int) -> None:
    if _in_process_group():
        # After an error: shutting the process group down in order would wait for peers that may
        # never answer.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# Problems of the disk that any write of a run can hit, not only that of a checkpoint.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
