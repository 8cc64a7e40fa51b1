"""Local files: which files a source stands for, the split of each, and their rows."""

import glob
import json
import logging
import os
import re
import sys
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
from unnorm.paths import named_path

Row = dict[str, object]

STDLIB = "stdlib"
"""Name of the default source, which is no path: the source files of the Python standard library."""

OWN_TEXT = "self"
"""Name of the text that a model writes itself; see `sampling`."""

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
_PACKAGES = {".lz4": "lz4"} | ({} if sys.version_info >= (3, 14) else {".zst": "backports.zstd"})
# Metadata files in a copy of a hub repository or in a data set saved by `datasets`.
_NO_DATA = {"README.md", "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_OTHER_SEPARATORS = ";\t|"
_AT_ONCE = 1000
"""Rows of CSV read at once."""

_HEAD = 100
"""Rows of JSON whose fields every row is given."""


def rows_by_split(source: str, files: list[Path]) -> dict[str, Callable[[], Iterator[Row]]]:
    """For each split found in the file names, a function that starts reading its rows; see `files_by_split`.

    Raises:
        UnnormError: the files are empty, of several formats, or of an unknown one.
    """
    suffix, filled = _format_and_filled(source, files)
    return {split: partial(_rows, suffix, of_split) for split, of_split in files_by_split(source, filled).items()}


def open_rows(source: str, split: str, lines: bool = False) -> Iterator[Row]:
    """Rows of local files with all their fields, for the items of a benchmark.

    Args:
        source: a file, a directory or a glob.
        split: files of other splits are left out, provided that every file name shows a split and one shows this one.
        lines: each nonblank line of a text file is a row, rather than the whole file.

    Raises:
        UnnormError: there is no such source, or it is empty or damaged.
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
        UnnormError: the source is a directory without data files.
    """
    if not source or source in (STDLIB, OWN_TEXT):
        return []
    path = named_path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        known = [p for p in _files_under(path) if _is_known(p.relative_to(path))]
        # Beside data of another format they describe it.
        found = [p for p in known if p.name not in _NO_DATA]
        if all(data_suffix(p) == ".md" for p in found):
            found = [p for p in known if data_suffix(p) == ".md"]
        if not found:
            raise UnnormError(f"The directory '{source}' holds no data files. {_known()}")
        return _each_once(found)
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    return _each_once(Path(match) for match in matches if Path(match).is_file())


def _files_under(directory: Path) -> Iterator[Path]:
    """All files under a directory, following links; each directory is entered only once."""
    entered = set()
    for place, directories, names in os.walk(directory, followlinks=True):
        directories.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))  # noqa: PTH114, PTH118
        real = os.path.realpath(place)
        if real in entered:
            directories.clear()
            continue
        entered.add(real)
        yield from (path for name in names if (path := Path(place) / name).is_file())


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """Sorted paths, each file once: by a path without links where there is one, since names of links show no split."""
    by_links = sorted(paths, key=lambda path: (_links_in(path), path), reverse=True)
    return sorted({path.resolve(): path for path in by_links}.values())


def _links_in(path: Path) -> int:
    return sum(part.is_symlink() for part in (path, *path.parents))


def data_suffix(path: Path) -> str | None:
    """The suffix of a file's format, without that of its compression; None if it is not a data file."""
    suffixes = [s.lower() for s in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    known = suffix in (*FORMATS, TOKEN_FILE) and not (compressed and suffix in _COMPRESS_THEMSELVES)
    return suffix if known else None


def _format_and_filled(source: str, files: list[Path]) -> tuple[str, list[Path]]:
    """The suffix that all files share, and the nonempty files; raises UnnormError if they can't be read."""
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
            f"'{source}' mixes formats ({', '.join(kinds)}). Name files of one format, for instance with a glob."
        )
    return kinds[0]


def _check_decompresses(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS and COMPRESSIONS[suffix] not in fsspec.compression.compr:
        package = _PACKAGES.get(suffix)
        remedy = f"run `pip install {package}`" if package else "this Python was built without it; decompress it"
        raise UnnormError(f"Can't decompress '{path}': {remedy}.")


def files_by_split(source: str, files: list[Path], unnamed: str = "") -> dict[str, list[Path]]:
    """Files by the split in their names, if all of several show one and any is `train`; otherwise all are `train`.

    A split word in only some of the names is ignored, so that `training.md` among other chapters is not all that is
    read. Where that can't happen, `unnamed` is the split of files whose names show none.
    """
    named = _by_name(source, files, unnamed)
    return {"train": files} if len(files) == 1 or "train" not in named or "" in named else named


def _by_name(source: str, files: list[Path], unnamed: str = "") -> dict[str, list[Path]]:
    """Files keyed by split, taken from the last part of each path that names one."""
    named: dict[str, list[Path]] = {}
    root = _root(source)
    for path in files:
        parts = path.relative_to(root).parts
        told = (_split_in(part) for part in reversed(parts))
        named.setdefault(next((s for s in told if s), unnamed), []).append(path)
    return named


def _root(source: str) -> Path:
    """The directory that holds all files of a source; for a glob, the part before its first pattern."""
    path = named_path(source)
    if path.is_dir():
        return path
    fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parent.parts))
    return path.parent if path.is_file() else Path(*fixed)


def _split_in(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in _SPLIT_WORDS.items() if set(known) & set(words)), None)


def check_split(source: str, split: str, splits: Iterable[str]) -> None:
    """Raise UnnormError if `split` is not among `splits`."""
    if split not in splits:
        raise UnnormError(f"'{source}' has no split '{split}' (--split). It has: {', '.join(splits)}.")


def _rows(suffix: str, files: list[Path], lines: bool = False) -> Iterator[Row]:
    """Rows of one file after another; the files need to share the text column only."""
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
    """Whether the first line is a JSON object: a file may also hold one list, or something its name does not show."""
    with _open_text(path, newline="\n") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path) -> Iterator[Row]:
    """Rows that each have all fields of the first rows; `datasets` would refuse rows whose fields differ."""
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
                raise ValueError(f"{path.name}, line {number} is not a JSON object")
            yield row


def _table(suffix: str, path: Path) -> Iterator[Row]:
    # The readers of `datasets` log errors with traceback in addition to raising them.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if suffix == ".parquet" and parquet.read_metadata(path).num_rows == 0:
        return
    name = glob.escape(str(path))  # `datasets` treats every name as a pattern.
    with suppress(StopIteration):  # Raised for a file without rows.
        yield from datasets.load_dataset(FORMATS[suffix], data_files=name, split="train", streaming=True)


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows of strings: guessed types, as in `datasets`, would turn the text "null" into None and "12" into a number."""
    with _open_text(path, newline="") as file, suppress(pd.errors.EmptyDataError):
        for chunk in pd.read_csv(file, dtype=str, na_filter=False, chunksize=_AT_ONCE):
            fields = list(chunk.columns)
            if len(fields) == 1 and any(mark in fields[0] for mark in _OTHER_SEPARATORS):
                raise ValueError(f"the fields of {path.name} are not separated by commas: its header is {fields[0]!r}")
            if not isinstance(chunk.index, pd.RangeIndex):
                raise ValueError(
                    f"{path.name} has rows with more fields than its header: text with commas must be in quotes"
                )
            yield from chunk.to_dict("records")


def readable(source: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """All rows of local files or the hub; any failure becomes an UnnormError that names a remedy."""
    none = True
    try:
        for row in rows():
            none = False
            yield row
    except Exception as error:
        files = find_files(source)
        where = error.filename if isinstance(error, OSError) else None
        if files and where and Path(where).absolute() not in {path.absolute() for path in files}:
            remedy = "Make that place writable, or set another cache directory with HF_HOME."
        elif isinstance(error, PermissionError):
            remedy = "Give yourself permission to read it."
        elif files and _is_of_encoding(error):
            remedy = "It is damaged, not what its name says, or not UTF-8; convert other text with iconv -t UTF-8."
        else:
            local = "It is damaged, or not what its name says; fetch or write it again."
            remedy = local if files else "If the connection broke, try again."
        raise UnnormError(f"Could not read '{source}': {short(error).rstrip('.')}. {remedy}") from error
    if none:
        raise empty(source)


def _is_of_encoding(error: BaseException | None) -> bool:
    """Whether the cause is text that is not UTF-8; `datasets` wraps that error in its own."""
    return error is not None and (isinstance(error, UnicodeDecodeError) or _is_of_encoding(error.__cause__))


def looks_local(source: str) -> bool:
    """Whether a source that matches no file was meant as a file, not as a hub data set."""
    path = Path(source)
    known = data_suffix(path) is not None
    local_only = not source or source.startswith((".", "/", "~")) or source.count("/") > 1
    return known or local_only or any(c in source for c in "*?[")


def _is_known(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return data_suffix(path) is not None and not hidden


def _known() -> str:
    return (
        f"Known: {', '.join([*FORMATS, TOKEN_FILE])}; all but {' and '.join(_COMPRESS_THEMSELVES)} also with "
        f"{', '.join(COMPRESSIONS)}."
    )


def empty(source: str) -> UnnormError:
    """The error for a source without text."""
    return UnnormError(f"'{source}' is empty: there is no text in it. Name other text with --data.")
