"""A model in memory: its mode, precision and copies, and how much text it takes at once."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from unnorm.errors import UnnormError

LOGITS_AT_ONCE = 2**28
"""Of all blocks that run together."""


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the token embedding: ids are below it, and the tokenizer may have fewer."""
    return int(model.get_input_embeddings().weight.shape[0])


def context_length(model: PreTrainedModel) -> int:
    """Most tokens that the model takes at once, or was trained on (BLOOM), or 1024 where its config does not say."""
    return _told_context(model) or 1024


def _told_context(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "seq_length", "max_seq_len")
    told = (getattr(config, name, None) for name in names)
    return next((length for length in told if length is not None and length > 0), None)  # XLNet says -1.


def check_fits(model: PreTrainedModel, tokens: int) -> None:
    """Raise an UnnormError where a sequence has more tokens than the model takes."""
    longest = _told_context(model)
    if longest is not None and tokens > longest:
        raise UnnormError(f"A sequence has {tokens} tokens, and the model takes {longest}. Shorten it.")


def blocks_at_once(model: PreTrainedModel, length: int, most: int) -> int:
    """How many blocks to run together, so that their logits take no more than a gigabyte in float32."""
    return max(1, min(most, LOGITS_AT_ONCE // (length * vocabulary_size(model))))


def free_memory(device: str) -> int:
    """Bytes of memory that are free on the device, with what earlier work left in it given back."""
    gc.collect()  # A Trainer and its callbacks hold each other.
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def cast_as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Put a model into another dtype as loading it in that one does.

    Buffers that no file holds keep their precision: rotary frequencies in bfloat16 turn late positions by wrong angles.
    """
    computed = [(module, key, module._buffers[key]) for module in model.modules() for key in _computed_buffers(module)]
    model.to(dtype)
    for module, key, buffer in computed:
        module._buffers[key] = buffer
    return model


def _computed_buffers(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set & module._buffers.keys()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """No dropout while this lasts: distillation wants the teacher's function, not a noisy one.

    Families keep its probability in a `nn.Dropout`, as a number of their own modules, or read it from the config.
    """
    before = [(module, "p", module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for holder in (model.config, model.config.get_text_config(), *model.modules()):
        before += [(holder, key, value) for key, value in vars(holder).items() if "drop" in key and _is_share(value)]
    try:
        for holder, key, _ in before:
            setattr(holder, key, 0.0)
        yield
    finally:
        for holder, key, value in before:
            setattr(holder, key, value)


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1


def fuse_activations(model: PreTrainedModel) -> None:
    """GPT-2's GELU as torch's one operation in place of transformers' eight: same function, a tenth of a CPU step."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "NewGELUActivation":
            model.set_submodule(name, nn.GELU(approximate="tanh"))


def copy_model(model: PreTrainedModel, share: bool = False) -> PreTrainedModel:
    """An independent copy in the same dtype and on the same device.

    With `share` only the modules are copied: its parameters are new ones over the same memory.
    """
    # What stands here is taken instead of a copy.
    taken: dict[int, torch.Tensor] = {}
    if share:
        taken = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    for module in model.modules():  # States that some families keep from the last pass can't be copied with its graph.
        kept = (value for value in vars(module).values() if isinstance(value, torch.Tensor) and value.grad_fn)
        taken |= {id(value): value.detach() for value in kept}
    copy = deepcopy(model, taken)
    # Not in a config's own copy, since it depends on the machine.
    copy.config._experts_implementation = model.config._experts_implementation
    return copy.eval()
