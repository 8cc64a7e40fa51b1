"""What can't work is refused: exit code 2, one message with cause and remedy, no traceback, nothing written."""

import hashlib
import json
import lzma
import os
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

import unnorm.models
from tests.conftest import VOCAB, Cli, CliResult, randomize
from unnorm import audit, remove
from unnorm.errors import UnnormError
from unnorm.sites import find_sites

Edit = Callable[[Path], None]

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}


def contents(directory: Path) -> dict[str, str]:
    """Every path below a directory with a hash of what is in it."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
    }


def message(result: CliResult) -> str:
    """The one paragraph that is said when something is refused."""
    assert result.code == 2, result
    assert "Traceback" not in result.err + result.out
    assert not result.out
    _, found, text = result.err.partition("unnorm: ")
    assert found, result.err
    assert "unnorm:" not in text
    assert text.count("\n") == 1, text
    assert len(text) < 900
    assert text.rstrip("\n").endswith((".", ")", "DIR"))
    return text.strip()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, so that whatever a run writes would be seen in it."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def refused(cli: Cli, work: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused and leave everything as it was; gives the message."""

    def run(*arguments: object) -> str:
        before = contents(tmp_path)
        text = message(cli(*arguments))
        assert contents(tmp_path) == before
        return text

    return run


@pytest.fixture
def options(text_file: Path) -> list[object]:
    """What a quick run of `unnorm remove` needs besides the model."""
    return ["--data", text_file, "--tokens", 0, "--device", "cpu", "--out", "run"]


@pytest.fixture
def save(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[torch.nn.Module], Path]:
    """Saves a randomized model with the tiny tokenizer."""

    def save_model(model: Any) -> Path:
        randomize(model).save_pretrained(tmp_path / "saved")
        tiny_tokenizer.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save_model


@pytest.fixture
def damaged(tmp_path: Path, tiny_model_dir: Path) -> Callable[[Edit], Path]:
    """A copy of the tiny model, changed for the worse."""

    def copy(edit: Edit) -> Path:
        directory = tmp_path / "damaged"
        shutil.copytree(tiny_model_dir, directory)
        edit(directory)
        return directory

    return copy


@pytest.fixture
def run_copy(tmp_path: Path, finished_run: Path) -> Path:
    """A finished run that may be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "finished"))


@pytest.fixture
def unfinished_run(tmp_path: Path, finished_run: Path) -> Path:
    """A run that was stopped: settings, but no result."""
    directory = tmp_path / "unfinished"
    directory.mkdir()
    shutil.copy(finished_run / "config.yaml", directory)
    return directory


def edit_config(**values: object) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def write(name: str, content: bytes) -> Edit:
    return lambda directory: (directory / name).write_bytes(content) and None


def truncate(name: str, size: int) -> Edit:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size]) and None


def delete(*names: str) -> Edit:
    def edit(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return edit


def poison(value: float) -> Edit:
    def edit(directory: Path) -> None:
        model = transformers.GPT2LMHeadModel.from_pretrained(directory)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[3, 4] = value
        model.save_pretrained(directory)

    return edit


def shrink_vocabulary(directory: Path) -> None:
    config = transformers.GPT2Config(vocab_size=200, **GPT2_SIZES)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def replace_by_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Trap(directory / "SPRUNG")}))


class TestModelNames:
    @pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "./nothing-here", "~no.such.user/m"])
    @pytest.mark.parametrize("command", ["remove", "stats", "evaluate"])
    def test_nothing_there(self, command: str, name: str, refused: Callable[..., str]) -> None:
        text = refused(command, name)
        assert f"No model '{name}'" in text
        assert "local directory" in text
        assert "hub" in text

    @pytest.mark.parametrize("command", ["remove", "stats", "evaluate"])
    def test_a_directory_without_a_model(self, command: str, work: Path, refused: Callable[..., str]) -> None:
        (work / "empty").mkdir()
        assert "no config.json" in refused(command, "empty")

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_file(self, name: str, tiny_model_dir: Path, refused: Callable[..., str]) -> None:
        assert "is a file. Give the directory" in refused("remove", tiny_model_dir / name)

    def test_a_pickle_by_its_name(self, work: Path, refused: Callable[..., str]) -> None:
        (work / "model.bin").write_bytes(pickle.dumps(Trap(work / "SPRUNG")))
        assert "is a file" in refused("remove", "model.bin")

    def test_a_damaged_gguf(self, work: Path, refused: Callable[..., str]) -> None:
        pytest.importorskip("gguf")
        (work / "model.gguf").write_bytes(b"GGUF and then nothing")
        assert "Could not read 'model.gguf'" in refused("remove", "model.gguf")

    def test_a_gguf_without_its_package(
        self, work: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(unnorm.models, "find_spec", lambda name: None)
        (work / "model.gguf").write_bytes(b"GGUF")
        assert "pip install 'unnorm[gguf]'" in refused("remove", "model.gguf")

    def test_the_original_to_compare_with(self, tiny_model_dir: Path, refused: Callable[..., str]) -> None:
        assert "No model 'no-such-model'" in refused("evaluate", tiny_model_dir, "--against", "no-such-model")

    def test_other_vocabulary(
        self, tiny_model_dir: Path, text_file: Path, save: Callable[..., Path], refused: Callable[..., str]
    ) -> None:
        other = save(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB + 20, **GPT2_SIZES)))
        text = refused("evaluate", other, "--against", tiny_model_dir, "--data", text_file)
        assert "vocabularies differ (300, 320)" in text


def opt(**settings: Any) -> transformers.PreTrainedModel:
    sizes = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**{**sizes, **settings}))


class TestKindsOfModels:
    @pytest.mark.parametrize("class_name", ["BertLMHeadModel", "BertForMaskedLM"])
    @pytest.mark.parametrize("command", ["remove", "stats", "evaluate"])
    def test_encoder(
        self, command: str, class_name: str, save: Callable[..., Path], refused: Callable[..., str]
    ) -> None:
        model = getattr(transformers, class_name)(transformers.BertConfig(**SIZES))
        text = refused(command, save(model))
        assert "is an encoder" in text
        assert "Only decoder-only" in text

    @pytest.mark.parametrize("command", ["remove", "stats", "evaluate"])
    def test_encoder_decoder(self, command: str, save: Callable[..., Path], refused: Callable[..., str]) -> None:
        config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8)
        text = refused(command, save(transformers.T5ForConditionalGeneration(config)))
        assert "encoder-decoder" in text
        assert "Only decoder-only" in text

    def test_no_language_model(self, save: Callable[..., Path], refused: Callable[..., str]) -> None:
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
        assert "Only decoder-only" in refused("remove", save(transformers.ViTModel(config)))

    @pytest.mark.parametrize(
        ("make", "kind"),
        [
            (lambda: opt(do_layer_norm_before=False), "OPT|opt"),
            (
                lambda: transformers.OpenAIGPTLMHeadModel(
                    transformers.OpenAIGPTConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4)
                ),
                "OpenAI|openai",
            ),
            (lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True)), "Bert|bert"),
            (
                lambda: transformers.MambaForCausalLM(
                    transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
                ),
                "Mamba|mamba",
            ),
        ],
        ids=["post-norm OPT", "GPT", "BERT decoder", "Mamba"],
    )
    def test_families_not_handled(
        self,
        make: Callable[[], torch.nn.Module],
        kind: str,
        save: Callable[..., Path],
        options: list[object],
        refused: Callable[..., str],
    ) -> None:
        text = refused("remove", save(make()), *options)
        assert any(name in text for name in kind.split("|"))
        assert "post-norm" in text or "does more with its norms than call them" in text

    @pytest.mark.parametrize("command", ["remove", "stats"])
    def test_gated_norms(
        self, command: str, save: Callable[..., Path], text_file: Path, refused: Callable[..., str]
    ) -> None:
        config = transformers.Mamba2Config(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2
        )
        text = refused(command, save(transformers.Mamba2ForCausalLM(config)), "--data", text_file)
        assert "'backbone.layers.0.mixer.norm' (MambaRMSNormGated) takes a second tensor" in text
        assert r"--keep 'backbone\.layers\.[0-9]+\.mixer\.norm$'" in text

    def test_no_float64(self, save: Callable[..., Path], options: list[object], refused: Callable[..., str]) -> None:
        config = transformers.XGLMConfig(
            vocab_size=VOCAB, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=64
        )
        assert "can't compute in float64" in refused("remove", save(transformers.XGLMForCausalLM(config)), *options)

    @pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
    def test_quantized_weights(self, method: str, damaged: Callable[..., Path], refused: Callable[..., str]) -> None:
        text = refused("remove", damaged(edit_config(quantization_config={"quant_method": method})))
        assert f"are quantized ({method})" in text
        assert "dequantize" in text

    @pytest.mark.parametrize(("kind", "expected"), [("DyT", "squashes each feature"), ("BatchNorm", "already")])
    def test_what_is_no_norm(self, kind: str, expected: str) -> None:
        class DyT(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.tanh(0.5 * x)

        class BatchNorm(torch.nn.BatchNorm1d):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x.transpose(1, 2)).transpose(1, 2)

        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, **GPT2_SIZES)).eval()
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.LayerNorm):
                model.set_submodule(name, DyT() if kind == "DyT" else BatchNorm(32).eval())
        with pytest.raises(UnnormError, match=f"no normalization layers.*{kind}.*{expected}"):
            find_sites(model)

    @pytest.mark.parametrize("command", ["remove", "stats"])
    def test_without_norms(
        self, command: str, finished_run: Path, text_file: Path, refused: Callable[..., str]
    ) -> None:
        for directory in (finished_run, finished_run / "model"):
            text = refused(command, directory, "--data", text_file)
            assert "has no normalization layers" in text
            assert "nothing to remove" in text


class TestDamagedModels:
    @pytest.mark.parametrize(
        ("edit", "expected"),
        [
            (poison(float("nan")), "not finite: NaN or infinity in transformer.h.1.mlp.c_fc.weight"),
            (poison(float("inf")), "not finite: NaN or infinity in transformer.h.1.mlp.c_fc.weight"),
            (poison(float("-inf")), "not finite"),
            (poison(3e38), "not finite"),
            (truncate("model.safetensors", -500), "damaged"),
            (truncate("model.safetensors", 50), "damaged"),
            (truncate("model.safetensors", 0), "damaged"),
            (delete("model.safetensors"), "no weights in safetensors form"),
            (write("config.json", b"{oops"), "config.json"),
            (write("config.json", b""), "config.json"),
            (write("config.json", b"[]"), "config.json"),
            (write("config.json", b"{}"), "config.json"),
            (write("config.json", b"\xff\xfe\x00"), "config.json"),
            (edit_config(model_type="no-such-type"), "no-such-type"),
            (edit_config(n_layer="two"), "n_layer"),
            (edit_config(activation_function="no-such-function"), "no-such-function"),
            (edit_config(n_head=5), "divisible"),
            (edit_config(n_layer=3), "lacks weights"),
            (edit_config(n_embd=64), "another shape"),
            (edit_config(vocab_size=200), "another shape: transformer.wte.weight"),
            (delete("tokenizer.json", "tokenizer_config.json"), "without its tokenizer"),
            (write("tokenizer.json", b"{"), "no tokenizer that can be loaded"),
            (shrink_vocabulary, "ids up to 299, but the model has embeddings for 200"),
        ],
    )
    def test_refused(
        self, edit: Edit, expected: str, damaged: Callable[[Edit], Path], refused: Callable[..., str]
    ) -> None:
        directory = damaged(edit)
        for command in ("remove", "stats", "evaluate"):
            text = refused(command, directory)
            assert expected in text
            assert any(word in text for word in ("etch", "save", "Put")), f"no remedy: {text}"

    def test_special_tokens_beyond_the_embedding_are_no_fault(
        self, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path, work: Path
    ) -> None:
        """Gemma 3's tokenizer has one for images, of which its text models know nothing."""
        shutil.copytree(tiny_model_dir, work / "m")
        tokenizer = deepcopy(tiny_tokenizer)
        tokenizer.add_special_tokens({"pad_token": "<image>"})
        assert tokenizer.pad_token_id == len(tiny_tokenizer)
        tokenizer.save_pretrained(work / "m")
        options: dict[str, Any] = {"tokens": 0, "device": "cpu"}
        remove(str(work / "m"), data=str(text_file), out=work / "run", **options)
        assert {row["name"] for row in audit(work / "run", against=work / "m", tokens=512)["classes"]}
        (work / "t.txt").write_text("a picture: <image> " * 400)
        with pytest.raises(UnnormError, match="has token id 300"):
            remove(str(work / "m"), data=str(work / "t.txt"), out=work / "other", **options)

    @pytest.mark.parametrize("command", ["remove", "stats", "evaluate"])
    def test_pickled_weights_are_never_loaded(
        self, command: str, damaged: Callable[[Edit], Path], refused: Callable[..., str]
    ) -> None:
        directory = damaged(replace_by_pickle)
        text = refused(command, directory)
        assert "safetensors" in text
        assert "pickled" in text
        assert not (directory / "SPRUNG").exists()

    def test_code_of_its_own_is_not_run(
        self, damaged: Callable[[Edit], Path], refused: Callable[..., str], work: Path
    ) -> None:
        classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        directory = damaged(edit_config(model_type="own", auto_map=classes))
        (directory / "own.py").write_text(f"open({str(work / 'SPRUNG')!r}, 'w')")
        assert "add --trust-remote-code" in refused("remove", directory)


def test_a_path_that_can_not_be(refused: Callable[..., str], tiny_model_dir: Path) -> None:
    name = 300 * "x"
    for arguments in (("--out", name), ("--data", name)):
        text = refused("remove", tiny_model_dir, *arguments)
        assert "xxx…' can't be used: File name too long" in text


class TestData:
    @pytest.fixture
    def on(self, tiny_model_dir: Path, refused: Callable[..., str]) -> Callable[..., str]:
        """The message of each command that reads text, which must be the same for all."""

        def run(data: object, *more: object) -> str:
            texts = {
                refused("remove", tiny_model_dir, "--tokens", 0, "--out", "run", "--data", data, *more),
                refused("stats", tiny_model_dir, "--data", data, *more),
                refused("evaluate", tiny_model_dir, "--data", data, *more),
            }
            assert len(texts) == 1
            return texts.pop()

        return run

    @pytest.mark.parametrize("name", ["nothing.txt", "./nothing", "nothing/*.jsonl", "a/b/c", ""])
    def test_missing_file(self, name: str, on: Callable[..., str]) -> None:
        text = on(name)
        assert f"No data at '{name}'" in text
        assert "Give a file" in text

    @pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv", "empty.parquet", "empty.bin"])
    def test_empty_file(self, name: str, work: Path, on: Callable[..., str]) -> None:
        (work / name).touch()
        assert "is empty" in on(name)

    @pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl", "blank.jsonl.xz", "blank.csv"])
    def test_no_text_in_it(self, name: str, work: Path, on: Callable[..., str]) -> None:
        content = {"blank.csv": b"id,text\n1,\n", "blank.txt": b" \n\t\n", "blank.jsonl": b'{"text": " "}\n'}
        (work / name).write_bytes(content.get(name, lzma.compress(b"")))
        assert "is empty: there is no text in it" in on(name)

    def test_no_field_with_text(self, work: Path, on: Callable[..., str]) -> None:
        (work / "a.jsonl").write_text('{"id": 1, "title": "a", "body": "b"}\n')
        assert "Name it with --text-field: id, title, body" in on("a.jsonl")
        assert "has no field 'content' (--text-field). It has: id, title, body" in on(
            "a.jsonl", "--text-field", "content"
        )
        assert "The field 'id' of 'a.jsonl' holds int, not text" in on("a.jsonl", "--text-field", "id")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl", b'{"text": "fine"}\n{"text": "unfinished\n'),
            ("a.jsonl", b"no JSON at all\n"),
            ("a.jsonl", b'"only"\n"strings"\n'),
            ("a.jsonl", b'{"text": "\xe9"}\n'),
            ("a.txt", b"\xe9" * 1000),
            ("a.parquet", b"no parquet"),
            ("a.txt.gz", b"not compressed"),
            ("a.txt.bz2", b"not compressed"),
            ("a.txt.xz", b"not compressed"),
            ("a.txt.xz", lzma.compress(b"words and words " * 2000)[:-30]),
            ("a.jsonl.xz", lzma.compress(b'{"text": "words"}\n' * 200)[:-30]),
        ],
    )
    def test_damaged_file(self, name: str, content: bytes, work: Path, on: Callable[..., str]) -> None:
        (work / name).write_bytes(content)
        text = on(name)
        assert f"Could not read '{name}'" in text
        assert "fetch or write it again" in text

    def test_unknown_format(self, work: Path, on: Callable[..., str]) -> None:
        (work / "a.tsv").write_text("words")
        assert "Known: .txt, .md, .jsonl" in on("a.tsv")

    def test_brackets_in_a_name(self, work: Path, on: Callable[..., str]) -> None:
        (work / "a[b].jsonl").write_text('{"a": 1}\n')
        assert "'a[b].jsonl'" in on("a[b].jsonl")
        assert "'[/].txt'" in on("[/].txt")

    def test_less_than_two_blocks(self, work: Path, on: Callable[..., str]) -> None:
        (work / "a.txt").write_text("a few words")
        assert "less than two blocks of 64 tokens" in on("a.txt")
        assert "smaller --context" in on("a.txt", "--context", 32)

    def test_token_files(self, work: Path, on: Callable[..., str]) -> None:
        np.full(2000, VOCAB).astype("<u2").tofile(work / "other.bin")
        assert "token id 300, but the model's vocabulary ends at 299" in on("other.bin")
        (work / "odd.bin").write_bytes(b"\0" * 2001)
        assert "odd number of bytes (2001)" in on("odd.bin")

    def test_split(self, work: Path, text_file: Path, on: Callable[..., str]) -> None:
        assert "has no split 'test' (--split). It has: train" in on(text_file, "--split", "test")


class TestOptions:
    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [
            (["--tokens", "many"], "tokens"),
            (["--tokens", "-5"], "tokens"),
            (["--tokens", "1.5T"], "tokens"),
            (["--tokens", "9" * 400], "tokens"),
            (["--recipe", "magic"], "recipe"),
            (["--dtype", "int8"], "dtype"),
            (["--estimator", "magic"], "estimator"),
            (["--device", "abacus"], "device"),
            (["--device", "cpu:7"], "device"),
            (["--context", "65"], "--context 65 is longer than the 64 tokens"),
            (["--context", "1"], "context"),
            (["--batch-size", "0"], "batch_size"),
            (["--lr", "-1"], "lr"),
            (["--lr", "nan"], "lr"),
            (["--lr", "inf"], "lr"),
            (["--seed", "-1"], "seed"),
            (["--seed", str(2**70)], "seed"),
            (["--report-to", "abacus"], "abacus is not supported"),
            (["--report-to", "comet_ml"], "pip install"),
        ],
    )
    def test_of_remove(
        self, wrong: list[str], expected: str, tiny_model_dir: Path, options: list[object], refused: Callable[..., str]
    ) -> None:
        assert expected in refused("remove", tiny_model_dir, *options, *wrong)

    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [
            (["--tokens", "many"], "--tokens"),
            (["--tokens", "9" * 400], "--tokens"),
            (["--context", "65"], "--context"),
            (["--context", "1"], "--context"),
            (["--context", "0"], "--context"),
            (["--context", "-3"], "--context"),
            (["--device", "abacus"], "device"),
            (["--device", "cpu:7"], "device"),
        ],
    )
    @pytest.mark.parametrize("command", ["evaluate", "stats"])
    def test_of_evaluate_and_stats(
        self,
        command: str,
        wrong: list[str],
        expected: str,
        tiny_model_dir: Path,
        text_file: Path,
        refused: Callable[..., str],
    ) -> None:
        if (command, wrong[0]) != ("stats", "--tokens"):
            assert expected in refused(command, tiny_model_dir, "--data", text_file, *wrong)

    @pytest.mark.parametrize("arguments", [["remove", "--no-such-option"], ["evaluate"], ["no-such-command"]])
    def test_usage(self, arguments: list[str], cli: Cli) -> None:
        result = cli(*arguments)
        assert result.code == 2
        assert "Usage" in result.err
        assert "Traceback" not in result.err

    def test_not_enough_disk(
        self,
        tiny_model_dir: Path,
        options: list[object],
        refused: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        usage = shutil.disk_usage(".")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        text = refused("remove", tiny_model_dir, *options)
        assert "Not enough disk" in text
        assert "--out" in text


class TestConfigFile:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"tokens: [1, 2", "settings.yaml"),
            (b"\xff\xfe\x00", "settings.yaml"),
            (b"just words", "holds no settings"),
            (b"- tokens\n- 5", "holds no settings"),
            (b"tokenz: 5", "tokenz"),
            (b"tokens: 1.5", "tokens"),
            (b"tokens: many", "tokens"),
            (b"1: 2", "1"),
            (b"recipe: [taper]", "recipe"),
            (b"resume: true", "resume"),
        ],
    )
    def test_refused(
        self,
        content: bytes,
        expected: str,
        work: Path,
        tiny_model_dir: Path,
        options: list[object],
        refused: Callable[..., str],
    ) -> None:
        (work / "settings.yaml").write_bytes(content)
        options = [o for o in options if o not in ("--tokens", 0)]
        assert expected in refused("remove", tiny_model_dir, *options, "--config", "settings.yaml")

    def test_missing(self, tiny_model_dir: Path, refused: Callable[..., str]) -> None:
        assert "'nothing.yaml'" in refused("remove", tiny_model_dir, "--config", "nothing.yaml")


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

        monkeypatch.setattr("unnorm.models.load_original", lambda *_: pytest.fail("a model was loaded"))
        assert all(f"'{work / 'file'}' is a file" in text for text in commands(work / "file" / "a"))
        # As for others than root in a read-only directory.
        monkeypatch.setattr("os.access", lambda _, mode, **__: not mode & os.W_OK)
        assert all(f"Nothing can be written to '{work}'" in text for text in commands(work / "new"))

    def test_a_control_without_tokens(
        self, run_copy: Path, tiny_model_dir: Path, work: Path, refused: Callable[..., str]
    ) -> None:
        said = "control: without tokens to train on, the control is the original"
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
        assert "--resume --out DIR" in refused("remove", tiny_model_dir, "--resume")

    def test_resume_of_nothing(self, work: Path, refused: Callable[..., str]) -> None:
        (work / "empty").mkdir()
        (work / "file").touch()
        for out in ("empty", "missing", "file"):
            assert f"'{out}' holds no run to resume" in refused("remove", "--resume", "--out", out)

    def test_resume_of_a_finished_run(self, run_copy: Path, refused: Callable[..., str]) -> None:
        assert "is finished: there is nothing to resume" in refused("remove", "--resume", "--out", run_copy)

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

    def test_no_control_to_go_on_with(self, run_copy: Path, refused: Callable[..., str]) -> None:
        assert "Leave --control out" in refused("heal", run_copy, "--control")

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
        assert f"'{directory}' holds no finished run" in text
        assert "Give the directory of a finished run" in text

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
