"""A closed-form step before training: rescale embeddings so that tokens' scales at the first norm are more equal.

The first norm reads the embedding, so its scale depends on the token, and a norm ignores the scale of what it reads.
Rescaling the rows of the embedding therefore leaves the first sublayer unchanged and spares it the removal; the cost is
that the rest of the residual stream gets the rescaled embedding too. Going half way (in log scale) is a good
compromise, and it is kept only if it brings the model closer to the original under naive removal of all norms or, if
the model then overflows, of the first alone.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.calibration.scales import collect_log_scales, set_constants
from unnorm.data import batches
from unnorm.models.running import evaluating
from unnorm.models.sizes import MOST_CONTEXT, blocks_at_once, context_length, vocabulary_size
from unnorm.sites.site import NormSite
from unnorm.taper.norms import Estimator, TaperedNorm, removed

STRENGTH = 0.5
"""How far rows go towards equal scales, in log scale. KL of naive removal of the demo's first norm: 0.065 at 0, 0.049
at 0.5, 0.055 at 1."""
PASSES = 4
"""How many times each token is measured, each time at a different position."""


def equalize_embedding(
    student: PreTrainedModel,
    original: PreTrainedModel,
    sites: Sequence[NormSite],
    stand_ins: dict[str, TaperedNorm],
    blocks: Dataset,
    estimator: Estimator,
) -> bool:
    """Rescale the student's token embedding, untied from its unembedding, if that lowers the KL of naive removal.

    Args:
        student: the model with calibrated stand-ins; changed in place only if it helps.
        original: the original, on the same device.
        sites: its norm sites, in the order of a forward pass.
        stand_ins: the stand-ins at these sites.
        blocks: calibration text.
        estimator: estimator of the constant scales, which are measured again.

    Returns:
        Whether the rescaling was kept.
    """
    embedding = student.get_input_embeddings()
    first = sites[0]
    if not all(isinstance(student.get_submodule(writer), nn.Embedding) for writer in first.writers):
        return False
    measured, before = stand_ins, naive_kl(student, original, stand_ins, blocks)
    if not math.isfinite(before):
        measured = {first.name: stand_ins[first.name]}
        before = naive_kl(student, original, measured, blocks)
    constants = {name: stand_in.log_constant.clone() for name, stand_in in stand_ins.items()}
    rows, tied = embedding.weight, student.config.tie_word_embeddings
    target = stand_ins[first.name].log_constant[0]
    factors = torch.exp(STRENGTH * (target - token_log_scales(student, first)))
    if tied:
        untie(student)
    embedding.weight = nn.Parameter(rows.detach() * factors[:, None], requires_grad=rows.requires_grad)
    set_constants(stand_ins, collect_log_scales(student, sites, blocks), estimator)
    if naive_kl(student, original, measured, blocks) < before:
        return True
    embedding.weight = rows
    if tied:
        _unembed_by(student, rows, tied=True)
    for name, stand_in in stand_ins.items():
        stand_in.log_constant.copy_(constants[name])
    return False


def untie(model: PreTrainedModel) -> None:
    """Give the model an unembedding of its own, a copy of the shared weights."""
    _unembed_by(model, nn.Parameter(model.get_output_embeddings().weight.detach().clone()), tied=False)


def _unembed_by(model: PreTrainedModel, unembedding: nn.Parameter, tied: bool) -> None:
    model.get_output_embeddings().weight = unembedding
    model.config.tie_word_embeddings = tied


@torch.no_grad()
def token_log_scales(model: PreTrainedModel, first: NormSite) -> Float[Tensor, " vocab"]:
    """Mean log scale of each token of the vocabulary at the first norm site."""
    vocab = vocabulary_size(model)
    length = min(context_length(model), MOST_CONTEXT, vocab)
    rows = math.ceil(vocab / length)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(vocab, dtype=torch.float64)
    for _ in range(PASSES):
        order = torch.randperm(vocab, generator=generator)
        ids = F.pad(order, (0, rows * length - vocab)).view(rows, length)
        met = Dataset.from_dict({"input_ids": ids.tolist()})
        log_scales = collect_log_scales(model, [first], met, cut_short=True)[first.name].flatten()[:vocab]
        total[order] += log_scales.double() / PASSES
    return total.to(model.device, torch.float32)


def naive_kl(
    student: PreTrainedModel, original: PreTrainedModel, stand_ins: dict[str, TaperedNorm], blocks: Dataset
) -> float:
    """KL(original || student) with these norms replaced by constants, in nats per token; infinite if not finite."""
    with removed(stand_ins.values()):
        return mean_kl(student, original, blocks)


@torch.no_grad()
def mean_kl(student: PreTrainedModel, original: PreTrainedModel, blocks: Dataset) -> float:
    """KL(original || student), both as they are, in nats per token; infinite if not finite."""
    total = 0.0
    together = blocks_at_once(student, len(blocks[0]["input_ids"]), most=4)
    with evaluating(student), evaluating(original):
        for ids in batches(blocks, together, student.device):
            log_q, log_p = (
                m(input_ids=ids, use_cache=False).logits.float().log_softmax(-1) for m in (student, original)
            )
            total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True)) / ids.numel() * len(ids)
            if not math.isfinite(total):
                return math.inf
    return total / len(blocks)
