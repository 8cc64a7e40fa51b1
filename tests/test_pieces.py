"""Long documents in pieces, and short runs on pieces from all over a source."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.texts import CONTEXT, pack, write
from unnorm.data import pieces as pieces_module
from unnorm.data.pieces import PIECE, pieces, spread


class TestPieces:
    @pytest.mark.parametrize(
        ("text", "least", "longest"),
        [
            ("\u6211\u5011\u8d70\u3002\n\n" * 100, 5, 100),  # Several ends of sentences at hand.
            ("\u3002" * 300 + " word word", 2, 310),  # None until far on.
            ("\u3002\n\n" * 100 + "a b", 2, 150),  # One at hand, a better one far on.
        ],
    )
    def test_they_end_where_a_sentence_does(
        self, text: str, least: int, longest: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pieces_module, "_NEAR", 50)
        cut = [piece for piece, _ in pieces(text, 50)]
        assert "".join(cut) == text
        assert len(cut) >= least and max(map(len, cut)) <= longest

    def test_one_begins_with_the_lines_between(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pieces_module, "_NEAR", 50)
        _, *later = [piece for piece, _ in pieces("\u6a19\u984c\n\n" * 100, 50)]
        assert later and all(piece.startswith("\n") for piece in later)


class TestSpread:
    @settings(max_examples=40, deadline=None)
    @given(texts=st.lists(st.text(), max_size=40), copies=st.integers(1, 3))
    def test_each_text_is_read_once(self, texts: list[str], copies: int) -> None:
        assert sorted(spread(lambda: texts * copies)) == sorted(texts * copies)

    def test_a_long_document_is_read_whole(self) -> None:
        text = "".join(f"word {i} and more\n" for i in range(30_000))
        got = list(spread(lambda: [text]))
        in_order = sorted(got, key=text.index)
        assert "".join(in_order) == text
        assert got != in_order
        assert max(map(len, got)) < 1.1 * PIECE

    def test_a_short_run_sees_many_long_documents(
        self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """Not the first one alone, as where text is read in order."""
        letters = "bcdefghijklmnopq"
        books = ["".join(f"{letter * 3} {i}\n" for i in range(25_000)) for letter in letters]
        blocks = pack(write(tmp_path / "a.jsonl", books), tiny_tokenizer, train_blocks=8000)
        text = tiny_tokenizer.decode(np.concatenate(blocks.train["input_ids"]))
        assert len(blocks.train) == 8000
        assert sum(letter * 3 in text for letter in letters) >= 5

    def test_reading_stops_with_enough(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        read: list[int] = []

        def texts() -> Iterator[str]:
            for i in range(10_000):
                read.append(i)
                yield f"text {i} " * CONTEXT

        pieces_of_text = spread(texts)
        assert [next(pieces_of_text) for _ in range(10)]
        assert len(read) < 1000
