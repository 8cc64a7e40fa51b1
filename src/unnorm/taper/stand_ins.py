"""Install stand-ins in place of a model's norms, and join split paths again."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from unnorm.models.linear import is_conv1d, linear_weight
from unnorm.sites.norm_behaviour import affine_parameters
from unnorm.sites.site import NormSite
from unnorm.taper.norms import Interpolation, PathReader, TaperedNorm, TokenMask

_FUSED_QKV_THIRDS = ("c_attn",)
_VALUE_PROJECTIONS = ("v_proj", "value")


def install(
    model: PreTrainedModel,
    sites: Sequence[NormSite],
    split_paths: bool = False,
    token_mask: TokenMask | None = None,
    interpolation: Interpolation = "log",
) -> dict[str, TaperedNorm]:
    """Replace each norm by a stand-in, in place; at first it computes exactly what the norm did.

    Args:
        model: the original model.
        sites: its norm sites.
        split_paths: give attention sites a query/key path and a value path, where the layout is known.
        token_mask: see `TaperedNorm`.
        interpolation: see `TaperedNorm`.

    Returns:
        The stand-ins by site name.
    """
    stand_ins: dict[str, TaperedNorm] = {}
    shared: dict[nn.Parameter, nn.Parameter] = {}  # Norms that share parameters (Zamba) get stand-ins that do too.
    for site in sites:
        norm = model.get_submodule(site.name)
        gain, bias = affine_parameters(norm, site)
        weightless = getattr(norm, "weight", None) is None
        if weightless:  # OLMo's norms have no parameter to take dtype and device from.
            gain = gain.to(model.device, model.dtype)
        values = value_features(model, site) if split_paths else None
        stand_in = TaperedNorm(
            gain,
            bias,
            site.eps,
            site.centered,
            paths=2 if values else 1,
            token_mask=token_mask,
            interpolation=interpolation,
            fixed_gain=weightless,
        )
        for of_norm, own in (("weight", "gain"), ("bias", "bias")):
            parameter = getattr(norm, of_norm, None)
            if parameter is not None:
                setattr(stand_in, own, shared.setdefault(parameter, getattr(stand_in, own)))
        model.set_submodule(site.name, stand_in)
        stand_ins[site.name] = stand_in
        for reader, features in (values or {}).items():
            model.set_submodule(reader, PathReader(model.get_submodule(reader), features))
    return stand_ins


def uninstall_paths(model: nn.Module) -> None:
    """Join the paths of attention sites again, in place: every reader becomes its plain linear layer again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PathReader):
            model.set_submodule(name, module.linear)
        elif isinstance(module, TaperedNorm):
            module.alpha = module.alpha[:1].clone()


def value_features(model: nn.Module, site: NormSite) -> dict[str, int] | None:
    """For each reader of an attention site, how many of its last outputs are values; None if that isn't known.

    Also None where something besides the readers takes the norm's output, since the norm then needs a single path.
    Tracing can't tell the parts of a fused projection apart, so their layout is declared here.
    """
    if site.folds_into != "readers" or site.role != "attention":
        return None
    features: dict[str, int] = {}
    for reader in site.readers:
        leaf, module = reader.rpartition(".")[2], model.get_submodule(reader)
        out = linear_weight(module).shape[0]
        if leaf in _FUSED_QKV_THIRDS and is_conv1d(module):  # GPT-BigCode's `c_attn` has another layout.
            features[reader] = out // 3
        elif leaf.startswith(("q_", "k_")) or leaf in ("query", "key"):
            features[reader] = 0
        elif leaf in _VALUE_PROJECTIONS:
            features[reader] = out
        else:
            return None
    return features
