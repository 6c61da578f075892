"""Mistakes of the user, reported in one line without a stack trace (see `program.run_main`)."""

import os


class UserError(Exception):
    """Something outside the program is wrong (a file, a folder, the data); exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A flag or a combination of flags is wrong; exit code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def storage_problem(error: BaseException) -> str | None:
    """The operating system's message if a file operation failed, otherwise None.

    torch.save reports a failed write as a RuntimeError about positions; the OSError behind it is
    its context.
    """
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return None


def printable(text: str) -> str:
    """`text` on one line and encodable: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
