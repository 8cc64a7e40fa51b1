"""Differences between the logits of an exported form and those of the folded model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.errors import UnnormError, first_few
from unnorm.models.probe import trace_inputs
from unnorm.models.running import cast_as_loaded, copy_model

Logits = Float[Tensor, "batch position vocab"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROBE_SHAPE = (2, 64)
"""Blocks and tokens, random but seeded, that errors are measured on; no more tokens than the model's context."""


@dataclass(frozen=True)
class FormError:
    """Difference between a form, in a given precision, and the folded model in float32.

    Attributes:
        name: precision of the form.
        max_abs: largest absolute difference of logits.
        relative: `max_abs` divided by the largest absolute logit.
        kl: KL(folded in float32 ‖ form), mean over tokens, in nats per token.
    """

    name: str
    max_abs: float
    relative: float
    kl: float

    def to_json(self) -> dict[str, str | float]:
        """As plain values."""
        return asdict(self)


def refuse_kept_norms(folded: PreTrainedModel, form: str) -> None:
    """Raise an UnnormError if norms were kept (`--keep`): such a model has no other form than `transformers`."""
    kept = getattr(folded.config, "kept_norms", None)
    if kept:
        raise UnnormError(
            f"{form} is for models without norms, but this one kept {first_few(kept)} (--keep). Use: unnorm export "
            "--to transformers"
        )


@torch.no_grad()
def compare(name: str, reference: Logits, logits: Logits) -> FormError:
    """The error of `logits` relative to `reference`, in float64, over positions where the reference is finite.

    Raises:
        UnnormError: the reference overflows at every position.
    """
    finite = reference.isfinite().all(-1)
    if not finite.any():
        raise UnnormError(
            "The model overflows on all the random tokens that exported forms are measured on. Train it first, in a "
            "new run with --tokens; or further, where it overflows on some text only: unnorm heal DIR"
        )
    reference, logits = (values[finite].cpu().double() for values in (reference, logits))
    expected, found = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = F.kl_div(found, expected, log_target=True, reduction="sum") / reference[..., 0].numel()
    worst = float((reference - logits).abs().max())
    return FormError(name, worst, worst / float(reference.abs().max()), float(kl))


@torch.no_grad()
def form_errors(
    folded: PreTrainedModel, form: Callable[[torch.dtype], PreTrainedModel], begin: int | None = None
) -> list[FormError]:
    """Errors of a form that transformers loads, by precision; the last row is the folded model's own rounding.

    Args:
        folded: the folded model in float32; it is not changed.
        form: loads the form in a given precision.
        begin: the token that the model's texts begin with.
    """
    ids = trace_inputs(folded, *PROBE_SHAPE, begin)
    reference = folded(input_ids=ids).logits
    rows = [compare(name, reference, form(dtype)(input_ids=ids).logits) for name, dtype in DTYPES.items()]
    rounded = cast_as_loaded(copy_model(folded), torch.bfloat16)
    return [*rows, compare("bfloat16, folded itself", reference, rounded(input_ids=ids).logits)]
