"""Text that a model writes itself, in place of a corpus (`--data self`) or beside one (`--self-share`)."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.data.files import OWN_TEXT
from unnorm.data.packing import Blocks, HeldOut, as_dataset, begin_of_blocks
from unnorm.errors import UnnormError
from unnorm.models.device import free_memory
from unnorm.models.sizes import vocabulary_size

_LOGITS_AT_ONCE, _GPU_LOGITS_AT_ONCE = 2**20, 2**26
_CACHE_SHARE = 0.5
"""Share of free memory for keys and values, which transformers copies as they grow."""

_REMEDY = "Name text with --data, and leave out --self-share."


def own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    train_blocks: int,
    validation_blocks: int,
    say: Callable[[str], None],
) -> Blocks:
    """Blocks sampled from the model at temperature 1, with torch's global random state.

    Each begins with the token that the tokenizer puts before every text, otherwise with end-of-text, and does not stop
    at end-of-text: the next document follows. Sampled blocks follow the model's own distribution over texts, on which
    a twin should agree with it.

    Args:
        model: the original, on its device.
        tokenizer: its tokenizer.
        context: tokens per block.
        train_blocks: blocks to train on.
        validation_blocks: blocks to validate on.
        say: gets progress messages.

    Raises:
        UnnormError: the tokenizer has no token to begin with, or the model keeps no cache of keys and values.
    """
    begins = (begin_of_blocks(OWN_TEXT, tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id)
    start = next((token for token in begins if token is not None), None)
    if start is None:
        raise UnnormError(
            "The model can't write text itself: its tokenizer has neither a begin-of-text nor an end-of-text token to "
            f"start from. {_REMEDY}"
        )
    _check_cache(model, int(start))
    at_once = _blocks_at_once(model, context)
    blocks: list[Tensor] = []
    wanted = train_blocks + validation_blocks
    for done in range(0, wanted, at_once):
        blocks.append(_write(model, int(start), min(at_once, wanted - done), context).cpu())
        say(f"writing text: {min(done + at_once, wanted):,} of {wanted:,} blocks")
    written = torch.cat(blocks).int().numpy()
    return Blocks(
        as_dataset(written[:train_blocks]),
        as_dataset(written[train_blocks:]),
        HeldOut(*2 * ["other samples of the original"]),
    )


def _blocks_at_once(model: PreTrainedModel, context: int) -> int:
    """How many blocks fit, given their logits, and the keys and values of every layer in float32.

    A power of two: the number decides the draws, and should not change with each little change of free memory.
    """
    most = _LOGITS_AT_ONCE if model.device.type == "cpu" else _GPU_LOGITS_AT_ONCE
    config = model.config.get_text_config()
    cache = 2 * 4 * context * config.hidden_size * config.num_hidden_layers
    room = int(_CACHE_SHARE * free_memory(str(model.device)))
    fit = max(1, min(most // vocabulary_size(model), room // cache))
    return 1 << (fit.bit_length() - 1)


@torch.no_grad()
def _check_cache(model: PreTrainedModel, start: int) -> None:
    output = model(input_ids=torch.full((1, 1), start, device=model.device), use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        raise UnnormError(
            f"The model can't write text itself: {type(model).__name__} has no key-value cache, so it would take too "
            f"long. {_REMEDY}"
        )


@torch.no_grad()
def _write(model: PreTrainedModel, start: int, blocks: int, context: int) -> Int[Tensor, "block position"]:
    """Ancestral sampling with the model's cache: transformers' `generate` would stop at end-of-text."""
    ids = torch.full((blocks, 1), start, device=model.device)
    columns, cache = [ids], None
    for _ in range(context - 1):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1)
        columns.append(ids)
    return torch.cat(columns, dim=1)
