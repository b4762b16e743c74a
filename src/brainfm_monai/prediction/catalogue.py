"""The table of outputs: what a user may ask for by name, and what the network must predict for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from brainfm_monai import outputs as files
from brainfm_monai.report import write_report, write_view
from brainfm_monai.tasks import TASKS, TaskLayout

# In the order in which they are written: the report shows what the others found. Which tasks an output needs stands in the
# table of tasks (``Task.outputs``).
OUTPUTS: dict[str, Callable[[files.ScanResult], None]] = {
    "segmentation": files.write_segmentation,
    "volumes": files.write_volumes,
    "contrasts": files.write_synthetic_images,
    "bias_field": files.write_bias_field,
    "distance": files.write_distances,
    "surfaces": files.write_surfaces,
    "mni": files.write_coordinates,
    "transforms": files.write_transforms,
    "lesion": files.write_lesions,
    "age": files.write_age,
    "embedding": files.write_embedding,
    "uncertainty": files.write_uncertainty,
    "quality": files.write_quality,
    "view": write_view,
    "report": write_report,
}


def select_outputs(outputs: str | Sequence[str], layout: TaskLayout) -> dict[str, Callable[[files.ScanResult], None]]:
    """The functions that write the wanted outputs.

    Args:
        outputs: ``"all"``, which is everything that the network's tasks allow, or names out of :data:`OUTPUTS`; a string may hold
            several, separated by commas.
        layout: tasks of the network.

    Raises:
        ValueError: if there is no such output, or the network does not predict what it is made of.
    """
    asked = [name.strip() for name in outputs.split(",")] if isinstance(outputs, str) else list(outputs)
    possible = [name for name in OUTPUTS if any(name in task.outputs for task in layout.tasks.values())]
    names = possible if asked == ["all"] else asked
    unknown = ", ".join(name for name in names if name not in OUTPUTS)
    if unknown or not names:
        raise ValueError(f"outputs: 'all' or names out of {', '.join(OUTPUTS)} are needed, found {unknown or 'none'}")
    for name in names:
        if name not in possible:
            needs = " or ".join(task.name for task in TASKS.values() if name in task.outputs) or "scales of error"
            has = ", ".join(layout.tasks)
            raise ValueError(f"outputs: '{name}' needs a network that predicts {needs}, found one for {has}")
    return {name: write for name, write in OUTPUTS.items() if name in names}
