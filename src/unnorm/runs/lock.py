"""One command at a time works on a run directory."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from unnorm import processes
from unnorm.errors import UnnormError


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep other commands on this machine from working on a run directory, whether or not it exists yet.

    The system releases the lock of a process that was killed.

    Raises:
        UnnormError: another command is working on it.
    """
    lock = _lock_of(directory)

    def take() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UnnormError(
                f"Another command is working on '{directory}'. Wait for it to end, or choose another --out."
            ) from error

    processes.agree(take)
    try:
        yield
    finally:
        lock.release()


def is_held(directory: Path) -> bool:
    """Whether a command is working on a run directory."""
    try:
        with _lock_of(directory).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock_of(directory: Path) -> FileLock:
    """In the system's directory for temporary files: that of the run may not exist yet, or be on a network."""
    name = hashlib.sha256(os.fsencode(directory.absolute().resolve())).hexdigest()[:32]
    return FileLock(Path(tempfile.gettempdir()) / f"unnorm-{name}.lock")
