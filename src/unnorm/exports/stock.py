"""The twin as a model of the original's own class: with norms, but with a huge epsilon in them.

With eps = 1e12 the scale of a LayerNorm or RMSNorm, sqrt(var + eps), is 1e6 for every token up to float32 rounding. For
a site with gain g and constant scale c, the stored gain is set to g * 1e6 / c, so that

    g * 1e6 / c * x / sqrt(var(x) + 1e12) + b  ≈  g * x / c + b

(x centered first for LayerNorm), which is the affine map that the fold multiplies into the weights.
apollo-research/gpt2_noLN (arXiv 2409.13710) does the same.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.exports.measure import FormError, form_errors, refuse_kept_norms
from unnorm.folding.checkpoint import load_trained, with_weights
from unnorm.modeling.modeling_unnorm import limits_of
from unnorm.models.load import texts_begin_with
from unnorm.run_directory import MODEL
from unnorm.sites.norm_behaviour import affine_parameters, gain_offset
from unnorm.sites.site import NormSite

EPS = 1e12
TOLERANCE = 1e-4
"""Largest allowed difference of the float32 form's logits, relative to the largest logit."""

LIMITED = "its neurons have limits, which no stock class knows; --no-neuron-limits leaves a twin without them"
NOTE = (
    "float32 and bfloat16 only: in float16 the gains overflow (largest number 65504). Its norms are still there, and "
    "tools that recompute them with an epsilon of their own get them wrong; the folded model has none."
)


def write_stock(directory: Path, folded: PreTrainedModel, out: Path) -> list[FormError]:
    """Write the stock form of a finished run, and measure its error as loaded by stock code.

    Args:
        directory: the run directory.
        folded: its LN-free model in float32.
        out: where config and weights are written.

    Raises:
        UnnormError: norms were kept, neurons have limits, a norm has no gain, its epsilon does not come from the
            config (so that the form would not survive saving), or the form's logits differ from the folded model's.
    """
    refuse_kept_norms(folded, "A stock form")
    stock, sites = stock_form(directory)
    stock.save_pretrained(out)
    _check_epsilons(_load_stock(out, torch.float32), sites)
    rows = form_errors(folded, lambda dtype: _load_stock(out, dtype), texts_begin_with(directory / MODEL))
    if not rows[0].relative <= TOLERANCE:
        raise UnnormError(
            f"The stock form of {type(stock).__name__} differs from the folded model by {rows[0].relative:.1e} of the "
            f"largest logit (limit {TOLERANCE:.0e}), so it is not written. Use the folded model: "
            "unnorm export --to transformers"
        )
    return rows


def stock_form(directory: Path) -> tuple[PreTrainedModel, list[NormSite]]:
    """The stock form of a finished run, in memory, in float32, and the sites of its norms.

    Raises:
        UnnormError: there is no finished run, its neurons have limits, a norm has no gain, or the config holds no
            epsilon.
    """
    trained, sites, constants = load_trained(directory)
    if limits_of(trained):
        raise _refusal(type(trained).__name__, LIMITED)
    weights = trained.state_dict()
    for site in sites:
        weights |= _scaled_gain(trained.get_submodule(site.name), site, constants[site.name])
    stock = with_weights(trained, _with_huge_epsilon(trained.config, sites), weights, trained.generation_config)
    return stock.eval(), sites


def _scaled_gain(norm: nn.Module, site: NormSite, constant: float) -> dict[str, torch.Tensor]:
    gain, _ = affine_parameters(norm, site)
    if getattr(norm, "weight", None) is None:
        raise _refusal(type(norm).__name__, f"'{site.name}' has no gain that could carry the constant scale")
    scaled = gain.detach().double() * (EPS**0.5 / constant)
    stored = scaled - gain_offset(norm, site)
    return {f"{site.name}.weight": stored.to(gain.dtype)}


def _with_huge_epsilon(config: PreTrainedConfig, sites: list[NormSite]) -> PreTrainedConfig:
    """A copy of the config in which every field that holds the norms' epsilon is set to the huge one."""
    changed = deepcopy(config)
    text = changed.get_text_config()
    values = {site.eps for site in sites}
    fields = [key for key, value in text.to_dict().items() if "eps" in key and value in values]
    if not fields:
        raise _refusal(config.model_type, "its config holds no epsilon, so a huge one could not be saved")
    for field in fields:
        setattr(text, field, EPS)
    return changed


def _check_epsilons(stock: PreTrainedModel, sites: list[NormSite]) -> None:
    for site in sites:
        norm: Any = stock.get_submodule(site.name)
        if EPS not in (getattr(norm, "eps", None), getattr(norm, "variance_epsilon", None)):
            raise _refusal(type(stock).__name__, f"the norm '{site.name}' does not take its epsilon from the config")


def _refusal(what: str, why: str) -> UnnormError:
    return UnnormError(f"{what} has no stock form: {why}. Use the folded model: unnorm export --to transformers")


def _load_stock(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).eval()
