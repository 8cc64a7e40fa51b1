"""The LN-free model classes, and their registration with transformers' Auto classes."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from unnorm.modeling import modeling_unnorm
from unnorm.modeling.modeling_unnorm import PREFIX


def ln_free_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The LN-free twin's class for a stock class, registered with the Auto classes.

    Its checkpoints carry the modeling file and the `auto_map` that names it.

    Raises:
        AttributeError: transformers itself has no such stock class, so a checkpoint could not be loaded.
    """
    made: type[PreTrainedModel] = getattr(modeling_unnorm, PREFIX + stock.__name__)
    config: Any = made.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, made, exist_ok=True)
    config.register_for_auto_class()
    made.register_for_auto_class("AutoModelForCausalLM")
    return made


def register_twin_class(checkpoint: str | Path) -> None:
    """Register the class of a twin's checkpoint, of any family, with the Auto classes; ignore other checkpoints.

    Args:
        checkpoint: a local directory or a hub id.

    Raises:
        OSError: the checkpoint has no readable config.
    """
    config, _ = PretrainedConfig.get_config_dict(checkpoint)
    for name in config.get("architectures") or ():
        stock = getattr(transformers, name.removeprefix(PREFIX), None)
        if name.startswith(PREFIX) and isinstance(stock, type) and issubclass(stock, PreTrainedModel):
            ln_free_class(stock)
