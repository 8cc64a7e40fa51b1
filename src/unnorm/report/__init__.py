"""Metrics to one self-contained HTML page that proves and shows what a removal did."""

from unnorm.report.card import render_card
from unnorm.report.page import ReportData, render_report

__all__ = ["ReportData", "render_card", "render_report"]
