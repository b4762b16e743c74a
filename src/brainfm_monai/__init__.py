"""BrainFM as MONAI bundles: any brain scan in, named structures and the other contrasts out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainfm_monai.anatomy import Protocol, Structure
    from brainfm_monai.prediction import Prediction, predict
    from brainfm_monai.tasks import TASKS, Task, TaskLayout

__version__ = "0.2.0"

__all__ = ["TASKS", "Prediction", "Protocol", "Structure", "Task", "TaskLayout", "__version__", "predict"]

HOMES = {"Prediction": "prediction", "predict": "prediction", "Protocol": "anatomy", "Structure": "anatomy"}
HOMES |= {"TASKS": "tasks", "Task": "tasks", "TaskLayout": "tasks"}


def __getattr__(name: str) -> Any:
    """Import a name when it is used: the command starts without torch."""
    if name not in HOMES:
        raise AttributeError(f"module 'brainfm_monai' has no attribute '{name}'")
    return getattr(import_module(f"brainfm_monai.{HOMES[name]}"), name)
