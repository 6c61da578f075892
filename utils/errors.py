"""Mistakes of the user, each told in one line and without a stack trace; and `run_main`, which
tells them.
"""

import os


class UserError(Exception):
    """Something outside the program is wrong (a file, a folder, the data). Ends the program with
    exit code 1.
    """

    exit_code = 1


class UsageError(UserError):
    """A flag or a combination of flags is wrong. Ends the program with exit code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What an error says, without the trace that libraries put behind it; its type where it says
    nothing.
    """
    return str(error).strip().split("\n")[0] or type(error).__name__


def storage_problem(error: BaseException) -> str | None:
    """The operating system's words if a file operation failed, otherwise None.

    torch.save tells a failed write as a RuntimeError about positions; the OSError behind it is its
    context.
    """
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return None


def printable(text: str) -> str:
    """`text` on one line and encodable: control characters and undecodable bytes of file names are
    escaped.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
