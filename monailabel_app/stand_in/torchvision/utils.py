"""The two functions of torchvision.utils that MONAI Label imports; the tasks of this app call neither of them."""

from __future__ import annotations

from typing import Any

__all__ = ["make_grid", "save_image"]


def make_grid(*args: Any, **kwargs: Any) -> Any:
    """Refuse: pictures of the deepedit app are not available with the stand-in."""
    raise NotImplementedError("torchvision.utils.make_grid: torchvision is needed, found the stand-in of this app")


def save_image(*args: Any, **kwargs: Any) -> None:
    """Refuse: see :func:`make_grid`."""
    raise NotImplementedError("torchvision.utils.save_image: torchvision is needed, found the stand-in of this app")
