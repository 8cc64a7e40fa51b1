"""Cut long documents into pieces, where tokenizers cut too, and read pieces from all over a source."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

PIECE = 16_000
"""Characters of a piece that is read on its own: about sixteen blocks of 256 tokens."""

_PARTS = 16
_TURNS = (0, 1, 4, _PARTS)
"""Sixteenths of the pieces that have been read before and after each of three turns."""

_NEAR = 2_000_000
# Tokenizers always split between words and between lines, so a long document can be tokenized in pieces cut there.
_SEAM = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=[^\W\d_])(?=\n)|(?<=\S\n)(?=\S)")
# A cut after blank lines may change a token or two: only for text without another seam within `_NEAR` characters.
_ROUGH_SEAM = re.compile(r"(?<=\n)(?=\S)")


def spread(texts: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Pieces of all documents, in three turns: a sixteenth of the pieces, three sixteenths more, and the rest.

    A hash of each piece says which turn it has. In order, the first million tokens of a library are those of a few
    books, and the first of a sorted corpus are of one kind.

    Args:
        texts: starts reading the documents anew.
    """
    for before, after in pairwise(_TURNS):
        for text in texts():
            yield from (piece for piece, _ in pieces(text, PIECE) if before <= hash_of(piece) % _PARTS < after)


def pieces(text: str, size: int) -> Iterator[tuple[str, bool]]:
    """Pieces of at least `size` characters that can be tokenized separately, each with whether it is the last."""
    start = 0
    while seam := _seam(text, start + size):
        yield text[start : seam.start()], False
        start = seam.start()
    yield text[start:], True


def hash_of(text: str) -> int:
    """The first 64 bits of its SHA-256: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:8], "big")


def _seam(text: str, at: int) -> re.Match[str] | None:
    near = at + _NEAR
    return _SEAM.search(text, at, near) or _ROUGH_SEAM.search(text, at, near) or _SEAM.search(text, near)
