"""Attribution patching against activation patching, head by head.

The metric m is the logit of the right answer minus that of the wrong one, at the last token of the prompt. With z_h the
output of head h before the output projection, at all positions,

    activation patching       m(corrupted prompt with z_h of the clean one) - m(corrupted)
    attribution patching      (z_h(clean) - z_h(corrupted)) . dm/dz_h (corrupted)

The second is the first-order approximation of the first, for all heads from one backward pass (Nanda 2023, *Attribution
Patching*; Syed et al. 2023, arXiv 2310.10348). The difference between original and twin shows what norms do to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.analysis.anatomy import Anatomy, anatomy, without_heads
from unnorm.analysis.figures import dot_rows, scatter
from unnorm.analysis.material import Finding, Material
from unnorm.analysis.prompts import PromptPair, answer_token, by_length, problem_with
from unnorm.errors import UnnormError
from unnorm.hooks import recorded, replaced_inputs
from unnorm.isolation import isolated
from unnorm.models.running import in_evaluation_mode
from unnorm.models.sizes import check_fits
from unnorm.report.numbers import fixed, percent


@dataclass(frozen=True)
class Patching:
    """Effects of patching each head, in nats of the logit difference.

    Attributes:
        activation: the measured effect.
        attribution: the effect predicted by the gradient.
        clean: the metric on the clean prompts.
        corrupted: the metric on the corrupted prompts.
    """

    activation: Float[Tensor, "prompt layer head"]
    attribution: Float[Tensor, "prompt layer head"]
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]

    @property
    def head_error(self) -> Float[Tensor, "layer head"]:
        """Mean of |attribution - activation| over prompts, relative to mean |activation|; 0 if there is no effect."""
        miss, effect = (self.attribution - self.activation).abs().mean(0), self.activation.abs().mean(0)
        return torch.where(effect > 0, miss / effect.clamp_min(1e-12), torch.zeros(()).to(miss))

    @property
    def error(self) -> float:
        """The same ratio, with both means over all prompts and heads."""
        return float((self.attribution - self.activation).abs().mean() / self.activation.abs().mean().clamp_min(1e-12))

    @property
    def head_correlation(self) -> Float[Tensor, "layer head"]:
        """Pearson correlation of activation and attribution over prompts, by head; NaN with fewer than 3 prompts."""
        if len(self.activation) < 3:
            return torch.full_like(self.activation[0], torch.nan)
        a, b = (value - value.mean(0) for value in (self.activation, self.attribution))
        spread = (a.square().sum(0) * b.square().sum(0)).sqrt()
        return torch.where(spread > 0, (a * b).sum(0) / spread.clamp_min(1e-12), torch.full_like(spread, torch.nan))

    @property
    def correlation(self) -> float:
        """Pearson correlation of activation and attribution over heads, each averaged over prompts."""
        pair = torch.stack([self.activation.mean(0).flatten(), self.attribution.mean(0).flatten()])
        return float(torch.corrcoef(pair)[0, 1])


@isolated
@in_evaluation_mode
def patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PromptPair],
    batch_size: int = 32,
    parts: Anatomy | None = None,
) -> Patching:
    """Patch every head from clean prompts into corrupted ones, both exactly and to first order.

    Args:
        model: a twin, or a model with norms.
        tokenizer: its tokenizer.
        pairs: clean and corrupted prompts with equally many tokens, each pair with two answers.
        batch_size: prompts in one forward pass.
        parts: the model's parts, if known.

    Returns:
        Effects in the order of the pairs.

    Raises:
        UnnormError: there is no pair, the model's heads can't be told apart, a pair can't be used (prompts of different
            lengths, or answers that start with the same token), or a prompt is longer than the model's context.
    """
    pairs = list(pairs)
    if not pairs:
        raise UnnormError("There are no prompts to patch between: give at least one pair.")
    for pair in pairs:
        problem = problem_with(pair, tokenizer)
        if problem:
            raise UnnormError(f"The prompt '{pair.clean}' can't be used: {problem}.")
    parts = parts or anatomy(model)
    unknown = without_heads(model, parts)
    if unknown is not None:
        raise unknown
    found: list[Patching] = []
    order: list[int] = []
    for numbers, clean, corrupted in by_length(pairs, tokenizer):
        check_fits(model, len(clean[0]))
        order += numbers
        group = [pairs[number] for number in numbers]
        answers = torch.tensor(
            [[answer_token(tokenizer, p.clean, a) for a in (p.answer, p.wrong_answer)] for p in group]
        )
        ids = [torch.tensor(values, device=model.device) for values in (clean, corrupted)]
        for rows in torch.arange(len(group)).split(batch_size):
            found.append(_patch_batch(model, parts, ids[0][rows], ids[1][rows], answers[rows].to(model.device)))
    as_given = torch.tensor(order).argsort()
    return Patching(*(torch.cat([getattr(part, field.name) for part in found])[as_given] for field in fields(Patching)))


NOT_DONE = " It does not do this task, so effects show how patches move the answers, not how it is solved."


def find(material: Material) -> Finding:
    """Patching in both models on the given prompts."""
    if isinstance(material.prompts, str):
        raise UnnormError(material.prompts)
    measured = {
        subject.name: patch(
            subject.model, material.tokenizer, material.prompts, 8 * material.batch_size, subject.anatomy
        )
        for subject in material.subjects
    }
    original, twin = measured["original"], measured["twin"]
    return Finding(
        key="patching",
        title="Attribution patching vs. activation patching",
        text=(
            "Each head's output on a clean prompt is patched into the run on a corrupted one "
            "(activation patching), and "
            "the effect on the logit difference of the two answers is compared with the gradient's estimate for all "
            f"heads at once (attribution patching). {len(material.prompts)} pairs of prompts, such as "
            f"“{material.prompts[0].clean}” → “{material.prompts[0].answer.strip()}”. On clean prompts the "
            f"original prefers the right answer in {_right(original):.0%} of cases and the twin in {_right(twin):.0%}."
            f"{NOT_DONE if _right(original) < 0.5 else ''}"
        ),
        numbers={name: _numbers(value) for name, value in measured.items()}
        | {"prompts": len(material.prompts), "example": material.prompts[0].clean},
        figures={"patching_scatter": _scatter(measured), "patching_error": _error_figure(measured)},
        captions={
            "patching_scatter": "Each point is a head, averaged over prompts. On the line the estimate is exact.",
            "patching_error": "Mean absolute error of attribution patching relative to the mean "
            "absolute effect, by head.",
        },
        legends={
            "patching_scatter": [("original", "s", "point"), ("twin", "a", "point")],
            "patching_error": [("original", "s", "point"), ("twin", "a", "point")],
        },
        headline=(
            "Attribution patching error",
            f"{percent(original.error)} → {percent(twin.error)}",
            f"relative to the effect; correlation over heads {fixed(original.correlation, 4)} → "
            f"{fixed(twin.correlation, 4)}",
        ),
    )


def _patch_batch(
    model: PreTrainedModel,
    parts: Anatomy,
    clean: Int[Tensor, "prompt position"],
    corrupted: Int[Tensor, "prompt position"],
    answers: Int[Tensor, "prompt answer"],
) -> Patching:
    names = [writer.name for writer in parts.attentions]

    def metric(ids: Tensor) -> Float[Tensor, " prompt"]:
        right, wrong = model(input_ids=ids, use_cache=False).logits[:, -1].gather(1, answers).unbind(1)
        return right - wrong

    with torch.no_grad(), recorded(model, names) as record:
        before = metric(clean)
        z_clean = {name: record[name][0] for name in names}
    leaves: dict[str, Tensor] = {}

    def as_leaf(name: str) -> Callable[[Tensor], Tensor]:
        def edit(z: Tensor) -> Tensor:
            # Ensures a gradient for every z although the weights are frozen.
            leaves[name] = z if z.requires_grad else z.detach().requires_grad_(True)
            return leaves[name]

        return edit

    with torch.enable_grad(), replaced_inputs(model, {name: as_leaf(name) for name in names}):
        after = metric(corrupted)
        gradients = torch.autograd.grad(after.sum(), [leaves[name] for name in names])
    z = {name: leaves[name].detach() for name in names}
    heads = parts.heads

    def by_head(value: Tensor) -> Float[Tensor, "prompt head"]:
        return value.view(len(clean), -1, heads, value.shape[-1] // heads).sum((1, 3))

    attribution = [by_head((z_clean[name] - z[name]) * g) for name, g in zip(names, gradients, strict=True)]
    activation = torch.zeros(len(clean), len(names), heads, dtype=after.dtype, device=after.device)
    with torch.no_grad():
        for layer, name in enumerate(names):
            for head in range(heads):
                with replaced_inputs(model, {name: _with_head(z_clean[name], head, heads)}):
                    activation[:, layer, head] = metric(corrupted) - after
    measured = (activation, torch.stack(attribution, 1), before, after)
    return Patching(*(value.detach().cpu().double() for value in measured))


def _with_head(clean: Tensor, head: int, heads: int) -> Callable[[Tensor], Tensor]:
    def edit(z: Tensor) -> Tensor:
        size = z.shape[-1] // heads
        z = z.clone()
        z[..., head * size : (head + 1) * size] = clean[..., head * size : (head + 1) * size]
        return z

    return edit


def _numbers(found: Patching) -> dict[str, Any]:
    return {
        "correlation": found.correlation,
        "error": found.error,
        "clean_metric": float(found.clean.mean()),
        "corrupted_metric": float(found.corrupted.mean()),
        "right_answers": _right(found),
        "activation": found.activation.mean(0).tolist(),
        "attribution": found.attribution.mean(0).tolist(),
        "head_error": found.head_error.tolist(),
        "head_correlation": [[None if v != v else v for v in row] for row in found.head_correlation.tolist()],
    }


def _right(found: Patching) -> float:
    """Share of clean prompts on which the right answer has a higher logit than the wrong one."""
    return float((found.clean > 0).double().mean())


def _scatter(measured: dict[str, Patching]) -> Figure:
    points = {}
    for name, found in measured.items():
        layers, heads = found.activation.shape[1:]
        labels = [f"head {layer}.{head}" for layer in range(layers) for head in range(heads)]
        effect, estimate = (v.mean(0).flatten().tolist() for v in (found.activation, found.attribution))
        points[name] = (effect, estimate, labels)
    return scatter(points, "activation patching, nats", "attribution patching, nats", diagonal=True)


def _error_figure(measured: dict[str, Patching]) -> Figure:
    layers, heads = measured["twin"].activation.shape[1:]
    names = [f"head {layer}.{head}" for layer in range(layers) for head in range(heads)]
    return dot_rows(
        names, {n: f.head_error.flatten().tolist() for n, f in measured.items()}, "relative error (log)", True
    )
