"""Generated prompts, and prompts of one's own."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.analysis.models import PAIRS
from tests.conftest import Cli
from unnorm.analysis.prompts import indirect_object_prompts, read_prompts
from unnorm.errors import UnnormError
from unnorm.models.load import load_original


def words(*more: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows whole words."""
    known = ["?", *dict.fromkeys(more)]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def test_prompts_have_names_of_one_token_and_equal_lengths() -> None:
    tokenizer = load_original("demo")[1]
    pairs = indirect_object_prompts(tokenizer, 40)
    assert len(pairs) == len(set(pairs)) == 40
    assert pairs == indirect_object_prompts(tokenizer, 40) != indirect_object_prompts(tokenizer, 40, seed=1)
    for pair in pairs:
        assert pair.clean.startswith("def ")  # people's names are no tokens of the bundled model's
        clean, corrupted = (tokenizer(text).input_ids for text in (pair.clean, pair.corrupted))
        assert sum(a != b for a, b in zip(clean, corrupted, strict=True)) == 1
        for prompt in (pair.clean, pair.corrupted):
            for answer in (pair.answer, pair.wrong_answer):
                start, both = tokenizer(prompt).input_ids, tokenizer(prompt + answer).input_ids
                assert both[:-1] == start
        said = re.findall(r"\w+", pair.clean)
        assert said.count(pair.answer.strip()) == 1 and said.count(pair.wrong_answer.strip()) == 2


def test_the_answer_is_first_in_some_prompts_and_second_in_others() -> None:
    people = words("and", "Anna", "Mark", "Laura", "Peter", "Rose")
    pairs = indirect_object_prompts(people, 40)
    first = sum(pair.clean.index(pair.answer) < pair.clean.index(pair.wrong_answer) for pair in pairs)
    assert 8 < first < len(pairs) - 8
    assert all(people.vocab.keys() >= {pair.answer.strip(), pair.wrong_answer.strip()} for pair in pairs)


def test_prompts_have_people_where_the_tokenizer_knows_them() -> None:
    pairs = indirect_object_prompts(words("and", "Anna", "Mark", "Laura", "Peter", "Rose"), 10)
    assert all(pair.answer.strip() in ("Anna", "Mark", "Laura", "Peter", "Rose") for pair in pairs)
    with pytest.raises(UnnormError, match="no prompts can be generated"):
        indirect_object_prompts(words("and", "Anna", "Mark", "Laura"), 10)


BAD_PROMPTS = {
    "fields": ('{"clean": "a", "corrupt": "b"}', "lacks some of the fields clean, corrupted, answer, wrong_answer"),
    "json": ("\n\na, b", "Line 3 of"),
    "list": ('["a"]', "lacks some of the fields"),
    "empty": ("\n", "is empty"),
    "lengths": (
        '{"clean": "a b c", "corrupted": "a b", "answer": " x", "wrong_answer": " y"}',
        "'clean' has",
    ),
    "answers": (
        '{"clean": "k a c", "corrupted": "k a i", "answer": " x", "wrong_answer": " x"}',
        "both answers begin with the same token",
    ),
}


@pytest.mark.parametrize("wrong", BAD_PROMPTS)
def test_bad_prompts_are_refused(wrong: str, finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    text, message = BAD_PROMPTS[wrong]
    (tmp_path / "prompts.jsonl").write_text(text)
    done = cli("analyze", finished_run, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out")
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_what_only_python_takes_for_the_end_of_a_line_may_be_in_a_prompt(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pair = replace(PAIRS[0], clean=f"\u2028{PAIRS[0].clean}", corrupted=f"\u2028{PAIRS[0].corrupted}")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(asdict(pair), ensure_ascii=False), encoding="utf-8")
    assert read_prompts(path, tiny_tokenizer, 64) == [pair]


def test_prompts_that_are_too_long_are_named(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    long = replace(PAIRS[0], clean=40 * "a, " + PAIRS[0].clean, corrupted=40 * "a, " + PAIRS[0].corrupted)
    lines = [json.dumps(asdict(pair)) for pair in (PAIRS[0], long)]
    (tmp_path / "prompts.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    done = cli("analyze", finished_run, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out")
    assert done.code == 2 and "Line 2 of" in done.err and "but the model takes 64" in done.err
    assert not (tmp_path / "out").exists()
