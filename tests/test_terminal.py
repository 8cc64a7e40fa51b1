"""Tables on the terminal: every number under its own heading and beside its own model."""

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from unnorm.calibration.scales import ScaleStatistics
from unnorm.evaluation import Results, Score
from unnorm.exports.export import Exported
from unnorm.exports.measure import FormError
from unnorm.proof.verify import Check
from unnorm.sites.find import find_sites
from unnorm.terminal.analysis import analysis_table
from unnorm.terminal.audit import audit_tables
from unnorm.terminal.evaluation import evaluation_tables
from unnorm.terminal.progress import Progress
from unnorm.terminal.removal import export_table, proof_table, result_table, sites_table

Result = dict[str, Any]
PROTOCOL: Result = {
    "models": {"gpt2-norm-free": "", "gpt2": ""}, "original": {"gpt2": ""}, "corpora": [], "tasks": [], "context": 64,
    "interval": "", "dtype": "float32", "device": "cpu",
}  # fmt: skip


def shown(table: RenderableType, width: int = 300) -> str:
    out = StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_only_the_main_process_has_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(rank: str) -> str:
        monkeypatch.setenv("RANK", rank)
        out = StringIO()
        with Progress(Console(file=out, force_terminal=True)) as progress:
            if progress.live is not None:
                progress.live.refresh()
        return out.getvalue()

    assert drawn("0") and not drawn("1")


def test_the_summarys_losses_are_each_models_own(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    numbers = {"teacher_loss": 1.25, "lnfree_loss": 1.5, "control_loss": 1.75, "gap": -0.25, "naive_loss": 2.5}
    numbers |= {"limited_neurons": 3000, "share_at_limit": 0.0125, "loss_increase_ci": [0.125, 0.375]}
    numbers |= {"skipped_steps": 8}
    text = shown(result_table(result | numbers))
    for said in (
        r"loss, original *│ *1\.2500",
        r"loss, twin *│ *1\.5000 *│ *\+0\.2500, 95% interval \+0\.1250 to \+0\.3750",
        r"loss, control *│ *1\.7500",
        r"gap *│ *-0\.2500",
        r"loss, naive removal *│ *2\.5000",
        r"steps refused *│ *8 *│ *gradient not finite or exploding",
        r"neurons with limits *│ *3,000 *│ *reached by 1\.2% of activations",
    ):
        assert re.search(said, text), (said, text)


def test_what_overflows_has_no_nan_in_the_summary_and_a_remedy_that_helps(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    result |= {"kl": None, "lnfree_loss": None, "loss_increase_ci": None}
    result |= {"overflowed_blocks": 2, "validation_blocks": 8, "kl_elsewhere": 0.5, "lnfree_loss_elsewhere": 3.5}
    trained, naive = (shown(result_table(result | {"tokens": tokens})) for tokens in (1000, 0))
    everywhere = {"overflowed_blocks": 8, "kl_elsewhere": None, "lnfree_loss_elsewhere": None, "tokens": 1000}
    lost = shown(result_table(result | everywhere | {"fold_max_abs_error": None, "verified": False}))
    assert re.search(r"fold error *│ *overflows", lost), lost
    assert "nan" not in trained + naive + lost and re.search(r"loss, twin *│ *overflows *│ *3\.5000 in the", trained)
    assert "train further: unnorm heal" in trained
    assert "start a new run with more --tokens" in naive and "start a new run with more --tokens" in lost


def test_steps_are_said_to_be_refused_only_where_some_were(finished_run: Path) -> None:
    assert "refused" not in shown(result_table(json.loads((finished_run / "result.json").read_text())))


def test_training_that_did_harm_is_said_to_have_done_so(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    text = shown(result_table(result | {"kl": 4e30, "naive_kl": 0.25, "lnfree_loss": 4e30, "tokens": 1000}))
    assert re.search(r"KL to the original *│ *4e\+30 *│", text), text
    assert re.search(r"KL, naive removal *│ *0\.2500 *│ *the twin is further .*lower --lr", text), text
    for fine in ({"kl": 0.2, "naive_kl": 0.25, "tokens": 1000}, {"kl": 0.25, "naive_kl": 0.2, "tokens": 0}):
        assert "naive removal │" not in shown(result_table(result | fine)).replace("loss, naive removal", "")


def test_checks_that_fail_are_named_in_the_summary(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert result["failed_checks"] == []
    failed = shown(result_table(result | {"verified": False, "failed_checks": ["every read is affine"]}))
    assert re.search(r"proof *│ *FAILED *│ *every read is affine", failed)


def test_a_healed_runs_text_is_that_of_both_runs(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    numbers = {"tokens": 3000, "text_tokens": 3000, "tokens_per_second": 50.0}
    plan = result["plan"] | {"tokens": 1000}
    assert "tokens, 50 a second " in shown(result_table(result | numbers | {"plan": plan}))
    over = shown(result_table(result | numbers | {"plan": plan, "text_tokens": 1500}))
    assert "tokens, 50 a second, 2.0 passes over the text" in over


def test_a_title_has_no_path_in_it(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert shown(result_table(result | {"model": "/home/somebody/mine"})).startswith("mine without norms")
    assert shown(result_table(result | {"model": "owner/mine"})).startswith("owner/mine without norms")


def test_the_models_numbers_come_before_the_references() -> None:
    row: Result = {
        "name": "rare",
        "passed": True,
        "tokens": 9,
        "reason": "",
        "finite": {"float16": False},
        "reference_finite": {"float16": True},
        "worst": [{"text": "a", "next": "b", "loss": 5.25, "reference_loss": 6.5}],
    }
    values = {"loss": 1.25, "reference_loss": 2.5, "residual_norm": 3.5, "reference_residual_norm": 4.5}
    row |= {key: dict.fromkeys(("99.9%", "99.99%", "largest"), value) for key, value in values.items()}
    plain: Result = {"reference": "original", "limits": {"p99.99": 1.1, "largest": 2.0}}
    text = shown(audit_tables(plain | {"classes": [row]}))
    for said in ("1.25 (2.50)", "3.5 (4.5)", "5.25 (6.50)", "float16 (none)", "all 1 classes passed"):
        assert said in text, said
    assert "One token decides, since" in text and ": in every class (more --tokens" in text and "Limits" not in text
    many = shown(audit_tables(plain | {"classes": [row | {"tokens": 10_000, "passed": False}, row]}))
    assert "1 of 2 classes FAILED" in many and ": in rare." in many
    assert "Limits: 1.1 times the reference's 99.99th percentile and 2 times its largest loss" in many
    assert "One token" not in shown(audit_tables(plain | {"classes": [row | {"tokens": 10_000}]}))


def test_the_originals_figures_come_before_the_twins() -> None:
    keys = ("mean_sink_rate", "mean_share", "longest_over_median")
    findings = {
        "sinks": {"original": dict.fromkeys(keys, 0.75), "twin": dict.fromkeys(keys, 0.25)},
        "scales": {"mean_spread": {"original": 0.5, "twin": 0.125}},
        "geometry": {"mean_change": {"twin": 0.0625}},
    }
    result = {"directory": "d", "original": "o", "findings": findings, "skipped": {}, "page": "p", "numbers": "n"}
    text = shown(analysis_table(result))
    for said in (
        r"sink rate, mean over heads *│ *75\.0% *│ *25\.0%",
        r"std of log scale, mean over sites *│ *0\.500 *│ *0\.125",
        r"mean relative weight change *│ *- *│ *6\.2%",
    ):
        assert re.search(said, text), (said, text)


def test_a_check_shows_what_was_measured_before_its_limit() -> None:
    failed, passed = Check("c", False, 2e-7, 3e-9, ""), Check("d", True, 0, 3e-9, "")
    text = shown(proof_table([failed, passed]))
    assert re.search(r"FAILED *│ *2\.0e-07 *│ *3\.0e-09", text) and "1 of 2 checks FAILED" in text
    assert "all 1 checks passed" in shown(proof_table([passed]))


def test_scales_are_under_their_headings(tiny_model: Any) -> None:
    site = find_sites(tiny_model)[0]
    row = ScaleStatistics(
        site=site.name, position_0=1.0, mean=2.0, geometric_mean=9.0, spread=3.0, smallest=4.0, largest=5.0
    )
    text = shown(sites_table([(site, row)]))
    assert re.search(r"position 0 +mean +spread +smallest +largest", text)
    assert re.search(r"1 +2 +3 +4 +5 *\n", text)


def test_differences_of_an_export_are_under_their_headings() -> None:
    exported = Exported("stock", Path("m"), [FormError("float32", 1e-3, 2e-4, 3e-5)], "load", "note")
    assert re.search(r"float32 *│ *1\.0e-03 *│ *2\.0e-04 *│ *3\.0e-05", shown(export_table(exported)))


def test_names_of_models_and_benchmarks_can_be_read_at_80_columns() -> None:
    ends = {"ci": (36.1, 44.1), "difference_ci": (-0.05, 0.02), "items": 500, "of": 10_042}
    score = Score(
        model="gpt2-norm-free", task="lambada_openai", metric="perplexity", value=40.1, difference=-0.01, **ends
    )
    out = StringIO()
    Console(file=out, width=80).print(
        evaluation_tables(Results((), (), (score,), {"corpora": [], "tasks": []} | PROTOCOL))
    )
    assert "perplexity" in out.getvalue() and "gpt2-norm" in out.getvalue() and "lambada_o" in out.getvalue()
    assert "36.1000 to 44.1000  -0.0500 to +0.0200" in out.getvalue()


@pytest.mark.parametrize("width", [30, 40, 60])
def test_every_number_has_its_name_in_a_narrow_terminal(width: int, tiny_model: Any) -> None:
    score = Score(
        model="gpt2-norm-free", task="lambada_openai", metric="perplexity", value=40.1, difference=-0.01,
        ci=(36.1, 44.1), difference_ci=(-0.05, 0.02), items=500, of=10_042,
    )  # fmt: skip
    text = shown(evaluation_tables(Results((), (), (score,), PROTOCOL)), width)
    assert "gpt2-norm-free" in text and "lambada_openai" in " ".join(text.split())
    assert re.search(r"value\s+40\.1000, 36\.1000", text), text
    text = shown(proof_table([Check("every read is affine", False, 2e-7, 3e-9, "worst of 7")]), width)
    assert "every read is affine" in text and "FAILED" in text and re.search(r"what\s+worst of 7", text)
    row = ScaleStatistics("transformer.h.0.ln_1", 1.0, 2.0, 9.0, 3.0, 4.0, 5.0)
    text = shown(sites_table([(find_sites(tiny_model)[0], row)]), width)
    assert re.search(r"ln_1\n +kind +layernorm\n(.*\n)*? +largest +5\n", text), text
