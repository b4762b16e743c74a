"""BrainFM as MONAI bundles: any brain scan in, named structures and the other contrasts out."""

from __future__ import annotations

from importlib import metadata

from brainfm_monai.anatomy import Protocol, Structure
from brainfm_monai.tasks import TASKS, Task, TaskLayout

__version__ = metadata.version("brainfm-monai")

__all__ = ["TASKS", "Protocol", "Structure", "Task", "TaskLayout", "__version__"]
