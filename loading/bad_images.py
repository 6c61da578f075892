"""What becomes of images that cannot be used."""

from pathlib import Path

from utils.errors import UserError
from utils.files import atomic_file


class BadImages:
    """What becomes of images that cannot be decoded: `policy` "stop" raises, "skip" collects them
    in `found`.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self.found: dict[str, str] = {}  # name -> reason

    def report(self, problems: list[tuple[str, str]]) -> None:
        """Raises `UserError` for the first problem under "stop"; takes note of all under "skip"."""
        if problems and self.policy == "stop":
            name, reason = problems[0]
            raise UserError(
                f"{name}: {reason}. Repair or remove it, or leave such images out with "
                "--bad-images skip"
            )
        self.found.update(problems)

    def write(self, path: str | Path) -> list[str]:
        """Lists the images found, a line each, added to those that `path` lists already; -> its
        lines.

        Nothing found, no file.
        """
        path = Path(path)
        try:
            known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the list of bad images: {error.strerror}"
            ) from None
        lines = list(
            dict.fromkeys(known + [f"{name}: {reason}" for name, reason in self.found.items()])
        )
        if lines != known:
            with atomic_file(path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        return lines
