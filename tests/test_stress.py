"""The blocks that no corpus has, and where a run uses them."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import VOCAB
from tests.texts import begin_texts
from unnorm.data import as_dataset, random_starts, stress_blocks
from unnorm.removal.blocks import with_stress
from unnorm.removal.run import Run
from unnorm.taper.recipes import RECIPES
from unnorm.taper.schedule import FidelityController
from unnorm.training.distillation import STRESS_TEMPERATURE, DistillationTrainer
from unnorm.training.losses import distillation_losses, read_mismatch


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), context=st.integers(2, 48), count=st.integers(0, 9))
def test_blocks_are_full_valid_and_reproducible(
    tiny_tokenizer: PreTrainedTokenizerFast, seed: int, context: int, count: int
) -> None:
    text = np.arange(3 * context, dtype=np.int32).reshape(3, context) % VOCAB

    def make() -> np.ndarray:
        return stress_blocks(text, tiny_tokenizer, VOCAB, count, np.random.default_rng(seed))

    blocks = make()
    assert blocks.shape == (count, context)
    assert blocks.dtype == np.int32
    assert ((blocks >= 0) & (blocks < VOCAB)).all()
    assert (blocks == make()).all()


def test_blocks_range_from_one_token_to_the_whole_vocabulary(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = np.zeros((4, 64), dtype=np.int32)
    blocks = stress_blocks(text, tiny_tokenizer, VOCAB, 200, np.random.default_rng(0))
    different = np.asarray([len(np.unique(block)) for block in blocks])
    assert (different <= 2).any()
    assert (different > 40).any()
    assert len(np.unique(blocks)) == VOCAB
    # What a row may start with is what `generate` may be given: nearly every token, not a few.
    assert len(np.unique(blocks[:, 0])) == 200
    begun = stress_blocks(text, tiny_tokenizer, VOCAB, 200, np.random.default_rng(0), begin=3)
    assert (begun[::2, 0] == 3).all() and (begun[1::2] == blocks[1::2]).all() and (begun[:, 1:] == blocks[:, 1:]).all()


@pytest.mark.parametrize("tokens", [5_000, 40_000])  # Less than the text has, and several times as many.
def test_stress_takes_the_place_of_text_and_only_where_the_run_distils(
    tokens: int, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def remember(run: Run) -> Dataset:
        seen["text"], seen["stress"], seen["mixed"] = run.train_blocks, run.stress_blocks, with_stress(run)
        return seen["mixed"]

    monkeypatch.setattr("unnorm.removal.remove.with_stress", remember)
    common = {"model": str(tiny_model_dir), "data": str(text_file), "tokens": tokens, "device": "cpu", "context": 32}
    minimized: list[tuple[Tensor, Tensor, float]] = []

    def losses(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        minimized.append(args[2:5])
        return distillation_losses(*args)

    monkeypatch.setattr("unnorm.training.distillation.distillation_losses", losses)
    unnorm.remove(out=tmp_path / "ours", stress_share=0.25, **common)
    stress = {np.asarray(row).tobytes() for row in seen["stress"]["input_ids"]}
    assert [np.asarray(row).tobytes() in stress for row in seen["mixed"]["input_ids"]] == list(seen["mixed"]["stress"])
    assert sum(seen["mixed"]["stress"]) == len(seen["stress"])
    of_text = torch.cat([is_text for _, is_text, _ in minimized]).tolist()
    assert of_text == [row.numpy().tobytes() not in stress for ids, *_ in minimized for row in ids]
    assert not all(of_text) and {temperature for *_, temperature in minimized} == {STRESS_TEMPERATURE}
    assert STRESS_TEMPERATURE > 1
    text, mixed = (np.asarray(seen[key]["input_ids"]) for key in ("text", "mixed"))
    assert mixed.shape == text.shape
    ordinary = {row[1:].tobytes() for row in text}
    assert np.mean([row[1:].tobytes() in ordinary for row in mixed]) == pytest.approx(0.75, abs=0.02)
    unnorm.remove(out=tmp_path / "theirs", recipe="sequential", stress_share=0.25, **common)
    assert seen["mixed"] is seen["text"]


def test_every_second_block_of_text_starts_anyhow(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = np.full((400, 8), 7, dtype=np.int32)
    changed = random_starts(text, tiny_tokenizer, VOCAB, np.random.default_rng(0))
    assert (text == 7).all() and (changed[:, 1:] == 7).all() and (changed[1::2] == 7).all()
    assert len(np.unique(changed[::2, 0])) == 200
    many = random_starts(text[:1].repeat(5 * VOCAB, 0), tiny_tokenizer, VOCAB, np.random.default_rng(0))
    assert set(np.bincount(many[::2, 0], minlength=VOCAB)) == {2, 3}


def test_a_begin_of_text_token_stays_and_the_random_token_follows_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = np.full((400, 8), 7, dtype=np.int32)
    text[:, 0] = 2
    changed = random_starts(text, tiny_tokenizer, VOCAB, np.random.default_rng(0), begin=2)
    assert (changed[:, 0] == 2).all() and (changed[:, 2:] == 7).all() and (changed[1::2] == text[1::2]).all()
    assert len(np.unique(changed[::2, 1])) == 200


def test_a_run_keeps_the_token_that_its_tokenizer_puts_before_every_text(
    tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=deepcopy(tiny_tokenizer.backend_tokenizer), bos_token="!")
    begin = begin_texts(tokenizer)
    text = as_dataset(np.asarray([[begin, 7, 8, 9]] * 200, np.int32))
    run = SimpleNamespace(
        recipe=RECIPES["taper"],
        train_blocks=text,
        stress_blocks=text.select(range(20)),
        original=tiny_model,
        tokenizer=tokenizer,
        config=SimpleNamespace(seed=0, data="text.txt"),
    )
    mixed = np.asarray(with_stress(cast(Run, run))["input_ids"])
    assert (mixed[:, 0] == begin).all() and len(np.unique(mixed[:, 1])) > 50


def test_read_mismatch_is_a_share_of_the_teachers_reads() -> None:
    teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    assert float(read_mismatch(teacher, teacher)) == 0
    assert float(read_mismatch(3 * teacher, teacher)) == pytest.approx(4)
    gain = torch.rand((), dtype=torch.float64) + 1
    assert float(read_mismatch(gain * torch.zeros_like(teacher), gain * teacher)) == pytest.approx(1)


def test_read_mismatch_of_massive_tokens_counts_as_much_as_that_of_all_others() -> None:
    read, teacher = torch.randn(2, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    massive = torch.zeros(2, 5, dtype=torch.bool)
    massive[0, 0] = massive[1, 2] = True
    error = (read - teacher).square().sum(-1)
    expected = (error[massive].mean() + error[~massive].mean()) / teacher.square().sum(-1).mean()
    torch.testing.assert_close(read_mismatch(read, teacher, massive), expected)
    none = torch.zeros_like(massive)
    torch.testing.assert_close(read_mismatch(read, teacher, none), read_mismatch(read, teacher))


def test_matching_fades_over_the_run_and_a_late_taper_puts_that_off() -> None:
    state = SimpleNamespace(global_step=35, max_steps=100)

    def share(position: float, end: float = 0.1) -> float:
        controller = FidelityController(position=position, end=end)
        return DistillationTrainer._read_match_share(  # Nothing else of a trainer matters for it.
            cast(Any, SimpleNamespace(stand_ins={"site": None}, state=state, controller=controller))
        )

    assert share(0.35) == pytest.approx(0.5)
    assert share(0.07) == pytest.approx(0.9)
    assert share(0.35, end=0.0) == 0  # A twin that is healed further.


def test_reads_are_matched_while_training_and_let_go_of_after_it(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def remember(read: torch.Tensor, teacher_read: torch.Tensor, massive: None) -> torch.Tensor:
        mismatch = read_mismatch(read, teacher_read)
        shares.append(float(mismatch.detach()))
        return mismatch

    hooks = []
    monkeypatch.setattr("unnorm.removal.start.equalize_embedding", lambda *_: False)
    monkeypatch.setattr("unnorm.training.distillation.read_mismatch", remember)
    monkeypatch.setattr(
        "unnorm.removal.run.evaluate_model",
        lambda model, *rest, evaluate=unnorm.evaluation.evaluate_model, **more: (
            hooks.extend(m for m in model.modules() if m._forward_hooks) or evaluate(model, *rest, **more)
        ),
    )
    common = {"tokens": 20_000, "device": "cpu", "dtype": "float32"}
    unnorm.remove(model=str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", **common)
    sites = 2 * len(GPT2LMHeadModel.from_pretrained(tiny_model_dir).transformer.h) + 1
    assert max(shares[:sites]) < 1e-10  # Stand-ins start as the norms themselves.
    assert max(shares) > 1e-4
    assert not hooks


def test_half_of_the_draws_are_from_no_more_tokens_than_the_root_of_the_vocabulary(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = np.zeros((4, 256), dtype=np.int32)
    drawn = stress_blocks(text, tiny_tokenizer, VOCAB, 1000, np.random.default_rng(0))[::5, 1:]
    assert np.mean([len(np.unique(block)) <= VOCAB**0.5 for block in drawn]) == pytest.approx(0.5, abs=0.1)


def test_each_kind_of_block_is_what_it_says(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = np.full((4, 64), 7, np.int32)
    blocks = stress_blocks(text, tiny_tokenizer, VOCAB, 500, np.random.default_rng(0))[:, 1:]
    characters, broken, cycles = blocks[1::5], blocks[2::5], blocks[4::5]
    texts = [tiny_tokenizer.decode(block) for block in characters]
    assert 0.3 < np.mean([text.isascii() for text in texts]) < 0.75
    assert all(sum(map(kind, texts)) > 2 for kind in (str.isdecimal, str.isspace, str.isalpha))
    assert 0.6 < (broken == 7).mean() < 1
    assert all(any((block[period:] == block[:-period]).all() for period in range(1, 17)) for block in cycles)
