"""The arrays of one scan as the page shows them: turned to RAS, cut to the brain, sliced in three planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch

from brainfm_monai.anatomy import Protocol
from brainfm_monai.outputs import ScanResult, fit_scan_to_template, resample
from brainfm_monai.outputs.template import load_template
from brainfm_monai.outputs.warps import resample_through

__all__ = ["PLANES", "Page", "Plane"]

WINDOW_PERCENTILES = (0.5, 99.5)  # of the intensities within the brain, so that skin fat or bone does not darken it
BOX_QUANTILES = (
    0.002,
    0.998,
)  # of the cerebrum's and cerebellum's voxels along an axis: a stray voxel does not widen the box
MARGIN_MM = 22.0  # shown around the box: skull and scalp, not the neck


class Plane(NamedTuple):
    """A plane of slices.

    Attributes:
        name: name in anatomy.
        axis: RAS axis that it is cut across.
        horizontal: axis along the rows of a picture.
        vertical: axis along the columns of a picture.
        marks: letters of the side on the picture's left and right.
    """

    name: str
    axis: int
    horizontal: int
    vertical: int
    marks: str


PLANES = (Plane("axial", 2, 0, 1, "RL"), Plane("coronal", 1, 0, 2, "RL"), Plane("sagittal", 0, 1, 2, "AP"))


@dataclass(frozen=True)
class Page:
    """The arrays of a scan turned to the closest RAS axes, without resampling.

    They are cut to the brain and a margin around it.

    Attributes:
        image: the scan, shape (H, W, D).
        labels: label map, shape (H, W, D).
        maps: other maps, each of shape (H, W, D, C); the bias field relative to its median in the head (its scale is free).
        zooms_mm: voxel size along each axis.
        protocol: names and colours of the labels.
        window: intensities shown black and white.
        box: first and last index of the brain along each axis; of the whole image where there is none.
    """

    image: np.ndarray
    labels: np.ndarray
    maps: dict[str, np.ndarray]
    zooms_mm: np.ndarray
    protocol: Protocol
    window: tuple[float, float]
    box: list[tuple[int, int]]

    @classmethod
    def of(cls, scan: ScanResult) -> Page:
        """Turn and cut the scan, and bring its maps to that grid."""
        turn = nib.orientations.io_orientation(scan.affine)
        affine = scan.affine @ nib.orientations.inv_ornt_aff(turn, scan.labels.shape)
        zooms = nib.affines.voxel_sizes(affine)
        labels = nib.orientations.apply_orientation(scan.labels, turn)
        protocol = scan.layout.protocol
        box = _brain_box(labels, protocol)
        margin = [round(MARGIN_MM / zoom) for zoom in zooms]
        window = tuple(slice(max(first - m, 0), last + 1 + m) for (first, last), m in zip(box, margin, strict=True))
        labels = labels[window]
        image = np.asarray(nib.orientations.apply_orientation(scan.image.cpu().numpy()[0], turn)[window])
        affine[:3, 3] += affine[:3, :3] @ [cut.start for cut in window]
        shown = [name for name in scan.maps if name != "segmentation"]
        maps = {
            name: np.moveaxis(resample(scan.maps[name], labels.shape, affine).cpu().numpy(), 0, -1) for name in shown
        }
        if "bias_field" in maps and (head := labels > 0).any():
            maps["bias_field"] = maps["bias_field"] / np.median(maps["bias_field"][head])
        box = [(first - cut.start, last - cut.start) for (first, last), cut in zip(box, window, strict=True)]
        page = cls(image, labels, maps, zooms, protocol, _grey_window(image, labels, protocol), box)
        if "mni" in maps and page.has_brain:
            maps["template"] = _template_in(scan, labels.shape, affine)[..., None]
        return page

    @property
    def has_brain(self) -> bool:
        """Whether any voxel belongs to a structure of the brain."""
        return bool(np.isin(self.labels, _brain_labels(self.protocol)).any())

    def cut(self, volume: np.ndarray, plane: Plane, index: int) -> np.ndarray:
        """A slice as rows and columns of a picture with origin below, right or anterior on the picture's left."""
        return np.swapaxes(volume.take(index, axis=plane.axis)[::-1], 0, 1)

    def aspect(self, plane: Plane) -> float:
        """Height of a voxel in a picture of the plane, relative to its width."""
        return float(self.zooms_mm[plane.vertical] / self.zooms_mm[plane.horizontal])


def _template_in(scan: ScanResult, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The template laid over a grid of the scan's space."""
    template, template_affine = load_template()
    try:
        return resample_through(
            torch.from_numpy(template)[None], template_affine, shape, affine, fit_scan_to_template(scan)
        )
    except ValueError:  # too little brain for a fit
        return np.zeros(shape, dtype=np.float32)


def _brain_labels(protocol: Protocol) -> list[int]:
    return [int(label) for label in np.flatnonzero(protocol.is_brain)]


def _brain_box(labels: np.ndarray, protocol: Protocol) -> list[tuple[int, int]]:
    """First and last index along each axis of cerebrum and cerebellum, which are the brain's structures with a side."""
    brain = protocol.is_hemisphere[labels]
    box = []
    for axis in range(3):
        count = np.cumsum(brain.sum(axis=tuple(a for a in range(3) if a != axis)))
        if not count[-1]:
            return [(0, n - 1) for n in labels.shape]
        first, last = np.searchsorted(count, np.array(BOX_QUANTILES) * count[-1])
        box.append((int(first), int(last)))
    return box


def _grey_window(image: np.ndarray, labels: np.ndarray, protocol: Protocol) -> tuple[float, float]:
    brain = np.isin(labels, _brain_labels(protocol))
    low, high = np.percentile(image[brain] if brain.any() else image, WINDOW_PERCENTILES)
    margin = 0.1 * (high - low)
    return max(float(low - margin), float(image.min())), float(high + margin)
