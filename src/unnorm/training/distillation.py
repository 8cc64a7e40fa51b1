"""The Trainer, which defines the loss of a step."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from unnorm import processes
from unnorm.errors import UnnormError, first_few
from unnorm.hooks import hooked
from unnorm.taper.norms import TaperedNorm
from unnorm.taper.recipes import Optimization
from unnorm.training.callbacks import GuardCallback, Removal
from unnorm.training.first_tokens import LEARNED, FirstTokens, limit_gradients
from unnorm.training.losses import (
    RUNAWAY,
    distillation_losses,
    massive_unevenness,
    next_token_loss,
    read_mismatch,
    scale_penalty,
    unevenness,
)
from unnorm.training.recorded_step import RecordedStep

READS_SHARE = 0.7
"""Share of the run during which reads are matched; the rest makes good what matching costs in final KL.

Steps by which the taper is late do not count: matching brings about what the taper waits for."""

MASSIVE_SCALE = 3.0
"""A token is massive at a site if its scale in the original is more than this many times the constant."""

STRESS_TEMPERATURE = 2.0
"""Temperature for stress blocks: the worst losses are on tokens that the teacher gives almost no probability."""


class DistillationTrainer(Trainer):
    """Trainer whose loss is KL to the teacher's logits, or next-token loss without a teacher.

    Depending on the recipe it adds a little next-token loss, the mismatch of what sites' readers get, unevenness of
    scales at bounded stand-ins, KL on single first tokens, and a penalty at the final norm.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None,
        optimization: Optimization,
        removal: Removal | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.optimization = teacher, optimization
        self.removal = removal
        self.end_of_text = None if removal is None else removal.end_of_text
        self.controller = None if removal is None else removal.controller
        self.penalized: TaperedNorm | None = None
        if removal is not None and removal.final is not None and optimization.penalty is not None:
            self.penalized = removal.final
            self.penalized.keep_log_scale = True
        self.stand_ins = removal.stand_ins if removal is not None and optimization.read_weight else {}
        self.teacher_reads: dict[str, Tensor] = {}
        self.massive: dict[str, Tensor | None] = {}
        self.bounded = [stand_in for stand_in in self.stand_ins.values() if stand_in.interpolation == "bounded"]
        self.sums = torch.zeros(3, device=self.args.device)
        self.step_kl = torch.zeros(2, device=self.args.device)
        self.recorded: RecordedStep | None = None
        self.guard = GuardCallback(self.controller, self.take_step_kl, self.held)
        self.add_callback(self.guard)
        self.first_tokens: FirstTokens | None = None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights, but neither biases nor norms; transformers knows norms by class and name and can miss stand-ins."""
        norms = {name for name, module in model.named_modules() if isinstance(module, TaperedNorm)}
        return [name for name in super().get_decay_parameter_names(model) if name.rpartition(".")[0] not in norms]

    def record_steps(self) -> None:
        """From now on, record steps and replay them; see `RecordedStep`."""

        def step(inputs: dict[str, Tensor]) -> Tensor:
            return cast(Tensor, Trainer.training_step(self, self.model_wrapped, inputs))

        assert self.model is not None
        self.recorded = RecordedStep(step, list(self.model.parameters()))

    def learn_first_tokens(self, first_tokens: FirstTokens) -> None:
        """Once the norms are gone, also train on single tokens."""
        self.first_tokens = first_tokens
        self.add_callback(first_tokens)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Loss of a batch of `input_ids`, (batch, position); adds up what the next log line shows for `text` rows.

        Anything else that changes from step to step comes with the batch (`_add_step_inputs`), since a recorded step
        does not run this code again.
        """
        ids, is_text = inputs["input_ids"], inputs["text"]
        if "first_tokens" in inputs:
            self._learn_first_tokens(model, inputs["first_tokens"], inputs["usual_norm"])
        with self.accelerator.autocast():
            output = model(input_ids=ids, use_cache=False)
        if self.teacher is None:
            loss = next_token_loss(output.logits, ids)
            shown = torch.stack([loss.detach(), torch.full_like(loss, math.nan), torch.ones_like(loss)])
        else:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits
            loss, text_kl, token_loss = distillation_losses(
                output.logits, teacher_logits, ids, is_text, STRESS_TEMPERATURE, self.optimization.label_weight
            )
            shown = torch.stack([token_loss, text_kl, torch.ones_like(text_kl)])
            shown = (is_text.sum() * shown).masked_fill(~is_text.any(), 0.0)
            self.step_kl += shown[1:]
            if "read_share" in inputs:
                loss = loss + inputs["read_share"] * self.optimization.read_weight * self._read_mismatch()
            if self.bounded:
                loss = loss + self._unevenness()
        self.sums += shown
        if self.penalized is not None:
            loss = loss + self._penalty(self.penalized, ids)
        return (loss, output) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing if all steps are done: a run resumed after its last step would otherwise take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # The prepared model converts its logits to float32, which with a large vocabulary takes twice the memory of
        # everything else here. The losses convert them a few at a time.
        plain = self._plain_model()
        plain.forward = vars(plain).pop("_original_forward", plain.forward)
        super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass of one batch; on a GPU replayed from a recorded graph, if possible."""
        inputs = self._add_step_inputs(inputs)
        if self.recorded is None:
            return cast(Tensor, super().training_step(model, inputs, num_items_in_batch))
        phase = None if self.removal is None else self.removal.phase
        return self.recorded(phase, self._prepare_inputs(inputs))

    def _add_step_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch, plus the weight of matching reads, and the single tokens to examine and their limit, if any."""
        inputs = dict(inputs)
        if share := self._read_match_share():
            inputs["read_share"] = torch.tensor(share)
        if self.first_tokens is not None and self.bounded[0].removed:
            inputs["first_tokens"] = self.first_tokens.draw()
            inputs["usual_norm"] = torch.tensor(self.guard.usual_norm)
        return inputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, but with loss and KL on text, the guard's gradient norm and how far removal is."""
        if "learning_rate" in logs:
            logs.pop("loss", None)
            progress = {} if self.removal is None else self.removal.progress()
            logs |= {**self.take_means(), "grad_norm": self.guard.norm, **progress}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a checkpoint's weights under the names that they have in the model, where resuming looks for them.

        The Trainer would use the Hub's names, which in some families differ for the unembedding or the experts.
        """
        if self.args.should_save:
            self._plain_model().save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks weights; tied weights count as present under any of their names.

        Raises:
            UnnormError: weights are missing.
        """
        weights = self._plain_model().state_dict()
        missing = set(load_result.missing_keys)
        found = {weights[name].data_ptr() for name in weights.keys() - missing}
        if lost := sorted(name for name in missing if weights[name].data_ptr() not in found):
            raise UnnormError(f"The last checkpoint lacks {first_few(lost)}. It is damaged; do the run again.")

    def _plain_model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """None: otherwise the Trainer would measure all gradients, and scale them by 1, in addition to the guard."""
        return grad_norm

    @contextmanager
    def matching_reads(self) -> Iterator[None]:
        """In each training pass keep the outputs of the teacher's norms and their stand-ins, if the loss needs them."""

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                self.teacher_reads[name] = output
                stand_in = self.stand_ins[name]
                # Once the norms are gone, extra weight on a few tokens only hinders all the others.
                told_apart = self.bounded and not stand_in.removed
                self.massive[name] = stand_in.departure(args[0]) > math.log(MASSIVE_SCALE) if told_apart else None

            return hook

        teacher = self.teacher
        handles = [teacher.get_submodule(name).register_forward_hook(keep(name)) for name in self.stand_ins if teacher]
        for stand_in in self.stand_ins.values():
            stand_in.keep_output = True
        for stand_in in self.bounded:
            stand_in.keep_log_scale = True
        try:
            with hooked(handles):
                yield
        finally:
            for stand_in in self.stand_ins.values():
                stand_in.keep_output, stand_in.kept_output = False, None
            for stand_in in self.bounded:
                stand_in.keep_log_scale, stand_in.kept_log_scale = False, None
            self.teacher_reads.clear()
            self.massive.clear()

    def _read_match_share(self) -> float:
        """Share of `read_weight` in force: falls from 1 to 0 over `READS_SHARE` of the run; a late taper delays it."""
        # Matching prepares for the removal; a twin that is only healed has nothing left to prepare for.
        if not self.stand_ins or (self.controller is not None and self.controller.only_heals):
            return 0.0
        step, steps = self.state.global_step, max(1, self.state.max_steps)
        late = 0 if self.controller is None else self.controller.late(step, steps)
        return max(0.0, 1 - (step - late) / steps / READS_SHARE)

    def _read_mismatch(self) -> Float[Tensor, ""]:
        mismatches = []
        for name, stand_in in self.stand_ins.items():
            assert stand_in.kept_output is not None
            mismatches.append(read_mismatch(stand_in.kept_output, self.teacher_reads[name], self.massive[name]))
        return torch.stack(mismatches).mean()

    def _unevenness(self) -> Float[Tensor, ""]:
        uneven = []
        for name, stand_in in self.stand_ins.items():
            if stand_in.kept_log_scale is None:
                continue
            scale = stand_in.kept_log_scale, stand_in.log_constant[0]
            massive = self.massive[name]
            if massive is None:
                uneven.append(self.optimization.even_weight * unevenness(*scale, RUNAWAY))
            else:
                uneven.append(
                    self.optimization.even_weight * stand_in.alpha.mean() ** 4 * unevenness(*scale)
                    + self.optimization.massive_even_weight * massive_unevenness(*scale, massive)
                )
        return torch.stack(uneven).mean()

    def _learn_first_tokens(
        self, model: nn.Module, drawn: Int[Tensor, "drawn 1"], usual_norm: Float[Tensor, ""]
    ) -> None:
        """Add the gradients of the loss on single tokens, together at most half as long as a step's usually are.

        Without that limit they can be 10,000 times as long for many steps in a row, and nothing is learned from text.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps = self.current_gradient_accumulation_steps
        loss = self._first_token_loss(model, drawn) / steps
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        limit_gradients([gradient for gradient in gradients if gradient is not None], usual_norm / steps)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _first_token_loss(self, model: nn.Module, drawn: Int[Tensor, "drawn 1"]) -> Float[Tensor, ""]:
        """Loss on single tokens, each weighted like one token of the batch. Overwrites the kept log scales."""
        assert self.teacher is not None and self.first_tokens is not None
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self.accelerator.autocast():
            kl, uneven = self.first_tokens.losses(plain, self.teacher, self.bounded, drawn)
        return LEARNED * (kl + self.optimization.even_weight * uneven)

    def held(self) -> float | None:
        """Share of the last batch's tokens held down by bounds, over all sites and processes; None without bounds."""
        shares = [share for stand_in in self.bounded if (share := stand_in.held) is not None]
        return float(processes.mean(torch.stack(shares).mean())) if shares else None

    def _penalty(self, norm: TaperedNorm, ids: Int[Tensor, "batch position"]) -> Float[Tensor, ""]:
        assert norm.kept_log_scale is not None and self.optimization.penalty is not None
        special = torch.zeros_like(ids, dtype=torch.bool) if self.end_of_text is None else ids == self.end_of_text
        special[:, 0] = True
        penalty = scale_penalty(norm.kept_log_scale, special, norm.log_constant[0], self.optimization.penalty)
        return self.optimization.penalty_weight * penalty

    def take_step_kl(self) -> float | None:
        """Mean KL on text since the last call, over all processes; None if all rows were stress blocks."""
        sums = processes.total(self.step_kl)
        self.step_kl.zero_()
        kl, count = sums.tolist()
        return float(kl / count) if count else None

    def take_means(self) -> dict[str, float]:
        """Mean loss and KL on text since the last call, over all processes; empty if there was no text."""
        sums = processes.total(self.sums)
        self.sums.zero_()
        loss, kl, count = sums.tolist()
        if not count:
            return {}
        return {"loss": loss / count} if math.isnan(kl) else {"loss": loss / count, "kl": kl / count}
