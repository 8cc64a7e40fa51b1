"""Loss and fidelity: what an LN-free model costs and how far it is from the original."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.calibrate import batches, evaluating, spread
from unnorm.config import choose_context, choose_device
from unnorm.data import STDLIB, build_blocks
from unnorm.errors import UnnormError
from unnorm.models import load_original

EVALUATION_TOKENS = 50_000
"""Tokens of held-out text that numbers are measured on, or all there are."""
EVALUATION_SPREAD = 4
"""Times as much held-out text is read, and thinned evenly: neighbouring blocks come from one document."""
RESAMPLES = 2000
"""Bootstrap resamples of the confidence intervals."""


@dataclass(frozen=True)
class Evaluation:
    """One model on one corpus.

    Attributes:
        model: its name.
        data: the corpus.
        loss: nats per predicted token.
        loss_ci: 95% confidence interval of the loss, by bootstrap over blocks.
        perplexity: exp(loss).
        tokens: predicted tokens.
        context: tokens in a block; each block is evaluated on its own.
        kl: KL(original || model) in nats per token, or None without an original.
        jsd: Jensen-Shannon divergence to the original in nats per token, at most log 2.
        top1_agreement: share of tokens where both have the same most likely next token.
        position_loss: mean loss at each predicted position, context - 1 of them.
    """

    model: str
    data: str
    loss: float
    loss_ci: tuple[float, float]
    perplexity: float
    tokens: int
    context: int
    kl: float | None
    jsd: float | None
    top1_agreement: float | None
    position_loss: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """All but the losses by position, as plain values."""
        values = asdict(self)
        del values["position_loss"]
        return {**values, "loss_ci": list(self.loss_ci)}


def evaluate(
    models: str | Sequence[str],
    against: str | None = None,
    data: str = STDLIB,
    *,
    text_field: str | None = None,
    split: str = "train",
    tokens: int = EVALUATION_TOKENS,
    context: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> list[Evaluation]:
    """Evaluate models, LN-free or not, on the held-out part of a corpus; `unnorm evaluate`.

    Args:
        models: run directories, model directories, hub ids or `demo`.
        against: the original that fidelity is measured to; None leaves fidelity out.
        data: as for `remove`.
        text_field: column that holds the text.
        split: split that the text comes from, where the source names no validation split.
        tokens: how many tokens at most.
        context: tokens in a block; by default the longest that all models take, at most 1024.
        batch_size: blocks in one forward pass.
        device: `auto`, `cpu`, `cuda` or `mps`.
        trust_remote_code: run modeling code that comes with a model.

    Raises:
        UnnormError: a model or the data can't be used, or the models' vocabularies differ.
    """
    names = [models] if isinstance(models, str) else list(models)
    place = choose_device(device)
    everyone, tokenizers = zip(
        *(load_original(name, trust_remote_code) for name in ([against] if against else []) + names), strict=True
    )
    if len({int(model.config.vocab_size) for model in everyone}) > 1:
        sizes = ", ".join(str(model.config.vocab_size) for model in everyone)
        raise UnnormError(f"The models' vocabularies differ ({sizes}); compare models with the same tokenizer.")
    context = choose_context(context, *everyone)
    count = max(1, math.ceil(tokens / context))
    vocab_size = int(everyone[0].config.vocab_size)
    blocks = build_blocks(data, tokenizers[0], vocab_size, context, 1, EVALUATION_SPREAD * count, text_field, split)
    held_out = spread(blocks.validation, count)
    original = everyone[0].to(place) if against else None
    return [
        evaluate_model(model.to(place), held_out, original, name, data, batch_size)
        for name, model in zip(names, everyone[-len(names) :], strict=True)
    ]


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel,
    blocks: Dataset,
    original: PreTrainedModel | None = None,
    name: str = "model",
    data: str = "data",
    batch_size: int = 4,
) -> Evaluation:
    """Evaluate a model on packed blocks, in its own dtype, sums in float64.

    Args:
        model: any causal language model.
        blocks: rows of `input_ids`, all of one length.
        original: the model to compare with, on the same device.
        name: stands in the result.
        data: stands in the result.
        batch_size: blocks in one forward pass.
    """
    losses: list[Float[Tensor, "batch position"]] = []
    fidelity = torch.zeros(3, dtype=torch.float64)
    with evaluating(model):
        for ids in batches(blocks, batch_size, model.device):
            logits = model(input_ids=ids, use_cache=False).logits.float()
            losses.append(token_losses(logits, ids).double().cpu())
            if original is not None:
                reference = original(input_ids=ids, use_cache=False).logits.float()
                fidelity += compare(logits, reference).cpu()
    loss = torch.cat(losses)
    predictions = len(blocks) * (loss.shape[1] + 1)
    kl, jsd, agreement = (fidelity / predictions).tolist() if original is not None else (None, None, None)
    mean = float(loss.mean())
    return Evaluation(
        model=name,
        data=data,
        loss=mean,
        loss_ci=bootstrap_interval(loss.mean(1).numpy()),
        perplexity=float(np.exp(min(mean, 700.0))),
        tokens=loss.numel(),
        context=loss.shape[1] + 1,
        kl=kl,
        jsd=jsd,
        top1_agreement=agreement,
        position_loss=tuple(loss.mean(0).tolist()),
    )


def token_losses(
    logits: Float[Tensor, "batch position vocab"], ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch predicted"]:
    """Loss of each token after the first, in nats."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def compare(
    logits: Float[Tensor, "batch position vocab"], reference: Float[Tensor, "batch position vocab"]
) -> Float[Tensor, "3"]:
    """Sums over tokens of KL(reference || model), Jensen-Shannon divergence (both in nats) and top-1 agreement."""
    log_q, log_p = (F.log_softmax(x.flatten(0, 1), dim=-1) for x in (logits, reference))
    log_mean = torch.logaddexp(log_q, log_p) - float(np.log(2))
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    jsd = 0.5 * sum(F.kl_div(log_mean, log_x, reduction="sum", log_target=True) for log_x in (log_q, log_p))
    agreement = (log_q.argmax(-1) == log_p.argmax(-1)).sum()
    return torch.stack([kl.double(), torch.as_tensor(jsd).double(), agreement.double()])


def bootstrap_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, seeded; resamples whole blocks, since tokens within one correlate."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
