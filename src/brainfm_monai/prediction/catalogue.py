"""The table of outputs: what a user may ask for by name, and what the network must predict for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from brainfm_monai.outputs import (
    ScanResult,
    write_bias_field,
    write_coordinates,
    write_distances,
    write_quality,
    write_segmentation,
    write_surfaces,
    write_synthetic_images,
    write_transforms,
    write_volumes,
)
from brainfm_monai.report import write_report, write_view
from brainfm_monai.tasks import TASKS, TaskLayout

__all__ = ["OUTPUTS", "Output", "select_outputs"]

IMAGE_TASKS = tuple(task.name for task in TASKS.values() if task.kind == "image")


@dataclass(frozen=True)
class Output:
    """A group of files.

    Attributes:
        write: writes them.
        tasks: the network has to predict one of these at least.
    """

    write: Callable[[ScanResult], None]
    tasks: tuple[str, ...] = ("segmentation",)


# In the order in which they are written: the report tells what the others found.
OUTPUTS: dict[str, Output] = {
    "segmentation": Output(write_segmentation),
    "volumes": Output(write_volumes),
    "contrasts": Output(write_synthetic_images, IMAGE_TASKS),
    "bias_field": Output(write_bias_field, ("log_bias_field",)),
    "distance": Output(write_distances, ("distance",)),
    "surfaces": Output(write_surfaces, ("distance",)),
    "mni": Output(write_coordinates, ("mni",)),
    "transforms": Output(write_transforms, ("mni",)),
    "quality": Output(write_quality),
    "view": Output(write_view),
    "report": Output(write_report),
}


def select_outputs(outputs: str | Sequence[str], layout: TaskLayout) -> dict[str, Callable[[ScanResult], None]]:
    """The functions that write the wanted outputs.

    Args:
        outputs: ``"all"``, which is everything that the network's tasks allow, or names out of :data:`OUTPUTS`; a string may hold
            several, separated by commas.
        layout: tasks of the network.

    Raises:
        ValueError: if there is no such output, or the network does not predict what it is made of.
    """
    names = [name.strip() for name in outputs.split(",")] if isinstance(outputs, str) else list(outputs)
    possible = [name for name, output in OUTPUTS.items() if any(task in layout.tasks for task in output.tasks)]
    wanted = possible if names == ["all"] else names
    unknown = [name for name in wanted if name not in OUTPUTS]
    if unknown or not wanted:
        raise ValueError(
            f"outputs: 'all' or names out of {', '.join(OUTPUTS)} are needed, found {', '.join(unknown) or 'none'}"
        )
    for name in wanted:
        if name not in possible:
            needs, has = " or ".join(OUTPUTS[name].tasks), ", ".join(layout.tasks)
            raise ValueError(f"outputs: '{name}' needs a network that predicts {needs}, found one for {has}")
    return {name: output.write for name, output in OUTPUTS.items() if name in wanted}
