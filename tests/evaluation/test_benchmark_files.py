"""Items of benchmarks from files in the forms in which they are found."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from unnorm.errors import UnnormError
from unnorm.evaluation.benchmarks import hellaswag, lambada_openai, wikitext


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hella(label: int | str) -> dict[str, Any]:
    return {"ctx": f"context {label}", "endings": ["a", "b"], "label": label}


def test_a_text_file_of_lambada_has_an_item_in_each_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three \n\nfour five\n")
    items = [{"context": "one two", "continuation": "three"}, {"context": "four", "continuation": "five"}]
    assert list(lambada_openai(str(tmp_path / "a.txt"))["test"]) == items


def test_a_line_in_lambadas_json_is_no_item(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "He said:\nOne two"}])
    assert list(lambada_openai(path)["test"]) == [{"context": "He said:\nOne", "continuation": "two"}]


def test_an_unlabelled_split_of_hellaswag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnnormError, match=r"has label '', which is not a number: 'context '.*validation split"):
        hellaswag(write_rows(tmp_path / "a.jsonl", [hella("")]))


def test_of_a_directory_only_the_split_that_is_measured_on_is_read(tmp_path: Path) -> None:
    for name, rows in (("train", [hella(0)]), ("validation", [hella(1), hella("0")]), ("test", [hella("")])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    assert [row["label"] for row in hellaswag(str(tmp_path))["test"]] == [1, 0]
    (tmp_path / "train.jsonl").unlink()  # As benchmarks often come.
    assert [row["label"] for row in hellaswag(str(tmp_path))["test"]] == [1, 0]
    for name in ("validation", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} set"}])
    assert [row["context"] for row in lambada_openai(str(tmp_path))["test"]] == ["test"]
    assert [row["page"] for row in wikitext(str(tmp_path))["test"]] == ["test set"]


def test_articles_of_wikitext_in_lines_without_their_ends(tmp_path: Path) -> None:
    lines = ["the end of one", " = First = ", "", " = = Part = = ", "some text", " = Second = ", "more"]
    pages = ["the end of one\n", " = First = \n\n = = Part = = \nsome text\n", " = Second = \nmore"]
    source = write_rows(tmp_path / "lines.jsonl", [{"text": line} for line in lines])
    assert [row["page"] for row in wikitext(source)["test"]] == pages


def test_articles_of_wikitext_are_found_by_their_titles_or_come_one_by_one(tmp_path: Path) -> None:
    pages = [" = First = \n\n = = Part = = \n\n text \n", " = Second = \n\n text \n"]
    (tmp_path / "a.txt").write_text("".join(pages))
    lines = write_rows(tmp_path / "lines.jsonl", [{"text": line + "\n"} for line in "".join(pages).split("\n")[:-1]])
    whole = write_rows(tmp_path / "pages.jsonl", [{"page": page} for page in pages])
    for source in (str(tmp_path / "a.txt"), lines, whole):
        assert [row["page"] for row in wikitext(source)["test"]] == pages
    with pytest.raises(UnnormError, match=r"no field 'text' or 'page'\. It has: content"):
        wikitext(write_rows(tmp_path / "other.jsonl", [{"content": page} for page in pages]))


def test_raw_items_of_hellaswag_are_prepared_as_lm_eval_does(tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    row: dict[str, Any] = {
        "activity_label": "Sitting",
        "ctx_a": "A man sits.",
        "ctx_b": "he [title] then",
        "label": "1",
    }
    row |= {"ctx": "A man sits. he [title] then", "endings": ["stands  up [step] slowly.", "sits."]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = hellaswag(str(tmp_path / "a.jsonl"))["test"]
    (expected,) = utils.process_docs(Dataset.from_list([row]))
    assert found == {"query": expected["query"], "endings": expected["choices"], "label": expected["gold"]}


WRONG: dict[str, dict[str, Any]] = {
    "endings": {"endings": ["b", None]},
    "endings, numbers": {"endings": [1, 2]},
    "endings, empty": {"endings": ["", " "]},
    "ctx": {"ctx": ""},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_item_of_hellaswag_with_a_field_of_another_kind_is_named(wrong: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [hella(0), hella(1) | WRONG[wrong]])
    with pytest.raises(UnnormError, match=rf"item 2 has no '{wrong.partition(',')[0]}' of the right kind"):
        hellaswag(path)


def test_raw_items_of_hellaswag_without_a_second_part_are_taken_as_they_are(tmp_path: Path) -> None:
    row = hella(1) | {"activity_label": "Sitting", "ctx_a": "context", "ctx_b": None}
    assert hellaswag(write_rows(tmp_path / "a.jsonl", [row]))["test"]["query"][0] == "context 1"


@pytest.mark.parametrize("row", [{"text": "word"}, {"context": "a", "continuation": ""}])
def test_an_item_of_lambada_needs_a_context_and_a_word(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnnormError, match="item 1 has no 'cont"):
        lambada_openai(write_rows(tmp_path / "a.jsonl", [row]))


def test_what_else_is_in_a_file_of_lambada_does_not_matter(tmp_path: Path) -> None:
    rows = [{"context": "a b", "continuation": "c", "id": index} for index in (1, "x")]
    assert list(lambada_openai(write_rows(tmp_path / "a.jsonl", rows))["test"]) == 2 * [
        {"context": "a b", "continuation": "c"}
    ]
