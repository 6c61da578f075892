"""The folder that keeps what was compiled on this machine."""

import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """A folder that can be written and belongs to this user: what lies in it is executed.

    Raises:
        OSError: there is none; the message is one line.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for candidate in (Path(base, "dyvm"), Path(tempfile.gettempdir(), f"dyvm-{os.getuid()}")):
        try:
            candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
            if candidate.stat().st_uid == os.getuid():
                tempfile.TemporaryFile(dir=candidate).close()
                return candidate
        except OSError:
            continue
    raise OSError(
        f"no cache folder can be written: neither {base}/dyvm nor {tempfile.gettempdir()}"
    )
