"""Settings that an annotator sees, beside those of a run over many scans."""

from __future__ import annotations

from typing import Any

__all__ = ["choose"]


def choose(use_click: bool | None, displayed: Any, value: Any) -> Any:
    """A setting of a click in MONAI Label, or of any other run.

    Args:
        use_click: entry that MONAI Label adds to the config of every bundle; ``None`` in any other run.
        displayed: what MONAI Label offers in ``displayable_configs``: a list of choices until a client has chosen one, the
            fastest first.
        value: value of any other run.

    Returns:
        ``value`` if MONAI Label does not run the config, else the chosen or the first of the offered values.
    """
    if use_click is None:
        return value
    return displayed[0] if isinstance(displayed, list) else displayed
