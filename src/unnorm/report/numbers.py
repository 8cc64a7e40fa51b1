"""Numbers as a reader wants them; whatever is missing becomes a dash."""

import math
from collections.abc import Mapping
from typing import Any

MISSING = "—"


def finite(value: Any) -> float | None:
    """The number, or None for what is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def fixed(value: Any, digits: int = 4, sign: bool = False) -> str:
    """With `digits` decimals: a loss, a gap."""
    number = finite(value)
    return MISSING if number is None else _minus(f"{number:{'+' if sign else ''}.{digits}f}")


def significant(value: Any, digits: int = 3) -> str:
    """With `digits` significant digits, in powers of ten outside 0.0001 to 99999."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    if not 1e-4 <= abs(number) < 1e5:
        return _minus(_tidy_exponent(f"{number:.{digits - 1}e}"))
    return _minus(f"{number:.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}")


def shortest(value: Any, digits: int = 3) -> str:
    """With up to `digits` significant digits and no zeros after them: limits, settings."""
    number = finite(value)
    return MISSING if number is None else _minus(_tidy_exponent(f"{number:.{digits}g}"))


def overflowed(result: Mapping[str, Any]) -> str:
    """How many held-out blocks overflow, and loss and KL in the others; nothing where none do."""
    number = finite(result.get("overflowed_blocks"))
    if not number:
        return ""
    words = f"it overflows in {count(number)} of {count(result.get('validation_blocks'))} held-out blocks"
    return words + elsewhere(result.get("kl_elsewhere"), result.get("lnfree_loss_elsewhere"))


def elsewhere(kl: Any, loss: Any) -> str:
    """How the sentence on blocks that overflow ends: KL and loss in the others; nothing where they are missing."""
    known = {"KL": significant(kl), "loss": fixed(loss)}
    words = ", ".join(f"{name} {number}" for name, number in known.items() if number != MISSING)
    return words and f"; in the others {words}"


def percent(value: Any) -> str:
    """A share of 1 as a percentage."""
    number = finite(value)
    return MISSING if number is None else f"{100 * number:.1f}%"


def count(value: Any) -> str:
    """A whole number with thin spaces between thousands, so that no reader takes a comma for a decimal point."""
    number = finite(value)
    return MISSING if number is None else f"{round(number):,}".replace(",", "\u202f")


def short_count(value: Any) -> str:
    """A number of tokens as the command line takes it: 500k, 2M, 1.5B."""
    number = finite(value)
    if number is None:
        return MISSING
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # What would round up to 1000 of a unit is shown as 1 of the next.
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.0f}"


def duration(value: Any) -> str:
    """Seconds up to two minutes, then minutes or hours."""
    seconds = finite(value)
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.0f} seconds" if seconds >= 9.5 else f"{seconds:.1f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def interval(value: Any) -> str:
    """A confidence interval, low to high."""
    ends = list(value) if isinstance(value, list | tuple) else []
    return f"{fixed(ends[0])} to {fixed(ends[1])}" if len(ends) == 2 else MISSING


def _minus(text: str) -> str:
    # A hyphen is not a minus; exponents keep theirs, so that they can be copied as numbers.
    return f"\u2212{text[1:]}" if text.startswith("-") else text


def _tidy_exponent(text: str) -> str:
    """2.3e-06 to 2.3e-6."""
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def healed(result: Mapping[str, Any]) -> str:
    """How many of the training tokens a finished run's twin was trained on further; nothing where it was one run."""
    if not result.get("twin"):
        return ""
    further = math.prod(result["plan"][key] for key in ("steps", "batch_size", "context"))
    return f"{count(further)} of these tokens, on the twin of a finished run"


def without_norms(result: Mapping[str, Any], name: str) -> str:
    """What a twin is called: without norms, or without some of them where others were kept."""
    kept, removed = result.get("norm_modules_left") or 0, result.get("sites") or 0
    return f"{name} without {removed} of its {removed + kept} norms" if kept else f"{name} without norms"


def limits(result: Mapping[str, Any]) -> str:
    """How many neurons have limits, and how often one is reached on text; nothing where none has."""
    if not result.get("limited_neurons"):
        return ""
    share = result.get("share_at_limit")
    reached = "" if share is None else f", reached by {shortest(100 * share, 2)}% of activations on held-out text"
    return f"{count(result['limited_neurons'])} neurons of quadratic MLPs{reached}"


def massive_neurons(neurons: Any) -> str:
    """Each neuron that writes massive activations: where it is, how long its vector was, what it was multiplied by."""
    return "; ".join(
        f"{neuron.get('writer')} {neuron.get('index')} ({significant(neuron.get('length'))} times the usual scale, "
        f"now times {significant(neuron.get('factor'), 2)})"
        for neuron in neurons or []
    )
