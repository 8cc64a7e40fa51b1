"""Loading a model and its tokenizer, and refusing early what can't work."""

import hashlib
import math
from collections.abc import Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from unnorm.errors import UnnormError, first_few, short
from unnorm.modeling import register_twin_class
from unnorm.models.probe import trace_inputs
from unnorm.models.sizes import vocabulary_size
from unnorm.models.tokenizer import begin_of_text
from unnorm.paths import named_path
from unnorm.run_directory import model_within

DEMO = "demo"
"""Name of the bundled model: a small GPT-2 trained on the Python standard library's source."""


def model_name(model: str | Path) -> str:
    """What the user calls a model, as text.

    Raises:
        UnnormError: it is neither a name nor a path, such as a model in memory.
    """
    if not isinstance(model, str | Path):
        raise UnnormError(f"Give the name or the directory of a model, not a {type(model).__name__}.")
    return str(model)


def model_path(model: str) -> str:
    """What to ask transformers for: the bundled model's directory for `demo`, a run's `model/`, otherwise the name.

    A local directory named demo has to be written `./demo`, so that `demo` means the same everywhere.
    """
    if model == DEMO:
        return str(resources.files("unnorm") / "demo")
    path = named_path(model)
    return str(model_within(path)) if path.exists() else model


def load_original(model: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in float32, with its tokenizer, ready for evaluation.

    Args:
        model: `demo`, a local directory, a GGUF file (whose weights are dequantized) or a hub id.
        trust_remote_code: run modeling code that comes with the model.

    Raises:
        UnnormError: the model is missing, its files are damaged, it is not a causal language model, its weights are
            quantized or not finite, or the tokenizer is missing or has ids that the model has no embedding for.
    """
    path = model_path(model)
    if _is_gguf(Path(path)):
        loaded, tokenizer = _load_gguf(Path(path))
    else:
        config = _load_config(model, path, trust_remote_code)
        loaded = _load_weights(model, path, config, trust_remote_code)
        tokenizer = load_tokenizer(model, path, trust_remote_code)
    _set_plain(loaded.config)
    # Some configs say tied although there is a separate unembedding, which transformers then loads.
    loaded.config.tie_word_embeddings = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    _check_finite(model, loaded)
    _check_causal(model, loaded)
    _check_tokenizer(model, loaded, tokenizer)
    return loaded, tokenizer


def _set_plain(config: PretrainedConfig) -> None:
    """Settings that change what a model returns or, in RWKV, its own weights each time after it is loaded."""
    config.return_dict = True
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            setattr(config, name, False)
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the names and float32 values of all weights."""
    sha256 = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        sha256.update(key.encode())
        sha256.update(value.detach().float().contiguous().cpu().numpy().tobytes())
    return sha256.hexdigest()


def missing_weights(loading_info: Mapping[str, Any]) -> list[str]:
    """Weights that a checkpoint lacks or has in another shape, according to the loading info of `from_pretrained`."""
    return sorted([*loading_info["missing_keys"], *(key for key, *_ in loading_info["mismatched_keys"])])


def _load_config(model: str, path: str, trust_remote_code: bool) -> PretrainedConfig:
    if not model:
        raise UnnormError("The model name is empty. Give a local directory or a hub id.")
    if Path(path).is_file():  # transformers would unpickle it.
        raise UnnormError(f"'{model}' is a file. Give the directory that holds the model and its config.json.")
    is_local = Path(path).is_dir()
    if is_local and (Path(path) / "adapter_config.json").is_file():
        raise UnnormError(
            f"'{model}' holds an adapter, beside its model or alone. Merge the two (in peft: merge_and_unload) and "
            "`save_pretrained` the result."
        )
    if is_local and not (Path(path) / "config.json").is_file():
        raise UnnormError(
            f"The directory '{model}' holds no model: there is no config.json in it. Give the directory that "
            "`save_pretrained` wrote."
        )
    try:
        register_twin_class(path)
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        _refuse_remote_code(model, error)
        if is_local:
            raise UnnormError(
                f"The config.json of '{model}' can't be used: {short(error)} Fetch it again, or upgrade transformers."
            ) from error
        raise UnnormError(
            f"No model '{model}': neither a local directory nor a hub model that can be reached ({short(error)})."
        ) from error


def _load_weights(model: str, path: str, config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    kind = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise UnnormError(f"'{model}' ({kind}) is an encoder-decoder. Only decoder-only language models are supported.")
    _refuse_quantized(model, config)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # Reported below.
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise UnnormError(f"A weight file of '{model}' is damaged ({short(error)}). Fetch it again.") from error
    except Exception as error:
        _refuse_remote_code(model, error)
        if isinstance(error, OSError) and any(Path(path).glob("*.safetensors")):
            raise UnnormError(
                f"The weights of '{model}' are not complete: model.safetensors.index.json is missing, or files have "
                "other names. Fetch it again."
            ) from error
        if isinstance(error, OSError) and "file named" in str(error):
            raise UnnormError(
                f"'{model}' has no weights in safetensors format, the only one that is read: pickled weights "
                "(pytorch_model.bin) can run code. Fetch it again, or load and `save_pretrained` it if you trust it."
            ) from error
        remedy = "Only decoder-only language models are supported." if "AutoModel" in str(error) else "Fetch it again."
        raise UnnormError(
            f"Could not load '{model}' ({kind}) as a causal language model: {short(error)} {remedy}"
        ) from error
    _refuse_incomplete(model, loaded, info)
    return loaded.eval()


def _load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if find_spec("gguf") is None:
        raise UnnormError(f"Reading '{path}' needs the gguf package. Install it with: pip install 'unnorm[gguf]'.")
    options = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except Exception as error:
        raise UnnormError(
            f"Could not read '{path}': {short(error)} It is damaged, or of a family that transformers does not read "
            "from GGUF; convert it to safetensors."
        ) from error
    _refuse_incomplete(str(path), loaded, info)
    _forget_quantization(loaded)
    return loaded.eval(), tokenizer


def _refuse_incomplete(model: str, loaded: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise an UnnormError if weights are missing: transformers fills them with random numbers."""
    if wrong := missing_weights(info):
        raise UnnormError(
            f"The checkpoint of '{model}' lacks weights of {type(loaded).__name__}, or has them in another shape: "
            f"{first_few(wrong)}. It is incomplete, or of another kind of model; fetch it again."
        )


def _forget_quantization(model: PreTrainedModel) -> None:
    """Mark the weights as dequantized, so that the Trainer accepts the model and saved configs agree."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    vars(model.config).pop("_is_quantized", None)


def load_tokenizer(model: str, path: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which messages call `model`.

    Raises:
        UnnormError: no tokenizer can be loaded, or it comes with code that is not trusted.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if type(tokenizer).__name__ == "MistralCommonBackend":  # Used if mistral-common is installed; not savable.
            return PreTrainedTokenizerFast.from_pretrained(path)
        if not trust_remote_code:  # Else it would be saved with the name of code that is not saved with it.
            tokenizer.init_kwargs.pop("auto_map", None)
        return tokenizer
    except Exception as error:
        _refuse_remote_code(model, error)
        raise UnnormError(
            f"'{model}' has no tokenizer that can be loaded: {short(error)}. Fetch its files again."
        ) from error


def texts_begin_with(checkpoint: Path) -> int | None:
    """As `begin_of_text`, for a checkpoint; None too if its tokenizer can't be loaded, as one with code of its own."""
    try:
        return begin_of_text(load_tokenizer(str(checkpoint), checkpoint, trust_remote_code=False))
    except UnnormError:
        return None


def _check_finite(name: str, model: PreTrainedModel) -> None:
    bad = [key for key, value in model.named_parameters() if not math.isfinite(float(value.detach().sum()))]
    if bad:
        raise UnnormError(
            f"The weights of '{name}' are not finite: NaN or infinity in {first_few(bad)}. "
            "The checkpoint is damaged; fetch it again."
        )


@torch.no_grad()
def _check_causal(name: str, model: PreTrainedModel) -> None:
    ids = trace_inputs(model)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % vocabulary_size(model)
    versions = {key: value._version for key, value in model.named_parameters()}
    try:
        before, after = (model(input_ids=i, use_cache=False).logits[:, :-1] for i in (ids, other))
    except Exception as error:
        raise UnnormError(f"'{name}' can't run on token ids alone: {short(error)}") from error
    changed = [key for key, value in model.named_parameters() if value._version != versions[key]]
    if changed:
        raise UnnormError(
            f"'{name}' ({type(model).__name__}) changes its own weights when it runs ({first_few(changed)}), so a "
            "twin's would be changed again each time it is loaded. Turn that off in its config.json."
        )
    finite = before.isfinite() & after.isfinite()
    # A twin may overflow at some tokens; measuring where is a reason to load it.
    if not finite.all() and not getattr(model.config, "removed_norms", None):
        raise UnnormError(
            f"'{name}' gives logits that are not finite: its weights are too large. The checkpoint is damaged; "
            "fetch it again."
        )
    before, after = before[finite], after[finite]
    # Small random encoders look ahead by a thousandth only; rounding alone, as among experts, is far below.
    if len(before) and (before - after).abs().max() > 1e-4 * before.abs().max():
        raise UnnormError(
            f"'{name}' ({type(model).__name__}) is an encoder: its earlier outputs depend on later tokens. Only "
            "decoder-only language models are supported."
        )


def _check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UnnormError(
            f"'{name}' has no tokenizer, or one without tokens. Put the tokenizer's files beside the model."
        )
    rows = vocabulary_size(model)
    # Special tokens, e.g. padding or image placeholders, may have larger ids: text with one is refused when read.
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    top = max(set(tokenizer.get_vocab().values()) - special, default=-1)
    if top >= rows:
        raise UnnormError(
            f"The tokenizer of '{name}' has ids up to {top}, but the model has embeddings for {rows} tokens only. They "
            "don't belong together; save the model with the tokenizer that it was trained with."
        )
    end = tokenizer.eos_token_id
    if end is not None and end >= rows:
        raise UnnormError(
            f"The tokenizer of '{name}' ends every text with id {end}, but the model has embeddings for {rows} tokens "
            "only. Save it with the end-of-text token that the model was trained with, or with none."
        )


def _refuse_quantized(model: str, config: PretrainedConfig) -> None:
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return
    method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized.quant_method
    raise UnnormError(
        f"The weights of '{model}' are quantized ({getattr(method, 'value', method)}), so constants can't be folded "
        "into them exactly. Fetch its unquantized checkpoint, or load it with transformers, call `.dequantize()` and "
        "`save_pretrained` it."
    )


def _refuse_remote_code(model: str, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise UnnormError(
            f"'{model}' comes with its own code. Read it, and if you trust it, add --trust-remote-code."
        ) from error
