"""The run: transformers' Trainer, with the schedule as a callback, distillation as the loss, and a guard."""

from unnorm.training.callbacks import Removal, Watcher
from unnorm.training.run import Outcome, quick_evaluation, train

__all__ = ["Outcome", "Removal", "Watcher", "quick_evaluation", "train"]
