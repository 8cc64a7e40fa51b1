"""The text of a finished run, for later measurements on its twin."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unnorm.data import STDLIB
from unnorm.data.packing import HeldOut, held_out_blocks
from unnorm.errors import UnnormError
from unnorm.runs.config import absolute_source


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
    """A source of text as `open_documents` takes it.

    Attributes:
        data: the source.
        text_field: column that holds the text.
        split: split that the text comes from.
        is_own: whether it is the run's since the user named none.
        division: how the run divided it, in words; None if the run had another text or is not finished.
    """

    data: str
    text_field: str | None = None
    split: str = "train"
    is_own: bool = False
    division: str | None = None

    def held_out(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, context: int, count: int
    ) -> tuple[Dataset, HeldOut]:
        """At most `count` blocks of its held-out part, and how that is kept apart.

        Raises:
            UnnormError: the text can't be read, or does not fit this vocabulary.
        """
        with blaming_the_run(self.is_own):
            found = held_out_blocks(self.data, tokenizer, vocab_size, context, count, self.text_field, self.split)
            self.check_divided(found[1].division)
            return found

    def check_divided(self, now: str) -> None:
        """Raise an UnnormError if a run's text is divided in another way now: held-out text may have been trained on.

        That happens where files are renamed, or where few documents become many.
        """
        if self.division is not None and self.division != now:
            raise UnnormError(
                f"Of '{self.data}' {now} would be held out, but for the run it was {self.division}: the twin has seen "
                "some of this text. Put the files back as they were, or name other text with --data."
            )


def choose_text(
    settings: Mapping[str, Any], data: object = None, text_field: str | None = None, split: str | None = None
) -> TextSource:
    """The text that the user named, otherwise the run's.

    Args:
        settings: the run's settings, as saved; empty if it has none.
        data: the text, or None for the run's; if it is another one, the run's field and split are not used either.
        text_field: column that holds the text.
        split: split that the text comes from.
    """
    is_the_runs = data is None or settings.get("data") in (str(data), absolute_source(str(data)))
    own = settings if is_the_runs else {}
    field, part = text_field or own.get("text_field"), split or own.get("split") or "train"
    is_alike = (field, part) == (own.get("text_field"), own.get("split") or "train")
    return TextSource(
        str(own.get("data") or STDLIB if data is None else data),
        field,
        part,
        data is None,
        own.get("division") if is_alike else None,
    )
