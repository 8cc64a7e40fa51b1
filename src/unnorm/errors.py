"""The one exception that users see, and helpers for quoting other errors in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UnnormError(Exception):
    """A problem that the user can fix: the message says what was wrong, where, and what to do.

    The CLI prints the message without a traceback and exits with `exit_code`. In a loop over models, let
    `RunInterruptedError` through, which is Ctrl-C.
    """

    exit_code = 2
    told_elsewhere = False
    """Whether another process of the run raises the same error and prints it."""


class RunInterruptedError(UnnormError):
    """A run or an evaluation was stopped and can be resumed; the message says how."""

    exit_code = 130


@contextmanager
def explained(applies: bool, before: str, after: str) -> Iterator[None]:
    """If it `applies`, put an UnnormError's message between two sentences, such as the cause and a remedy."""
    try:
        yield
    except UnnormError as error:
        if not applies:
            raise
        raise UnnormError(f"{before} {error} {after}".strip()) from error


def cant_be_used(error: OSError) -> UnnormError | None:
    """An error about a path in words; None if the error names no path."""
    if error.filename is None or error.strerror is None:
        return None
    path = str(error.filename)
    path = path if len(path) <= 100 else f"{path[:100]}…"
    return UnnormError(f"'{path}' can't be used: {error.strerror}. Name another path, or fix its permissions.")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory is exhausted: on a CPU, and on Apple GPUs, torch says so in words alone."""
    words = ("DefaultCPUAllocator", "backend out of memory")
    return type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)


def first_few(names: Sequence[str]) -> str:
    """The first three names, with "and more" if there are others."""
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")


def short(error: Exception) -> str:
    """Another package's error message in one line of at most 300 characters; its type if it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
