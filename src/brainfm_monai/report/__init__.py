"""The page of one scan, its interactive view, and the template engine of all pages."""

from brainfm_monai.report.page import compose_page, compose_view, find_niivue, render, write_report, write_view
