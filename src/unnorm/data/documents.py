"""Documents (plain strings) from the standard library, local files or a hub data set."""

import glob
import hashlib
import json
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

import fsspec  # type: ignore[import-untyped]
import fsspec.compression  # type: ignore[import-untyped]

from unnorm.errors import UnnormError, short

STDLIB = "stdlib"
"""Name of the embedded default: the Python standard library's own source files."""

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
_PACKAGES = {".zst": "zstandard", ".lz4": "lz4"}
# What lies beside the data in a copy of a hub repository, or in what `datasets` saves.
_NO_DATA = {"README.md", "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_SUBSETS = re.compile(r"available configs: \[(.+?)\]", re.DOTALL)
"""What `datasets` says where a hub data set has several subsets and none was named."""

_SCRIPT = "scripts are no longer supported"
"""What `datasets` 4 and later say of a hub data set that comes as a script, as OpenWebText does."""
_CONVERTED = "refs/convert/parquet"
"""Branch on which the hub keeps those data sets as Parquet files, in one folder for each subset."""

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HEAD = 100
"""Rows among which the column that holds the text is looked for."""
_HELD_OUT_ONE_IN = 10
"""Where a source names no validation split, one document in ten, chosen by hash, is kept from training."""
_LOOKED_AT, _LEAST_HELD_OUT = 100, 3
"""Unless so few of a source's first documents would be held out: then it is the last tenth of each document."""
_STDLIB_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Documents:
    """Training and validation text, each an iterable that starts afresh every time.

    What is held out depends on the source alone, not on how much of it is asked for, so that what one command
    trained on is never what another one calls held out. `held_out` says in words how the two were kept apart;
    it is printed in the report.
    """

    name: str
    train: Callable[[], Iterator[str]]
    validation: Callable[[], Iterator[str]]
    held_out: str


def open_documents(source: str, text_field: str | None = None, split: str = "train") -> Documents:
    """Find documents by what `source` is.

    Args:
        source: `stdlib`; a file, directory or glob of `.txt`, `.jsonl` or `.csv` (each also compressed) or
            `.parquet`; or a hub data set, `owner/name` or `owner/name:subset`, which is streamed.
        text_field: the column that holds the text; by default `text`, else the only string column.
        split: the split that training text comes from. Of local files it is told by their names, as in
            `train-00000-of-00004.parquet`; where no name tells it, all of them are `train`.

    Raises:
        UnnormError: nothing is there, it is empty, or it has no such column or split.
    """
    if source == STDLIB:
        _check_split(source, split, ["train"])
        return _stdlib()
    if source == OWN_TEXT:
        raise UnnormError(
            f"'{source}' is text that a model writes for `unnorm remove`, and it is not kept. Name text with --data."
        )
    files = find_files(source)
    if files:
        return _local(source, files, text_field, split)
    if _looks_local(source):
        raise UnnormError(f"No data at '{source}'. Give a file, a directory, a glob or a hub data set.")
    return _hub(source, text_field, split)


def open_rows(source: str) -> Iterator[dict[str, object]]:
    """Rows of local files as they are, every field of them: the items of a benchmark.

    Raises:
        UnnormError: nothing is there, it is empty or damaged.
    """
    files = find_files(source)
    if not files:
        raise UnnormError(f"No data at '{source}'. Give a file, a directory or a glob.")
    suffix, filled = _format_and_filled(source, files)
    return _readable(source, lambda: _rows(suffix, filled))


def find_files(source: str) -> list[Path]:
    """Data files that a path, a directory or a glob stands for, sorted; empty if there are none."""
    if not source or source in (STDLIB, OWN_TEXT):
        return []
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (pathlib's raises where there is no such user)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p.relative_to(path)))
        if not found:
            raise UnnormError(f"The directory '{source}' holds no data files. {_known()}")
        return found
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    return sorted(Path(match) for match in matches if Path(match).is_file())


def data_suffix(path: Path) -> str | None:
    """The suffix that tells a file's format, past a compression's; None if it is not a data file."""
    suffixes = [s.lower() for s in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    known = suffix in (*FORMATS, TOKEN_FILE) and not (compressed and suffix in _COMPRESS_THEMSELVES)
    return suffix if known else None


def _stdlib() -> Documents:
    root = Path(sysconfig.get_path("stdlib"))
    # In the order of a hash, so that the first blocks of either side are a fair sample of all of it.
    paths = sorted(
        (p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts)),
        key=lambda p: _hash(p.relative_to(root).as_posix()),
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
    return Documents(STDLIB, lambda: read(False), lambda: read(True), held_out)


def _local(source: str, files: list[Path], text_field: str | None, split: str) -> Documents:
    suffix, filled = _format_and_filled(source, files)
    of_split = _by_split(source, filled)
    _check_split(source, split, list(of_split))

    def texts(of: str) -> Iterator[str]:
        return _texts(source, lambda: _rows(suffix, of_split[of]), text_field)

    if "validation" in of_split and split != "validation":
        return Documents(source, lambda: texts(split), lambda: texts("validation"), "the validation files")
    return _held_out_of(source, lambda: texts(split))


def _format_and_filled(source: str, files: list[Path]) -> tuple[str, list[Path]]:
    """The suffix that all files share, and those that are not empty; refuses what can't be read."""
    suffix = _common_suffix(source, files)
    for path in files:
        _check_decompresses(path)
    filled = [path for path in files if path.stat().st_size > 0]
    if not filled:
        raise _empty(source)
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


def _by_split(source: str, files: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names tell, if each of several tells one and any is `train`; else all are `train`.

    A word in a few names is no split: `training.md` among other chapters must not be all that is read.
    """
    named: dict[str, list[Path]] = {}
    root = Path(os.path.expanduser(source))  # noqa: PTH111
    for path in files:
        parts = path.relative_to(root).parts if root.is_dir() else (path.name,)
        told = (_split_in(part) for part in reversed(parts))
        named.setdefault(next((s for s in told if s), ""), []).append(path)
    if len(files) == 1 or "train" not in named or "" in named:
        return {"train": files}
    return named


def _split_in(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in _SPLIT_WORDS.items() if set(known) & set(words)), None)


def _rows(suffix: str, files: list[Path]) -> Iterator[dict[str, object]]:
    """Rows of one file after the other; no two have to have the same columns but for the text."""
    if FORMATS[suffix] == "text":  # These all have one and the same, and may be very many.
        yield from _table(suffix, files)
        return
    for path in files:
        yield from _json_lines(path) if FORMATS[suffix] == "json" and _is_json_lines(path) else _table(suffix, [path])


def _open_text(path: Path) -> TextIO:
    options = {"mode": "rt", "compression": "infer", "encoding": "utf-8-sig", "newline": "\n"}
    return fsspec.filesystem("file").open(str(path), **options)


def _is_json_lines(path: Path) -> bool:
    """Whether the first line is an object: the file may also be one list, or anything that its name does not say."""
    with _open_text(path) as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path) -> Iterator[dict[str, object]]:
    """Rows with every field of the first ones; `datasets` refuses rows of other fields than those before them."""
    rows = _objects(path)
    head = list(islice(rows, _HEAD))
    fields = dict.fromkeys(key for row in head for key in row)
    for row in chain(head, rows):
        yield {**fields, **row}


def _objects(path: Path) -> Iterator[dict[str, object]]:
    with _open_text(path) as lines:
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


def _table(suffix: str, files: list[Path]) -> Iterator[dict[str, object]]:
    import datasets

    # Its readers log an error, traceback and all, besides raising it.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    options = {"sample_by": "document"} if FORMATS[suffix] == "text" else {}
    names = [glob.escape(str(path)) for path in files]  # `datasets` takes every name for a pattern.
    try:
        rows = datasets.load_dataset(FORMATS[suffix], data_files=names, split="train", streaming=True, **options)
    except StopIteration:  # How it meets a file without a row.
        return
    yield from rows


def _hub(source: str, text_field: str | None, split: str) -> Documents:
    import datasets

    name, _, subset = source.partition(":")
    try:
        splits, options = _splits_and_options(name, subset or None)
    except Exception as error:
        if subsets := _SUBSETS.search(str(error)):
            names = subsets[1].replace("'", "")
            first = names.partition(",")[0]
            raise UnnormError(
                f"'{source}' has several subsets: {names}. Name one of them, as in '{name}:{first}'."
            ) from error
        raise UnnormError(
            f"No data at '{source}': neither a local file, directory or glob nor a hub data set "
            f"that can be reached ({short(error)})."
        ) from error
    _check_split(source, split, splits)

    def texts(of: str) -> Iterator[str]:
        return _texts(source, lambda: datasets.load_dataset(name, split=of, streaming=True, **options), text_field)

    if "validation" in splits and split != "validation":
        return Documents(source, lambda: texts(split), lambda: texts("validation"), "the validation split")
    return _held_out_of(source, lambda: texts(split))


def _splits_and_options(name: str, subset: str | None) -> tuple[list[str], dict[str, str | None]]:
    """A hub data set's splits, and what `load_dataset` is to be told besides its name."""
    import datasets

    try:
        return datasets.get_dataset_split_names(name, subset), {"name": subset}
    except RuntimeError as error:
        if _SCRIPT not in str(error):
            raise
    options = {"revision": _CONVERTED, "data_dir": subset}
    files = datasets.load_dataset_builder(name, **options).config.data_files
    subsets = sorted({path.split("/")[-3] for paths in files.values() for path in paths})
    if len(subsets) > 1:
        raise ValueError(f"Several available configs: {subsets}")
    return [str(split) for split in files], options


def _held_out_of(name: str, texts: Callable[[], Iterator[str]]) -> Documents:
    """Hold out whole documents where there are many, else the end of each."""
    first = islice(texts(), _LOOKED_AT)
    enough = islice((text for text in first if _is_held_out(text, _HELD_OUT_ONE_IN)), _LEAST_HELD_OUT)
    if len(list(enough)) == _LEAST_HELD_OUT:

        def side(validation: bool) -> Iterator[str]:
            return (text for text in texts() if _is_held_out(text, _HELD_OUT_ONE_IN) is validation)

        held_out = f"one document in {_HELD_OUT_ONE_IN}, by a hash of its text"
        return Documents(name, lambda: side(False), lambda: side(True), held_out)
    return Documents(
        name,
        lambda: (text[: _last_tenth(text)] for text in texts()),
        lambda: (text[_last_tenth(text) :] for text in texts()),
        "the last tenth of each document",
    )


def _last_tenth(text: str) -> int:
    """Where the last tenth of a document begins: after a line, if one ends nearby."""
    at = len(text) * 9 // 10
    return max(at, text.find("\n", at, (at + len(text)) // 2) + 1)


def _texts(source: str, rows: Callable[[], Iterable[dict[str, object]]], field: str | None) -> Iterator[str]:
    column: str | None = None
    found = False
    readable = _readable(source, rows)
    head = list(islice(readable, _HEAD))
    for row in chain(head, readable):
        column = column or _text_column(source, head, field)
        if column not in row:
            raise UnnormError(
                f"Rows of '{source}' have no field '{column}', as those before them had: they have {', '.join(row)}. "
                "Name files of one kind, for instance by a glob."
            )
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UnnormError(
                f"The field '{column}' of '{source}' holds {type(text).__name__}, not text. "
                f"Name another with --text-field: {', '.join(row)}."
            )
        if text and text.strip():
            found = True
            # Half a surrogate pair, which JSON may hold where text was cut off, is nothing that tokenizers take.
            yield text.encode("utf-8", "replace").decode()
    if not found:
        raise _empty(source)


def _readable(source: str, rows: Callable[[], Iterable[dict[str, object]]]) -> Iterator[dict[str, object]]:
    empty = True
    try:
        for row in rows():
            empty = False
            yield row
    except Exception as error:
        files = find_files(source)
        where = error.filename if isinstance(error, OSError) else None
        if files and where and Path(where).absolute() not in {path.absolute() for path in files}:
            remedy = "Make that place writable, or name another one for the cache by HF_HOME."
        else:
            local = "It is damaged, or not what its name says; fetch or write it again."
            remedy = local if files else "If the connection broke, do it again."
        raise UnnormError(f"Could not read '{source}': {short(error).rstrip('.')}. {remedy}") from error
    if empty:
        raise _empty(source)


def _text_column(source: str, head: list[dict[str, object]], field: str | None) -> str:
    """The one to read, from the first rows: in a single one the text may be missing."""
    known = list(dict.fromkeys(key for row in head for key in row))
    if field is not None:
        if field not in known:
            raise UnnormError(f"'{source}' has no field '{field}' (--text-field). It has: {', '.join(known)}.")
        return field
    if "text" in known:
        return "text"
    strings = [key for key in known if any(isinstance(row.get(key), str) for row in head)]
    if len(strings) != 1:
        raise UnnormError(f"Which field of '{source}' is the text? Name it with --text-field: {', '.join(known)}.")
    return strings[0]


def _check_split(source: str, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise UnnormError(f"'{source}' has no split '{split}' (--split). It has: {', '.join(splits)}.")


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return data_suffix(path) is not None and not hidden and path.name not in _NO_DATA


def _is_held_out(key: str, one_in: int) -> bool:
    return _hash(key) % one_in == 0


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", errors="replace")).digest()[:8], "big")


def _looks_local(source: str) -> bool:
    path = Path(source)
    known = data_suffix(path) is not None
    local_only = not source or source.startswith((".", "/", "~")) or source.count("/") > 1
    return known or local_only or any(c in source for c in "*?[")


def _known() -> str:
    return (
        f"Known: {', '.join([*FORMATS, TOKEN_FILE])}; all but {' and '.join(_COMPRESS_THEMSELVES)} also with "
        f"{', '.join(COMPRESSIONS)}."
    )


def _empty(source: str) -> UnnormError:
    return UnnormError(f"'{source}' is empty: there is no text in it. Name other text with --data.")
