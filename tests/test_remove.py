"""The whole path on a tiny model: all recipes, the control, resuming, several processes."""

import inspect
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

import unnorm
from tests.bad_input.edits import edit_config
from tests.conftest import VOCAB, Cli, Saved
from tests.families import FAMILIES, random_model
from tests.running import SETTINGS, assert_same_weights, ctrl_c_at
from unnorm import evaluation
from unnorm.cli import BY_DEVICE, app, main
from unnorm.data import evenly_spaced
from unnorm.folding.checkpoint import load_sites
from unnorm.models.load import load_original
from unnorm.removal import conclude
from unnorm.removal.run import Run
from unnorm.run_directory import read_rows
from unnorm.runs import plan
from unnorm.runs.config import RemoveConfig
from unnorm.taper.norms import TaperedNorm
from unnorm.terminal.progress import Progress
from unnorm.training import distillation

RESULT_KEYS = {
    "teacher_loss",
    "lnfree_loss",
    "control_loss",
    "gap",
    "kl",
    "top1_agreement",
    "tokens",
    "seconds",
    "norm_modules_left",
    "fold_max_abs_error",
    "tokens_per_second",
    "peak_memory_mb",
    "recipe",
    "model",
    "data",
    "versions",
    "seed",
}


@pytest.mark.parametrize("recipe", ["taper", "sequential", "sequential-aux", "tapernorm"])
def test_recipes_end_to_end(recipe: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    out = tmp_path / "run"
    result = unnorm.remove(
        model=str(tiny_model_dir),
        data=str(text_file),
        out=out,
        recipe=recipe,
        control=True,
        lr=3e-3,
        watch=rows.append,
        **{**SETTINGS, "tokens": 60 * 512},
    )
    assert result.keys() >= RESULT_KEYS
    assert json.loads((out / "result.json").read_text()) == result
    assert (result["norm_modules_left"], result["sites"], result["tokens"]) == (0, 5, 60 * 512)
    assert result["verified"]
    assert result["skipped_steps"] == 0
    assert result["fold_max_abs_error"] <= 1e-10
    assert result["gap"] == pytest.approx(result["lnfree_loss"] - result["control_loss"])
    assert all(check.passed for check in unnorm.verify(out))
    validation = [row for row in rows if row["kind"] == "validation" and "alpha" in row]
    assert validation[0]["alpha"] == 0.0
    # Before the first step only the equalized embedding, which is ours, sets the student apart.
    assert validation[0]["kl"] == pytest.approx(0, abs=1e-3 if recipe == "taper" else 1e-5)
    assert {row["teacher_loss"] for row in validation} == {validation[0]["teacher_loss"]}
    if recipe == "sequential":  # Which equalizes nothing, so that it begins as the original.
        assert validation[0]["loss"] == pytest.approx(validation[0]["teacher_loss"], abs=1e-4)
    assert (validation[-1]["alpha"], validation[-1]["sites_removed"]) == (1.0, 5)
    if recipe == "taper":
        # Distillation brings the twin closer than constants alone do; next-token loss on a random model need not.
        assert result["kl"] < 0.5 * result["naive_kl"]
    assert "<html" in (out / "report.html").read_text()
    assert not (out / "checkpoints").exists()
    assert unnorm.load(out).config.removed_norms


def test_zero_tokens_is_naive_removal(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert (result["tokens"], result["norm_modules_left"], result["control_loss"]) == (0, 0, None)
    assert result["lnfree_loss"] == pytest.approx(result["naive_loss"], rel=1e-4)
    assert result["kl"] == pytest.approx(result["naive_kl"], rel=1e-3)


def test_one_held_out_block_has_no_interval(tiny_model_dir: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a.txt").write_text("Hello there, this is short. " * 40)
    run = tmp_path / "a run"
    done = cli("remove", tiny_model_dir, "--data", tmp_path / "a.txt", "--tokens", 0, "--out", run, "--device", "cpu")
    assert done.code == 0, done.err
    result = json.loads((run / "result.json").read_text())
    assert result["validation_blocks"] == 1
    assert result["teacher_loss_ci"] is result["lnfree_loss_ci"] is result["loss_increase_ci"] is None
    assert "interval" not in done.out
    # What is to be pasted into a shell is one word there.
    assert f"unnorm verify '{run}'" in done.out.replace("\n", "")
    loss = f"{result['lnfree_loss']:.4f}"
    for page in ("report.html", "model/README.md"):
        text = (run / page).read_text()
        assert loss in text and f"{loss} to {loss}" not in text
    options: dict[str, Any] = {"tasks": "none", "device": "cpu", "out": tmp_path / "evaluation"}
    unnorm.evaluate(run, against=tiny_model_dir, data=tmp_path / "a.txt", **options)
    assert "<strong>" not in (tmp_path / "evaluation" / "evaluation.html").read_text()


def test_same_seed_same_result(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        unnorm.remove(model=str(tiny_model_dir), data=str(text_file), out=tmp_path / name, **SETTINGS)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("recipe", "faults"), [("taper", False), ("taper", True), ("sequential", False)])
def test_interrupted_and_resumed_equals_unbroken(
    monkeypatch: pytest.MonkeyPatch, recipe: str, faults: bool, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    trainer = distillation.DistillationTrainer
    take_step = trainer.training_step

    def with_faults(self: distillation.DistillationTrainer, *args: Any, **more: Any) -> Tensor:
        """The same steps are bad in both runs, so that the controller goes back before and after the break."""
        loss = take_step(self, *args, **more)
        if faults and self.state.global_step in {3, 30, 31, 32}:
            next(iter(self.model.parameters())).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(trainer, "training_step", with_faults)
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "recipe": recipe}
    # The running constants of the second recipe go on long after the break.
    options |= {"tokens": 60 * 512, "estimator": "mean" if recipe == "sequential" else "geometric"}
    unnorm.remove(out=tmp_path / "unbroken", **options)

    with pytest.raises(unnorm.RunInterruptedError, match=r"--resume --out .*broken"):
        unnorm.remove(out=tmp_path / "broken", watch=ctrl_c_at(25), **options)
    assert not (tmp_path / "broken" / "result.json").exists()
    result = unnorm.remove(out=tmp_path / "broken", resume=True)
    assert result["tokens"] == options["tokens"]
    assert result["set_backs"] == (2 if faults else 0)
    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")
    steps = [
        [row["step"] for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())]
        for name in ("unbroken", "broken")
    ]
    assert steps[0] == steps[1]


def test_logs_of_trackers_outlive_the_checkpoints_beside_them(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """TensorBoard's callback writes to `runs`, in the directory that the Trainer has for checkpoints."""
    run, control = tmp_path / "run", tmp_path / "run" / "control"

    def follow(row: dict[str, Any]) -> None:
        for directory in (run, control):
            if row["kind"] == "train" and (directory / "metrics.jsonl").is_file():
                log = directory / "checkpoints" / "runs" / "today" / "events"
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(f"{row['step']}")

    unnorm.remove(str(tiny_model_dir), data=str(text_file), out=run, control=True, watch=follow, **SETTINGS)
    for directory in (run, control):
        assert int((directory / "runs" / "today" / "events").read_text()) > 0
        assert not (directory / "checkpoints").exists()


def test_a_step_in_several_micro_batches_is_the_same_step(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """But for dropout, and for the constants, since each micro-batch is measured with those of the one before."""
    without_dropout = shutil.copytree(tiny_model_dir, tmp_path / "model")
    edit_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)(without_dropout)
    sizes: list[int] = []
    compute_loss = distillation.DistillationTrainer.compute_loss

    def counted(self: Any, model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
        sizes.append(inputs["input_ids"].numel())
        return compute_loss(self, model, inputs, **more)

    def train(name: str, micro_batch: int | None = None) -> tuple[list[float], dict[str, Tensor]]:
        sizes.clear()
        options: dict[str, Any] = {**SETTINGS, "tokens": 8 * 512, "recipe": "sequential", "out": tmp_path / name}
        options["micro_batch"] = micro_batch
        unnorm.remove(str(without_dropout), data=str(text_file), **options)
        assert sum(sizes) == 8 * 512
        norms = [row["grad_norm"] for row in read_rows(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        weights = load_file(tmp_path / name / "unfolded" / "model.safetensors")
        # A key's bias has no gradient but rounding, which Adam makes into steps.
        return norms, {name: weight for name, weight in weights.items() if not name.endswith("c_attn.bias")}

    monkeypatch.setattr(TaperedNorm, "_update_constants", lambda *_: None)
    monkeypatch.setattr(distillation.DistillationTrainer, "compute_loss", counted)
    norms, weights = train("whole")
    assert set(sizes) == {512}
    norms_of_parts, weights_of_parts = train("parts", 3)  # Of 8 blocks a step, so 2.
    assert set(sizes) == {128}
    assert norms_of_parts == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(weights_of_parts, weights, rtol=1e-5, atol=1e-5)


def test_two_processes_train_one_model(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "unnorm", "remove", str(tiny_model_dir), f"--data={text_file}", "--json"]
    command += [f"--out={tmp_path / 'two'}", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["norm_modules_left"], result["plan"]["processes"]) == (0, 2)
    assert result["tokens"] == SETTINGS["tokens"]
    # The mismatch of reads is relative to those of a micro-batch, so one process gets the same micro-batches.
    shared = {"micro_batch": SETTINGS["batch_size"] // 2}
    unnorm.remove(model=str(tiny_model_dir), data=str(text_file), out=tmp_path / "one", **SETTINGS, **shared)
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    # The same batches, shared out: not the same rounding, but the same training. Without common gradients the first
    # step's would be a third longer, and KL a tenth larger.
    assert result["kl"] == pytest.approx(one["kl"], rel=0.01)
    first = [next(row for row in read_rows(tmp_path / name / "metrics.jsonl") if row["kind"] == "train")
             for name in ("one", "two")]  # fmt: skip
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-3)


def test_command_line_json_and_config_file(cli: Cli, tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model: {tiny_model_dir}\ndata: {text_file}\ntokens: 2k\nseed: 3\nbatch-size: 8\n")
    out = tmp_path / "run"
    code, stdout, stderr = cli("remove", "--config", settings, "--tokens", "0", "--out", out, "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    assert (result["tokens"], result["seed"]) == (0, 3)  # the flag wins, the file gives the rest
    assert "\x1b" not in stderr

    code, stdout, _ = cli("verify", out, "--json")
    assert code == 0
    assert all(check["passed"] for check in json.loads(stdout)["checks"])

    code, stdout, _ = cli("evaluate", out, "--against", tiny_model_dir, "--data", text_file, "--json")
    assert code == 0
    (row,) = json.loads(stdout)["results"]
    assert row.keys() >= {"model", "data", "loss", "loss_ci", "tokens", "kl", "jsd", "top1_agreement"}
    assert row["loss_ci"][0] <= row["loss"] <= row["loss_ci"][1]
    assert 0 < row["jsd"] < row["kl"]

    code, stdout, _ = cli("stats", tiny_model_dir, "--data", text_file, "--json")
    assert code == 0
    sites = json.loads(stdout)["sites"]
    assert [site["name"] for site in sites][-1] == "transformer.ln_f"
    assert all(site["smallest"] <= site["mean"] <= site["largest"] for site in sites)


def test_help_shows_the_defaults_that_hold() -> None:
    command = typer.main.get_command(app).get_command(None, "remove")  # type: ignore[attr-defined]
    shown = {parameter.name.rstrip("_"): parameter.default for parameter in command.params}
    real = {name: field.get_default(call_default_factory=True) for name, field in RemoveConfig.model_fields.items()}
    assert real.pop("twin") is None  # What `unnorm heal` sets.
    assert real.keys() <= shown.keys()
    assert {name: shown[name] or None for name in real} == {name: value or None for name, value in real.items()}


@pytest.mark.parametrize("name", ["audit", "analyze", "evaluate", "stats"])
def test_commands_have_the_defaults_of_their_functions(name: str) -> None:
    command = typer.main.get_command(app).get_command(None, name)  # type: ignore[attr-defined]
    function = {"evaluate": evaluation.evaluate}.get(name) or getattr(unnorm, name)
    real = {key: p.default for key, p in inspect.signature(function).parameters.items() if key not in ("watch", "data")}
    shown = {parameter.name.rstrip("_"): parameter for parameter in command.params}
    assert real.keys() <= shown.keys()
    for key, default in real.items():
        if default is not inspect.Parameter.empty:
            assert str(shown[key].default or None) == str(default or None), key


def test_default_tokens_are_those_that_help_and_docs_name() -> None:
    assert (BY_DEVICE, plan.CPU_TOKENS, plan.GPU_TOKENS) == ("1.6M on a CPU, 20M on a GPU", 1_600_000, 20_000_000)


def test_every_key_of_a_result_is_in_the_docs(finished_run: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "using.md").read_text()
    table = page.partition("| `result.json` | |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table)) | {f"{model}_loss_ci" for model in ("teacher", "lnfree", "control")}
    result = json.loads((finished_run / "result.json").read_text())
    assert result.keys() - named == set()


def test_time_left_is_shown_however_seldom_a_run_tells_how_far_it_is() -> None:
    clock = [0.0]
    progress = Progress(Console(file=io.StringIO(), force_terminal=True))
    with progress:
        assert progress.live is not None
        progress.live.get_time = lambda: clock[0]
        progress({"kind": "phase", "text": "training", "tokens": 1000})
        for tokens in range(100, 600, 100):
            clock[0] += 60.0
            progress({"kind": "train", "tokens": tokens})
        assert progress.live.tasks[0].time_remaining == pytest.approx(300, rel=0.3)


def test_paths_and_names_are_whole_in_narrow_terminals(
    cli: Cli, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands are copied from there, and names of what failed are looked for."""
    monkeypatch.setenv("COLUMNS", "60")
    out = tmp_path / ("long" * 20) / "stock"
    assert f"model  {out}\n" in cli("export", finished_run, "--to", "stock", "--out", out).out
    table = cli("verify", finished_run).out
    assert "passed" in table and "\u2026" not in table


def test_what_an_encoding_lacks_is_escaped(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict must not become a traceback, with the exit code of a failed proof."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    out = tmp_path / "na\u00efve"
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["unnorm", "export", str(finished_run), "--to", "stock", "--out", str(out)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    assert f"model  {tmp_path}/na\\xefve" in stdout.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_constants_are_estimated_as_asked_for(
    finished_run: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """An arithmetic mean is larger than the geometric one."""
    unnorm.remove(tiny_model_dir, data=text_file, tokens=0, estimator="mean", out=tmp_path / "run", device="cpu")
    geometric, mean = (load_sites(directory)[1] for directory in (finished_run, tmp_path / "run"))
    assert all(mean[name] > 1.0001 * geometric[name] for name in geometric)


GENERATION: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_attentions": True},
    "sampling": {"do_sample": True, "temperature": 0.5, "stop_strings": ["def"], "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("settings", GENERATION)
def test_samples_are_greedy_whatever_generation_the_model_is_set_to(
    settings: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    shown: list[dict[str, str]] = []

    def sample(run: Run, twin: PreTrainedModel) -> list[dict[str, str]]:
        prompts.extend(evenly_spaced(run.validation_blocks, conclude.SAMPLES)["input_ids"])
        shown.extend(samples(run, twin))
        return shown

    samples = conclude._samples
    monkeypatch.setattr(conclude, "_samples", sample)
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | GENERATION[settings]))
    unnorm.remove(tmp_path / "model", data=text_file, tokens=0, out=tmp_path / "run", device="cpu")
    original, tokenizer = load_original(str(tiny_model_dir))
    for name, model in (("original", original), ("lnfree", unnorm.load(tmp_path / "run"))):
        ids = torch.tensor(prompts[:1])[:, : min(conclude.PROMPT_TOKENS, len(prompts[0]) // 2)]
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        assert tokenizer.decode(ids[0, :start]) == shown[0]["prompt"]
        assert shown[0][name].startswith(tokenizer.decode(ids[0, start:]).rstrip("\ufffd"))  # Half a character.
    kept = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert GENERATION[settings].items() <= kept.items()


def test_what_a_model_returns_by_default_does_not_matter(
    finished_run: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    edit_config(output_hidden_states=True, return_dict=False, use_cache=False)(model)
    result = unnorm.remove(model, data=text_file, tokens=0, out=tmp_path / "run", device="cpu")
    assert result["kl"] == json.loads((finished_run / "result.json").read_text())["kl"] and result["verified"]


def test_a_model_may_take_fewer_tokens_than_it_is_proved_with(
    tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=5, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    assert unnorm.remove(tmp_path / "model", data=text_file, tokens=0, out=tmp_path / "run", device="cpu")["verified"]


def test_the_report_has_the_twins_scales(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(conclude, "render_report", lambda data: seen.append(data) or "<html>")
    unnorm.remove(tiny_model_dir, data=text_file, tokens=0, out=tmp_path / "run", device="cpu")
    assert [row.site for row in seen[0].scales_before] == [row.site for row in seen[0].scales_after]
    assert seen[0].scales_before[1:] != seen[0].scales_after[1:]


def test_the_reports_scales_of_norms_folded_into_their_writers_are_what_they_would_divide_by(
    saved: Saved, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(conclude, "render_report", lambda data: seen.append(data) or "<html>")
    config = FAMILIES["qwen3"][0]()
    config.vocab_size = VOCAB
    model: Any = random_model(lambda: config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(10)
    unnorm.remove(saved(model), data=text_file, tokens=0, out=tmp_path / "run", device="cpu")
    before, after = ({row.site: row.mean for row in rows} for rows in (seen[0].scales_before, seen[0].scales_after))
    site = "model.layers.0.self_attn.q_norm"
    assert before[site] > 5 and after[site] == pytest.approx(before[site], rel=0.2)


def test_a_run_of_which_one_check_fails_is_not_verified(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_twin = conclude.check_twin

    def one_fails(*given: Any) -> list[Any]:
        first, *others = check_twin(*given)
        return [replace(first, passed=False), *others]

    monkeypatch.setattr(conclude, "check_twin", one_fails)
    options: dict[str, Any] = {"data": text_file, "tokens": 0, "device": "cpu"}
    assert not unnorm.remove(tiny_model_dir, out=tmp_path / "run", **options)["verified"]


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""


def test_a_tokenizer_with_code_of_its_own_goes_all_the_way(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: str = "") -> str:
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", ask)
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    path = model / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizerFast", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizerFast"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (model / "own.py").write_text(OWN_TOKENIZER)
    trusted: dict[str, Any] = {"device": "cpu", "trust_remote_code": True}
    run = tmp_path / "run"
    assert unnorm.remove(model, data=text_file, tokens=0, out=run, **trusted)["verified"]
    assert unnorm.verify(run)[-1].detail.endswith("besides own.py")
    assert unnorm.analyze(run, what="sinks", tokens=64, **trusted)["findings"].keys() == {"sinks"}
    assert unnorm.audit(run, tokens=64, **trusted)["classes"]
    assert len(unnorm.evaluate(run, model, text_file, tokens=200, **trusted)) == 1
    assert unnorm.stats(model, data=text_file, **trusted)
    assert unnorm.export(run, "stock", out=tmp_path / "stock", trust_remote_code=True).errors
    if find_spec("transformer_lens"):
        assert unnorm.to_transformer_lens(run, trust_remote_code=True).tokenizer is not None
