"""What may be wrong with a result: entropy of the labels, and warnings by rules that are written in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.io import write_table, write_text
from brainfm_monai.outputs.result import ScanResult
from brainfm_monai.outputs.segmentation import compute_totals_mm3, compute_volumes_mm3
from brainfm_monai.outputs.warps import fit_affine_to_template
from brainfm_monai.transforms import MODES

__all__ = ["RULES", "collect_warnings", "structure_entropy", "write_quality"]

ENTROPY_STEP = 1e-3
BORDER_CM2 = 1.0  # of brain on a side of the field of view: more than a stray voxel
INTRACRANIAL_RANGE_ML = (900.0, 2100.0)  # of adults, with a margin (means near 1500, standard deviations near 150)
ASYMMETRY = 3.0  # one side of a structure has so many times the volume of the other
COMPARED_ML = 0.5  # volume below which sides are not compared
ENTROPY_LIMIT = 0.35  # mean entropy within the brain, of its maximum; the first weights have 0.25 to 0.29 on real scans
TURN_DEG = 60.0  # by which a head may lie askew: 90 and more are axes that were exchanged
SIDE_NAMES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))


def structure_entropy(scan: ScanResult) -> np.ndarray:
    """Mean entropy of the voxels of each label in the network's grid, shape (L,); NaN where a label has none."""
    labels = scan.maps["segmentation"].cpu().numpy().reshape(-1)
    entropy = scan.maps["entropy"].cpu().numpy().reshape(-1)
    count = np.bincount(labels, minlength=len(scan.layout.protocol))
    total = np.bincount(labels, weights=entropy, minlength=len(count))
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _no_brain(scan: ScanResult) -> Iterator[str]:
    if not scan.layout.protocol.is_brain[scan.labels].any():
        yield "no brain was found in this scan"


def _out_of_view(scan: ScanResult) -> Iterator[str]:
    """Brain tissue on the sides of the scan; the brainstem may leave it below, as the spinal cord does."""
    brain = scan.layout.protocol.is_hemisphere[scan.labels]
    axes = scan.affine[:3, :3]
    for axis in range(3):
        others = [i for i in range(3) if i != axis]
        face_mm2 = np.linalg.norm(np.cross(axes[:, others[0]], axes[:, others[1]]))
        world = int(np.abs(axes[:, axis] / np.linalg.norm(axes[:, axis])).argmax())
        for end in (0, -1):
            area_cm2 = float(brain.take(end, axis=axis).sum() * face_mm2 / 100)
            if area_cm2 > BORDER_CM2:
                positive = (axes[world, axis] > 0) == (end == -1)
                side = SIDE_NAMES[world][int(positive)]
                yield f"part of the brain is out of view: {area_cm2:.0f} cm^2 of it lie on the {side} side of the scan"


def _volumes(scan: ScanResult) -> Iterator[str]:
    protocol = scan.layout.protocol
    volumes = compute_volumes_mm3(scan.labels, scan.affine, len(protocol)) / 1000
    if scan.settings.mode in ("whole_head", "brain"):
        total = compute_totals_mm3(volumes, protocol)["Intracranial-Volume"]
        low, high = INTRACRANIAL_RANGE_ML
        if not low <= total <= high:
            yield f"implausible intracranial volume: {total:.0f} mL, of adults {low:.0f} to {high:.0f} mL are known"
    if MODES[scan.settings.mode].excluded_side:
        return
    for structure in protocol.structures:
        if structure.side == "left" and protocol.is_brain[structure.label]:
            left, right = volumes[structure.label], volumes[structure.mirror]
            if max(left, right) > max(ASYMMETRY * min(left, right), COMPARED_ML):
                name = structure.name.removeprefix("Left-")
                yield f"left and right differ: {name} has {left:.1f} mL on the left and {right:.1f} mL on the right"


def _sides(scan: ScanResult) -> Iterator[str]:
    """Left structures to the left of right ones, in the coordinates of the affine."""
    if MODES[scan.settings.mode].excluded_side:
        return
    protocol = scan.layout.protocol
    centre = {}
    for side in ("left", "right"):
        members = protocol.is_brain & np.array([s.side == side for s in protocol.structures])
        voxels = np.argwhere(members[scan.labels])
        if not len(voxels):
            return
        centre[side] = apply_affine(scan.affine, voxels.mean(axis=0))
    if centre["left"][0] >= centre["right"][0]:
        yield "left and right contradict the affine: structures of the left side lie to the right"


def _direction(scan: ScanResult) -> Iterator[str]:
    """The head's axes by the template coordinates against those of the affine."""
    if "mni" not in scan.maps:
        return
    try:
        matrix = fit_affine_to_template(scan)
    except (ValueError, np.linalg.LinAlgError):
        return
    if np.linalg.det(matrix[:3, :3]) <= 0:
        yield "left and right contradict the affine: the head is mirrored on its way to the template"
        return
    left, _, right = np.linalg.svd(matrix[:3, :3])
    turn_deg = np.degrees(np.arccos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1)))
    if turn_deg > TURN_DEG:
        yield f"the head lies {turn_deg:.0f} degrees from the axes of the affine: the orientation may be wrong"


def _uncertain(scan: ScanResult) -> Iterator[str]:
    if "entropy" not in scan.maps:
        return
    brain = scan.layout.protocol.is_brain[scan.maps["segmentation"].cpu().numpy()[0]]
    mean = float(scan.maps["entropy"].cpu().numpy()[0][brain].mean()) if brain.any() else 0.0
    if mean > ENTROPY_LIMIT:
        yield f"the segmentation is uncertain: mean entropy within the brain is {mean:.2f} of its maximum"


RULES: tuple[Callable[[ScanResult], Iterator[str]], ...] = (
    _no_brain,
    _out_of_view,
    _volumes,
    _sides,
    _direction,
    _uncertain,
)


def collect_warnings(scan: ScanResult) -> list[str]:
    """What the rules find, one sentence each; where there is no brain, that alone is told."""
    if nothing := list(_no_brain(scan)):
        return nothing
    return [found for rule in RULES for found in rule(scan)]


def write_quality(scan: ScanResult) -> None:
    """Write the entropy map, its mean for each structure (``_qc.tsv``), and the warnings (``_qc.json``)."""
    structures = scan.layout.protocol.structures
    entries: dict[str, object] = {"Warnings": scan.warnings}
    if "entropy" in scan.maps:
        mean = structure_entropy(scan)
        rows = [(s.label, s.name, "n/a" if np.isnan(mean[s.label]) else f"{mean[s.label]:.4f}") for s in structures[1:]]
        write_table(scan.path("qc.tsv"), ("index", "name", "mean_entropy"), rows)
        entropy = scan.in_grid("entropy")[0]
        scan.save_image(
            "desc-entropy_probseg",
            entropy,
            step=ENTROPY_STEP,
            Units="share of the maximum",
            Description="entropy of the label probabilities over the logarithm of the number of labels: 0 certain, 1 unknown",
        )
        brain = scan.layout.protocol.is_brain
        voxels = np.bincount(scan.maps["segmentation"].cpu().numpy().reshape(-1), minlength=len(structures))
        known = brain & (voxels > 0)
        overall = float((mean[known] * voxels[known]).sum() / voxels[known].sum()) if known.any() else float("nan")
        entries["MeanEntropyOfTheBrain"] = scan.summary["brain_entropy"] = round(overall, 4)
    text = json.dumps({**entries, "GeneratedBy": asdict(scan.settings)}, indent=2)
    write_text(scan.path("qc.json"), text + "\n")
