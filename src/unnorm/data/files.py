"""Local files: which ones a source stands for, what split each is of, and the rows in them."""

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TextIO

import datasets
import fsspec  # type: ignore[import-untyped]
import fsspec.compression  # type: ignore[import-untyped]
import pandas as pd  # type: ignore[import-untyped]
from pyarrow import parquet  # type: ignore[import-untyped]

from unnorm.errors import UnnormError, short
from unnorm.runs.directory import named_path

Row = dict[str, object]

STDLIB = "stdlib"
"""Name of the embedded default, which is no file: the Python standard library's own source files."""

OWN_TEXT = "self"
"""Name of what a model writes itself; see `sampling`."""

COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
"""Suffixes of compressed text files, with fsspec's name of each compression."""
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
TOKEN_FILE = ".bin"

_COMPRESS_THEMSELVES = (".parquet", TOKEN_FILE)
_PACKAGES = {".zst": "backports.zstd", ".lz4": "lz4"}
# What lies beside the data in a copy of a hub repository, or in what `datasets` saves.
_NO_DATA = {"README.md", "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_OTHER_SEPARATORS = ";\t|"
_AT_ONCE = 1000
"""Rows of CSV that are read at once."""

_HEAD = 100
"""Rows of JSON that tell which fields there are."""


def rows_by_split(source: str, files: list[Path]) -> dict[str, Callable[[], Iterator[Row]]]:
    """For each split that the files' names tell, a function that begins to read its rows; see `files_by_split`.

    Raises:
        UnnormError: the files are empty, of several formats, or of one that is not known.
    """
    suffix, filled = _format_and_filled(source, files)
    return {split: partial(_rows, suffix, of_split) for split, of_split in files_by_split(source, filled).items()}


def open_rows(source: str, split: str, lines: bool = False) -> Iterator[Row]:
    """Rows of local files as they are, every field of them: the items of a benchmark.

    Args:
        source: a file, a directory or a glob.
        split: files of other splits are left out, where all names tell one and any is of this one.
        lines: of text files every line is a row, not every file; blank ones are passed over.

    Raises:
        UnnormError: nothing is there, it is empty or damaged.
    """
    files = find_files(source)
    if not files:
        raise UnnormError(f"No data at '{source}'. Give a file, a directory or a glob.")
    suffix, filled = _format_and_filled(source, files)
    named = _by_name(source, filled)
    of_split = filled if "" in named else named.get(split, filled)
    return readable(source, lambda: _rows(suffix, of_split, lines))


def find_files(source: str) -> list[Path]:
    """Data files that a path, a directory or a glob stands for, sorted; empty if there are none.

    Raises:
        UnnormError: it is a directory without any.
    """
    if not source or source in (STDLIB, OWN_TEXT):
        return []
    path = named_path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in _files_under(path) if _is_data(p.relative_to(path)))
        if not found:
            raise UnnormError(f"The directory '{source}' holds no data files. {_known()}")
        return found
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    return _each_once(Path(match) for match in matches if Path(match).is_file())


def _files_under(directory: Path) -> Iterator[Path]:
    """Those in linked directories too, each of which is entered once."""
    entered = set()
    for place, directories, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            directories.clear()
            continue
        entered.add(real)
        yield from (path for name in names if (path := Path(place) / name).is_file())


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """Sorted, and of those that links lead to by several ways the first alone."""
    return sorted({path.resolve(): path for path in sorted(paths, reverse=True)}.values())


def data_suffix(path: Path) -> str | None:
    """The suffix that tells a file's format, past a compression's; None if it is not a data file."""
    suffixes = [s.lower() for s in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    known = suffix in (*FORMATS, TOKEN_FILE) and not (compressed and suffix in _COMPRESS_THEMSELVES)
    return suffix if known else None


def _format_and_filled(source: str, files: list[Path]) -> tuple[str, list[Path]]:
    """The suffix that all files share, and those that are not empty; refuses what can't be read."""
    suffix = _common_suffix(source, files)
    for path in files:
        _check_decompresses(path)
    filled = [path for path in files if path.stat().st_size > 0]
    if not filled:
        raise empty(source)
    return suffix, filled


def _common_suffix(source: str, files: list[Path]) -> str:
    suffixes = {path: data_suffix(path) for path in files}
    kinds = sorted({suffix for suffix in suffixes.values() if suffix is not None})
    unknown = next((path for path, suffix in suffixes.items() if suffix is None), None)
    if unknown is not None:
        raise UnnormError(f"Don't know how to read '{unknown}'. {_known()}")
    if len(kinds) > 1 or kinds == [TOKEN_FILE]:
        raise UnnormError(
            f"'{source}' mixes formats ({', '.join(kinds)}). Name files of one format, for instance by a glob."
        )
    return kinds[0]


def _check_decompresses(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS and COMPRESSIONS[suffix] not in fsspec.compression.compr:
        package = _PACKAGES.get(suffix)
        remedy = f"run `pip install {package}`" if package else "this Python was built without it; decompress it"
        raise UnnormError(f"Nothing here decompresses '{path}': {remedy}.")


def files_by_split(source: str, files: list[Path], unnamed: str = "") -> dict[str, list[Path]]:
    """Files by the split that their names tell, if each of several tells one and any is `train`; else all are `train`.

    A word in a few names is no split: `training.md` among other chapters must not be all that is read. Where that
    can't be, a name that tells none may stand for the split `unnamed`.
    """
    named = _by_name(source, files, unnamed)
    return {"train": files} if len(files) == 1 or "train" not in named or "" in named else named


def _by_name(source: str, files: list[Path], unnamed: str = "") -> dict[str, list[Path]]:
    """Files by the split that the last part of their paths tells that tells one."""
    named: dict[str, list[Path]] = {}
    root = _root(source)
    for path in files:
        parts = path.relative_to(root).parts
        told = (_split_in(part) for part in reversed(parts))
        named.setdefault(next((s for s in told if s), unnamed), []).append(path)
    return named


def _root(source: str) -> Path:
    """The directory that all files of a source are in: what a glob has before its first pattern."""
    path = named_path(source)
    if path.is_dir():
        return path
    fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parent.parts))
    return path.parent if path.is_file() else Path(*fixed)


def _split_in(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in _SPLIT_WORDS.items() if set(known) & set(words)), None)


def check_split(source: str, split: str, splits: Iterable[str]) -> None:
    """Refuse a split that is not among those that are there."""
    if split not in splits:
        raise UnnormError(f"'{source}' has no split '{split}' (--split). It has: {', '.join(splits)}.")


def _rows(suffix: str, files: list[Path], lines: bool = False) -> Iterator[Row]:
    """Rows of one file after the other; no two have to have the same columns but for the text."""
    for path in files:
        if FORMATS[suffix] == "text":
            yield from _text_rows(path, lines)
        elif FORMATS[suffix] == "json" and _is_json_lines(path):
            yield from _json_lines(path)
        elif FORMATS[suffix] == "csv":
            yield from _csv_rows(path)
        else:
            yield from _table(suffix, path)


def _text_rows(path: Path, lines: bool) -> Iterator[Row]:
    with _open_text(path, newline=None) as file:
        if lines:
            for line in filter(str.strip, file):
                yield {"text": line.rstrip("\n")}
        else:
            yield {"text": file.read()}


def _open_text(path: Path, newline: str | None) -> TextIO:
    options = {"mode": "rt", "compression": "infer", "encoding": "utf-8-sig", "newline": newline}
    return fsspec.filesystem("file").open(str(path), **options)


def _is_json_lines(path: Path) -> bool:
    """Whether the first line is an object: the file may also be one list, or anything that its name does not say."""
    with _open_text(path, newline="\n") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path) -> Iterator[Row]:
    """Rows with every field of the first ones; `datasets` refuses rows of other fields than those before them."""
    rows = _objects(path)
    head = list(islice(rows, _HEAD))
    fields = dict.fromkeys(key for row in head for key in row)
    for row in chain(head, rows):
        yield {**fields, **row}


def _objects(path: Path) -> Iterator[Row]:
    with _open_text(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}, line {number} is no JSON object")
            yield row


def _table(suffix: str, path: Path) -> Iterator[Row]:
    # Its readers log an error, traceback and all, besides raising it.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if suffix == ".parquet" and parquet.read_metadata(path).num_rows == 0:
        return
    name = glob.escape(str(path))  # `datasets` takes every name for a pattern.
    with suppress(StopIteration):  # How it meets a file without a row.
        yield from datasets.load_dataset(FORMATS[suffix], data_files=name, split="train", streaming=True)


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows of strings: guessing types, as `datasets` does, makes nothing of the text "null", and numbers of "12"."""
    with _open_text(path, newline="") as file, suppress(pd.errors.EmptyDataError):
        for chunk in pd.read_csv(file, dtype=str, na_filter=False, chunksize=_AT_ONCE):
            fields = list(chunk.columns)
            if len(fields) == 1 and any(mark in fields[0] for mark in _OTHER_SEPARATORS):
                raise ValueError(f"the fields of {path.name} are not parted by commas: its header is {fields[0]!r}")
            if not isinstance(chunk.index, pd.RangeIndex):
                raise ValueError(
                    f"{path.name} has rows of more fields than its header: text with commas must be in quotes"
                )
            yield from chunk.to_dict("records")


def readable(source: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """All rows, of local files or of the hub; what goes wrong on the way is an UnnormError with the remedy."""
    none = True
    try:
        for row in rows():
            none = False
            yield row
    except Exception as error:
        files = find_files(source)
        where = error.filename if isinstance(error, OSError) else None
        if files and where and Path(where).absolute() not in {path.absolute() for path in files}:
            remedy = "Make that place writable, or name another one for the cache by HF_HOME."
        elif isinstance(error, PermissionError):
            remedy = "Give yourself the right to read it."
        elif files and _is_of_encoding(error):
            remedy = "It is damaged, not what its name says, or not UTF-8; other text is converted by iconv -t UTF-8."
        else:
            local = "It is damaged, or not what its name says; fetch or write it again."
            remedy = local if files else "If the connection broke, do it again."
        raise UnnormError(f"Could not read '{source}': {short(error).rstrip('.')}. {remedy}") from error
    if none:
        raise empty(source)


def _is_of_encoding(error: BaseException | None) -> bool:
    """Whether text is not UTF-8; `datasets` raises its own error from that."""
    return error is not None and (isinstance(error, UnicodeDecodeError) or _is_of_encoding(error.__cause__))


def looks_local(source: str) -> bool:
    """Whether a source that stands for no file was meant to be one, and not the name of a hub data set."""
    path = Path(source)
    known = data_suffix(path) is not None
    local_only = not source or source.startswith((".", "/", "~")) or source.count("/") > 1
    return known or local_only or any(c in source for c in "*?[")


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return data_suffix(path) is not None and not hidden and path.name not in _NO_DATA


def _known() -> str:
    return (
        f"Known: {', '.join([*FORMATS, TOKEN_FILE])}; all but {' and '.join(_COMPRESS_THEMSELVES)} also with "
        f"{', '.join(COMPRESSIONS)}."
    )


def empty(source: str) -> UnnormError:
    """The error for a source without text."""
    return UnnormError(f"'{source}' is empty: there is no text in it. Name other text with --data.")
