"""Errors that a user reads: one line, with the file, the rule and what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["ScanError", "exit_on_error", "first_line", "one_line"]

T = TypeVar("T")


class ScanError(ValueError):
    """A scan that cannot be used. The message is one line that names the file, the rule and what was found."""


def exit_on_error(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function; end the program with a one-line message and exit status 1 if the function raises a user's error.

    Configs of the bundle use it, because MONAI wraps exceptions of an expression in a traceback.

    Args:
        function: called with the other arguments.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The value of the function.

    Raises:
        SystemExit: if the function raises ``ValueError``, ``OSError`` or ``FloatingPointError``.
    """
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(str(error)) from error


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the error's type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException, name: str) -> str:
    """Message of a failed scan.

    Args:
        error: exception that was caught; the first :class:`ScanError` in its chain of causes is reported as it is.
        name: name of the scan, reported with every other error.

    Returns:
        One line.
    """
    while error.__cause__ is not None and not isinstance(error, ScanError):
        error = error.__cause__
    if isinstance(error, ScanError):
        return first_line(error)
    lines = str(error).strip().splitlines()
    return f"{name}: {type(error).__name__}{': ' + lines[0] if lines else ''}"
