"""The loop around the steps: batches, constants, trackers, and what a run says where it can't go on."""

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
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
from tests.conftest import stdlib_text
from tests.running import SETTINGS
from unnorm.evaluation import evaluate_model
from unnorm.models.running import copy_model
from unnorm.run_directory import read_rows
from unnorm.runs import config
from unnorm.runs.plan import Plan
from unnorm.sites.find import find_sites
from unnorm.taper.norms import TokenMask
from unnorm.taper.recipes import RECIPES, RecipeName
from unnorm.taper.schedule import sequential, taper
from unnorm.taper.stand_ins import install
from unnorm.training import callbacks, distillation, loop
from unnorm.training.callbacks import (
    QUICK_EVALUATIONS,
    Removal,
    ScheduleCallback,
)
from unnorm.training.distillation import DistillationTrainer
from unnorm.training.losses import distillation_losses

PLAN = Plan(
    device="cpu", bfloat16=False, compile=False, cuda_graph=False, processes=1, lr=1e-3,
    tokens=48, context=16, batch_size=2, micro_batch=2, steps=1,
)  # fmt: skip


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


@pytest.mark.parametrize(("recipe", "of_twin"), [("taper", 0.0), ("sequential", 0.1), ("tapernorm", 0.1)])
def test_labels_are_learned_with_the_models_dropout_and_the_original_without(
    recipe: RecipeName, of_twin: float, tiny_model_dir: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the published recipes and their controls GPT-2 has its dropout; KL is that of the function itself."""
    seen: dict[bool, set[float]] = {True: set(), False: set()}
    compute_loss = DistillationTrainer.compute_loss

    def watched(self: Any, model: GPT2LMHeadModel, *inputs: Any, **more: Any) -> Any:
        assert model.training
        dropout = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        seen[self.removal is None] |= dropout
        return compute_loss(self, model, *inputs, **more)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    unnorm.remove(
        str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", recipe=recipe, control=True, **SETTINGS
    )
    assert seen == {False: {of_twin}, True: {0.1}}
    assert unnorm.load(tmp_path / "run").config.resid_pdrop == 0.1


def test_a_single_step_has_a_learning_rate(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """As a control's of few tokens; it would be the original."""
    options: dict[str, Any] = {"tokens": 1024, "context": 64, "control": True, "device": "cpu"}
    result = unnorm.remove(str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", **options)
    assert result["control_kl"] > 1e-6


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
    monkeypatch.setattr(loop, "LOG_LINES", 5)
    settings = {"data": str(text_file), "tokens": 10_000, "device": "cpu", "batch_size": 8, "report_to": ["abacus"]}
    unnorm.remove(model=str(tiny_model_dir), out=tmp_path / "run", **settings)
    all_rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in all_rows if row["kind"] == "train"]
    measured = ["loss", "kl", "grad_norm"]
    assert [[row[key] for key in measured] for row in rows] == [
        [logs[key] for key in measured] for logs in seen if "learning_rate" in logs
    ]
    of_lines = torch.stack(steps).view(5, 4, 3).sum(1)
    means = of_lines[:, :2] / of_lines[:, 2:]
    torch.testing.assert_close(torch.tensor([[row["loss"], row["kl"]] for row in rows]), means)
    assert rows[-1]["kl"] > 0
    assert all(0 < row["grad_norm"] < math.inf for row in rows)
    assert [logs["alpha"] for logs in seen if "alpha" in logs] == [row["alpha"] for row in rows]
    evaluated = [row for row in all_rows if row["kind"] == "validation"]
    assert [logs["eval_kl"] for logs in seen if "eval_kl" in logs] == [row["kl"] for row in evaluated]


def test_a_quick_evaluation_is_an_evaluation_of_few_blocks(
    batch: dict[str, torch.Tensor], tiny_model: PreTrainedModel
) -> None:
    student = copy_model(tiny_model).train()
    with torch.no_grad():
        student.get_output_embeddings().weight *= 1.5
    blocks = Dataset.from_dict({"input_ids": [*batch["input_ids"].tolist(), [3] * 16]})
    found = loop.quick_evaluation(student, tiny_model, blocks, PLAN)
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
    with pytest.raises(unnorm.UnnormError, match=r"abacus failed: No key\. Fix that and continue with --resume"):
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
        r"waited for KL to fall in [1-9]\d* steps, and went back \d+ times.* half the budget of 1e-06", str(error.value)
    )
    assert "--kl-budget" in str(error.value)
    assert not (tmp_path / "model").exists()


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
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--micro-batch"),
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


@pytest.mark.parametrize("name", get_args(RecipeName))
def test_the_optimizer_is_set_as_the_recipe_says(name: RecipeName, tiny_model: GPT2LMHeadModel, tmp_path: Path) -> None:
    plan, recipe = PLAN.model_copy(update={"steps": 100}), RECIPES[name].optimization
    arguments: TrainingArguments = loop._arguments(tiny_model, recipe, plan, tmp_path, 0, [])
    assert (arguments.adam_beta1, arguments.adam_beta2) == recipe.betas
    assert (arguments.weight_decay, arguments.learning_rate) == (recipe.weight_decay, plan.lr)
    assert (arguments.lr_scheduler_kwargs or {}).get("min_lr_rate", 0.0) == recipe.least_lr
    assert arguments.warmup_steps == math.ceil(recipe.warmup * plan.steps)


def test_a_run_that_ends_early_is_measured_where_it_ends(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "LEAST_PATIENCE", 7)
    monkeypatch.setattr(callbacks, "PATIENCE", 0.0)
    options = SETTINGS | {"data": text_file, "out": tmp_path / "run", "tokens": 200 * 512, "lr": 1e-9, "control": True}
    result = unnorm.remove(tiny_model_dir, **options)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "validation" and rows[-1]["step"] < 200
    assert result["tokens"] == rows[-1]["tokens"] == rows[-1]["step"] * 512 and result["verified"]
    assert rows[-1]["step"] % (200 // QUICK_EVALUATIONS)  # Not where one would have been measured in any case.
    of_control = read_rows(tmp_path / "run" / "control" / "metrics.jsonl")
    assert of_control[-1]["tokens"] == pytest.approx(result["tokens"], rel=0.04)


@pytest.mark.parametrize("passes", [1.1, 1.5, 1.8, 2.5])
def test_text_that_is_gone_over_again_keeps_its_mixture(passes: float) -> None:
    blocks = Dataset.from_dict({"stress": [False] * 80 + [True] * 20})
    again = loop._as_many(blocks, round(100 * passes))["stress"]
    assert sum(again) == pytest.approx(0.2 * len(again), abs=1)


def test_parameters_that_text_does_not_reach_are_noticed(tiny_model: GPT2LMHeadModel) -> None:
    model = copy_model(tiny_model).train()
    assert not loop.leaves_out_parameters(model)
    model.idle = torch.nn.Linear(2, 2)
    assert loop.leaves_out_parameters(model)
    assert model.training and all(p.grad is None for p in model.parameters())
