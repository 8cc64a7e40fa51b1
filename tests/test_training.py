"""The guard, and what the training loop does with a step that must not be applied."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

import unnorm
from unnorm.losses import distillation_losses, next_token_loss
from unnorm.training import run
from unnorm.training.callbacks import MOST_BAD_STEPS, GuardCallback


def step(guard: GuardCallback, gradient: float, tmp_path: Path) -> tuple[nn.Linear, TrainerControl]:
    model, control = nn.Linear(1, 1, bias=False), TrainerControl()
    model.weight.grad = torch.full((1, 1), gradient)
    guard.on_pre_optimizer_step(TrainingArguments(str(tmp_path)), TrainerState(), control, model=model)
    return model, control


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_guard_refuses_bad_steps_only(bad: float, tmp_path: Path) -> None:
    guard = GuardCallback()
    for gradient in (1e-9, 1e-3, 0.5, 30.0):
        model, _ = step(guard, gradient, tmp_path)
        assert model.weight.grad is not None
        assert float(model.weight.grad) == pytest.approx(min(gradient, guard.CLIP), rel=1e-4)
    model, control = step(guard, bad, tmp_path)
    assert model.weight.grad is None
    assert guard.skipped == 1
    assert not control.should_training_stop


def test_guard_gives_up_after_many_bad_steps_in_a_row(tmp_path: Path) -> None:
    guard = GuardCallback()
    stops = [step(guard, math.nan, tmp_path)[1].should_training_stop for _ in range(MOST_BAD_STEPS)]
    assert stops == [False] * (MOST_BAD_STEPS - 1) + [True]
    again = GuardCallback.from_state(guard.state())
    assert (again.skipped, again.in_a_row) == (guard.skipped, guard.in_a_row)


def test_a_step_of_nan_is_not_applied(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    calls = 0

    def sometimes_nan(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += torch.is_grad_enabled()
        kl, loss = distillation_losses(*args)
        return kl * (math.nan if torch.is_grad_enabled() and calls in (4, 5) else 1.0), loss

    monkeypatch.setattr(run, "distillation_losses", sometimes_nan)
    result = unnorm.remove(
        model=str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", tokens=10_000, device="cpu", batch_size=8
    )
    assert result["skipped_steps"] == 2
    assert math.isfinite(result["lnfree_loss"])


def test_divergence_ends_the_run_with_a_message(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    def always_nan(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        kl, loss = distillation_losses(*args)
        return kl * math.nan, loss

    monkeypatch.setattr(run, "distillation_losses", always_nan)
    with pytest.raises(unnorm.UnnormError, match="diverged"):
        unnorm.remove(
            model=str(tiny_model_dir), data=str(text_file), out=tmp_path, tokens=20_000, device="cpu", batch_size=8
        )


def test_losses_in_nats_per_token() -> None:
    torch.manual_seed(0)
    logits, other = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    ids = torch.randint(7, (2, 5))
    p, q = other.softmax(-1), logits.softmax(-1)
    kl, loss = distillation_losses(logits, other, ids)
    torch.testing.assert_close(kl, (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(loss, next_token_loss(logits, ids))
    assert float(distillation_losses(logits, logits, ids)[0]) == pytest.approx(0, abs=1e-6)
    picked = q.log()[:, :-1].gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(next_token_loss(logits, ids), -picked.mean())


@pytest.mark.parametrize(
    ("fault", "message"),
    [(OSError("No space left on device"), "No space left.*--resume"), (torch.OutOfMemoryError(), "--batch-size")],
)
def test_running_out_of_something_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    message: str,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(run.DistillationTrainer, "_save_checkpoint", fail)
    with pytest.raises(unnorm.UnnormError, match=message):
        unnorm.remove(model=str(tiny_model_dir), data=str(text_file), out=tmp_path, tokens=10_000, device="cpu")
