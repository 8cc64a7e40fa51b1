"""Intervals hold the truth at their stated rate."""

import json
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.conftest import POSITIONS, VOCAB, stdlib_text
from tests.evaluation.texts import BLOCKS, held_out
from unnorm import remove
from unnorm.evaluation import evaluate, evaluate_model, intervals
from unnorm.evaluation.corpora import open_corpus
from unnorm.evaluation.harness import _interval
from unnorm.evaluation.intervals import bootstrap_interval, paired_share_interval, share_interval
from unnorm.run_directory import CARD, MODEL, REPORT
from unnorm.runs.text import TextSource


class TestIntervals:
    @pytest.mark.parametrize(("units", "least"), [(15, 0.925), (60, 0.93)])
    def test_cover_the_truth_at_the_stated_rate(self, units: int, least: float) -> None:
        """Documents of different lengths and levels; tokens within one share its level."""
        generator = np.random.default_rng(3)
        covered = []
        for _ in range(1000):
            sizes = generator.integers(50, 400, units)
            levels = 3 + 0.4 * generator.gamma(2, 1, units) - 0.8
            sums = sizes * levels + 2 * np.sqrt(sizes) * generator.standard_normal(units)
            low, high = bootstrap_interval(sums, sizes)
            covered.append(low <= 3 <= high)
        assert least < np.mean(covered) < 0.97

    def test_shares_cover_the_truth(self) -> None:
        """On average over shares, as is all that can be had with whole numbers of right items."""
        generator = np.random.default_rng(4)
        truths = generator.uniform(0.02, 0.98, 4000)
        found = [share_interval(float(n), 200) for n in generator.binomial(200, truths)]
        covered = [low <= truth <= high for truth, (low, high) in zip(truths, found, strict=True)]
        assert 0.94 < np.mean(covered) < 0.96
        assert share_interval(0, 200)[1] > 0.01  # None of 200 right is no proof that none ever is.

    def test_differences_of_shares_cover_the_truth(self) -> None:
        generator = np.random.default_rng(5)
        covered = []
        for better, worse in ((0.04, 0.02), (0.01, 0.01), (0.15, 0.1)):
            for _ in range(1500):
                changes = generator.choice([1.0, -1.0, 0.0], 100, p=[better, worse, 1 - better - worse])
                low, high = paired_share_interval(changes.tolist())
                covered.append(low <= better - worse <= high)
        assert 0.94 < np.mean(covered) < 0.99
        assert paired_share_interval([0.0] * 50)[1] > 0.02

    def test_one_unit_that_differs_gives_no_absurd_interval(self) -> None:
        low, high = bootstrap_interval([-1.25] + [0.0] * 23)
        assert -1 < low < -1.25 / 24 < high < 0.5

    @pytest.mark.filterwarnings("error")
    def test_classes_and_predictions_are_no_weighted_perplexity(self) -> None:
        """Values of F1 and MCC are pairs too."""
        assert _interval({item: (item % 2, 0) for item in range(20)}, 0.0) == (None, {})

    def test_a_metrics_interval_is_that_of_how_its_items_were_put_together(self) -> None:
        assert _interval({0: 1.0, 1: 0.0, 2: 1.0}, 2 / 3) == (share_interval(2, 3), {0: 1.0, 1: 0.0, 2: 1.0})
        values = [4.0, 5.0, 9.0]
        assert _interval(dict(enumerate(values)), 6.0)[0] == bootstrap_interval(values)
        low, high = bootstrap_interval(values)
        found = _interval({i: -value for i, value in enumerate(values)}, math.exp(6))
        assert found == (pytest.approx((math.exp(low), math.exp(high))), {})
        pairs = {0: (-4.0, 2), 1: (-5.0, 1), 2: (-9.0, 6)}
        low, high = bootstrap_interval(values, [2, 1, 6])
        assert _interval(pairs, math.exp(2))[0] == pytest.approx((math.exp(low), math.exp(high)))
        assert _interval(pairs, 2 / math.log(2))[0] == pytest.approx((low / math.log(2), high / math.log(2)))
        assert _interval(pairs, 3.0) == (None, {})

    def test_few_units_have_wide_intervals(self) -> None:
        low, high = bootstrap_interval([1.0, 2.0])
        assert (low, high) == pytest.approx((1.5 - 12.706 / 2, 1.5 + 12.706 / 2))
        assert bootstrap_interval([2.0]) is bootstrap_interval([1.0, math.nan, 2.0]) is None

    def test_are_the_same_where_units_are_too_many_to_draw_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = np.random.default_rng(6).gamma(2, 1, 500)
        at_once = bootstrap_interval(values)
        monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 3 * len(values))
        assert bootstrap_interval(values) == pytest.approx(at_once, rel=1e-9)

    def test_a_planted_difference_is_found_paired_and_missed_unpaired(
        self, tokens: Path, tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        corpus = open_corpus("val", TextSource(str(tokens)), tiny_tokenizer, VOCAB, POSITIONS, 10**6)

        def warmer(by: float) -> GPT2LMHeadModel:
            model = deepcopy(tiny_model)
            with torch.no_grad():
                for parameter in model.transformer.ln_f.parameters():
                    parameter *= by
            return model

        low, high = 1.0, 1.2
        for _ in range(14):  # Where sharper logits cost 0.003 nats.
            middle = (low + high) / 2
            row = evaluate_model(warmer(middle), corpus.blocks, tiny_model)
            low, high = (middle, high) if row.difference < 0.003 else (low, middle)  # type: ignore[operator]
        assert row.difference == pytest.approx(0.003, abs=2e-4)
        assert row.difference_ci is not None and 0.001 < row.difference_ci[0] < 0.003 < row.difference_ci[1]

        original = evaluate_model(tiny_model, corpus.blocks)
        generator = np.random.default_rng(0)
        means = [np.array(r.unit_losses) / np.array(r.unit_tokens) for r in (row, original)]
        apart = [np.subtract(*(m[generator.integers(len(m), size=len(m))].mean() for m in means)) for _ in range(2000)]
        assert np.quantile(apart, 0.025) < 0 < np.quantile(apart, 0.975)
        assert row.loss_ci[0] < original.loss_ci[1]

    @pytest.fixture
    def many(self, tmp_path: Path) -> str:
        """A file of 900 short documents."""
        texts = stdlib_text("os", "inspect", "typing").split("\n\n")[:900]
        path = tmp_path / "many.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    def test_over_documents_where_there_are_enough(
        self, many: str, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        corpus = open_corpus("many", TextSource(many), tiny_tokenizer, VOCAB, POSITIONS, 10**6)
        kind, units = corpus.units()
        flat = np.asarray(corpus.blocks["input_ids"][:]).ravel()
        # A unit ends with the separator, and only there.
        numbers = corpus.documents.ravel()  # type: ignore[union-attr]
        assert kind == "documents" and np.array_equal(np.diff(numbers) > 0, flat[:-1] == 0)
        (row,) = evaluate(str(tiny_model_dir), data=many, tokens=10**6)
        assert (row.interval_over, row.units) == ("documents", units.max() + 1)
        assert sum(row.unit_tokens) == row.tokens
        assert sum(row.unit_losses) == pytest.approx(row.loss * row.tokens)

    def test_a_run_has_those_that_evaluating_it_has(self, many: str, tmp_path: Path, tiny_model_dir: Path) -> None:
        shared = {"data": many, "context": 16}
        result = remove(model=str(tiny_model_dir), tokens=0, out=tmp_path / "run", **shared)
        (row,) = evaluate(tmp_path / "run", str(tiny_model_dir), **shared)
        assert result["interval_over"] == row.interval_over == "documents"
        assert result["lnfree_loss_ci"] == pytest.approx(row.loss_ci)
        assert result["loss_increase_ci"] == pytest.approx(row.difference_ci)
        for page in (tmp_path / "run" / REPORT, tmp_path / "run" / MODEL / CARD):
            assert "over documents" in page.read_text(encoding="utf-8")

    def test_a_column_of_that_name_that_numbers_no_tokens_is_left_alone(self, tiny_model: GPT2LMHeadModel) -> None:
        blocks = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "document": ["a", "b", "c", "d"]})
        assert evaluate_model(tiny_model, blocks).interval_over == "blocks"

    def test_protocol_names_the_very_tokens(self, tokens: Path, tiny_model_dir: Path) -> None:
        import hashlib

        results = evaluate(str(tiny_model_dir), data=f"mine={tokens}", tokens=10**6)
        (corpus,) = results.protocol["corpora"]
        assert corpus["tokens_sha256"] == hashlib.sha256(held_out(tokens).numpy().astype("<i4").tobytes()).hexdigest()
        keys = ("corpus", "context", "stride", "blocks", "predicted_tokens", "held_out")
        expected = ("mine", POSITIONS, POSITIONS, BLOCKS, BLOCKS * (POSITIONS - 1), "val.bin")
        assert tuple(corpus[key] for key in keys) == expected
        assert corpus["separator"].startswith("<|endoftext|> (id 0)")
