"""The residual stream as a sum: who writes to it, and what each head, MLP and bias adds.

Let W_O be the weight of an attention layer's output projection, split into one block of columns for each head, and z
the projection's input, split the same way. Then the attention layer adds

    sum over heads h of W_O[h] z[h]  +  bias

(Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*). Likewise, an MLP's output projection adds
W_out a + bias, a sum over neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.models.linear import linear_weight
from unnorm.sites.find import inside_attention
from unnorm.sites.site import NormSite
from unnorm.sites.tracing import residual_sources, stream_sources

WriterKind = Literal["embedding", "attention", "mlp"]
PartKind = Literal["embedding", "head", "attention", "mlp", "bias"]


@dataclass(frozen=True)
class Writer:
    """A module whose output is added to the residual stream.

    Attributes:
        name: its path.
        kind: what it is part of.
        layer: number of its layer; None outside the layers.
        factor: what its output is multiplied by before it is added; 1 in all but a few families.
        heads: for an attention's output projection, how many heads its input consists of; 0 otherwise or if unknown.
        linear: whether it is a linear layer, so that what it adds is a sum over its inputs, e.g. an MLP's neurons.
    """

    name: str
    kind: WriterKind
    layer: int | None
    factor: float
    heads: int
    linear: bool


@dataclass(frozen=True)
class Part:
    """One term of the residual stream: an embedding, a head, an MLP, a bias, or an attention layer with unknown heads.

    Attributes:
        name: readable label, such as `head 1.3`.
        kind: what it is.
        writer: path of the module that adds it.
        layer: number of the layer; None outside the layers.
        head: number of the head; None for other kinds.
    """

    name: str
    kind: PartKind
    writer: str
    layer: int | None
    head: int | None = None


def residual_writers(model: PreTrainedModel, reader: str) -> list[Writer] | None:
    """The modules whose outputs add up to what the module `reader` reads, in order; None if that is not a plain sum."""
    factors = residual_sources(model, reader)
    if factors is None:
        return None
    return [writer_of(model, name, factor) for name, factor in factors.items()]


def stream_writers(model: PreTrainedModel, sites: Sequence[NormSite]) -> tuple[list[Writer], dict[str, set[str]]]:
    """All writers of the residual stream, in order, and, by name of each site that reads it, the writers before it."""
    sources = stream_sources(model, [site.name for site in sites])
    factors = max(sources.values(), key=len, default={})
    before = {name: set(found) for name, found in sources.items() if found.keys() <= factors.keys()}
    return [writer_of(model, name, factor) for name, factor in factors.items()], before


def mlp_projections(
    model: PreTrainedModel, sites: Sequence[NormSite], writers: Sequence[Writer]
) -> dict[str, tuple[Writer, NormSite | None]]:
    """The MLPs' output projections among the stream's writers, each with the norm that follows it, if one does.

    The keys are the names of the modules whose outputs are added to the residual stream, in order: the norms' where
    there are any, otherwise the projections'. A projection's `factor` is that of what is added.
    """
    following = {site.name: site for site in sites if site.folds_into == "writer"}
    found = {}
    for writer in writers:
        norm = following.get(writer.name)
        projection = writer if norm is None else writer_of(model, norm.writers[0], writer.factor)
        if projection.kind == "mlp" and projection.linear:
            found[writer.name] = projection, norm
    return found


def layer_number(name: str) -> int | None:
    """Number of the layer that a module's path is in; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parts_of(model: PreTrainedModel, writer: Writer) -> list[Part]:
    """The terms that a writer adds: one for each head where heads are known, and a linear layer's bias separately."""
    name, layer = writer.name, writer.layer
    if writer.heads:
        parts = [Part(f"head {layer}.{head}", "head", name, layer, head) for head in range(writer.heads)]
    else:
        label = name if writer.kind == "embedding" else f"{writer.kind} {layer}"
        parts = [Part(label, writer.kind, name, layer)]
    if writer.linear and model.get_submodule(name).bias is not None:
        parts.append(Part(f"bias of {name}", "bias", name, layer))
    return parts


def split_output(
    model: PreTrainedModel, writer: Writer, z: Float[Tensor, "*token inside"], output: Float[Tensor, "*token width"]
) -> list[Float[Tensor, "..."]]:
    """What a writer adds to the residual stream, split as in `parts_of`; a bias is one vector for all tokens.

    Args:
        model: the model.
        writer: one of its writers.
        z: the module's input.
        output: its output.
    """
    module = model.get_submodule(writer.name)
    if not writer.linear:
        return [writer.factor * output]
    cuts = writer.heads or 1
    weights = linear_weight(module).to(z.dtype).chunk(cuts, dim=1)
    parts = [writer.factor * z_head @ weight.T for z_head, weight in zip(z.chunk(cuts, dim=-1), weights, strict=True)]
    return parts if module.bias is None else [*parts, writer.factor * module.bias.to(z.dtype)]


def writer_of(model: PreTrainedModel, name: str, factor: float) -> Writer:
    """The `Writer` for a module whose output is added to the residual stream `factor` times."""
    module, layer = model.get_submodule(name), layer_number(name)
    weight = getattr(module, "weight", torch.empty(0))
    linear = weight.ndim == 2 and not isinstance(module, nn.Embedding)
    if layer is None:
        return Writer(name, "embedding", layer, factor, 0, linear)
    if not inside_attention(model, name):
        return Writer(name, "mlp", layer, factor, 0, linear)
    heads = _heads(model, layer, linear_weight(module).shape[1]) if linear else 0
    return Writer(name, "attention", layer, factor, heads, linear)


def _heads(model: PreTrainedModel, layer: int, width: int) -> int:
    """The layer's number of heads if they split the projection's input into the config's head size, otherwise 0."""
    config: Any = model.config.get_text_config()
    layers = getattr(config, "per_layer_config", None)  # Gemma 4's layers have heads of different sizes.
    config = config if layers is None else layers[layer]
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    if not heads or width % heads:
        return 0
    size = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    return heads if size in (None, width // heads) else 0
