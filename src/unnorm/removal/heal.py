"""`unnorm heal`: train the twin of a finished run on more tokens, in a new run that starts without norms."""

from pathlib import Path
from typing import Any

from unnorm.data import OWN_TEXT
from unnorm.errors import UnnormError
from unnorm.folding.checkpoint import load, load_unfolded
from unnorm.isolation import isolated
from unnorm.paths import named_path
from unnorm.progress import Watch
from unnorm.removal.facts import facts_of
from unnorm.removal.remove import remove
from unnorm.removal.resume import check_has_control, has_control
from unnorm.report.sentences import overflows_everywhere
from unnorm.run_directory import CONFIG_FILE, CONTROL, RESULT, finished_result
from unnorm.runs.config import read_config_file, read_count
from unnorm.runs.text import choose_text

_OF_ONE_RUN = (
    *("tokens", "lr", "batch_size", "micro_batch", "device", "dtype", "compile", "cuda_graph"),
    *("report_to", "out", "twin", "trust_remote_code"),
)
"""Settings that a healing run does not inherit from the finished run."""


@isolated
def heal(directory: str | Path, *, watch: Watch | None = None, **options: Any) -> dict[str, Any]:
    """Train the twin of a finished run further, on freshly drawn text, in a run directory of its own.

    Args:
        directory: the finished run; it is not changed.
        watch: as for `remove`.
        **options: fields of `RemoveConfig`. `tokens`, `lr`, batch sizes, `report_to`, device, precision, `compile`,
            `cuda_graph` and `trust_remote_code` are chosen anew, as are `text_field` and `split` if `data` is other
            text. The seed is the finished run's plus 1, and a control is trained only if the finished run has one. The
            rest is inherited.

    Returns:
        The contents of `result.json`; tokens and seconds are totals over all runs so far.

    Raises:
        UnnormError: there is no finished run, the input can't be used, memory or disk do not suffice, or it diverged.
        RunInterruptedError: it was stopped; `remove(resume=True, out=…)` continues it.
    """
    directory = named_path(directory)
    for name in (RESULT, CONFIG_FILE):  # Without its settings, the default model would be taken for the original.
        if not (directory / name).is_file():
            raise UnnormError(
                f"'{directory}' holds no finished run: there is no {name} in it. Give the directory of a finished run, "
                "or finish it with: unnorm remove --resume --out DIR"
            )
    if options.get("tokens") is not None and read_count(options["tokens"]) == 0:
        raise UnnormError("--tokens 0 would leave the twin as it is. Give the number of tokens to train it on.")
    if overflows_everywhere(finished_result(directory)):
        raise UnnormError(
            f"The twin in '{directory}' overflows on every held-out block, so there is nothing to train it from. Start "
            "a new run with more tokens: unnorm remove --tokens N"
        )
    if options.get("control"):
        check_has_control(directory)
    saved_keep = read_config_file(directory / CONFIG_FILE).get("keep")
    if "keep" in options and options["keep"] != saved_keep:
        raise UnnormError(
            f"The run in '{directory}' {f'kept {saved_keep}' if saved_keep else 'removed all norms'}, and its twin is "
            "healed as it is. Leave --keep out, or start a new run."
        )
    saved = {key: value for key, value in read_config_file(directory / CONFIG_FILE).items() if key not in _OF_ONE_RUN}
    anew = {
        "seed": (saved.get("seed", 0) + 1) % 2**32,
        "control": saved.get("control", False) and has_control(directory),
    }
    text = choose_text(saved, *map(options.get, ("data", "text_field", "split")))
    if text.data == OWN_TEXT:
        anew["self_share"] = 0.0  # Now it writes all.
    settings = {**saved, **anew, **options, "text_field": text.text_field, "split": text.split, "twin": directory}
    # Detect damaged files now, before a directory is created or the twin is trained.
    facts_of(directory)
    load_unfolded(directory)
    if settings["control"]:
        load(directory / CONTROL)
    return remove(watch=watch, **settings)
