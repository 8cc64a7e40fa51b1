"""Activation and attribution patching, next to TransformerLens and finite differences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import unnorm
from tests.analysis.models import BRIDGED, PAIRS, hooked_logits, original_of
from tests.families import float64_copy
from unnorm.analysis.anatomy import anatomy
from unnorm.analysis.patching import Patching, patch
from unnorm.analysis.prompts import by_length


@pytest.mark.parametrize("family", BRIDGED)
def test_patching_agrees_with_transformer_lens_and_finite_differences(family: str, runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    twin, bridge = unnorm.load(runs[family]), unnorm.to_transformer_lens(runs[family])
    tokenizer = AutoTokenizer.from_pretrained(runs[family] / "model")
    found = patch(twin, tokenizer, PAIRS)
    first = by_length(PAIRS, tokenizer)[0]
    pairs = [PAIRS[number] for number in first[0]]
    clean, corrupted = torch.tensor(first[1]), torch.tensor(first[2])
    answers = torch.tensor([[tokenizer(p.clean + t).input_ids[-1] for t in (p.answer, p.wrong_answer)] for p in pairs])

    def metric(output: torch.Tensor) -> torch.Tensor:
        right, wrong = output[:, -1].gather(1, answers).unbind(1)
        return right - wrong

    with torch.no_grad():
        before = metric(bridge(corrupted))
        _, cache = bridge.run_with_cache(clean)
        for layer, head in ((0, 1), (1, 3)):
            name = f"blocks.{layer}.attn.hook_z"

            def put(z: torch.Tensor, hook: Any, name: str = name, head: int = head) -> torch.Tensor:
                heads = z if z.ndim == 4 else z.unflatten(-1, (4, -1))
                source = cache[name] if z.ndim == 4 else cache[name].unflatten(-1, (4, -1))
                heads[:, :, head] = source[:, :, head]
                return heads.view(z.shape)

            effect = metric(bridge.run_with_hooks(corrupted, fwd_hooks=[(name, put)])) - before
            torch.testing.assert_close(found.activation[first[0], layer, head].float(), effect, rtol=1e-3, atol=1e-4)
    exact = float64_copy(twin)
    small = _patched_a_little(exact, clean, corrupted, answers, 1e-6)
    estimate = patch(exact, tokenizer, pairs).attribution
    torch.testing.assert_close(estimate, small, rtol=1e-4, atol=1e-6)


def _patched_a_little(
    model: PreTrainedModel, clean: torch.Tensor, corrupted: torch.Tensor, answers: torch.Tensor, step: float
) -> torch.Tensor:
    """Effects of moving each head a small step towards the clean prompt, over that step."""
    columns = []
    for writer in anatomy(model).attentions:
        z: list[torch.Tensor] = []
        hooked_logits(model, writer.name, lambda x, z=z: z.append(x) or x, clean)  # type: ignore[misc]
        size = z[0].shape[-1] // 4
        for head in range(4):
            part = slice(head * size, (head + 1) * size)

            def move(x: torch.Tensor, share: float, z: Any = z, part: slice = part) -> torch.Tensor:
                x = x.clone()
                x[..., part] += share * (z[0][..., part] - x[..., part])
                return x

            ends = [
                hooked_logits(model, writer.name, lambda x, s=s: move(x, s), corrupted)[:, -1].gather(1, answers)
                for s in (step, -step)
            ]
            columns.append(((ends[0] - ends[1])[:, 0] - (ends[0] - ends[1])[:, 1]) / (2 * step))
    return torch.stack(columns, 1).view(len(clean), -1, 4)


def test_gradient_is_exact_where_everything_after_is_linear(runs: dict[str, Path]) -> None:
    """The twin's last attention reaches the logits through its last MLP alone; with that off, linearly."""
    twin, original = float64_copy(unnorm.load(runs["gpt2"])), float64_copy(original_of(runs["gpt2"]))
    tokenizer = AutoTokenizer.from_pretrained(runs["gpt2"] / "model")
    for model in (twin, original):
        torch.nn.init.zeros_(model.transformer.h[1].mlp.c_proj.weight)
    exact, off = (patch(model, tokenizer, PAIRS) for model in (twin, original))
    torch.testing.assert_close(exact.attribution[:, 1], exact.activation[:, 1], rtol=0, atol=1e-9)
    assert float(exact.head_error[1].max()) < 1e-9 < 1e-3 < float(off.head_error[1].min())


def test_effects_of_patching_are_in_the_order_of_the_pairs(runs: dict[str, Path]) -> None:
    twin, tokenizer = unnorm.load(runs["gpt2"]), AutoTokenizer.from_pretrained(runs["gpt2"] / "model")
    pairs = sorted(PAIRS, key=lambda pair: -len(tokenizer(pair.clean).input_ids))
    assert len(by_length(pairs, tokenizer)) > 1
    found = patch(twin, tokenizer, pairs)
    for number in (0, len(pairs) - 1):
        alone = patch(twin, tokenizer, pairs[number : number + 1])
        torch.testing.assert_close(found.activation[number], alone.activation[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.clean[number], alone.clean[0], rtol=1e-3, atol=1e-5)


def test_metrics_are_of_the_clean_and_of_the_corrupted_prompt(runs: dict[str, Path]) -> None:
    twin, tokenizer = unnorm.load(runs["gpt2"]), AutoTokenizer.from_pretrained(runs["gpt2"] / "model")

    def metric(prompt: str, pair: Any) -> float:
        with torch.no_grad():
            logits = twin(input_ids=torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
        right, wrong = (tokenizer(prompt + answer).input_ids[-1] for answer in (pair.answer, pair.wrong_answer))
        return float(logits[right] - logits[wrong])

    found = patch(twin, tokenizer, PAIRS)
    assert found.clean.tolist() == pytest.approx([metric(p.clean, p) for p in PAIRS], rel=1e-3, abs=1e-5)
    assert found.corrupted.tolist() == pytest.approx([metric(p.corrupted, p) for p in PAIRS], rel=1e-3, abs=1e-5)


def test_correlation_of_a_head_is_pearsons() -> None:
    a, b = torch.randn(2, 6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    found = Patching(a, b, a[:, 0, 0], a[:, 0, 0]).head_correlation
    assert float(found[1, 2]) == pytest.approx(np.corrcoef(a[:, 1, 2], b[:, 1, 2])[0, 1])
