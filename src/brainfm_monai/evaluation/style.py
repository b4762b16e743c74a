"""The looks of the pages of evaluations and comparisons: one light HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["make_document", "make_figure", "make_table_html"]

STYLE = """
:root { color-scheme: light; }
body { background: #fff; color: #1c1f24; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; }
body { padding: 28px 24px 60px; } h1 { font-size: 26px; margin: 0 0 2px; }
h2 { font-size: 18px; margin: 38px 0 4px; border-top: 1px solid #dfe3e8; padding-top: 18px; }
p { margin: 4px 0 8px; max-width: 880px; } .quiet { color: #5f6872; font-size: 13px; } img { max-width: 100%; display: block; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.card { border: 1px solid #d5dae0; border-radius: 8px; padding: 10px 16px; min-width: 150px; }
.card b { display: block; font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { display: block; color: #5f6872; font-size: 12.5px; }
.failed { border-left: 4px solid #c03030; background: #fdf1f0; padding: 8px 14px; margin: 14px 0; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0; }
td, th { padding: 3px 14px 3px 2px; border-bottom: 1px solid #e6e9ed; vertical-align: top; }
th { text-align: left; color: #5f6872; font-weight: 600; vertical-align: bottom; }
.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
td:first-child { white-space: nowrap; }
.ci { color: #7a828b; font-size: 12px; display: block; }
.scans { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 22px; }
.scans img { border-radius: 6px; width: 100%; } .scans p { margin: 0 0 4px; } a { color: #1d5fa8; } .wide { overflow-x: auto; }
details > summary { cursor: pointer; color: #1d5fa8; margin: 8px 0; } pre { font-size: 12px; overflow-x: auto; }
"""


def make_document(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML out of a title and its parts."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n'


def make_figure(address: str, alternative: str) -> str:
    """A picture."""
    return f'<img alt="{escape(alternative)}" src="{address}">'


def make_table_html(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table; cells are HTML already, those after the first ``text_columns`` are numbers."""

    def classed(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=number' * (i >= text_columns)}>{cell}</{tag}>" for i, cell in enumerate(cells))

    body = "".join(f"<tr>{classed('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><tr>{classed("th", [escape(column) for column in columns])}</tr>{body}</table></div>'
    )
