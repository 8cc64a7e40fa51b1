"""The page and what it compares token by token."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import POSITIONS
from tests.evaluation.texts import BLOCKS, held_out
from unnorm.evaluation import Results, Score, evaluate
from unnorm.report.evaluation_page import render_evaluation
from unnorm.terminal.evaluation import evaluation_tables


def test_names_that_tell_models_apart() -> None:
    names = ("/a/run/model", "/a/other/model", "./x/control", "owner/name", "demo")
    scores = tuple(Score(name, "t", "acc", 0.5, None, 1, 1) for name in names)
    assert list(Results((), (), scores, {}).short_names.values()) == [
        "run/model",
        "other/model",
        "control",
        "owner/name",
        "demo",
    ]


def test_requests_that_were_cut_are_said() -> None:
    score = Score("gpt", "triviaqa", "em", 0.5, None, 9, 9, truncated=36)
    protocol = {"tasks": [], "corpora": [], "context": 64, "interval": "", "dtype": "float32", "device": "cpu"}
    results = Results((), (), (score, replace(score, metric="f1")), protocol)
    said = "gpt on triviaqa: 36 requests were longer than the context and lost their beginning"
    out = StringIO()
    Console(file=out, width=200).print(evaluation_tables(results))
    assert render_evaluation(results).count(said) == out.getvalue().count(said) == 1


def test_two_models_never_have_one_name() -> None:
    names = ("demo", "./demo", "demo/", "/a/model")
    scores = tuple(Score(name, "t", "acc", 0.5, None, 1, 1) for name in names)
    assert list(Results((), (), scores, {}).short_names.values()) == ["demo", "./demo", "demo/", "model"]


def test_an_original_that_was_named_is_not_said_to_be_missing(
    tokens: Path, tiny_model_dir: Path, other_dir: Path
) -> None:
    """Where there are benchmarks alone, or the model is its own original."""

    def said(*models: str | None) -> str:
        console = Console(file=StringIO(), width=300)
        console.print(evaluation_tables(evaluate(*models, str(tokens), tokens=500)))  # type: ignore[arg-type]
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "name the original with --against" in said(str(other_dir), None)
    assert "name the original with --against" not in said(str(tiny_model_dir), str(tiny_model_dir))
    results = evaluate(str(other_dir), str(tiny_model_dir), str(tokens), tokens=500)
    page = render_evaluation(results)
    assert all(digest in page for key in ("models", "original") for digest in results.protocol[key].values())


class TestComparison:
    def test_contexts_and_distributions(
        self, tokens: Path, tiny_model_dir: Path, other_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (row,) = evaluate(str(other_dir), str(tiny_model_dir), str(tokens), tokens=10**6)
        comparison = row.comparison
        assert comparison is not None
        means = [np.mean(context.kl) for context in comparison.contexts]
        assert means == sorted(means, reverse=True)
        assert {context.why for context in comparison.contexts} >= {"kl", "typical"}
        assert sum(map(sum, comparison.loss_density)) == row.tokens
        assert sum(comparison.kl.counts) == sum(comparison.entropy_difference.counts) == BLOCKS * POSITIONS
        ids = held_out(tokens)
        models = [AutoModelForCausalLM.from_pretrained(d).eval() for d in (other_dir, tiny_model_dir)]
        context = comparison.contexts[0]
        block = ids[context.block : context.block + 1]
        length = len(context.tokens)
        with torch.no_grad():
            q, p = (
                torch.log_softmax(m(block).logits[0, context.start - 1 : context.start - 1 + length], -1)
                for m in models
            )
        expected = block[0, context.start : context.start + length]
        assert "".join(context.tokens) == tiny_tokenizer.decode(expected) or "\ufffd" in "".join(context.tokens)
        assert context.loss == pytest.approx((-q.gather(-1, expected[:, None])).squeeze().tolist(), abs=1e-3)
        assert context.kl == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-4)
        assert list(context.guess) == [tiny_tokenizer.decode([i]) for i in q.argmax(-1).tolist()]

    def test_is_part_of_a_runs_report(self, finished_run: Path) -> None:
        page = (finished_run / "report.html").read_text()
        assert "Token by token" in page
        assert page.count('class="group"') == 1 and page.count('class="context"') >= 3
        for place in ("density", "kl", "entropy"):
            assert page.count(f'id="{place}"') == 1

    def test_texts_are_escaped_on_the_page(self, tokens: Path, tiny_model_dir: Path, other_dir: Path) -> None:
        results = evaluate(str(other_dir), str(tiny_model_dir), str(tokens), tokens=2000)
        row = results[0]
        assert row.comparison is not None
        context = row.comparison.contexts[0]
        attack = "</script><script>alert(1)</script>\n"
        hostile = replace(context, tokens=(attack,) * len(context.tokens), guess=(attack,) * len(context.tokens))
        bad = replace(row, model=attack, comparison=replace(row.comparison, contexts=(hostile,)))
        page = render_evaluation(replace(results, evaluations=(bad,)))
        assert "<script>alert" not in page and page.count("<script>") == 2
        assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;<u>↵</u>" in page


def test_cells_are_the_numbers_of_their_headings(tokens: Path, tiny_model_dir: Path, other_dir: Path) -> None:
    results = evaluate(str(other_dir), str(tiny_model_dir), str(tokens), tokens=500)
    losses = {"loss_ci": (1.25, 1.75), "difference": 0.5, "difference_ci": (0.375, 0.625)}
    distances = {"kl": 0.25, "jsd": 0.125, "top1_agreement": 0.5, "top5_agreement": 0.75}
    shape = {"entropy": 2.5, "entropy_difference": 0.875, "ece": 0.0625}
    results = replace(results, evaluations=(replace(results[0], **losses, **distances, **shape),))  # type: ignore[arg-type]
    page = render_evaluation(results)
    assert '<strong>+0.5000</strong></td><td class="n">+0.3750 to +0.6250' in page
    assert "0.250|0.125|50.0%|75.0%|2.500|+0.875|0.0625" in "|".join(re.findall(r'<td class="n">([^<]*)', page))
    out = StringIO()
    Console(file=out, width=300).print(evaluation_tables(results))
    text = " ".join(out.getvalue().split())
    assert "0.2500 0.1250 50.0% 75.0% 2.500 (+0.875) 0.0625" in text and "1.250 to 1.750 +0.3750 to +0.6250" in text
    unsure = replace(results[0], difference_ci=(-0.375, 0.625))
    assert "<strong>+0.5000</strong>" not in render_evaluation(replace(results, evaluations=(unsure,)))
