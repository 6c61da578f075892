"""Mistakes of the user, each told in one line and without a stack trace."""


class UserError(Exception):
    """Something outside the program is wrong (a file, a folder, the data). Ends the program with exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A flag or a combination of flags is wrong. Ends the program with exit code 2."""

    exit_code = 2
