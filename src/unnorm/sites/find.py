"""Finding the norm sites of a model by running it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.models.linear import linear_weight
from unnorm.sites.norm_behaviour import eps_of, is_norm, kind_of, stays_with_keep
from unnorm.sites.reading import read_weight
from unnorm.sites.site import FoldsInto, NormSite, Role
from unnorm.sites.tracing import ADDS, HANDS_ON, RESHAPES, UNKNOWN, Trace, goes_only_to, sources_of, traced


def find_sites(
    model: PreTrainedModel, in_place: bool = False, keep: str | None = None, leave_gated: bool = False
) -> list[NormSite]:
    """Every norm site of a decoder-only language model, in the order in which a forward pass meets them.

    Norms are recognized by behaviour: leaf modules whose output does not change when their input is scaled. One
    traced pass shows which linear layers read each norm's output and which modules wrote its input, and so which
    weights can absorb its constant map.

    Args:
        model: the model, in any dtype.
        in_place: allow sites that fold into no weight; each keeps its constant map as a module.
        keep: regular expression; norms whose path contains a match are left out and stay norms.
        leave_gated: leave out norms that take a gate, which can't be removed, instead of refusing the model.

    Raises:
        UnnormError: there are no norms, `keep` is invalid or matches none or all of them, a norm can't be traced or
            takes a gate, or (unless `in_place`) one folds into no weight, as in post-norm models.
    """
    trace = traced(model)
    names = _norm_names(model, trace)
    if not names:
        raise _no_norms(model)
    for name in names:
        if name in trace.hidden:  # Even one to keep: modules beside it may read other norms untraced.
            raise UnnormError(
                f"The norm '{name}' ({type(model.get_submodule(name)).__name__}) is called where no gradient flows, so "
                "it can't be traced. That would need modeling code without its own gradient functions."
            )
    names = _without_kept(names, keep)
    gated = [name for name in names if name in trace.gated]
    if gated and not leave_gated:
        raise _gated(model, gated[0])
    names = [name for name in names if name not in gated]
    sources = {name: sources_of(trace, x.grad_fn, HANDS_ON) for name, x in trace.inputs.items()}
    sites = [_site(model, trace, sources, name) for name in names]
    for site in sites:
        if site.folds_into == "in place" and not in_place:
            raise _not_foldable(model, site)
    return [_with_folded_writers(site, sites) for site in sites]


def _without_kept(names: Sequence[str], keep: str | None) -> list[str]:
    if keep is None:
        return list(names)
    try:
        left = [name for name in names if not re.search(keep, name)]
    except re.error as error:
        raise UnnormError(f"--keep '{keep}' is not a regular expression: {error}.") from error
    if len(left) == len(names):
        raise UnnormError(f"--keep '{keep}' matches none of the norms: {', '.join(names)}.")
    if not left:
        raise UnnormError(f"--keep '{keep}' matches every norm, so there is nothing to remove.")
    return left


def norm_modules(model: PreTrainedModel) -> list[str]:
    """Paths of all leaf modules that normalize, by behaviour, in a pass over text; none in an LN-free model."""
    return _norm_names(model, traced(model))


def norm_modules_and_idle(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """`norm_modules`, and norms in parts that a pass over text does not run, such as a vision tower's."""
    trace = traced(model)
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    idle = weights.keys() - trace.inputs.keys() - trace.hidden.keys()
    return _norm_names(model, trace), [
        name
        for name, weight in weights.items()
        if name in idle and isinstance(weight, Tensor) and is_norm(model.get_submodule(name), weight.shape[-1])
    ]


def unembedding_name(model: PreTrainedModel) -> str:
    """Path of the unembedding."""
    unembedding = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is unembedding)


def _norm_names(model: PreTrainedModel, trace: Trace) -> list[str]:
    widths = trace.hidden | {name: x.shape[-1] for name, x in trace.inputs.items()}
    return [name for name, width in widths.items() if is_norm(model.get_submodule(name), width, name in trace.gated)]


def _site(model: PreTrainedModel, trace: Trace, sources: Mapping[str, list[str]], name: str) -> NormSite:
    module = model.get_submodule(name)
    width = trace.inputs[name].shape[-1]
    readers = tuple(other for other, found in sources.items() if found == [name] and _can_absorb(model, other, name))
    writers = tuple(w for w in sources_of(trace, trace.inputs[name].grad_fn, ADDS) if w != UNKNOWN)
    role = _role(model, name, readers, writers)
    site = NormSite(name, kind_of(module, width), eps_of(module, width), width, role, readers, writers)
    return replace(site, folds_into=_folds_into(model, trace, site))


def _folds_into(model: PreTrainedModel, trace: Trace, site: NormSite) -> FoldsInto:
    if site.readers and goes_only_to(trace, site.name, site.readers):
        return "readers"
    sources = sources_of(trace, trace.inputs[site.name].grad_fn, RESHAPES)
    if len(sources) == 1 and sources[0] != UNKNOWN and goes_only_to(trace, sources[0], (site.name,)):
        writer = model.get_submodule(sources[0])
        if _is_matrix(writer) and _features(writer) % site.width == 0:
            return "writer"
    return "in place"


def _features(writer: nn.Module) -> int:
    return int(writer.weight.shape[1] if isinstance(writer, nn.Embedding) else linear_weight(writer).shape[0])


def _with_folded_writers(site: NormSite, sites: Sequence[NormSite]) -> NormSite:
    """The site, with each writer that is a norm folding into its own writer replaced by that writer."""
    folded = {other.name: other.writers[0] for other in sites if other.folds_into == "writer"}
    return replace(site, writers=tuple(folded.get(writer, writer) for writer in site.writers))


def _not_foldable(model: PreTrainedModel, site: NormSite) -> UnnormError:
    return UnnormError(
        f"The constant map of the norm '{site.name}' ({type(model).__name__}) can't be folded into a weight: its "
        "output is not read by linear layers alone (but by the residual stream, as in a post-norm model, an "
        "activation, or a router that computes in another precision or has no bias to absorb the norm's), and its "
        "input is not one linear layer's output. With --in-place it stays where the norm was, as a fixed affine map."
    )


def _gated(model: PreTrainedModel, name: str) -> UnnormError:
    return UnnormError(
        f"The norm '{name}' ({type(model.get_submodule(name)).__name__}) takes a second tensor besides what it "
        "normalizes: a gate, as in state-space and linear-attention layers. Its output is not a function of its input "
        "alone, so no constant map can replace it; that would take a gated map, folded on both sides of the gate. "
        f"{stays_with_keep(name)}"
    )


def _no_norms(model: PreTrainedModel) -> UnnormError:
    """The error for a model without norms: what it has instead."""
    said = f"{type(model).__name__} has no normalization layers"
    if getattr(model.config, "removed_norms", None):
        count = len(model.config.removed_norms)
        return UnnormError(f"{said}: it is a twin whose {count} norms are already removed. There is nothing to remove.")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    for name, kind in kinds.items():
        if "BatchNorm" in kind:
            return UnnormError(
                f"{said} that depend on the token: '{name}' ({kind}) divides by statistics fixed in training, so it is "
                "an affine map already. Fold it with torch.nn.utils.fusion."
            )
        if "dyt" in kind.lower() or "dynamictanh" in kind.lower():
            return UnnormError(
                f"{said}: '{name}' ({kind}) squashes each feature by itself, whatever the scale of the token. Making "
                "it affine would take another taper, from its tanh to a line; that is not supported."
            )
    return UnnormError(
        f"{said}: no module's output is independent of its input's scale. There is nothing to remove. (Norms that are "
        "not modules can't be removed.)"
    )


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _can_absorb(model: PreTrainedModel, reader: str, norm: str) -> bool:
    """Whether a module has a weight, and if need be a bias, for the norm's constant map."""
    read = read_weight(model.get_submodule(reader))
    added = getattr(model.get_submodule(norm), "bias", None) is not None
    return read is not None and (read.takes_bias or not added)


def _role(model: PreTrainedModel, name: str, readers: Sequence[str], writers: Sequence[str]) -> Role:
    unembedding = model.get_output_embeddings()
    if any(model.get_submodule(reader) is unembedding for reader in readers):
        return "final"
    if not readers and writers and all(isinstance(model.get_submodule(writer), nn.Embedding) for writer in writers):
        return "embedding"
    in_attention = [inside_attention(model, other) for other in (readers or (name, *writers))]
    if all(in_attention):
        return "attention"
    return "attention+mlp" if any(in_attention) and readers else "attention" if any(in_attention) else "mlp"


def inside_attention(model: PreTrainedModel, name: str) -> bool:
    """Whether a module is part of an attention layer, judged by its parents' class names."""
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    classes = [type(parent).__name__.lower() for parent in parents]
    # A transformer layer is more than attention, even where its class is named after it, as in Jamba.
    return any("attention" in kind and not kind.endswith("layer") for kind in classes)
