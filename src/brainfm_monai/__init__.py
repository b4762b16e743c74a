"""BrainFM as MONAI bundles: any brain scan in, named structures and the other contrasts out."""

from __future__ import annotations

from typing import Any

from brainfm_monai.anatomy import Protocol, Structure
from brainfm_monai.tasks import TASKS, Task, TaskLayout

__version__ = "0.2.0"

__all__ = ["TASKS", "Protocol", "Structure", "Task", "TaskLayout", "__version__", "predict"]


def predict(image: Any, bundle: str = "bundle", **overrides: Any) -> dict[str, Any]:
    """Predict every map of one scan: see :func:`brainfm_monai.prediction.predict`."""
    from brainfm_monai.prediction import predict as predict_one  # its libraries come with the extra "report"

    return predict_one(image, bundle, **overrides)
