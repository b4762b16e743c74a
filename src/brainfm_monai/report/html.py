"""Pages as HTML: one template engine and one stylesheet for the page of a scan, evaluations and comparisons."""

import base64
from typing import Any

import jinja2

BLOCKS: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
LOADER = jinja2.PackageLoader("brainfm_monai", "report/templates")
# Names of scans and structures are text, whatever they contain.
ENVIRONMENT = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined, **BLOCKS)


def render(template: str, **values: object) -> str:
    """Fill a template of ``report/templates``, such as ``scan.html``, with values, of which texts are escaped.

    Every page extends ``base.html``, with its stylesheet, and needs a ``title``.

    Raises:
        jinja2.UndefinedError: if the template uses a name that is not given.
    """
    return ENVIRONMENT.get_template(template).render(**values)


def data_address(content: bytes, kind: str = "image/webp") -> str:
    """The address of a picture that a page contains: ``data:`` with the bytes in base 64."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
