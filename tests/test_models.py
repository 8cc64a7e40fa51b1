"""What loading a model makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import unnorm
from tests.bad_input.edits import edit_config
from tests.conftest import Saved
from tests.families import FAMILIES, IDS, random_model
from unnorm.errors import UnnormError
from unnorm.folding.checkpoint import load_unfolded
from unnorm.models.comparable import check_same_tokenizer
from unnorm.models.load import load_original
from unnorm.models.running import cast_as_loaded, without_noise
from unnorm.models.sizes import blocks_at_once, context_length

OPT: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "word_embed_proj_dim": 32}
SIZES: dict[str, Any] = {"vocab_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}


def with_jitter(config: Any) -> Any:
    config.router_jitter_noise = 0.1
    return config


NOISY = {
    "gpt2, in modules": lambda: hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
    "opt, in numbers": lambda: hf.OPTConfig(**SIZES, **OPT, attention_dropout=0.2, layerdrop=0.5),
    "falcon, in the config": lambda: hf.FalconConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, hidden_dropout=0.2, attention_dropout=0.2
    ),
    "llama": lambda: hf.LlamaConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, attention_dropout=0.3
    ),
    "mixtral, in the router": lambda: with_jitter(FAMILIES["mixtral"][0]()),
}


@pytest.mark.parametrize("family", NOISY)
def test_no_family_has_dropout_while_it_is_off(family: str) -> None:
    model = random_model(NOISY[family])
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))

    def passes() -> list[torch.Tensor]:
        model.train()
        return [model(input_ids=ids, use_cache=False).logits for _ in range(3)]

    saved = model.config.to_dict()
    with without_noise(model):
        first, *others = passes()
        expected = model.eval()(input_ids=ids, use_cache=False).logits
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, expected)
    assert model.config.to_dict() == saved
    first, *others = passes()
    assert not all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("family", "is_random"),
    [("gpt2, in modules", True), ("falcon, in the config", True), ("llama", True), ("mixtral, in the router", False)],
)
def test_dropout_alone_may_stay(family: str, is_random: bool) -> None:
    model = random_model(NOISY[family]).train()
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    with without_noise(model, keep_dropout=True):
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second) != is_random


def test_layers_are_not_left_out_where_dropout_stays() -> None:
    model = random_model(lambda: hf.OPTConfig(**SIZES, **OPT, dropout=0.0, layerdrop=0.5)).train()
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    with without_noise(model, keep_dropout=True):
        first, *others = (model(input_ids=ids, use_cache=False).logits for _ in range(8))
    assert all(torch.equal(first, other) for other in others)


@pytest.fixture
def said_to_be_tied(tiny_model: GPT2LMHeadModel, saved: Saved, tmp_path: Path) -> Path:
    """A GPT-2 whose config says that its unembedding is its embedding, beside an unembedding of its own."""
    directory = saved(tiny_model)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = 2 * weights["transformer.wte.weight"].flip(0).contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_an_unembedding_of_its_own_counts_and_not_what_the_config_says(
    said_to_be_tied: Path, text_file: Path, tmp_path: Path
) -> None:
    original, _ = load_original(str(said_to_be_tied))
    assert not original.config.tie_word_embeddings
    result = unnorm.remove(
        model=str(said_to_be_tied), data=str(text_file), out=tmp_path / "run", tokens=4_000, context=32, device="cpu"
    )
    assert result["verified"]
    unfolded = load_unfolded(tmp_path / "run")
    assert not torch.equal(unfolded.lm_head.weight, unfolded.transformer.wte.weight)
    assert torch.nn.functional.cosine_similarity(unfolded.lm_head.weight, original.lm_head.weight).min() > 0.9


def test_tied_weights_stay_tied(tiny_model_dir: Path) -> None:
    original, _ = load_original(str(tiny_model_dir))
    assert original.config.tie_word_embeddings
    assert original.lm_head.weight is original.transformer.wte.weight


def test_a_tokenizer_with_code_of_its_own_wants_the_flag(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("The repository contains custom code. Please pass `trust_remote_code=True`.")

    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UnnormError, match=r"its own code\. Read it, and if you trust it, add --trust-remote-code"):
        load_original(str(tiny_model_dir))


def test_a_tokenizer_that_can_not_be_saved_is_not_taken(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mistral-common is installed, its own is what transformers gives for a directory with `tekken.json`."""

    class MistralCommonBackend:
        pass

    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda *_, **__: MistralCommonBackend())
    _, tokenizer = load_original(str(tiny_model_dir))
    assert isinstance(tokenizer, hf.PreTrainedTokenizerFast)


def test_as_much_context_as_a_family_says() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    assert context_length(random_model(lambda: hf.BloomConfig(**sizes, seq_length=2048))) == 2048
    assert context_length(random_model(lambda: hf.BloomConfig(**sizes))) == 1024
    mpt = hf.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
    assert context_length(random_model(lambda: mpt)) == 64


def test_few_blocks_at_once_where_the_vocabulary_is_large() -> None:
    model = random_model(lambda: hf.GPT2Config(vocab_size=2**18, n_embd=4, n_layer=1, n_head=1, **IDS))
    assert [blocks_at_once(model, length, most=8) for length in (64, 512, 1024, 4096)] == [8, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_what_loading_in_that_dtype_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    """Rotary frequencies are in no file, and in half precision they would turn late positions by wrong angles."""
    config = hf.LlamaConfig(**{**SIZES, "max_position_embeddings": 2048}, hidden_size=32, intermediate_size=48)
    model = random_model(lambda: config)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = torch.randint(64, (1, 2048), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        assert torch.equal(cast_as_loaded(model, dtype)(input_ids=ids).logits, expected)
        assert not torch.equal(loaded.to(dtype)(input_ids=ids).logits, expected)


def test_tokenizers_that_cover_little_text_are_still_compared() -> None:
    """Of words alone, without one for the unknown: they can't encode ordinary text at all."""

    def of(words: str) -> PreTrainedTokenizerFast:
        backend = Tokenizer(tokenizer_models.WordLevel({word: index for index, word in enumerate(words.split())}))
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    check_same_tokenizer("a", of("1 2 3"), "b", of("1 2 3"))
    with pytest.raises(UnnormError, match="different tokenizers"):
        check_same_tokenizer("a", of("1 2 3"), "b", of("1 3 2"))


def test_positions_up_to_that_of_padding_are_no_context(saved_family: Saved, text_file: Path, tmp_path: Path) -> None:
    """RoBERTa counts positions from there on."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = {**SIZES, "max_position_embeddings": 66, "pad_token_id": 1}
    saved_family(lambda: hf.RobertaConfig(**config, **sizes, is_decoder=True))
    model, _ = load_original(str(tmp_path / "model"))
    assert context_length(model) == 64
    model(input_ids=torch.full((1, 64), 5))
    options: dict[str, Any] = {"data": text_file, "tokens": 0, "in_place": True, "device": "cpu"}
    assert unnorm.remove(tmp_path / "model", out=tmp_path / "run", **options)["plan"]["context"] == 64


def test_an_encoder_that_hardly_looks_ahead_is_one(saved: Saved, tmp_path: Path) -> None:
    """As they come, with small random weights: earlier logits change by a thousandth of the largest."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    for kind in (hf.BertConfig, hf.RobertaConfig):
        config = kind(**sizes, num_hidden_layers=1, max_position_embeddings=66)
        saved(hf.AutoModelForMaskedLM.from_config(config))
        with pytest.raises(UnnormError, match="is an encoder"):
            load_original(str(tmp_path / "model"))


def test_a_model_that_scales_its_own_weights_is_kept_from_it(
    saved_family: Saved, text_file: Path, tmp_path: Path
) -> None:
    """RWKV does so from its sixth layer on, again after each loading."""
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4, "context_length": 64}
    saved_family(lambda: hf.RwkvConfig(vocab_size=64, **sizes, rescale_every=2, **IDS))
    options: dict[str, Any] = {"data": text_file, "tokens": 0, "context": 32, "in_place": True, "device": "cpu"}
    result = unnorm.remove(tmp_path / "model", out=tmp_path / "run", **options)
    assert result["verified"] and result["kl"] == pytest.approx(result["naive_kl"], rel=1e-3)
    with pytest.raises(UnnormError, match=r"can't write text itself.*no key-value cache.*--data"):
        unnorm.remove(tmp_path / "model", out=tmp_path / "own", **(options | {"data": "self"}))


def test_a_model_that_changes_its_weights_when_it_runs_is_refused(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = hf.GPT2LMHeadModel.forward

    def and_change(self: GPT2LMHeadModel, *args: Any, **more: Any) -> Any:
        self.transformer.ln_f.weight.mul_(1.0)
        return forward(self, *args, **more)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", and_change)
    with pytest.raises(UnnormError, match=r"changes its own weights when it runs \(transformer\.ln_f\.weight\)"):
        load_original(str(tiny_model_dir))


def test_a_config_that_asks_for_attention_weights_does_not_keep_a_run_from_being_saved(
    saved_family: Saved, text_file: Path, tmp_path: Path
) -> None:
    saved_family(lambda: hf.LlamaConfig(**SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2))
    edit_config(output_attentions=True)(tmp_path / "model")
    result = unnorm.remove(tmp_path / "model", data=text_file, tokens=0, context=32, out=tmp_path / "run", device="cpu")
    assert result["verified"]
