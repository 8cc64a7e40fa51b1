"""Locates the layers, heads, MLPs and final norm of a model, with or without norms, by running it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.hooks import recorded, replaced_inputs
from unnorm.modeling.modeling_unnorm import PREFIX
from unnorm.models.linear import linear_weight
from unnorm.models.probe import trace_inputs
from unnorm.sites.find import find_sites, inside_attention, unembedding_name
from unnorm.sites.norm_behaviour import affine_parameters, centered
from unnorm.sites.residual import Writer, layer_number, residual_writers
from unnorm.sites.site import NormSite


@dataclass(frozen=True)
class Anatomy:
    """Parts of one model, as module paths.

    Attributes:
        layers: the layers, in order; each reads and writes the residual stream.
        final: the last module to read the residual stream: the final norm, or the identity in its place.
        norm: the final norm, if it is still a norm.
        writers: all modules that write to the residual stream, in the order of the model.
    """

    layers: tuple[str, ...]
    final: str
    norm: NormSite | None
    writers: tuple[Writer, ...]

    @property
    def attentions(self) -> tuple[Writer, ...]:
        """Each layer's attention, in order."""
        return tuple(writer for writer in self.writers if writer.kind == "attention")

    @property
    def mlps(self) -> tuple[Writer, ...]:
        """Each layer's MLP, in order."""
        return tuple(writer for writer in self.writers if writer.kind == "mlp")

    @property
    def heads(self) -> int:
        """Heads per layer; 0 where unknown or not the same in all layers."""
        counts = {writer.heads for writer in self.attentions}
        return counts.pop() if len(counts) == 1 else 0


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a decoder-only model, with or without norms.

    Raises:
        UnnormError: the residual stream is not a plain sum read by a final (former) norm, as in a post-norm model, or
            the model wraps a twin.
    """
    if getattr(model.config, "removed_norms", None) and not type(model).__name__.startswith(PREFIX):
        raise UnnormError(
            f"{type(model).__name__} wraps a twin. Give the twin itself (of torch.compile's result: `._orig_mod`)."
        )
    sites = [] if is_norm_free(model) else find_sites(model, in_place=True, leave_gated=True)
    former = [*(getattr(model.config, "removed_norms", None) or ()), *(site.name for site in sites)]
    final, writers = _last_reader(model, former)
    if final is None:
        raise UnnormError(
            f"The residual stream of {type(model).__name__} is not a plain sum read by a final norm (as in a post-norm "
            "model), so it can't be split into contributions. This analysis is for pre-norm models."
        )
    # A norm after a sublayer is listed as the writer; its kind is that of the module whose output it reads.
    behind = {site.name: site.writers[0] for site in sites if site.writers}
    writers = [_named_by(model, writer, behind.get(writer.name)) for writer in writers]
    order = [name for name, _ in model.named_modules()]
    writers.sort(key=lambda writer: order.index(writer.name))
    layers = sorted({_layer_path(w.name) for w in writers if w.layer is not None}, key=order.index)
    norm = next((site for site in sites if site.name == final), None)
    return Anatomy(tuple(layers), final, norm, tuple(writers))


def is_norm_free(model: PreTrainedModel) -> bool:
    """Whether a model is a twin in which no norm was kept."""
    return type(model).__name__.startswith(PREFIX) and not getattr(model.config, "kept_norms", None)


@torch.no_grad()
def residual_stream(
    model: PreTrainedModel, parts: Anatomy, ids: Int[Tensor, "batch position"]
) -> tuple[Float[Tensor, "depth batch position width"], Float[Tensor, "batch position vocab"]]:
    """Inputs of each layer and, as the last depth, of the final norm (or the identity in its place); and the logits."""
    places = [*parts.layers, parts.final]
    with recorded(model, places) as record:
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.stack([record[name][0].view(*ids.shape, -1) for name in places]), logits


@torch.no_grad()
def logits_from(
    model: PreTrainedModel,
    parts: Anatomy,
    ids: Int[Tensor, "batch position"],
    residual: Float[Tensor, "batch position width"],
) -> Float[Tensor, "batch position vocab"]:
    """The model's logits when `residual` replaces the input of the final norm (or of the identity in its place).

    The whole model runs, so that everything after the final norm (projections, soft caps, scaling) is included.
    """
    with replaced_inputs(model, {parts.final: lambda x: residual.view(x.shape)}):
        return model(input_ids=ids, use_cache=False).logits


@dataclass(frozen=True)
class Readout:
    """How the unembedding reads the residual stream x: logit_t = (x . direction_t) / s(x) + bias_t.

    s(x) is the final norm's scale, 1 in a twin. Directions include the norm's gain, and are centered where the norm
    centers x. A constant factor on all logits (Granite, Cohere) is included in directions and biases. If `capped` (a
    soft cap follows, as in Gemma 2), logit_t is the logit before the cap.
    """

    directions: Float[Tensor, "vocab width"]
    biases: Float[Tensor, " vocab"]
    norm: NormSite | None
    capped: bool

    def scale(self, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token"]:
        """What the final norm divides each token by."""
        if self.norm is None:
            return torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
        x = self.centered(x)
        return (x.square().mean(-1) + self.norm.eps).sqrt()

    def centered(self, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token width"]:
        """A vector as the final norm sees it: minus its mean, for LayerNorm."""
        return centered(x, self.norm is not None and self.norm.centered)


@torch.no_grad()
def readout(model: PreTrainedModel, parts: Anatomy) -> Readout:
    """The unembedding together with the final norm, if there is one.

    Raises:
        UnnormError: the model overflows, or something else lies between the final norm and the unembedding.
    """
    last = unembedding_name(model)
    with recorded(model, [parts.final, last], copies=True) as record:
        logits = model(input_ids=trace_inputs(model), use_cache=False).logits
    if not logits.isfinite().all():
        raise UnnormError(
            "The model overflows on the tokens that its parts are traced with, so what they add to a logit is unknown. "
            "A twin can be trained further: unnorm heal DIR"
        )
    given, (read, unembedded) = record[parts.final][1], record[last]
    if given.shape != read.shape or not torch.equal(given, read):
        raise UnnormError(
            f"In {type(model).__name__} something lies between '{parts.final}' and the unembedding '{last}', so the "
            "residual stream's contribution to a logit is unknown."
        )
    unembedding = model.get_submodule(last)
    directions = linear_weight(unembedding)
    own = getattr(unembedding, "bias", None)
    biases = directions.new_zeros(len(directions)) if own is None else own
    factor = _factor(unembedded, logits)
    capped = factor is None
    if factor not in (None, 1.0):
        directions, biases = factor * directions, factor * biases
    if parts.norm is None:
        return Readout(directions, biases, None, capped)
    gain, bias = affine_parameters(model.get_submodule(parts.norm.name), parts.norm)
    biases = biases if bias is None else biases + directions @ bias.to(directions.dtype)
    directions = directions * gain.to(directions.dtype)
    if parts.norm.centered:
        directions = directions - directions.mean(-1, keepdim=True)
    return Readout(directions, biases, parts.norm, capped)


def _factor(unembedded: Float[Tensor, "*token vocab"], logits: Float[Tensor, "*token vocab"]) -> float | None:
    """The constant factor from the unembedding's output to the logits; None if there is no such constant."""
    if torch.equal(unembedded, logits.to(unembedded.dtype)):
        return 1.0
    before, after = unembedded.cpu().double(), logits.cpu().double()  # Apple GPUs have no float64.
    factor = (before * after).sum() / before.square().sum()
    rounding = max(1e-3, 4 * torch.finfo(logits.dtype).eps)
    alike = torch.allclose(factor * before, after, rtol=rounding, atol=rounding * float(after.abs().max()))
    return float(factor) if alike else None


def attention_patterns(
    model: PreTrainedModel, parts: Anatomy, ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "layer batch head query key"]:
    """Attention weights of every head, from the model's own eager attention.

    Raises:
        UnnormError: the family doesn't return them, or returns a different number of heads than its projections have.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            patterns = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    heads = {writer.heads for writer in parts.attentions if writer.heads}
    is_known = bool(patterns) and all(p is not None and p.ndim == 4 for p in patterns)
    if not is_known or (heads and heads != {p.shape[1] for p in patterns}):
        raise UnnormError(f"{type(model).__name__} does not return the attention weights of its heads.")
    return torch.stack(list(patterns))


def without_heads(model: PreTrainedModel, parts: Anatomy) -> UnnormError | None:
    """Why the heads of a model can't be told apart; None if they can."""
    if parts.heads and len(parts.attentions) == len(parts.layers):
        return None
    return UnnormError(
        f"The heads of {type(model).__name__} can't be separated: what its attention adds to the residual stream is "
        "not one linear projection of the number of heads in its config (a norm may follow it)."
    )


def _last_reader(model: PreTrainedModel, former: Sequence[str]) -> tuple[str | None, list[Writer]]:
    """The (former) norm outside the layers that reads the sum of all layers' outputs, and the writers of that sum."""
    for name in reversed([name for name in former if layer_number(name) is None]):
        writers = residual_writers(model, name) or []
        if len(writers) > 1 and any(writer.kind == "mlp" for writer in writers):
            return name, writers
    return None, []


def _named_by(model: PreTrainedModel, writer: Writer, behind: str | None) -> Writer:
    if behind is None or writer.layer is None:
        return writer
    return replace(writer, kind="attention" if inside_attention(model, behind) else "mlp", heads=0, linear=False)


def _layer_path(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 1 + next(i for i, part in enumerate(parts) if part.isdigit())])


def token_losses(
    logits: Float[Tensor, "batch position vocab"], input_ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch predicted"]:
    """Loss of each token after the first, in nats."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
