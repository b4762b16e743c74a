"""The faults of a set of subjects, found in its files."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.anatomy import Protocol, is_brain
from brainfm_monai.data.datalist import PROTOCOLS, check_protocols, count_subjects, find_subjects, read_datalist
from brainfm_monai.data.labels import PIAL_IDS, WHITE_IDS
from brainfm_monai.data.registration import coarsen_affine, compute_jacobian
from brainfm_monai.data.subjects import CONTRASTS, STORAGE, run_parallel
from brainfm_monai.io import Volume, read_volume, refuse_if

logger = logging.getLogger(__name__)

BRAIN_RANGE_ML = (400.0, 2600.0)  # an infant of some months; the largest brains measured, with ventricles
GRID_TOLERANCE_MM = 0.01
MINIMUM_AGREEMENT = 0.8  # Dice of the inside of a boundary and of the labels in it: surfaces and labels differ
MINIMUM_SEPARATION_MM = 5.0  # of the centroids of left and right
CEREBELLUM_IDS = (7, 8, 46, 47)
CEREBELLUM_DIRECTION = (0.0, -0.6, -0.8)  # of its centroid from that of the cerebrum in MNI152, in RAS
MAXIMUM_TILT_DEG = 75.0  # between that direction and the head's; an exchanged or mirrored axis makes 90 and more
MAXIMUM_SIDE_RATIO = 2.0  # of a structure's two volumes; in SynthSeg's maps up to 1.6, but for one with a hole (3.4)
MINIMUM_SIDES_ML = 0.5  # of both together: below, a few voxels decide
MAXIMUM_MNI_MM = 150.0
MINIMUM_TARGET_SHARE = 0.001  # of the box
CHANNELS = {"lp": PIAL_IDS["left"], "lw": WHITE_IDS["left"], "rp": PIAL_IDS["right"], "rw": WHITE_IDS["right"]}
LABELS = ("generation_labels", "segmentation")  # in the order of PROTOCOLS
Fault = tuple[str, str]  # the rule, and what was found


class Finding(NamedTuple):
    """A fault: the subject, the rule that it breaks, and what was found."""

    subject: str
    rule: str
    found: str


def check_data(source: str | Path, jobs: int = 1) -> None:
    """Look for faults in subjects; the exit status is 1 if there are any.

    Grids, ids, empty targets, intensities, left and right, heads on their side or implausible, distances that disagree
    with labels, coordinates that fold, and several protocols.

    Args:
        source: datalist, or folder of prepared subjects.
        jobs: subjects that are checked at once; each needs about 2 GB.
    """
    findings, entries = check_set(Path(source), jobs)
    logger.info("%s", count_subjects(entries).to_string(index=False))
    if findings:
        lines = [f"{len(findings)} faults in {len(entries)} subjects:", *(": ".join(finding) for finding in findings)]
        raise SystemExit("\n".join(lines))


def check_set(source: Path, jobs: int = 1) -> tuple[list[Finding], list[dict[str, Any]]]:
    """The faults of subjects, and the subjects; FileNotFoundError or ValueError if there are no subjects."""
    entries = read_datalist(source) if source.is_file() else find_subjects(source)
    refuse_if(not entries, f"{source}: subjects are needed", "none")
    findings: list[Finding] = []
    for entry, outcome in run_parallel(check_subject, entries, jobs):
        if isinstance(outcome, BaseException):
            outcome = [Finding(str(entry["subject"]), "readable", str(outcome))]
        findings += outcome
    try:
        check_protocols(entries, str(source))
    except ValueError as error:
        findings.append(Finding("all", "one protocol", str(error)))
    return findings, entries


class _Subject(dict[str, Volume]):
    """The volumes of an item with whole paths, read when they are asked for, in this package's units."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry, self.present = entry, [key for key in STORAGE if key in entry]

    def __missing__(self, key: str) -> Volume:
        volume = read_volume(self.entry[key], "all")  # shape (H, W, D, C)
        is_single = volume.values.shape[3] == 1
        return self.setdefault(key, replace(volume, values=volume.values[..., 0]) if is_single else volume)

    @cached_property
    def protocol(self) -> Protocol:
        return Protocol.load(str(self.entry.get("protocol", "synthseg_head")))

    @cached_property
    def ids(self) -> np.ndarray:
        table = np.append(self.protocol.freesurfer_ids, 0)  # labels that the protocol lacks are 0
        return table[np.minimum(self["segmentation"].values.astype(np.int64), len(self.protocol))]


def check_subject(entry: Mapping[str, Any]) -> list[Finding]:
    """Every rule that the files of an item with whole paths break; what cannot be read breaks a rule, too."""
    subject, faults = _Subject(entry), []
    for what, (needed, look) in LOOKS.items():
        try:
            faults += list(look(subject)) if needed <= set(subject.present) else []
        except Exception as error:
            faults.append((what, " ".join(str(error).split()) or type(error).__name__))
    return [Finding(str(entry["subject"]), *fault) for fault in faults]


def _look_at_grids(subject: _Subject) -> Iterator[Fault]:
    shape_of = {key: subject[key].values.shape[:3] for key in subject.present}
    first = next((key for key in subject.present if key != "mni"), "")
    for key, shape in shape_of.items() if first else ():
        ratio = np.array(shape_of[first]) / shape
        offset_mm = np.abs(coarsen_affine(subject[first].affine, int(ratio[0])) - subject[key].affine).max()
        divides = len(set(ratio)) == 1 and (ratio[0] % 1 == 0 if key == "mni" else ratio[0] == 1)
        if not divides or offset_mm > GRID_TOLERANCE_MM:
            rule = "divide the box" if key == "mni" else "lie on the grid"
            yield "one grid", f"{key} {shape} does not {rule} of {first} {shape_of[first]}"


def _look_at_ids(subject: _Subject) -> Iterator[Fault]:
    for key, fact in zip(LABELS, PROTOCOLS, strict=True):
        if key in subject.present and fact in subject.entry:
            protocol = Protocol.load(str(subject.entry[fact]))
            if unknown := [int(i) for i in np.unique(subject[key].values) if i >= len(protocol)]:
                found = f"{key} holds {unknown[:5]}, and protocol '{protocol.name}' has {len(protocol)} labels"
                yield "known ids", found


def _look_at_values(subject: _Subject) -> Iterator[Fault]:
    for key in subject.present:
        values = subject[key].values
        low, high = float(values.min()), float(values.max())
        if key in LABELS and (values > 0).mean() < MINIMUM_TARGET_SHARE:
            yield "targets", f"{key} is empty"
        for channel, name in enumerate(CHANNELS if key == "distance" else ()):
            if not (values[..., channel] < 0).any():
                yield "targets", f"distance {name} is negative nowhere"
        if key in (*CONTRASTS, "mni") and low == high:
            yield "targets", f"{key} is {low:g} everywhere"
        if key == "CT" and low > -500:
            yield "intensities", f"CT begins at {low:.0f}: HU are needed, with air at about -1000"
        elif key in CONTRASTS and key != "CT" and (low < -0.01 or high > 1.01):
            yield "intensities", f"{key} ranges from {low:.3g} to {high:.3g}: [0, 1] is needed"


def _look_at_anatomy(subject: _Subject) -> Iterator[Fault]:
    protocol, affine = subject.protocol, subject["segmentation"].affine

    def find_centroid(ids: Sequence[int]) -> np.ndarray:
        voxels = np.argwhere(np.isin(subject.ids, ids))
        return apply_affine(affine, voxels.mean(axis=0)) if len(voxels) else np.full(3, np.nan)

    left, right = (find_centroid(PIAL_IDS[side]) for side in ("left", "right"))
    if right[0] - left[0] < MINIMUM_SEPARATION_MM:
        found = f"left hemisphere at x = {left[0]:.0f} mm, right one at {right[0]:.0f} mm in the affine's RAS"
        yield "left and right", found
    away = find_centroid(CEREBELLUM_IDS) - find_centroid(PIAL_IDS["left"] + PIAL_IDS["right"])
    cosine = away @ CEREBELLUM_DIRECTION / np.maximum(np.linalg.norm(away), 1e-6)
    if cosine < np.cos(np.deg2rad(MAXIMUM_TILT_DEG)):
        x, y, z = away
        place = f"cerebellum {x:.0f} mm right, {y:.0f} mm in front of and {z:.0f} mm above the cerebrum"
        yield "axes", f"{place} in the affine's RAS, where it lies behind and below"
    labels = np.minimum(subject["segmentation"].values.astype(np.int64), len(protocol))  # others are another rule's
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    ml = np.bincount(labels.ravel(), minlength=len(protocol) + 1) * voxel_ml
    for label, mirror in enumerate(protocol.mirror_permutation):
        small, large = sorted((ml[label], ml[mirror]))
        # the sides of fluid differ in health as well
        is_pair = label < mirror and not protocol.is_fluid[label] and small + large > MINIMUM_SIDES_ML
        if is_pair and large > MAXIMUM_SIDE_RATIO * small:
            names = protocol.structures[label].name, protocol.structures[mirror].name
            yield "sides alike", f"{names[0]} has {ml[label]:.1f} ml and {names[1]} {ml[mirror]:.1f} ml"
    brain_ml, (low, high) = (is_brain(subject.ids) & (subject.ids != 24)).sum() * voxel_ml, BRAIN_RANGE_ML
    if not low <= brain_ml <= high:
        yield "head size", f"brain of {brain_ml:.0f} ml, {low:.0f} to {high:.0f} are plausible"


def _look_at_distances(subject: _Subject) -> Iterator[Fault]:
    for channel, (name, ids) in enumerate(CHANNELS.items()):
        inside, labelled = subject["distance"].values[..., channel] < 0, np.isin(subject.ids, ids)
        dice = 2 * float((inside & labelled).sum()) / max(1, int(inside.sum() + labelled.sum()))
        if dice < MINIMUM_AGREEMENT:
            yield "distances", f"inside of channel {name} and the labels in it overlap with Dice {dice:.2f}"


def _look_at_coordinates(subject: _Subject) -> Iterator[Fault]:
    mni = subject["mni"].values
    step = subject.ids.shape[0] // mni.shape[0]
    ids = subject.ids[(slice(step // 2, None, step),) * 3]
    brain, sides = is_brain(ids), [mni[np.isin(ids, PIAL_IDS[side])] for side in ("left", "right")]
    if all(map(len, sides)):
        left, right = (float(side[:, 0].mean()) for side in sides)
        if right - left < MINIMUM_SEPARATION_MM:
            yield "coordinates", f"left hemisphere at MNI x = {left:.0f} mm, right one at {right:.0f} mm"
    if folded := int((compute_jacobian(mni, subject["mni"].affine)[brain] <= 0).sum()):
        yield "coordinates", f"the map to MNI space folds at {folded} of {int(brain.sum())} brain voxels"
    if brain.any() and np.abs(mni[brain]).max() > MAXIMUM_MNI_MM:
        yield "coordinates", f"brain at {np.abs(mni[brain]).max():.0f} mm from the template's origin"


LOOKS: dict[str, tuple[set[str], Callable[[_Subject], Iterator[Fault]]]] = {  # with the volumes that each needs
    "one grid": (set(), _look_at_grids),
    "known ids": (set(), _look_at_ids),
    "targets": (set(), _look_at_values),
    "left and right": ({"segmentation"}, _look_at_anatomy),
    "distances": ({"distance", "segmentation"}, _look_at_distances),
    "coordinates": ({"mni", "segmentation"}, _look_at_coordinates),
}
