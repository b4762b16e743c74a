"""Pages as HTML: one template engine and one stylesheet for the page of a scan, evaluations and comparisons."""

import base64

import jinja2

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("brainfm_monai", "report/templates"),
    autoescape=True,  # names of scans and structures are text, whatever they contain
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: object) -> str:
    """Fill a template of ``report/templates``; it extends ``base.html``, whose stylesheet and macros serve all pages.

    Args:
        template: file name, such as ``scan.html``.
        values: names that the template uses; texts are escaped. ``title`` is always needed.

    Raises:
        jinja2.UndefinedError: if the template uses a name that is not given.
    """
    return ENVIRONMENT.get_template(template).render(**values)


def data_address(content: bytes, kind: str = "image/webp") -> str:
    """The address of a picture that a page contains: ``data:`` with the bytes in base 64."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
