"""Classes of inputs unlike the training text, on which a model without norms may blow up."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unnorm.models.tokenizer import token_ids

IGNORED = -100
"""Target of a position that is not measured, as in cross_entropy."""

_PREFIX = 15
_LITERAL_STRIDE = 32
_MOST_ENDS = 4
_SHORTEST_DOCUMENT, _LONGEST_DOCUMENT = 4, 64

_CODE = """
#include <stdio.h>
static int gcd(int a, int b) { while (b) { int t = a % b; a = b; b = t; } return a; }
int main(int argc, char **argv) { printf("%d\\n", gcd(0x2A, 56)); return argc > 1 ? -1 : 0; }
const load = async (url) => { const r = await fetch(url); return (await r.json())?.items ?? []; };
fn main() { let v: Vec<u64> = (1..=10).filter(|n| n & 1 == 0).map(|n| n.pow(2)).collect(); println!("{v:?}"); }
SELECT u.id, COUNT(*) AS n FROM users u LEFT JOIN orders o ON o.user_id = u.id GROUP BY u.id HAVING COUNT(*) > 3;
<div class="row"><a href="/a?b=1&amp;c=2">x</a><!-- note --></div>
{"name": "x", "values": [1, 2.5e-3, null, true], "nested": {"key": "\\u00e9"}}
for f in *.txt; do grep -E '^[a-z]+$' "$f" | sort -u >> out && echo "$?"; done
quicksort (p:xs) = quicksort [x | x <- xs, x < p] ++ [p] ++ quicksort [x | x <- xs, x >= p]
"""
_SCRIPTS = (
    "Съешь же ещё этих мягких французских булок, да выпей чаю. "
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. "
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。"  # noqa: RUF001
    "いろはにほへと ちりぬるを わかよたれそ つねならむ。"
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. "
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. "
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה. "
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। "
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า "
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń. "
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∮E·da = Q, α∧¬β ⇒ γ. 😀👩‍👩‍👧🏳️‍🌈🇳🇴 "  # noqa: RUF001
)
_WHITE_SPACE = (" ", "  ", "    ", " " * 16, "\n", "\n\n", "\t", "\r\n", " \n", "\u00a0", "\u3000")


@dataclass(frozen=True)
class Inputs:
    """Sequences of one length, and the positions measured in them.

    Attributes:
        ids: token ids.
        targets: the token whose loss is measured at each position, or -100 where nothing is measured.
        attention_mask: 0 at padding; None without padding.
        position_ids: position of each token; None where it is the token's index.
    """

    ids: Int[Tensor, "sequence position"]
    targets: Int[Tensor, "sequence position"]
    attention_mask: Int[Tensor, "sequence position"] | None = None
    position_ids: Int[Tensor, "sequence position"] | None = None

    @property
    def read(self) -> Bool[Tensor, "sequence position"]:
        """Mask of the positions that are measured."""
        return self.targets != IGNORED

    def take(self, rows: slice | Int[Tensor, " row"]) -> "Inputs":
        """A subset of the sequences."""
        mask, positions = self.attention_mask, self.position_ids
        return Inputs(
            self.ids[rows],
            self.targets[rows],
            None if mask is None else mask[rows],
            None if positions is None else positions[rows],
        )


@dataclass(frozen=True)
class InputClass:
    """One kind of input: its name, a description with its amount, and the sequences."""

    name: str
    what: str
    inputs: tuple[Inputs, ...]


@dataclass(frozen=True)
class Material:
    """What inputs are made from. Those made from text start with `begin`, if the tokenizer starts texts with it."""

    tokenizer: PreTrainedTokenizerBase
    text: Int[Tensor, " token"]
    vocabulary: int
    context: int
    trained: int | None
    tokens: int
    random: torch.Generator
    begin: int | None = None

    @property
    def rows(self) -> int:
        """Number of full-length sequences per class."""
        return max(1, self.tokens // self.context)

    @property
    def end(self) -> int | None:
        """The end-of-text token, otherwise the beginning-of-text token, or None."""
        ids = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        return next((int(i) for i in ids if isinstance(i, int)), None)

    def below(self, most: int, *shape: int) -> Int[Tensor, "..."]:
        """Random integers from 0 to most - 1."""
        return torch.randint(most, shape, generator=self.random)


def input_classes(material: Material, positions: bool) -> Iterator[InputClass]:
    """Generate every class lazily; `positions` says whether the models take `position_ids`."""
    yield _text(material)
    yield _alone(material)
    yield _repeated(material)
    yield _after_text(material)
    yield _random_tokens(material)
    yield from _strings(material, "byte noise", "random bytes, each a Latin-1 character", _byte_noise(material))
    yield from _strings(material, "code", "ten languages and formats", _CODE)
    yield from _strings(material, "other scripts", "eleven writing systems, symbols, emoji", _SCRIPTS)
    yield from _strings(material, "digits", "random numbers of 1 to 40 digits", _digits(material))
    yield from _strings(material, "white space", "random blanks, tabs and line ends", _white_space(material))
    if material.end is not None:
        yield _end_first(material)
        yield _end_inside(material)
        yield _packed(material)
    yield _lengths(material)
    yield _left_padded(material, positions)
    if material.trained is not None and material.trained < material.context:
        yield _late_positions(material)


def _text(m: Material) -> InputClass:
    inputs = _windows(m, m.text, m.rows)
    return InputClass("ordinary text", f"{len(inputs.ids):,} blocks of held-out text", (inputs,))


def _alone(m: Material) -> InputClass:
    ids = torch.arange(m.vocabulary)[:, None]
    inputs = Inputs(ids, _draw(m, m.vocabulary)[:, None])
    return InputClass("token alone", f"all {m.vocabulary:,} tokens; a drawn token of the text comes next", (inputs,))


def _repeated(m: Material) -> InputClass:
    tokens = _sample(m, m.rows)
    ids = tokens[:, None].expand(-1, m.context).contiguous()
    what = f"{_of(m, tokens)} tokens, {m.context:,} times each"
    return InputClass("token repeated", what, (Inputs(ids, ids.clone()),))


def _after_text(m: Material) -> InputClass:
    prefix = min(_PREFIX, m.context - 1)
    tokens = _sample(m, m.tokens)
    starts = m.below(max(1, len(m.text) - prefix), len(tokens))
    before = _begun(m, m.text[(starts[:, None] + torch.arange(prefix)) % len(m.text)])
    ids = torch.cat([before, tokens[:, None]], dim=1)
    targets = torch.full_like(ids, IGNORED)
    targets[:, -1] = _draw(m, len(tokens))
    return InputClass("token after text", f"{_of(m, tokens)} tokens, {prefix} of text before", (Inputs(ids, targets),))


def _random_tokens(m: Material) -> InputClass:
    rows = m.below(m.vocabulary, m.rows, m.context + 1)
    return InputClass("random tokens", f"{m.rows:,} sequences, every token as likely", (_shifted(rows),))


def _strings(m: Material, name: str, what: str, text: str) -> Iterator[InputClass]:
    """One class, or none if the tokenizer drops such text or fails on it."""
    stream = torch.tensor(token_ids(text, m.tokenizer), dtype=torch.long)
    if len(stream):
        inputs = _windows(m, stream, m.rows)
        yield InputClass(name, f"{what}; {len(inputs.ids):,} windows", (inputs,))


def _end_first(m: Material) -> InputClass:
    rows = _rows(m, m.text, m.rows)
    for index, row in enumerate(rows):
        row[: min(1 + index % _MOST_ENDS, m.context)] = _end(m)
    return InputClass("end-of-text first", f"1 to {_MOST_ENDS} of them, then text", (_shifted(rows),))


def _end_inside(m: Material) -> InputClass:
    rows = _rows(m, m.text, m.rows)
    for index, (row, start) in enumerate(zip(rows, m.below(m.context, len(rows)).tolist(), strict=True)):
        row[start : start + 1 + index % _MOST_ENDS] = _end(m)
    return InputClass("end-of-text inside", f"1 to {_MOST_ENDS} of them amid text", (_shifted(rows),))


def _packed(m: Material) -> InputClass:
    parts, total = [], 0
    while total < m.rows * m.context + 1:
        length = int(m.below(_LONGEST_DOCUMENT - _SHORTEST_DOCUMENT + 1, 1)) + _SHORTEST_DOCUMENT
        start = int(m.below(max(1, len(m.text) - length), 1))
        parts += [m.text[start : start + length], torch.tensor([_end(m)])]
        total += len(parts[-2]) + 1
    what = f"pieces of {_SHORTEST_DOCUMENT} to {_LONGEST_DOCUMENT} tokens, end-of-text between"
    return InputClass("packed documents", what, (_windows(m, torch.cat(parts), m.rows),))


def _lengths(m: Material) -> InputClass:
    most = max(2, min(m.context, 2 * m.tokens // m.context))
    lengths = sorted({round(x) for x in np.linspace(1, m.context, most)})
    starts = m.below(len(m.text), len(lengths)).tolist()
    places = [(start + torch.arange(length + 1)) % len(m.text) for start, length in zip(starts, lengths, strict=True)]
    parts = tuple(_shifted(_begun(m, m.text[place][None])) for place in places)
    return InputClass("lengths", f"{len(lengths):,} texts of 1 to {m.context:,} tokens", parts)


def _left_padded(m: Material, positions: bool) -> InputClass:
    """Left padding as in `generate`: positions count from the first real token and are 0 before it."""
    inputs = _windows(m, m.text, m.rows)
    padding = m.below(m.context, len(inputs.ids))
    mask = (torch.arange(m.context) >= padding[:, None]).long()
    pad = m.tokenizer.pad_token_id
    if pad is None or pad >= m.vocabulary:
        pad = m.end or 0
    ids, targets = inputs.ids.masked_fill(mask == 0, pad), inputs.targets.masked_fill(mask == 0, IGNORED)
    if m.begin is not None:
        ids.scatter_(1, padding[:, None], m.begin)
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0) if positions else None
    what = f"{len(ids):,} blocks of text, 0 to {m.context - 1:,} pads before"
    return InputClass("left padding", what, (Inputs(ids, targets, mask, position_ids),))


def _late_positions(m: Material) -> InputClass:
    assert m.trained is not None
    # Of few late positions, fewer tokens are measured: each window also runs all earlier positions.
    inputs = _windows(m, m.text, max(1, min(m.tokens // (m.context - m.trained), 2 * m.rows)))
    inputs.targets[:, : m.trained] = IGNORED
    what = f"text at positions {m.trained:,} to {m.context - 1:,}: training had {m.trained:,}"
    return InputClass("late positions", what, (inputs,))


def _byte_noise(m: Material) -> str:
    return bytes(m.below(256, m.rows * m.context).tolist()).decode("latin-1")


def _digits(m: Material) -> str:
    digits = "".join(map(str, m.below(10, m.rows * m.context).tolist()))
    cuts = (1 + m.below(40, len(digits))).cumsum(0).tolist()
    return " ".join(digits[a:b] for a, b in zip([0, *cuts], cuts, strict=False) if a < len(digits))


def _white_space(m: Material) -> str:
    return "".join(_WHITE_SPACE[i] for i in m.below(len(_WHITE_SPACE), m.rows * m.context).tolist())


def _end(m: Material) -> int:
    assert m.end is not None
    return m.end


def _draw(m: Material, count: int) -> Int[Tensor, " token"]:
    """Tokens drawn at their frequency in ordinary text."""
    return m.text[m.below(len(m.text), count)]


def _sample(m: Material, count: int) -> Int[Tensor, " token"]:
    """`count` different tokens, end-of-text first; the whole vocabulary in order if it is no larger."""
    if count >= m.vocabulary:
        return torch.arange(m.vocabulary)
    order = torch.randperm(m.vocabulary, generator=m.random)
    first = [] if m.end is None else [m.end]
    return torch.cat([torch.tensor(first, dtype=torch.long), order[order != (-1 if m.end is None else m.end)]])[:count]


def _of(m: Material, tokens: Tensor) -> str:
    return f"all {m.vocabulary:,}" if len(tokens) == m.vocabulary else f"{len(tokens):,} of {m.vocabulary:,}"


def _rows(m: Material, stream: Int[Tensor, " token"], count: int) -> Int[Tensor, "sequence position"]:
    """Evenly spaced windows of context + 1 tokens; a short stream wraps around and gives fewer."""
    count = min(count, max(1, len(stream) // _LITERAL_STRIDE))
    starts = torch.arange(count) * len(stream) // count
    return _begun(m, stream[(starts[:, None] + torch.arange(m.context + 1)) % len(stream)])


def _begun(m: Material, rows: Int[Tensor, "sequence position"]) -> Int[Tensor, "sequence position"]:
    if m.begin is not None:
        rows[:, :1] = m.begin
    return rows


def _windows(m: Material, stream: Int[Tensor, " token"], count: int) -> Inputs:
    return _shifted(_rows(m, stream, count))


def _shifted(rows: Int[Tensor, "sequence position"]) -> Inputs:
    """Inputs whose targets are the next tokens."""
    return Inputs(rows[:, :-1].contiguous(), rows[:, 1:].clone())
