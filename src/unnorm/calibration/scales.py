"""Scale statistics of every norm site, and the constant scales measured from them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.data import STDLIB, batches, build_blocks
from unnorm.errors import UnnormError
from unnorm.hooks import hooked
from unnorm.isolation import isolated
from unnorm.models.device import choose_device
from unnorm.models.load import load_original, model_name
from unnorm.models.running import evaluating
from unnorm.models.sizes import blocks_at_once, choose_context, vocabulary_size
from unnorm.progress import Watch, say, silent
from unnorm.sites.find import find_sites
from unnorm.sites.norm_behaviour import centered, log_scale_of
from unnorm.sites.site import NormSite
from unnorm.taper.norms import Estimator, TaperedNorm, estimate_log_constant

CALIBRATION_BLOCKS = 32
"""Blocks of training data on which the first constants are measured."""


@dataclass(frozen=True)
class ScaleStatistics:
    """Distribution of one site's scale over tokens, with position 0 separate from the rest.

    The scale is what the norm divides a token x by: sqrt(var(x) + eps) for LayerNorm, sqrt(mean(x^2) + eps) for
    RMSNorm, in the units of the residual stream.

    Attributes:
        site: the norm's path.
        position_0: mean scale at position 0.
        mean: mean scale of the other tokens.
        geometric_mean: their geometric mean scale.
        spread: standard deviation of their log scale; 0 would mean that the norm is already affine.
        smallest: their smallest scale.
        largest: their largest.
    """

    site: str
    position_0: float
    mean: float
    geometric_mean: float
    spread: float
    smallest: float
    largest: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@isolated
def stats(
    model: str | Path,
    data: str | Path = STDLIB,
    *,
    text_field: str | None = None,
    split: str = "train",
    context: int | None = None,
    keep: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> list[tuple[NormSite, ScaleStatistics]]:
    """Every norm site of a model with the distribution of its scale on 32 blocks of text; `unnorm stats`.

    Args:
        model: as for `remove`.
        data: text, as for `remove`; its first training blocks are read.
        text_field: column that holds the text.
        split: split that the text comes from.
        context: tokens in a block; by default as many as the model takes, at most 1024.
        keep: regular expression; norms whose path contains a match are left out.
        device: `auto`, `cpu`, `cuda` or `mps`.
        trust_remote_code: run modeling code that comes with the model.
        watch: called with `{"kind": "phase", "text": …}` at each phase.

    Returns:
        Each site with its statistics, in the order of a forward pass.

    Raises:
        UnnormError: the model has no norms, or the model or the data cannot be used.
    """
    watch = watch or silent
    say(watch, f"loading {model}")
    original, tokenizer = load_original(model_name(model), trust_remote_code)
    sites = find_sites(original, in_place=True, keep=keep)
    original.to(choose_device(device))
    context = choose_context(context, original)
    vocab_size = vocabulary_size(original)
    say(watch, f"reading {data}")
    blocks = build_blocks(str(data), tokenizer, vocab_size, context, CALIBRATION_BLOCKS, 1, text_field, split)
    say(watch, f"measuring {len(sites)} sites on {len(blocks.train)} blocks of {context:,} tokens")
    rows = scale_statistics(collect_log_scales(original, sites, blocks.train))
    return list(zip(sites, rows, strict=True))


@torch.no_grad()
def collect_log_scales(
    model: PreTrainedModel,
    sites: Sequence[NormSite],
    blocks: Dataset,
    batch_size: int = 8,
    cut_short: bool = False,
) -> dict[str, Float[Tensor, "block position"]]:
    """Log scale of every token at every site, from forward passes only.

    The sites may hold the original norms or stand-ins; hooks read their inputs.

    Args:
        model: the model, on any device.
        sites: where to measure.
        blocks: rows of `input_ids`, all of one length.
        batch_size: blocks in one forward pass, at most; fewer if the vocabulary is large.
        cut_short: end each pass once all sites have been reached; no site may be called twice in a pass.

    Returns:
        Log scales by site name, on the CPU in float32.
    """
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    length = len(blocks[0]["input_ids"])

    def keep(site: NormSite) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            log_scale = log_scale_of(centered(x, site.centered), site.eps).squeeze(-1).cpu()
            if log_scale.ndim == 3 and log_scale.shape[1] == length:
                log_scale = log_scale.transpose(1, 2)
            if log_scale.numel() % length:
                raise UnnormError(
                    f"The norm '{site.name}' runs on other positions than those of the tokens, so it has no scale for "
                    "each of them. Models in which all layers read every token are supported."
                )
            # Each head counts as a block of its own; OPT flattens blocks and positions before its norms.
            found[site.name].append(log_scale.reshape(-1, length))
            if cut_short and len({len(parts) for parts in found.values()}) == 1:
                raise _AllReachedError

        return hook

    handles = [model.get_submodule(site.name).register_forward_pre_hook(keep(site)) for site in sites]
    with hooked(handles), evaluating(model):
        for batch in batches(blocks, blocks_at_once(model, length, batch_size), model.device):
            with suppress(_AllReachedError):
                model(input_ids=batch, use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}


class _AllReachedError(Exception):
    """Ends a forward pass early; never raised out of this file."""


def scale_statistics(log_scales: dict[str, Float[Tensor, "block position"]]) -> list[ScaleStatistics]:
    """Summarize the result of `collect_log_scales`, one row per site."""
    rows = []
    for name, log_scale in log_scales.items():
        rest = log_scale[:, 1:]
        rows.append(
            ScaleStatistics(
                site=name,
                position_0=float(log_scale[:, 0].exp().mean()),
                mean=float(rest.exp().mean()),
                geometric_mean=float(rest.mean().exp()),
                spread=float(rest.std()),
                smallest=float(rest.min().exp()),
                largest=float(rest.max().exp()),
            )
        )
    return rows


def set_constants(
    stand_ins: dict[str, TaperedNorm],
    log_scales: dict[str, Float[Tensor, "block position"]],
    estimator: Estimator,
) -> None:
    """Set each stand-in's initial constants: one for ordinary tokens, one for position 0."""
    for name, stand_in in stand_ins.items():
        log_scale = log_scales[name].double()
        parts = (log_scale[:, 1:], log_scale[:, :1])
        constants = [estimate_log_constant(part, torch.ones_like(part), estimator) for part in parts]
        stand_in.log_constant.copy_(torch.stack(constants))
