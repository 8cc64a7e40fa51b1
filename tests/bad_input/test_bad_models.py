"""Models that are not there, of a kind that has no twin, or damaged."""

import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

import unnorm.models.load
from tests.bad_input.edits import (
    GPT2_SIZES,
    Edit,
    Trap,
    delete,
    edit_config,
    poison,
    replace_by_pickle,
    shrink_vocabulary,
    truncate,
    write,
)
from tests.conftest import VOCAB
from unnorm import audit, remove, stats
from unnorm.errors import UnnormError
from unnorm.sites.find import find_sites

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


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
        monkeypatch.setattr(unnorm.models.load, "find_spec", lambda name: None)
        (work / "model.gguf").write_bytes(b"GGUF")
        assert "pip install 'unnorm[gguf]'" in refused("remove", "model.gguf")

    def test_the_original_to_compare_with(self, tiny_model_dir: Path, refused: Callable[..., str]) -> None:
        assert "No model 'no-such-model'" in refused("evaluate", tiny_model_dir, "--against", "no-such-model")

    def test_other_vocabulary(
        self, tiny_model_dir: Path, text_file: Path, save: Callable[..., Path], refused: Callable[..., str]
    ) -> None:
        other = save(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB + 20, **GPT2_SIZES)))
        text = refused("evaluate", other, "--against", tiny_model_dir, "--data", text_file)
        assert "has 300 token embeddings" in text and "has 320" in text


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
        saved = save(transformers.Mamba2ForCausalLM(config))
        text = refused(command, saved, "--data", text_file)
        assert "'backbone.layers.0.mixer.norm' (MambaRMSNormGated) takes a second tensor" in text
        assert r"--keep 'backbone\.layers\.[0-9]+\.mixer\.norm$'" in text
        sites = [site for site, _ in stats(saved, text_file, keep=r"mixer\.norm$")]
        assert sites and not any(site.name.endswith("mixer.norm") for site in sites)

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
            (write("adapter_config.json", b"{}"), "holds an adapter"),
            (delete("tokenizer.json", "tokenizer_config.json"), "has no tokenizer, or one without tokens"),
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
        tokenizer.add_special_tokens({"eos_token": "<end>"})
        tokenizer.save_pretrained(shutil.copytree(work / "m", work / "ends"))
        with pytest.raises(UnnormError, match="ends every text with id 301, but the model has embeddings for 300"):
            remove(str(work / "ends"), data=str(text_file), out=work / "other", **options)
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
        assert not (work / "SPRUNG").exists()
