"""Whether two models can be compared token by token."""

from transformers import PreTrainedTokenizerBase

from unnorm.errors import UnnormError

_MIXED_TEXT = "The CAT's hat isn't 3.14159\n\n\tdef naïve(x):  return x + 2026  # 東京 🙂"
"""Upper and lower case, contractions, digits, runs of spaces, accents: where tokenizers of one vocabulary differ."""


def check_same_vocabulary(name: str, rows: int, other: str, its_rows: int) -> None:
    """Raise an UnnormError if two models have different numbers of token embeddings."""
    if rows != its_rows:
        raise UnnormError(
            f"'{name}' has {rows:,} token embeddings and '{other}' has {its_rows:,}: their vocabularies differ. "
            "Compare models with the same tokenizer, such as a twin with its original or its control."
        )


def check_same_tokenizer(
    name: str, tokenizer: PreTrainedTokenizerBase, other: str, its_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise an UnnormError if two tokenizers give tokens different ids or split text differently."""
    ours, theirs = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    apart = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if apart:
        raise UnnormError(
            f"'{name}' and '{other}' have different tokenizers: {len(apart):,} tokens, such as {min(apart)!r}, have "
            "different ids in the two, or are in one only. Their losses per token are of different tokens; compare "
            "models with the same tokenizer."
        )
    if _mixed_ids(tokenizer) != _mixed_ids(its_tokenizer):
        raise UnnormError(
            f"The tokenizers of '{name}' and '{other}' have the same vocabulary but split text differently, e.g. by "
            "other merges or another normalizer. Their losses per token are of different tokens; compare models with "
            "the same tokenizer."
        )


def _mixed_ids(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Ids of `_MIXED_TEXT`; None if the vocabulary does not cover it and has no token for the unknown."""
    try:
        return list(tokenizer(_MIXED_TEXT, add_special_tokens=False)["input_ids"])
    except Exception:  # Of the tokenizers library, which has no class for it.
        return None
