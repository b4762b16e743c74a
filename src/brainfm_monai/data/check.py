"""The faults of a set of subjects, found in its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.anatomy import Protocol, is_brain, is_fluid
from brainfm_monai.data.contact_sheet import write_contact_sheet
from brainfm_monai.data.datalist import check_protocols, find_subjects, read_datalist
from brainfm_monai.data.distances import PIAL_IDS, WHITE_IDS
from brainfm_monai.data.loading import LoadSubjectd
from brainfm_monai.data.registration import coarsen_affine, compute_jacobian
from brainfm_monai.data.subjects import CONTRASTS, STORAGE, run_parallel

__all__ = ["RULES", "Finding", "LoadedSubject", "check_set", "check_subject"]

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


class Finding(NamedTuple):
    """A fault: the subject, the rule that it breaks, and what was found."""

    subject: str
    rule: str
    found: str


class LoadedSubject:
    """The volumes of an item of a datalist with whole paths, read when they are asked for, in this package's units."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry = entry
        self.keys = [key for key in STORAGE if key in entry or key in entry.get("simulated", ())]
        self._read: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, key: str) -> np.ndarray:
        """Values of a volume, shape (H, W, D) or (H, W, D, C)."""
        return self._load(key)[0]

    def affine(self, key: str) -> np.ndarray:
        """Voxels of a volume to RAS mm."""
        return self._load(key)[1]

    def _load(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        if key not in self._read:
            volume = LoadSubjectd(key)(self.entry)[key]
            values = volume.as_tensor().numpy()
            self._read[key] = (np.moveaxis(values, 0, -1) if len(values) > 1 else values[0], volume.affine.numpy())
        return self._read[key]

    @cached_property
    def protocol(self) -> Protocol:
        """Protocol of the segmentation."""
        return Protocol.load(str(self.entry.get("protocol", "synthseg_head")))

    @cached_property
    def ids(self) -> np.ndarray:
        """FreeSurfer ids of the segmentation; labels that the protocol lacks are 0."""
        table = np.append(self.protocol.freesurfer_ids, 0)
        return table[np.minimum(self["segmentation"].astype(np.int64), len(self.protocol))]

    @cached_property
    def voxel_ml(self) -> float:
        """Volume of a voxel of the segmentation."""
        return float(abs(np.linalg.det(self.affine("segmentation")[:3, :3])) / 1000)

    def centroid(self, ids: Sequence[int]) -> np.ndarray | None:
        """Centroid of some ids in RAS mm, shape (3,); None where there are none."""
        voxels = np.argwhere(np.isin(self.ids, ids))
        return apply_affine(self.affine("segmentation"), voxels.mean(axis=0)) if len(voxels) else None


def check_set(
    source: str | Path, *, jobs: int = 1, picture_dir: str | Path | None = None
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Check every subject of a datalist or a folder.

    Args:
        source: datalist, or a folder that :func:`find_subjects` reads.
        jobs: number of processes; each needs about 2 GB.
        picture_dir: folder for one contact sheet per subject; none are drawn without it.

    Returns:
        The faults, and the entries that were checked.

    Raises:
        FileNotFoundError: if there is no such list or folder.
        ValueError: if it holds no subject.
    """
    path = Path(source)
    entries = read_datalist(path) if path.is_file() else find_subjects(path)
    if not entries:
        raise ValueError(f"{source}: subjects are needed, found none")
    findings: list[Finding] = []
    work = partial(check_subject, picture_dir=Path(picture_dir) if picture_dir else None)
    for entry, outcome in run_parallel(work, entries, jobs):
        if isinstance(outcome, BaseException):
            outcome = [Finding(str(entry["subject"]), "readable", str(outcome))]
        findings += outcome
    try:
        check_protocols(entries, str(source))
    except ValueError as error:
        findings.append(Finding("all", "one protocol", str(error)))
    return findings, entries


def check_subject(entry: Mapping[str, Any], picture_dir: Path | None = None) -> list[Finding]:
    """Every rule that the files of a subject break; a rule that cannot be looked at because a file is unreadable is broken.

    Args:
        entry: item of a datalist with whole paths.
        picture_dir: folder for a contact sheet; none is drawn without it.
    """
    name, subject, findings = str(entry["subject"]), LoadedSubject(entry), []
    for rule, (needed, look) in RULES.items():
        try:
            if needed <= set(subject.keys):
                findings += [Finding(name, rule, found) for found in look(subject)]
        except Exception as error:
            findings.append(Finding(name, rule, " ".join(str(error).split()) or type(error).__name__))
    findings = list(dict.fromkeys(findings))
    if picture_dir is not None:
        faults = [f"{finding.rule}: {finding.found}" for finding in findings]
        try:
            write_contact_sheet(subject, picture_dir / f"{name}.png", faults)
        except Exception as error:
            findings.append(Finding(name, "picture", " ".join(str(error).split())))
    return findings


Look = Callable[[LoadedSubject], Iterator[str]]
RULES: dict[
    str, tuple[set[str], Look]
] = {}  # by name: the volumes without which a rule cannot be broken, and the faults


def _rule(name: str, *needed: str) -> Callable[[Look], Look]:
    def add(look: Look) -> Look:
        RULES[name] = (set(needed), look)
        return look

    return add


@_rule("one grid")
def _grids_agree(subject: LoadedSubject) -> Iterator[str]:
    keys = [key for key in subject.keys if key != "mni"]
    shape_of = {key: subject[key].shape[:3] for key in subject.keys}
    for key in keys[1:]:
        offset_mm = np.abs(subject.affine(key) - subject.affine(keys[0])).max()
        if shape_of[key] != shape_of[keys[0]] or offset_mm > GRID_TOLERANCE_MM:
            yield f"{key} {shape_of[key]} does not lie on the grid of {keys[0]} {shape_of[keys[0]]}"
    if keys and "mni" in shape_of:
        ratio = np.array(shape_of[keys[0]]) / shape_of["mni"]
        offset_mm = np.abs(coarsen_affine(subject.affine(keys[0]), int(ratio[0])) - subject.affine("mni")).max()
        if len(set(ratio)) > 1 or ratio[0] % 1 or offset_mm > GRID_TOLERANCE_MM:
            yield f"mni {shape_of['mni']} does not divide the box of {keys[0]} {shape_of[keys[0]]}"


@_rule("known ids")
def _ids_are_known(subject: LoadedSubject) -> Iterator[str]:
    for key, fact in (("segmentation", "protocol"), ("generation_labels", "generation_protocol")):
        if key in subject.keys and fact in subject.entry:
            protocol = Protocol.load(str(subject.entry[fact]))
            unknown = [int(i) for i in np.unique(subject[key]) if i >= len(protocol)]
            if unknown:
                yield f"{key} holds {unknown[:5]}, and protocol '{protocol.name}' has {len(protocol)} labels"


@_rule("targets")
def _targets_hold_something(subject: LoadedSubject) -> Iterator[str]:
    for key in ("generation_labels", "segmentation"):
        if key in subject.keys and (subject[key] > 0).mean() < MINIMUM_TARGET_SHARE:
            yield f"{key} is empty"
    for channel, name in enumerate(CHANNELS if "distance" in subject.keys else ()):
        if not (subject["distance"][..., channel] < 0).any():
            yield f"distance {name} is negative nowhere"
    for key in (*CONTRASTS, "mni"):
        if key in subject.keys and subject[key].min() == subject[key].max():
            yield f"{key} is {float(subject[key].min()):g} everywhere"


@_rule("intensities")
def _values_are_in_range(subject: LoadedSubject) -> Iterator[str]:
    for key in (key for key in CONTRASTS if key in subject.keys):
        low, high = float(subject[key].min()), float(subject[key].max())
        if key == "CT" and low > -500:
            yield f"CT begins at {low:.0f}: HU are needed, with air at about -1000"
        if key != "CT" and (low < -0.01 or high > 1.01):
            yield f"{key} ranges from {low:.3g} to {high:.3g}: [0, 1] is needed"


@_rule("left and right", "segmentation")
def _sides_are_right(subject: LoadedSubject) -> Iterator[str]:
    left, right = (subject.centroid(PIAL_IDS[side]) for side in ("left", "right"))
    if left is not None and right is not None and right[0] - left[0] < MINIMUM_SEPARATION_MM:
        yield f"left hemisphere at x = {left[0]:.0f} mm, right one at {right[0]:.0f} mm in the affine's RAS"


@_rule("axes", "segmentation")
def _head_is_upright(subject: LoadedSubject) -> Iterator[str]:
    cerebrum = subject.centroid((*PIAL_IDS["left"], *PIAL_IDS["right"]))
    cerebellum = subject.centroid(CEREBELLUM_IDS)
    if cerebrum is not None and cerebellum is not None:
        x, y, z = away = cerebellum - cerebrum
        cosine = away @ CEREBELLUM_DIRECTION / max(float(np.linalg.norm(away)), 1e-6)
        if cosine < np.cos(np.deg2rad(MAXIMUM_TILT_DEG)):
            place = f"cerebellum {x:.0f} mm right, {y:.0f} mm in front of and {z:.0f} mm above the cerebrum"
            yield f"{place} in the affine's RAS, where it lies behind and below"


@_rule("sides alike", "segmentation")
def _sides_are_alike(subject: LoadedSubject) -> Iterator[str]:
    protocol = subject.protocol
    labels = np.minimum(subject["segmentation"].astype(np.int64), len(protocol))  # those beyond are another rule's
    ml = np.bincount(labels.ravel(), minlength=len(protocol) + 1)[:-1] * subject.voxel_ml
    fluid = is_fluid(protocol.freesurfer_ids)  # whose sides differ in health as well
    for label, mirror in enumerate(protocol.mirror_permutation):
        if label < mirror and not fluid[label] and ml[label] + ml[mirror] > MINIMUM_SIDES_ML:
            if max(ml[label], ml[mirror]) > MAXIMUM_SIDE_RATIO * min(ml[label], ml[mirror]):
                names = protocol.structures[label].name, protocol.structures[mirror].name
                yield f"{names[0]} has {ml[label]:.1f} ml and {names[1]} {ml[mirror]:.1f} ml"


@_rule("head size", "segmentation")
def _head_is_plausible(subject: LoadedSubject) -> Iterator[str]:
    brain_ml = float((is_brain(subject.ids) & (subject.ids != 24)).sum() * subject.voxel_ml)
    if not BRAIN_RANGE_ML[0] <= brain_ml <= BRAIN_RANGE_ML[1]:
        yield f"brain of {brain_ml:.0f} ml, {BRAIN_RANGE_ML[0]:.0f} to {BRAIN_RANGE_ML[1]:.0f} are plausible"


@_rule("distances", "distance", "segmentation")
def _distances_fit_the_labels(subject: LoadedSubject) -> Iterator[str]:
    for channel, (name, ids) in enumerate(CHANNELS.items()):
        inside, labelled = subject["distance"][..., channel] < 0, np.isin(subject.ids, ids)
        dice = 2 * float((inside & labelled).sum()) / max(1, int(inside.sum() + labelled.sum()))
        if dice < MINIMUM_AGREEMENT:
            yield f"inside of channel {name} and the labels in it overlap with Dice {dice:.2f}"


@_rule("coordinates", "mni", "segmentation")
def _coordinates_are_plausible(subject: LoadedSubject) -> Iterator[str]:
    mni = subject["mni"]
    step = subject.ids.shape[0] // mni.shape[0]
    ids = subject.ids[(slice(step // 2, None, step),) * 3]
    brain, sides = is_brain(ids), [mni[np.isin(ids, PIAL_IDS[side])] for side in ("left", "right")]
    if all(map(len, sides)):
        left, right = (float(side[:, 0].mean()) for side in sides)
        if right - left < MINIMUM_SEPARATION_MM:
            yield f"left hemisphere at MNI x = {left:.0f} mm, right one at {right:.0f} mm"
    folded = int((compute_jacobian(mni, subject.affine("mni"))[brain] <= 0).sum())
    if folded:
        yield f"the map to MNI space folds at {folded} of {int(brain.sum())} brain voxels"
    if brain.any() and np.abs(mni[brain]).max() > MAXIMUM_MNI_MM:
        yield f"brain at {np.abs(mni[brain]).max():.0f} mm from the template's origin"
