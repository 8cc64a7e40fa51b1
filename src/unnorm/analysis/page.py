"""The analysis page: every finding with its figures, in one self-contained HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unnorm.analysis.material import Finding
from unnorm.errors import first_few
from unnorm.paths import short_name
from unnorm.report.templates import render_page


@dataclass(frozen=True)
class Skipped:
    """An analysis that can't be run on these models, and why."""

    key: str
    reason: str


def render_analysis(
    original: str,
    findings: Sequence[Finding],
    skipped: Sequence[Skipped],
    settings: dict[str, Any],
    kept_norms: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        original: name of the original.
        findings: in the order in which they are shown.
        skipped: analyses that could not be run.
        settings: names and values of the settings used.
        kept_norms: paths of the norms that the twin still has.
    """
    figures = {name: figure for finding in findings for name, figure in finding.figures.items()}
    values = {
        "original": short_name(original),
        "kept_norms": first_few(list(kept_norms)),
        "tiles": [{"name": name, "value": value, "note": note} for name, value, note in (f.headline for f in findings)],
        "findings": [
            {
                "title": finding.title,
                "text": finding.text,
                "plots": [
                    {
                        "id": name,
                        "caption": finding.captions[name],
                        "legend": finding.legends.get(name, []),
                        "height": figure.layout.height,
                    }
                    for name, figure in finding.figures.items()
                ],
            }
            for finding in findings
        ],
        "skipped": [{"key": row.key, "reason": row.reason} for row in skipped],
        "settings": list(settings.items()),
    }
    return render_page("analysis.html", values, figures)
