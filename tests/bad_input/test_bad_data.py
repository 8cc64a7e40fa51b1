"""Text that is not there, empty, damaged or too little."""

import lzma
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import VOCAB
from tests.texts import COMPRESS


class TestData:
    @pytest.fixture
    def on(self, tiny_model_dir: Path, refused: Callable[..., str]) -> Callable[..., str]:
        """The message of each command that reads text, which must be the same for all."""

        def run(data: object, *more: object) -> str:
            texts = {
                refused("remove", tiny_model_dir, "--tokens", 0, "--out", "run", "--data", data, *more),
                refused("stats", tiny_model_dir, "--data", data, *more),
                refused("evaluate", tiny_model_dir, "--data", data, *more),
            }
            assert len(texts) == 1
            return texts.pop()

        return run

    @pytest.mark.parametrize("name", ["nothing.txt", "./nothing", "nothing/*.jsonl", "a/b/c", ""])
    def test_missing_file(self, name: str, on: Callable[..., str]) -> None:
        text = on(name)
        assert f"No data at '{name}'" in text
        assert "Give a file" in text

    @pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv", "empty.parquet", "empty.bin"])
    def test_empty_file(self, name: str, work: Path, on: Callable[..., str]) -> None:
        (work / name).touch()
        assert "is empty" in on(name)

    @pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl", "blank.jsonl.xz", "blank.csv"])
    def test_no_text_in_it(self, name: str, work: Path, on: Callable[..., str]) -> None:
        content = {"blank.csv": b"id,text\n1,\n", "blank.txt": b" \n\t\n", "blank.jsonl": b'{"text": " "}\n'}
        (work / name).write_bytes(content.get(name, lzma.compress(b"")))
        assert "is empty: there is no text in it" in on(name)

    def test_no_field_with_text(self, work: Path, on: Callable[..., str]) -> None:
        (work / "a.jsonl").write_text('{"id": 1, "title": "a", "body": "b"}\n')
        assert "Name it with --text-field: id, title, body" in on("a.jsonl")
        assert "has no field 'content' (--text-field). It has: id, title, body" in on(
            "a.jsonl", "--text-field", "content"
        )
        assert "The field 'id' of 'a.jsonl' holds int, not text" in on("a.jsonl", "--text-field", "id")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl", b'{"text": "fine"}\n{"text": "unfinished\n'),
            ("a.jsonl", b"no JSON at all\n"),
            ("a.jsonl", b'"only"\n"strings"\n'),
            ("a.parquet", b"no parquet"),
            ("a.txt.gz", b"not compressed"),
            ("a.txt.bz2", b"not compressed"),
            ("a.txt.xz", b"not compressed"),
            ("a.txt.xz", lzma.compress(b"words and words " * 2000)[:-30]),
            ("a.jsonl.xz", lzma.compress(b'{"text": "words"}\n' * 200)[:-30]),
            ("a.txt.zst", COMPRESS[".zst"](random.Random(0).randbytes(100_000).hex().encode())[:-30_000]),
            ("a.csv", b"text\nWell, hello\nno comma\n"),
            ("a.csv", b"title,text\na,Well, hello\nb,no comma\n"),
            ("a.csv", b"text\n" + 3000 * b"no comma\n" + b"Well, hello\n"),
            ("a.csv", b"id;text\n1;semicolons, and a comma\n"),
            ("a.csv", b"id;text\n1;semicolons\n"),
            ("a.csv", b"id\ttext\n1\ttabs\n"),
            ("a.csv", b'text\n"he said \\"yes\\", and left"\n'),
        ],
    )
    def test_damaged_file(self, name: str, content: bytes, work: Path, on: Callable[..., str]) -> None:
        (work / name).write_bytes(content)
        text = on(name)
        assert f"Could not read '{name}'" in text
        assert "fetch or write it again" in text

    @pytest.mark.parametrize(("name", "before"), [("a.txt", ""), ("a.jsonl", '{"text": "'), ("a.csv", "text\n")])
    def test_other_encodings(self, name: str, before: str, work: Path, on: Callable[..., str]) -> None:
        for encoding in ("latin-1", "utf-16"):
            (work / name).write_bytes(f"{before}naïve".encode(encoding))
            assert f"Could not read '{name}': 'utf-8' codec can't decode" in (text := on(name))
            assert "or not UTF-8" in text

    def test_unknown_format(self, work: Path, on: Callable[..., str]) -> None:
        (work / "a.tsv").write_text("words")
        assert "Known: .txt, .md, .jsonl" in on("a.tsv")

    def test_brackets_in_a_name(self, work: Path, on: Callable[..., str]) -> None:
        (work / "a[b].jsonl").write_text('{"a": 1}\n')
        assert "'a[b].jsonl'" in on("a[b].jsonl")
        assert "'[/].txt'" in on("[/].txt")

    def test_less_than_two_blocks(self, work: Path, on: Callable[..., str]) -> None:
        (work / "a.txt").write_text("a few words")
        assert "fewer than two blocks of 64 tokens" in on("a.txt")
        assert "smaller --context" in on("a.txt", "--context", 32)

    def test_token_files(self, work: Path, on: Callable[..., str]) -> None:
        np.full(2000, VOCAB).astype("<u2").tofile(work / "other.bin")
        assert "token id 300, but the model's vocabulary ends at 299" in on("other.bin")
        (work / "odd.bin").write_bytes(b"\0" * 2001)
        assert "odd number of bytes (2001)" in on("odd.bin")

    def test_split(self, work: Path, text_file: Path, on: Callable[..., str]) -> None:
        assert "has no split 'test' (--split). It has: train" in on(text_file, "--split", "test")
