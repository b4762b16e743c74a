"""Errors of a configuration, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["exit_on_error"]

T = TypeVar("T")


def exit_on_error(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function; a wrong value, a missing file or a loss that is no number ends the program with one line, and status 1.

    Raises:
        SystemExit: where the function raises ``ValueError``, ``OSError`` or ``FloatingPointError``.
    """
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(str(error)) from error
