"""`unnorm remove`: the whole procedure, from a pretrained model to its LN-free twin with proof, numbers and report."""

import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from unnorm import processes
from unnorm.calibration.step_size import tolerable_lr
from unnorm.data import begin_of_blocks
from unnorm.errors import RunInterruptedError, UnnormError, explained, first_few
from unnorm.folding.checkpoint import load, save_folded, save_model, save_sites, save_unfolded
from unnorm.isolation import isolated
from unnorm.models.device import choose_device, reset_peak_memory
from unnorm.models.load import load_original, weights_digest
from unnorm.models.running import copy_model, fuse_activations
from unnorm.models.sizes import check_named_sizes
from unnorm.paths import write_text
from unnorm.progress import Watch, say, silent
from unnorm.proof.at_load import prove_sites
from unnorm.removal.blocks import check_same_text, read_blocks, with_stress, write_blocks
from unnorm.removal.conclude import conclude
from unnorm.removal.facts import Facts, facts_of, read_facts
from unnorm.removal.predecessor import spent_seconds, spent_tokens, take_up_control, take_up_twin
from unnorm.removal.resume import check_same_original, not_saved, saved_options
from unnorm.removal.run import Run, check_disk, open_directory
from unnorm.removal.start import start
from unnorm.run_directory import (
    CONFIG_FILE,
    CONTROL,
    CONTROL_DONE,
    DATA,
    FACTS,
    METRICS,
    MODEL,
    ORIGINAL,
    RESULT,
    UNFOLDED,
    read_rows,
    resume_command,
)
from unnorm.runs.config import RemoveConfig
from unnorm.runs.lock import held
from unnorm.runs.plan import Plan, control_plan, default_lr, healing_plan, make_plan, scarce_memory
from unnorm.sites.find import find_sites
from unnorm.taper.norms import TaperedNorm, TokenMask
from unnorm.taper.recipes import RECIPES
from unnorm.taper.schedule import FidelityController, Schedule, healing
from unnorm.taper.stand_ins import uninstall_paths
from unnorm.training.callbacks import Removal
from unnorm.training.loop import Outcome, train

MASSIVE_TOKENS = 1_000_000
"""What to try with a massive activation: of as many SmolLM2-135M took 263 thousand for its taper (docs/method.md)."""


@isolated
def remove(
    model: str | Path | None = None, *, resume: bool = False, watch: Watch | None = None, **options: Any
) -> dict[str, Any]:
    """Remove every norm of a model and leave a run directory with its LN-free twin.

    Args:
        model: `demo`, a local directory, a GGUF file or a hub id.
        resume: continue the run in `out` from its last checkpoint, with the settings saved there. `tokens` may be
            increased; `kl_budget`, `control` and settings of how it runs (device, `micro_batch`, `compile`,
            `cuda_graph`, `report_to`) may be changed. A finished run can be resumed only to add a missing control.
        watch: called with each row of metrics, and with `{"kind": "phase", "text": …}` at each phase.
        **options: the other fields of `RemoveConfig`, such as `data`, `tokens`, `out` and `recipe`.

    Returns:
        The contents of `result.json`, on every process. Losses in nats per predicted token, KL in nats per token; None
        in place of a number that is not finite (`…_elsewhere` then has the mean without the blocks that overflow).

    Raises:
        UnnormError: the input can't be used, memory or disk do not suffice, the run diverged, or it ran out of tokens
            with norms left, in which case it can be resumed with more.
        RunInterruptedError: it was stopped by Ctrl-C or SIGTERM.
    """
    started = time.perf_counter()
    if model is not None:
        options["model"] = model
    config = RemoveConfig.create(**(saved_options(options) if resume else options))
    processes.join(choose_device(config.device))
    directory = processes.agree(lambda: open_directory(config, resume))
    started -= spent_seconds(directory)
    try:
        with held(directory):
            return _run(config, directory, watch if watch is not None and processes.is_main() else silent, started)
    except KeyboardInterrupt:
        if not (directory / CONFIG_FILE).is_file():
            raise
        command = resume_command(directory) + not_saved(config, directory)
        stopped = RunInterruptedError(f"Stopped; saved work is kept. Resume with: {command}")
        stopped.told_elsewhere = not processes.is_main()
        raise stopped from None


def _run(config: RemoveConfig, directory: Path, watch: Watch, started: float) -> dict[str, Any]:
    run = _prepare(config, directory, watch)
    facts = _train_removal(run)
    control = _train_control(run) if config.control else None
    return processes.agree(lambda: conclude(run, facts, control, started))


def _prepare(config: RemoveConfig, directory: Path, watch: Watch) -> Run:
    """Load and check the model, then write the blocks; nothing is written until the checks have passed."""
    say(watch, f"loading {config.model}")
    model, tokenizer = processes.together(lambda: _load_original(config, directory))
    plan = processes.agree(lambda: _plan(config, model))
    sites = processes.together(lambda: find_sites(model, config.in_place, config.keep))
    processes.agree(lambda: prove_sites(model, sites))
    weights = processes.agree(lambda: weights_digest(model))
    processes.agree(lambda: check_same_original(config, directory, weights))
    processes.together(lambda: check_disk(directory, model, config.control and not (directory / RESULT).is_file()))
    if warning := scarce_memory(config, plan, model):
        say(watch, warning)
    set_seed(config.seed)
    reset_peak_memory(plan.device)
    model.to(plan.device).requires_grad_(False)
    fuse_activations(model)
    plan = processes.agree(lambda: _gentle(config, plan, model, watch))
    held_out = processes.agree(lambda: write_blocks(config, plan, model, tokenizer, directory, watch))
    processes.agree(lambda: write_text(directory / DATA / ORIGINAL, weights))
    train_blocks, stress, validation_blocks = processes.together(lambda: read_blocks(directory, config))
    return Run(
        directory=directory,
        config=config,
        plan=plan,
        original=model,
        tokenizer=tokenizer,
        sites=sites,
        weights=weights,
        train_blocks=train_blocks,
        stress_blocks=stress,
        validation_blocks=validation_blocks,
        held_out=held_out,
        watch=watch,
    )


def _load_original(config: RemoveConfig, directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the original; if that fails and a saved run names it, the error says where, as the model may have moved."""
    settings = (run / CONFIG_FILE for run in (directory, config.twin) if run is not None)
    found = next(filter(Path.is_file, settings), None)
    with explained(found is not None, "", f"Its path is set in '{found}' (model: …)."):
        model, tokenizer = load_original(config.model, config.trust_remote_code)
    check_named_sizes(config.model, model)
    return model, tokenizer


def _plan(config: RemoveConfig, model: PreTrainedModel) -> Plan:
    plan = make_plan(config, model, processes.count())
    if config.twin is None or config.lr is not None:
        return plan
    return healing_plan(plan, spent_tokens(config.twin))


def _gentle(config: RemoveConfig, plan: Plan, model: PreTrainedModel, watch: Watch) -> Plan:
    """The plan, with a lower learning rate if the default one would move the model too far in one step."""
    if config.lr is not None or not plan.steps or not RECIPES[config.recipe].tries_lr:
        return plan
    usual = default_lr(model, config.recipe)
    share = tolerable_lr(model, usual) / usual
    if share < 1:
        say(watch, f"learning rate times {share:.2g}: one step of the usual {usual:.2g} would move this model too far")
    return plan.model_copy(update={"lr": share * plan.lr})


def _train_removal(run: Run) -> Facts:
    """Calibrate, measure naive removal, train, fold and save, unless already done; return the facts gathered."""
    if (run.directory / RESULT).is_file():  # Only the control remains to be trained.
        processes.agree(lambda: check_same_text(run))
        return facts_of(run.directory)
    note = run.directory / DATA / FACTS  # Written once all of this is done.
    if note.is_file():
        return read_facts(note)
    token_mask = TokenMask()
    student, stand_ins, facts = take_up_twin(run) if run.config.twin is not None else start(run, token_mask)
    fuse_activations(student)
    if run.plan.steps:
        run.say(f"training: {run.plan.steps} steps of {run.plan.step_tokens:,} tokens", run.plan.training_tokens)
        schedule = _lay_out(run, stand_ins)
        clock = FidelityController(run.config.kl_budget, schedule.end, schedule.starts)
        controller = clock if run.recipe.controlled else None
        final = next((stand_ins[site.name] for site in run.sites if site.role == "final"), None)
        removal = Removal(stand_ins, schedule, controller, token_mask, run.tokenizer.eos_token_id, final)
        facts = replace(facts, skipped_steps=_train(run, student, removal, run.directory).skipped_steps)
    for stand_in in stand_ins.values():
        stand_in.removed = True
    processes.agree(lambda: _fold_and_save(run, student, facts))
    return facts


def _lay_out(run: Run, stand_ins: dict[str, TaperedNorm]) -> Schedule:
    if run.config.twin is not None:
        return healing(run.sites)
    apart = [name for name, stand_in in stand_ins.items() if len(stand_in.alpha) == 2]
    return run.recipe.lay_out(run.sites, apart)


def _train(run: Run, model: PreTrainedModel, removal: Removal | None, directory: Path) -> Outcome:
    directory.mkdir(exist_ok=True)
    set_seed(run.config.seed)
    outcome = train(
        model=model.requires_grad_(True),
        teacher=run.original,
        removal=removal,
        optimization=run.recipe.optimization,
        plan=run.plan,
        train_blocks=run.train_blocks if removal is None else with_stress(run),
        validation_blocks=run.validation_blocks,
        directory=directory,
        seed=run.config.seed,
        watch=run.watch,
        report_to=run.config.report_to,
        first_tokens=begin_of_blocks(run.config.data, run.tokenizer) is None,
    )
    gc.collect()  # Trainer and callbacks form reference cycles that hold optimizer state and the last good weights.
    processes.agree(lambda: _check_ended(run, outcome, directory))
    return outcome


def _check_ended(run: Run, outcome: Outcome, directory: Path) -> None:
    """Raise, with a remedy, if a run was stopped, diverged, learned nothing or ran out of tokens."""
    whose = " of the control" if directory != run.directory else ""
    if outcome.interrupted:
        raise RunInterruptedError(
            f"Stopped at step {outcome.steps} of {run.plan.steps}{whose}; nothing is lost. Resume with: "
            f"{resume_command(run.directory)}"
        )
    remedy = "Start a new run with a lower --lr or more --tokens."
    if whose:
        remedy = f"The twin is saved; finish its run without a control: {resume_command(run.directory)} --no-control"
    if outcome.diverged:
        raise UnnormError(
            f"The run{whose} diverged: {outcome.skipped_steps} steps had gradients that were not finite or exploded. "
            f"{remedy}"
        )
    if outcome.skipped_steps >= outcome.steps:
        raise UnnormError(
            f"Nothing was learned{whose and ' by the control'}: each of the {outcome.steps} steps had gradients that "
            f"were not finite or exploded. {remedy}"
        )
    if outcome.unfinished:
        raise UnnormError(_out_of_tokens(run, outcome))


def _out_of_tokens(run: Run, outcome: Outcome) -> str:
    """Which sites are still norms at the end of the tokens, why, and how to go on."""
    alphas, last = outcome.unfinished, outcome.rows[-1]
    sites = first_few([f"{name} (alpha {alpha:.2f})" for name, alpha in alphas.items()])
    more = 2 * outcome.tokens
    why = (
        f"The taper waited for KL to fall in {last.get('waited', 0)} steps, and went back {last.get('set_back', 0)} "
        f"times, after spikes or refused steps; from half the budget of {run.config.kl_budget} nats on it is slower. "
        "Resume with more tokens, and with a larger --kl-budget if KL stayed above half of it"
    )
    if not any(alphas.values()) and outcome.kl_limit is not None and outcome.kl_limit < run.config.kl_budget:
        more = max(more, MASSIVE_TOKENS)
        why = (
            f"The taper has not begun: in a model with massive activations it starts once KL is under "
            f"{outcome.kl_limit:.2g} nats, and then took a quarter of a million tokens in SmolLM2-135M. Resume with "
            "more tokens"
        )
    return (
        f"Out of tokens after {outcome.tokens:,}, but {len(alphas)} sites are still norms: {sites}. {why}: "
        f"{resume_command(run.directory)} --tokens {more}"
    )


def _fold_and_save(run: Run, student: PreTrainedModel, facts: Facts) -> None:
    run.say("folding")
    uninstall_paths(student)
    student.cpu().eval()  # The CPU has float64.
    constants = {site.name: student.get_submodule(site.name).constant for site in run.sites}
    save_unfolded(student, run.original, run.sites, run.tokenizer, run.directory / UNFOLDED)
    save_folded(student, run.sites, run.tokenizer, run.directory / MODEL)
    save_sites(run.directory, run.sites, constants)  # Last, as the sign that there is a twin.
    write_text(run.directory / DATA / FACTS, json.dumps(facts.to_json()))


def _train_control(run: Run) -> PreTrainedModel:
    directory = run.directory / CONTROL
    if not (run.directory / DATA / CONTROL_DONE).is_file():
        control = copy_model(run.original) if run.config.twin is None else take_up_control(run)
        fuse_activations(control)
        plan = control_plan(run.plan.model_copy(update={"steps": processes.agree(lambda: _steps_done(run))}))
        run.say(f"training the control: {plan.steps} steps of {plan.step_tokens:,} tokens", plan.training_tokens)
        _train(replace(run, plan=plan), control, None, directory)
        processes.agree(lambda: _save_control(run, control))
    return load(directory).to(run.plan.device)


def _steps_done(run: Run) -> int:
    """Steps that the twin took, fewer than planned if healing ended early; the control gets as many tokens."""
    rows = read_rows(run.directory / METRICS)
    return int(rows[-1]["step"]) if rows else run.plan.steps


def _save_control(run: Run, control: PreTrainedModel) -> None:
    save_model(control, run.tokenizer, run.directory / CONTROL)
    write_text(run.directory / DATA / CONTROL_DONE, "trained and saved")
