"""What a tokenizer makes of a text, and what it puts before every text."""

from transformers import PreTrainedTokenizerBase


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> list[int]:
    """A text's token ids, with `special` including special tokens; empty if the tokenizer fails on the text.

    Tokenizers without an unknown token may fail.
    """
    try:
        return [*tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]
    except Exception:  # The tokenizers library raises plain Exception.
        return []


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text.

    None if it puts none or several, or if it puts the end-of-text token (OPT).
    """
    plain, whole = (token_ids("a", tokenizer, special) for special in (False, True))
    begin, rest = whole[:1], whole[1:]
    if begin == plain[:1] or begin == [tokenizer.eos_token_id] or rest[: len(plain)] != plain:
        return None
    return begin[0]
