"""What is minimized, next to the plain formulas."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2LMHeadModel,
    PreTrainedModel,
    TrainingArguments,
)

import unnorm
from tests.conftest import VOCAB
from tests.running import SETTINGS
from unnorm.hooks import recorded
from unnorm.models.running import copy_model, without_noise
from unnorm.sites.find import find_sites
from unnorm.sites.norm_behaviour import log_scale_of
from unnorm.taper.norms import TokenMask
from unnorm.taper.recipes import SEQUENTIAL_AUX, TAPER, TAPERNORM, Recipe
from unnorm.taper.schedule import taper
from unnorm.taper.stand_ins import install
from unnorm.training import distillation, losses
from unnorm.training.callbacks import (
    Removal,
)
from unnorm.training.distillation import DistillationTrainer
from unnorm.training.first_tokens import LEARNED, FirstTokens
from unnorm.training.losses import distillation_losses, next_token_loss, scale_penalty


def test_logits_stay_in_the_precision_of_training(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate widens what a model gives: with a large vocabulary twice the memory of all else."""
    seen: dict[str, set[torch.dtype]] = {}

    def noted(name: str) -> Any:
        loss = getattr(losses, name)

        def note(logits: torch.Tensor, *more: Any) -> Any:
            seen.setdefault(name, set()).add(logits.dtype)
            return loss(logits, *more)

        return note

    for name in ("distillation_losses", "next_token_loss"):
        monkeypatch.setattr(distillation, name, noted(name))
    settings = SETTINGS | {"tokens": 2048, "dtype": "bfloat16", "control": True}
    unnorm.remove(str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", **settings)
    assert seen == {"distillation_losses": {torch.bfloat16}, "next_token_loss": {torch.bfloat16}}


def test_losses_in_nats_per_token() -> None:
    torch.manual_seed(0)
    logits, other = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    ids = torch.randint(7, (2, 5))
    p, q = other.softmax(-1), logits.softmax(-1)
    kl, shown_kl, loss = distillation_losses(logits, other, ids)
    assert float(shown_kl) == pytest.approx(float(kl))
    torch.testing.assert_close(kl, (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(loss, next_token_loss(logits, ids))
    assert 0 <= float(distillation_losses(logits, logits.nextafter(other), ids)[0]) < 1e-6
    picked = q.log()[:, :-1].gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(next_token_loss(logits, ids), -picked.mean())


def test_losses_of_bfloat16_logits_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    logits, other = (4 * torch.randn(2, 2, 40, 300)).bfloat16()
    ids = torch.randint(300, (2, 40))
    found = [*distillation_losses(logits, other, ids), next_token_loss(logits, ids)]
    expected = [*distillation_losses(logits.float(), other.float(), ids), next_token_loss(logits.float(), ids)]
    assert [float(value) for value in found] == pytest.approx([float(value) for value in expected], rel=1e-4)


def test_only_some_blocks_are_shown_but_all_are_minimized() -> None:
    torch.manual_seed(0)
    logits, other, ids = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    kl, shown_kl, shown_loss = distillation_losses(logits, other, ids, torch.tensor([True, False, True]))
    torch.testing.assert_close(kl, distillation_losses(logits, other, ids)[0])
    _, *expected = distillation_losses(logits[::2], other[::2], ids[::2])
    torch.testing.assert_close([shown_kl, shown_loss], expected)


@pytest.mark.parametrize("unasked", [False, True])
@pytest.mark.parametrize("cached", [1, 14, 10**6])
@pytest.mark.parametrize(("temperature", "label_weight"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (3.0, 0.1)])
def test_gradient_is_that_of_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, cached: int, temperature: float, label_weight: float, unasked: bool
) -> None:
    monkeypatch.setattr(losses, "_CACHED", cached)
    monkeypatch.setattr(losses, "_CACHED_GPU", cached)
    if unasked:
        monkeypatch.setattr(losses, "_parts", lambda logits, *more: losses._parts_unasked(*logits.shape, *more))
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7)
    ids, shown = torch.randint(7, (3, 5)), torch.tensor([True, False, True])
    plain = logits.detach().double().requires_grad_()
    t = torch.where(shown, 1.0, temperature)[:, None, None]
    p, log_q = (teacher_logits.double() / t).softmax(-1), (plain / t).log_softmax(-1)
    expected = (t**2 * p * (p.log() - log_q)).sum(-1).mean() + label_weight * next_token_loss(plain, ids)
    minimized, _, loss = distillation_losses(logits, teacher_logits, ids, shown, temperature, label_weight)
    torch.testing.assert_close(minimized.double(), expected, rtol=1e-5, atol=1e-7)
    (3 * minimized).backward()
    (3 * expected).backward()
    assert logits.grad is not None and plain.grad is not None
    torch.testing.assert_close(logits.grad.double(), plain.grad, rtol=1e-5, atol=1e-7)
    assert not loss.requires_grad


def test_scale_penalties_are_squared_distances() -> None:
    scale = torch.tensor([[10.0, 1.0, 3.0]])
    special = torch.tensor([[True, False, False]])
    constant = torch.tensor(3.0).log()
    # From the mean of the ordinary tokens, 2, and from the constant, 3; the special token counts as a token.
    assert float(scale_penalty(scale.log(), special, constant, "spread")) == pytest.approx((64 + 1 + 1) / 3, rel=1e-5)
    none_ordinary = scale_penalty(scale.log(), torch.ones_like(special), constant, "spread")
    assert float(none_ordinary) == pytest.approx(float(scale.square().mean()), rel=1e-5)
    assert float(scale_penalty(scale.log(), special, constant, "target")) == pytest.approx((49 + 4 + 0) / 3, rel=1e-5)


def trainer_of(
    original: PreTrainedModel, recipe: Recipe, directory: Path, bounded: bool = False
) -> DistillationTrainer:
    """A trainer of a copy of the model, in training, with stand-ins where the norms were."""
    student = copy_model(original).train()
    sites = find_sites(student)
    stand_ins = install(student, sites, interpolation="bounded" if bounded else recipe.interpolation)
    return DistillationTrainer(
        model=student,
        args=TrainingArguments(str(directory), use_cpu=True, report_to="none"),
        teacher=original if recipe.optimization.distil else None,
        optimization=recipe.optimization,
        removal=Removal(stand_ins, taper(sites), None, TokenMask(), end_of_text=0, final=stand_ins["transformer.ln_f"]),
    )


def minimized(trainer: DistillationTrainer, inputs: dict[str, torch.Tensor]) -> float:
    assert trainer.model is not None
    with trainer.matching_reads(), without_noise(trainer.model):
        loss = trainer.compute_loss(trainer.model, inputs)
    assert isinstance(loss, torch.Tensor)
    return float(loss.detach())


@pytest.mark.parametrize("gone", [False, True])
def test_what_is_minimized_is_the_sum_of_all_that_the_recipe_asks_for(
    gone: bool,
    batch: dict[str, torch.Tensor],
    tiny_model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runaways alone count as uneven once the norms are gone."""

    def always(*numbers: float) -> Callable[..., Any]:
        tensors = torch.tensor(numbers).unbind()
        return lambda *_: tensors if len(tensors) > 1 else tensors[0]

    parts = {"distillation_losses": (2.0, 0.0, 0.0), "read_mismatch": (3.0,), "massive_unevenness": (5.0,)}
    for name, numbers in parts.items():
        monkeypatch.setattr(distillation, name, always(*numbers))
    monkeypatch.setattr(distillation, "unevenness", lambda *given: torch.tensor(0.7 if given[2:] else 0.11))
    trainer = trainer_of(tiny_model, TAPER, tmp_path, bounded=True)
    for stand_in in trainer.stand_ins.values():
        stand_in.alpha.fill_(1.0 if gone else 0.5)
        stand_in.removed = gone
    weights = TAPER.optimization
    expected = 2 + 0.25 * weights.read_weight * 3
    if gone:
        expected += weights.even_weight * 0.7
    else:
        expected += weights.even_weight * 0.5**4 * 0.11 + weights.massive_even_weight * 5
    batch["read_share"] = torch.tensor(0.25)
    assert minimized(trainer, batch) == pytest.approx(expected)


def gradients(trainer: DistillationTrainer, inputs: dict[str, torch.Tensor], times: int = 1) -> torch.Tensor:
    """What some batches in a row, all the same, leave in the parameters of a trainer's model."""
    assert trainer.model is not None
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = times
    with trainer.matching_reads(), without_noise(trainer.model):
        for _ in range(times):
            trainer.training_step(trainer.model, dict(inputs))
    found = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("weight", "usual", "expected"), [(0.5, 1e6, None), (40.0, 1e6, None), (40.0, 1e-3, 5e-4), (math.inf, 1e6, 0.0)]
)
def test_gradients_of_single_tokens_are_added_but_at_most_half_as_long_as_a_step_s_usually_are(
    weight: float,
    usual: float,
    expected: float | None,
    times: int,
    batch: dict[str, torch.Tensor],
    tiny_model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of(tiny_model, TAPER, tmp_path, bounded=True)
    for stand_in in trainer.stand_ins.values():
        stand_in.alpha.fill_(1.0)
        stand_in.removed = True
    text = gradients(trainer, batch)
    assert trainer.model is not None
    gain = trainer.model.get_submodule("transformer.ln_f").gain
    monkeypatch.setattr(FirstTokens, "losses", lambda *_: (weight * gain.sum(), 0 * gain.sum()))
    trainer.learn_first_tokens(FirstTokens(VOCAB, 32, torch.device("cpu")))
    trainer.guard.norms = [usual]
    added = gradients(trainer, batch, times) - text
    whole = LEARNED * weight * len(gain) ** 0.5
    assert float(added.norm()) == pytest.approx(whole if expected is None else expected, rel=1e-3)


@pytest.mark.parametrize("recipe", [SEQUENTIAL_AUX, TAPERNORM])
def test_the_papers_penalty_is_on_the_scales_of_the_final_norm(
    recipe: Recipe, batch: dict[str, torch.Tensor], tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    batch["input_ids"][1, 5] = 0  # End of text.
    trainer = trainer_of(tiny_model, recipe, tmp_path)
    with torch.no_grad(), recorded(tiny_model, ["transformer.ln_f"]) as record:
        logits = tiny_model(input_ids=batch["input_ids"]).logits
    x = record["transformer.ln_f"][0]
    log_scale = log_scale_of(x - x.mean(-1, keepdim=True), tiny_model.config.layer_norm_epsilon).squeeze(-1)
    special = torch.zeros(2, 16, dtype=torch.bool)
    special[:, 0] = special[1, 5] = True
    assert recipe.optimization.penalty is not None
    penalty = scale_penalty(log_scale, special, torch.zeros(()), recipe.optimization.penalty)
    expected = next_token_loss(logits, batch["input_ids"]) + recipe.optimization.penalty_weight * penalty
    assert minimized(trainer, batch) == pytest.approx(float(expected), rel=1e-5)


def test_the_label_weight_of_the_recipe_is_in_force(
    batch: dict[str, torch.Tensor], tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    """With its norms on the model is its teacher: KL is 0, and what is minimized the next-token loss alone."""
    with torch.no_grad():
        loss = next_token_loss(tiny_model(input_ids=batch["input_ids"]).logits, batch["input_ids"])
    found = minimized(trainer_of(tiny_model, TAPER, tmp_path), batch)
    assert found == pytest.approx(TAPER.optimization.label_weight * float(loss), rel=1e-3)


def test_the_mean_that_scales_are_drawn_to_has_no_gradient() -> None:
    scale = torch.tensor([[10.0, 1.0, 3.0]])
    log_scale = scale.log().requires_grad_()
    scale_penalty(log_scale, torch.tensor([[True, False, False]]), torch.zeros(()), "spread").backward()
    torch.testing.assert_close(log_scale.grad, 2 / 3 * (scale - 2) * scale)


def test_gains_and_biases_of_norms_do_not_decay(tiny_model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """GPT-2's norms have names that tell nothing, and stand-ins are of no class that transformers knows."""
    trainer = trainer_of(tiny_model, SEQUENTIAL_AUX, tmp_path)
    assert trainer.model is not None
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    matrices = {name for name, weight in trainer.model.named_parameters() if weight.ndim == 2}
    assert decayed - {"lm_head.weight"} == matrices and len(matrices) == 10
