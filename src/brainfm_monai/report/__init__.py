"""The page of one scan, its interactive view, and the template engine of all pages."""

from brainfm_monai.report.page import compose_page, render, write_report
from brainfm_monai.report.view import compose_view, find_niivue, write_view
