"""Tokens of the vocabulary alone at the first position, for twins of models with massive activations."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import unnorm
from tests.conftest import VOCAB, small_llama
from tests.massive import GPT2, with_massive
from tests.running import CrashError, assert_same_weights, stop_at
from unnorm import processes
from unnorm.calibration.scales import set_constants
from unnorm.hooks import recorded
from unnorm.models.running import copy_model
from unnorm.runs.plan import SHORT_RUN_STEP_TOKENS
from unnorm.sites.find import find_sites
from unnorm.taper.norms import TaperedNorm
from unnorm.taper.stand_ins import install
from unnorm.training.first_tokens import DRAWN, LEARNED, FirstTokens

LONG, LONGER = 3, 11
VOCABULARY = torch.arange(VOCAB)[:, None]


Run = tuple[PreTrainedModel, PreTrainedModel, list[TaperedNorm]]


def run_away() -> Run:
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


@pytest.fixture
def runaway() -> Run:
    return run_away()


def first_tokens(furthest: int, again: int = 0) -> FirstTokens:
    """With numbers of tokens to learn that are not those of a batch."""
    found = FirstTokens(VOCAB, 64, torch.device("cpu"))
    found.furthest, found.again = furthest, again
    found.worst = torch.arange(again * processes.count())
    return found


def test_those_that_run_furthest_are_learned(runaway: Run) -> None:
    one, two = first_tokens(1), first_tokens(2)
    long, longer = (torch.stack(one.losses(*runaway, torch.tensor([[id]]))) for id in (LONG, LONGER))
    torch.testing.assert_close(torch.stack(one.losses(*runaway, VOCABULARY)), longer)
    torch.testing.assert_close(torch.stack(two.losses(*runaway, VOCABULARY)), (long + longer) / 2)
    assert longer[1] > long[1] > 1
    others = torch.cat([VOCABULARY[:LONG], VOCABULARY[LONGER + 1 :]])
    assert first_tokens(len(others)).losses(*runaway, others)[1] < 0.01


def kl_to_teacher(runaway: Run, ids: Tensor) -> Tensor:
    """Of each of these tokens alone."""
    student, teacher, _ = runaway
    log_q, log_p = (model(input_ids=ids).logits.log_softmax(-1) for model in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1)[:, 0]


def test_first_token_loss_is_kl_to_the_teacher(runaway: Run) -> None:
    expected = kl_to_teacher(runaway, torch.tensor([[LONG], [LONGER]])).mean()
    torch.testing.assert_close(first_tokens(2).losses(*runaway, VOCABULARY)[0], expected)


def test_the_worst_of_a_step_are_learned_again_by_the_next(runaway: Run) -> None:
    found = first_tokens(furthest=2, again=2)
    met = torch.tensor([[LONG], [LONGER], [LONG], [5], [6]])
    found.losses(*runaway, met)
    assert set(found.worst.tolist()) < {0, 1, LONG, LONGER}
    _, ids = kl_to_teacher(runaway, torch.tensor([[0], [1], [LONG], [LONGER]])).topk(2)
    assert found.worst.tolist() == torch.tensor([0, 1, LONG, LONGER])[ids].tolist()
    again = found.worst.clone()
    kl, _ = found.losses(*runaway, torch.tensor([[5], [6]]))
    expected = kl_to_teacher(runaway, torch.cat([torch.tensor([[5], [6]]), again[:, None]])).mean()
    torch.testing.assert_close(kl, expected)
    assert found.worst.tolist() == again.tolist()


def test_no_token_is_remembered_twice(runaway: Run) -> None:
    found = first_tokens(furthest=4, again=2)
    for _ in range(3):
        found.losses(*runaway, torch.tensor([[LONGER]] * 4))
        assert len(set(found.worst.tolist())) == 2


def test_of_a_token_that_is_not_a_number_nothing_is_remembered(runaway: Run) -> None:
    model, *_ = runaway
    found = first_tokens(furthest=2, again=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    found.losses(*runaway, torch.tensor([[7], [LONGER]]))
    assert found.worst.tolist() != [7]


def learn_one_of_two(rank: int, folder: Path) -> None:
    """One of two processes, which meets one of the two long tokens."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = first_tokens(furthest=1, again=1)
    found.losses(*run_away(), torch.tensor([[(LONG, LONGER)[rank]]]))
    torch.save(found.worst, folder / f"{rank}.pt")
    processes.leave()


def test_two_processes_remember_the_same_tokens(runaway: Run, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(learn_one_of_two, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    met = torch.tensor([LONG, 0, LONGER, 1])
    expected = met[kl_to_teacher(runaway, met[:, None]).topk(2).indices].tolist()
    assert [torch.load(tmp_path / f"{rank}.pt").tolist() for rank in range(2)] == [expected] * 2


@pytest.mark.parametrize("again", [1, 3])
def test_what_is_remembered_may_be_more_or_fewer_than_there_is_room_for(again: int, tmp_path: Path) -> None:
    before, after = first_tokens(1, 2), first_tokens(1, again)
    before.worst = torch.tensor([7, 8])
    state = TrainerState(global_step=1, stateful_callbacks={"FirstTokens": before.state()})  # type: ignore[arg-type]
    after.on_train_begin(TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
    assert after.worst.tolist() == [7, 8, 2][:again]


def test_training_on_first_tokens_lowers_unevenness(runaway: Run) -> None:
    model, *_ = runaway
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    found, losses = first_tokens(1, 1), []
    for _ in range(30):
        kl, uneven = found.losses(*runaway, VOCABULARY)
        optimizer.zero_grad()
        (kl + 1000 * uneven).backward()
        optimizer.step()
        losses.append(uneven.item())
        assert kl.isfinite()
    assert losses[-1] < losses[0] / 2


@pytest.fixture
def planted(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> dict[str, Any]:
    """Settings of a run of a model with a massive activation; 32 steps, its norms are gone after about half."""
    with_massive(tiny_model, GPT2).save_pretrained(tmp_path / "planted")
    tiny_tokenizer.save_pretrained(tmp_path / "planted")
    return {"model": str(tmp_path / "planted"), "data": str(text_file), "tokens": 8192, "device": "cpu"}


def test_a_run_meets_them_once_its_norms_are_gone(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[tuple[bool, Tensor]] = []
    take = FirstTokens.losses

    def losses(
        self: FirstTokens,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        stand_ins: Collection[TaperedNorm],
        drawn: Tensor,
    ) -> tuple[Tensor, Tensor]:
        met.append((all(stand_in.removed for stand_in in stand_ins), drawn))
        found = take(self, model, teacher, stand_ins, drawn)
        assert all(loss.requires_grad for loss in found)
        assert self.furthest + self.again == round(LEARNED * SHORT_RUN_STEP_TOKENS)
        return found

    monkeypatch.setattr(FirstTokens, "losses", losses)
    unnorm.remove(**planted, out=tmp_path / "run")
    assert 0 < len(met) < 32
    assert all(removed for removed, _ in met)
    assert {tuple(drawn.shape) for _, drawn in met} == {(round(DRAWN * SHORT_RUN_STEP_TOKENS), 1)}
    assert all(drawn.min() >= 0 and drawn.max() < VOCAB for _, drawn in met)
    assert len({tuple(drawn.flatten().tolist()) for _, drawn in met}) == len(met)


def test_a_model_whose_texts_begin_with_a_token_does_not_learn_others_alone(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Tensor] = []
    draw = FirstTokens.draw
    monkeypatch.setattr(FirstTokens, "draw", lambda self: met.append(draw(self)) or met[-1])
    for begin, learned in ((None, True), (3, False)):
        met.clear()
        monkeypatch.setattr("unnorm.removal.remove.begin_of_blocks", lambda *_, begin=begin: begin)
        unnorm.remove(**planted, out=tmp_path / str(begin))
        assert bool(met) is learned


def test_a_resumed_run_remembers_which_were_worst(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: dict[str, list[list[int]]] = {"whole": [], "resumed": []}
    remember = FirstTokens._remember

    def follow(run: str) -> None:
        def remembering(self: FirstTokens, *args: Tensor) -> None:
            remember(self, *args)
            remembered[run].append(self.worst.tolist())

        monkeypatch.setattr(FirstTokens, "_remember", remembering)

    follow("whole")
    unnorm.remove(**planted, out=tmp_path / "whole")
    follow("resumed")
    with monkeypatch.context() as patch:
        stop_at(28, patch)
        with pytest.raises(CrashError):
            unnorm.remove(**planted, out=tmp_path / "resumed")
    remembered["resumed"].clear()
    unnorm.remove(**planted, out=tmp_path / "resumed", resume=True)
    after = remembered["resumed"]
    assert 0 < len(after) < len(remembered["whole"])
    assert after == remembered["whole"][-len(after) :]
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
