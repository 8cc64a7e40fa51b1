"""The one exception that users see, and what it quotes of others."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UnnormError(Exception):
    """Something the user can put right: the message says what was wrong, where, and what to do.

    The CLI prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 2
    told_elsewhere = False
    """Whether another process of the run raises it too, and tells it."""


class RunInterruptedError(UnnormError):
    """A run or an evaluation was stopped and can be resumed; the message says how."""

    exit_code = 130


@contextmanager
def explained(applies: bool, before: str, after: str) -> Iterator[None]:
    """Where it `applies`, an UnnormError's message is put between these sentences: whose fault it is, and a remedy."""
    try:
        yield
    except UnnormError as error:
        if not applies:
            raise
        raise UnnormError(f"{before} {error} {after}".strip()) from error


def first_few(names: Sequence[str]) -> str:
    """The first three of them, and whether there are more."""
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")


def short(error: Exception) -> str:
    """What another package's error says, in one line of at most 300 characters; its kind, if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
