"""HellaSwag, LAMBADA and WikiText from local files, in the format that the lm-eval tasks in `tasks/` expect.

lm-eval calls these functions with its `metadata`, which maps a benchmark's name to the path of its file.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datasets import Dataset, DatasetDict

from unnorm.data.files import open_rows
from unnorm.errors import UnnormError

_ARTICLE = re.compile(r"^ ?= [^=].*[^=] = *$", re.MULTILINE)
"""Title line of an article: one equals sign on each side; section headings have two or more."""


def hellaswag(hellaswag: str, **_: Any) -> DatasetDict:
    """Rows of `query`, `endings` and `label` from a file with `ctx`, `endings` and `label`.

    Raw items, as in the original release (with `activity_label`, `ctx_a` and `ctx_b`), are preprocessed as in lm-eval.

    Raises:
        UnnormError: the file does not exist or lacks these fields.
    """
    needed = {"ctx": _is_text, "endings": _is_texts, "label": _is_label}
    rows = open_rows(hellaswag, split="validation")  # The labels of the test split were never released.
    return _as_test_split(_items(hellaswag, rows, "HellaSwag", needed, _hellaswag_item))


def lambada_openai(lambada_openai: str, **_: Any) -> DatasetDict:
    """Rows of `context` and `continuation` (the last word), from a file with these fields or with `text` alone.

    A text file has one item per line.

    Raises:
        UnnormError: the file does not exist or lacks these fields.
    """
    needed = dict.fromkeys(("context", "continuation"), _is_text)
    rows = (_split_text(row) for row in open_rows(lambada_openai, split="test", lines=True))
    items = _items(lambada_openai, rows, "LAMBADA", needed, lambda row: {key: row[key] for key in needed})
    return _as_test_split(items)


def wikitext(wikitext: str, **_: Any) -> DatasetDict:
    """Rows of `page`: the articles of a WikiText file, each starting with ` = Title = `.

    The file holds either pieces of articles in `text`, with their line ends or all without, or one article per row in
    `page`.

    Raises:
        UnnormError: the file does not exist, has neither field or is empty.
    """
    rows = list(open_rows(wikitext, split="test"))
    if not any(key in rows[0] for key in ("text", "page")):
        raise UnnormError(
            f"'{wikitext}' is not a WikiText file: it has no field 'text' or 'page'. It has: {', '.join(rows[0])}."
        )
    pages = [str(row["page"]) for row in rows if row.get("page")]
    if pages:
        return _as_test_split([{"page": page} for page in pages])
    texts = [str(row.get("text") or "") for row in rows]
    whole = ("" if any(text.endswith("\n") for text in texts) else "\n").join(texts)
    if not whole.strip():
        raise UnnormError(f"'{wikitext}' is empty: there is no WikiText article in it.")
    starts = [match.start() for match in _ARTICLE.finditer(whole)]
    if not starts or whole[: starts[0]].strip():  # Text before the first title, as after a split, is an item too.
        starts = [0, *starts]
    ends = [*starts[1:], len(whole)]
    return _as_test_split([{"page": whole[start:end]} for start, end in zip(starts, ends, strict=True)])


READERS: dict[str, Callable[..., DatasetDict]] = {
    "hellaswag": hellaswag,
    "lambada_openai": lambada_openai,
    "wikitext": wikitext,
}
"""Keyed by lm-eval's task name."""
ALIASES = {"lambada": "lambada_openai", "wikitext2": "wikitext"}


def _items(
    path: str,
    rows: Iterable[dict[str, Any]],
    title: str,
    needed: Mapping[str, Callable[[Any], bool]],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    items = []
    for number, row in enumerate(rows, start=1):
        wrong = [key for key, is_right in needed.items() if not is_right(row.get(key))]
        if wrong:
            lacking = " and no ".join(f"'{key}'" for key in wrong)
            raise UnnormError(
                f"'{path}' is not a {title} file: item {number} has no {lacking} of the right kind. It has: "
                f"{', '.join(row)}. Needed: {', '.join(needed)}."
            )
        items.append(prepare(row))
    if not items:
        raise UnnormError(f"'{path}' is empty: there is no {title} item in it.")
    return items


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_label(value: Any) -> bool:
    return isinstance(value, int | str)


def _hellaswag_item(row: dict[str, Any]) -> dict[str, Any]:
    endings = list(row["endings"])
    try:
        label = int(row["label"])
    except ValueError as error:
        raise UnnormError(
            f"A HellaSwag item has label '{row['label']}', which is not a number: '{row['ctx'][:60]}'. The test split "
            "has no labels; use the validation split."
        ) from error
    if not 0 <= label < len(endings):
        raise UnnormError(f"A HellaSwag item has label {label}, but {len(endings)} endings: '{row['ctx'][:60]}'.")
    if not all(isinstance(row.get(key), str) for key in ("activity_label", "ctx_a", "ctx_b")):
        return {"query": row["ctx"], "endings": endings, "label": label}
    from lm_eval.tasks.hellaswag.utils import preprocess

    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"query": preprocess(query), "endings": [preprocess(ending) for ending in endings], "label": label}


def _split_text(row: dict[str, Any]) -> dict[str, Any]:
    """Split LAMBADA's `text` into context and last word; other rows are returned unchanged."""
    if "context" in row or not isinstance(row.get("text"), str):
        return row
    context, _, word = row["text"].rstrip().rpartition(" ")
    return {"context": context, "continuation": word}


def _as_test_split(rows: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict(test=Dataset.from_list(rows))
