"""The end of a run: evaluate and prove the twin as saved, and write result, report and card."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from unnorm.calibration.limits import share_at_limit
from unnorm.calibration.scales import CALIBRATION_BLOCKS, collect_log_scales, scale_statistics
from unnorm.data import evenly_spaced
from unnorm.evaluation import Evaluation
from unnorm.evaluation.intervals import Interval
from unnorm.folding.checkpoint import load, load_sites, load_unfolded
from unnorm.json_text import finite, json_text
from unnorm.modeling.modeling_unnorm import limits_of
from unnorm.models.device import peak_memory_mb
from unnorm.models.tokenizer import begin_of_text
from unnorm.paths import write_text
from unnorm.proof.verify import check_modeling_file, check_twin
from unnorm.removal.blocks import text_digest, writes_text
from unnorm.removal.facts import Facts
from unnorm.removal.predecessor import history
from unnorm.removal.run import Run, evaluate_on_held_out
from unnorm.report.card import render_card
from unnorm.report.removal_page import ReportData, render_report
from unnorm.run_directory import (
    CARD,
    CHECKPOINTS,
    CONTROL,
    DATA,
    HELD_OUT,
    LOGS,
    METRICS,
    MODEL,
    REPORT,
    RESULT,
    finished_result,
    read_rows,
)
from unnorm.sites.find import norm_modules_and_idle
from unnorm.versions import versions

SAMPLES, PROMPT_TOKENS, SAMPLE_TOKENS = 4, 32, 48


def conclude(run: Run, facts: Facts, control: PreTrainedModel | None, started: float) -> dict[str, Any]:
    """Evaluate and prove the twin from its saved files; write result, report and card."""
    run.say("loading the twin as saved")
    twin = load(run.directory).to(run.plan.device)
    sites, constants = load_sites(run.directory)
    evaluations = {
        "original": evaluate_on_held_out(run, run.original, "original"),
        "lnfree": evaluate_on_held_out(run, twin, "twin"),
    }
    if control is not None:
        evaluations["control"] = evaluate_on_held_out(run, control, "control")
    at_limit = share_at_limit(twin, evenly_spaced(run.validation_blocks, CALIBRATION_BLOCKS))
    run.say("verifying")
    unfolded = load_unfolded(run.directory)
    checks = check_twin(twin.cpu(), unfolded, sites, begin_of_text(run.tokenizer))
    checks.append(check_modeling_file(run.directory / MODEL, twin))
    rows = history(run.directory)
    result = _result(run, evaluations, facts, rows, twin) | {"share_at_limit": at_limit}
    if (run.directory / RESULT).is_file():  # Only the control was added: how the twin was made stays.
        was = finished_result(run.directory)
        result |= {key: was[key] for key in ("plan", "versions", "peak_memory_mb", "earlier_seconds") if key in was}
    seconds = time.perf_counter() - started + facts.earlier_seconds
    result |= {"seconds": seconds, "verified": all(check.passed for check in checks)}
    result["failed_checks"] = [check.name for check in checks if not check.passed]
    result["fold_max_abs_error"] = next(check.value for check in checks if "float64" in check.name)
    data = ReportData(
        result=result,
        rows=rows,
        control_rows=[] if control is None else history(run.directory / CONTROL),
        control_steps=[] if control is None else read_rows(run.directory / CONTROL / METRICS),
        scales_before=scale_statistics(_log_scales(run, run.original)),
        # Where a norm was folded into its writer, the twin's site already gets what the norm would have given.
        scales_after=scale_statistics(_log_scales(run, unfolded.float().to(run.plan.device))),
        constants=constants,
        position_loss={name: list(evaluation.position_loss) for name, evaluation in evaluations.items()},
        samples=_samples(run, twin),
        checks=[check.to_json() for check in checks],
        comparison=evaluations["lnfree"].comparison,
    )
    write_text(run.directory / REPORT, render_report(data))
    write_text(run.directory / MODEL / CARD, render_card(result, sites, constants))
    write_text(run.directory / RESULT, json_text(result))
    may_get_a_control = control is None and run.plan.steps and run.config.twin is None
    if not (may_get_a_control and writes_text(run.config)):  # Else the control would need it.
        (run.directory / DATA / HELD_OUT).unlink(missing_ok=True)  # First: without it the rest counts as incomplete.
        shutil.rmtree(run.directory / DATA, ignore_errors=True)
    for trained in (run.directory, run.directory / CONTROL):
        _keep_logs(trained)
        shutil.rmtree(trained / CHECKPOINTS, ignore_errors=True)
    return finite(result)


def _keep_logs(directory: Path) -> None:
    """Move logs that trackers such as TensorBoard wrote beside the checkpoints, which are about to be deleted."""
    for log in sorted((directory / CHECKPOINTS / LOGS).glob("*")):
        (directory / LOGS).mkdir(exist_ok=True)
        shutil.move(log, directory / LOGS / log.name)


def _log_scales(run: Run, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return collect_log_scales(model, run.sites, evenly_spaced(run.validation_blocks, CALIBRATION_BLOCKS))


def _samples(run: Run, twin: PreTrainedModel) -> list[dict[str, str]]:
    """Greedy continuations of held-out text by both models."""
    length = min(PROMPT_TOKENS, run.plan.context // 2)
    prompts = torch.tensor(evenly_spaced(run.validation_blocks, SAMPLES)["input_ids"])[:, :length]
    texts = {"prompt": run.tokenizer.batch_decode(prompts)}
    for name, model in (("original", run.original.cpu()), ("lnfree", twin)):
        with _generating_plainly(model):
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=min(SAMPLE_TOKENS, run.plan.context - length),
                do_sample=False,
                pad_token_id=run.tokenizer.eos_token_id,
                output_attentions=False,
                output_hidden_states=False,
            )
        texts[name] = run.tokenizer.batch_decode(out[:, length:])
    return [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)]


@contextmanager
def _generating_plainly(model: PreTrainedModel) -> Iterator[None]:
    """Suspend the model's own generation config, which may ask for beams, several answers or other return types."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def _result(
    run: Run,
    evaluations: dict[str, Evaluation],
    facts: Facts,
    rows: list[dict[str, Any]],
    twin: PreTrainedModel,
) -> dict[str, Any]:
    original, lnfree, control = (evaluations.get(name) for name in ("original", "lnfree", "control"))
    assert original is not None and lnfree is not None
    left, idle = norm_modules_and_idle(twin)
    trained = rows[-1] if rows else {"tokens": 0, "tokens_per_second": 0.0, "seconds": 0.0}
    return {
        "model": run.config.model,
        "data": run.config.to_saved()["data"],
        "self_share": run.config.self_share,
        "held_out": run.held_out.words,
        "division": run.held_out.division,
        "recipe": run.config.recipe,
        "teacher_loss": original.loss,
        "teacher_loss_ci": _ends(original.loss_ci),
        "lnfree_loss": lnfree.loss,
        "lnfree_loss_ci": _ends(lnfree.loss_ci),
        "loss_increase_ci": _ends(lnfree.difference_ci),
        "interval_over": lnfree.interval_over,
        "control_loss": None if control is None else control.loss,
        "control_loss_ci": None if control is None else _ends(control.loss_ci),
        "gap": None if control is None else lnfree.loss - control.loss,
        "kl": lnfree.kl,
        "jsd": lnfree.jsd,
        "top1_agreement": lnfree.top1_agreement,
        "top5_agreement": lnfree.top5_agreement,
        "validation_blocks": lnfree.blocks,
        "overflowed_blocks": lnfree.overflowed_blocks,
        "limited_neurons": sum(len(limit) for limit in limits_of(twin).values()),
        "lnfree_loss_elsewhere": lnfree.loss_elsewhere,
        "kl_elsewhere": lnfree.kl_elsewhere,
        "control_kl": None if control is None else control.kl,
        **facts.to_json(),
        "tokens": trained["tokens"],
        "text_tokens": len(run.train_blocks) * run.plan.context + facts.earlier_text_tokens,
        "text_sha256": text_digest(run),
        "original_sha256": run.weights,
        "training_seconds": trained["seconds"],
        "tokens_per_second": trained["tokens_per_second"],
        "waited_steps": trained.get("waited", 0),
        "set_backs": trained.get("set_back", 0),
        "validation_tokens": lnfree.tokens,
        "peak_memory_mb": peak_memory_mb(run.plan.device),
        "sites": len(run.sites),
        "norm_modules_left": len(left),
        "idle_norms": idle,
        "seed": run.config.seed,
        "twin": None if run.config.twin is None else str(run.config.twin),
        "directory": str(run.directory),
        "plan": run.plan.model_dump() | {"cuda_graph": run.plan.records_steps},
        "versions": versions() | {"python": sys.version.split()[0]},
    }


def _ends(interval: Interval | None) -> list[float] | None:
    """An interval as `result.json` stores it."""
    return None if interval is None else list(interval)
