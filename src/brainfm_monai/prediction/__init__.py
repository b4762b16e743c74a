"""From scans to finished folders: which outputs, which share of the list, scan after scan, or one image in Python.

The table of outputs is what a user may ask for by name, and what the network must predict for it.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from brainfm_monai.io import fingerprint, refuse_if
from brainfm_monai.outputs import cortex, maps, quality, template
from brainfm_monai.outputs.atlas import load_atlas, write_atlas
from brainfm_monai.outputs.result import Writer
from brainfm_monai.prediction.loop import ScanDataset, ScanLoader, WriteScans, local_device, predict_scans, share_of
from brainfm_monai.prediction.single import Prediction, predict
from brainfm_monai.report import write_report, write_view
from brainfm_monai.tasks import TASKS, TaskLayout

# In the order of their warnings and of the summary's columns; ``Task.outputs`` says which tasks an output needs.
OUTPUTS: dict[str, Writer] = {
    "segmentation": maps.write_segmentation,
    "volumes": maps.write_volumes,
    "contrasts": maps.write_synthetic_images,
    "bias_field": maps.write_bias_field,
    "distance": cortex.write_distances,
    "surfaces": cortex.write_surfaces,
    "mni": template.write_coordinates,
    "transforms": template.write_transforms,
    "lesion": maps.write_lesions,
    "age": maps.write_age,
    "embedding": maps.write_embedding,
    "uncertainty": maps.write_uncertainty,
    "quality": quality.write_quality,
    "view": write_view,
    "report": write_report,
}


def select_outputs(
    outputs: str | Sequence[str], layout: TaskLayout, atlas: str | Path | None = None
) -> dict[str, Writer]:
    """The functions that write the wanted outputs.

    Outputs are ``"all"``, which is everything that the network's tasks allow, or names out of :data:`OUTPUTS`; a string
    may hold several, separated by commas. For the atlas see :func:`~brainfm_monai.outputs.atlas.load_atlas`. ValueError
    if there is no such output, or the network does not predict what it is made of; ScanError for an unreadable atlas.
    """
    names = [name.strip() for name in outputs.split(",")] if isinstance(outputs, str) else list(outputs)
    possible = [name for name in OUTPUTS if any(name in task.outputs for task in layout.tasks.values())]
    wanted = possible if names == ["all"] else names
    rule, unknown = f"outputs: 'all' or names out of {', '.join(OUTPUTS)} are needed", set(wanted) - set(OUTPUTS)
    refuse_if(unknown or not wanted, rule, ", ".join(sorted(unknown)) or "none")
    for name in wanted:
        needs = " or ".join(task.name for task in TASKS.values() if name in task.outputs) or "scales of error"
        rule, found = f"outputs: '{name}' needs a network that predicts {needs}", f"one for {', '.join(layout.tasks)}"
        refuse_if(name not in possible, rule, found)
    selected = {name: write for name, write in OUTPUTS.items() if name in wanted}
    if not atlas:
        return selected
    regions = load_atlas(atlas)
    # the name holds the content: results of another atlas are not those of this one
    return {**selected, f"atlas {regions.name} {fingerprint(regions)[:12]}": partial(write_atlas, atlas=regions)}
