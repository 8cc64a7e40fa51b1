"""The report: every number is on the page, nothing is loaded from elsewhere, and gaps in the data are survived."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unnorm.calibration.scales import ScaleStatistics
from unnorm.report.drawing import ACCENT, bin_positions, log_ticks, short_names
from unnorm.report.numbers import MISSING, count, duration, fixed, interval, percent, short_count, shortest, significant
from unnorm.report.removal_figures import position_figure, removal_stretch, run_figure, scale_figure
from unnorm.report.removal_page import ReportData, headline, render_report

SITES = ["transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.ln_f"]
STEPS, STEP_TOKENS = 40, 512


def row(step: int, kind: str, alpha: float | None) -> dict[str, Any]:
    """One line of metrics; without alpha, of the control."""
    values = {"step": step, "kind": kind, "tokens": step * STEP_TOKENS, "loss": 3.5 + 1 / (step + 1)}
    values |= {"kl": 0.3 / (step + 1) if step else 0.0, "lr": 1e-3, "grad_norm": 0.5, "seconds": 0.5 * step}
    if kind == "validation":
        values["teacher_loss"] = 4.25
    if alpha is not None:
        values |= {"alpha": alpha, "sites": 3, "sites_removed": 3 if alpha == 1 else 0}
    return values


def alpha_at(step: int) -> float:
    """A cosine over the first 16 steps, as the taper recipe does it."""
    return 0.5 - 0.5 * math.cos(math.pi * min(1, step / 16))


@pytest.fixture
def data() -> ReportData:
    """A complete report with a control."""
    result = {
        "model": "demo",
        "data": "stdlib",
        "held_out": "every 50th file",
        "recipe": "taper",
        "teacher_loss": 3.6512,
        "lnfree_loss": 3.6608,
        "control_loss": 3.6134,
        "gap": 0.0474,
        "kl": 0.01534,
        "jsd": 0.00371,
        "top1_agreement": 0.9342,
        "naive_loss": 7.412,
        "naive_kl": 3.81,
        "tokens": STEPS * STEP_TOKENS,
        "training_seconds": 84.2,
        "seconds": 9000,
        "tokens_per_second": 5836.2,
        "peak_memory_mb": 1912,
        "norm_modules_left": 0,
        "sites": 3,
        "fold_max_abs_error": 2.3e-6,
        "seed": 17,
        "versions": {"torch": "2.9.1", "transformers": "5.1.0"},
        "plan": {"device": "cpu", "bfloat16": False, "context": 256, "batch_size": 16, "lr": 1.2e-3},
        "lnfree_loss_ci": [3.601, 3.719],
        "teacher_loss_ci": [3.592, 3.709],
    }
    rows = [row(step, "train", alpha_at(step)) for step in range(1, STEPS + 1)]
    rows += [row(step, "validation", alpha_at(step)) for step in range(0, STEPS + 1, 10)]
    scales = [ScaleStatistics(site, 40.0, 1.5, 1.4, 0.2, 0.7, 3.1) for site in SITES]
    return ReportData(
        result=result,
        rows=rows,
        control_rows=[row(step, "validation", None) for step in range(0, STEPS + 1, 10)],
        scales_before=scales,
        scales_after=scales,
        constants=dict.fromkeys(SITES, 1.4),
        position_loss={name: [5.0 - i / 200 for i in range(255)] for name in ("original", "lnfree", "control")},
        samples=[{"prompt": "def f(", "original": "a, b):\n    return a", "lnfree": "a, c):\n    return c"}],
        checks=[{"name": "no norm modules", "passed": True, "value": 0.0, "limit": 0.0, "detail": "modules left"}],
    )


class Reader(HTMLParser):
    """Collects a page's elements, the addresses it loads from, its texts and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(page)

    @property
    def text(self) -> str:
        """What is read on the page, spaces collapsed."""
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Keep the element."""
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, text: str) -> None:
        """Keep the text where it belongs."""
        {"script": self.scripts, "style": self.styles}.get(self.tags[-1] if self.tags else "", self.texts).append(text)


def specs(page: str) -> dict[str, Any]:
    """The figures that the page draws."""
    found = re.search(r"^const specs = (.*);$", page, re.MULTILINE)
    return json.loads(found[1]) if found else {}


def test_every_headline_number_is_on_the_page(data: ReportData) -> None:
    text = Reader(render_report(data)).text
    assert "All 3 norms of demo removed with 20.5k tokens in 84 seconds of training." in text
    assert "from 3.6512 to 3.6608" in text
    numbers = ("0.0153", "+0.0096", "+0.0474", "3.6134", "93.4%", "of 3 norm sites", "2.3e-6", "0.00371")
    for number in (
        *numbers,
        "7.4120",
        "3.81",
        "3.6010 to 3.7190",
        "every 50th file",
        "17",
        "2.9.1",
        "0.0012",
        "2 h 30 min",
    ):
        assert number in text, number


def test_page_is_self_contained(data: ReportData) -> None:
    page = render_report(data)
    reader = Reader(page)
    assert reader.addresses == []
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(reader.tags)
    assert not any(re.search(r"url\(|@import", style) for style in reader.styles)
    # And the browser is told so, for what the scripts might ask for.
    assert "default-src 'none'" in page


def test_plotly_is_inlined_once(data: ReportData) -> None:
    from plotly.offline import get_plotlyjs

    page = render_report(data)
    assert page.count(get_plotlyjs()) == 1
    assert Reader(page).tags.count("script") == 2


def test_page_without_figures_has_no_scripts(data: ReportData) -> None:
    bare = replace(data, rows=[], control_rows=[], scales_before=[], scales_after=[], position_loss={})
    reader = Reader(render_report(bare))
    assert "script" not in reader.tags
    assert "Nothing was trained" in reader.text


def test_every_figure_has_its_place(data: ReportData) -> None:
    page = render_report(data)
    assert set(specs(page)) == {"run", "scales", "positions"}
    assert set(specs(page)) <= set(Reader(page).ids)


def test_user_text_is_escaped(data: ReportData) -> None:
    attack = "</script><script>alert(1)</script>"
    hostile = replace(
        data,
        result=data.result | {"model": attack, "data": attack, "versions": {attack: attack}, "plan": {attack: attack}},
        samples=[{"prompt": attack, "original": attack, "lnfree": attack + "x"}],
        checks=[{"name": attack, "passed": False, "value": 1.0, "limit": 0.0, "detail": attack}],
        scales_before=[replace(scale, site=attack) for scale in data.scales_before[:1]],
    )
    page = render_report(hostile)
    reader = Reader(page)
    assert "<script>alert" not in page
    assert reader.tags.count("script") == 2
    assert attack in reader.text
    assert any(attack in str(trace.get("text")) for trace in specs(page)["scales"]["data"])


@pytest.mark.parametrize("missing", ["absent", "none"])
def test_missing_numbers_become_dashes(data: ReportData, missing: str) -> None:
    kept = {"model": "demo", "sites": 3, "norm_modules_left": 0, "tokens": 0}
    result = kept if missing == "absent" else {**dict.fromkeys(data.result), **kept}
    text = Reader(render_report(replace(data, result=result, rows=[], control_rows=[]))).text
    assert "All 3 norms of demo replaced by constant scales, without training." in text
    assert "no control was trained" in text
    assert MISSING in text
    assert "None" not in text and "nan" not in text


def test_rows_with_holes_are_drawn(data: ReportData) -> None:
    rows = [{**r, "kl": None} if r["step"] % 2 else {k: v for k, v in r.items() if k != "alpha"} for r in data.rows]
    rows[3]["loss"] = math.nan
    page = render_report(replace(data, rows=rows))
    assert "run" in specs(page)
    assert "NaN" not in json.dumps(specs(page))


def test_run_without_alpha_or_kl_has_fewer_panels(data: ReportData) -> None:
    rows = [{key: r[key] for key in ("step", "kind", "tokens", "loss")} for r in data.rows]
    full, loss_only = run_figure(data.rows, []), run_figure(rows, [])
    assert full is not None and loss_only is not None
    assert "yaxis3" in full.layout and full.layout.yaxis2.type == "log"
    assert "yaxis2" not in loss_only.layout


def test_original_line_is_on_the_same_blocks_as_the_curve(data: ReportData) -> None:
    page = render_report(data)
    assert 4.25 in [shape["y0"] for shape in specs(page)["run"]["layout"]["shapes"]]
    assert "the horizontal line is the original" in Reader(page).text
    # A run of an earlier version did not measure it, and the final evaluation is on other blocks.
    rows = [{key: value for key, value in r.items() if key != "teacher_loss"} for r in data.rows]
    page = render_report(replace(data, rows=rows))
    assert not any(shape["type"] == "line" for shape in specs(page)["run"]["layout"]["shapes"])
    assert "horizontal line" not in Reader(page).text


def test_removal_stretch_covers_the_rise_of_alpha(data: ReportData) -> None:
    assert removal_stretch(data.rows) == (0, 16 * STEP_TOKENS)
    switches = [{"tokens": 10 * i, "alpha": a} for i, a in enumerate([0, 0, 0.5, 1, 1])]
    assert removal_stretch(switches) == (10, 30)
    assert removal_stretch(switches[:2]) is None


def test_failed_check_is_announced_at_the_top(data: ReportData) -> None:
    failed = {"name": "fold", "passed": False, "value": 0.5, "limit": 1e-4, "detail": "logits differ"}
    reader = Reader(render_report(replace(data, checks=[*data.checks, failed])))
    assert "1 of 2 checks of the proof failed" in reader.text
    assert "FAIL" in reader.text


def test_shading_is_explained_where_there_is_some(data: ReportData) -> None:
    assert "In the shaded part" in render_report(data) and "norms being removed" in render_report(data)
    healed = render_report(replace(data, rows=[row | {"alpha": 1.0} for row in data.rows]))
    assert "shaded" not in healed and "norms being removed" not in healed


def test_scaled_down_neurons_are_named(data: ReportData) -> None:
    assert "scaled down" not in render_report(data)
    neuron = {"writer": "transformer.h.2.mlp.c_proj", "index": 447, "length": 55.46, "factor": 0.0227}
    page = render_report(replace(data, result=data.result | {"massive_neurons": [neuron]}))
    assert "transformer.h.2.mlp.c_proj 447 (55.5 times the usual scale, now times 0.023)" in page


def test_what_overflows_is_counted_and_the_rest_measured(data: ReportData) -> None:
    assert "overflow" not in Reader(render_report(data)).text
    numbers = {"kl": math.nan, "overflowed_blocks": 1, "validation_blocks": 196}
    page = Reader(render_report(replace(data, result=data.result | numbers))).text
    assert "it overflows in 1 of 196 held-out blocks" in page and "in the others" not in page
    numbers |= {"kl_elsewhere": 0.7052, "lnfree_loss_elsewhere": 4.2494}
    page = Reader(render_report(replace(data, result=data.result | numbers))).text
    assert "it overflows in 1 of 196 held-out blocks; in the others KL 0.705, loss 4.2494" in page


def test_naive_removal_that_overflows_is_said_to(data: ReportData) -> None:
    page = Reader(render_report(replace(data, result=data.result | {"naive_loss": None, "naive_kl": None}))).text
    assert re.search(r"naive removal\s+overflows", page)
    everywhere = {"overflowed_blocks": 196, "validation_blocks": 196, "top1_agreement": 0.0}
    page = Reader(render_report(replace(data, result=data.result | everywhere))).text
    assert re.search(r"Top-1 agreement\s+—", page) and "0.0%" not in page
    page = Reader(render_report(replace(data, result=data.result | everywhere | {"lnfree_loss": None}))).text
    assert re.search(r"\btwin\s+overflows", page)


def test_training_that_did_harm_is_said_to_have_done_so(data: ReportData) -> None:
    page = Reader(render_report(replace(data, result=data.result | {"kl": 4.5}))).text
    assert "naive removal: 3.81; the twin is further from the original" in page
    assert "further from the original" not in Reader(render_report(data)).text


def test_headline_has_no_path_in_it() -> None:
    assert headline({"model": "/home/somebody/mine", "tokens": 0}).startswith("All norms of mine replaced")


def test_headline_claims_no_removal_while_norms_are_left() -> None:
    assert headline({"model": "m", "sites": 9, "norm_modules_left": 2}) == "2 norm modules are left in m"


def test_continuations_part_at_a_word(data: ReportData) -> None:
    page = render_report(data)
    assert "a, <mark>b):\n    return a</mark>" in page
    assert "a, <mark>c):\n    return c</mark>" in page


def test_dark_colours_replace_what_figures_use(data: ReportData) -> None:
    page = render_report(data)
    dark = json.loads(re.search(r"^const dark = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    used = {match.lower() for match in re.findall(r"#[0-9a-fA-F]{6}", json.dumps(specs(page)))}
    assert ACCENT in used
    template = {"#444", "#ffffff"}
    assert used - template <= set(dark)


def test_bins_keep_the_mean_and_cover_every_position() -> None:
    losses = [float(i) for i in range(1, 1024)]
    positions, means = bin_positions(losses, most=48)
    # Loss equal to position: the mean of a bin is its middle.
    assert positions == means
    assert positions[0] == 1 and len(positions) <= 48
    assert bin_positions([3.0, 2.0]) == ([1.0, 2.0], [3.0, 2.0])


def test_log_ticks_are_round_numbers_around_the_range() -> None:
    ticks = log_ticks(0.015, 0.3)
    assert {0.02, 0.05, 0.1, 0.2} <= {round(tick, 9) for tick in ticks}
    assert all(math.log10(tick) % 1 == pytest.approx(0, abs=1e-9) for tick in log_ticks(1e-4, 1e4))


@pytest.mark.parametrize(("low", "high"), [(0.24, 0.42), (2.4, 4.2), (0.95, 1.06), (3.0, 3.01), (2e-5, 3e3)])
def test_a_log_axis_has_ticks_to_read_from(low: float, high: float) -> None:
    assert sum(low <= tick <= high * 1.01 for tick in log_ticks(low, high)) >= 2


def test_short_names_keep_what_tells_sites_apart() -> None:
    assert short_names(SITES) == ["h.0.ln_1", "h.0.ln_2", "ln_f"]
    assert short_names(["norm"]) == ["norm"]


def test_numbers_read_well() -> None:
    assert [fixed(x, 2) for x in (1.5, 9999.994, 1.23e11, -2e7)] == ["1.50", "9999.99", "1.23e11", "\u22122.00e7"]
    assert [short_count(n) for n in (0, 999, 999_999, 20_000_000, 1.5e9)] == ["0", "999", "1M", "20M", "1.5B"]
    assert [duration(s) for s in (2.34, 84.2, 600, 9000)] == ["2.3 seconds", "84 seconds", "10 minutes", "2 h 30 min"]
    assert [significant(x) for x in (0, 0.01534, 2.3e-6, -1.5)] == ["0", "0.0153", "2.30e-6", "\u22121.50"]
    assert (shortest(1e-10), shortest(0.0001)) == ("1e-10", "0.0001")
    assert (fixed(-0.01, 2), fixed(0.01, 2, sign=True), percent(0.5)) == ("\u22120.01", "+0.01", "50.0%")
    assert count(1234567) == "1\u202f234\u202f567"
    assert interval([1, 2]) == "1.0000 to 2.0000"
    assert {f(x) for f in (fixed, significant, shortest, percent, count, duration) for x in (None, math.nan, "x")} == {
        MISSING
    }


def test_a_local_path_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unnorm.report.card import _on_hub, _published

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "gpt").mkdir(parents=True)
    assert not _on_hub("models/gpt") and _published("models/gpt") == "gpt"
    assert not _on_hub("./gpt") and not _on_hub("~/gpt")
    assert not _on_hub("demo") and not _on_hub("self") and _published("self") == "text written by the original"
    assert not _on_hub(str(tmp_path / "gpt2")) and _on_hub("gpt2")  # One of the few without an owner.
    assert _on_hub("openai-community/gpt2") and _on_hub("Salesforce/wikitext:wikitext-2-raw-v1")


def test_difference_by_position_is_the_twins_less_the_originals() -> None:
    figure = position_figure({"original": [2.0, 2.0], "lnfree": [2.0, 3.0]})
    assert figure is not None
    (line,) = (trace for trace in figure.data if trace.name == "difference")
    assert list(line.y) == [0.0, 1.0]


def test_rows_of_models_and_of_the_proof_have_their_own_numbers(data: ReportData) -> None:
    check = {"name": "c", "passed": True, "value": 2e-7, "limit": 3e-4}
    page = render_report(replace(data, checks=[check]))
    numbers = (fixed(data.result["lnfree_loss"]), interval(data.result["lnfree_loss_ci"]), "0.0153")
    assert "twin</th>" + "".join(f'<td class="n">{number}</td>' for number in numbers) in page
    assert 'data-label="value">2e-7<' in page and 'data-label="limit">0.0003<' in page


def test_curves_and_bars_are_of_whom_they_say(data: ReportData) -> None:
    after = [replace(row, mean=2.5) for row in data.scales_before]
    traces = scale_figure(data.scales_before, after, data.constants).data
    dots = {t.text[0].split("<br>")[1].partition(":")[0]: t for t in traces if t.marker.symbol == "circle"}
    assert {name: dot.y[0] for name, dot in dots.items()} == {"original": data.scales_before[0].mean, "twin": 2.5}
    assert dots["twin"].marker.color == ACCENT != dots["original"].marker.color
    rows = [row | {"loss": 9.0} for row in data.control_rows]
    control = next(trace for trace in run_figure(data.rows, rows).data if trace.name == "control")
    assert set(control.y) == {9.0}
