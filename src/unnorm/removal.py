"""`unnorm remove`: the whole path, from a pretrained model to its LN-free twin with proof, numbers and report."""

import json
import math
import resource
import shutil
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from unnorm import processes
from unnorm.calibrate import CALIBRATION_BLOCKS, collect_log_scales, scale_statistics, set_constants, spread
from unnorm.checkpoint import (
    MODEL,
    UNFOLDED,
    load,
    load_sites,
    load_unfolded,
    save_folded,
    save_model,
    save_sites,
    unfolded_weights,
    write_text,
)
from unnorm.config import CONFIG_FILE, Plan, RemoveConfig, choose_device, control_plan, make_plan, read_config_file
from unnorm.data import OWN_TEXT, Blocks, as_dataset, build_blocks, own_text, random_starts, stress_blocks
from unnorm.equalize import equalize_embedding
from unnorm.errors import UnnormError
from unnorm.evaluation import EVALUATION_SPREAD, EVALUATION_TOKENS, Evaluation, evaluate_model
from unnorm.fold import install, prove_sites, uninstall_paths
from unnorm.json_text import json_text
from unnorm.models import copy_model, disable_dropout, fuse_activations, load_original
from unnorm.norms import TaperedNorm, TokenMask
from unnorm.proof import check_twin
from unnorm.report import ReportData, render_card, render_report
from unnorm.schedule import FidelityController, Schedule, sequential, taper, tapernorm
from unnorm.sites import NormSite, find_sites, norm_modules, vocabulary_size
from unnorm.training import Outcome, Removal, Watcher, train

RESULT, REPORT, CONTROL, DATA, CHECKPOINTS = "result.json", "report.html", "control", "data", "checkpoints"
SAMPLES, PROMPT_TOKENS, SAMPLE_TOKENS = 4, 32, 48
TRAINING_SPREAD = 4
"""Times as much training text is read, and thinned evenly: neighbouring blocks come from one document and say less."""
DISK_COPIES = 8
"""Sizes of the model in float32 that a run may write: a checkpoint with optimizer state, the models it leaves."""

_MAY_CHANGE_ON_RESUME = {"device", "compile", "report_to", "out"}


class RunInterruptedError(UnnormError):
    """The run was stopped and can be resumed; the message says how."""


@dataclass(frozen=True)
class _Run:
    """What all stages of one run share."""

    directory: Path
    config: RemoveConfig
    plan: Plan
    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: list[NormSite]
    train_blocks: Dataset
    stress_blocks: Dataset | None
    validation_blocks: Dataset
    held_out: str
    watch: Watcher

    def say(self, text: str, tokens: int | None = None) -> None:
        self.watch({"kind": "phase", "text": text, "tokens": tokens})


def remove(*, resume: bool = False, watch: Watcher | None = None, **options: Any) -> dict[str, Any]:
    """Remove every norm of a model and leave a run directory with its LN-free twin.

    Args:
        resume: go on with the run in `out` from its last checkpoint, with the settings saved there.
        watch: called with each row of metrics, and with `{"kind": "phase", "text": …}` as the run goes on.
        **options: fields of `RemoveConfig`, such as `model`, `data`, `tokens`, `out` and `recipe`.

    Returns:
        What stands in `result.json`, on every process. Losses in nats per predicted token, KL in nats per token.

    Raises:
        UnnormError: the input can't be used, or the run diverged.
        RunInterruptedError: it was stopped by Ctrl-C or SIGTERM.
    """
    started = time.perf_counter()
    config = RemoveConfig.create(**(_saved_options(options) if resume else options))
    processes.join(choose_device(config.device))
    directory = processes.agree(lambda: _open_directory(config, resume))
    run = _prepare(config, directory, watch if watch is not None and processes.is_main() else _ignore)
    naive, outcome = _train_removal(run)
    control = _train_control(run) if config.control and run.plan.steps else None
    return processes.agree(lambda: _conclude(run, naive, outcome, control, started))


def _ignore(row: dict[str, Any], /) -> None:
    pass


def _saved_options(options: dict[str, Any]) -> dict[str, Any]:
    """The saved settings of the run to resume; those named again must be the same."""
    if options.get("out") is None:
        raise UnnormError("Which run? Name its directory: --resume --out DIR.")
    directory = Path(options["out"]).expanduser()
    if (directory / RESULT).exists():
        raise UnnormError(f"The run in '{directory}' is finished: there is nothing to resume.")
    if not (directory / CONFIG_FILE).is_file():
        raise UnnormError(f"'{directory}' holds no run to resume: there is no {CONFIG_FILE} in it.")
    saved = read_config_file(directory / CONFIG_FILE)
    asked = RemoveConfig.create(**{**saved, **options}).model_dump(mode="json")
    changed = [key for key in options if key not in _MAY_CHANGE_ON_RESUME and asked[key] != saved.get(key)]
    if changed:
        was = ", ".join(f"{key} {saved.get(key)}" for key in changed)
        raise UnnormError(f"The run in '{directory}' was started with {was}. Leave that out, or start a new run.")
    return {**saved, **{key: options[key] for key in options if key in _MAY_CHANGE_ON_RESUME}}


def _open_directory(config: RemoveConfig, resume: bool) -> Path:
    directory = _unused_name(f"unnorm-{Path(config.model).name}") if config.out is None else config.out.expanduser()
    if not resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UnnormError(f"'{directory}' is not empty. Choose another --out, or go on with the run in it: --resume.")
    above = next(path for path in directory.absolute().parents if path.exists())
    if not above.is_dir():
        raise UnnormError(f"'{directory}' can't be made: '{above}' is a file. Choose another --out.")
    return directory


def _unused_name(name: str) -> Path:
    numbered = (Path(name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in numbered if not path.exists())


def _prepare(config: RemoveConfig, directory: Path, watch: Watcher) -> _Run:
    """Load and check everything before anything is written or trained."""
    watch({"kind": "phase", "text": f"loading {config.model}"})
    model, tokenizer = load_original(config.model, config.trust_remote_code)
    sites = find_sites(model, config.in_place, config.keep)
    prove_sites(model, sites)
    plan = make_plan(config, model, processes.count())
    _check_disk(directory, model)
    set_seed(config.seed)
    model.to(plan.device).requires_grad_(False)
    disable_dropout(model)
    fuse_activations(model)
    held_out = processes.agree(lambda: _write_blocks(config, plan, model, tokenizer, directory, watch))
    train_blocks, validation_blocks = (load_from_disk(str(directory / DATA / side)) for side in ("train", "validation"))
    stress = directory / DATA / "stress"
    return _Run(
        directory,
        config,
        plan,
        model,
        tokenizer,
        sites,
        train_blocks,
        load_from_disk(str(stress)) if stress.is_dir() else None,
        validation_blocks,
        held_out,
        watch,
    )


def _check_disk(directory: Path, model: PreTrainedModel) -> None:
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    needed = DISK_COPIES * 4 * sum(p.numel() for p in model.parameters())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UnnormError(
            f"Not enough disk: the run may need {needed / 1e9:.1f} GB and '{parent}' has {free / 1e9:.1f} GB free. "
            "Name a roomier place with --out."
        )


def _write_blocks(
    config: RemoveConfig,
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    watch: Watcher,
) -> str:
    """Settings and packed blocks into the run directory, unless they are there; returns how validation was held out."""
    note = directory / DATA / "held_out.txt"
    if note.is_file():
        return note.read_text()
    train_blocks = max(CALIBRATION_BLOCKS, math.ceil(plan.tokens / plan.context))
    blocks = _read_blocks(config, plan, model, tokenizer, train_blocks, watch)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        config.save(directory / CONFIG_FILE)
        train = spread(blocks.train, train_blocks)
        train.save_to_disk(str(directory / DATA / "train"))
        stress = stress_blocks(
            np.asarray(train["input_ids"]),
            tokenizer,
            vocabulary_size(model),
            round(config.stress_share * train_blocks),
            np.random.default_rng(config.seed),
        )
        if len(stress):
            as_dataset(stress).save_to_disk(str(directory / DATA / "stress"))
        validation = spread(blocks.validation, math.ceil(EVALUATION_TOKENS / plan.context))
        validation.save_to_disk(str(directory / DATA / "validation"))
        note.write_text(blocks.held_out)
    except OSError as error:
        raise UnnormError(f"Could not write to '{directory}': {error}.") from error
    return blocks.held_out


def _read_blocks(
    config: RemoveConfig,
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: int,
    watch: Watcher,
) -> Blocks:
    """Text from the source, more than is needed so that it can be spread over more of it; or the original's own."""

    def say(text: str) -> None:
        watch({"kind": "phase", "text": text})

    validation_blocks = math.ceil(EVALUATION_TOKENS / plan.context)
    if config.data == OWN_TEXT:
        return own_text(model, tokenizer, plan.context, train_blocks, validation_blocks, say)
    say(f"reading {config.data}")
    return build_blocks(
        config.data,
        tokenizer,
        vocabulary_size(model),
        plan.context,
        train_blocks=TRAINING_SPREAD * train_blocks,
        validation_blocks=EVALUATION_SPREAD * validation_blocks,
        text_field=config.text_field,
        split=config.split,
    )


def _train_removal(run: _Run) -> tuple[dict[str, float], Outcome | None]:
    """Calibrate, measure naive removal, train, fold and save; only what is not done yet."""
    note = run.directory / DATA / "naive.json"
    if note.is_file() and (run.directory / MODEL).is_dir():
        return json.loads(note.read_text()), None
    student = copy_model(run.original, share=not run.plan.steps)
    disable_dropout(student)
    fuse_activations(student)
    token_mask = TokenMask()
    stand_ins = install(
        student,
        run.sites,
        split_paths=run.config.recipe.startswith("sequential"),
        token_mask=token_mask,
        interpolation="linear" if run.config.recipe == "tapernorm" else "log",
    )
    run.say("calibrating")
    calibration = spread(run.train_blocks, CALIBRATION_BLOCKS)
    set_constants(stand_ins, collect_log_scales(student, run.sites, calibration), run.config.estimator)
    naive = _naive_removal(run, student, stand_ins)
    outcome = None
    if run.plan.steps and run.config.recipe == "taper":
        equalize_embedding(student, run.original, run.sites, stand_ins, calibration, run.config.estimator)
    if run.plan.steps:
        run.say(f"training: {run.plan.steps} steps of {run.plan.step_tokens:,} tokens", run.plan.training_tokens)
        schedule = _lay_out(run, stand_ins)
        controller = FidelityController(run.config.kl_budget, schedule.end) if run.config.recipe == "taper" else None
        removal = Removal(stand_ins, schedule, controller, token_mask, run.tokenizer.eos_token_id)
        outcome = _train(run, student, removal, run.directory)
    for stand_in in stand_ins.values():
        stand_in.removed = True
    processes.agree(lambda: _fold_and_save(run, student, naive))
    return naive, outcome


def _naive_removal(run: _Run, student: PreTrainedModel, stand_ins: dict[str, TaperedNorm]) -> dict[str, float]:
    """Loss and KL with every norm replaced by its calibrated constant, before any training."""
    run.say("measuring naive removal")
    for stand_in in stand_ins.values():
        stand_in.removed = True
    measured = _evaluate(run, student, "naive removal")
    for stand_in in stand_ins.values():
        stand_in.removed = False
    if not math.isfinite(measured.loss):
        run.say("without its norms and without training the model overflows: its loss is not a number")
    return {"loss": measured.loss, "kl": float(measured.kl or 0.0)}


def _lay_out(run: _Run, stand_ins: dict[str, TaperedNorm]) -> Schedule:
    if run.config.recipe == "taper":
        return taper(run.sites)
    if run.config.recipe == "tapernorm":
        return tapernorm(run.sites)
    return sequential(run.sites, [name for name, stand_in in stand_ins.items() if len(stand_in.alpha) == 2])


def _train(run: _Run, model: PreTrainedModel, removal: Removal | None, directory: Path) -> Outcome:
    directory.mkdir(exist_ok=True)
    set_seed(run.config.seed)
    outcome = train(
        model=model.requires_grad_(True),
        teacher=run.original,
        removal=removal,
        recipe=run.config.recipe,
        plan=run.plan,
        train_blocks=run.train_blocks if removal is None else _with_stress(run),
        validation_blocks=run.validation_blocks,
        directory=directory,
        seed=run.config.seed,
        watch=run.watch,
        report_to=run.config.report_to,
    )
    if outcome.interrupted:
        raise RunInterruptedError(
            f"Stopped at step {outcome.steps} of {run.plan.steps}; nothing is lost. Go on with: "
            f"unnorm remove --resume --out {run.directory}"
        )
    if outcome.diverged:
        raise UnnormError(
            f"The run diverged: {outcome.skipped_steps} steps had gradients that were not finite or exploded. "
            f"The last checkpoint is in '{directory / CHECKPOINTS}'. Try a lower --lr or more --tokens."
        )
    if outcome.unfinished:
        sites = ", ".join(f"{name} (alpha {alpha:.2f})" for name, alpha in outcome.unfinished.items())
        raise UnnormError(
            f"Out of tokens after {outcome.tokens:,}, and {len(outcome.unfinished)} sites are still norms: {sites}. "
            f"Going on would have taken the model further than {run.config.kl_budget} nats from the original. "
            f"The last checkpoint is in '{directory / CHECKPOINTS}'. Give it more --tokens or a larger --kl-budget."
        )
    return outcome


def _with_stress(run: _Run) -> Dataset:
    """Training text with its share of stress blocks in place of as many others, for recipes that distil."""
    if run.config.recipe != "taper" or run.stress_blocks is None:
        return run.train_blocks
    kept = spread(run.train_blocks, max(1, len(run.train_blocks) - len(run.stress_blocks)))
    vocab_size = vocabulary_size(run.original)
    generator = np.random.default_rng(run.config.seed)
    text = as_dataset(random_starts(np.asarray(kept["input_ids"]), run.tokenizer, vocab_size, generator))
    parts = ((text, False), (run.stress_blocks, True))
    return concatenate_datasets([part.add_column("stress", [is_stress] * len(part)) for part, is_stress in parts])


def _fold_and_save(run: _Run, student: PreTrainedModel, naive: dict[str, float]) -> None:
    run.say("folding")
    uninstall_paths(student)
    student.eval()
    constants = {site.name: student.get_submodule(site.name).constant for site in run.sites}
    save_model(unfolded_weights(student, run.original, run.sites), run.tokenizer, run.directory / UNFOLDED)
    save_sites(run.directory, run.sites, constants)
    write_text(run.directory / DATA / "naive.json", json.dumps(naive))
    save_folded(student, run.sites, run.tokenizer, run.directory / MODEL)


def _train_control(run: _Run) -> PreTrainedModel:
    directory = run.directory / CONTROL
    control = copy_model(run.original)
    disable_dropout(control)
    fuse_activations(control)
    if not (directory / "model.safetensors").is_file():
        run.say("training the control", run.plan.training_tokens)
        _train(replace(run, plan=control_plan(run.plan)), control, None, directory)
        processes.agree(lambda: save_model(control, run.tokenizer, directory))
    return load(directory).to(run.plan.device)


def _conclude(
    run: _Run, naive: dict[str, float], outcome: Outcome | None, control: PreTrainedModel | None, started: float
) -> dict[str, Any]:
    """Measure and prove what was saved, from the files; write result and report."""
    run.say("evaluating")
    twin = load(run.directory).to(run.plan.device)
    sites, constants = load_sites(run.directory)
    evaluations = {"original": _evaluate(run, run.original, "original"), "lnfree": _evaluate(run, twin, "LN-free")}
    if control is not None:
        evaluations["control"] = _evaluate(run, control, "control")
    run.say("verifying")
    checks = check_twin(twin.cpu(), load_unfolded(run.directory), sites)
    rows = _metric_rows(run.directory)
    result = _result(run, evaluations, naive, rows, outcome, twin)
    result |= {"seconds": time.perf_counter() - started, "verified": all(check.passed for check in checks)}
    result["fold_max_abs_error"] = next(check.value for check in checks if "float64" in check.name)
    data = ReportData(
        result=result,
        rows=rows,
        control_rows=_metric_rows(run.directory / CONTROL),
        scales_before=scale_statistics(_log_scales(run, run.original)),
        scales_after=scale_statistics(_log_scales(run, twin)),
        constants=constants,
        position_loss={name: list(evaluation.position_loss) for name, evaluation in evaluations.items()},
        samples=_samples(run, twin),
        checks=[check.to_json() for check in checks],
        comparison=evaluations["lnfree"].comparison,
    )
    write_text(run.directory / REPORT, render_report(data))
    write_text(run.directory / MODEL / "README.md", render_card(result, sites, constants))
    write_text(run.directory / RESULT, json_text(result))
    for leftover in (DATA, CHECKPOINTS, f"{CONTROL}/{CHECKPOINTS}"):
        shutil.rmtree(run.directory / leftover, ignore_errors=True)
    return result


def _evaluate(run: _Run, model: PreTrainedModel, name: str) -> Evaluation:
    original = None if model is run.original else run.original
    return evaluate_model(
        model,
        run.validation_blocks,
        original,
        name,
        run.config.data,
        run.plan.micro_batch,
        tokenizer=run.tokenizer,
    )


def _log_scales(run: _Run, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return collect_log_scales(model, run.sites, spread(run.validation_blocks, CALIBRATION_BLOCKS))


def _metric_rows(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _samples(run: _Run, twin: PreTrainedModel) -> list[dict[str, str]]:
    """Greedy continuations of held-out text by both models."""
    length = min(PROMPT_TOKENS, run.plan.context // 2)
    prompts = torch.tensor(spread(run.validation_blocks, SAMPLES)["input_ids"])[:, :length]
    texts = {"prompt": run.tokenizer.batch_decode(prompts)}
    for name, model in (("original", run.original.cpu()), ("lnfree", twin)):
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=min(SAMPLE_TOKENS, run.plan.context - length),
            do_sample=False,
            pad_token_id=run.tokenizer.eos_token_id,
        )
        texts[name] = run.tokenizer.batch_decode(out[:, length:])
    return [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)]


def _result(
    run: _Run,
    evaluations: dict[str, Evaluation],
    naive: dict[str, float],
    rows: list[dict[str, Any]],
    outcome: Outcome | None,
    twin: PreTrainedModel,
) -> dict[str, Any]:
    original, lnfree, control = (evaluations.get(name) for name in ("original", "lnfree", "control"))
    assert original is not None and lnfree is not None
    trained = rows[-1] if rows else {"tokens": 0, "tokens_per_second": 0.0, "seconds": 0.0}
    return {
        "model": run.config.model,
        "data": run.config.data,
        "held_out": run.held_out,
        "recipe": run.config.recipe,
        "teacher_loss": original.loss,
        "teacher_loss_ci": list(original.loss_ci),
        "lnfree_loss": lnfree.loss,
        "lnfree_loss_ci": list(lnfree.loss_ci),
        "loss_increase_ci": list(lnfree.difference_ci or ()),
        "control_loss": None if control is None else control.loss,
        "gap": None if control is None else lnfree.loss - control.loss,
        "kl": lnfree.kl,
        "jsd": lnfree.jsd,
        "top1_agreement": lnfree.top1_agreement,
        "top5_agreement": lnfree.top5_agreement,
        "control_kl": None if control is None else control.kl,
        "naive_loss": naive["loss"],
        "naive_kl": naive["kl"],
        "tokens": trained["tokens"],
        "training_seconds": trained["seconds"],
        "tokens_per_second": trained["tokens_per_second"],
        "skipped_steps": 0 if outcome is None else outcome.skipped_steps,
        "waited_steps": trained.get("waited", 0),
        "set_backs": trained.get("set_back", 0),
        "validation_tokens": lnfree.tokens,
        "peak_memory_mb": _peak_memory_mb(run.plan.device),
        "sites": len(run.sites),
        "norm_modules_left": len(norm_modules(twin)),
        "seed": run.config.seed,
        "directory": str(run.directory),
        "plan": run.plan.model_dump(),
        "versions": {name: version(name) for name in ("unnorm", "torch", "transformers", "datasets")}
        | {"python": sys.version.split()[0]},
    }


def _peak_memory_mb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
