"""`unnorm.export`: write a finished run's model in a form that another tool reads."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from unnorm.errors import UnnormError, short
from unnorm.exports import nanogpt, stock
from unnorm.exports.measure import FormError, form_errors
from unnorm.folding.checkpoint import load, load_sites
from unnorm.isolation import isolated
from unnorm.models.load import load_tokenizer, texts_begin_with
from unnorm.paths import named_path, nearest_existing, refuse_links
from unnorm.run_directory import MODEL, finished_result

Form = Literal["transformers", "stock", "nanogpt"]

_LOAD = {
    "transformers": "AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)",
    "stock": "AutoModelForCausalLM.from_pretrained({path!r})",
    "nanogpt": "safetensors.torch.load_file({weights!r})",
}
_NOTES = {
    "transformers": "Where norms were are nn.Identity, or affine maps that no weight took up; the modeling file beside "
    "it needs torch and transformers only.",
    "stock": stock.NOTE,
    "nanogpt": nanogpt.NOTE,
}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        form: `transformers`, `stock` or `nanogpt`.
        path: the directory.
        errors: differences from the folded model, by precision, measured on the form as read back.
        load: the line of Python that loads it.
        note: what users need to know about the form.
    """

    form: Form
    path: Path
    errors: list[FormError]
    load: str
    note: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        rows = [row.to_json() for row in self.errors]
        return {"form": self.form, "path": str(self.path), "errors": rows, "load": self.load, "note": self.note}


@isolated
def export(
    directory: str | Path, to: Form = "transformers", *, out: str | Path, trust_remote_code: bool = False
) -> Exported:
    """Write the model of a finished run in another form, and compare it with the folded model.

    Args:
        directory: run directory.
        to: `transformers` (the folded model with its modeling file), `stock` (the original's class with a huge
            epsilon and scaled gains) or `nanogpt` (GPT-2 only: nanoGPT's names and layout, as safetensors and JSON).
        out: directory to write; it must be new or empty.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        UnnormError: there is no finished run, `out` is taken or can't be written, or the form is unknown or not
            available for the family.
    """
    directory, out = named_path(directory), named_path(out)
    if to not in get_args(Form):
        raise UnnormError(f"There is no form '{to}'. Choose from {', '.join(get_args(Form))}.")
    _check_free(out)
    load_sites(directory)
    finished_result(directory)
    folded = load(directory)
    work: Path | None = None
    try:
        # Written beside or inside `out` and moved there once complete: a refused form leaves nothing behind.
        place = out if out.is_dir() else nearest_existing(out.parent)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=place))
        rows = _write(directory, folded, to, work, trust_remote_code)
        work.chmod(0o755)  # A copy of a read-only run is read-only.
        if out.is_dir():  # It may be a link, a mount or the current directory, which can't be replaced.
            for path in work.iterdir():
                path.rename(out / path.name)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            work.rename(out)
    except (OSError, SafetensorError) as error:
        raise UnnormError(
            f"Could not write '{out}': {short(error)}. Give another --out, or free some space."
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    loaded = _LOAD[to].format(path=str(out), weights=str(out / "model.safetensors"))
    return Exported(to, out, rows, loaded, _NOTES[to])


def _write(directory: Path, folded: PreTrainedModel, to: Form, out: Path, trust_remote_code: bool) -> list[FormError]:
    if to == "transformers":
        refuse_links(directory / MODEL)
        shutil.copytree(directory / MODEL, out, dirs_exist_ok=True)
        begin = texts_begin_with(out)
        return form_errors(folded, lambda dtype: AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval(), begin)
    rows = nanogpt.write_nanogpt(folded, out) if to == "nanogpt" else stock.write_stock(directory, folded, out)
    # The nanoGPT form uses the same tokenizer files.
    load_tokenizer(str(directory), directory / MODEL, trust_remote_code).save_pretrained(out)
    (out / "README.md").write_text(_readme(folded, to, rows), encoding="utf-8")
    return rows


def _readme(folded: PreTrainedModel, to: Form, rows: list[FormError]) -> str:
    lines = [f"| {row.name} | {row.max_abs:.1e} | {row.relative:.1e} | {row.kl:.1e} |" for row in rows]
    heading = "| precision | largest difference of logits | of the largest logit | KL, nats per token |"
    table = [heading, "| --- | --- | --- | --- |", *lines]
    title = f"# {type(folded).__name__}, {to} form"
    return "\n".join([title, "", _NOTES[to], "", "Against the folded model in float32:", "", *table, ""])


def _check_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UnnormError(f"'{out}' already exists and is not overwritten. Give another --out, or move it away.")
