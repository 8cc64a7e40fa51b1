"""The starting point of training: the original with stand-ins, calibrated and equalized, and with neuron limits."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from unnorm import processes
from unnorm.calibration.equalize import equalize_embedding, untie
from unnorm.calibration.first_position import equalize_first_position
from unnorm.calibration.massive import MADE_GOOD, shrink_massive
from unnorm.calibration.scales import CALIBRATION_BLOCKS, collect_log_scales, set_constants
from unnorm.data import evenly_spaced
from unnorm.errors import UnnormError
from unnorm.modeling.modeling_unnorm import limit_neurons, limits_of
from unnorm.models.running import copy_model
from unnorm.paths import write_text
from unnorm.removal.facts import Facts, facts_from, read_note
from unnorm.removal.run import Run, evaluate_on_held_out, hold_down
from unnorm.run_directory import CHECKPOINTS, LAYOUT
from unnorm.taper.norms import TaperedNorm, TokenMask, removed, use_bounds
from unnorm.taper.stand_ins import install
from unnorm.training.loop import last_checkpoint

NAIVE_HEAD = 8
"""Blocks on which naive removal is tried first, in case it overflows."""


def start(run: Run, token_mask: TokenMask) -> tuple[PreTrainedModel, dict[str, TaperedNorm], Facts]:
    """The original with stand-ins (norms still on), the stand-ins by site name, and the facts measured so far.

    A run that resumes from a checkpoint keeps its layout, whatever KL budget and text it has now.
    """
    student = copy_model(run.original, share=not run.plan.steps)
    stand_ins = install(
        student,
        run.sites,
        split_paths=run.recipe.splits_paths,
        token_mask=token_mask,
        interpolation=run.recipe.interpolation,
    )
    for stand_in in stand_ins.values():
        stand_in.estimator = run.config.estimator  # Of the running constants.
    known = processes.agree(lambda: _known_layout(run.directory))
    if known is None:
        facts = _calibrate(run, student, stand_ins)
        processes.agree(lambda: _save_layout(run.directory, student, facts))
        return student, stand_ins, facts
    facts = facts_from(known["facts"], run.directory / CHECKPOINTS / LAYOUT)
    if facts.runs_away and run.recipe.equalizes:
        use_bounds(stand_ins.values())
    if student.config.tie_word_embeddings and not known["tied"]:
        untie(student)
    limit_neurons(student, known["limited"])
    return student, stand_ins, facts


def _known_layout(directory: Path) -> dict[str, Any] | None:
    note = directory / CHECKPOINTS / LAYOUT
    if not note.is_file() or last_checkpoint(directory / CHECKPOINTS) is None:
        return None
    found: dict[str, Any] = read_note(note)
    if not isinstance(found, dict) or not {"facts", "tied", "limited"} <= found.keys():
        raise UnnormError(f"'{note}' is damaged: it lacks some of facts, tied and limited. Do the run again.")
    return found


def _save_layout(directory: Path, student: PreTrainedModel, facts: Facts) -> None:
    (directory / CHECKPOINTS).mkdir(exist_ok=True)
    layout = {
        "facts": facts.to_json(),
        "tied": student.config.tie_word_embeddings,
        "limited": list(limits_of(student)),
    }
    write_text(directory / CHECKPOINTS / LAYOUT, json.dumps(layout))


def _calibrate(run: Run, student: PreTrainedModel, stand_ins: dict[str, TaperedNorm]) -> Facts:
    """Set constants, equalize scales and set limits, in place; return naive removal's cost and the massive neurons."""
    run.say("calibrating")
    calibration = evenly_spaced(run.train_blocks, CALIBRATION_BLOCKS)
    set_constants(stand_ins, collect_log_scales(student, run.sites, calibration), run.config.estimator)
    naive_loss, naive_kl = _naive_removal(run, student, stand_ins)
    if not run.plan.steps or not run.recipe.equalizes:
        return Facts(naive_loss, naive_kl, massive_neurons=[])
    facts = Facts(naive_loss, naive_kl, _equalize(run, student, stand_ins, calibration))
    if facts.runs_away:
        hold_down(run, student, stand_ins)
    return facts


def _naive_removal(run: Run, student: PreTrainedModel, stand_ins: dict[str, TaperedNorm]) -> tuple[float, float]:
    """Loss and KL with every norm replaced by its calibrated constant, before any training.

    A single overflowing block makes the mean NaN, so if one of the first blocks overflows the rest are skipped.
    """
    head = run.validation_blocks.select(range(min(NAIVE_HEAD, len(run.validation_blocks))))
    with removed(stand_ins.values()):
        measured = evaluate_on_held_out(run, student, "naive removal, first blocks", head)
        if math.isfinite(measured.loss):
            measured = evaluate_on_held_out(run, student, "naive removal")
    if not math.isfinite(measured.loss):
        run.say("without its norms and before training, the model overflows: its loss is not a number")
    return measured.loss, float(measured.kl or 0.0)


def _equalize(
    run: Run, student: PreTrainedModel, stand_ins: dict[str, TaperedNorm], calibration: Dataset
) -> list[dict[str, Any]]:
    """Equalize scales while the norms are still on; return the massive neurons that were scaled down."""
    run.say("equalizing")
    common = student, run.original, run.sites, stand_ins, calibration, run.config.estimator
    neurons = shrink_massive(*common, MADE_GOOD * run.config.kl_budget, run.say)
    if neurons:
        run.say(f"scaled down MLP neurons that write massive activations: {len(neurons)}")
    if edited := equalize_first_position(*common):
        run.say(f"brought the first position to the constant scale at norms that follow a projection: {len(edited)}")
    equalize_embedding(*common)
    return [asdict(neuron) for neuron in neurons]
