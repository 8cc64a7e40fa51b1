"""Folding constant maps exactly into adjacent weights, which turns a model with stand-ins into an LN-free model.

For a site with gain g, bias b, constant scale c and reader W, beta (y = W x + beta):

    W' = W diag(g) C / c        beta' = beta + W b

where C removes the mean (LayerNorm) or is the identity (RMSNorm). A norm after its only writer (query/key norms,
norms after a sublayer or after the embedding) folds into that writer, head by head if it spans one head:

    W' = diag(g) C W / c        beta' = diag(g) C beta / c + b

A map that fits neither case stays where the norm was, as an affine map. Folding is computed in float64.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.errors import UnnormError, first_few, short
from unnorm.modeling import ln_free_class
from unnorm.modeling.modeling_unnorm import limits_of
from unnorm.models.linear import linear_weight
from unnorm.sites.find import norm_modules
from unnorm.sites.reading import ReadWeight, read_weight
from unnorm.sites.site import NormSite
from unnorm.taper.norms import TaperedNorm

_NOT_CARRIED = {
    "model_type",
    "architectures",
    "tie_word_embeddings",
    "transformers_version",
    "auto_map",
    "limited_neurons",
}
"""Config settings of the original that are not copied to its twin."""


@torch.no_grad()
def fold(model: PreTrainedModel, sites: Sequence[NormSite]) -> PreTrainedModel:
    """The LN-free twin of a model whose stand-ins are all affine (alpha = 1).

    Args:
        model: the model with stand-ins, split paths joined again; it is not changed.
        sites: its norm sites.

    Returns:
        A new model of the family's LN-free class, in `model`'s dtype.

    Raises:
        UnnormError: the model's class is not one of transformers' own, or it is a twin that kept norms.
    """
    weights = FoldedWeights(model, sites)
    twin = empty_twin(model, sites, weights)
    # Copies, since weights that nothing was folded into are still the model's own, and may be tied.
    copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    twin.load_state_dict(copies, assign=True)
    return twin.to(dtype=model.dtype, device=model.device)


class FoldedWeights(Mapping[str, Tensor]):
    """The state dict of a twin; each entry is folded on access, so that not all have to be in memory at once."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[NormSite], dtype: torch.dtype | None = None) -> None:
        """Determine what is folded where.

        Args:
            model: the model with stand-ins, split paths joined again.
            sites: its norm sites.
            dtype: of the entries; by default each keeps its own.
        """
        self.model = model
        self.dtype = dtype
        self.plain: dict[str, Tensor] = model.state_dict()
        self.beside: dict[str, list[tuple[TaperedNorm, NormSite]]] = {}
        self.maps: dict[str, TaperedNorm] = {}
        self.added: dict[str, Tensor] = {}
        for site in sites:
            stand_in = model.get_submodule(site.name)
            assert isinstance(stand_in, TaperedNorm)
            for key in [key for key in self.plain if key.startswith(f"{site.name}.")]:
                del self.plain[key]
            if site.folds_into == "in place":
                self.maps[site.name] = stand_in
            for name in site.folded_into:
                self.beside.setdefault(name, []).append((stand_in, site))
                module = model.get_submodule(name)
                if stand_in.bias is not None and not isinstance(module, nn.Embedding):
                    self._add_bias(module, f"{name}.{_bias_name(module)}")
        self.names = [*self.plain, *self.added]
        for name, stand_in in self.maps.items():
            self.names += [f"{name}.weight"] + ([] if stand_in.bias is None else [f"{name}.bias"])
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def added_biases(self) -> list[str]:
        """Paths of the modules that had no bias and get one."""
        return [key.rpartition(".")[0] for key in self.added]

    def _add_bias(self, module: nn.Module, key: str) -> None:
        if key not in self.plain:
            weight = linear_weight(module)
            self.added[key] = weight.new_zeros(weight.shape[0])

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @torch.no_grad()
    def __getitem__(self, key: str) -> Tensor:
        """One entry; raises `KeyError` if the twin has none of that name."""
        name, _, leaf = key.rpartition(".")
        if name in self.maps and key not in self.plain:
            weight, bias = affine_map(self.maps[name])
            entry = {"weight": weight, "bias": bias}[leaf]
            if entry is None:
                raise KeyError(key)
            return entry.to(self.dtype or self.model.dtype)
        if name not in self.beside:
            return self._stored(key)
        if self._last[0] != name:  # Weight and bias are requested one after the other.
            module = self.model.get_submodule(name)
            entries = {key: self._stored(key) for key in (*self.plain, *self.added) if key.rpartition(".")[0] == name}
            for stand_in, site in self.beside[name]:
                _fold_beside(module, name, stand_in, site, entries)
            self._last = (name, entries)
        return self._last[1][key]

    def _stored(self, key: str) -> Tensor:
        value = self.plain[key] if key in self.plain else self.added[key]
        return value.to(self.dtype) if self.dtype is not None and value.is_floating_point() else value


def empty_twin(model: PreTrainedModel, sites: Sequence[NormSite], weights: FoldedWeights) -> PreTrainedModel:
    """The twin with parameters of the right shapes and dtypes, but on the meta device, where they take no memory.

    Raises:
        UnnormError: the model's class is not one of transformers' own, or can't be made from its config.
    """
    family = twin_class(model)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_CARRIED}
    config = family.config_class(
        **settings,
        removed_norms=[site.name for site in sites],
        added_biases=weights.added_biases,
        affine_maps={
            site.name: {
                "width": site.width,
                "bias": weights.maps[site.name].bias is not None,
                "centered": site.centered,
            }
            for site in sites
            if site.name in weights.maps
        },
        kept_norms=sorted(kept_norms(model, sites)),
        limited_neurons=list(limits_of(model)),
        tie_word_embeddings=False,
        architectures=[family.__name__],
    )
    # Each part's own: a single name would also be set in parts that do not support it, as Gemma 4's audio tower.
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    config._attn_implementation = {"": model.config._attn_implementation} | {
        key: part._attn_implementation for key, part in parts.items() if part is not None
    }
    try:
        with init_empty_weights(include_buffers=False):
            twin = family(config).to(dtype=weights.dtype or model.dtype)
    except Exception as error:
        raise UnnormError(
            f"{family.__name__} can't be made from the config of {type(model).__name__}: {short(error)} "
            "The model is refused."
        ) from error
    config._experts_implementation = model.config._experts_implementation
    twin.generation_config = model.generation_config
    return twin.eval()


def twin_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The LN-free class of a model's family.

    Raises:
        UnnormError: the model's class is not one of transformers' own, or it is a twin that kept norms.
    """
    if kept := getattr(model.config, "kept_norms", None):
        raise UnnormError(
            f"This model is a twin that kept {first_few(kept)} (--keep). Start from its original, and keep fewer norms."
        )
    try:
        return ln_free_class(type(model))
    except AttributeError as error:
        raise UnnormError(
            f"{type(model).__name__} is not a class of transformers itself, so a checkpoint of its twin could not be "
            "loaded. Models with their own modeling code are not supported."
        ) from error


def _bias_name(module: nn.Module) -> str:
    read = read_weight(module)
    return "bias" if read is None else read.bias


def kept_norms(model: PreTrainedModel, sites: Sequence[NormSite]) -> set[str]:
    """Norms left in a model with stand-ins: those that are not among the sites."""
    return set(norm_modules(model)) - {site.name for site in sites}


def _fold_beside(module: nn.Module, name: str, norm: TaperedNorm, site: NormSite, weights: dict[str, Tensor]) -> None:
    """Fold a site into one module's entries in `weights`."""
    read = read_weight(module) or ReadWeight("weight", "bias", False, True)
    weight_key, bias_key = f"{name}.{read.weight}", f"{name}.{read.bias}"
    stored, bias = weights[weight_key], weights.get(bias_key)
    # To (out, in): Conv1D, for one, stores (in, out).
    weight = stored.transpose(-1, -2) if read.turned else stored
    if isinstance(module, nn.Embedding):  # A row for each token, so the norm's bias goes into the rows.
        rows, _ = fold_writer(weight.T, None, norm)
        weight = rows.T if norm.bias is None else (rows.T.double() + norm.bias.double()).to(weight.dtype)
    elif site.folds_into == "writer":
        weight, bias = fold_writer(weight, bias, norm)
    elif weight.ndim == 3:  # One expert at a time, so that only one is ever held in float64.
        biases = [None] * len(weight) if bias is None else bias.unbind()
        folded = [fold_reader(w, b, norm) for w, b in zip(weight, biases, strict=True)]
        weight = torch.stack([w for w, _ in folded])
        bias = None if bias is None else torch.stack([b for _, b in folded if b is not None])
    else:
        weight, bias = fold_reader(weight, bias, norm)
    weights[weight_key] = weight.transpose(-1, -2) if read.turned else weight
    if bias is not None:
        weights[bias_key] = bias


def fold_reader(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, norm: TaperedNorm
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """One reader's new weight and bias (None if neither it nor the norm had one), in the reader's dtype."""
    w = weight.double()
    gain, shift = affine_map(norm)
    folded = w * gain
    if norm.centered:
        folded = folded - folded.mean(1, keepdim=True)
    new_bias = None if bias is None else bias.double()
    if shift is not None:
        added = w @ shift
        new_bias = added if new_bias is None else new_bias + added
    return folded.to(weight.dtype), None if new_bias is None else new_bias.to(weight.dtype)


def fold_writer(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, norm: TaperedNorm
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """A writer's new weight and bias (None if neither had one), in its dtype; `out` is a multiple of the width."""
    gain, shift = affine_map(norm)
    width = gain.shape[-1]
    heads = weight.shape[0] // width

    def mapped(rows: Tensor) -> Tensor:
        blocks = rows.double().view(heads, width, -1)
        blocks = blocks - blocks.mean(1, keepdim=True) if norm.centered else blocks
        return (blocks * gain.view(-1, width, 1)).view(rows.shape)

    new_bias = None if bias is None else mapped(bias)
    if shift is not None:
        added = shift.repeat(heads)
        new_bias = added if new_bias is None else new_bias + added
    return mapped(weight).to(weight.dtype), None if new_bias is None else new_bias.to(weight.dtype)


def affine_map(norm: TaperedNorm) -> tuple[Float[Tensor, "*heads width"], Float[Tensor, " width"] | None]:
    """What an affine stand-in multiplies (centered) features by and what it adds, in float64."""
    gain = norm.gain.double() * torch.exp(-norm.log_constant[0].double())
    return gain, None if norm.bias is None else norm.bias.double()
