"""The blocks that one run trains and is evaluated on: evenly thinned text, and the stress blocks mixed into it."""

import hashlib
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.calibration.scales import CALIBRATION_BLOCKS
from unnorm.data import (
    OVERSAMPLING,
    OWN_TEXT,
    STDLIB,
    Blocks,
    HeldOut,
    as_dataset,
    begin_of_blocks,
    build_blocks,
    column_of,
    evenly_spaced,
    own_text,
    random_starts,
    stress_blocks,
)
from unnorm.errors import UnnormError, explained, short
from unnorm.evaluation import EVALUATION_TOKENS, with_documents
from unnorm.models.load import DEMO
from unnorm.models.sizes import vocabulary_size
from unnorm.paths import write_text
from unnorm.progress import Watch, say
from unnorm.removal.run import Run
from unnorm.run_directory import CHECKPOINTS, CONFIG_FILE, CONTROL, DATA, HELD_OUT, finished_result
from unnorm.runs.config import RemoveConfig, read_config_file, run_settings
from unnorm.runs.plan import Plan
from unnorm.runs.text import TextSource, choose_text


def write_blocks(
    config: RemoveConfig,
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    watch: Watch,
) -> HeldOut:
    """Write settings and packed blocks to the run directory unless present; return how validation text was held out.

    A resumed run that was given more tokens gets new blocks.

    Raises:
        UnnormError: the text can't be used, or the disk is full.
    """
    note = directory / DATA / HELD_OUT
    chosen = _as_chosen(config, plan)
    if note.is_file() and read_config_file(directory / CONFIG_FILE).get("tokens") == plan.tokens:
        chosen.save(directory / CONFIG_FILE)
        return _noted(note)
    train_blocks = max(CALIBRATION_BLOCKS, math.ceil(plan.tokens / plan.context))
    own_blocks = min(round(config.self_share * train_blocks), train_blocks - 1)
    settings = directory / CONFIG_FILE
    with explained(settings.is_file(), "", f"Its path is set in '{settings}' (data: …)."):
        blocks = _read_blocks(config, plan, model, tokenizer, train_blocks - own_blocks, watch)
    _check_division(config, directory, blocks.held_out)
    train = _choose(blocks.train, train_blocks - own_blocks, config)
    if own_blocks:
        # Of a corpus that is too short no more than its share: it says how the blocks are mixed.
        own_blocks = min(own_blocks, max(1, round(len(train) * config.self_share / (1 - config.self_share))))
        own = own_text(model, tokenizer, plan.context, own_blocks, 0, partial(say, watch))
        train = concatenate_datasets([train, own.train])
    if times := _times_over(len(train), plan):
        say(watch, times)
    stress = stress_blocks(
        column_of(train),
        tokenizer,
        vocabulary_size(model),
        _stress_count(config, train),
        np.random.default_rng(config.seed),
        begin_of_blocks(config.data, tokenizer),
    )
    validation = _numbered(blocks.validation, config, tokenizer)
    parts = {
        "train": train,
        "validation": evenly_spaced(validation, math.ceil(EVALUATION_TOKENS / plan.context)),
        **({"stress": as_dataset(stress)} if len(stress) else {}),
    }
    _write(directory, chosen, parts, blocks.held_out)
    return blocks.held_out


def _check_division(config: RemoveConfig, directory: Path, held_out: HeldOut) -> None:
    """Raise an UnnormError if text is held out in another way than before, for a twin or a run that goes on."""
    note = directory / DATA / HELD_OUT
    if config.twin is not None:
        text = choose_text(run_settings(config.twin), config.data, config.text_field, config.split)
        text.check_divided(held_out.division)
    elif note.is_file() and (directory / CHECKPOINTS).is_dir():  # Of a run that goes on with more tokens.
        before = TextSource(config.data, config.text_field, config.split, True, _noted(note).division)
        before.check_divided(held_out.division)


def _write(directory: Path, chosen: RemoveConfig, parts: dict[str, Dataset], held_out: HeldOut) -> None:
    """Write settings and blocks, with the note on held-out text last, as the sign that all are there."""
    note = directory / DATA / HELD_OUT
    try:
        directory.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)  # First, so that half-deleted or half-written data are never taken for complete.
        shutil.rmtree(directory / DATA, ignore_errors=True)
        # A control of fewer tokens took smaller steps, and would count them as large ones.
        shutil.rmtree(directory / CONTROL / CHECKPOINTS, ignore_errors=True)
        chosen.save(directory / CONFIG_FILE)
        for name, part in parts.items():
            part.save_to_disk(str(directory / DATA / name))
        write_text(note, "\n".join(held_out))
    except OSError as error:
        raise UnnormError(f"Could not write to '{directory}': {error}.") from error


def _noted(note: Path) -> HeldOut:
    words, *division = note.read_text(encoding="utf-8").splitlines()
    return HeldOut(words, *(division or [words]))


def read_blocks(directory: Path, config: RemoveConfig) -> tuple[Dataset, Dataset | None, Dataset]:
    """Training, stress and validation blocks as `write_blocks` wrote them; no stress blocks if none were asked for.

    Raises:
        UnnormError: files are missing or damaged.
    """

    def read(name: str) -> Dataset:
        path = directory / DATA / name
        try:
            return load_from_disk(str(path))
        except Exception as error:  # Of Arrow and of datasets, of many kinds.
            raise UnnormError(f"'{path}' is missing or damaged ({short(error)}). Do the run again.") from error

    train = read("train")
    return train, read("stress") if _stress_count(config, train) else None, read("validation")


def writes_text(config: RemoveConfig) -> bool:
    """Whether the original writes some of the text, which it need not write alike on another device or torch."""
    return config.data == OWN_TEXT or config.self_share > 0


def _stress_count(config: RemoveConfig, train: Dataset) -> int:
    return round(config.stress_share * len(train))


def _as_chosen(config: RemoveConfig, plan: Plan) -> RemoveConfig:
    """Settings with the plan's choices: a resumed run must not choose anew, by another timing or for more tokens."""
    return config.model_copy(
        update={
            "dtype": plan.dtype,
            "tokens": plan.tokens,
            "batch_size": plan.batch_size if plan.steps else None,
            "micro_batch": plan.micro_batch if plan.steps else None,
            "lr": plan.lr if plan.steps else None,
        }
    )


def _times_over(blocks: int, plan: Plan) -> str:
    """A warning if the text is shorter than the run; empty otherwise."""
    tokens = blocks * plan.context
    if plan.tokens < 1.05 * tokens:
        return ""
    return (
        f"the text has {tokens:,} tokens to train on and will be repeated {plan.tokens / tokens:.1f} times: "
        "more text, --data self or a larger --self-share would bring the twin closer"
    )


def _choose(blocks: Dataset, count: int, config: RemoveConfig) -> Dataset:
    """Choose blocks evenly; when healing a twin, at random, since the blocks it was trained on would teach it less."""
    if config.twin is None:
        return evenly_spaced(blocks, count)
    return blocks.shuffle(seed=config.seed).select(range(min(count, len(blocks))))


def _read_blocks(
    config: RemoveConfig,
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: int,
    watch: Watch,
) -> Blocks:
    """Blocks from the source, more than needed so that they cover more of the text, or the original's own text."""
    validation_blocks = math.ceil(EVALUATION_TOKENS / plan.context)
    if config.data == OWN_TEXT:
        return own_text(model, tokenizer, plan.context, train_blocks, validation_blocks, partial(say, watch))
    say(watch, f"reading {config.data}")
    if config.data == STDLIB and config.model != DEMO and "data" not in config.model_fields_set:
        say(
            watch,
            "no --data was given, so the text is Python's standard library; give text like the model's training data",
        )
    return build_blocks(
        config.data,
        tokenizer,
        vocabulary_size(model),
        plan.context,
        train_blocks=OVERSAMPLING * train_blocks,
        validation_blocks=OVERSAMPLING * validation_blocks,
        text_field=config.text_field,
        split=config.split,
        say=partial(say, watch),
    )


def _numbered(validation: Dataset, config: RemoveConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Add each token's document, for intervals over documents; in the original's own text each block is a document."""
    return validation if config.data == OWN_TEXT else with_documents(validation, tokenizer)


def with_stress(run: Run) -> Dataset:
    """Training text with some blocks replaced by stress blocks and some first tokens random, if the recipe distils."""
    if not run.recipe.optimization.distil or run.stress_blocks is None:
        return run.train_blocks
    kept = evenly_spaced(run.train_blocks, max(1, len(run.train_blocks) - len(run.stress_blocks)))
    vocab_size = vocabulary_size(run.original)
    generator = np.random.default_rng(run.config.seed)
    begin = begin_of_blocks(run.config.data, run.tokenizer)
    text = as_dataset(random_starts(column_of(kept), run.tokenizer, vocab_size, generator, begin))
    parts = ((text, False), (run.stress_blocks, True))
    return concatenate_datasets([part.add_column("stress", [is_stress] * len(part)) for part, is_stress in parts])


def text_digest(run: Run) -> str:
    """SHA-256 of the ids that a run trains on and is evaluated on, as little-endian 32-bit integers."""
    sha256 = hashlib.sha256()
    for blocks in (run.train_blocks, run.validation_blocks):
        for part in blocks.with_format("numpy").iter(1000):
            sha256.update(part["input_ids"].astype("<i4").tobytes())
    return sha256.hexdigest()


def check_same_text(run: Run) -> None:
    """Raise an UnnormError if the text of a finished run, read again for its control, has changed."""
    was = finished_result(run.directory).get("text_sha256")
    if was is not None and was != text_digest(run):
        shutil.rmtree(run.directory / DATA)
        if writes_text(run.config):
            raise UnnormError(
                "A control needs the text that the twin was trained on, and the original does not write the same again "
                "(on another device, say). Do the run again with --control."
            )
        raise UnnormError(
            f"The text in '{run.config.data}' has changed since the twin was trained, but a control needs the same. "
            "Put it back as it was, or do the run again with --control."
        )
