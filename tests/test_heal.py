"""More tokens for a finished run's twin: it starts where that ended, without norms, and accounts for all tokens."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

import unnorm
from tests.conftest import Cli, Saved
from tests.families import FAMILIES
from tests.running import ctrl_c_at
from unnorm.models.load import load_original
from unnorm.removal import blocks, remove
from unnorm.runs.plan import default_lr
from unnorm.training import callbacks

TOKENS = 40 * 512
SETTINGS: dict[str, Any] = {"batch_size": 8, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text_file: Path) -> Path:
    """A finished run with its control; don't change it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    text = {"model": str(tiny_model_dir), "data": str(text_file), "context": 64}
    unnorm.remove(out=out, tokens=TOKENS, lr=1e-3, control=True, **text, **SETTINGS)
    return out


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def test_settings_of_generation_are_the_originals(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """A second id that ends a text, say, and the cache, which the Trainer turns off."""
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [0, 5], "bos_token_id": 0}))
    options: dict[str, Any] = {**SETTINGS, "tokens": 1024}
    unnorm.remove(str(tmp_path / "m"), data=str(text_file), context=64, out=tmp_path / "run", control=True, **options)
    unnorm.heal(tmp_path / "run", out=tmp_path / "healed", **options)
    for run in ("run", "healed"):
        for part in ("model", "unfolded", "control"):
            config, generation = (
                json.loads((tmp_path / run / part / f"{name}.json").read_text())
                for name in ("config", "generation_config")
            )
            assert config.get("use_cache", True), (run, part)
            assert generation["eos_token_id"] == [0, 5] and generation.get("use_cache", True), (run, part)
        assert unnorm.load(tmp_path / run)(torch.tensor([[1, 2]])).past_key_values is not None


def test_a_control_whose_training_was_stopped_is_none(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("control")))
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "control_loss": None}))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remove, "train", stop)
        with pytest.raises(unnorm.RunInterruptedError):
            unnorm.remove(out=run, resume=True, control=True)
    assert (run / "control").is_dir()
    with pytest.raises(unnorm.UnnormError, match="no control to train further"):
        unnorm.heal(run, tokens=1024, out=tmp_path / "healed", control=True, **SETTINGS)
    assert unnorm.heal(run, tokens=1024, out=tmp_path / "healed", **SETTINGS)["control_loss"] is None


def test_a_control_that_was_deleted_is_none(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("control")))
    assert unnorm.heal(run, tokens=1024, out=tmp_path / "healed", **SETTINGS)["control_loss"] is None


def test_what_a_stopped_run_would_lack_is_found_when_it_is_resumed(trained: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(trained, tmp_path / "first", ignore=shutil.ignore_patterns("control")))
    with pytest.raises(unnorm.RunInterruptedError):
        unnorm.heal(first, tokens=TOKENS, out=tmp_path / "healed", watch=ctrl_c_at(5), **SETTINGS)
    resume: dict[str, Any] = {"out": tmp_path / "healed", "resume": True}
    with pytest.raises(unnorm.UnnormError, match=r"no control to train further.*--no-control"):
        unnorm.remove(control=True, **resume)
    first.rename(tmp_path / "elsewhere")
    with pytest.raises(unnorm.UnnormError, match="which is no longer there"):
        unnorm.remove(**resume)
    (tmp_path / "elsewhere").rename(first)
    assert unnorm.remove(**resume)["control_loss"] is None


def test_goes_on_where_the_run_ended(trained: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    earlier = json.loads((trained / "result.json").read_text())
    out = tmp_path / "healed"
    result = unnorm.heal(trained, tokens=TOKENS, lr=1e-3, out=out, **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    start, end = rows_of(out, "validation")[0], rows_of(trained, "validation")[-1]
    assert (start["loss"], start["kl"]) == pytest.approx((end["loss"], end["kl"]), rel=1e-4)
    assert {row["sites_removed"] for row in [start, *rows_of(out, "train")]} == {5}
    assert result["kl"] < 0.95 * earlier["kl"]
    assert result["control_loss"] < earlier["control_loss"]
    assert (result["tokens"], result["norm_modules_left"], result["verified"]) == (2 * TOKENS, 0, True)
    same = ("teacher_loss", "naive_loss", "naive_kl", "massive_neurons", "validation_tokens")
    assert [result.get(key) for key in same] == [earlier.get(key) for key in same]
    assert result["plan"]["context"] == earlier["plan"]["context"]
    assert (result["seed"], result["twin"]) == (earlier["seed"] + 1, str(trained))
    for page in (out / "report.html", out / "model" / "README.md"):
        assert "20\u202f480 of these tokens, starting from the twin of a finished run" in page.read_text()


def test_tokens_and_seconds_of_all_runs_add_up(trained: Path, tmp_path: Path) -> None:
    runs = [trained, tmp_path / "second", tmp_path / "third"]
    for run, out in itertools.pairwise(runs):
        result = unnorm.heal(run, tokens=10 * 512, out=out, control=False, **SETTINGS)
    assert result["tokens"] == TOKENS + 20 * 512
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    for key in ("training_seconds", "seconds"):
        assert 0 < results[0][key] < results[1][key] < results[2][key]
    assert [result.get("earlier_seconds") for result in results[1:]] == [result["seconds"] for result in results[:-1]]
    assert results[0]["text_tokens"] < results[1]["text_tokens"] < results[2]["text_tokens"]
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    steps = sum(row["tokens"] / row["tokens_per_second"] for row in last)
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / steps)
    assert result["control_loss"] is None


def test_trains_on_other_text(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[list[int]] = []

    def choose(*arguments: Any) -> Dataset:
        drawn = choose_blocks(*arguments)
        chosen.extend(drawn["input_ids"])
        return drawn

    choose_blocks = blocks._choose
    monkeypatch.setattr(blocks, "_choose", choose)
    for name in ("a", "b"):
        run = trained if name == "a" else tmp_path / "a"
        unnorm.heal(run, tokens=10 * 512, out=tmp_path / name, control=False, **SETTINGS)
    half = len(chosen) // 2
    first, second = ({tuple(block) for block in part} for part in (chosen[:half], chosen[half:]))
    assert len(first & second) < 0.7 * half


def test_interrupted_and_resumed_equals_unbroken(trained: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "tokens": TOKENS, "control": False}
    unnorm.heal(trained, out=tmp_path / "unbroken", **options)

    with pytest.raises(unnorm.RunInterruptedError, match=r"--resume --out .*broken"):
        unnorm.heal(trained, out=tmp_path / "broken", watch=ctrl_c_at(15), **options)
    result = unnorm.remove(out=tmp_path / "broken", resume=True)
    assert result["tokens"] == 2 * TOKENS
    twins = [unnorm.load(tmp_path / name).state_dict() for name in ("unbroken", "broken")]
    assert all(torch.equal(value, twins[1][key]) for key, value in twins[0].items())


def test_a_resumed_run_keeps_its_learning_rate_with_more_tokens(trained: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "tokens": TOKENS // 4, "control": False}
    with pytest.raises(unnorm.RunInterruptedError):
        unnorm.heal(trained, out=tmp_path / "run", watch=ctrl_c_at(3), **options)
    result = unnorm.remove(out=tmp_path / "run", resume=True, tokens=2 * TOKENS)
    used = max(row["lr"] for row in rows_of(tmp_path / "run", "train"))
    assert used <= result["plan"]["lr"] < 1.2 * used


def test_learning_rate_goes_on_from_where_one_long_run_would_have_it(trained: Path, tmp_path: Path) -> None:
    result = unnorm.heal(trained, tokens=TOKENS // 3, out=tmp_path / "a", control=False, **SETTINGS)
    original, _ = load_original(result["model"])
    assert result["plan"]["lr"] == pytest.approx(default_lr(original, "taper") / 4, rel=1e-3)


def test_no_early_end_while_the_learning_rate_is_still_high(trained: Path, tmp_path: Path) -> None:
    """A rate that drives the twin off for the whole run must not end it half way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "LEAST_PATIENCE", 1)
        patch.setattr(callbacks, "PATIENCE", 0.1)
        result = unnorm.heal(trained, tokens=TOKENS, lr=0.03, out=tmp_path / "a", control=False, **SETTINGS)
    assert result["tokens"] == 2 * TOKENS


def test_a_naive_twin(finished_run: Path, tmp_path: Path) -> None:
    naive = json.loads((finished_run / "result.json").read_text())
    result = unnorm.heal(finished_run, tokens=TOKENS, out=tmp_path / "healed", lr=1e-3, **SETTINGS)
    assert result["kl"] < 0.5 * naive["kl"]
    assert (result["tokens"], result["control_loss"]) == (TOKENS, None)


MASSIVE = {"writer": "transformer.h.0.mlp.c_proj", "index": 1, "length": 40.0, "factor": 0.1}


@pytest.mark.parametrize("neurons", [[MASSIVE], []], ids=["massive neurons", "naive removal overflows"])
def test_a_twin_whose_tokens_may_run_away_stays_bounded_while_training(
    neurons: list[dict[str, Any]], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "massive"
    shutil.copytree(trained, run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "massive_neurons": neurons, "naive_loss": None}))
    seen: set[str] = set()

    def take_up(run: remove.Run) -> tuple[PreTrainedModel, Any, Any]:
        model, stand_ins, before = take_up_twin(run)
        seen.update(stand_in.interpolation for stand_in in stand_ins.values())
        return model, stand_ins, before

    take_up_twin = remove.take_up_twin
    monkeypatch.setattr(remove, "take_up_twin", take_up)
    healed = unnorm.heal(run, tokens=10 * 512, out=tmp_path / "healed", control=False, **SETTINGS)
    assert seen == {"bounded"}
    assert healed["massive_neurons"] == neurons and healed["verified"]


def test_the_command(trained: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "healed"
    done = cli("heal", trained, "--tokens", "5k", "--no-control", "--batch-size", 8, "--device", "cpu", "--out", out)
    assert done.code == 0, done.err
    assert "removed 5/5" in done.err and "25,600" in done.out
    text = cli("remove", "--resume", "--out", out)
    assert text.code == 2 and "unnorm heal" in text.err


def test_a_run_healed_on_other_text_does_not_compare_across_texts(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer. " for n in range(2000, 0, -1)))
    options: dict[str, Any] = {"tokens": 1024, "control": False, **SETTINGS}
    result = unnorm.heal(trained, data=other, out=tmp_path / "healed", **options)
    assert result["earlier_data"] == [json.loads((trained / "result.json").read_text())["data"]]
    page, card = (tmp_path / "healed" / name for name in ("report.html", "model/README.md"))
    assert "naive removal" not in page.read_text() and "other ones where the twin was trained on" in page.read_text()
    assert "naive removal" not in card.read_text()
    assert f"`{Path(result['earlier_data'][0]).name}`, then `other.txt`" in card.read_text()
    same = unnorm.heal(trained, out=tmp_path / "same", **options)
    assert same["earlier_data"] == [] and "naive removal" in (tmp_path / "same" / "report.html").read_text()


def test_the_runs_text_has_its_column_when_it_is_named_again(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    data, words = tmp_path / "two.jsonl", text_file.read_text().split("\n\n")
    data.write_text("".join(json.dumps({"text": "a title", "body": part}) + "\n" for part in words))
    options: dict[str, Any] = {"data": data, "tokens": 512, "device": "cpu", "dtype": "float32"}
    before = unnorm.remove(tiny_model_dir, text_field="body", context=32, out=tmp_path / "run", **options)
    healed = unnorm.heal(tmp_path / "run", out=tmp_path / "healed", **options)
    assert healed["teacher_loss"] == pytest.approx(before["teacher_loss"], rel=1e-6) and healed["earlier_data"] == []
    other = unnorm.heal(tmp_path / "run", out=tmp_path / "other", text_field="text", **options)
    assert other["earlier_data"] == [str(data)]


def test_another_split_of_the_runs_text_is_other_text(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    words = text_file.read_text()
    for split, part in (("train", words), ("validation", words[::-1])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(
            json.dumps({"text": part[at : at + 400]}) + "\n" for at in range(0, len(part) - 400, 400)
        ))  # fmt: skip
    options: dict[str, Any] = {"data": tmp_path / "data", "tokens": 512, "device": "cpu", "dtype": "float32"}
    unnorm.remove(tiny_model_dir, out=tmp_path / "run", context=32, **options)
    healed = unnorm.heal(tmp_path / "run", split="validation", out=tmp_path / "healed", **options)
    assert healed["verified"] and healed["earlier_data"] == [str(tmp_path / "data")]


def test_text_named_by_a_relative_path_is_the_same_text_when_healed(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_file.parent)
    unnorm.remove(tiny_model_dir, data=text_file.name, out=tmp_path / "run", **SETTINGS | {"tokens": 0})
    monkeypatch.chdir(tmp_path)
    healed = unnorm.heal(tmp_path / "run", tokens=512, out=tmp_path / "healed", device="cpu", dtype="float32")
    assert healed["earlier_data"] == []
    assert "naive removal" in (tmp_path / "healed" / "report.html").read_text()


def test_the_penalty_at_the_final_norm_stays_there_when_healed(
    saved_family: Saved, text_file: Path, tmp_path: Path
) -> None:
    """OPT's final norm is the first module of its decoder; the last one is an MLP's, which sees merged positions."""
    saved_family(FAMILIES["opt"][0])
    options: dict[str, Any] = {"recipe": "tapernorm", "data": text_file, "device": "cpu", "dtype": "float32"}
    unnorm.remove(tmp_path / "model", out=tmp_path / "run", tokens=512, context=32, batch_size=4, **options)
    healed = unnorm.heal(tmp_path / "run", tokens=512, batch_size=4, out=tmp_path / "healed", dtype="float32")
    assert healed["verified"]
    kept = unnorm.remove(
        tmp_path / "model", out=tmp_path / "kept", tokens=512, context=32, batch_size=4, keep="final_layer_norm$",
        **options | {"recipe": "sequential-aux"},
    )  # fmt: skip
    assert kept["verified"]


def test_other_norms_to_keep_are_refused_at_once(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(unnorm.UnnormError, match=r"removed all norms, and its twin is healed as it is"):
        unnorm.heal(trained, keep="ln_f", tokens=512, out=tmp_path / "healed")
    assert not (tmp_path / "healed").exists()


def test_a_twin_that_overflows_everywhere_is_not_healed(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    result = json.loads((run / "result.json").read_text())
    result["overflowed_blocks"] = result["validation_blocks"]
    (run / "result.json").write_text(json.dumps(result))
    with pytest.raises(unnorm.UnnormError, match=r"overflows on every held-out block.*a new run with more tokens"):
        unnorm.heal(run, tokens=512, out=tmp_path / "healed")
    assert not (tmp_path / "healed").exists()
