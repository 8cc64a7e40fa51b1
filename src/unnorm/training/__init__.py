"""The run: transformers' Trainer, with the schedule as a callback, distillation as the loss, and a guard."""

from unnorm.training.callbacks import Removal
from unnorm.training.run import Outcome, quick_evaluation, train

__all__ = ["Outcome", "Removal", "quick_evaluation", "train"]
