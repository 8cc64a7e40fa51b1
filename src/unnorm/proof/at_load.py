"""Proof, before any training, that the norm sites found are right and that each folds exactly."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.errors import UnnormError, short
from unnorm.folding.fold import FoldedWeights, empty_twin, twin_class
from unnorm.hooks import hooked
from unnorm.modeling.modeling_unnorm import PREFIX
from unnorm.models.probe import trace_inputs
from unnorm.models.running import copy_model
from unnorm.proof.blockwise import float64_logits, in_float64
from unnorm.sites.norm_behaviour import centered, norm_operations
from unnorm.sites.site import NormSite
from unnorm.taper.norms import TaperedNorm
from unnorm.taper.stand_ins import install

PROOF_TOLERANCE = 1e-10
"""Largest difference of float64 logits accepted at load, relative to the largest logit (or to 1 if that is larger)."""


@torch.no_grad()
def prove_sites(model: PreTrainedModel, sites: Sequence[NormSite]) -> float:
    """Prove that the sites, and the fold of each, are right for this model, before any training.

    Everything runs in float64: stand-ins must reproduce the norms; then, with random constant scales, folded and
    unfolded logits must agree; and the folded model must run no norm operation, unless it keeps norms.

    Returns:
        The largest absolute difference between folded and unfolded logits.

    Raises:
        UnnormError: one of these fails (if the fold does, the message names the first site that can't be folded), the
            model can't compute in float64, its class is not one of transformers' own, or it is a twin that kept norms.
    """
    twin_class(model)
    ids = trace_inputs(model, batch=2, length=16)
    work = copy_model(model, share=True)
    before = _float64_logits(work, ids)
    stand_ins = install(work, sites)
    after = _logits(work, ids)
    # Some norms compute in float32 whatever their input is, and agree only to that precision.
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max())):
        raise UnnormError(f"Stand-ins for the norms of {type(model).__name__} don't reproduce its logits.")
    with _random_constants(stand_ins):
        _logits(work, ids)
    unfolded = _logits(work, ids)
    weights = FoldedWeights(work, sites, torch.float64)
    twin = empty_twin(work, sites, weights)
    error = float((_logits(twin, ids, weights) - unfolded).abs().max())
    if not error <= PROOF_TOLERANCE * max(1.0, float(unfolded.abs().max())):
        raise UnnormError(
            f"Folding {type(model).__name__} changes its logits by {error:.1e}: {_what_is_wrong(model, sites)}. "
            "The model is refused."
        )
    if not twin.config.kept_norms:
        with in_float64(twin, weights):
            _refuse_norms_left(model, norm_operations(twin, ids))
    return error


def _refuse_norms_left(model: PreTrainedModel, left: list[tuple[str, str]]) -> None:
    if left:
        operation, place = left[0]
        raise UnnormError(
            f"{type(model).__name__} normalizes outside of its norm modules ({operation} runs in '{place}'), which "
            "would remain. It needs modeling code in which every norm is its own module; with --keep, which leaves "
            "some norms on purpose, the others can be removed."
        )


def _float64_logits(model: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "..."]:
    try:
        return float64_logits(model, ids)
    except Exception as error:
        raise UnnormError(
            f"{type(model).__name__} can't compute in float64 ({short(error)}), in which folding is proved. It would "
            "need modeling code that sets no other precision; the model is refused."
        ) from error


@contextmanager
def _random_constants(stand_ins: dict[str, TaperedNorm]) -> Iterator[None]:
    """In a pass inside the context, remove each stand-in; its constant is the scale it meets times a number near 1.

    The constants have to fit what comes from the norms removed before them. Otherwise deep models with gated MLPs,
    whose output grows with the cube of their input, would overflow.
    """
    generator = torch.Generator().manual_seed(0)
    chosen: dict[TaperedNorm, Tensor] = {}

    def remove(stand_in: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(stand_in, TaperedNorm)
        x = centered(args[0].double(), stand_in.centered)
        # Over all tokens, so that even the longest comes out not much longer than from a norm.
        log_scale = 0.5 * torch.log(x.square().mean() + stand_in.eps)
        chosen[stand_in] = log_scale + 0.3 * torch.randn((), generator=generator, dtype=torch.float64)
        stand_in.log_constant.fill_(chosen[stand_in])
        stand_in.removed = True

    try:
        with hooked(stand_in.register_forward_pre_hook(remove) for stand_in in stand_ins.values()):
            yield
    finally:
        for stand_in, log_constant in chosen.items():  # The hook may have written to a block's temporary copy.
            stand_in.log_constant.fill_(log_constant)


def _logits(
    model: PreTrainedModel, ids: Int[Tensor, "batch position"], weights: FoldedWeights | None = None
) -> Float[Tensor, "batch position vocab"]:
    try:
        return float64_logits(model, ids, weights)
    except Exception as error:  # Code written for a norm may fail in any way without one.
        raise UnnormError(
            f"{type(model).__name__.removeprefix(PREFIX)} does more with its norms than call them ({short(error)}), so "
            "they can't be replaced. It would need modeling code that only calls them; the model is refused."
        ) from error


def _what_is_wrong(model: PreTrainedModel, sites: Sequence[NormSite]) -> str:
    """In words, the first site that changes the logits when folded alone, or what else changes them."""
    ids = trace_inputs(model)
    work = copy_model(model, share=True)
    if not _folds(work, [], ids):
        return f"its class computes something other than transformers' {model.config.model_type}"
    for site in sites:
        norm = work.get_submodule(site.name)
        with _random_constants(install(work, [site])):
            float64_logits(work, ids)
        folds = _folds(work, [site], ids)
        work.set_submodule(site.name, norm)
        if not folds:
            if site.folds_into == "readers":
                return f"something besides {', '.join(site.readers)} reads the output of '{site.name}'"
            return f"something besides '{site.name}' reads the output of {', '.join(site.writers)}"
    return "each site folds correctly alone, but not all together"


def _folds(model: PreTrainedModel, sites: Sequence[NormSite], ids: Int[Tensor, "batch position"]) -> bool:
    weights = FoldedWeights(model, sites, torch.float64)
    return torch.allclose(float64_logits(empty_twin(model, sites, weights), ids, weights), float64_logits(model, ids))
