"""The text of a finished run, for later measurements on its twin."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unnorm.data import STDLIB
from unnorm.data.packing import held_out_blocks
from unnorm.errors import UnnormError


@contextmanager
def blaming_the_run(is_own: bool) -> Iterator[None]:
    """Make errors about unreadable text say that it is the run's if it `is_own`, i.e. the user named none."""
    try:
        yield
    except UnnormError as error:
        if not is_own:
            raise
        remedy = "" if "--data" in str(error) else " Or name other text with --data."
        raise UnnormError(f"The run's own text can't be read. {error}{remedy}") from error


class TextSource(NamedTuple):
    """A source of text as `open_documents` takes it; `is_own` if it is the run's, since the user named none."""

    data: str
    text_field: str | None
    split: str
    is_own: bool

    def held_out(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, context: int, count: int) -> Dataset:
        """At most `count` blocks of its held-out part.

        Raises:
            UnnormError: the text can't be read, or does not fit this vocabulary.
        """
        with blaming_the_run(self.is_own):
            source = self.data, tokenizer, vocab_size, context, count, self.text_field, self.split
            return held_out_blocks(*source)[0]


def choose_text(
    settings: Mapping[str, Any], data: object = None, text_field: str | None = None, split: str | None = None
) -> TextSource:
    """The text that the user named, otherwise the run's.

    Args:
        settings: the run's settings, as saved; empty if it has none.
        data: other text, or None; if given, the run's field and split are not used either.
        text_field: column that holds the text.
        split: split that the text comes from.
    """
    own = settings if not data else {}
    return TextSource(
        str(data or own.get("data") or STDLIB),
        text_field or own.get("text_field"),
        split or own.get("split") or "train",
        not data,
    )
