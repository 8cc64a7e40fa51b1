"""The LN-free model classes, and their registration with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from unnorm.modeling.modeling_unnorm import UnnormGPT2Config, UnnormGPT2LMHeadModel

LN_FREE_CLASSES: dict[str, type[PreTrainedModel]] = {"gpt2": UnnormGPT2LMHeadModel}
"""Stock `model_type` -> the class of its LN-free twin."""


def register() -> None:
    """Make transformers' Auto classes load LN-free checkpoints without `trust_remote_code`.

    Checkpoints saved after this carry the modeling file and the `auto_map` that names it.
    """
    AutoConfig.register(UnnormGPT2Config.model_type, UnnormGPT2Config, exist_ok=True)
    AutoModelForCausalLM.register(UnnormGPT2Config, UnnormGPT2LMHeadModel, exist_ok=True)
    UnnormGPT2Config.register_for_auto_class()
    UnnormGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")


register()

__all__ = ["LN_FREE_CLASSES", "UnnormGPT2Config", "UnnormGPT2LMHeadModel", "register"]
