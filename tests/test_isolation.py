"""Public functions in a process that goes on: alike in any mode, and nothing of the caller's is changed."""

import gc
import json
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import logging

import unnorm
from tests.analysis.models import PAIRS
from tests.running import SETTINGS, assert_same_weights
from unnorm.analysis.attribution import attribute
from unnorm.analysis.patching import patch
from unnorm.analysis.sinks import sinks
from unnorm.evaluation import evaluate
from unnorm.isolation import isolated
from unnorm.models.load import load_original
from unnorm.models.probe import trace_inputs
from unnorm.training.distillation import DistillationTrainer


class CancelledError(Exception):
    """The caller's own."""


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_grad_mode_does_not_matter(
    mode: Any, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file)}
    unnorm.remove(out=tmp_path / "a", **options)
    with mode():
        before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        unnorm.remove(out=tmp_path / "b", **options)
        assert all(check.passed for check in unnorm.verify(tmp_path / "b"))
        assert unnorm.stats(tiny_model_dir, text_file, context=32)
        unnorm.analyze(tmp_path / "b", what=["attribution", "scales"], tokens=256, context=32)
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == before
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_random_numbers_verbosity_and_precision_of_the_process_go_on(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seeded()
    first, second, third = draws(), draws(), draws()
    seeded()
    before = logging.get_verbosity(), torch.backends.fp32_precision
    assert draws() == first
    unnorm.remove(str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", **SETTINGS)
    assert draws() == second
    unnorm.export(tmp_path / "run", "stock", out=tmp_path / "stock")
    assert draws() == third
    assert (logging.get_verbosity(), torch.backends.fp32_precision) == before


CHOICES = {
    "nothing": "pass",
    "the old way": "torch.set_float32_matmul_precision('high')",
    "for matrices": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "for all": "torch.backends.fp32_precision = 'tf32'",
}


@pytest.mark.parametrize("choice", CHOICES)
def test_float32_is_float32_whatever_the_caller_chose(choice: str, finished_run: Path, text_file: Path) -> None:
    """On a GPU it would be TF32. In a process of its own, since torch's ways of choosing don't mix."""
    code = f"""
import sys, torch, unnorm
places = [torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
def now(): return [place.fp32_precision for place in places]
{CHOICES[choice]}
before, seen = now(), []
unnorm.evaluate(sys.argv[1], data=sys.argv[2], tokens=64, watch=lambda _: seen.extend(now()))
assert now() == before, (before, now())
assert set(seen) == {{"ieee"}}, seen
torch.backends.fp32_precision = "ieee"  # A later choice is followed, where the caller had made none for a place.
assert {choice not in ("nothing", "for all")} or set(now()) == {{"ieee"}}, now()
"""
    command = [sys.executable, "-c", code, str(finished_run), str(text_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["phase", "train"])
@pytest.mark.parametrize("error", [CancelledError, BrokenPipeError])
def test_what_watch_raises_comes_out_as_it_is(
    kind: str, error: type[Exception], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    def watch(row: dict[str, Any]) -> None:
        if row["kind"] == kind and ("text" not in row or "be repeated" in row["text"]):
            raise error("of the caller")

    options = {**SETTINGS, "tokens": 40 * 512, "model": str(tiny_model_dir), "data": str(text_file)}
    with pytest.raises(error, match="of the caller"):
        unnorm.remove(out=tmp_path / "run", watch=watch, **options)


def test_nothing_of_a_training_run_outlives_it(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control would else train beside the twin's optimizer state."""
    alive: list[int] = []
    init = DistillationTrainer.__init__

    def trainers() -> int:
        return sum(isinstance(each, DistillationTrainer) for each in gc.get_objects())

    def count(self: Any, *args: Any, **more: Any) -> None:
        alive.append(trainers() - before)
        init(self, *args, **more)

    monkeypatch.setattr(DistillationTrainer, "__init__", count)
    gc.collect()
    before = trainers()  # What other tests keep.
    unnorm.remove(str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", control=True, **SETTINGS)
    assert alive == [1, 1]  # The one that is being made.


def test_the_callers_default_dtype_does_not_matter(finished_run: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = unnorm.export(finished_run, "stock", out=tmp_path / "stock")
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(row for row in found.errors if row.name == "float32").relative < 1e-5


def test_paths_among_several_texts(text_file: Path, tiny_model_dir: Path) -> None:
    (row,) = evaluate([tiny_model_dir], data=[text_file], tokens=500)
    assert row.data == str(text_file)
    with pytest.raises(unnorm.UnnormError, match="--batch-size 0"):
        evaluate(tiny_model_dir, data=text_file, batch_size=0)


def test_lm_eval_is_left_as_it_was(tiny_model_dir: Path, tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    before = evaluator.get_git_commit_hash
    path = tmp_path / "l.jsonl"
    path.write_text('{"context": "k a", "continuation": "c"}\n' * 4)
    random.seed(1)
    expected = random.random()
    random.seed(1)
    evaluate(tiny_model_dir, data=f"lambada={path}", tasks="lambada_openai")
    assert random.random() == expected
    assert evaluator.get_git_commit_hash is before


def test_analyses_and_bridges_work_in_inference_mode(finished_run: Path, tiny_model: PreTrainedModel) -> None:
    ids = trace_inputs(tiny_model, 2, 8)
    outside = attribute(tiny_model, ids).contributions
    with torch.inference_mode():
        torch.testing.assert_close(attribute(tiny_model, ids).contributions, outside)
        sinks(tiny_model, ids)
        tokenizer = load_original(str(finished_run))[1]
        patch(tiny_model, tokenizer, PAIRS[:1])
        if find_spec("transformer_lens"):
            unnorm.to_transformer_lens(finished_run)


def test_threads_do_not_disturb_each_other(finished_run: Path, text_file: Path) -> None:
    """transformers changes global state while it loads a model."""
    with ThreadPoolExecutor(3) as pool:
        checks = [pool.submit(unnorm.verify, finished_run) for _ in range(2)]
        loads = [pool.submit(unnorm.load, finished_run, dtype) for dtype in 3 * [torch.bfloat16, torch.float64]]
        assert all(check.passed for done in checks for check in done.result())
        found = [{p.dtype for p in done.result().parameters()} for done in loads]
    assert found == 3 * [{torch.bfloat16}, {torch.float64}]


def test_a_watch_may_wait_for_another_thread(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    loaded: list[PreTrainedModel] = []

    def watch(row: dict[str, Any]) -> None:
        if not loaded:
            with ThreadPoolExecutor(1) as pool:
                loaded.append(pool.submit(unnorm.load, tiny_model_dir).result(timeout=60))

    unnorm.remove(tiny_model_dir, data=text_file, out=tmp_path / "run", watch=watch, tokens=0, context=32, device="cpu")
    assert len(loaded) == 1


def test_the_callers_accelerator_is_left_alone(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    mine = Accelerator(gradient_accumulation_steps=8)
    before = mine.mixed_precision, mine.gradient_accumulation_steps, str(mine.device)
    options = {**SETTINGS, "tokens": 512, "dtype": "bfloat16", "data": text_file}
    unnorm.remove(tiny_model_dir, out=tmp_path / "run", **options)
    assert (mine.mixed_precision, mine.gradient_accumulation_steps, str(mine.device)) == before
    assert Accelerator(mixed_precision=mine.mixed_precision).mixed_precision == before[0]


def test_what_watch_raises_in_a_nested_call_comes_out_as_it_is(finished_run: Path, tmp_path: Path) -> None:
    def watch(_: dict[str, Any]) -> None:
        raise FileNotFoundError(2, "no such log", "/my/log.txt")

    with pytest.raises(FileNotFoundError):
        unnorm.heal(finished_run, tokens=512, out=tmp_path / "healed", watch=watch, device="cpu")


def test_a_watch_of_nested_calls_lets_others_in_once_for_all() -> None:
    seen: list[bool] = []

    @isolated
    def inner(watch: Callable[[dict[str, Any]], None]) -> None:
        watch({})

    @isolated
    def outer(watch: Callable[[dict[str, Any]], None]) -> None:
        inner(watch=watch)

    def watch(_: dict[str, Any]) -> None:
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(isolated(lambda: True)).result(timeout=60))

    outer(watch=watch)
    assert seen == [True]
    with ThreadPoolExecutor(1) as pool:  # The lock was given back as often as it was taken.
        assert pool.submit(isolated(lambda: True)).result(timeout=60)


def test_the_callers_default_device_does_not_matter(finished_run: Path, text_file: Path) -> None:
    torch.set_default_device("meta")
    try:
        assert all(check.passed for check in unnorm.verify(finished_run))
        assert unnorm.load(finished_run).device.type == "cpu"
        assert evaluate(finished_run, data=text_file, tokens=200)[0].loss > 0
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("verb", ["evaluate", "audit", "analyze"])
def test_what_can_not_be_a_path_is_refused_in_words(verb: str, finished_run: Path) -> None:
    with pytest.raises(unnorm.UnnormError, match="can't be used: File name too long"):
        getattr(unnorm, verb)(finished_run, data=5000 * "text ")


def test_integers_may_be_numpys(finished_run: Path, text_file: Path, tmp_path: Path) -> None:
    sizes = {"tokens": np.int64(200), "context": np.int64(32), "batch_size": np.int64(2), "seed": np.int64(3)}
    assert evaluate(finished_run, data=text_file, **sizes)[0].context == 32
    some = {"seed": np.int64(3), "tokens": np.int64(64), "data": text_file, "context": np.int64(16)}
    json.dumps(unnorm.audit(finished_run, **some))
    json.dumps(unnorm.analyze(finished_run, what="sinks", out=tmp_path, **some))


@isolated
def broken(error: OSError) -> None:
    raise error from KeyError("the cause")


def test_an_error_without_a_path_keeps_its_cause() -> None:
    with pytest.raises(OSError, match="disk") as raised:
        broken(OSError("disk"))
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("seed", [None, "a", 1.5, -1, 2**70])
def test_seeds_are_whole_numbers(seed: Any, finished_run: Path) -> None:
    for verb in (unnorm.audit, unnorm.analyze, unnorm.evaluate):
        with pytest.raises(unnorm.UnnormError, match=r"--seed .*: give a whole number"):
            verb(finished_run, seed=seed)


def test_a_dtype_that_no_model_is_in_is_no_damage(finished_run: Path) -> None:
    assert unnorm.load(finished_run, "float64").dtype == torch.float64  # type: ignore[arg-type]
    for dtype in (torch.int8, "bogus"):
        with pytest.raises(unnorm.UnnormError, match=r"Choose from torch\.float32, torch\.bfloat16"):
            unnorm.load(finished_run, dtype)  # type: ignore[arg-type]


def test_analyses_may_come_from_a_generator(finished_run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 200, "device": "cpu", "out": tmp_path / "out"}
    found = unnorm.analyze(finished_run, what=(key for key in ("scales", "geometry")), **options)
    assert found["findings"].keys() == {"scales", "geometry"}


def test_all_public_names_are_seen_before_they_are_used() -> None:
    assert dir(unnorm) == sorted(unnorm.__all__)
