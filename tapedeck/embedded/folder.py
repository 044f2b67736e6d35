"""The data folder: made on first use, guarded against two commands at once."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tapedeck.embedded.errors import EmbeddedError


def data_folder(path: Path) -> Path:
    """Make the folder if need be and return its one true name. Raises EmbeddedError if it can't be used."""
    try:
        path = path.expanduser().resolve()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise EmbeddedError(f"{path} can't be used as data folder: {reason}. Choose another.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise EmbeddedError(
            f"{path} belongs to another user, so nothing can be kept there. Choose another data folder, "
            "or run as its owner."
        )
    return path


@contextmanager
def exclusive(data_dir: Path, timeout_s: float) -> Iterator[None]:
    """Let one start or stop at a time work on this folder, over threads and processes.

    Raises EmbeddedError if another one holds it for longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    # flock, for it goes by open file: it keeps threads apart as well, and no crash leaves it behind.
    with (data_dir / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise EmbeddedError(
                        f"Another tapedeck has been starting or stopping services in {data_dir} "
                        f"for {timeout_s:g} s. Wait for it or end it, then try again."
                    ) from None
                time.sleep(0.05)
        yield
