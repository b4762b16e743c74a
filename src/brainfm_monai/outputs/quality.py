"""What may be wrong with a result: entropy of the labels, and warnings by rules that are written in one table."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict

import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.io import ABSENT, write_table, write_text
from brainfm_monai.outputs.maps import compute_totals_mm3, hard_volumes_mm3, structure_entropy
from brainfm_monai.outputs.result import ScanResult, as_json, begun_ahead, once_per_scan
from brainfm_monai.outputs.template import fit_affine_to_template
from brainfm_monai.transforms import HEMISPHERES, MODES

ENTROPY_STEP = 1e-3
BORDER_CM2 = 1.0  # of brain on a side of the field of view: more than a stray voxel
INTRACRANIAL_RANGE_ML = (900.0, 2100.0)  # of adults, with a margin (means near 1500, standard deviations near 150)
ASYMMETRY = 3.0  # one side of a structure has so many times the volume of the other
COMPARED_ML = 0.5  # volume below which sides are not compared
ENTROPY_LIMIT = 0.35  # mean entropy within the brain, of its maximum; the first weights have 0.25 to 0.29 on real scans
BONE_ID = 515  # of FreeSurfer: cortical bone
BONE_ML = 10.0  # volume from which its brightness is looked at: less is found in brain-extracted scans, too
BONE_SHARE = 0.8  # of the brain's brightness: 0.08 to 0.45 in 14 open scans of magnetic resonance, 1 and more in CT
TURN_DEG = 60.0  # by which a head may lie askew: 90 and more are axes that were exchanged
SIDE_NAMES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))


@once_per_scan
def brain_entropy(scan: ScanResult) -> float:
    """Mean entropy of the voxels of the brain in the network's grid; NaN where there is no brain."""
    brain = scan.layout.protocol.is_brain[scan.in_network_grid("segmentation")]
    return float(scan.in_network_grid("entropy")[brain].mean(dtype=np.float64)) if brain.any() else float("nan")


def _out_of_view(scan: ScanResult) -> Iterator[str]:
    """Brain tissue on the sides of the scan; the brainstem may leave it below, as the spinal cord does."""
    brain, axes = scan.layout.protocol.is_hemisphere[scan.labels], scan.affine[:3, :3]
    for axis in range(3):
        face_mm2 = np.linalg.norm(np.cross(axes[:, axis - 2], axes[:, axis - 1]))
        world = int(np.abs(axes[:, axis] / np.linalg.norm(axes[:, axis])).argmax())
        for end in (0, -1):
            area_cm2 = float(brain.take(end, axis=axis).sum() * face_mm2 / 100)
            if area_cm2 > BORDER_CM2:
                side = SIDE_NAMES[world][int((axes[world, axis] > 0) == (end == -1))]
                yield f"part of the brain is out of view: {area_cm2:.0f} cm^2 of it lie on the {side} side of the scan"


def _volumes(scan: ScanResult) -> Iterator[str]:
    protocol, volumes = scan.layout.protocol, hard_volumes_mm3(scan) / 1000
    if scan.settings.mode in ("whole_head", "brain"):
        total, (low, high) = compute_totals_mm3(volumes, protocol)["Intracranial-Volume"], INTRACRANIAL_RANGE_ML
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
    protocol, right_mm = scan.layout.protocol, []
    for side in ("left", "right"):
        members = protocol.is_brain & np.array([s.side == side for s in protocol.structures])
        counts = [members[scan.labels].sum(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
        if counts[0].any():
            centre = [np.average(np.arange(len(count)), weights=count) for count in counts]
            right_mm.append(apply_affine(scan.affine, centre)[0])
    if len(right_mm) == 2 and right_mm[0] >= right_mm[1] and not MODES[scan.settings.mode].excluded_side:
        yield "left and right contradict the affine: structures of the left side lie to the right"


def _direction(scan: ScanResult) -> Iterator[str]:
    """The head's axes by the template coordinates against those of the affine."""
    matrix = np.eye(4)
    with suppress(ValueError, np.linalg.LinAlgError):
        matrix = fit_affine_to_template(scan) if "mni" in scan.maps else matrix
    left, _, right = np.linalg.svd(matrix[:3, :3])
    turn_deg = np.degrees(np.arccos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1)))
    if np.linalg.det(matrix[:3, :3]) <= 0:
        yield "left and right contradict the affine: the head is mirrored on its way to the template"
    elif turn_deg > TURN_DEG:
        yield f"the head lies {turn_deg:.0f} degrees from the axes of the affine: the orientation may be wrong"


def _uncertain(scan: ScanResult) -> Iterator[str]:
    if "entropy" in scan.maps and (mean := brain_entropy(scan)) > ENTROPY_LIMIT:
        yield f"the segmentation is uncertain: mean entropy within the brain is {mean:.2f} of its maximum"


def _bone(scan: ScanResult) -> Iterator[str]:
    """Bone as bright as the brain: a CT of unknown units, which was taken for magnetic resonance."""
    if scan.normalised is None or not scan.modality.startswith("mr"):
        return
    ids = scan.layout.protocol.freesurfer_ids[scan.in_network_grid("segmentation")]
    bone, brain = ids == BONE_ID, np.isin(ids, [*HEMISPHERES.values()])
    if bone.sum() * abs(np.linalg.det(scan.network_affine)) / 1000 >= BONE_ML and brain.any():
        values = scan.normalised.cpu().numpy()
        if np.median(values[bone]) > BONE_SHARE * np.median(values[brain]):
            yield "bone is as bright as brain: if this is a CT, Hounsfield units are needed, found another scale"


RULES = (_out_of_view, _volumes, _sides, _direction, _uncertain, _bone)


def collect_warnings(scan: ScanResult) -> list[str]:
    """What the rules find, one sentence each; where there is no brain, that alone is reported."""
    if not scan.layout.protocol.is_brain[scan.labels].any():
        return ["no brain was found in this scan"]
    return [warning for rule in RULES for warning in rule(scan)]


@once_per_scan
def _write_entropy(scan: ScanResult) -> None:
    """Write the entropy map and its mean for each structure; neither is there without probabilities."""
    if "entropy" in scan.maps:
        shown = [ABSENT if np.isnan(mean) else f"{mean:.4f}" for mean in structure_entropy(scan)]
        rows = [(s.label, s.name, shown[s.label]) for s in scan.layout.protocol.structures[1:]]
        write_table(scan.path("qc.tsv"), ("index", "name", "mean_entropy"), rows)
        text = "entropy of the label probabilities over the logarithm of the number of labels: 0 certain, 1 unknown"
        entropy, unit = scan.in_grid("entropy")[0], "share of the maximum"
        scan.save_image("desc-entropy_probseg", entropy, step=ENTROPY_STEP, Units=unit, Description=text)


@begun_ahead(_write_entropy, shown=True)
def write_quality(scan: ScanResult) -> None:
    """Write the entropy map, its mean for each structure (``_qc.tsv``), and the warnings (``_qc.json``)."""
    entries: dict[str, object] = {"Warnings": scan.warnings}
    _write_entropy(scan)
    if "entropy" in scan.maps:
        entries["MeanEntropyOfTheBrain"] = scan.summary["brain_entropy"] = round(brain_entropy(scan), 4)
    write_text(scan.path("qc.json"), as_json({**entries, "GeneratedBy": asdict(scan.settings)}))
