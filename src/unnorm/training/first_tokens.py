"""Training on first tokens: any token of the vocabulary may come first, but a block has only one first position.

A model with massive activations treats whatever stands there specially, and without norms some tokens in that position
grow from layer to layer until they overflow. They are few (220 of SmolLM2-135M's 49,152), so a block rarely starts with
one. A short run also draws each of them only a few times, so the tokens with the largest KL in one step are learned
again in the next, until others have a larger one.

Not for models whose texts begin with a begin-of-text token. They are lost without it, and the gradients of what they
then do are thousands of times those of text (`docs/method.md`). The first token after it varies in the text itself
(`random_starts`).
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from unnorm import processes
from unnorm.taper.norms import TaperedNorm
from unnorm.training.callbacks import saved_attributes
from unnorm.training.losses import RUNAWAY, unevenness

DRAWN = 1 / 2
"""Tokens of the vocabulary that are run alone and examined, per token of a batch."""
LEARNED = 1 / 32
"""Tokens that are trained on alone, per token of a batch."""
AGAIN = 1 / 2
"""Share of these taken from the largest KL of the step before; the rest are the drawn tokens furthest from constant."""
MOST = 1 / 2
"""Largest gradient norm of these tokens together, as a share of a step's usual one. The usual one counts them too, so
with a share of 1 it would grow without end; with 1/2, text keeps at least their weight."""


class FirstTokens(TrainerCallback, ExportableState):
    """Chooses the single tokens that a step learns, and remembers which of them the next step learns again.

    Attributes:
        worst: ids of those that the next step learns again, over all processes; updated in place.
    """

    def __init__(self, vocabulary: int, batch_tokens: int, device: torch.device) -> None:
        """Start with nothing known about any token.

        Args:
            vocabulary: its size.
            batch_tokens: tokens in a batch on one process.
            device: where the model is.
        """
        self.vocabulary = vocabulary
        self.drawn = max(1, round(DRAWN * batch_tokens))
        learned = max(1, round(LEARNED * batch_tokens))
        self.again = int(AGAIN * learned)
        self.furthest = learned - self.again
        self.worst = torch.arange(self.again * processes.count(), device=device) % vocabulary

    def draw(self) -> Int[Tensor, "drawn 1"]:
        """Tokens for this process to examine; all processes must draw together, with the same seed."""
        return torch.randint(self.vocabulary, (processes.count(), self.drawn, 1))[processes.rank()]

    def losses(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        stand_ins: Collection[TaperedNorm],
        drawn: Int[Tensor, "drawn 1"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Losses on single tokens: those of `drawn` furthest from the constants, and the worst of the last step.

        Args:
            model: in training mode with its norms removed, so that a ceiling keeps everything finite.
            teacher: the original.
            stand_ins: the model's, which must keep log scales.
            drawn: token ids.

        Returns:
            Mean KL(teacher || model) in nats, and `unevenness` beyond `RUNAWAY`, averaged over all sites.
        """
        with torch.no_grad():
            model.base_model(input_ids=drawn, use_cache=False)
            runs = torch.stack([departure.abs().amax(-1) for departure in _departures(stand_ins, len(drawn))])
            again = self.worst[processes.rank() * self.again :][: self.again, None]
            ids = torch.cat([drawn[runs.amax(0).topk(self.furthest).indices], again])
            teacher_logits = teacher(input_ids=ids, use_cache=False).logits
        log_p = teacher_logits[:, 0].float().log_softmax(-1)
        log_q = model(input_ids=ids, use_cache=False).logits[:, 0].float().log_softmax(-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        self._remember(ids[:, 0], kl.detach())
        departures = _departures(stand_ins, len(ids))
        uneven = [unevenness(departure, departure.new_zeros(()), RUNAWAY) for departure in departures]
        return kl.mean(), torch.stack(uneven).mean()

    def _remember(self, ids: Int[Tensor, " token"], kl: Float[Tensor, " token"]) -> None:
        """Keep the tokens with the largest KL among those that this step learned on all processes."""
        ids, kl = processes.gathered(ids), processes.gathered(kl)
        twice = (ids[:, None] == ids).tril(-1).any(-1)
        self.worst.copy_(ids[kl.nan_to_num(0.0).masked_fill(twice, -1.0).topk(len(self.worst)).indices])

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as transformers stores it."""
        return {"args": {}, "attributes": {"worst": self.worst.tolist()}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the worst tokens from a checkpoint."""
        # With a different number of processes there may be room for fewer or for more.
        worst = saved_attributes(self, state).get("worst", [])[: len(self.worst)]
        self.worst[: len(worst)] = torch.tensor(worst, dtype=self.worst.dtype)


@torch.no_grad()
def limit_gradients(gradients: Collection[Tensor], usual: Float[Tensor, ""]) -> None:
    """Scale gradients down, in place, until their common norm is at most `MOST` of the usual; to 0 if it is not finite.

    Without a value that the CPU waits for, so that a step on a GPU can be recorded; torch's own clipping has one.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    factor = (MOST * usual / norm).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor).masked_fill_(~norm.isfinite(), 0.0)


def _departures(stand_ins: Collection[TaperedNorm], tokens: int) -> list[Float[Tensor, "token _"]]:
    """Each token's log scale in the last pass minus the log constant, for each site."""
    kept = [(stand_in.kept_log_scale, stand_in.log_constant[0]) for stand_in in stand_ins]
    return [(log_scale - constant).view(tokens, -1) for log_scale, constant in kept if log_scale is not None]
