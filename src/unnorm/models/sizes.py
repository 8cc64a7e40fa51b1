"""Vocabulary size and context length of a model, and how many blocks to run at once."""

from numbers import Integral

from torch import nn
from transformers import PreTrainedModel

from unnorm.errors import UnnormError

MOST_CONTEXT = 1024
LOGITS_AT_ONCE = 2**28
"""Most logits of all blocks that run together; a gigabyte in float32."""


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the token embedding: all ids are below this, and the tokenizer may have fewer tokens."""
    return int(model.get_input_embeddings().weight.shape[0])


def trained_parameters(model: PreTrainedModel) -> int:
    """Parameters of a model in training; a tied unembedding counts twice, as equalizing the embedding unties it."""
    unembedding = model.get_output_embeddings()
    tied = unembedding.weight.numel() if model.config.tie_word_embeddings and unembedding is not None else 0
    return int(tied) + sum(p.numel() for p in model.parameters())


def check_named_sizes(name: str, model: PreTrainedModel) -> None:
    """Raise an UnnormError if a model's config doesn't name the width and depth that a run is planned by."""
    config = model.config.get_text_config()
    lacking = [size for size in ("hidden_size", "num_hidden_layers") if not hasattr(config, size)]
    if lacking:
        raise UnnormError(
            f"The config of '{name}' ({type(model).__name__}) has no {' and no '.join(lacking)}, by which a run is "
            "planned. Where one width and depth hold for all layers, give them (an `attribute_map` can)."
        )


def context_length(model: PreTrainedModel) -> int:
    """Most tokens that the model takes at once, or was trained on (BLOOM); 1024 if its config does not say."""
    return _told_context(model) or 1024


def _told_context(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "seq_length", "max_seq_len")
    told = (getattr(config, name, None) for name in names)
    length = next((length for length in told if length is not None and length > 0), None)  # XLNet says -1.
    return None if length is None else length - _unused_positions(model, length)


def _unused_positions(model: PreTrainedModel, length: int) -> int:
    """Rows of the position embedding up to that of padding, after which RoBERTa and its kin count positions."""
    embeddings = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    padding = (m.padding_idx for name, m in embeddings.items() if "position" in name and m.num_embeddings == length)
    return max((index + 1 for index in padding if index is not None), default=0)


def check_fits(model: PreTrainedModel, tokens: int) -> None:
    """Raise an UnnormError if a sequence has more tokens than the model takes."""
    longest = _told_context(model)
    if longest is not None and tokens > longest:
        raise UnnormError(f"A sequence has {tokens} tokens, but the model takes {longest}. Shorten it.")


def blocks_at_once(model: PreTrainedModel, length: int, most: int) -> int:
    """How many blocks to run together: at most `most`, with at most a gigabyte of float32 logits, and at least one."""
    return max(1, min(most, LOGITS_AT_ONCE // (length * vocabulary_size(model))))


def choose_context(asked: int | None, *models: PreTrainedModel) -> int:
    """Tokens in a block: `asked`, or by default the longest that all models take, at most `MOST_CONTEXT`.

    Raises:
        UnnormError: a model can't take that many, or there would be nothing to predict.
    """
    longest = min(context_length(model) for model in models)
    context = min(longest, MOST_CONTEXT) if asked is None else asked
    if not isinstance(context, Integral):
        raise UnnormError(f"--context {context} is not a whole number of tokens.")
    context = int(context)
    if context > longest:
        raise UnnormError(f"--context {context} is longer than the {longest} tokens that the model takes.")
    if context < 2:
        raise UnnormError(f"--context {context} is too short: a block takes at least 2 tokens.")
    return context
