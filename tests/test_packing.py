"""Token ids, of text or from files, packed without loss into blocks of which none is trained on and held out."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.conftest import VOCAB
from tests.texts import CONTEXT, DOCUMENTS, begin_texts, ids_of, pack, stream, write, write_ids
from unnorm.data import as_dataset, build_blocks, evenly_spaced, open_documents, stress_blocks, token_files
from unnorm.data import packing as packing_module
from unnorm.data import pieces as pieces_module
from unnorm.data.packing import begin_of_blocks, held_out_blocks, token_stream
from unnorm.data.pieces import spread
from unnorm.errors import UnnormError
from unnorm.evaluation.corpora import open_corpus, tokens_in
from unnorm.runs.text import TextSource


class TestHeldOut:
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.bin"])
    @pytest.mark.parametrize("asked", [(1, 1), (5, 40), (40, 1), (10_000, 10_000)])
    def test_does_not_depend_on_how_much_is_asked_for(
        self, name: str, asked: tuple[int, int], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """What `remove` trained on is never what `evaluate` later calls held out."""
        path = tmp_path / name
        if name == "a.bin":
            write_ids(path, np.arange(5000))
        else:
            write(path, [f"{i} {text}" for i, text in enumerate(DOCUMENTS * 3)])
        everything, held_out = ids_of(pack(path, tiny_tokenizer))
        train, validation = ids_of(pack(path, tiny_tokenizer, *asked))
        assert np.array_equal(train, everything[: asked[0]])
        assert np.array_equal(validation, held_out[: asked[1]])

    def test_the_tail_of_blocks_where_the_held_out_text_is_shorter_than_one(
        self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        path = write_ids(tmp_path / "a.bin", np.arange(5 * CONTEXT))
        blocks = pack(path, tiny_tokenizer)
        train, validation = ids_of(blocks)
        assert blocks.held_out.words == "the last 1 of 4 blocks"
        assert train.ravel().tolist() == list(range(3 * CONTEXT))
        assert validation.ravel().tolist() == list(range(3 * CONTEXT, 4 * CONTEXT))
        for asked in ((1, 1), (2, 5)):
            fewer, same = ids_of(pack(path, tiny_tokenizer, *asked))
            assert np.array_equal(fewer, train[: asked[0]])
            assert np.array_equal(same, validation)


class TestTokenFiles:
    def test_train_and_val(self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        ids = np.random.default_rng(0).integers(65_536, size=3000)
        train_file = write_ids(tmp_path / "train.bin", ids)
        write_ids(tmp_path / "val.bin", ids[::-1])
        for source in (train_file, tmp_path, tmp_path / "*.bin"):
            blocks = pack(source, tiny_tokenizer)
            train, validation = ids_of(blocks)
            assert train.ravel().tolist() == ids[: 3000 // CONTEXT * CONTEXT].tolist()
            assert validation.ravel().tolist() == ids[::-1][: 3000 // CONTEXT * CONTEXT].tolist()
            assert blocks.held_out.words == "val.bin"

    @pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokens.bin"])
    def test_alone(self, name: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        blocks = pack(write_ids(tmp_path / name, np.arange(3200)), tiny_tokenizer)
        train, validation = ids_of(blocks)
        assert train.ravel().tolist() == list(range(2880))
        assert validation.ravel().tolist() == list(range(2880, 3200))
        assert blocks.held_out.words == "the last tenth of each file"

    def test_test_tokens_are_not_trained_on(self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        for number, name in enumerate(["train", "val", "test"]):
            write_ids(tmp_path / f"{name}.bin", np.full(160, number))
        train, validation = ids_of(pack(tmp_path, tiny_tokenizer))
        assert set(train.ravel()) == {0}
        assert set(validation.ravel()) == {1}

    def test_names_tell_splits_as_those_of_text_files_do(
        self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        for number, name in enumerate(["text_train_000", "text_train_001", "text_val_000", "test"]):
            write_ids(tmp_path / f"{name}.bin", np.full(160, number))
        train, validation = ids_of(pack(tmp_path, tiny_tokenizer))
        assert (set(train.ravel()), set(validation.ravel())) == ({0, 1}, {2})
        train, validation = ids_of(pack(tmp_path, tiny_tokenizer, split="test"))
        assert (set(train.ravel()), set(validation.ravel())) == ({3}, {2})
        with pytest.raises(UnnormError, match=r"no split 'dev' \(--split\)\. It has: test, train, validation"):
            pack(tmp_path, tiny_tokenizer, split="dev")

    def test_a_file_without_a_split_in_its_name_is_for_training(
        self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        for number, name in enumerate(["code", "val"]):
            write_ids(tmp_path / f"{name}.bin", np.full(160, number))
        train, validation = ids_of(pack(tmp_path, tiny_tokenizer))
        assert (set(train.ravel()), set(validation.ravel())) == ({0}, {1})

    def test_16_bits_are_too_few_for_a_large_vocabulary(
        self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """As where ids of 32 bits were written, whose halves all are in the vocabulary."""
        path = tmp_path / "a.bin"
        np.arange(100_000, 103_200).astype("<u4").tofile(path)
        with pytest.raises(UnnormError, match="ids have 16 bits, but the model's vocabulary has 151,936 tokens"):
            pack(path, tiny_tokenizer, vocab_size=151_936)
        with pytest.raises(UnnormError, match="Give the text itself"):
            held_out_blocks(str(path), tiny_tokenizer, 151_936, CONTEXT, 5)

    def test_several_files_are_one_stream(self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        write_ids(tmp_path / "000.bin", np.arange(100))
        write_ids(tmp_path / "001.bin", np.arange(100, 300))
        train, validation = ids_of(pack(tmp_path, tiny_tokenizer, context=30))
        assert train.ravel().tolist() == [*range(90), *range(100, 280)]
        assert validation.ravel().tolist() == [*range(90, 100), *range(280, 300)]

    @pytest.mark.parametrize(("content", "message"), [(b"abc", "odd number of bytes"), (b"", "is empty")])
    def test_damaged(
        self, content: bytes, message: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(UnnormError, match=message):
            pack(tmp_path / "a.bin", tiny_tokenizer)

    def test_ids_out_of_range_on_either_side(self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        for bad in (5, 3195):
            ids = np.zeros(3200)
            ids[bad] = 300
            path = write_ids(tmp_path / "a.bin", ids)
            with pytest.raises(UnnormError, match="token id 300, but the model's vocabulary ends at 299"):
                pack(path, tiny_tokenizer, vocab_size=300)
            assert len(pack(path, tiny_tokenizer, vocab_size=301).train)


class TestPacking:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(texts=st.lists(st.text(max_size=60), max_size=150))
    def test_stream_is_every_document_and_end_of_text(
        self, texts: list[str], tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        got = [int(i) for piece in token_stream(texts, tiny_tokenizer) for i in piece]
        assert got == stream(texts, tiny_tokenizer)

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        texts=st.lists(st.text(min_size=30).filter(str.strip), min_size=40, max_size=80),
        context=st.integers(2, 40),
        asked=st.integers(1, 30),
    )
    def test_blocks_joined_are_the_stream(
        self, texts: list[str], context: int, asked: int, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        path = write(tmp_path / "a.jsonl", texts)
        documents = open_documents(str(path))
        blocks = pack(path, tiny_tokenizer, asked, asked, context)
        texts_in_order = ([*spread(documents.train)], [*documents.validation()])
        for dataset, side in zip((blocks.train, blocks.validation), texts_in_order, strict=True):
            ids = np.array(dataset["input_ids"])
            whole = stream(side, tiny_tokenizer)
            assert ids.shape == (min(asked, len(whole) // context), context)
            assert ids.ravel().tolist() == whole[: ids.size]

    def test_a_long_document_is_tokenized_in_pieces(
        self, monkeypatch: pytest.MonkeyPatch, text_file: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        text = text_file.read_text()
        monkeypatch.setattr(packing_module, "_CHARS_AT_ONCE", 500)
        pieces = list(token_stream([text, "short"], tiny_tokenizer))
        assert len(pieces) > 20
        assert np.concatenate(pieces).tolist() == stream([text, "short"], tiny_tokenizer)

    @pytest.mark.parametrize("between", ["\n", "\n\n", "\n \n\n"])
    def test_so_is_one_without_spaces(
        self, between: str, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        text = between.join(["\u6211\u5011\u8d70\u3002" * 20, "\u6a19\u984c"] * 30)
        monkeypatch.setattr(packing_module, "_CHARS_AT_ONCE", 500)
        monkeypatch.setattr(pieces_module, "_NEAR", 500)
        pieces = list(token_stream([text], tiny_tokenizer))
        assert len(pieces) > 4
        assert np.concatenate(pieces).tolist() == stream([text], tiny_tokenizer)

    def test_no_more_is_read_than_asked_for(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        read: list[int] = []

        def texts() -> Iterator[str]:
            for i in range(10_000):
                read.append(i)
                yield "some words " * 10

        packing_module._cut(token_stream(texts(), tiny_tokenizer), CONTEXT, 20)
        assert len(read) < 200

    def test_blocks_begin_as_the_tokenizer_begins_a_text(
        self, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        """As Gemma's and Llama 3's do, which know no text without it."""
        texts = [f"text number {i} of many, each with some words in it\n" for i in range(400)]
        path = write(tmp_path / "a.jsonl", texts)
        plain = build_blocks(str(path), tiny_tokenizer, VOCAB, CONTEXT, 50, 20)
        tokenizer = deepcopy(tiny_tokenizer)
        assert begin_of_blocks(str(path), tokenizer) is None
        bos = begin_texts(tokenizer)
        found = build_blocks(str(path), tokenizer, VOCAB, CONTEXT, 50, 20)
        for before, after in ((plain.train, found.train), (plain.validation, found.validation)):
            ids = np.asarray(after["input_ids"])
            assert ids.shape[1] == CONTEXT and (ids[:, 0] == bos).all()
            stream = ids[:, 1:].ravel()
            assert (stream == np.asarray(before["input_ids"]).ravel()[: len(stream)]).all()
        corpus = open_corpus("a", TextSource(str(path)), tokenizer, VOCAB, CONTEXT, 10**4)
        assert corpus.protocol()["first_token"] == f"of each block is given, not predicted; it is ! (id {bos})"
        ids = np.asarray(corpus.blocks["input_ids"])
        assert (ids[:, 0] == bos).all()
        assert tokens_in(TextSource(str(path)), tokenizer, VOCAB)[ids].all()
        short = write(tmp_path / "b.txt", ["some words to measure on, a line or two of them. " * 3])
        assert np.asarray(held_out_blocks(str(short), tokenizer, VOCAB, 64, 4)[0]["input_ids"])[0, 0] == bos
        token_file = write_ids(tmp_path / "a.bin", np.arange(2000) % VOCAB)
        assert begin_of_blocks(str(token_file), tokenizer) is None

    def test_end_of_text_is_left_out_if_the_tokenizer_has_none(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        without = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
        assert np.concatenate(list(token_stream(["a", "b"], without))).tolist() == without("ab")["input_ids"]

    def test_less_than_asked_for(self, text_file: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        tokens = len(stream([text_file.read_text()], tiny_tokenizer))
        blocks = pack(text_file, tiny_tokenizer, 10**9, 10**9)
        assert tokens - 3 * CONTEXT < CONTEXT * (len(blocks.train) + len(blocks.validation)) <= tokens + CONTEXT

    @pytest.mark.parametrize("tokens", [1, CONTEXT - 1, CONTEXT, 2 * CONTEXT - 1])
    def test_less_than_two_blocks(self, tokens: int, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        path = write_ids(tmp_path / "a.bin", np.arange(tokens))
        with pytest.raises(UnnormError, match=r"fewer than two blocks of 16 tokens.*smaller --context"):
            pack(path, tiny_tokenizer)


def test_held_out_text_of_a_small_source_is_never_trained_on_at_any_context(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"{i} squared is {i * i}" for i in range(400)))
    held = held_out_blocks(str(path), tiny_tokenizer, 300, 4096, 5)[0]["input_ids"]
    assert len(held) == 1 and 8 <= len(held[0]) < 4096
    pieces = {tuple(held[0][at : at + 24]) for at in range(0, len(held[0]) - 23, 24)}
    for context in (24, 64, 256):
        train = np.concatenate(build_blocks(str(path), tiny_tokenizer, 300, context, 1000, 5).train["input_ids"])
        trained = {tuple(train[at : at + 24]) for at in range(len(train) - 23)}
        assert not pieces & trained


def test_next_to_no_held_out_text_is_too_little(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("few words\n")
    with pytest.raises(UnnormError, match="fewer than two blocks"):
        held_out_blocks(str(path), tiny_tokenizer, 300, 64, 5)


def test_slow_reading_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    monkeypatch.setattr(packing_module, "_SAYS_EVERY", 0.0)
    said: list[str] = []
    build_blocks(str(write(tmp_path / "a.jsonl", DOCUMENTS)), tiny_tokenizer, 300, CONTEXT, 50, 5, say=said.append)
    assert said
    assert all(line.startswith("read ") and line.endswith(" of at most 800 tokens") for line in said)


def test_a_file_of_more_tokens_than_are_read_at_once(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "_IDS_AT_ONCE", 100)
    train, validation = ids_of(pack(write_ids(tmp_path / "a.bin", np.arange(3200)), tiny_tokenizer))
    assert train.ravel().tolist() == list(range(2880))
    assert validation.ravel().tolist() == list(range(2880, 3200))


def test_blocks_are_thinned_evenly() -> None:
    blocks = as_dataset(np.repeat(np.arange(20, dtype=np.int32)[:, None], 2, axis=1))
    assert [row[0] for row in evenly_spaced(blocks, 4)["input_ids"]] == [0, 5, 10, 15]
    assert [row[0] for row in evenly_spaced(blocks, 30)["input_ids"]] == list(range(20))


def test_a_held_out_part_that_is_too_short_does_not_cost_the_rest_of_the_text(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_ids(tmp_path / "train.bin", np.arange(1500 * CONTEXT) % VOCAB)
    write_ids(tmp_path / "val.bin", np.arange(3))
    everything = pack(tmp_path, tiny_tokenizer)
    train, held_out = ids_of(everything)
    assert (len(train), len(held_out)) == (
        1400,
        100,
    ) and everything.held_out.words == "the last 100 of the first 1,000 blocks"
    assert train.ravel().tolist() == [
        i % VOCAB for i in [*range(900 * CONTEXT), *range(1000 * CONTEXT, 1500 * CONTEXT)]
    ]
    for asked in ((1, 1), (899, 200), (1000, 100), (10_000, 30)):
        fewer, same = ids_of(pack(tmp_path, tiny_tokenizer, *asked))
        assert np.array_equal(fewer, train[: asked[0]]) and np.array_equal(same, held_out[: asked[1]])


def test_token_ids_of_32_bits_are_not_read_as_twice_as_many(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (np.arange(2000) % VOCAB).astype("<u4").tofile(tmp_path / "wide.bin")
    with pytest.raises(UnnormError, match="looks like 32-bit token ids"):
        pack(tmp_path / "wide.bin", tiny_tokenizer)
    write_ids(tmp_path / "zeros.bin", np.zeros(2000))
    assert len(ids_of(pack(tmp_path / "zeros.bin", tiny_tokenizer))[0])


def characters(**more: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, without a token for what is unknown."""
    letters = {letter: number for number, letter in enumerate("^$ abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel(letters))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more)


def test_a_tokenizer_may_have_no_token_for_what_is_unknown(tmp_path: Path) -> None:
    tokenizer = characters()
    path = write(
        tmp_path / "a.jsonl", [f"the quick brown fox jumps over {chr(97 + i % 26)} lazy dogs" for i in range(400)]
    )
    blocks = build_blocks(str(path), tokenizer, 29, CONTEXT, 50, 20)
    text = np.asarray(blocks.train["input_ids"])
    assert tokenizer.decode(text[0]).replace(" ", "").startswith("thequick")
    stressed = stress_blocks(text, tokenizer, 29, 50, np.random.default_rng(0))
    assert stressed.shape == (50, CONTEXT) and stressed.max() < 29
    foreign = write(tmp_path / "b.jsonl", [f"Number {i}" for i in range(400)])
    with pytest.raises(UnnormError, match="can't encode this text"):
        build_blocks(str(foreign), tokenizer, 29, CONTEXT, 50, 20)


def test_what_a_tokenizer_begins_with_need_not_be_called_begin_of_text(tmp_path: Path) -> None:
    tokenizer = characters(eos_token="$")
    assert begin_of_blocks("x.txt", tokenizer) is None
    backend = tokenizer.backend_tokenizer
    for template, begin in (("^ $A", 0), ("^ $A $", 0), ("$A $", None), ("$ $A", None), ("^ ^ $A", None)):
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("^", 0), ("$", 1)])
        assert begin_of_blocks("x.txt", tokenizer) == begin, template
