"""The page of one scan: what went in, what came out, and the volumes, for a reader who knows brains and not networks."""

from __future__ import annotations

from brainfm_monai.report.document import write_report
from brainfm_monai.report.page import Page
from brainfm_monai.report.view import write_view

__all__ = ["Page", "write_report", "write_view"]
