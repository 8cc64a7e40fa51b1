"""Paths and names that users give, and files that are whole or not there."""

import os
from contextlib import suppress
from pathlib import Path
from shlex import quote
from subprocess import list2cmdline

from unnorm.errors import UnnormError, first_few


def short_name(source: str) -> str:
    """Display name of a model or of data: the last part of an absolute path, which resumed runs use for local ones."""
    return Path(source).name if Path(source).is_absolute() else source


def named_path(source: str | Path) -> Path:
    """A name as a path, whether or not it exists; `~` is expanded unless its user is unknown.

    Raises:
        UnnormError: it is neither a name nor a path.
    """
    if not isinstance(source, str | os.PathLike):
        raise UnnormError(f"Give a name or a path, not a {type(source).__name__}.")
    return Path(os.path.expanduser(source))  # noqa: PTH111 (pathlib's raises where there is no such user)


def refuse_links(directory: Path) -> None:
    """Raise an UnnormError if there are links in a directory to be published: they may lead anywhere."""
    links = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_symlink())
    if links:
        raise UnnormError(f"'{directory}' has links in it ({first_few(links)}). Replace them by files, or delete them.")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, since its existence is the sign that what it describes is complete.

    Raises:
        UnnormError: the disk is full or can't be written to.
    """
    unfinished = path.with_name(f".{path.name}")
    end = "\n" if text and not text.endswith("\n") else ""
    try:
        # File names that are not UTF-8 are escaped.
        unfinished.write_text(text + end, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise UnnormError(f"Could not write '{path}': {error}. Free some space, or make it writable.") from error


def quoted(path: Path | str) -> str:
    """A path as an argument of the machine's shell."""
    return list2cmdline([str(path)]) if os.name == "nt" else quote(str(path))


def nearest_existing(directory: Path) -> Path:
    """The directory itself if it exists, otherwise its nearest parent that does."""
    return next(path for path in (directory, *directory.absolute().parents) if path.exists())


def check_can_be_made(directory: Path) -> None:
    """Raise an UnnormError if a directory can't be created or, where it exists, written to."""
    try:
        str(directory).encode()
    except UnicodeEncodeError as error:
        raise UnnormError(f"{str(directory)!r} is not UTF-8. Choose another --out.") from error
    place = nearest_existing(directory)
    if not place.is_dir():
        raise UnnormError(f"'{directory}' can't be created: '{place}' is a file. Choose another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UnnormError(f"Nothing can be written to '{place}'. Choose another --out.")
