"""Files of token ids as nanoGPT writes them: little-endian uint16, one document after another, without a header."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unnorm.data.files import TOKEN_FILE, check_split, data_suffix, files_by_split, find_files
from unnorm.errors import UnnormError, first_few

Tokens = NDArray[np.int32]

VOCABULARY = 2**16
"""Largest vocabulary that fits in 16 bits."""
_IDS_AT_ONCE = 1_000_000
_LOOKED_AT, _LEAST_LOOKED_AT = 10_000, 64


def token_paths(source: str) -> list[Path]:
    """The source's files if they are token files, otherwise none."""
    paths = find_files(source)
    return paths if all(data_suffix(path) == TOKEN_FILE for path in paths) else []


def open_token_files(
    source: str, files: list[Path], split: str = "train"
) -> tuple[Callable[[], Iterator[Tokens]], Callable[[], Iterator[Tokens]], str]:
    """Training and held-out token ids, and in words how they are kept apart.

    Files named for validation are held out, as is `val.bin` beside a `train.bin` that is the whole source. Without any,
    the last tenth of each file is held out.

    Raises:
        UnnormError: a file is empty or not a token file, or no file is of that split.
    """
    if len(files) == 1 and files[0].name == "train.bin" and (files[0].parent / "val.bin").is_file():
        files = [*files, files[0].parent / "val.bin"]
    of_split = files_by_split(source, files, unnamed="train")
    check_split(source, split, of_split)
    train = [_open(path) for path in of_split[split]]
    if "validation" in of_split and split != "validation":
        held = [_open(path) for path in of_split["validation"]]
        names = first_few([path.name for path in of_split["validation"]])
        return (lambda: _slices(train)), (lambda: _slices(held)), names
    return (
        lambda: _slices([ids[: len(ids) * 9 // 10] for ids in train]),
        lambda: _slices([ids[len(ids) * 9 // 10 :] for ids in train]),
        "the last tenth of each file",
    )


def _open(path: Path) -> NDArray[np.uint16]:
    size = path.stat().st_size
    if size == 0:
        raise UnnormError(f"'{path}' is empty: there are no token ids in it. Name other data with --data.")
    if size % 2:
        raise UnnormError(
            f"'{path}' is not in nanoGPT's format: an odd number of bytes ({size}) can't be 16-bit token ids. Write it "
            "again, as little-endian uint16."
        )
    ids = np.memmap(path, dtype="<u2", mode="r")
    first = ids[:_LOOKED_AT]
    if len(first) >= _LEAST_LOOKED_AT and first[::2].any() and not first[1::2].any():
        raise UnnormError(
            f"'{path}' looks like 32-bit token ids: every other one of its first {len(first):,} 16-bit numbers is 0. "
            "Write it again, as little-endian uint16."
        )
    return ids


def _slices(files: Iterable[NDArray[np.uint16]]) -> Iterator[Tokens]:
    for ids in files:
        for start in range(0, len(ids), _IDS_AT_ONCE):
            yield np.asarray(ids[start : start + _IDS_AT_ONCE], dtype=np.int32)
