"""One command at a time works on a run directory."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from unnorm import processes
from unnorm.errors import UnnormError

LOCK = ".lock"
"""In the run directory while a command works on it. One that a killed process left behind locks nothing, except on a
disk without locks of its own, where its presence is all that counts."""


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make the run directory and keep other commands from working on it; if nothing is written, it is removed again.

    Raises:
        UnnormError: another command is working on it.
    """
    lock = FileLock(directory / LOCK, mode=0o644)
    missing = list(takewhile(lambda path: not path.exists(), (directory, *directory.parents)))

    def take() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UnnormError(
                f"Another command is working on '{directory}'. Wait for it to end, or choose another --out. If none "
                f"is, as after a crash on another machine, delete '{directory / LOCK}'."
            ) from error

    processes.agree(take)
    try:
        if not (directory / LOCK).exists():
            raise UnnormError(
                f"Process {processes.rank()} does not see '{directory}', which the first process made. All need one "
                "disk: give an --out that every machine has."
            )
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows deletes no open file; there filelock does it on release.
                (directory / LOCK).unlink()
            lock.release()
            with suppress(OSError):  # Not empty: something was written.
                for made in missing:
                    made.rmdir()
