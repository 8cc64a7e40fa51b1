"""The run: transformers' Trainer, with the schedule as a callback, distillation as the loss, and a guard."""

from unnorm.training.callbacks import Removal
from unnorm.training.loop import Outcome, last_checkpoint, train

__all__ = ["Outcome", "Removal", "last_checkpoint", "train"]
