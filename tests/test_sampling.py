"""Text that the original writes itself: `--data self`."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import END_OF_TEXT, Cli
from tests.texts import begin_texts
from unnorm.data import Blocks, own_text
from unnorm.errors import UnnormError
from unnorm.removal.blocks import with_stress
from unnorm.removal.run import Run

CONTEXT, BLOCKS = 24, 200


def test_own_text_follows_the_distribution_of_the_model(
    tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    said: list[str] = []
    torch.manual_seed(0)
    blocks = own_text(tiny_model, tiny_tokenizer, CONTEXT, BLOCKS, 3, said.append)
    assert (len(blocks.train), len(blocks.validation)) == (BLOCKS, 3)
    assert said[-1].endswith("203 of 203 blocks")
    ids = torch.tensor(blocks.train["input_ids"])
    assert ids.shape == (BLOCKS, CONTEXT)
    assert (ids[:, 0] == tiny_tokenizer.eos_token_id).all()
    # In a sample from a distribution the mean of -log p is its entropy, within chance; without the model's cache here.
    with torch.no_grad():
        log_p = tiny_model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    surprise = -log_p.gather(-1, ids[:, 1:, None])[..., 0] - entropy
    assert abs(float(surprise.mean())) < 4 * float(surprise.std()) / surprise.numel() ** 0.5
    # Other tokens at other places would not pass.
    assert abs(float((-log_p.gather(-1, ids[:, :-1, None])[..., 0] - entropy).mean())) > float(surprise.mean().abs())


def test_no_more_blocks_are_written_at_once_than_memory_holds(
    tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of all layers are what fills it: those of a GPT-2 small take 75 MB a block."""
    config = tiny_model.config
    block = 2 * 4 * CONTEXT * config.n_embd * config.n_layer
    monkeypatch.setattr("unnorm.data.sampling.free_memory", lambda _: 2 * 9 * block)
    said: list[str] = []
    blocks = own_text(tiny_model, tiny_tokenizer, CONTEXT, 18, 2, said.append)
    assert len(blocks.train) + len(blocks.validation) == 20
    assert [line.split(": ")[1] for line in said] == [f"{n} of 20 blocks" for n in (8, 16, 20)]


def test_the_seed_decides_the_text(tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def write(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return own_text(tiny_model, tiny_tokenizer, 8, 4, 1, lambda _: None).train["input_ids"][:]

    assert write(0) == write(0)
    assert write(0) != write(1)


def test_norms_are_removed_without_a_corpus(cli: Cli, tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options: dict[str, object] = {
        "model": str(tiny_model_dir),
        "data": "self",
        "context": 32,
        "device": "cpu",
        "out": out,
    }
    result = unnorm.remove(tokens=30 * 256, batch_size=8, kl_budget=100, **options)
    assert (result["data"], result["norm_modules_left"], result["verified"]) == ("self", 0, True)
    assert result["held_out"] == "other samples of the original"
    # What needs text afterwards says so, and takes other text.
    failed = cli("audit", out, "--tokens", 64)
    assert failed.code == 2
    assert "Name text with --data" in failed.err.replace("\n", " ")
    assert "Traceback" not in failed.err
    assert cli("audit", out, "--tokens", 64, "--data", text_file, "--json").out.startswith("{")


def test_a_corpus_and_own_text_can_be_mixed(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def write(*args: Any) -> Blocks:
        asked.append(args[3])
        blocks = own_text(*args)
        written.update(map(tuple, blocks.train["input_ids"]))
        return blocks

    def remember(run: Run) -> Dataset:
        train.extend(map(tuple, run.train_blocks["input_ids"]))
        return with_stress(run)

    train: list[tuple[int, ...]] = []
    written: set[tuple[int, ...]] = set()
    monkeypatch.setattr("unnorm.removal.blocks.own_text", write)
    monkeypatch.setattr("unnorm.removal.remove.with_stress", remember)
    common = {"model": str(tiny_model_dir), "data": str(text_file), "context": 32, "device": "cpu"}
    out = tmp_path / "run"
    result = unnorm.remove(tokens=64 * 32, self_share=0.25, out=out, **common)
    assert asked == [16] and result["self_share"] == 0.25
    assert len(train) == 64 and len(written) == 16 and set(train[-16:]) == written and not written & set(train[:-16])
    # What is measured is measured on the corpus.
    plain = unnorm.remove(tokens=0, out=tmp_path / "plain", **common)
    assert (result["teacher_loss"], result["held_out"]) == (plain["teacher_loss"], plain["held_out"])
    assert "25.0% of the training text" in (out / "report.html").read_text()
    assert "25.0% of the training text" in (out / "model" / "README.md").read_text()
    healed = unnorm.heal(out, tokens=16 * 32, out=tmp_path / "healed")
    assert (healed["self_share"], asked) == (0.25, [16, 8])  # Of the fewest blocks that there are.
    assert unnorm.heal(out, tokens=16 * 32, data="self", out=tmp_path / "own")["self_share"] == 0
    with pytest.raises(UnnormError, match=r"self_share: with --data self the model writes all text"):
        unnorm.remove(model=tiny_model_dir, data="self", self_share=0.5, out=tmp_path / "both")


def test_a_tokenizer_without_a_first_token_is_refused(
    tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(UnnormError, match=r"neither a begin-of-text nor an end-of-text token.*--data"):
        own_text(tiny_model, without, 8, 4, 1, lambda _: None)


def test_own_text_begins_as_other_text_does(
    tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """With a token for the begin of texts that the tokenizer puts before none (BLOOM), no block begins with it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=deepcopy(tiny_tokenizer.backend_tokenizer), bos_token="!", eos_token=END_OF_TEXT
    )
    blocks = own_text(tiny_model, tokenizer, 8, 4, 1, lambda _: None)
    assert {row[0] for row in blocks.train["input_ids"]} == {tokenizer.eos_token_id}
    begin_texts(tokenizer)
    blocks = own_text(tiny_model, tokenizer, 8, 4, 1, lambda _: None)
    assert {row[0] for row in blocks.train["input_ids"]} == {tokenizer.bos_token_id}
    only_begin = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token=END_OF_TEXT)
    blocks = own_text(tiny_model, only_begin, 8, 4, 1, lambda _: None)
    assert {row[0] for row in blocks.train["input_ids"]} == {only_begin.bos_token_id}


def test_no_block_is_trained_on_and_held_out(
    tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    blocks = own_text(tiny_model, tiny_tokenizer, 24, 20, 5, lambda _: None)
    train, held_out = ({tuple(row) for row in side["input_ids"]} for side in (blocks.train, blocks.validation))
    assert len(train) == 20 and len(held_out) == 5 and not train & held_out
