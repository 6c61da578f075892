"""The two ways to treat images that cannot be used: stop, or skip and list them."""

from pathlib import Path

from utils.errors import UserError
from utils.files import atomic_file


class BadImages:
    """Images that cannot be decoded: policy "stop" raises, "skip" collects them in `found`."""

    def __init__(self, policy: str):
        self.policy = policy
        self.found: dict[str, str] = {}  # name -> reason

    def report(self, problems: list[tuple[str, str]]) -> None:
        """Raise `UserError` for the first problem under "stop"; record all of them under "skip"."""
        if problems and self.policy == "stop":
            name, reason = problems[0]
            raise UserError(
                f"{name}: {reason}. Repair or remove it, or leave such images out with "
                "--bad-images skip"
            )
        self.found.update(problems)

    def write(self, path: str | Path) -> list[str]:
        """Add the images found to the list in `path`, one per line; -> all its lines.

        Without images found, no file is written.
        """
        path = Path(path)
        try:
            earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the list of bad images: {error.strerror}"
            ) from None
        lines = list(
            dict.fromkeys(earlier + [f"{name}: {reason}" for name, reason in self.found.items()])
        )
        if lines != earlier:
            with atomic_file(path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        return lines
