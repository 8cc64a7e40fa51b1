"""The guard, and what the training loop does with a step that must not be applied."""

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    GPT2LMHeadModel,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import integration_utils

import unnorm
from tests.conftest import SETTINGS, VOCAB, Saved, ctrl_c_at, stdlib_text
from unnorm import config, losses
from unnorm.errors import RunInterruptedError
from unnorm.evaluation import evaluate_model
from unnorm.losses import distillation_losses, next_token_loss, scale_penalty
from unnorm.models import copy_model, without_dropout
from unnorm.norms import TokenMask, log_scale_of
from unnorm.plan import Plan
from unnorm.recipes import RECIPES, SEQUENTIAL_AUX, TAPER, TAPERNORM, Recipe, RecipeName
from unnorm.removal import start
from unnorm.residual import recorded
from unnorm.schedule import FidelityController, sequential, taper
from unnorm.sites import find_sites
from unnorm.stand_ins import install
from unnorm.training import distillation, run
from unnorm.training.callbacks import (
    LEAST_PATIENCE,
    MOST_BAD_STEPS,
    PATIENCE,
    RESTORE_AFTER,
    GuardCallback,
    Removal,
    ScheduleCallback,
)
from unnorm.training.distillation import DistillationTrainer
from unnorm.training.first_tokens import LEARNED, FirstTokens

PLAN = Plan(
    device="cpu", bfloat16=False, compile=False, cuda_graph=False, processes=1, lr=1e-3,
    tokens=48, context=16, batch_size=2, micro_batch=2, steps=1,
)  # fmt: skip


def step(guard: GuardCallback, model: nn.Linear, gradient: float, tmp_path: Path) -> TrainerControl:
    """One step as the Trainer takes it: the guard looks at the gradient, then SGD with learning rate 1."""
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=1), TrainerControl()
    state.global_step = 1
    model.weight.grad = torch.full((1, 1), gradient)
    guard.on_pre_optimizer_step(arguments, state, control, model=model)
    if model.weight.grad is not None:
        model.weight.data -= model.weight.grad
    guard.on_step_end(arguments, state, control, model=model)
    return control


def guarded(tmp_path: Path) -> tuple[GuardCallback, nn.Linear]:
    guard, model = GuardCallback(), nn.Linear(1, 1, bias=False)
    guard.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=model)
    return guard, model


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_guard_refuses_bad_steps_only(bad: float, tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    for gradient in (1e-9, 1e-3, 0.5, 30.0):
        step(guard, model, gradient, tmp_path)
        assert model.weight.grad is not None
        assert float(model.weight.grad) == pytest.approx(min(gradient, guard.CLIP), rel=1e-4)
    before = model.weight.item()
    control = step(guard, model, bad, tmp_path)
    assert model.weight.item() == before
    assert guard.skipped == 1
    assert not control.should_training_stop


def test_guard_gives_up_after_many_bad_steps_in_a_row(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    stops = [step(guard, model, math.nan, tmp_path).should_training_stop for _ in range(MOST_BAD_STEPS)]
    assert stops == [False] * (MOST_BAD_STEPS - 1) + [True]


def test_guard_brings_the_last_good_weights_back(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    step(guard, model, 0.5, tmp_path)
    good = model.weight.item()
    step(guard, model, 0.5, tmp_path)  # At those weights its gradient was sound; what it makes of them may not be.
    model.weight.data += 100  # Weights at which no gradient is finite any more.
    for _ in range(RESTORE_AFTER):
        assert model.weight.item() != good
        step(guard, model, math.nan, tmp_path)
    assert model.weight.item() == good
    assert guard.restored == 1


def test_guard_brings_the_last_good_constants_back(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    model.register_buffer("log_constant", torch.zeros(2))
    step(guard, model, 0.5, tmp_path)
    model.log_constant += 9
    for _ in range(RESTORE_AFTER):
        step(guard, model, math.nan, tmp_path)
    assert model.log_constant.tolist() == [0, 0]


@pytest.mark.parametrize("batch_size", [5, 16])
def test_text_that_is_gone_over_again_fills_every_step(
    batch_size: int, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block as often as any other, give or take one, and the tokens are those that are said."""
    (tmp_path / "a.txt").write_text(stdlib_text("os")[:9000])
    batches: list[torch.Tensor] = []
    compute_loss = DistillationTrainer.compute_loss

    def counted(self: Any, model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
        batches.append(inputs["input_ids"])
        return compute_loss(self, model, inputs, **more)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", counted)
    result = unnorm.remove(
        str(tiny_model_dir), data=str(tmp_path / "a.txt"), tokens=20 * 32 * batch_size, batch_size=batch_size,
        context=32, out=tmp_path / "run", device="cpu", recipe="tapernorm", stress_share=0,
    )  # fmt: skip
    assert [len(batch) for batch in batches] == [batch_size] * 20
    assert result["tokens"] == torch.cat(batches).numel()
    _, times = torch.cat(batches).unique(dim=0, return_counts=True)
    assert times.max() - times.min() <= 1


def test_a_single_step_has_a_learning_rate(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """As a control's of few tokens; it would be the original."""
    options: dict[str, Any] = {"tokens": 1024, "context": 64, "control": True, "device": "cpu"}
    result = unnorm.remove(str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", **options)
    assert result["control_kl"] > 1e-6


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


def test_nothing_is_saved_while_steps_are_refused(tmp_path: Path) -> None:
    """What the step before them made of the weights may be the reason."""
    guard, model = guarded(tmp_path)
    arguments, state = TrainingArguments(str(tmp_path)), TrainerState(max_steps=100)
    for gradient, saved in ((0.5, True), (math.nan, False), (math.nan, False), (0.5, True)):
        step(guard, model, gradient, tmp_path)
        guard.on_step_end(arguments, state, control := TrainerControl(should_save=True), model=model)
        assert control.should_save is saved


def breaking(step: int, broken: Path) -> Any:
    """An interrupt callback that makes one update break the model, once; the file `broken` is there from then on."""

    class Breaks(run.InterruptCallback):
        def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
            if state.global_step + 1 == step and not broken.exists():
                broken.touch()
                with torch.no_grad():
                    more["model"].transformer.h[1].mlp.c_proj.weight *= 1e30

    return Breaks


@pytest.mark.parametrize("broken_at", [9, 10, 12])
def test_an_update_that_breaks_the_model_is_taken_back(
    broken_at: int, tiny_model: PreTrainedModel, saved: Saved, tmp_path: Path
) -> None:
    """Whenever it comes: on steps at which weights are remembered or saved as well."""
    text = stdlib_text("os")
    (tmp_path / "a.txt").write_text(text)
    saved(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "InterruptCallback", breaking(broken_at, tmp_path / "broken"))
        result = unnorm.remove(
            str(tmp_path / "model"), data=str(tmp_path / "a.txt"), tokens=30 * 64, batch_size=1, context=64,
            out=tmp_path / "run", kl_budget=100, device="cpu", dtype="float32", recipe="tapernorm",
        )  # fmt: skip
    assert (tmp_path / "broken").exists()
    assert result["skipped_steps"] == RESTORE_AFTER and result["verified"]


def test_a_resumed_guard_goes_on_as_it_was(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    guard.controller = FidelityController(end=0.4)
    for gradient in (0.1, 0.2, math.nan):
        step(guard, model, gradient, tmp_path)
    state = TrainerState(stateful_callbacks=[guard])
    state.global_step = 3
    again = GuardCallback(FidelityController(end=0.4))
    again.on_train_begin(TrainingArguments(str(tmp_path)), state, TrainerControl(), model=model)
    assert again.controller == guard.controller
    assert (again.norms, again.skipped, again.in_a_row) == (guard.norms, 1, 1)


@pytest.mark.parametrize(("steps", "most"), [(20, LEAST_PATIENCE), (1000, int(1000 * PATIENCE))])
@pytest.mark.parametrize("end", [0.4, 0.0])
def test_guard_ends_healing_that_gains_nothing_more(end: float, steps: int, most: int, tmp_path: Path) -> None:
    controller = FidelityController(end=end, position=1.0)
    guard, model = GuardCallback(controller, lambda: 0.1), nn.Linear(1, 1)
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=steps), TrainerControl()
    for _ in range(most + 1):  # The first of them is the best.
        guard.on_step_end(arguments, state, control, model=model)
        assert not control.should_training_stop
    guard.on_step_end(arguments, state, control, model=model)
    assert control.should_training_stop is (end > 0)


@pytest.mark.parametrize("end_of_text", [3, None])
def test_special_tokens_are_marked_until_their_times(end_of_text: int | None, tiny_model: GPT2LMHeadModel) -> None:
    model, token_mask = copy_model(tiny_model), TokenMask()
    sites = find_sites(model)
    schedule = sequential(sites, [])
    removal = Removal(install(model, sites, token_mask=token_mask), schedule, None, token_mask, end_of_text)
    callback = ScheduleCallback(removal, model)
    ids = torch.tensor([[5, 3, 7, 3], [3, 9, 4, 6]])
    first = torch.tensor([[True, False, False, False]] * 2)
    both = first if end_of_text is None else first | (ids == end_of_text)
    before = 1e-6
    for progress, expected in (
        (0.0, both),
        (schedule.special_end_of_text - before, both),
        (schedule.special_end_of_text, first),
        (schedule.special_position_0 - before, first),
        (schedule.special_position_0, None),
        (0.0, both),
    ):
        callback.apply(progress)
        model(input_ids=ids)
        torch.testing.assert_close(token_mask.mask, expected)
    callback.finish()
    model(input_ids=ids)
    assert token_mask.mask is None


def test_a_step_of_nan_is_not_applied(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    calls = 0

    def sometimes_nan(*args: Any) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += torch.is_grad_enabled()
        kl, *shown = distillation_losses(*args)
        return kl * (math.nan if torch.is_grad_enabled() and calls in (4, 5) else 1.0), *shown

    monkeypatch.setattr(distillation, "distillation_losses", sometimes_nan)
    result = unnorm.remove(
        model=str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", tokens=30_000, device="cpu", batch_size=8
    )
    assert (result["skipped_steps"], result["set_backs"]) == (2, 2)
    assert math.isfinite(result["lnfree_loss"])


def test_a_batch_that_overflows_on_the_way_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """As a massive activation does it: infinite scales in the forward pass, while constants are still estimated."""
    calls = 0

    def overflow(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return embedded * 1e30 if torch.is_grad_enabled() and calls in (4, 5) else embedded

    def with_overflows(*args: Any, **options: Any) -> PreTrainedModel:
        model = copy_model(*args, **options)
        model.get_input_embeddings().register_forward_hook(overflow)
        return model

    monkeypatch.setattr(start, "copy_model", with_overflows)
    result = unnorm.remove(
        model=str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", tokens=30_000, device="cpu", batch_size=8
    )
    assert result["skipped_steps"] == 2
    assert math.isfinite(result["lnfree_loss"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(math.isfinite(row.get("kl") or math.nan) for row in rows) > len(rows) / 2


def test_trackers_get_what_the_metrics_say(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means over the text of all steps since the line before; of stress blocks nothing is shown."""
    seen: list[dict[str, float]] = []
    steps: list[torch.Tensor] = []

    def remember(logits: Any, teacher_logits: Any, ids: Any, is_text: torch.Tensor, *more: Any) -> Any:
        minimized, kl, loss = distillation_losses(logits, teacher_logits, ids, is_text, *more)
        steps.append(torch.stack([loss, kl, torch.ones(())]) * is_text.sum())
        return minimized, kl, loss

    class Tracker(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "abacus", Tracker)
    monkeypatch.setattr(distillation, "distillation_losses", remember)
    monkeypatch.setattr(run, "LOG_LINES", 5)
    settings = {"data": str(text_file), "tokens": 10_000, "device": "cpu", "batch_size": 8, "report_to": ["abacus"]}
    unnorm.remove(model=str(tiny_model_dir), out=tmp_path / "run", **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    measured = ["loss", "kl", "grad_norm"]
    assert [[row[key] for key in measured] for row in rows] == [
        [logs[key] for key in measured] for logs in seen if "learning_rate" in logs
    ]
    of_lines = torch.stack(steps).view(5, 4, 3).sum(1)
    means = of_lines[:, :2] / of_lines[:, 2:]
    torch.testing.assert_close(torch.tensor([[row["loss"], row["kl"]] for row in rows]), means)
    assert rows[-1]["kl"] > 0
    assert all(0 < row["grad_norm"] < math.inf for row in rows)


def test_a_quick_evaluation_is_an_evaluation_of_few_blocks(
    batch: dict[str, torch.Tensor], tiny_model: PreTrainedModel
) -> None:
    student = copy_model(tiny_model).train()
    with torch.no_grad():
        student.get_output_embeddings().weight *= 1.5
    blocks = Dataset.from_dict({"input_ids": [*batch["input_ids"].tolist(), [3] * 16]})
    found = run.quick_evaluation(student, tiny_model, blocks, PLAN)
    expected = evaluate_model(student, blocks, tiny_model)
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert found["teacher_loss"] == pytest.approx(evaluate_model(tiny_model, blocks).loss, rel=1e-5)
    assert student.training


@pytest.mark.parametrize("asked", ["abacus", "all"])
def test_a_tracker_that_gives_up_leaves_a_run_to_resume(
    asked: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoKeyError(RuntimeError):
        __module__ = "abacus.errors"

    class Tracker(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            raise NoKeyError("No key.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "abacus", Tracker)
    monkeypatch.setattr(config, "get_available_reporting_integrations", lambda: ["abacus"])
    settings = {"data": str(text_file), "tokens": 10_000, "device": "cpu", "batch_size": 8, "report_to": [asked]}
    with pytest.raises(unnorm.UnnormError, match=r"abacus gave up: No key\. Go on with --resume"):
        unnorm.remove(model=str(tiny_model_dir), out=tmp_path / "run", **settings)
    assert unnorm.remove(out=tmp_path / "run", resume=True, report_to=["none"])["verified"]


def test_out_of_tokens_names_the_sites_that_are_still_norms(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        unnorm.UnnormError, match=r"5 sites are still norms: transformer\.h\.0\.ln_1 \(alpha 0\."
    ) as error:
        unnorm.remove(
            model=str(tiny_model_dir),
            data=str(text_file),
            out=tmp_path,
            tokens=10_000,
            device="cpu",
            batch_size=8,
            kl_budget=1e-6,
        )
    assert re.search(
        r"waited in [1-9]\d* steps, 1e-06 nats or more from the original, and went back \d+ times", str(error.value)
    )
    assert "--kl-budget" in str(error.value)
    assert not (tmp_path / "model").exists()


def always_nan(*arguments: Any) -> tuple[torch.Tensor, ...]:
    minimized, *shown = distillation_losses(*arguments)
    return minimized * math.nan, *shown


def test_divergence_ends_the_run_with_a_message(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(distillation, "distillation_losses", always_nan)
    with pytest.raises(unnorm.UnnormError, match="diverged"):
        unnorm.remove(
            model=str(tiny_model_dir), data=str(text_file), out=tmp_path, tokens=20_000, device="cpu", batch_size=8
        )


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
        removal=Removal(stand_ins, taper(sites), None, TokenMask(), end_of_text=0),
    )


def minimized(trainer: DistillationTrainer, inputs: dict[str, torch.Tensor]) -> float:
    assert trainer.model is not None
    with trainer.matching_reads(), without_dropout(trainer.model):
        loss = trainer.compute_loss(trainer.model, inputs)
    assert isinstance(loss, torch.Tensor)
    return float(loss.detach())


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "text": torch.ones(2, dtype=torch.bool)}


@pytest.mark.parametrize("gone", [False, True])
def test_what_is_minimized_is_the_sum_of_all_that_the_recipe_asks_for(
    gone: bool,
    batch: dict[str, torch.Tensor],
    tiny_model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First tokens are looked at, and runaways alone count as uneven, once the norms are gone."""

    def always(*numbers: float) -> Callable[..., Any]:
        tensors = torch.tensor(numbers).unbind()
        return lambda *_: tensors if len(tensors) > 1 else tensors[0]

    parts = {"distillation_losses": (2.0, 0.0, 0.0), "read_mismatch": (3.0,), "massive_unevenness": (5.0,)}
    for name, numbers in parts.items():
        monkeypatch.setattr(distillation, name, always(*numbers))
    monkeypatch.setattr(distillation, "unevenness", lambda *given: torch.tensor(0.7 if given[2:] else 0.11))
    monkeypatch.setattr(FirstTokens, "losses", always(0.13, 0.017))
    trainer = trainer_of(tiny_model, TAPER, tmp_path, bounded=True)
    for stand_in in trainer.stand_ins.values():
        stand_in.alpha.fill_(1.0 if gone else 0.5)
        stand_in.removed = gone
    weights = TAPER.optimization
    expected = 2 + 0.25 * weights.read_weight * 3
    if gone:
        trainer.learn_first_tokens(FirstTokens(VOCAB, 32, torch.device("cpu")))
        expected += weights.even_weight * 0.7 + LEARNED * (0.13 + weights.even_weight * 0.017)
        batch["first_tokens"] = torch.arange(16)[:, None]
    else:
        expected += weights.even_weight * 0.5**4 * 0.11 + weights.massive_even_weight * 5
    batch["read_share"] = torch.tensor(0.25)
    assert minimized(trainer, batch) == pytest.approx(expected)


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


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_moves_the_constants_as_far_in_however_many_micro_batches(
    accumulation: int, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    model = copy_model(tiny_model)
    sites = find_sites(model)
    stand_ins = install(model, sites)
    schedule = ScheduleCallback(Removal(stand_ins, taper(sites), None, TokenMask(), None), model)
    arguments = TrainingArguments(str(tmp_path), gradient_accumulation_steps=accumulation, use_cpu=True)
    schedule.on_train_begin(arguments, TrainerState(), TrainerControl())
    site = stand_ins[sites[0].name]
    x = torch.randn(2, 3, len(site.gain), generator=torch.Generator().manual_seed(0))
    scale = site.log_scale(x - x.mean(-1, keepdim=True)).mean()
    for _ in range(accumulation):
        site(x)
    torch.testing.assert_close(site.log_constant, (0.1 * scale).expand(2))


def test_after_a_step_all_processes_have_the_mean_of_their_constants(
    tiny_model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is made believe: its constants are 4 everywhere."""
    model = copy_model(tiny_model)
    sites = find_sites(model)
    stand_ins = install(model, sites)
    schedule = ScheduleCallback(Removal(stand_ins, taper(sites), None, TokenMask(), None), model)
    for number, stand_in in enumerate(stand_ins.values()):
        stand_in.log_constant.copy_(torch.tensor([number, -2.0]))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(4))
    schedule.on_step_end(arguments, TrainerState(), TrainerControl())
    constants = [stand_in.log_constant.tolist() for stand_in in stand_ins.values()]
    assert constants == [[(number + 4) / 2, 1.0] for number in range(5)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError("No space left on device"), "No space left.*--resume"),
        (torch.OutOfMemoryError(), "--micro-batch"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            "Free some space.*--resume",
        ),
    ],
)
def test_running_out_of_something_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    message: str,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(distillation.DistillationTrainer, "_save_checkpoint", fail)
    with pytest.raises(unnorm.UnnormError, match=message):
        unnorm.remove(model=str(tiny_model_dir), data=str(text_file), out=tmp_path, tokens=10_000, device="cpu")


def test_a_run_that_is_stopped_while_steps_are_refused_keeps_its_good_weights(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """What stood in the weights at that moment would be all that a resumed run goes on from."""

    class Stops(breaking(12, tmp_path / "broken")):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            if (tmp_path / "broken").exists() and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                signal.raise_signal(signal.SIGINT)

    options: dict[str, Any] = {
        "model": str(tiny_model_dir), "data": str(text_file), "tokens": 30 * 64, "batch_size": 1, "context": 64,
        "out": tmp_path / "run", "device": "cpu", "dtype": "float32", "recipe": "tapernorm",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "InterruptCallback", Stops)
        with pytest.raises(RunInterruptedError, match="nothing is lost"):
            unnorm.remove(**options)
    result = unnorm.remove(resume=True, out=tmp_path / "run")
    assert result["skipped_steps"] == RESTORE_AFTER and result["verified"]


def test_a_run_that_is_stopped_and_diverges_has_diverged(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(distillation, "distillation_losses", always_nan)
    options: dict[str, Any] = {**SETTINGS, "tokens": 30 * 512, "watch": ctrl_c_at(1)}
    with pytest.raises(unnorm.UnnormError, match="The run diverged"):
        unnorm.remove(str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", **options)


def test_a_stop_that_one_process_alone_heard_stops_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupt = run.InterruptCallback(guarded(tmp_path)[0])
    assert not interrupt.is_asked(torch.device("cpu"))
    monkeypatch.setattr("unnorm.processes.total", lambda value: value + 1)
    assert interrupt.is_asked(torch.device("cpu")) and interrupt.asked


def test_the_label_weight_of_the_recipe_is_in_force(
    batch: dict[str, torch.Tensor], tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    """With its norms on the model is its teacher: KL is 0, and what is minimized the next-token loss alone."""
    with torch.no_grad():
        loss = next_token_loss(tiny_model(input_ids=batch["input_ids"]).logits, batch["input_ids"])
    found = minimized(trainer_of(tiny_model, TAPER, tmp_path), batch)
    assert found == pytest.approx(TAPER.optimization.label_weight * float(loss), rel=1e-3)


@pytest.mark.parametrize("name", get_args(RecipeName))
def test_the_optimizer_is_set_as_the_recipe_says(name: RecipeName, tmp_path: Path) -> None:
    plan, recipe = PLAN.model_copy(update={"steps": 100}), RECIPES[name].optimization
    arguments: TrainingArguments = run._arguments(recipe, plan, tmp_path, 0, [])
    assert (arguments.adam_beta1, arguments.adam_beta2) == recipe.betas
    assert (arguments.weight_decay, arguments.learning_rate) == (recipe.weight_decay, plan.lr)
    assert (arguments.lr_scheduler_kwargs or {}).get("min_lr_rate", 0.0) == recipe.least_lr
    assert arguments.warmup_steps == math.ceil(recipe.warmup * plan.steps)


def test_signals_are_handled_as_before_once_a_run_ends(tmp_path: Path) -> None:
    interrupt = run.InterruptCallback(guarded(tmp_path)[0])
    before = signal.getsignal(signal.SIGINT)
    with interrupt.listening():
        assert signal.getsignal(signal.SIGINT) is not before
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # The second one stops at once.
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_mean_that_scales_are_drawn_to_has_no_gradient() -> None:
    scale = torch.tensor([[10.0, 1.0, 3.0]])
    log_scale = scale.log().requires_grad_()
    scale_penalty(log_scale, torch.tensor([[True, False, False]]), torch.zeros(()), "spread").backward()
    torch.testing.assert_close(log_scale.grad, 2 / 3 * (scale - 2) * scale)
