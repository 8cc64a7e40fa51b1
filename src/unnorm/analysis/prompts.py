"""Pairs of prompts to patch between: indirect-object identification generated for a tokenizer, or read from a file.

Indirect-object identification (Wang et al. 2022, arXiv 2211.00593): the right continuation of "When Anna and Mark sat
down, Mark gave the book to" is the name that was not repeated. The corrupted prompt repeats the other name, so that the
other answer is right. Names are single tokens, so both prompts differ in one token only. The answer is the first of the
two names in some prompts and the second in others, so that no preference for one place is right everywhere. For a
tokenizer that splits people's names, such as one trained on code, the same task is posed with the arguments of a
function.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unnorm.errors import UnnormError, short

FIELDS = ("clean", "corrupted", "answer", "wrong_answer")
LEAST_NAMES = 4

_PEOPLE = (
    "Anna Mark Laura Peter Emma Paul Sarah David Julia Simon Alice Martin Maria Thomas Helen Daniel Rose Jack "
    "Kate Robert Lucy Henry Grace George Ruth Charles Jane Frank Mary John Anne James Susan Richard Lisa Michael "
    "Amy William Nancy Kevin Karen Brian Linda Steven Rachel Edward Diana Adam Sophie Max Clara Tom Bob Sam Ben "
    "Dan"
)
_PROSE = (
    "When {A} and {B} sat down in the garden, {S} handed the letter to",
    "After {A} and {B} came back from the market, {S} gave the basket to",
    "While {A} and {B} were waiting for the train, {S} passed the ticket to",
    "Then {A} and {B} had a long talk. In the end {S} sold the old boat to",
    "Once {A} and {B} had cleaned the kitchen, {S} offered the last apple to",
    "Yesterday {A} and {B} met at the library, and {S} lent the book to",
)
_ARGUMENTS = (
    "key value name path data text index size start end list result item func line code type count offset width "
    "height first last left right other source target parent child node state error message args dict string "
    "number length prefix suffix mode flags host port user group year month day x y a b"
)
_CODE = (
    "def update(self, {A}, {B}):\n    self.set({S},",
    "def call(self, {A}, {B}):\n    return self.run({S},",
    "def copy(self, {A}, {B}):\n    if self.find({S},",
    "def __init__(self, {A}, {B}):\n        super().__init__({S},",
    "def check(self, {A}, {B}):\n    assert self.compare({S},",
)


@dataclass(frozen=True)
class PromptPair:
    """Two prompts with the same number of tokens, and their answers.

    Attributes:
        clean: the prompt that `answer` follows.
        corrupted: the prompt that `wrong_answer` follows.
        answer: answer to `clean`, including the leading space if there is one.
        wrong_answer: answer to `corrupted`, likewise.
    """

    clean: str
    corrupted: str
    answer: str
    wrong_answer: str


def indirect_object_prompts(tokenizer: PreTrainedTokenizerBase, count: int = 64, seed: int = 0) -> list[PromptPair]:
    """Prompts with single-token names: people's if enough of those are single tokens, otherwise function arguments.

    Raises:
        UnnormError: the tokenizer has too few such names of either kind.
    """
    draw = random.Random(seed)
    for words, templates, before in ((_PEOPLE, _PROSE, "and"), (_ARGUMENTS, _CODE, "(self,")):
        names = [word for word in words.split() if one_token(tokenizer, before, word)]
        if len(names) >= LEAST_NAMES:
            pairs = (
                _pair(draw.choice(templates), draw.sample(names, 2), draw.choice((False, True)))
                for _ in range(10 * count)
            )
            alike = list(dict.fromkeys(pair for pair in pairs if problem_with(pair, tokenizer) is None))
            if alike:
                return alike[:count]
    raise UnnormError(
        f"Too few people's names and argument names are single tokens of this tokenizer (at least {LEAST_NAMES} of "
        "either are needed), so no prompts can be generated. Give your own with --prompts FILE."
    )


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[PromptPair]:
    """Prompts from a JSONL file with the fields `clean`, `corrupted`, `answer` and `wrong_answer`.

    Raises:
        UnnormError: the file can't be read or is empty, or a line has other fields, prompts of different lengths or of
            more than `longest` tokens, or answers that merge with the prompt or start with the same token.
    """
    try:
        # Not splitlines(), which also splits at characters that may occur inside JSON strings.
        lines = {n: line for n, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1) if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UnnormError(f"Could not read the prompts in '{path}': {short(error)}. Give a JSONL file.") from error
    if not lines:
        raise UnnormError(f"'{path}' is empty: there are no prompts in it. {_FORM}")
    pairs = {number: _parsed(path, number, line) for number, line in lines.items()}
    for number, pair in pairs.items():
        problem = problem_with(pair, tokenizer)
        length = len(tokenizer(pair.clean, verbose=False)["input_ids"])
        if problem is None and length > longest:
            problem = f"its prompts have {length} tokens, but the model takes {longest}"
        if problem:
            raise UnnormError(f"Line {number} of '{path}' can't be used: {problem}. {_FORM}")
    return list(pairs.values())


def one_token(tokenizer: PreTrainedTokenizerBase, before: str, word: str) -> bool:
    """Whether a word after a space is one token and does not change the tokens before it."""
    start, both = (tokenizer(text, verbose=False)["input_ids"] for text in (before, f"{before} {word}"))
    return both[: len(start)] == start and len(both) == len(start) + 1 and both[-1] != tokenizer.unk_token_id


def answer_token(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> int | None:
    """First token of an answer after a prompt; None if the answer changes how the prompt is tokenized."""
    start, both = (tokenizer(text, verbose=False)["input_ids"] for text in (prompt, prompt + answer))
    return int(both[len(start)]) if len(both) > len(start) and both[: len(start)] == start else None


def by_length(
    pairs: Iterable[PromptPair], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[list[int]], list[list[int]]]]:
    """Pairs grouped by length, so that nothing is padded: their indices and the ids of both prompts."""
    groups: dict[int, tuple[list[int], list[list[int]], list[list[int]]]] = {}
    for number, pair in enumerate(pairs):
        clean, corrupted = (tokenizer(text, verbose=False)["input_ids"] for text in (pair.clean, pair.corrupted))
        of_length = groups.setdefault(len(clean), ([], [], []))
        of_length[0].append(number)
        of_length[1].append(clean)
        of_length[2].append(corrupted)
    return [groups[length] for length in sorted(groups)]


_FORM = (
    'Each line is an object such as {"clean": "When Anna and Mark sat down, Mark gave it to", "corrupted": '
    '"When Anna and Mark sat down, Anna gave it to", "answer": " Anna", "wrong_answer": " Mark"}, both prompts '
    "equally long in tokens."
)


def _pair(template: str, names: list[str], answer_first: bool) -> PromptPair:
    first, second = names
    answer, other = names if answer_first else reversed(names)

    def say(again: str) -> str:
        return template.format(A=first, B=second, S=again)

    return PromptPair(say(other), say(answer), f" {answer}", f" {other}")


def _parsed(path: Path, number: int, line: str) -> PromptPair:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UnnormError(f"Line {number} of '{path}' is not JSON ({short(error)}). {_FORM}") from error
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) and values[name] for name in FIELDS):
        found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise UnnormError(
            f"Line {number} of '{path}' lacks some of the fields {', '.join(FIELDS)} as text; it has: {found}. {_FORM}"
        )
    return PromptPair(*(values[name] for name in FIELDS))


def problem_with(pair: PromptPair, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a pair can't be used for patching; None if it can."""
    clean, corrupted = (tokenizer(text, verbose=False)["input_ids"] for text in (pair.clean, pair.corrupted))
    if len(clean) != len(corrupted):
        return f"'clean' has {len(clean)} tokens and 'corrupted' {len(corrupted)}"
    prompts, both = (pair.clean, pair.corrupted), (pair.answer, pair.wrong_answer)
    answers = [answer_token(tokenizer, prompt, answer) for prompt in prompts for answer in both]
    if None in answers:
        return "an answer merges with the prompt in one token"
    if answers[0] == answers[1]:
        return f"both answers begin with the same token ({pair.answer!r}, {pair.wrong_answer!r})"
    return None if answers[:2] == answers[2:] else "the answers' tokens differ after 'clean' and 'corrupted'"
