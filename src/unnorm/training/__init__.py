"""The run: transformers' Trainer, with the schedule as a callback, distillation as the loss, and a guard."""
