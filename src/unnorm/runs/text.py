"""The text of a finished run, for what is measured on its twin afterwards."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unnorm.data import STDLIB
from unnorm.data.packing import held_out_blocks
from unnorm.errors import explained


def blaming_the_run(is_own: bool) -> AbstractContextManager[None]:
    """Text that can't be read is said to be the run's, where it `is_own`: its user named none."""
    return explained(is_own, "The run's own text can't be read.", "Or name other text with --data.")


class TextSource(NamedTuple):
    """Where text comes from, as `open_documents` takes it; `is_own`: it is the run's, since none was named."""

    data: str
    text_field: str | None
    split: str
    is_own: bool

    def held_out(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, context: int, count: int) -> Dataset:
        """At most `count` blocks of its held-out part.

        Raises:
            UnnormError: the text can't be read, or it is not this vocabulary's.
        """
        with blaming_the_run(self.is_own):
            source = self.data, tokenizer, vocab_size, context, count, self.text_field, self.split
            return held_out_blocks(*source)[0]


def choose_text(
    settings: Mapping[str, Any], data: object = None, text_field: str | None = None, split: str | None = None
) -> TextSource:
    """The text that was named, else the run's.

    Args:
        settings: the run's, as saved; none where it has none.
        data: other text, or None; its field and split are then not the run's either.
        text_field: column that holds the text.
        split: split that it comes from.
    """
    own = settings if not data else {}
    return TextSource(
        str(data or own.get("data") or STDLIB),
        text_field or own.get("text_field"),
        split or own.get("split") or "train",
        not data,
    )
