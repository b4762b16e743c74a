"""What a user types in 3D Slicer's Python console: colours of the structures, and the maps of a scan."""

from __future__ import annotations

import json
from collections.abc import Iterable

from brainfm_monai.anatomy import Protocol, Structure

__all__ = ["make_script"]

SCRIPT = '''\
# For the Python console of 3D Slicer: FreeSurfer's colours for the segments, and the maps of a scan as volumes.
import urllib.request

import slicer

SERVER = {server}
COLOURS = {colours}


def colour_segments():
    """Give every segment of every segmentation the colour of its structure."""
    for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode"):
        segmentation = node.GetSegmentation()
        for number in range(segmentation.GetNumberOfSegments()):
            segment = segmentation.GetNthSegment(number)
            colour = COLOURS.get(segment.GetName().lower())
            if colour:
                segment.SetColor(*[value / 255 for value in colour])


def load_map(image, tag):
    """Load a map of a scan as a volume: T1w, T2w, FLAIR, CT, bias_corrected, bias_field, distance or lesion."""
    path = slicer.app.temporaryPath + "/" + image + "_" + tag + ".nii.gz"
    urllib.request.urlretrieve(SERVER + "/datastore/label?label=" + image + "&tag=" + tag, path)
    return slicer.util.loadVolume(path)


colour_segments()
'''


def make_script(server: str, structures: Iterable[Structure] | None = None) -> str:
    """The script for Slicer's Python console.

    Args:
        server: address of the server, such as ``http://127.0.0.1:8000``.
        structures: structures to colour; those of the shipped weights if not given.

    Returns:
        Python source.
    """
    chosen = Protocol.load("synthseg_head").structures[1:] if structures is None else structures
    colours = {s.name.lower(): list(s.colour) for s in chosen}
    rows = ",\n".join(f"    {json.dumps(name)}: {colour}" for name, colour in colours.items())
    return SCRIPT.format(server=json.dumps(server), colours=f"{{\n{rows},\n}}")
