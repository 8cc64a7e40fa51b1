"""The command line: turns arguments into calls and errors into messages. No logic."""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from unnorm import __version__
from unnorm.errors import UnnormError, cant_be_used, is_out_of_memory
from unnorm.terminal.analysis import analysis_table
from unnorm.terminal.audit import audit_tables
from unnorm.terminal.evaluation import evaluation_tables
from unnorm.terminal.progress import Progress
from unnorm.terminal.removal import export_table, proof_table, result_table, sites_table

app = typer.Typer(
    name="unnorm",
    help="A pretrained transformer language model in, its twin without normalization layers out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich help tables would cut option names at 80 columns.
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Aside(Console):
    """Progress and messages, without which a run goes on if nobody reads them any more (as in `2>&1 | head`)."""

    def on_broken_pipe(self) -> None:
        """Print nothing more; rich would end the program."""
        self.quiet = True


_progress = _Aside(stderr=True)
MOST_SEED = 2**32 - 1
STOPPED = 130
"""Exit code after Ctrl-C, by shell convention."""
BY_DEVICE = "1.6M on a CPU, 20M on a GPU"

Json = Annotated[bool, typer.Option("--json", help="Results as JSON on standard output, all else on standard error.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="'demo' (bundled), a local directory, a GGUF file or a hub id.")
]
TEXT = (
    "'stdlib' (Python's own library, for the demo); a .txt, .jsonl, .parquet, .csv or .bin file, directory or glob; "
    "a hub data set, OWNER/NAME[:SUBSET]"
)
Data = Annotated[str, typer.Option(help=f"{TEXT}.")]
TextField = Annotated[
    str | None, typer.Option(help="Column that holds the text.", show_default="text, else the only text column")
]
RunTextField = Annotated[
    str | None, typer.Option(help="Column that holds the text.", show_default="the run's, without --data")
]
Split = Annotated[str, typer.Option(help="Split that the text comes from.")]
Context = Annotated[
    int | None, typer.Option(help="Sequence length in tokens.", show_default="the model's, at most 1024")
]
Device = Annotated[str, typer.Option(help="auto (cuda, else cpu), cpu, cuda or mps (not tested).")]
RunSplit = Annotated[
    str | None, typer.Option(help="Split that the text comes from.", show_default="the run's, without --data")
]
RunDirectory = Annotated[
    Path | None, typer.Option(help="Run directory.", show_default="unnorm-MODEL, numbered if taken")
]
StepBlocks = Annotated[int | None, typer.Option(help="Sequences per optimizer step.", show_default="by tokens")]
MicroBatch = Annotated[
    int | None, typer.Option(help="Most sequences per forward pass and device.", show_default="by memory")
]
Precision = Annotated[str, typer.Option(help="Precision of the training passes: auto, float32 or bfloat16.")]
Compile = Annotated[
    bool, typer.Option("--compile/--no-compile", help="torch.compile the passes; the first takes minutes.")
]
CudaGraph = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graph/--no-cuda-graph",
        help="Record each step once and replay it; speeds up small steps on a GPU.",
        show_default="on a GPU",
    ),
]
Trackers = Annotated[
    list[str] | None,
    typer.Option(help="Tracker that follows the run: wandb, trackio, tensorboard, …; can be repeated."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that comes with the model.")]


@app.command()
def remove(
    ctx: typer.Context,
    model: Model = "demo",
    data: Annotated[str, typer.Option(help=f"{TEXT}; 'self': text written by the model.")] = "stdlib",
    text_field: TextField = None,
    split: Split = "train",
    out: RunDirectory = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="taper (ours); for comparison sequential (arXiv 2409.13710), sequential-aux (2507.02559) "
            "or tapernorm (2602.10408)."
        ),
    ] = "taper",
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Training tokens: 500k, 2M, 150M; 0 only calibrates and folds.",
            show_default=BY_DEVICE,
        ),
    ] = None,
    batch_size: StepBlocks = None,
    micro_batch: MicroBatch = None,
    context: Context = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate.", show_default="by recipe and width; taper: 1.25e-4 * sqrt(768 / width)"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    device: Device = "auto",
    dtype: Precision = "auto",
    compile: Compile = False,
    cuda_graph: CudaGraph = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control/--no-control",
            help="Also fine-tune the original, norms kept, on as many tokens of the same text.",
        ),
    ] = False,
    kl_budget: Annotated[
        float, typer.Option(help="KL to the original, in nats per token, above which the taper waits.")
    ] = 0.9,
    stress_share: Annotated[
        float, typer.Option(help="Share of training sequences that are random, repeated or foreign tokens.")
    ] = 0.2,
    self_share: Annotated[
        float, typer.Option(help="Share of training text that the model writes itself; the rest is from --data.")
    ] = 0.0,
    keep: Annotated[str | None, typer.Option(help="Keep norms whose path matches this regular expression.")] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Keep affine maps that no weight can absorb (post-norm, some routers) as modules."
        ),
    ] = False,
    neuron_limits: Annotated[
        bool,
        typer.Option(
            "--neuron-limits/--no-neuron-limits",
            help="Clamp neurons of quadratic MLPs (gated, squared ReLU) where tokens could run away.",
        ),
    ] = True,
    estimator: Annotated[
        str, typer.Option(help="Estimator of the constant scales: geometric, mean or least-squares.")
    ] = "geometric",
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these options but --resume and --json; flags win.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    report_to: Trackers = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Remove every norm of MODEL by a short fine-tuning run.

    The constants that take their place are folded into its weights.
    """
    from unnorm.removal.remove import remove as run
    from unnorm.runs.config import read_config_file

    _quiet()
    options = read_config_file(config) if config is not None else {}
    options |= _given(ctx, left_out={"config", "resume"})
    _train(lambda progress: run(resume=resume, watch=progress, **options), json_)


@app.command()
def heal(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Directory of the finished run; not changed.")],
    tokens: Annotated[
        str | None,
        typer.Option(help="Further training tokens: 500k, 2M, 150M.", show_default=BY_DEVICE),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Other text, as for remove.", show_default="the run's")] = None,
    text_field: RunTextField = None,
    split: RunSplit = None,
    self_share: Annotated[
        float | None, typer.Option(help="Share of text that the original writes.", show_default="the run's")
    ] = None,
    out: RunDirectory = None,
    batch_size: StepBlocks = None,
    micro_batch: MicroBatch = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="by width and share of all tokens")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default="the next one")] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    compile: Compile = False,
    cuda_graph: CudaGraph = None,
    control: Annotated[
        bool | None,
        typer.Option("--control/--no-control", help="Also train the control further.", show_default="if there is one"),
    ] = None,
    report_to: Trackers = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Train the twin of a finished run further, with more tokens.

    Its norms do not come back.
    """
    from unnorm.removal.heal import heal as run

    _quiet()
    options = _given(ctx, left_out={"directory"})
    _train(lambda progress: run(directory, watch=progress, **options), json_)


def _train(run: Callable[[Progress], dict[str, Any]], json_: bool) -> None:
    from unnorm import processes

    try:
        with Progress(_progress) as progress:
            result = run(progress)
    finally:
        processes.leave()
    if processes.is_main():
        _print(result, json_, result_table(result))
    if not result["verified"]:
        raise typer.Exit(1)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Run directory.")],
    json_: Json = False,
) -> None:
    """Prove that the model in DIRECTORY has no norms.

    Also that it is folded exactly, read linearly and a plain sum.
    """
    from unnorm.proof.verify import verify as run

    _quiet()
    checks = run(directory)
    _print({"checks": [check.to_json() for check in checks]}, json_, proof_table(checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command()
def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Run directories, model directories, hub ids, 'demo'.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="Reference model for KL, agreement and differences.",
            show_default="the runs' original",
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="quick, full or paper: corpora and benchmarks by name.", show_default="none")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE",
            help="A corpus, as for remove; or hellaswag=FILE, lambada=FILE, wikitext=FILE. May be repeated.",
            show_default="the suite's, else the run's, else stdlib; none beside --tasks",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="More lm-eval tasks, separated by commas; 'none' skips the suite's."),
    ] = None,
    text_field: RunTextField = None,
    split: RunSplit = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Held-out tokens per corpus, rounded up to blocks.", show_default="the suite's, else 50k"),
    ] = None,
    items: Annotated[
        str | None,
        typer.Option(help="Most items per benchmark, drawn at random, or 'all'.", show_default="the suite's"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Sequence length in tokens.", show_default="the models', at most 1024 and what the runs trained with"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.", min=1)] = 4,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed for drawing benchmark items.", min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory for results, page and all measurements; run again to resume.")
    ] = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Compare models on held-out text and benchmarks.

    Loss, fidelity to an original and calibration, with confidence intervals.
    """
    from unnorm.evaluation import evaluate as run

    _quiet()
    with Progress(_progress) as progress:
        results = run(**_options(ctx), watch=progress)
    _print(results.to_json(), json_, evaluation_tables(results, out))


@app.command()
def audit(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Run directory.")],
    against: Annotated[
        str | None,
        typer.Option(help="Model with norms to compare with.", show_default="the run's control, else its original"),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens per class of inputs.")] = "32768",
    context: Annotated[
        int | None, typer.Option(help="Tokens in the longest sequences.", show_default="the models', at most 4096")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Ordinary text.", show_default="the run's")] = None,
    text_field: RunTextField = None,
    split: RunSplit = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Random seed.", min=0, max=MOST_SEED)] = 0,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Look for inputs that blow up the model in DIRECTORY.

    Compared with a model that has norms; exit code 1 if a class of inputs fails.
    """
    from unnorm.worst_case.audit import audit as run

    _quiet()
    with Progress(_progress) as progress:
        result = run(**_options(ctx), watch=progress)
    _print(result, json_, audit_tables(result))
    if not result["passed"]:
        raise typer.Exit(1)


@app.command()
def analyze(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Run directory.")],
    against: Annotated[str | None, typer.Option(help="Model with norms.", show_default="the run's original")] = None,
    what: Annotated[
        list[str] | None,
        typer.Option(
            help="attribution, patching, sinks, neurons, lens, scales or geometry; can be repeated.",
            show_default="all",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Text to analyze.", show_default="the run's")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file with clean, corrupted, answer and wrong_answer.", show_default="indirect-object prompts"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write.", show_default="DIRECTORY/analysis")] = None,
    tokens: Annotated[str, typer.Option(help="Held-out tokens, rounded up to blocks.")] = "4096",
    context: Annotated[
        int | None,
        typer.Option(help="Sequence length in tokens.", show_default="the models' and the run's, at most 256"),
    ] = None,
    text_field: RunTextField = None,
    split: RunSplit = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the generated prompts.", min=0, max=MOST_SEED)] = 0,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Show what norms do to attribution, patching and more.

    Also to sinks, neurons and the logit lens: the twin beside its original.
    """
    from unnorm.analysis.analyze import analyze as run

    _quiet()
    with Progress(_progress) as progress:
        result = run(**_options(ctx), watch=progress)
    _print(result, json_, analysis_table(result))


@app.command()
def stats(
    ctx: typer.Context,
    model: Model = "demo",
    data: Data = "stdlib",
    text_field: TextField = None,
    split: Split = "train",
    context: Context = None,
    keep: Annotated[
        str | None, typer.Option(help="Leave out norms whose path matches this regular expression.")
    ] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Show every norm site of MODEL and its scales.

    Its kind, who reads it, and how its scale is distributed over tokens.
    """
    from unnorm.calibration.scales import stats as run

    _quiet()
    with Progress(_progress) as progress:
        rows = run(**_options(ctx), watch=progress)
    _print({"sites": [site.to_json() | row.to_json() for site, row in rows]}, json_, sites_table(rows))


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Run directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must be new or empty.")],
    to: Annotated[
        str,
        typer.Option(
            help="transformers (folded), stock (the original's class with a huge epsilon) or nanogpt (GPT-2s)."
        ),
    ] = "transformers",
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Write the model in DIRECTORY in another tool's form.

    It is measured against the folded one.
    """
    from unnorm.exports.export import export as run

    _quiet()
    exported = run(directory, to, out=out, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]  # An unknown form is refused by name.
    _print(exported.to_json(), json_, export_table(exported))


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Run directory.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Token with write access.", show_default="HF_TOKEN, or that of `hf auth login`")
    ] = None,
    json_: Json = False,
) -> None:
    """Upload the model in DIRECTORY, with its card, to the hub."""
    from unnorm.exports.push import push as run

    _quiet()
    pushed = run(directory, repo, private=private, token=token)
    _print(pushed.to_json(), json_, f"{len(pushed.files)} files are at {pushed.url}")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"unnorm {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; problems that the user can fix give a message and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # tqdm reads this on first import; it is the only way to turn off the bars of lm-eval and of GGUF loading.
    os.environ.setdefault("TQDM_DISABLE", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Characters outside the stream's encoding are escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(windows_expand_args=False)  # Globs are expanded where they are read, as on other systems.
    except UnnormError as error:
        if not error.told_elsewhere:
            _say(str(error))
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        if leaving.code == STOPPED and os.environ.get("RANK", "0") == "0":  # typer prints nothing.
            _progress.print("Stopped; nothing was saved.")
        raise
    except OSError as error:
        said = cant_be_used(error)
        if said is None:
            raise
        _say(str(said))
        sys.exit(said.exit_code)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _say(
            "The device is out of memory. Use smaller batches (--batch-size, in training --micro-batch), a smaller "
            "--context or another --device, where the command has them."
        )
        sys.exit(2)


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    speaker = "unnorm" if rank == "0" else f"unnorm, process {rank}"
    _progress.print(f"[bold red]{speaker}:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _quiet() -> None:
    """Turn off the libraries' own progress bars, which would overwrite ours."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _options(ctx: typer.Context) -> dict[str, Any]:
    """The arguments of a command, including defaults, under the parameter names of the function it calls."""
    return {key: value for key, value in ctx.params.items() if key != "json_"}


def _given(ctx: typer.Context, left_out: set[str]) -> dict[str, Any]:
    """The options given explicitly on the command line, so that a settings file can supply the others."""
    return {
        key: value
        for key, value in _options(ctx).items()
        if key not in left_out and getattr(ctx.get_parameter_source(key), "name", "") == "COMMANDLINE"
    }


def _print(values: dict[str, Any], as_json: bool, table: Any) -> None:
    if as_json:
        from unnorm.json_text import json_text

        print(json_text(values))
    else:
        Console().print(table, crop=False)  # Paths must not be cut.
