"""The logit lens: what the model would predict if the layers after some depth wrote nothing.

lens_d(x) = unembed(norm(x_d)), with x_d the input of layer d (nostalgebraist 2020, *interpreting GPT: the logit lens*).
In the original the final norm divides each intermediate vector by that vector's own scale, which the later layers would
have changed; in a twin the lens is the same linear map as at the output, applied to the sum without the later terms.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.analysis.anatomy import Anatomy, anatomy, logits_from, residual_stream, token_losses
from unnorm.analysis.figures import line_panels
from unnorm.analysis.material import Finding, Material
from unnorm.models.running import in_evaluation_mode
from unnorm.models.sizes import check_fits
from unnorm.report.numbers import fixed


@dataclass(frozen=True)
class Lens:
    """Lens predictions by depth; depth d is before layer d, the last is the model's own output.

    Attributes:
        loss: loss of the next token, in nats.
        kl: KL(the model's output ‖ lens), in nats.
        agrees: whether the lens and the model's output have the same most likely token.
        forms_at: the first depth such that it and all later depths agree.
    """

    loss: Float[Tensor, "depth batch predicted"]
    kl: Float[Tensor, "depth batch predicted"]
    agrees: Float[Tensor, "depth batch predicted"]
    forms_at: Int[Tensor, "batch predicted"]


@torch.no_grad()
@in_evaluation_mode
def lens(model: PreTrainedModel, ids: Int[Tensor, "batch position"], parts: Anatomy | None = None) -> Lens:
    """Apply the lens at every depth of a model, on a batch of sequences of at least 2 tokens.

    `parts` is the model's anatomy, if it is known already.

    Raises:
        UnnormError: the residual stream is not a plain sum read by a final norm, or the sequences are longer than the
            model's context.
    """
    check_fits(model, ids.shape[1])
    parts = parts or anatomy(model)
    stream, logits = residual_stream(model, parts, ids)
    final = logits[:, :-1].float().log_softmax(-1)
    best = final.argmax(-1)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for residual in stream:
        read = logits_from(model, parts, ids, residual).float()
        log_q = read[:, :-1].log_softmax(-1)
        kl = F.kl_div(log_q, final, log_target=True, reduction="none").sum(-1)
        rows.append((token_losses(read, ids), kl, log_q.argmax(-1) == best))
    loss, kl, agrees = (torch.stack(values).float().cpu() for values in zip(*rows, strict=True))
    # Counted from the end: how many consecutive depths agree.
    streak = agrees.flip(0).cumprod(0).sum(0).long()
    return Lens(loss, kl, agrees, len(stream) - streak)


def find(material: Material) -> Finding:
    """The lens in both models on the held-out text."""
    measured = {}
    for subject in material.subjects:
        name, model = subject.name, subject.model
        found = [lens(model, ids, subject.anatomy) for ids in material.batches(model.device)]
        loss, kl, agrees = (torch.cat([getattr(one, k) for one in found], dim=1) for k in ("loss", "kl", "agrees"))
        measured[name] = Lens(loss, kl, agrees, torch.cat([one.forms_at for one in found]))
    depths = len(measured["twin"].loss)
    numbers = {name: _numbers(value, depths) for name, value in measured.items()}
    formed = [fixed(numbers[name]["mean_forms_at"], 2) for name in ("original", "twin")]
    return Finding(
        key="lens",
        title="Logit lens",
        text=(
            "What the unembedding reads from the residual stream before each layer, and where predictions form: the "
            "depth from which the most likely token is the final one. In the original the final norm rescales "
            "every intermediate vector; in the twin "
            + (
                "it does too, since it was kept."
                if material.keeps_final_norm
                else "the lens is the same linear read at every depth."
            )
        ),
        numbers=numbers,
        figures={"lens": _figure(numbers, depths)},
        captions={"lens": "Depth d is before layer d; the last is the output."},
        legends={"lens": [("original", "s", "dots"), ("twin", "a", "dots")]},
        headline=("Predictions form at depth", f"{formed[0]} → {formed[1]}", f"mean; {depths - 1} layers"),
    )


def _numbers(found: Lens, depths: int) -> dict[str, Any]:
    formed = torch.bincount(found.forms_at.flatten(), minlength=depths)
    return {
        "loss": found.loss.mean((1, 2)).tolist(),
        "kl": found.kl.mean((1, 2)).tolist(),
        "top1_agreement": found.agrees.mean((1, 2)).tolist(),
        "forms_at": (formed / formed.sum()).tolist(),
        "mean_forms_at": float(found.forms_at.double().mean()),
        "tokens": found.forms_at.numel(),
    }


def _figure(numbers: dict[str, dict[str, Any]], depths: int) -> Figure:
    names = [str(depth) for depth in range(depths - 1)] + ["output"]
    panels = {
        "KL(output ‖ lens), nats per token": {name: values["kl"] for name, values in numbers.items()},
        "share of predictions formed by this depth": {
            name: torch.tensor(values["forms_at"]).cumsum(0).tolist() for name, values in numbers.items()
        },
    }
    return line_panels(names, panels, "depth")
