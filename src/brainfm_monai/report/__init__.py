"""The page of one scan for a reader who knows brains and not networks, its interactive view, and the template engine of all pages."""

from brainfm_monai.report.html import data_address, render
from brainfm_monai.report.page import write_report
from brainfm_monai.report.view import write_view

__all__ = ["data_address", "render", "write_report", "write_view"]
