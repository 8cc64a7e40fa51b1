"""How far one optimizer step moves a model, and a learning rate that moves none of them too far.

AdamW's first step moves each weight by the learning rate, against the sign of its gradient. The KL that this costs
grows with the square of a small step. At the same rate it differs between models by orders of magnitude: where norms
follow the sublayers, their gains may scale what a projection writes by hundreds, and the norms themselves scale up what
is almost zero. A tenth of such a step at the default rate costs the bundled model 0.0014 nats on random tokens,
SmolLM2-135M 0.009 and Gemma 3 270M 0.3, which can't be trained at that rate (`docs/method.md`, "Gemma 3 270M").
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from unnorm.models.running import evaluating
from unnorm.models.sizes import context_length, vocabulary_size

PROBE = 0.1
"""Share of the learning rate that is tried: a whole step may be too large for KL to grow with its square."""
MOST_KL = 0.02
"""KL that a step of `PROBE` times the learning rate may cost, in nats per token."""
SEQUENCES, LENGTH = 2, 64
"""Of random tokens; the gradient is that of one such batch, and KL is measured on another."""


def tolerable_lr(model: PreTrainedModel, lr: float) -> float:
    """The learning rate, lowered where its first step would cost more than `MOST_KL`.

    Args:
        model: the original; it is not changed.
        lr: the peak learning rate planned so far.
    """
    kl = first_step_kl(model, PROBE * lr)
    return lr * math.sqrt(MOST_KL / kl) if math.isfinite(kl) and kl > MOST_KL else lr


def first_step_kl(model: PreTrainedModel, lr: float) -> float:
    """KL(before ‖ after) in nats per token, on random tokens, of a step of `lr` against the sign of each gradient.

    The gradient is that of the next-token loss on other random tokens.
    """
    some, others = _random_tokens(model)
    weights = {name: weight.detach().requires_grad_() for name, weight in model.named_parameters()}
    with evaluating(model):
        with torch.enable_grad():
            logits = _log_probabilities(model, weights, some)[:, :-1]
            loss = F.nll_loss(logits.flatten(0, 1), some[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        with torch.no_grad():
            before = _log_probabilities(model, weights, others)
            for (name, weight), gradient in zip(list(weights.items()), gradients, strict=True):
                if gradient is not None:
                    weights[name] = gradient.sign_().mul_(-lr).add_(weight)
            after = _log_probabilities(model, weights, others)
    return float(F.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean())


def _random_tokens(model: PreTrainedModel) -> tuple[Int[Tensor, "batch position"], Int[Tensor, "batch position"]]:
    shape = (2 * SEQUENCES, min(LENGTH, context_length(model)))
    generator = torch.Generator().manual_seed(0)
    some, others = torch.randint(vocabulary_size(model), shape, generator=generator).to(model.device).chunk(2)
    return some, others


def _log_probabilities(
    model: PreTrainedModel, weights: dict[str, Tensor], ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch position vocab"]:
    output = functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False})
    return F.log_softmax(output.logits.float(), dim=-1)
