"""Worst-case audit: inputs unlike the training text, on which a model without norms may blow up."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.calibrate import evaluating
from unnorm.checkpoint import load_sites
from unnorm.config import CONFIG_FILE, choose_context, choose_device, run_settings
from unnorm.data import STDLIB, build_blocks
from unnorm.errors import UnnormError
from unnorm.models import context_length, load_original
from unnorm.sites import NormSite, vocabulary_size

AUDIT_TOKENS = 32_768
"""Tokens of one class. Classes that go through the vocabulary take it whole where it is no longer than this."""
MOST_AUDIT_CONTEXT = 4096
"""Longest sequences by default: logits of more positions at once fill the memory."""
HALF_CPU_TOKENS = 1024
"""Tokens of a class in float16 on a CPU, ten times slower there than float32: those with the largest residuals."""
LOSS_MARGIN = 1.1
"""The 99.99th percentile of the twin's loss may be this many times the reference's."""
BLOW_UP = 2.0
"""So may its largest loss: in many tokens one bad one is beyond every percentile."""
PERCENTILES = (99.9, 99.99)

_IGNORED = -100  # Target of a position that is not measured, as in cross_entropy.
_LOGITS_AT_ONCE = 2**24
_PREFIX = 15
_LITERAL_STRIDE = 32
_WORST, _SHOWN_TOKENS = 3, 12
_MOST_ENDS = 4
_SHORTEST_DOCUMENT, _LONGEST_DOCUMENT = 4, 64

Watch = Callable[[dict[str, Any]], None]

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
    """Sequences of one length, and what is measured on them.

    Attributes:
        ids: token ids.
        targets: the token whose loss is measured at each position, or -100 where nothing is measured.
        attention_mask: 0 at padding; None where there is none.
        position_ids: position of each token, where it is not its index.
    """

    ids: Int[Tensor, "sequence position"]
    targets: Int[Tensor, "sequence position"]
    attention_mask: Int[Tensor, "sequence position"] | None = None
    position_ids: Int[Tensor, "sequence position"] | None = None

    @property
    def read(self) -> Bool[Tensor, "sequence position"]:
        """Positions that are measured."""
        return self.targets != _IGNORED

    def take(self, rows: slice | Int[Tensor, " row"]) -> "Inputs":
        """Some of the sequences."""
        mask, positions = self.attention_mask, self.position_ids
        return Inputs(
            self.ids[rows],
            self.targets[rows],
            None if mask is None else mask[rows],
            None if positions is None else positions[rows],
        )


@dataclass(frozen=True)
class InputClass:
    """One kind of input: its name, what it is in words with how much of it there is, and the sequences."""

    name: str
    what: str
    inputs: tuple[Inputs, ...]


@dataclass(frozen=True)
class Measured:
    """A model on one class, read position by read position, on the CPU in float64; NaN counts as infinite.

    Attributes:
        loss: nats.
        norm: L2 norm of the residual vector that the final norm site reads, or read.
        finite: whether every logit and every residual was.
    """

    loss: Float[Tensor, " read"]
    norm: Float[Tensor, " read"]
    finite: bool


@dataclass(frozen=True)
class _Material:
    """What inputs are made of."""

    tokenizer: PreTrainedTokenizerBase
    text: Int[Tensor, " token"]
    vocabulary: int
    context: int
    trained: int | None
    tokens: int
    random: torch.Generator

    @property
    def rows(self) -> int:
        """Sequences of full length in one class."""
        return max(1, self.tokens // self.context)

    @property
    def end(self) -> int | None:
        """End-of-text, or what the tokenizer has in its place."""
        ids = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        return next((int(i) for i in ids if isinstance(i, int)), None)

    def below(self, most: int, *shape: int) -> Int[Tensor, "..."]:
        """Random integers from 0 to most - 1."""
        return torch.randint(most, shape, generator=self.random)


def audit(
    directory: str | Path,
    against: str | None = None,
    *,
    tokens: int = AUDIT_TOKENS,
    context: int | None = None,
    data: str | None = None,
    text_field: str | None = None,
    split: str | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Measure an LN-free model on inputs that may blow it up, beside a model with norms; `unnorm audit`.

    A class passes where the twin's 99.99th percentile of per-token loss is at most 1.1 times, and its largest loss
    at most twice, the reference's on the same tokens, and where no logit and no residual is NaN or infinite in
    float32, bfloat16 and float16 (float16 only where the reference's are finite).

    Args:
        directory: a finished run.
        against: the reference; by default the run's control if it saved one, else its original.
        tokens: tokens of each class; a whole vocabulary is gone through only if it is no longer.
        context: tokens in the longest sequences; by default all that both models take, at most 4096.
        data: ordinary text, of which the held-out part is used; by default the run's.
        text_field: column that holds the text; by default the run's.
        split: split that the text comes from; by default the run's.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: of everything random.
        trust_remote_code: run modeling code that comes with the reference.
        watch: called with `{"kind": "phase", "text": …}` as the audit goes on.

    Returns:
        `passed`, what was compared, and in `classes` one entry each: `passed` with its `reason`; `loss` in nats and
        `residual_norm`, each with its percentiles and `largest` (None where infinite); the same of the reference;
        `finite` by dtype; and the `worst` inputs decoded, those with the largest excess over the reference's loss.

    Raises:
        UnnormError: there is no finished run, or the reference or the text can't be used.
    """
    directory = Path(directory).expanduser()
    say: Watch = watch or (lambda _: None)
    if tokens < 1:
        raise UnnormError(f"--tokens {tokens}: a class takes 1 token at least.")
    place = choose_device(device)
    sites, _ = load_sites(directory)
    settings = run_settings(directory)
    name = against or _default_reference(directory, settings)
    twin, tokenizer = load_original(str(directory))
    reference = _load_reference(name, against is not None, trust_remote_code)
    _check_same_vocabulary(twin, reference, name)
    twin.to(place)
    reference.to(place)
    say({"kind": "phase", "text": f"audit of {directory} against {name}"})
    length = min(context_length(twin), context_length(reference), MOST_AUDIT_CONTEXT) if context is None else context
    length = choose_context(length, twin, reference)
    material = _Material(
        tokenizer=tokenizer,
        text=_ordinary_text(twin, tokenizer, length, tokens, settings, data, text_field, split),
        vocabulary=max(tokenizer.get_vocab().values()) + 1,
        context=length,
        trained=_trained_context(directory, settings),
        tokens=tokens,
        random=torch.Generator().manual_seed(seed),
    )
    classes = list(input_classes(material, _takes_positions(twin) and _takes_positions(reference)))
    rows = audit_models(twin, reference, classes, sites, tokenizer, say)
    return {
        "directory": str(directory),
        "reference": name,
        "passed": all(row["passed"] for row in rows),
        "context": length,
        "trained_context": material.trained,
        "vocabulary": material.vocabulary,
        "tokens": tokens,
        "seed": seed,
        "classes": rows,
    }


def audit_models(
    twin: PreTrainedModel,
    reference: PreTrainedModel,
    classes: Sequence[InputClass],
    sites: Sequence[NormSite],
    tokenizer: PreTrainedTokenizerBase,
    say: Watch,
) -> list[dict[str, Any]]:
    """The rows of `audit` for models in memory, both in float32 on one device."""
    measured = []
    for kind in classes:
        say({"kind": "phase", "text": f"{kind.name}: {kind.what}"})
        measured.append((measure(twin, kind.inputs, sites), measure(reference, kind.inputs, sites)))
    inputs = {torch.bfloat16: [kind.inputs for kind in classes], torch.float16: _in_float16(twin, classes, measured)}
    finite: list[tuple[dict[str, bool], ...]] = [tuple({"float32": m.finite} for m in both) for both in measured]
    for dtype, of_class in inputs.items():
        name = str(dtype).removeprefix("torch.")
        tokens = sum(int(part.read.sum()) for some in of_class for part in some)
        say({"kind": "phase", "text": f"{name}: {tokens:,} tokens of these"})
        for side, model in enumerate((twin, reference)):
            copy = deepcopy(model).to(dtype)
            for flags, some in zip(finite, of_class, strict=True):
                flags[side][name] = is_finite(copy, some, sites)
            del copy
    return [_row(*these, tokenizer) for these in zip(classes, measured, finite, inputs[torch.float16], strict=True)]


def _in_float16(
    twin: PreTrainedModel, classes: Sequence[InputClass], measured: Sequence[tuple[Measured, Measured]]
) -> list[tuple[Inputs, ...]]:
    if twin.device.type != "cpu":
        return [kind.inputs for kind in classes]
    return [
        largest_residuals(kind.inputs, [one.norm for one in both], HALF_CPU_TOKENS)
        for kind, both in zip(classes, measured, strict=True)
    ]


def _row(
    kind: InputClass,
    measured: tuple[Measured, Measured],
    finite: tuple[dict[str, bool], ...],
    in_float16: Sequence[Inputs],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    ours, theirs = measured
    reason = verdict(ours, theirs, finite[0], finite[1])
    return {
        "name": kind.name,
        "what": kind.what,
        "passed": not reason,
        "reason": reason,
        "tokens": len(ours.loss),
        "float16_tokens": sum(int(part.read.sum()) for part in in_float16),
        "loss": summarize(ours.loss),
        "reference_loss": summarize(theirs.loss),
        "residual_norm": summarize(ours.norm),
        "reference_residual_norm": summarize(theirs.norm),
        "finite": finite[0],
        "reference_finite": finite[1],
        "worst": _worst(kind.inputs, ours, theirs, tokenizer),
    }


@torch.no_grad()
def measure(model: PreTrainedModel, inputs: Sequence[Inputs], sites: Sequence[NormSite]) -> Measured:
    """Loss and residual norm at every position that is read, in the order of the inputs."""
    losses, norms, finite = [], [], True
    for logits, residual, targets in _passes(model, inputs, sites):
        losses.append(F.cross_entropy(logits.float(), targets, reduction="none").cpu().double())
        norms.append(torch.linalg.vector_norm(residual.float(), dim=-1).cpu().double())
        finite = finite and _all_finite(logits, residual)
    loss, norm = (torch.nan_to_num(torch.cat(parts), nan=math.inf, posinf=math.inf) for parts in (losses, norms))
    return Measured(loss, norm, finite)


@torch.no_grad()
def is_finite(model: PreTrainedModel, inputs: Sequence[Inputs], sites: Sequence[NormSite]) -> bool:
    """Whether the model, in the dtype that it has, gives finite logits and residuals wherever they are read."""
    return all(_all_finite(logits, residual) for logits, residual, _ in _passes(model, inputs, sites))


def summarize(values: Float[Tensor, " read"]) -> dict[str, float | None]:
    """Percentiles and the largest, each a value that was measured; None where it is infinite."""
    array = values.numpy()
    found = {f"p{q}": float(np.percentile(array, q, method="inverted_cdf")) for q in PERCENTILES}
    found["largest"] = float(array.max())
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def verdict(twin: Measured, reference: Measured, finite: dict[str, bool], reference_finite: dict[str, bool]) -> str:
    """Why the twin fails a class, or nothing."""
    judged = [name for name in finite if name != "float16" or reference_finite[name]]
    overflowed = [name for name in judged if not finite[name]]
    if overflowed:
        return f"NaN or infinite in {', '.join(overflowed)}"
    ours, theirs = summarize(twin.loss), summarize(reference.loss)
    for key, margin in (("p99.99", LOSS_MARGIN), ("largest", BLOW_UP)):
        value, limit = _or_infinite(ours[key]), margin * _or_infinite(theirs[key])
        if value > limit:
            return f"{key.replace('p99.99', '99.99%')} loss {value:.2f} > {limit:.2f}"
    return ""


def largest_residuals(
    inputs: Sequence[Inputs], norms: Sequence[Float[Tensor, " read"]], tokens: int
) -> tuple[Inputs, ...]:
    """The sequences with the largest residuals of any of the models, `tokens` tokens of them or a little more.

    What overflows in float16 is large in float32. Norms count relative to each model's median.
    """
    relative = torch.stack([norm / norm.median().clamp_min(1e-30) for norm in norms]).amax(0)
    relative = torch.nan_to_num(relative, nan=math.inf, posinf=math.inf)
    peaks = [  # By sequence: its largest norm, the part it is in, and its row there.
        (peak, part, index)
        for part, values in enumerate(_unflatten(relative, inputs))
        for index, peak in enumerate(values.amax(1).tolist())
    ]
    chosen: dict[int, list[int]] = {}
    left = tokens
    for _, part, index in sorted(peaks, reverse=True):
        if left <= 0:
            break
        chosen.setdefault(part, []).append(index)
        left -= inputs[part].ids.shape[1]
    return tuple(inputs[part].take(torch.tensor(sorted(rows))) for part, rows in sorted(chosen.items()))


def input_classes(material: _Material, positions: bool) -> Iterator[InputClass]:
    """Every class, made when its turn comes; `positions` says whether the models take `position_ids`."""
    yield _text(material)
    yield _alone(material)
    yield _repeated(material)
    yield _after_text(material)
    yield _random_tokens(material)
    yield _strings(material, "byte noise", "random bytes, each a Latin-1 character", _byte_noise(material))
    yield _strings(material, "code", "ten languages and formats", _CODE)
    yield _strings(material, "other scripts", "eleven writing systems, symbols, emoji", _SCRIPTS)
    yield _strings(material, "digits", "random numbers of 1 to 40 digits", _digits(material))
    yield _strings(material, "white space", "random blanks, tabs and line ends", _white_space(material))
    if material.end is not None:
        yield _end_first(material)
        yield _end_inside(material)
        yield _packed(material)
    yield _lengths(material)
    yield _left_padded(material, positions)
    if material.trained is not None and material.trained < material.context:
        yield _late_positions(material)


def _text(m: _Material) -> InputClass:
    inputs = _windows(m.text, m.rows, m.context)
    return InputClass("ordinary text", f"{len(inputs.ids):,} blocks of held-out text", (inputs,))


def _alone(m: _Material) -> InputClass:
    ids = torch.arange(m.vocabulary)[:, None]
    inputs = Inputs(ids, _draw(m, m.vocabulary)[:, None])
    return InputClass("token alone", f"all {m.vocabulary:,} tokens; a drawn token of the text comes next", (inputs,))


def _repeated(m: _Material) -> InputClass:
    tokens = _sample(m, m.rows)
    ids = tokens[:, None].expand(-1, m.context).contiguous()
    what = f"{_of(m, tokens)} tokens, {m.context:,} times each"
    return InputClass("token repeated", what, (Inputs(ids, ids.clone()),))


def _after_text(m: _Material) -> InputClass:
    prefix = min(_PREFIX, m.context - 1)
    tokens = _sample(m, m.vocabulary if m.vocabulary <= m.tokens else m.tokens)
    starts = m.below(max(1, len(m.text) - prefix), len(tokens))
    before = m.text[(starts[:, None] + torch.arange(prefix)) % len(m.text)]
    ids = torch.cat([before, tokens[:, None]], dim=1)
    targets = torch.full_like(ids, _IGNORED)
    targets[:, -1] = _draw(m, len(tokens))
    return InputClass("token after text", f"{_of(m, tokens)} tokens, {prefix} of text before", (Inputs(ids, targets),))


def _random_tokens(m: _Material) -> InputClass:
    rows = m.below(m.vocabulary, m.rows, m.context + 1)
    return InputClass("random tokens", f"{m.rows:,} sequences, every token as likely", (_shifted(rows),))


def _strings(m: _Material, name: str, what: str, text: str) -> InputClass:
    stream = torch.tensor(m.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    inputs = _windows(stream, m.rows, m.context)
    return InputClass(name, f"{what}; {len(inputs.ids):,} windows", (inputs,))


def _end_first(m: _Material) -> InputClass:
    rows = _rows(m.text, m.rows, m.context)
    for index, row in enumerate(rows):
        row[: min(1 + index % _MOST_ENDS, m.context)] = _end(m)
    return InputClass("end-of-text first", f"1 to {_MOST_ENDS} of them, then text", (_shifted(rows),))


def _end_inside(m: _Material) -> InputClass:
    rows = _rows(m.text, m.rows, m.context)
    for index, (row, start) in enumerate(zip(rows, m.below(m.context, len(rows)).tolist(), strict=True)):
        row[start : start + 1 + index % _MOST_ENDS] = _end(m)
    return InputClass("end-of-text inside", f"1 to {_MOST_ENDS} of them amid text", (_shifted(rows),))


def _packed(m: _Material) -> InputClass:
    parts, total = [], 0
    while total < m.rows * m.context + 1:
        length = int(m.below(_LONGEST_DOCUMENT - _SHORTEST_DOCUMENT + 1, 1)) + _SHORTEST_DOCUMENT
        start = int(m.below(max(1, len(m.text) - length), 1))
        parts += [m.text[start : start + length], torch.tensor([_end(m)])]
        total += len(parts[-2]) + 1
    what = f"pieces of {_SHORTEST_DOCUMENT} to {_LONGEST_DOCUMENT} tokens, end-of-text between"
    return InputClass("packed documents", what, (_windows(torch.cat(parts), m.rows, m.context),))


def _lengths(m: _Material) -> InputClass:
    most = max(2, min(m.context, 2 * m.tokens // m.context))
    lengths = sorted({round(x) for x in np.linspace(1, m.context, most)})
    starts = m.below(len(m.text), len(lengths)).tolist()
    places = [(start + torch.arange(length + 1)) % len(m.text) for start, length in zip(starts, lengths, strict=True)]
    parts = tuple(_shifted(m.text[place][None]) for place in places)
    return InputClass("lengths", f"{len(lengths):,} texts of 1 to {m.context:,} tokens", parts)


def _left_padded(m: _Material, positions: bool) -> InputClass:
    """As `generate` makes them: positions count from the first real token and are 0 before it."""
    inputs = _windows(m.text, m.rows, m.context)
    padding = m.below(m.context, len(inputs.ids))
    mask = (torch.arange(m.context) >= padding[:, None]).long()
    pad = m.tokenizer.pad_token_id if m.tokenizer.pad_token_id is not None else (m.end or 0)
    ids, targets = inputs.ids.masked_fill(mask == 0, pad), inputs.targets.masked_fill(mask == 0, _IGNORED)
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0) if positions else None
    what = f"{len(ids):,} blocks of text, 0 to {m.context - 1:,} pads before"
    return InputClass("left padding", what, (Inputs(ids, targets, mask, position_ids),))


def _late_positions(m: _Material) -> InputClass:
    assert m.trained is not None
    inputs = _windows(m.text, max(1, m.tokens // (m.context - m.trained)), m.context)
    inputs.targets[:, : m.trained] = _IGNORED
    what = f"text at positions {m.trained:,} to {m.context - 1:,}: training had {m.trained:,}"
    return InputClass("late positions", what, (inputs,))


def _byte_noise(m: _Material) -> str:
    return bytes(m.below(256, m.rows * m.context).tolist()).decode("latin-1")


def _digits(m: _Material) -> str:
    digits = "".join(map(str, m.below(10, m.rows * m.context).tolist()))
    cuts = (1 + m.below(40, len(digits))).cumsum(0).tolist()
    return " ".join(digits[a:b] for a, b in zip([0, *cuts], cuts, strict=False) if a < len(digits))


def _white_space(m: _Material) -> str:
    return "".join(_WHITE_SPACE[i] for i in m.below(len(_WHITE_SPACE), m.rows * m.context).tolist())


def _end(m: _Material) -> int:
    assert m.end is not None
    return m.end


def _draw(m: _Material, count: int) -> Int[Tensor, " token"]:
    """Tokens as frequent as they are in ordinary text."""
    return m.text[m.below(len(m.text), count)]


def _sample(m: _Material, count: int) -> Int[Tensor, " token"]:
    """So many different tokens, end-of-text first; the whole vocabulary in order where it is no larger."""
    if count >= m.vocabulary:
        return torch.arange(m.vocabulary)
    order = torch.randperm(m.vocabulary, generator=m.random)
    first = [] if m.end is None else [m.end]
    return torch.cat([torch.tensor(first, dtype=torch.long), order[order != (-1 if m.end is None else m.end)]])[:count]


def _of(m: _Material, tokens: Tensor) -> str:
    return f"all {m.vocabulary:,}" if len(tokens) == m.vocabulary else f"{len(tokens):,} of {m.vocabulary:,}"


def _rows(stream: Int[Tensor, " token"], count: int, length: int) -> Int[Tensor, "sequence position"]:
    """Windows of length + 1, evenly spaced; the stream goes round where it is short, and then gives fewer."""
    count = min(count, max(1, len(stream) // _LITERAL_STRIDE))
    starts = torch.arange(count) * len(stream) // count
    return stream[(starts[:, None] + torch.arange(length + 1)) % len(stream)]


def _windows(stream: Int[Tensor, " token"], count: int, length: int) -> Inputs:
    return _shifted(_rows(stream, count, length))


def _shifted(rows: Int[Tensor, "sequence position"]) -> Inputs:
    """Each token and the one after it."""
    return Inputs(rows[:, :-1].contiguous(), rows[:, 1:].clone())


def _passes(
    model: PreTrainedModel, inputs: Iterable[Inputs], sites: Sequence[NormSite]
) -> Iterator[tuple[Float[Tensor, "read vocab"], Float[Tensor, "read width"], Int[Tensor, " read"]]]:
    """Logits, residuals and targets of the positions that are read, batch by batch."""
    device = model.device
    vocabulary = vocabulary_size(model)
    with evaluating(model), _residuals(model, sites) as residuals:
        for part in inputs:
            size = max(1, _LOGITS_AT_ONCE // (vocabulary * part.ids.shape[1]))
            for start in range(0, len(part.ids), size):
                batch = part.take(slice(start, start + size))
                logits = model(**_arguments(batch, device), use_cache=False).logits
                read = batch.read.to(device)
                residual = residuals[-1].view(*batch.ids.shape, -1)  # OPT's has batch and position as one.
                yield logits[read], residual[read], batch.targets.to(device)[read]
                residuals.clear()


def _arguments(batch: Inputs, device: torch.device) -> dict[str, Tensor]:
    named = {
        "input_ids": batch.ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    return {name: value.to(device) for name, value in named.items() if value is not None}


@contextmanager
def _residuals(model: PreTrainedModel, sites: Sequence[NormSite]) -> Iterator[list[Tensor]]:
    """What the final site, normed or not, reads in the passes that follow; else what the unembedding does."""
    found: list[Tensor] = []
    final = next((site.name for site in sites if site.role == "final"), None)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    module = modules[final] if final in modules else model.get_output_embeddings()
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    try:
        yield found
    finally:
        handle.remove()


def _worst(
    inputs: Sequence[Inputs], ours: Measured, theirs: Measured, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Where the twin's loss exceeds the reference's most: the tokens up to there, and the one that came next."""
    excess = torch.nan_to_num(ours.loss - theirs.loss, nan=0.0, posinf=math.inf)
    places = _places(inputs)
    rows = []
    for index in excess.topk(min(_WORST, len(excess))).indices.tolist():
        part, row, position = places(index)
        ids = inputs[part].ids[row, max(0, position + 1 - _SHOWN_TOKENS) : position + 1]
        rows.append(
            {
                "text": _decode(ids, tokenizer),
                "next": _decode(inputs[part].targets[row, position : position + 1], tokenizer),
                "tokens": ids.tolist(),
                "position": position,
                "loss": _number(ours.loss[index]),
                "reference_loss": _number(theirs.loss[index]),
                "residual_norm": _number(ours.norm[index]),
                "reference_residual_norm": _number(theirs.norm[index]),
            }
        )
    return rows


def _decode(ids: Int[Tensor, " token"], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text, or the tokens' own names where each is but a part of a character."""
    text = str(tokenizer.decode(ids))
    return text if text.strip("\ufffd") else " ".join(map(str, tokenizer.convert_ids_to_tokens(ids.tolist())))


def _places(inputs: Sequence[Inputs]) -> Callable[[int], tuple[int, int, int]]:
    """From the index of a read position to its part, sequence and position."""
    ends = np.cumsum([int(part.read.sum()) for part in inputs])

    def place(index: int) -> tuple[int, int, int]:
        part = int(np.searchsorted(ends, index, side="right"))
        row, position = inputs[part].read.nonzero()[index - (int(ends[part - 1]) if part else 0)].tolist()
        return part, row, position

    return place


def _unflatten(values: Float[Tensor, " read"], inputs: Sequence[Inputs]) -> list[Float[Tensor, "sequence position"]]:
    """Values of read positions back in their places, 0 elsewhere."""
    pieces = values.split([int(part.read.sum()) for part in inputs])
    return [
        torch.zeros(part.ids.shape, dtype=values.dtype).masked_scatter(part.read, piece)
        for part, piece in zip(inputs, pieces, strict=True)
    ]


def _default_reference(directory: Path, settings: dict[str, Any]) -> str:
    control = directory / "control"
    if (control / "config.json").is_file() and any(control.glob("*.safetensors")):
        return str(control)
    if settings.get("model"):
        return str(settings["model"])
    raise UnnormError(
        f"'{directory / CONFIG_FILE}' is missing or names no model, and no control was saved: there is nothing to "
        "compare with. Name the original with --against."
    )


def _load_reference(name: str, was_named: bool, trust_remote_code: bool) -> PreTrainedModel:
    try:
        return load_original(name, trust_remote_code)[0]
    except UnnormError as error:
        if was_named:
            raise
        raise UnnormError(
            f"The reference of this run can't be used. {error} Or name another with --against."
        ) from error


def _check_same_vocabulary(twin: PreTrainedModel, reference: PreTrainedModel, name: str) -> None:
    sizes = [vocabulary_size(model) for model in (twin, reference)]
    if sizes[0] != sizes[1]:
        raise UnnormError(
            f"The twin has {sizes[0]} token embeddings and '{name}' has {sizes[1]}: their vocabularies differ. "
            "Compare with the original that the twin was made from."
        )


def _trained_context(directory: Path, settings: dict[str, Any]) -> int | None:
    """Tokens in a training block: as the plan had it, else as it was asked for."""
    try:
        return int(json.loads((directory / "result.json").read_text())["plan"]["context"])
    except (OSError, ValueError, KeyError, TypeError):
        return settings.get("context")


def _ordinary_text(
    twin: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    tokens: int,
    settings: dict[str, Any],
    data: str | None,
    text_field: str | None,
    split: str | None,
) -> Int[Tensor, " token"]:
    """The held-out part of the data, of the run's unless other data is named."""
    own = settings if data is None else {}
    source = str(data or own.get("data", STDLIB))
    rows = vocabulary_size(twin)
    count = 1 + max(1, tokens // context)
    field, part = text_field or own.get("text_field"), split or own.get("split", "train")
    try:
        blocks = build_blocks(source, tokenizer, rows, context, 1, count, field, part)
    except UnnormError as error:
        if data is not None:
            raise
        raise UnnormError(f"The run's own text can't be read. {error} Or name other text with --data.") from error
    return torch.tensor(blocks.validation["input_ids"]).flatten()


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _all_finite(logits: Tensor, residual: Tensor) -> bool:
    return bool(logits.isfinite().all() and residual.isfinite().all())


def _number(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
