"""The papers' tables for chosen models: the original, its control, and its LN-free twin by each recipe.

    python benchmarks/paper_table.py --suite quick --data hellaswag=FILE --data lambada=FILE
    python benchmarks/paper_table.py --model openai-community/gpt2{,-medium,-xl} --train-data Skylion007/openwebtext

Offline it takes the bundled model, local directories and local files; online also any model and data on the hub. All
runs and measurements are kept in --out, and an interrupted command continues when repeated. Prints JSON; the table in
Markdown goes to standard error and, with the published figures, to `paper_table.md` in --out.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

import unnorm
from unnorm.evaluation import Results
from unnorm.runs.config import read_count
from unnorm.taper.recipes import RECIPES
from unnorm.terminal.progress import Progress

PUBLISHED = (
    # model, row, OpenWebText, Pile, Pile filtered, HellaSwag %, source
    ("GPT-2 small", "original", 3.095, 2.856, None, 29.56, "2409.13710"),
    ("GPT-2 small", "control", 2.989, 2.880, None, 29.82, "2409.13710"),
    ("GPT-2 small", "LN-free", 3.014, 2.926, None, 29.54, "2409.13710"),
    ("GPT-2 small", "original", 3.1006, 2.8450, 2.7899, None, "2507.02559"),
    ("GPT-2 small", "control", 3.0126, 2.8511, 2.8112, None, "2507.02559"),
    ("GPT-2 small", "LN-free", 3.0797, 2.8852, 2.8757, None, "2507.02559"),
    ("GPT-2 medium", "original", 2.8145, 2.5163, 2.5390, None, "2507.02559"),
    ("GPT-2 medium", "control", 2.7390, 2.5752, 2.5724, None, "2507.02559"),
    ("GPT-2 medium", "LN-free", 2.7642, 2.6579, 2.6352, None, "2507.02559"),
    ("GPT-2 large", "original", 2.6623, 2.5320, 2.4347, None, "2507.02559"),
    ("GPT-2 large", "control", 2.6240, 2.6233, 2.5074, None, "2507.02559"),
    ("GPT-2 large", "LN-free", 2.6384, 2.7504, 2.5159, None, "2507.02559"),
    ("GPT-2 XL", "original", 2.5567, 2.4436, 2.3739, None, "2507.02559"),
    ("GPT-2 XL", "control", 2.4799, 2.4673, 2.3821, None, "2507.02559"),
    ("GPT-2 XL", "LN-free", 2.5052, 130.2197, 2.3992, None, "2507.02559"),
)
"""Losses in nats per token, from the papers and from tables that their authors published with the models."""


def make_runs(model: str, args: argparse.Namespace, console: Console) -> dict[str, Path]:
    """A finished run of each recipe, the first of which also trains the control; recipes that fail are left out.

    Raises:
        UnnormError: a run in --out was made with other options.
    """
    runs: dict[str, Path] = {}
    for recipe in args.recipes:
        out = _place(model, args) / recipe
        options = _options(model, recipe, not runs, args)
        _check_same_options(out, options)
        if not (out / "result.json").is_file():
            console.rule(f"{model}, {recipe}")
            is_begun = (out / "config.yaml").is_file()
            try:
                with Progress(console) as progress:
                    unnorm.remove(out=out, resume=is_begun, watch=progress, **({} if is_begun else options))
            except unnorm.RunInterruptedError:
                raise
            except unnorm.UnnormError as error:
                console.print(f"{recipe} gave no twin: {error}", markup=False)
                continue
        runs[recipe] = out
    return runs


def _place(model: str, args: argparse.Namespace) -> Path:
    """The directory in --out of all that is made of one model: `v_noisy` for `v/noisy`."""
    place: Path = args.out / re.sub(r"[^\w.-]+", "_", model)
    return place


def _options(model: str, recipe: str, control: bool, args: argparse.Namespace) -> dict[str, Any]:
    options = {"model": model, "recipe": recipe, "data": args.train_data, "device": args.device}
    if args.tokens is None:
        return options | {"control": control}
    tokens = read_count(args.tokens)
    return options | {"tokens": tokens, "control": control and tokens > 0}


def _check_same_options(out: Path, options: dict[str, Any]) -> None:
    """Write what a run is made with beside it, and refuse to take it for one that is made with anything else."""
    note = out.with_name(f"{out.name}.json")
    made = json.loads(note.read_text()) if note.is_file() and out.exists() else None
    if made is None:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(options))
    elif {**made, "control": None} != {**options, "control": None}:  # Any run's control will do.
        changed = ", ".join(f"{key} {made.get(key)}" for key in options if made.get(key) != options[key])
        raise unnorm.UnnormError(f"'{out}' was made with {changed}. Choose another --out, or delete it.")


def table_of(model: str, args: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], Results]:
    """Rows of one model with its losses and KL by corpus and its scores by benchmark, and the full `Results`."""
    runs = make_runs(model, args, console)
    controls = [path / "control" for path in runs.values() if (path / "control").is_dir()]
    names = {model: "original", **{str(control): "control" for control in controls}}
    names |= {str(path): f"LN-free, {recipe}" for recipe, path in runs.items()}
    with Progress(console) as progress:
        results = unnorm.evaluate(
            list(names),
            model,
            args.data,
            suite=args.suite,
            tasks=args.tasks,
            items=args.items,
            device=args.device,
            out=_place(model, args) / "evaluation",
            watch=progress,
        )
    rows = []
    for path, words in names.items():
        corpora = [row.to_json() for row in results if row.model == path]
        for row in corpora:
            del row["position_loss"], row["calibration"]
        scores = [score.to_json() for score in results.scores if score.model == path]
        rows.append({"model": model, "row": words, "corpora": corpora, "scores": scores})
    return rows, results


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line per model and recipe; losses are followed by the interval of their paired difference to the original."""
    corpora = list(dict.fromkeys(row["data"] for line in rows for row in line["corpora"]))
    shown = [("hellaswag", "acc_norm"), ("lambada_openai", "acc"), ("wikitext", "word_perplexity")]
    tasks = [key for key in shown if any((s["task"], s["metric"]) == key for line in rows for s in line["scores"])]
    headings = ["model", "", *corpora, "KL", *(f"{task} {metric}" for task, metric in tasks)]
    lines = [f"| {' | '.join(headings)} |", f"| --- | --- |{' ---: |' * (len(headings) - 2)}"]
    for line in rows:
        losses = {row["data"]: row for row in line["corpora"]}
        cells = [line["model"], line["row"], *(_loss(losses.get(name)) for name in corpora)]
        kls = [row["kl"] for row in line["corpora"] if row["kl"] is not None]
        cells.append("" if line["row"] == "original" else ", ".join(f"{kl:.4f}" for kl in kls))
        scores = {(score["task"], score["metric"]): score for score in line["scores"]}
        cells += [_score(scores.get(key)) for key in tasks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _loss(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["difference"] or row["difference_ci"] is None:
        return f"{row['loss']:.4f}"
    low, high = row["difference_ci"]
    return f"{row['loss']:.4f} ({low:+.4f} to {high:+.4f})"


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    value, ends = score["value"], score["ci"]
    as_text = "{:.1%}".format if 0 <= value <= 1 else "{:.4g}".format
    return as_text(value) + ("" if ends is None else f" ({as_text(ends[0])} to {as_text(ends[1])})")


def published() -> str:
    """The published figures, in the same form."""
    lines = [
        "| model | | OpenWebText | The Pile | Pile, filtered | HellaSwag | source |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for model, row, owt, pile, filtered, hellaswag, source in PUBLISHED:
        digits = 3 if source == "2409.13710" else 4
        numbers = ["" if number is None else f"{number:.{digits}f}" for number in (owt, pile, filtered)]
        share = "" if hellaswag is None else f"{hellaswag}%"
        lines.append(f"| {model} | {row} | {' | '.join(numbers)} | {share} | arXiv {source} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["demo"])
    parser.add_argument("--train-data", default="stdlib", help="data that twins and control are trained on")
    parser.add_argument("--tokens", help="training tokens of each run; default by device")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--suite", default="paper", choices=("quick", "full", "paper"))
    parser.add_argument("--data", action="append", help="[NAME=]SOURCE, as for unnorm evaluate")
    parser.add_argument("--tasks", action="append", help="as for unnorm evaluate")
    parser.add_argument("--items", help="as for unnorm evaluate")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("paper_table"))
    args = parser.parse_args()

    logging.disable_progress_bar()
    console = Console(stderr=True)
    try:
        tables = [table_of(model, args, console) for model in args.model]
    except unnorm.UnnormError as error:
        sys.exit(f"paper_table: {error}")
    rows = [row for of_model, _ in tables for row in of_model]
    print(json.dumps({"rows": rows, "protocols": [results.protocol for _, results in tables]}, indent=2))
    (args.out / "paper_table.md").write_text(f"{markdown(rows)}\nPublished:\n\n{published()}")
    print(markdown(rows), file=sys.stderr)
    if all(row["row"] == "original" for row in rows):
        sys.exit("paper_table: no recipe gave a twin")


if __name__ == "__main__":
    main()
