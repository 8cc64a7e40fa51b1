"""The control of a run: asked for afterwards, in the way, of fewer tokens, diverging."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import unnorm
from tests.running import SETTINGS
from unnorm.errors import RunInterruptedError
from unnorm.removal import remove as removal
from unnorm.run_directory import read_rows
from unnorm.training import distillation


def test_a_control_may_be_asked_for_afterwards(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file)}
    together = unnorm.remove(out=tmp_path / "together", control=True, **options)
    first = unnorm.remove(out=tmp_path / "run", **options)
    path = tmp_path / "run" / "result.json"
    path.write_text(json.dumps(first | {"plan": first["plan"] | {"device": "cuda"}}))  # The twin's, not the control's.
    twin = load_file(tmp_path / "run" / "model" / "model.safetensors")
    result = unnorm.remove(out=tmp_path / "run", resume=True, control=True)
    assert result["plan"]["device"] == "cuda"
    assert {key: result[key] for key in ("control_loss", "gap", "kl", "naive_kl", "tokens")} == {
        key: together[key] for key in ("control_loss", "gap", "kl", "naive_kl", "tokens")
    }
    assert result["seconds"] > first["seconds"]
    assert all(torch.equal(w, twin[k]) for k, w in load_file(tmp_path / "run" / "model" / "model.safetensors").items())
    assert "Gap to the control" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(unnorm.UnnormError, match="is finished: there is nothing to resume"):
        unnorm.remove(out=tmp_path / "run", resume=True, control=True)


@pytest.mark.parametrize("changed", [{"tokens": 40 * 512}, {"kl_budget": 2.0}])
def test_a_control_that_is_asked_for_afterwards_gets_what_the_twin_had(
    changed: dict[str, Any], finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("tokens: 0", "tokens: 512"))
    with pytest.raises(unnorm.UnnormError, match=f"was started with {next(iter(changed))}"):
        unnorm.remove(out=run, resume=True, control=True, **changed)


def test_a_control_that_is_asked_for_afterwards_gets_the_same_text(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    text, run = tmp_path / "a.txt", tmp_path / "run"
    text.write_text(text_file.read_text())
    before = unnorm.remove(str(tiny_model_dir), out=run, data=str(text), **SETTINGS)
    text.write_text(text_file.read_text().replace("self", "them"))
    with pytest.raises(unnorm.UnnormError, match="has changed since the twin was trained"):
        unnorm.remove(out=run, resume=True, control=True)
    text.rename(tmp_path / "b.txt")
    with pytest.raises(unnorm.UnnormError, match=r"Its path is set in '.*config\.yaml' \(data: "):
        unnorm.remove(out=run, resume=True, control=True)
    text.write_text("")
    assert json.loads((run / "result.json").read_text()) == before
    text.write_text(text_file.read_text())
    assert unnorm.remove(out=run, resume=True, control=True)["text_sha256"] == before["text_sha256"]


def test_a_control_that_is_in_the_way_may_be_let_go_of(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "control": True}

    def fail(*_: object) -> None:
        raise unnorm.UnnormError("The run diverged.")

    with monkeypatch.context() as patch:
        patch.setattr(removal, "_train_control", fail)
        with pytest.raises(unnorm.UnnormError, match="diverged"):
            unnorm.remove(out=tmp_path / "run", **options)
    result = unnorm.remove(out=tmp_path / "run", resume=True, control=False)
    assert (result["verified"], result["control_loss"]) == (True, None)


def test_a_control_of_fewer_tokens_is_trained_anew(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """It took smaller steps, which would count as large ones."""
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "control": True}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(removal, "conclude", stop)
        with pytest.raises(unnorm.RunInterruptedError):
            unnorm.remove(out=tmp_path / "run", **options)
    assert read_rows(tmp_path / "run" / "control" / "metrics.jsonl")[-1]["step"] == 10
    tokens = 4 * SETTINGS["tokens"]
    result = unnorm.remove(out=tmp_path / "run", resume=True, tokens=tokens)
    rows = read_rows(tmp_path / "run" / "control" / "metrics.jsonl")
    assert result["tokens"] == rows[-1]["tokens"] == tokens and rows[-1]["step"] == 10


def test_a_control_that_diverges_leaves_the_twin(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "tokens": 2048, "control": True}
    monkeypatch.setattr(distillation, "next_token_loss", lambda logits, ids: logits.sum() * math.nan)
    with pytest.raises(unnorm.UnnormError, match=r"by the control.*twin is saved.*--resume.*--no-control"):
        unnorm.remove(out=tmp_path / "run", **options)
    assert unnorm.remove(out=tmp_path / "run", resume=True, control=False)["verified"]


def test_a_control_is_added_where_cleaning_up_was_cut_short(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the data must not be taken for whole."""
    options: dict[str, Any] = {"data": str(text_file), "tokens": 1024, "context": 32, "device": "cpu"}

    def half(directory: Path | str, **more: Any) -> None:
        if (Path(directory).parent / "result.json").exists():
            rmtree(Path(directory) / "train")
            raise KeyboardInterrupt
        rmtree(directory, **more)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(RunInterruptedError):
            unnorm.remove(str(tiny_model_dir), out=tmp_path / "run", **options)
    assert (tmp_path / "run" / "data" / "validation").is_dir()
    result = unnorm.remove(resume=True, out=tmp_path / "run", control=True)
    assert result["control_loss"] is not None


@pytest.mark.parametrize("own", [{"data": "self"}, {"self_share": 0.5}])
def test_a_control_added_to_a_run_on_own_text_gets_that_text(
    own: dict[str, Any], tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original would not write the same again in other batches, as memory or another device may ask for."""
    out = tmp_path / "run"
    before = unnorm.remove(tiny_model_dir, out=out, **({**SETTINGS, "data": str(text_file)} | own))
    monkeypatch.setattr("unnorm.data.sampling._blocks_at_once", lambda *_: 1)
    result = unnorm.remove(out=out, resume=True, control=True)
    assert result["gap"] is not None and result["text_sha256"] == before["text_sha256"]
    assert not (out / "data").exists() and result["earlier_seconds"] == before["earlier_seconds"]


def test_a_control_that_was_deleted_may_be_trained_again(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "tokens": 4 * 512, "model": str(tiny_model_dir), "data": str(text_file), "control": True}
    first = unnorm.remove(out=tmp_path / "run", **options)
    shutil.rmtree(tmp_path / "run" / "control")
    with pytest.raises(unnorm.UnnormError, match=r"has no control.*--resume --control"):
        unnorm.heal(tmp_path / "run", tokens=512, control=True)
    assert unnorm.remove(out=tmp_path / "run", resume=True, control=True)["gap"] == first["gap"]
