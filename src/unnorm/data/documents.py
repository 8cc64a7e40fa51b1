"""Documents (plain strings) from the standard library, local files or a hub data set."""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from unnorm.data.files import (
    OWN_TEXT,
    STDLIB,
    Row,
    check_split,
    empty,
    find_files,
    looks_local,
    readable,
    rows_by_split,
)
from unnorm.data.hub import hub_rows_by_split
from unnorm.data.pieces import hash_of
from unnorm.errors import UnnormError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HEAD = 100
"""Rows searched for the column that holds the text."""
_HELD_OUT_ONE_IN = 10
"""If a source has no validation split, one document in ten, chosen by hash, is held out."""
_LOOKED_AT, _LEAST_HELD_OUT = 100, 3
"""If fewer than 3 of a source's first 100 documents would be held out, the last tenth of each document is instead."""
_STDLIB_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Documents:
    """Training and validation text, each a function that starts a fresh iterator.

    What is held out depends on the source alone, not on how much of it is asked for, so that no command evaluates on
    text that another one trained on. `held_out` says in words how the two were kept apart; it is printed in the report.
    `local` text comes from files on this machine, which can be read several times at little cost.
    """

    train: Callable[[], Iterator[str]]
    validation: Callable[[], Iterator[str]]
    held_out: str
    local: bool = False


def open_documents(source: str, text_field: str | None = None, split: str = "train") -> Documents:
    """Open the documents of a source of any kind.

    Args:
        source: `stdlib`; a file, directory or glob of `.txt`, `.jsonl` or `.csv` (each also compressed) or
            `.parquet`; or a hub data set, `owner/name` or `owner/name:subset`, which is streamed.
        text_field: the column that holds the text; by default `text`, otherwise the only string column, provided that
            no other column is a list of strings or objects.
        split: the split that training text comes from. Local files show theirs in their names, as in
            `train-00000-of-00004.parquet`; if no name does, all of them are `train`.

    Raises:
        UnnormError: there is no such source, it is empty, or it has no such column or split.
    """
    if source == STDLIB:
        check_split(source, split, ["train"])
        return _stdlib()
    if source == OWN_TEXT:
        raise UnnormError(
            f"'{source}' is text that the model writes during `unnorm remove`, and it is not kept. Name text with "
            "--data."
        )
    files = find_files(source)
    if files:
        return replace(_of_splits(source, rows_by_split(source, files), text_field, split, "files"), local=True)
    if looks_local(source):
        raise UnnormError(f"No data at '{source}'. Give a file, a directory, a glob or a hub data set.")
    return _of_splits(source, hub_rows_by_split(source), text_field, split, "split")


def _stdlib() -> Documents:
    root = Path(sysconfig.get_path("stdlib"))
    # Ordered by hash, so that the first blocks of either part are a random sample of all of it.
    paths = sorted(
        (p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts)),
        key=lambda p: hash_of(p.relative_to(root).as_posix()),
    )
    if not paths:
        raise UnnormError(
            f"The Python standard library in '{root}' has no source files. Name your own text with --data."
        )

    def read(validation: bool) -> Iterator[str]:
        for path in paths:
            name = path.relative_to(root).as_posix()
            if _is_held_out(name, _STDLIB_HELD_OUT_ONE_IN) is validation:
                yield path.read_text(encoding="utf-8", errors="replace")

    held_out = f"one file in {_STDLIB_HELD_OUT_ONE_IN}, by a hash of its name"
    return Documents(lambda: read(False), lambda: read(True), held_out)


def _of_splits(
    source: str, splits: Mapping[str, Callable[[], Iterable[Row]]], text_field: str | None, split: str, parts: str
) -> Documents:
    check_split(source, split, splits)

    def texts(of: str) -> Iterator[str]:
        return _texts(source, splits[of], text_field)

    if "validation" in splits and split != "validation":
        return Documents(lambda: texts(split), lambda: texts("validation"), f"the validation {parts}")
    return _held_out_of(lambda: texts(split))


def _held_out_of(texts: Callable[[], Iterator[str]]) -> Documents:
    """Hold out whole documents if there are many, otherwise the end of each."""
    first = islice(texts(), _LOOKED_AT)
    enough = islice((text for text in first if _is_held_out(text, _HELD_OUT_ONE_IN)), _LEAST_HELD_OUT)
    if len(list(enough)) == _LEAST_HELD_OUT:

        def side(validation: bool) -> Iterator[str]:
            return (text for text in texts() if _is_held_out(text, _HELD_OUT_ONE_IN) is validation)

        held_out = f"one document in {_HELD_OUT_ONE_IN}, by a hash of its text"
        return Documents(lambda: side(False), lambda: side(True), held_out)
    return Documents(
        lambda: (text[: _last_tenth(text)] for text in texts()),
        lambda: (text[_last_tenth(text) :] for text in texts()),
        "the last tenth of each document",
    )


def _last_tenth(text: str) -> int:
    """Where the last tenth of a document begins, moved to the next line start if one is near."""
    at = len(text) * 9 // 10
    return max(at, text.find("\n", at, (at + len(text)) // 2) + 1)


def _texts(source: str, rows: Callable[[], Iterable[Row]], field: str | None) -> Iterator[str]:
    column: str | None = None
    found = False
    given = readable(source, rows)
    head = _head(given, field or "text")
    for row in chain(head, given):
        column = column or _text_column(source, head, field)
        if column not in row:
            raise UnnormError(
                f"Some rows of '{source}' have no field '{column}', unlike those before them: they have "
                f"{', '.join(row)}. Name files of one kind, for instance with a glob."
            )
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UnnormError(
                f"The field '{column}' of '{source}' holds {type(text).__name__}, not text. Name a field of text with "
                f"--text-field, or add one to the file. It has: {', '.join(row)}."
            )
        if text and text.strip():
            found = True
            # JSON cut off mid-character may hold a lone surrogate, which tokenizers refuse.
            yield text.encode("utf-8", "replace").decode()
    if not found:
        raise empty(source)


def _head(rows: Iterator[Row], column: str) -> list[Row]:
    """The first rows, up to the first one that has the expected text column."""
    head = []
    for row in islice(rows, _HEAD):
        head.append(row)
        if column in row:
            break
    return head


def _text_column(source: str, head: list[Row], field: str | None) -> str:
    """The column to read, chosen from several rows because a single one may lack its text."""
    known = list(dict.fromkeys(key for row in head for key in row))
    if field is not None:
        if field not in known:
            raise UnnormError(f"'{source}' has no field '{field}' (--text-field). It has: {', '.join(known)}.")
        return field
    if "text" in known:
        return "text"
    strings = [key for key in known if any(_may_be_text(row.get(key)) for row in head)]
    # E.g. chat turns or paragraphs: a lone string column beside them is a name or an id.
    lists = [key for key in known if any(_holds_text(row.get(key)) for row in head)]
    if len(strings) != 1 or lists:
        raise UnnormError(
            f"It is unclear which field of '{source}' is the text. Name it with --text-field: {', '.join(known)}."
        )
    return strings[0]


def _may_be_text(value: object) -> bool:
    """Whether a value is a string other than a number or a boolean, which CSV also gives as strings."""
    if not isinstance(value, str) or not value.strip() or value.strip().lower() in ("true", "false"):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _holds_text(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(part, str | dict) or _holds_text(part) for part in value)


def _is_held_out(key: str, one_in: int) -> bool:
    return hash_of(key) % one_in == 0
