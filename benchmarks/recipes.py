"""Every recipe on the same model, data, seeds and tokens; prints JSON and writes a table and a plot.

    python benchmarks/recipes.py --tokens 40k 400k --plot recipes.html > benchmarks/recipes.json
    python benchmarks/recipes.py --model openai-community/gpt2 --data Skylion007/openwebtext --tokens 1M 4M 16M 64M
    python benchmarks/recipes.py --tokens 160k 400k --lr 3e-4 1.5e-4  # The published recipes at other rates.

The control (the original fine-tuned with its norms kept) is trained for each seed and number of tokens, in the runs of
`sequential` and with the optimizer of the published recipes. All gaps are relative to it; with several learning rates,
to the best control.

With `--keep FILE` each run is written to FILE as it ends, and the same command later does not run it again.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.console import Console
from transformers.utils import logging

import unnorm
from unnorm.runs.config import parse_count
from unnorm.taper.recipes import RECIPES
from unnorm.terminal.progress import Progress

MEASURES = ("lnfree_loss", "gap", "kl", "jsd", "top1_agreement", "tokens_per_second", "peak_memory_mb")

KL_TICKS = [factor * 10**power for power in range(-4, 2) for factor in (1, 2, 5)]


def measure_once(keep: Path | None, settings: dict[str, Any], console: Console) -> dict[str, Any]:
    """The run of these settings: from the file of JSON lines if it is there, else measured and added to it."""
    lines = keep.read_text().splitlines() if keep and keep.exists() else []
    for line in map(json.loads, lines):
        if line["settings"] == settings:
            return dict(line["row"])
    row = measure(**settings, console=console)
    if keep and "error" not in row:
        with keep.open("a") as file:
            file.write(json.dumps({"settings": settings, "row": row}) + "\n")
    return row


def measure(recipe: str, tokens: int, seed: int, lr: float | None, console: Console, **options: Any) -> dict[str, Any]:
    """Results of one run; the error message if it failed."""
    console.rule(f"{recipe}, {tokens:,} tokens, seed {seed}, lr {lr or 'its own'}")
    with tempfile.TemporaryDirectory() as directory, Progress(console) as progress:
        try:
            result = unnorm.remove(
                recipe=recipe,
                tokens=tokens,
                seed=seed,
                lr=lr,
                out=Path(directory) / "run",
                control=recipe == "sequential",
                watch=progress,
                **options,
            )
        except unnorm.RunInterruptedError:
            raise
        except unnorm.UnnormError as error:
            return {"recipe": recipe, "tokens": tokens, "seed": seed, "lr": lr, "error": str(error)}
    keys = (*MEASURES, "control_loss", "control_kl", "teacher_loss", "naive_kl", "skipped_steps", "plan", "seconds")
    named = {"recipe": recipe, "tokens": tokens, "seed": seed, "lr": result["plan"]["lr"]}
    return {**named, **{key: result[key] for key in keys}}


def add_gaps(rows: list[dict[str, Any]]) -> None:
    """Set the gap of each run to the best control with the same seed and tokens."""
    controls: dict[tuple[int, int], float] = {}
    for row in rows:
        if row.get("control_loss") is not None:
            key = row["tokens"], row["seed"]
            controls[key] = min(row["control_loss"], controls.get(key, row["control_loss"]))
    for row in rows:
        control = controls.get((row["tokens"], row["seed"]))
        if "error" not in row and control is not None:
            row["gap"] = row["lnfree_loss"] - control


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, for each recipe, number of tokens and learning rate."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault((row["recipe"], row["tokens"], row["lr"]), []).append(row)
    summary = []
    for (recipe, tokens, lr), group in groups.items():
        values = {key: [row[key] for row in group] for key in MEASURES if all(row[key] is not None for row in group)}
        means = {key: statistics.mean(v) for key, v in values.items()}
        spread = {f"{key}_sd": statistics.stdev(v) for key, v in values.items() if len(v) > 1}
        summary.append({"recipe": recipe, "tokens": tokens, "lr": lr, "seeds": len(group), **means, **spread})
    return summary


def tokens_to_reach(summary: list[dict[str, Any]]) -> dict[str, int | None]:
    """For each other recipe, the fewest taper tokens that match its loss at its most tokens and best learning rate.

    Gaps to controls of different numbers of tokens can't be compared.
    """
    by_tokens = sorted(summary, key=lambda row: (row["tokens"], -row["lnfree_loss"]))
    ours = [row for row in by_tokens if row["recipe"] == "taper"]
    last = {row["recipe"]: row for row in by_tokens}
    return {
        recipe: next((mine["tokens"] for mine in ours if mine["lnfree_loss"] <= row["lnfree_loss"]), None)
        for recipe, row in last.items()
        if recipe != "taper"
    }


def table(summary: list[dict[str, Any]]) -> str:
    """The summary in Markdown."""
    lines = [
        "| recipe | tokens | rate | loss | gap | KL | JSD | top-1 | tokens/s | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def number(row: dict[str, Any], key: str, places: int) -> str:
        if key not in row:
            return ""  # Without a control there is no gap.
        spread = row.get(f"{key}_sd")
        return f"{row[key]:.{places}f}" + (f" ± {spread:.{places}f}" if spread is not None else "")

    for row in summary:
        cells = [row["recipe"], f"{row['tokens']:,}", f"{row['lr']:.2g}"]
        cells += [number(row, "lnfree_loss", 4), number(row, "gap", 4)]
        cells += [number(row, "kl", 4), number(row, "jsd", 4), f"{row['top1_agreement']:.1%}"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['peak_memory_mb']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def at_best_rate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of tokens, a recipe's row with the lowest loss."""
    best = {row["tokens"]: row for row in sorted(rows, key=lambda row: -row["lnfree_loss"])}
    return [best[tokens] for tokens in sorted(best)]


def plot(summary: list[dict[str, Any]]) -> go.Figure:
    """Gap and KL against tokens (log axis); KL on a log axis as well."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("gap to the control", "KL to the original"))
    colours = dict(zip(RECIPES, ("#0072B2", "#D55E00", "#E69F00", "#009E73"), strict=True))
    for recipe, colour in colours.items():
        mine = at_best_rate([row for row in summary if row["recipe"] == recipe])
        for column, key in ((1, "gap"), (2, "kl")):
            shown = [row for row in mine if key in row]
            figure.add_scatter(
                x=[row["tokens"] for row in shown],
                y=[row[key] for row in shown],
                error_y={"array": [row.get(f"{key}_sd", 0) for row in shown]},
                name=recipe,
                legendgroup=recipe,
                showlegend=column == 1,
                line={"color": colour, "dash": "dash" if recipe == "sequential-aux" else "solid"},
                row=1,
                col=column,
            )
    tokens = sorted({row["tokens"] for row in summary})
    figure.update_xaxes(type="log", title="training tokens", tickvals=tokens, ticktext=[f"{n:,}" for n in tokens])
    figure.update_yaxes(type="log", col=2, title="nats per token", tickvals=KL_TICKS, ticktext=KL_TICKS)
    figure.update_yaxes(title="nats per token", col=1)
    figure.update_layout(template="simple_white", width=1000, height=420, legend={"orientation": "h", "y": -0.25})
    return figure


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--tokens", nargs="+", type=parse_count, default=[40_000, 100_000, 400_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", nargs="+", type=float, default=[None], help="learning rates of the published recipes")
    parser.add_argument("--batch-size", type=int, help="blocks in a step; by default each recipe's")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--keep", type=Path, help="file of JSON lines: each run as it ends, not run again")
    parser.add_argument("--table", type=Path, help="Markdown file")
    parser.add_argument("--plot", type=Path, help="HTML file")
    args = parser.parse_args()
    for path in (args.keep, args.table, args.plot):
        if path and not path.parent.is_dir():
            parser.error(f"there is no directory '{path.parent}' for {path.name}: make it first")

    logging.disable_progress_bar()
    console = Console(stderr=True)
    options = {"model": args.model, "data": args.data, "device": args.device, "dtype": args.dtype}
    options["batch_size"] = args.batch_size
    rows = [
        measure_once(args.keep, {"recipe": recipe, "tokens": tokens, "seed": seed, "lr": lr, **options}, console)
        for seed in range(args.seeds)
        for tokens in args.tokens
        for recipe in args.recipes
        for lr in ([None] if recipe == "taper" else args.lr)
    ]
    add_gaps(rows)
    summary = summarize(rows)
    print(json.dumps({"summary": summary, "reaches_their_loss": tokens_to_reach(summary), "runs": rows}, indent=2))
    print(table(summary), file=sys.stderr)
    if args.table:
        args.table.write_text(table(summary))
    if args.plot:
        plot(summary).write_html(args.plot)
    if not summary:
        sys.exit("recipes: no run gave a twin")


if __name__ == "__main__":
    main()
