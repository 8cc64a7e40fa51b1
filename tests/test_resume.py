"""Going on with a run that was cut short: at any point, of any family, to the same result."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

import unnorm
from tests.conftest import Cli, Saved
from tests.families import FAMILIES
from tests.running import SETTINGS, CrashError, assert_same_weights, crash, ctrl_c_at, stop_at
from unnorm import processes
from unnorm.errors import RunInterruptedError
from unnorm.models.load import load_original
from unnorm.models.sizes import trained_parameters
from unnorm.removal import remove as removal
from unnorm.removal.run import check_disk, needed_disk
from unnorm.run_directory import read_rows, resume_command
from unnorm.runs.config import read_config_file
from unnorm.training.loop import last_checkpoint

CUT_SHORT: dict[str, Callable[[Path], object]] = {
    "weights half written": lambda checkpoint: (checkpoint / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "state half written": lambda checkpoint: (checkpoint / "trainer_state.json").write_text('{"global_step": 9'),
    "config alone": lambda checkpoint: (checkpoint / "config.json").write_text("{}"),
    "nothing": lambda checkpoint: None,
}


@pytest.fixture(scope="module")
def crashed(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that broke off, on `text_file`; copy it."""
    run = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        crash(patch, model=str(tiny_model_dir), data=str(text_file), out=run)
    return run


# Some of the last one's layers share their norms.
@pytest.mark.parametrize("family", ["gpt_neox, sequential", "mixtral", "zamba, not in our list"])
def test_all_weights_come_back_whatever_the_hub_calls_them(
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    saved_family: Saved,
    text_file: Path,
    tmp_path: Path,
) -> None:
    weights = saved_family(FAMILIES[family][0]) / "model.safetensors"
    # As random models come, a gradient is too large sooner or later, and a resumed run has other last good weights.
    calm = {name: weight if weight.ndim == 1 else 0.1 * weight for name, weight in load_file(weights).items()}
    save_file(calm, weights, {"format": "pt"})
    options: dict[str, Any] = {**SETTINGS, "context": 32, "batch_size": 8, "tokens": 10 * 256, "kl_budget": 100}
    options |= {"model": str(tmp_path / "model"), "data": str(text_file), "control": True}
    assert unnorm.remove(out=tmp_path / "unbroken", **options)["skipped_steps"] == 0
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(CrashError):
            unnorm.remove(out=tmp_path / "broken", **options)
    unnorm.remove(out=tmp_path / "broken", resume=True)
    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.parametrize("fault", CUT_SHORT)
def test_a_checkpoint_that_was_cut_short_is_passed_over(crashed: Path, fault: str, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "run")
    whole = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert whole is not None
    cut_short = Path(whole).with_name("checkpoint-15")
    cut_short.mkdir()
    CUT_SHORT[fault](cut_short)
    assert last_checkpoint(tmp_path / "run" / "checkpoints") == whole and not cut_short.exists()


def test_the_time_of_interrupted_parts_counts(crashed: Path, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "seconds": 10_000.0}) + "\n" for row in rows))
    result = unnorm.remove(out=tmp_path / "run", resume=True)
    assert result["seconds"] > result["training_seconds"] > 10_000


def test_metrics_that_were_cut_short_lose_their_last_line_alone(crashed: Path, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    whole = read_rows(file)
    with file.open("a") as rows:
        rows.write(json.dumps(whole[-1])[:40])
    assert read_rows(file) == whole
    assert unnorm.remove(out=tmp_path / "run", resume=True)["verified"]
    assert read_rows(file)[-1]["step"] > whole[-1]["step"]


def test_metrics_that_are_damaged_are_refused(crashed: Path, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text("{\n" + file.read_text())
    with pytest.raises(unnorm.UnnormError, match=r"Line 1 of .*metrics\.jsonl' is damaged"):
        unnorm.remove(out=tmp_path / "run", resume=True)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_that_lacks_weights_is_refused(crashed: Path, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "run")
    file = Path(str(last_checkpoint(tmp_path / "run" / "checkpoints"))) / "model.safetensors"
    weights = load_file(file)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(unnorm.UnnormError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"):
        unnorm.remove(out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(("stage", "recipe"), [("save_folded", "sequential"), ("conclude", "taper")])
def test_a_disk_that_is_full_at_the_end_costs_no_training(
    stage: str, recipe: str, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Nor is there a step more, where the text is gone over a second time and its end is not that of the run."""
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "control": True, "recipe": recipe}
    tokens = unnorm.remove(out=tmp_path / "unbroken", **options)["tokens"]

    def fail(*_: object, **__: object) -> None:
        raise unnorm.UnnormError("Could not write.")

    with monkeypatch.context() as patch:
        patch.setattr(removal, stage, fail)
        with pytest.raises(unnorm.UnnormError, match="Could not write"):
            unnorm.remove(out=tmp_path / "broken", **options)
    if stage == "conclude":  # Before it the control is still to come.
        stop_at(0, monkeypatch)
    result = unnorm.remove(out=tmp_path / "broken", resume=True)
    assert (result["verified"], result["tokens"]) == (True, tokens)
    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")


def saved(directory: Path) -> dict[str, Any]:
    return read_config_file(directory / "config.yaml")


def test_more_tokens_are_more_steps_of_the_same_size(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "batch_size": None, "recipe": "sequential", "out": tmp_path / "run"}
    stop_at(0, monkeypatch)
    with pytest.raises(CrashError):
        unnorm.remove(str(tiny_model_dir), data=str(text_file), **options | {"tokens": 400_000})
    assert saved(tmp_path / "run")["batch_size"] == 21  # 400,000 tokens in 300 steps
    with pytest.raises(CrashError):
        unnorm.remove(out=tmp_path / "run", resume=True, tokens=800_000)
    assert (saved(tmp_path / "run")["batch_size"], saved(tmp_path / "run")["tokens"]) == (21, 800_000)
    monkeypatch.setattr(processes, "join", lambda _: None)  # There are no others to connect to.
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(unnorm.UnnormError, match="takes 21 blocks per step, which 4 processes can't share evenly"):
        unnorm.remove(out=tmp_path / "run", resume=True)


def test_settings_survive_a_disk_that_is_full(crashed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "run")
    before = saved(tmp_path / "run")
    write = Path.write_text

    def fail(path: Path, text: str, **options: Any) -> int:
        write(path, text[:40], **options)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(unnorm.UnnormError, match=r"Could not write.*No space left"):
            unnorm.remove(out=tmp_path / "run", resume=True, kl_budget=2.0)
    assert saved(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["facts.json", "result.json"])
def test_what_says_that_something_is_done_is_whole_or_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    write = Path.write_text

    def fill(path: Path, text: str, **options: Any) -> int:
        full = path.name.endswith(name)
        written = write(path, text[: 0 if full else None], **options)
        if full:
            raise OSError("No space left on device")
        return written

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill)
        with pytest.raises(unnorm.UnnormError, match=r"Could not write.*No space left.*Free some space"):
            unnorm.remove(str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", **SETTINGS)
    assert unnorm.remove(out=tmp_path / "run", resume=True)["verified"]


def test_text_is_written_as_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    code = f"import pathlib, unnorm.paths as r; r.write_text(pathlib.Path({path!r}), '\\u2013')"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **ascii_only}, check=True)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "\u2013\n"


def test_what_the_run_wrote_counts_as_room_that_it_has(
    crashed: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(crashed, tmp_path / "run")
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    model = load_original(str(tiny_model_dir))[0]
    needed = needed_disk(model, control=False)
    for free, enough in ((needed - written, True), (needed - written - 1, False)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            with nullcontext() if enough else pytest.raises(unnorm.UnnormError, match="Free some space"):
                check_disk(tmp_path / "run", model, control=False)


@pytest.mark.parametrize("control", [False, True])
def test_a_run_takes_as_much_disk_as_it_is_checked_for(
    control: bool, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    sizes: list[int] = []
    remove_tree = shutil.rmtree

    def measured(path: Any, *args: Any, **more: Any) -> None:
        """A checkpoint is deleted when the one that replaces it is written, so sizes are largest just before."""
        files = (*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("optimizer.pt"))
        sizes.append(sum(file.stat().st_size for file in files))
        remove_tree(path, *args, **more)

    monkeypatch.setattr(shutil, "rmtree", measured)
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "control": control}
    unnorm.remove(out=tmp_path / "run", **options)
    needed = needed_disk(load_original(str(tiny_model_dir))[0], control)
    assert 0.75 * needed < max(sizes) < 1.05 * needed


def test_more_tokens_of_text_that_is_gone_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    crash(monkeypatch, model=str(tiny_model_dir), data=str(text), out=tmp_path / "run")
    before = saved(tmp_path / "run")
    text.unlink()
    with pytest.raises(unnorm.UnnormError, match="No data at"):
        unnorm.remove(out=tmp_path / "run", resume=True, tokens=10**6)
    assert saved(tmp_path / "run") == before
    assert unnorm.remove(out=tmp_path / "run", resume=True)["verified"]


def test_out_of_tokens_goes_on_with_more(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    said: list[Any] = []
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "out": tmp_path / "run"}
    with pytest.raises(unnorm.UnnormError, match=rf"--resume --out {tmp_path}/run --tokens 20480"):
        unnorm.remove(**options, kl_budget=1e-6)
    result = unnorm.remove(
        out=tmp_path / "run", resume=True, tokens="40960", kl_budget=100, watch=lambda row: said.append(row.get("text"))
    )
    assert (result["verified"], result["tokens"]) == (True, 40960)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 80
    # The text has less than that, and as much of it as there is was read anew.
    assert any("will be repeated" in text for text in said if text)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["tokens"], saved["kl_budget"]) == (40960, 100)


def interrupt(*_: object) -> None:
    """Stands in for a stage at which Ctrl-C is pressed."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["start", "conclude"])
def test_ctrl_c_at_any_time_says_how_to_go_on(
    stage: str, monkeypatch: pytest.MonkeyPatch, cli: Cli, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(removal, stage, interrupt)
        stopped = cli("remove", tiny_model_dir, "--data", text_file, "--tokens", "4k", "--context", 32, "--out", out)
    assert stopped.code == 130
    assert f"unnorm remove --resume --out {out}" in stopped.err
    assert unnorm.remove(out=out, resume=True)["verified"]


def test_what_is_not_saved_yet_is_in_the_command(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = ("--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(removal, "conclude", interrupt)
        cli("remove", tiny_model_dir, "--data", text_file, "--tokens", "4k", "--context", 32, *run)
    for anew in (
        ["--tokens", "8000", "--micro-batch", "1", "--device", "cpu", "--kl-budget", "3.0"],
        ["--control"],
    ):
        with monkeypatch.context() as patch:
            patch.setattr(removal, "load_original", interrupt)
            stopped = cli("remove", "--resume", *run, *anew)
        command = stopped.err.split("unnorm remove ")[-1].split()
        assert command == ["--resume", *map(str, run), *anew]
        assert cli("remove", *command).code == 0


def test_as_many_blocks_at_once_whatever_memory_is_free_by_then(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "out": tmp_path / "run"}
    with pytest.raises(RunInterruptedError):
        unnorm.remove(**options, watch=ctrl_c_at(3))
    enough_for_the_states = 20 * trained_parameters(load_original(str(tiny_model_dir))[0]) + 1
    monkeypatch.setattr("unnorm.runs.plan.free_memory", lambda _: enough_for_the_states)
    assert unnorm.remove(out=tmp_path / "run", resume=True)["plan"]["micro_batch"] == 8
    options |= {"out": tmp_path / "fresh", "tokens": 512}
    assert unnorm.remove(**options)["plan"]["micro_batch"] == 1


def test_options_that_leave_the_choice_open_do_not_contradict_what_was_chosen(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "out": tmp_path / "run"}
    options |= {"batch_size": None, "lr": None}
    with pytest.raises(RunInterruptedError):
        unnorm.remove(**options, watch=ctrl_c_at(3))
    assert unnorm.remove(**options, resume=True)["verified"]


def test_ctrl_c_before_anything_is_written_says_so(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(removal, "write_blocks", interrupt)
    stopped = cli("remove", tiny_model_dir, "--data", text_file, "--out", tmp_path / "run")
    assert stopped.code == 130
    assert "Stopped" in stopped.err
    assert "Traceback" not in stopped.err
    assert not (tmp_path / "run").exists()


def test_sigterm_is_as_good_as_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unnorm", "remove", "demo", "--tokens", "2k", "--context", "32"]
    process = subprocess.Popen([*command, "--out", "run"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    while "reading" not in said and process.poll() is None:
        said += process.stderr.readline()
    process.terminate()
    said += process.stderr.read()
    assert process.wait() == 130
    assert "Stopped" in said


def test_text_that_is_divided_differently_by_then_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    words, data = text_file.read_text(), tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": words[number * 100 :][:4000]}) + "\n" for number in range(150)]
    data.write_text("".join(rows[:4]))
    crash(monkeypatch, model=str(tiny_model_dir), data=str(data), out=tmp_path / "run")
    data.write_text("".join(rows))
    with pytest.raises(unnorm.UnnormError, match=r"by a hash of its .*, but for the run it was the last tenth"):
        unnorm.remove(out=tmp_path / "run", resume=True, tokens=2 * SETTINGS["tokens"])
    assert unnorm.remove(out=tmp_path / "run", resume=True)["verified"]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "train": (lambda run: shutil.rmtree(run / "data" / "train"), r"train' is missing or damaged"),
    "stress": (lambda run: shutil.rmtree(run / "data" / "stress"), r"stress' is missing or damaged"),
    "layout": (lambda run: (run / "checkpoints" / "layout.json").write_text("{"), r"layout.json' is damaged"),
    "layout's keys": (lambda run: (run / "checkpoints" / "layout.json").write_text("{}"), "it lacks some of facts"),
    "facts": (lambda run: (run / "data" / "facts.json").write_text('{"naive_loss": 1}'), r"facts.json' is damaged"),
    "optimizer": (
        lambda run: next(run.glob("checkpoints/*/optimizer.pt")).write_bytes(b"PK\3\4"),
        r"The checkpoint in .* is damaged .*Delete it",
    ),
}


@pytest.mark.parametrize("damaged", DAMAGES)
def test_a_damaged_run_is_refused_in_words(crashed: Path, damaged: str, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "run")
    damage, message = DAMAGES[damaged]
    damage(tmp_path / "run")
    with pytest.raises(unnorm.UnnormError, match=message):
        unnorm.remove(out=tmp_path / "run", resume=True)


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {"model": str(tiny_model_dir), "data": str(text_file)}
    unnorm.remove(out=tmp_path / "whole", **options, **SETTINGS)
    crash(monkeypatch, out=tmp_path / "run", **options)
    next((tmp_path / "run").glob("checkpoints/*/optimizer.pt")).unlink()
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is None
    unnorm.remove(out=tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_an_original_that_has_changed_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    options = {"model": str(model), "data": str(text_file)}
    unnorm.remove(out=tmp_path / "finished", **options, **SETTINGS)
    crash(monkeypatch, out=tmp_path / "broken", **options)
    weights = load_file(model / "model.safetensors")
    weights["transformer.wpe.weight"] += 0.1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    again: dict[str, Callable[[], object]] = {
        "finished": lambda: unnorm.remove(out=tmp_path / "finished", resume=True, control=True),
        "broken": lambda: unnorm.remove(out=tmp_path / "broken", resume=True),
        "healed": lambda: unnorm.heal(tmp_path / "finished", tokens=512, out=tmp_path / "healed"),
    }
    for go_on in again.values():
        with pytest.raises(unnorm.UnnormError, match=r"The weights of '.*model' have changed since the run in"):
            go_on()
    assert not (tmp_path / "healed").exists()


def test_one_command_at_a_time_works_on_a_run(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"data": str(text_file), "tokens": 0, "context": 32, "device": "cpu"}
    second: list[dict[str, Any]] = []

    def meanwhile(row: dict[str, Any]) -> None:
        if "calibrating" not in row.get("text", "") or second:
            return
        with pytest.raises(unnorm.UnnormError, match="Another command is working on"):
            unnorm.remove(out=tmp_path / "unnorm-model", resume=True)
        second.append(unnorm.remove(model="./model", **options))

    (tmp_path / "model").symlink_to(tiny_model_dir)
    first = unnorm.remove(model="./model", watch=meanwhile, **options)
    assert [Path(run["directory"]).name for run in (first, *second)] == ["unnorm-model", "unnorm-model-2"]


def test_code_of_a_run_that_may_be_somebody_elses_is_trusted_anew(crashed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(crashed, tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    with pytest.raises(unnorm.UnnormError, match=r"was started with --trust-remote-code\. Add it again"):
        unnorm.remove(out=run, resume=True)
    assert resume_command(run).endswith(" --trust-remote-code")
    assert unnorm.remove(out=run, resume=True, trust_remote_code=True)["verified"]
