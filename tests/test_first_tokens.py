"""Random tokens alone at position 0, for twins of models with massive activations."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import VOCAB
from tests.test_massive import GPT2, with_massive
from unnorm.training.first_tokens import FIRST_TOKENS, first_token_loss

COUNT = 8


@pytest.fixture
def pair(tiny_model: GPT2LMHeadModel) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """A student and its teacher, which differ at two tokens' embeddings."""
    teacher = tiny_model.eval()
    student = copy.deepcopy(teacher)
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
    with torch.no_grad():
        student.transformer.wte.weight[:2] += 1
    return student, teacher


def drawing(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(ids).view(1, -1, 1))


def test_it_is_the_mean_kl_after_one_token(
    pair: tuple[GPT2LMHeadModel, GPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair
    drawing(monkeypatch, [0, 1, 5])
    log_q, log_p = (model(input_ids=torch.tensor([[0], [1], [5]])).logits.log_softmax(-1) for model in pair)
    loss = first_token_loss(student, teacher, 3)
    torch.testing.assert_close(loss, (log_p.exp() * (log_p - log_q)).sum(-1).mean())
    loss.backward()
    by_token = student.transformer.wte.weight.grad.norm(dim=1)
    assert (by_token[:2] > 10 * by_token[2:].max()).all()


@pytest.mark.parametrize("huge", [1e4, torch.inf])
def test_a_token_that_overflows_is_left_out(
    huge: float, pair: tuple[GPT2LMHeadModel, GPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair
    drawing(monkeypatch, [0])
    alone = first_token_loss(student, teacher, 1).detach()
    # What no norm holds: logits of token 1 as large as its embedding.
    student.transformer.ln_f.register_forward_hook(
        lambda _, args, y: torch.where(args[0].abs().amax(-1, keepdim=True) > 1e3, args[0], y)
    )
    with torch.no_grad():
        student.transformer.wte.weight[1] *= huge
    drawing(monkeypatch, [0, 1])
    loss = first_token_loss(student, teacher, 2)
    torch.testing.assert_close(loss.detach(), alone)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    drawing(monkeypatch, [1, 1])
    assert first_token_loss(student, teacher, 2).item() == 0


def test_every_process_draws_tokens_of_its_own(
    pair: tuple[GPT2LMHeadModel, GPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    student, teacher = pair
    teacher.register_forward_pre_hook(lambda _, args, kwargs: drawn.append(kwargs["input_ids"]), with_kwargs=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(0)
        first_token_loss(student, teacher, COUNT)
    assert all(ids.shape == (COUNT, 1) and ids.max() < VOCAB for ids in drawn)
    assert not torch.equal(*drawn)


def test_a_run_meets_them_once_its_norms_are_gone(
    tiny_model: GPT2LMHeadModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met: list[tuple[bool, int]] = []

    def remember(student: PreTrainedModel, teacher: PreTrainedModel, count: int) -> Tensor:
        stand_ins: list[Any] = [module for module in student.modules() if hasattr(module, "removed")]
        met.append((all(stand_in.removed for stand_in in stand_ins), count))
        return first_token_loss(student, teacher, count)

    monkeypatch.setattr("unnorm.training.run.first_token_loss", remember)
    with_massive(tiny_model, GPT2).save_pretrained(tmp_path / "planted")
    tiny_tokenizer.save_pretrained(tmp_path / "planted")
    unnorm.remove(model=str(tmp_path / "planted"), data=str(text_file), tokens=8192, out=tmp_path / "run", device="cpu")
    assert 0 < len(met) < 16
    assert all(removed for removed, _ in met)
    assert {count for _, count in met} == {round(FIRST_TOKENS * 512)}
