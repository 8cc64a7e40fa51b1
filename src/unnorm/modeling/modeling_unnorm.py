"""Transformers classes for models whose norms have been folded away, for every family in transformers.

This file travels with every checkpoint (`trust_remote_code=True` loads it from there), so it needs torch and
transformers only. An LN-free model is its stock class with a few differences, all named in its config: an identity
where each removed norm was (or, if no weight could absorb it, its constant affine map), a bias on the linear layers
that absorbed a norm's bias, an untied unembedding, and in some quadratic MLPs a limit on each neuron's activation.

The classes are created on demand: `UnnormGPT2Config` and `UnnormGPT2LMHeadModel` from `GPT2Config` and
`GPT2LMHeadModel`, and so on. Each is a subclass of its stock class, so that module names, `generate` and tools
that know the family keep working.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor, full, inf, nn, ones, zeros
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 10):  # Version 4 silently misses rotary angles.
    raise ImportError("A checkpoint of unnorm needs transformers 5.10 or later: pip install 'transformers>=5.10'.")

PREFIX = "Unnorm"


class AffineMap(nn.Module):
    """What is left of a norm that no weight could absorb: y = weight * x + bias, x centered first for LayerNorm."""

    def __init__(self, width: int, bias: bool, centered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(ones(width))
        self.bias = nn.Parameter(zeros(width)) if bias else None
        self.centered = centered

    def forward(self, x: Tensor) -> Tensor:
        """The class's equation, over the last dimension."""
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        x = x * self.weight
        return x if self.bias is None else x + self.bias


def strip_norms(
    model: nn.Module,
    removed_norms: Sequence[str],
    added_biases: Sequence[str],
    affine_maps: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Turn a stock model's modules into an LN-free model's, in place; the weights come from the checkpoint.

    Args:
        model: the stock model.
        removed_norms: paths of the norm modules; each becomes an `nn.Identity`.
        added_biases: paths of linear layers without a bias; each gets one, at zero.
        affine_maps: by path, arguments of the `AffineMap` that replaces some removed norms instead.
    """
    kept = affine_maps or {}
    for name in (name for name in removed_norms if not _cut_off(model, name)):
        model.set_submodule(name, AffineMap(**kept[name]) if name in kept else nn.Identity())
    for name in (name for name in added_biases if not _cut_off(model, name)):
        linear = model.get_submodule(name)
        weight = linear.get_parameter("weight")
        outputs = getattr(weight, "ds_shape", weight.shape)[0]  # DeepSpeed leaves weights empty that it shards.
        linear.bias = nn.Parameter(zeros(outputs, dtype=weight.dtype, device=weight.device))


def _cut_off(model: nn.Module, name: str) -> bool:
    """Whether a path lies in a layer that the model no longer has, as with `num_hidden_layers` lowered."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return at is not None and int(parts[at]) >= len(list(model.get_submodule(".".join(parts[:at])).children()))


def limit_neurons(model: nn.Module, writers: Sequence[str], limits: Mapping[str, Tensor] | None = None) -> None:
    """Limit the neurons of MLPs, in place: each is clamped to [-limit, limit] before the MLP's output projection.

    The limits are buffers of these projections.

    Args:
        model: any model.
        writers: paths of linear layers whose inputs are an MLP's neurons.
        limits: by path, shaped (neuron); by default infinite, until a checkpoint fills them in.
    """
    for name in (name for name in writers if not _cut_off(model, name)):
        writer = model.get_submodule(name)
        weight = writer.get_parameter("weight")
        width = getattr(weight, "ds_shape", weight.shape)[0 if type(writer).__name__ == "Conv1D" else 1]
        limit = full((width,), inf, dtype=weight.dtype, device=weight.device)
        writer.register_buffer("limit", limit if limits is None else limit.copy_(limits[name]))
        writer.register_forward_pre_hook(_limited)


def _limited(writer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    limit = writer.get_buffer("limit").to(args[0].dtype)
    return (args[0].clamp(-limit, limit), *args[1:])


def limits_of(model: nn.Module) -> dict[str, Tensor]:
    """Neuron limits, shaped (neuron), by path of the linear layer whose inputs they bound."""
    return {name: module.limit for name, module in model.named_modules() if "limit" in module._buffers}


def ln_free_config(stock: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The stock class's config plus the differences of the twin, such as norms removed and biases added."""
    body = {
        "__module__": __name__,
        "__doc__": f"The config of a {stock.__name__.removesuffix('Config')} without norms.",
        "__annotations__": {
            "removed_norms": list[str] | None,
            "added_biases": list[str] | None,
            "affine_maps": dict[str, dict[str, Any]] | None,
            "kept_norms": list[str] | None,
            "limited_neurons": list[str] | None,
            "tie_word_embeddings": bool,
        },
        "model_type": f"unnorm_{stock.model_type}",
        "removed_norms": None,
        "added_biases": None,
        "affine_maps": None,
        "kept_norms": None,
        "limited_neurons": None,
        "tie_word_embeddings": False,
    }
    return type(PREFIX + stock.__name__, (stock,), body)


def ln_free_model(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The stock class without its norms: the residual stream is a plain sum, and every layer reads it linearly."""

    def initialize(self: Any, config: Any) -> None:
        super(made, self).__init__(config)
        strip_norms(self, config.removed_norms or [], config.added_biases or [], config.affine_maps)
        limit_neurons(self, config.limited_neurons or [])

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super(made, cls).from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        writers = [name for name in model.config.limited_neurons or [] if not _cut_off(model, name)]
        if lost := [name for name in writers if "limit" not in model.get_submodule(name)._buffers]:
            raise ValueError(
                f"The neurons of {lost[0]} lost their limits: something replaced that layer, as quantizers do. Leave "
                "these layers as they are (in bitsandbytes with "
                f'llm_int8_skip_modules=["lm_head", "{lost[0].rpartition(".")[2]}"]).'
            )
        if writers and (getattr(model, "tp_size", None) or 1) > 1:
            raise ValueError(
                "Neurons of this model have limits, which tensor parallelism does not split. Load it with device_map."
            )
        return loaded

    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__} without norms.",
        "__init__": initialize,
        "from_pretrained": classmethod(from_pretrained),
        "config_class": _made(PREFIX + stock.config_class.__name__),
        "_tied_weights_keys": None,
        # Buffers that no checkpoint holds are computed by the stock class's code, which skips custom classes.
        "is_custom_code": classmethod(lambda _: False),
    }
    # transformers reads these off the source of the class's module, which here is this file.
    for able in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        if hasattr(stock, able):
            body[able] = getattr(stock, able)
    made: type[Any] = type(PREFIX + stock.__name__, (stock,), body)
    if stock.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # The Trainer and pipelines look here.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[made.config_class.model_type] = made.__name__
    return made


def __getattr__(name: str) -> Any:
    """An LN-free class by name, made from the stock class of that name minus the prefix."""
    return _made(name)


def _made(name: str) -> Any:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in globals():
        make = ln_free_config if issubclass(stock, PretrainedConfig) else ln_free_model
        globals()[name] = make(stock)
    return globals()[name]
