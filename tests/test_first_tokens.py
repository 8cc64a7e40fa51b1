"""Tokens of the vocabulary alone at the first position, for twins of models with massive activations."""

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import VOCAB, small_llama
from tests.test_massive import GPT2, with_massive
from unnorm.calibrate import set_constants
from unnorm.models import copy_model
from unnorm.norms import TaperedNorm
from unnorm.residual import recorded
from unnorm.sites import find_sites
from unnorm.stand_ins import install
from unnorm.training.first_tokens import DRAWN, LEARNED, first_token_losses

LONG, LONGER = 3, 11
VOCABULARY = torch.arange(VOCAB)[:, None]


Run = tuple[PreTrainedModel, PreTrainedModel, list[TaperedNorm]]


@pytest.fixture
def runaway() -> Run:
    """A student without norms, in training, its teacher, and its stand-ins; two tokens' embeddings are long."""
    teacher = small_llama().eval()
    model = copy_model(teacher)
    stand_ins = install(model, find_sites(model), interpolation="bounded")
    with torch.no_grad(), recorded(model, list(stand_ins)) as record:
        model(input_ids=VOCABULARY)
        scales = {name: stand_in.log_scale(record[name][0]).view(1, -1) for name, stand_in in stand_ins.items()}
    set_constants(stand_ins, scales, "geometric")
    with torch.no_grad():
        model.get_input_embeddings().weight[LONG] *= 20
        model.get_input_embeddings().weight[LONGER] *= 50
    for stand_in in stand_ins.values():
        stand_in.removed = stand_in.keep_log_scale = True
    return model.train(), teacher, list(stand_ins.values())


def test_those_that_run_furthest_are_learned(runaway: Run) -> None:
    long, longer = (torch.stack(first_token_losses(*runaway, torch.tensor([[id]]), 1)) for id in (LONG, LONGER))
    torch.testing.assert_close(torch.stack(first_token_losses(*runaway, VOCABULARY, 1)), longer)
    torch.testing.assert_close(torch.stack(first_token_losses(*runaway, VOCABULARY, 2)), (long + longer) / 2)
    assert longer[1] > long[1] > 1
    others = torch.cat([VOCABULARY[:LONG], VOCABULARY[LONGER + 1 :]])
    assert first_token_losses(*runaway, others, len(others))[1] < 0.01


def test_first_token_loss_is_kl_to_the_teacher(runaway: Run) -> None:
    student, teacher, _ = runaway
    ids = torch.tensor([[LONG], [LONGER]])
    log_q, log_p = (model(input_ids=ids).logits.log_softmax(-1) for model in (student, teacher))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(first_token_losses(*runaway, VOCABULARY, 2)[0], expected)


def test_training_on_first_tokens_lowers_unevenness(runaway: Run) -> None:
    model, *_ = runaway
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        kl, uneven = first_token_losses(*runaway, VOCABULARY, 2)
        optimizer.zero_grad()
        (kl + 1000 * uneven).backward()
        optimizer.step()
        losses.append(uneven.item())
        assert kl.isfinite()
    assert losses[-1] < losses[0] / 2


def test_a_run_meets_them_once_its_norms_are_gone(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met: list[tuple[bool, Tensor, int]] = []

    def remember(
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        stand_ins: Collection[TaperedNorm],
        drawn: Tensor,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        met.append((all(stand_in.removed for stand_in in stand_ins), drawn, count))
        losses = first_token_losses(model, teacher, stand_ins, drawn, count)
        assert all(loss.requires_grad for loss in losses)
        return losses

    monkeypatch.setattr("unnorm.training.distillation.first_token_losses", remember)
    with_massive(tiny_model, GPT2).save_pretrained(tmp_path / "planted")
    tiny_tokenizer.save_pretrained(tmp_path / "planted")
    unnorm.remove(model=str(tmp_path / "planted"), data=str(text_file), tokens=8192, out=tmp_path / "run", device="cpu")
    assert 0 < len(met) < 16
    assert all(removed for removed, _, _ in met)
    assert {count for _, _, count in met} == {round(LEARNED * 512)}
    assert {tuple(drawn.shape) for _, drawn, _ in met} == {(round(DRAWN * 512), 1)}
    assert all(drawn.min() >= 0 and drawn.max() < VOCAB for _, drawn, _ in met)
    assert len({tuple(drawn.flatten().tolist()) for _, drawn, _ in met}) == len(met)
