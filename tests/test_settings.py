"""What may be given for an option, in the command line and in Python, and what is kept of it."""

import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from transformers import GPT2LMHeadModel

import unnorm
from unnorm.models.running import copy_model
from unnorm.models.sizes import trained_parameters
from unnorm.runs import plan
from unnorm.runs.config import RemoveConfig, parse_count
from unnorm.taper.recipes import RECIPES, RecipeName


@pytest.mark.parametrize(
    ("text", "count"), [("500k", 500_000), ("1.5B", 1_500_000_000), ("2_000", 2000), (" 7 ", 7), (".5M", 500_000)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["1.6", "2.0", "", "many", "-5", "1e6"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens"):
        parse_count(text)


def test_paths_are_as_good_as_text() -> None:
    settings = RemoveConfig.create(model=Path("a"), data=Path("b.txt"), out="c")
    assert (settings.model, settings.data, settings.out) == ("a", "b.txt", Path("c"))


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(unnorm.UnnormError, match=r"token: Extra.* Known: .*\btokens\b"):
        RemoveConfig.create(token="1M")


def test_saved_paths_hold_from_everywhere(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_file.parent)
    model = os.path.relpath(tiny_model_dir)
    unnorm.remove(model, data="*.txt", tokens=0, context=32, device="cpu", out=tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"] == str(tiny_model_dir)
    assert saved["data"] == str(text_file.parent / "*.txt")
    monkeypatch.chdir(tmp_path)
    assert unnorm.analyze("run", what="scales", tokens="1k")["findings"].keys() == {"scales"}


def test_brackets_in_a_path_are_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "[x]"
    (directory / "model").mkdir(parents=True)
    monkeypatch.chdir(directory)
    assert RemoveConfig.create(model="model", twin="model").to_saved()["model"] == str(directory / "model")


def test_names_that_are_no_paths_are_saved_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib").mkdir()
    saved = RemoveConfig.create(model="demo", data="stdlib").to_saved()
    assert (saved["model"], saved["data"]) == ("demo", "stdlib")
    (tmp_path / "demo").mkdir()
    assert RemoveConfig.create(twin="demo").to_saved()["twin"] == str(tmp_path / "demo")
    assert RemoveConfig.create(model="owner/name", data="owner/text:part").to_saved()["data"] == "owner/text:part"


def test_siblings_take_what_remove_takes(
    finished_run: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {"data": text_file, "tokens": "1k", "context": 32, "device": "cpu"}
    results = unnorm.evaluate(finished_run, tasks="none", **small)
    assert [row.model for row in results] == [str(finished_run)]
    sites = [site.name for site, _ in unnorm.stats(tiny_model_dir, text_file, context=32, device="cpu")]
    assert sites == unnorm.load(finished_run).config.removed_norms
    audited = unnorm.audit(finished_run, tiny_model_dir, tokens=64, context=16, data=text_file, device="cpu")
    analyzed = unnorm.analyze(finished_run, tiny_model_dir, what="scales", out=tmp_path / "analysis", **small)
    assert audited["reference"] == analyzed["original"] == str(tiny_model_dir)
    monkeypatch.setenv("HOME", str(finished_run.parent))
    assert unnorm.load("~/finished").config.removed_norms
    assert all(check.passed for check in unnorm.verify("~/finished"))
    with pytest.raises(unnorm.UnnormError, match="--tokens: 'some' is not a number"):
        unnorm.audit(finished_run, tokens="some")


def test_text_shorter_than_the_run_is_said_to_be(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    said: list[Any] = []
    options: dict[str, Any] = {"model": tiny_model_dir, "context": 32, "device": "cpu", "kl_budget": 100}
    options["watch"] = lambda row: said.append(row.get("text") or "")
    unnorm.remove(data=text_file, tokens=2_000, out=tmp_path / "short", **options)
    assert not any("be repeated" in text for text in said)
    unnorm.remove(data=text_file, tokens=20_000, out=tmp_path / "long", **options)
    assert any("will be repeated" in text and "times: more text" in text for text in said)
    assert not any("no --data" in text for text in said)


@pytest.mark.parametrize(("model", "warned"), [("own", True), ("demo", False)])
def test_a_model_of_ones_own_without_text_is_warned_of(
    model: str, warned: bool, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enough(*_: object, **__: object) -> None:
        raise unnorm.UnnormError("enough")

    monkeypatch.setattr("unnorm.removal.blocks.build_blocks", enough)
    said: list[Any] = []
    name = tiny_model_dir if model == "own" else model
    with pytest.raises(unnorm.UnnormError, match="enough"):
        unnorm.remove(name, out=tmp_path, device="cpu", watch=lambda row: said.append(row.get("text") or ""))
    assert any("no --data was given" in text for text in said) is warned


def test_a_model_that_can_not_be_trained_here_is_refused_at_once(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda _: 100_000)
    options: dict[str, Any] = {"data": text_file, "context": 32, "device": "cpu"}
    with pytest.raises(unnorm.UnnormError, match="GB on cpu for weights"):
        unnorm.remove(tiny_model_dir, out=tmp_path / "run", tokens="4k", **options)
    assert not (tmp_path / "run").exists()
    assert unnorm.remove(tiny_model_dir, out=tmp_path / "run", tokens=0, **options)["verified"]


@pytest.mark.parametrize(("gigabytes_left", "at_once"), [(0, 1), (1, 16)])
def test_only_memory_that_the_states_leave_is_for_activations(
    gigabytes_left: int, at_once: int, tiny_model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = plan.STATE_BYTES * trained_parameters(tiny_model)
    monkeypatch.setattr(plan, "free_memory", lambda _: states + gigabytes_left * 10**9)
    config = RemoveConfig(tokens=4096, batch_size=16, context=2, device="cpu", dtype="float32")
    assert plan.make_plan(config, tiny_model).micro_batch == at_once


def test_too_little_memory_for_a_block_is_said(tiny_model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    states = plan.STATE_BYTES * trained_parameters(tiny_model)
    config = RemoveConfig(tokens=4096, context=64, batch_size=1, device="cpu", dtype="float32")
    said = []
    for left in (10**5, 10**9):
        monkeypatch.setattr(plan, "free_memory", lambda _, left=left: states + left)
        said.append(plan.scarce_memory(config, plan.make_plan(config, tiny_model), tiny_model))
    assert said[1] == "" and "memory may not suffice" in said[0]
    context = int(re.search(r"a --context of (\d+) should fit", said[0])[1])  # type: ignore[index]
    assert 2 <= context < 64
    monkeypatch.setattr(plan, "free_memory", lambda _: states + 10**5)
    shorter = config.model_copy(update={"context": context})
    assert plan.scarce_memory(shorter, plan.make_plan(shorter, tiny_model), tiny_model) == ""


def test_processes_of_one_machine_share_its_memory(
    tiny_model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = (plan.STATE_BYTES + 4) * trained_parameters(tiny_model)  # With what processes exchange.
    monkeypatch.setattr(plan, "free_memory", lambda _: 3 * states)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    config = RemoveConfig(tokens=4096, batch_size=15, context=2, device="cpu", dtype="float32")
    assert plan.make_plan(config, tiny_model, 3).micro_batch == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(unnorm.UnnormError, match="for weights, gradients and the optimizer"):
        plan.make_plan(config, tiny_model, 3)


@pytest.mark.parametrize(("steps", "control_steps"), [(1, 1), (4, 4), (20, 10), (79, 11), (3125, 391)])
def test_the_controls_larger_steps_are_as_many_tokens(
    steps: int, control_steps: int, tiny_model: GPT2LMHeadModel
) -> None:
    config = RemoveConfig(tokens=512 * steps, batch_size=8, context=64, device="cpu", dtype="float32")
    control = plan.control_plan(plan.make_plan(config, tiny_model))
    assert control.steps == control_steps
    assert control.training_tokens == pytest.approx(512 * steps, rel=0.03)


@pytest.mark.parametrize(("tokens", "batch_size"), [(64, 2), (100, 2), (20, 1)])
def test_a_little_less_than_one_step_is_one(tokens: int, batch_size: int, tiny_model: GPT2LMHeadModel) -> None:
    """Only what is not half of one is refused, and where the step could be smaller."""
    config = RemoveConfig(tokens=tokens, batch_size=batch_size, context=64, device="cpu", dtype="float32")
    assert plan.make_plan(config, tiny_model).steps == 1


@pytest.mark.parametrize(("micro_batch", "processes", "records"), [(8, 1, True), (4, 1, False), (4, 2, False)])
def test_steps_that_add_up_gradients_are_not_recorded(micro_batch: int, processes: int, records: bool) -> None:
    sizes: dict[str, Any] = {"tokens": 4096, "context": 64, "batch_size": 8, "steps": 8, "lr": 1e-3}
    fast: dict[str, Any] = {"bfloat16": False, "compile": False, "cuda_graph": True, "device": "cuda"}
    made = plan.Plan(micro_batch=micro_batch, processes=processes, **sizes, **fast)
    assert made.records_steps is records


@pytest.mark.parametrize(("width", "share"), [(768, 1.0), (3072, 0.5)])
@pytest.mark.parametrize("name", get_args(RecipeName))
def test_wider_models_learn_more_slowly(
    name: RecipeName, width: int, share: float, tiny_model: GPT2LMHeadModel
) -> None:
    model = copy_model(tiny_model)
    model.config.n_embd = width
    assert plan.default_lr(model, name) == pytest.approx(share * RECIPES[name].lr_at_768)
    model.config.n_embd = 1
    assert plan.default_lr(model, name) == plan.MOST_LR


@pytest.mark.parametrize(("tokens", "step"), [(40_000, 256), (499_999, 256), (500_000, 512), (6_400_000, 512)])
def test_short_runs_take_smaller_steps(tokens: int, step: int, tiny_model: GPT2LMHeadModel) -> None:
    assert plan.make_plan(RemoveConfig(tokens=tokens, context=64, device="cpu"), tiny_model).step_tokens == step


def test_no_step_takes_more_tokens_than_the_most(tiny_model: GPT2LMHeadModel) -> None:
    made = plan.make_plan(RemoveConfig(tokens=10**9, recipe="sequential", context=64, device="cpu"), tiny_model)
    assert made.step_tokens == plan.MOST_STEP_TOKENS
