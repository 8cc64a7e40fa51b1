"""Run directories that can't be written to, gone on with, healed or proved."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.bad_input.edits import Edit, delete, edit_config, replace_by_pickle, truncate, write
from tests.conftest import Cli
from unnorm import remove


class TestRunDirectories:
    def test_nothing_is_done_that_can_not_be_written(
        self, run_copy: Path, work: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (work / "file").touch()

        def commands(out: Path) -> list[str]:
            return [
                refused("remove", run_copy, "--out", out),
                refused("evaluate", run_copy, "--out", out),
                refused("analyze", run_copy, "--out", out),
            ]

        def fail(*_: Any, **__: Any) -> None:
            pytest.fail("a model was loaded")

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
        assert all(f"'{work / 'file'}' is a file" in text for text in commands(work / "file" / "a"))
        # As for others than root in a read-only directory.
        monkeypatch.setattr("os.access", lambda _, mode, **__: not mode & os.W_OK)
        assert all(f"Nothing can be written to '{work}'" in text for text in commands(work / "new"))

    def test_a_control_without_tokens(
        self, run_copy: Path, tiny_model_dir: Path, work: Path, refused: Callable[..., str]
    ) -> None:
        said = "control: without training tokens, the control is the original"
        assert said in refused("remove", tiny_model_dir, "--tokens", 0, "--control", "--out", work / "new")
        assert said in refused("remove", "--resume", "--control", "--out", run_copy)

    def test_a_twin_that_kept_norms(
        self, tiny_model_dir: Path, text_file: Path, work: Path, refused: Callable[..., str]
    ) -> None:
        remove(str(tiny_model_dir), data=str(text_file), tokens=0, out=work / "kept", keep="ln_f", device="cpu")
        text = refused("remove", work / "kept", "--data", text_file, "--tokens", 0, "--out", work / "new")
        assert "is a twin that kept transformer.ln_f (--keep). Start from its original" in text

    def test_out_is_not_empty(
        self, work: Path, tiny_model_dir: Path, options: list[object], refused: Callable[..., str]
    ) -> None:
        (work / "run").mkdir()
        (work / "run/thesis.txt").write_text("years of work")
        text = refused("remove", tiny_model_dir, *options)
        assert "'run' is not empty" in text
        assert "another --out" in text

    @pytest.mark.parametrize("out", ["run", "run/below"])
    def test_out_is_a_file(
        self, out: str, work: Path, tiny_model_dir: Path, options: list[object], refused: Callable[..., str]
    ) -> None:
        (work / "run").write_text("years of work")
        text = refused("remove", tiny_model_dir, *options[:-1], out)
        assert "'run" in text
        assert "--out" in text

    def test_resume_without_out(self, tiny_model_dir: Path, refused: Callable[..., str]) -> None:
        assert "add --out DIR" in refused("remove", tiny_model_dir, "--resume")

    def test_resume_of_nothing(self, work: Path, refused: Callable[..., str]) -> None:
        (work / "empty").mkdir()
        (work / "file").touch()
        for out in ("empty", "missing", "file"):
            assert f"'{out}' holds no run to resume" in refused("remove", "--resume", "--out", out)

    def test_resume_of_a_finished_run(self, run_copy: Path, refused: Callable[..., str]) -> None:
        message = refused("remove", "--resume", "--out", run_copy)
        assert "is finished: there is nothing to resume" in message and "trains the missing control." in message

    @pytest.mark.parametrize("changed", [["--seed", 1], ["--lr", 0.1], ["--tokens", "5k"], ["--recipe", "sequential"]])
    def test_resume_with_another_setting(
        self, changed: list[object], unfinished_run: Path, refused: Callable[..., str]
    ) -> None:
        text = refused("remove", "--resume", "--out", unfinished_run, *changed)
        assert "was started with" in text
        assert str(changed[0]).removeprefix("--") in text

    def test_resume_with_another_model(self, unfinished_run: Path, refused: Callable[..., str]) -> None:
        assert "was started with model" in refused("remove", "demo", "--resume", "--out", unfinished_run)

    @pytest.mark.parametrize("content", [b"tokens: [", b"just words", b"tokenz: 5"])
    def test_resume_with_damaged_settings(
        self, content: bytes, unfinished_run: Path, refused: Callable[..., str]
    ) -> None:
        (unfinished_run / "config.yaml").write_bytes(content)
        refused("remove", "--resume", "--out", unfinished_run)


class TestHeal:
    def test_no_finished_run(self, work: Path, unfinished_run: Path, refused: Callable[..., str]) -> None:
        (work / "empty").mkdir()
        for directory in ("empty", "missing", unfinished_run):
            assert f"'{directory}' holds no finished run" in refused("heal", directory)

    @pytest.mark.parametrize("tokens", ["0", "many"])
    def test_tokens(self, tokens: str, run_copy: Path, refused: Callable[..., str]) -> None:
        assert "tokens" in refused("heal", run_copy, "--tokens", tokens)

    def test_original_that_was_moved(
        self, run_copy: Path, unfinished_run: Path, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        for run, arguments, remedy in (
            (run_copy, ("heal", run_copy, "--tokens", "1k"), f"'{run_copy / 'config.yaml'}' (model: …)"),
            (unfinished_run, ("remove", "--resume", "--out", unfinished_run), f"'{unfinished_run / 'config.yaml'}'"),
            (run_copy, ("analyze", run_copy), "Or name another with --against."),
        ):
            settings = run / "config.yaml"
            lines = [line for line in settings.read_text().splitlines() if not line.startswith("model:")]
            settings.write_text("\n".join([f"model: {tmp_path / 'gone'}", *lines]))
            said = refused(*arguments)
            assert "No model" in said and remedy in said

    def test_no_control_to_go_on_with(self, run_copy: Path, refused: Callable[..., str]) -> None:
        assert "Heal without it (--no-control)" in refused("heal", run_copy, "--control")

    @pytest.mark.parametrize(
        "edit",
        [
            truncate("unfolded/model.safetensors", 1000),
            delete("unfolded/model.safetensors"),
            delete("unfolded/config.json"),
            delete("sites.json"),
            delete("config.yaml"),
            write("sites.json", b"[]"),
            write("result.json", b"{"),
            write("config.yaml", b"tokens: ["),
        ],
    )
    def test_damaged(self, edit: Edit, run_copy: Path, work: Path, refused: Callable[..., str]) -> None:
        edit(run_copy)
        refused("heal", run_copy, "--tokens", "5k", "--out", "healed")
        assert not (work / "healed").exists()

    def test_out_is_the_run_itself(self, run_copy: Path, refused: Callable[..., str]) -> None:
        assert "is not empty" in refused("heal", run_copy, "--tokens", "5k", "--out", run_copy)


class TestVerify:
    @pytest.mark.parametrize("name", ["empty", "missing", "model"])
    def test_no_run(self, name: str, work: Path, tiny_model_dir: Path, refused: Callable[..., str]) -> None:
        (work / "empty").mkdir()
        directory = tiny_model_dir if name == "model" else Path(name)
        text = refused("verify", directory)
        why = f"There is no directory '{directory}'" if name == "missing" else f"'{directory}' holds no finished run"
        assert why in text and re.search(r"Give (the directory|that) of a finished run", text)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{oops",
            b"\xff\xfe",
            b"[]",
            b"{}",
            b"null",
            b"[1]",
            b'["name"]',
            b'[{"name": "transformer.ln_f"}]',
        ],
    )
    def test_damaged_sites(self, content: bytes, run_copy: Path, refused: Callable[..., str]) -> None:
        (run_copy / "sites.json").write_bytes(content)
        text = refused("verify", run_copy)
        assert "sites.json' is damaged" in text
        assert "Do the run again" in text

    @pytest.mark.parametrize(
        "change",
        [
            {"constant_scale": 0},
            {"constant_scale": -1.5},
            {"constant_scale": "wide"},
            {"constant_scale": None},
            {"constant_scale": float("nan")},
            {"constant_scale": float("inf")},
            {"kind": "batchnorm"},
            {"eps": "small"},
            {"readers": 5},
            {"readers": ["transformer.h.9.attn.c_attn"]},
            {"name": "transformer.h.9.ln_1"},
            {"writers": ["nowhere"]},
        ],
        ids=str,
    )
    def test_damaged_site(self, change: dict[str, Any], run_copy: Path, refused: Callable[..., str]) -> None:
        path = run_copy / "sites.json"
        rows = json.loads(path.read_text())
        rows[1] |= change
        path.write_text(json.dumps(rows))
        text = refused("verify", run_copy)
        assert "sites.json' is damaged" in text

    @pytest.mark.parametrize("part", ["model", "unfolded"])
    @pytest.mark.parametrize(
        "edit",
        [
            delete("config.json"),
            delete("model.safetensors"),
            truncate("model.safetensors", -100),
            truncate("model.safetensors", 0),
            write("config.json", b"{oops"),
            edit_config(n_layer=3),
            edit_config(n_embd=64),
            edit_config(n_layer="two"),
            edit_config(model_type="no-such-type"),
            replace_by_pickle,
        ],
    )
    def test_damaged_models(self, edit: Edit, part: str, run_copy: Path, refused: Callable[..., str]) -> None:
        edit(run_copy / part)
        text = refused("verify", run_copy)
        assert f"{run_copy / part}'" in text
        assert not (run_copy / part / "SPRUNG").exists()

    @pytest.mark.parametrize("change", [{"removed_norms": ["transformer.h.9.ln_1"]}, {"added_biases": ["nothing"]}])
    def test_damaged_twin(self, change: dict[str, Any], run_copy: Path, refused: Callable[..., str]) -> None:
        edit_config(**change)(run_copy / "model")
        assert "is damaged" in refused("verify", run_copy)

    def test_other_weights_fail_the_proof(self, run_copy: Path, cli: Cli) -> None:
        """No refusal, but a proof that fails: exit code 1."""
        poison_first = transformers.AutoModelForCausalLM.from_pretrained(run_copy / "model")
        with torch.no_grad():
            poison_first.transformer.h[0].mlp.c_fc.weight += 0.1
        poison_first.save_pretrained(run_copy / "model")
        result = cli("verify", run_copy)
        assert result.code == 1
        assert "FAILED" in result.out
