"""The faults of a set of subjects, found in its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.anatomy import Protocol, is_brain, is_fluid
from brainfm_monai.data.datalist import check_protocols, find_subjects, read_datalist
from brainfm_monai.data.distances import PIAL_IDS, WHITE_IDS
from brainfm_monai.data.loading import LoadSubjectd
from brainfm_monai.data.registration import coarsen_affine, compute_jacobian
from brainfm_monai.data.subjects import CONTRASTS, STORAGE, run_parallel

__all__ = ["RULES", "Finding", "Volumes", "check_set", "check_subject"]

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
CHANNELS = (("left", PIAL_IDS), ("left", WHITE_IDS), ("right", PIAL_IDS), ("right", WHITE_IDS))


class Finding(NamedTuple):
    """A fault: the subject, the rule that it breaks, and what was found."""

    subject: str
    rule: str
    found: str


class Volumes:
    """The volumes of one subject, read when they are asked for, in this package's units.

    Args:
        entry: an item of a datalist with whole paths.
    """

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

    @cached_property
    def ids(self) -> np.ndarray:
        """FreeSurfer ids of the segmentation; labels that the protocol lacks are 0."""
        table = Protocol.load(str(self.entry.get("protocol", "synthseg_head"))).freesurfer_ids
        labels = self["segmentation"].astype(np.int64)
        return np.where(labels < len(table), table[np.minimum(labels, len(table) - 1)], 0)

    def _load(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        if key not in self._read:
            volume = LoadSubjectd(key)(self.entry)[key]
            values = volume.as_tensor().numpy()
            self._read[key] = (np.moveaxis(values, 0, -1) if len(values) > 1 else values[0], volume.affine.numpy())
        return self._read[key]


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
    work = partial(_check_and_draw, picture_dir=Path(picture_dir) if picture_dir else None)
    findings: list[Finding] = []
    for entry, found in run_parallel(work, entries, jobs):
        if isinstance(found, BaseException):
            found = [Finding(str(entry["subject"]), "readable", str(found))]
        findings += found
    try:
        check_protocols(entries, str(source))
    except ValueError as error:
        findings.append(Finding("all", "one protocol", str(error)))
    return findings, entries


def _check_and_draw(entry: dict[str, Any], picture_dir: Path | None) -> list[Finding]:
    volumes = Volumes(entry)
    findings = check_subject(volumes)
    if picture_dir is not None:
        from brainfm_monai.data.contact_sheet import write_contact_sheet  # matplotlib is slow to import

        try:
            write_contact_sheet(
                volumes, picture_dir / f"{entry['subject']}.png", [f"{f.rule}: {f.found}" for f in findings]
            )
        except Exception as error:
            findings.append(Finding(entry["subject"], "picture", " ".join(str(error).split())))
    return findings


def check_subject(volumes: Volumes) -> list[Finding]:
    """Every rule that the files of a subject break; a rule that cannot be looked at because a file is unreadable is broken."""
    name = str(volumes.entry["subject"])
    findings = []
    for rule, look in RULES.items():
        try:
            findings += [Finding(name, rule, found) for found in look(volumes)]
        except Exception as error:
            findings.append(Finding(name, rule, " ".join(str(error).split()) or type(error).__name__))
    return list(dict.fromkeys(findings))


def _grids_agree(volumes: Volumes) -> Iterator[str]:
    keys = [key for key in volumes.keys if key != "mni"]
    for key in keys[1:]:
        same = volumes[key].shape[:3] == volumes[keys[0]].shape[:3]
        if not same or np.abs(volumes.affine(key) - volumes.affine(keys[0])).max() > GRID_TOLERANCE_MM:
            yield f"{key} {volumes[key].shape[:3]} does not lie on the grid of {keys[0]} {volumes[keys[0]].shape[:3]}"
    if keys and "mni" in volumes.keys:
        ratio = np.array(volumes[keys[0]].shape[:3]) / volumes["mni"].shape[:3]
        expected = coarsen_affine(volumes.affine(keys[0]), int(ratio[0]))
        if len(set(ratio)) > 1 or ratio[0] % 1 or np.abs(expected - volumes.affine("mni")).max() > GRID_TOLERANCE_MM:
            yield f"mni {volumes['mni'].shape[:3]} does not divide the box of {keys[0]} {volumes[keys[0]].shape[:3]}"


def _ids_are_known(volumes: Volumes) -> Iterator[str]:
    for key, fact in (("segmentation", "protocol"), ("generation_labels", "generation_protocol")):
        if key in volumes.keys and fact in volumes.entry:
            protocol = Protocol.load(str(volumes.entry[fact]))
            unknown = [int(i) for i in np.unique(volumes[key]) if i >= len(protocol)]
            if unknown:
                yield f"{key} holds {unknown[:5]}, and protocol '{protocol.name}' has {len(protocol)} labels"


def _targets_hold_something(volumes: Volumes) -> Iterator[str]:
    for key in ("generation_labels", "segmentation"):
        if key in volumes.keys and (volumes[key] > 0).mean() < MINIMUM_TARGET_SHARE:
            yield f"{key} is empty"
    if "distance" in volumes.keys:
        for channel, name in enumerate(("lp", "lw", "rp", "rw")):
            if not (volumes["distance"][..., channel] < 0).any():
                yield f"distance {name} is negative nowhere"
    for key in (*CONTRASTS, "mni"):
        if key in volumes.keys and volumes[key].min() == volumes[key].max():
            yield f"{key} is {float(volumes[key].min()):g} everywhere"


def _values_are_in_range(volumes: Volumes) -> Iterator[str]:
    for key in CONTRASTS:
        if key not in volumes.keys:
            continue
        low, high = float(volumes[key].min()), float(volumes[key].max())
        if key == "CT" and low > -500:
            yield f"CT begins at {low:.0f}: HU are needed, with air at about -1000"
        if key != "CT" and (low < -0.01 or high > 1.01):
            yield f"{key} ranges from {low:.3g} to {high:.3g}: [0, 1] is needed"


def _centroid(volumes: Volumes, ids: Sequence[int]) -> np.ndarray | None:
    """Centroid of some ids in RAS mm, shape (3,); None where there are none."""
    voxels = np.argwhere(np.isin(volumes.ids, ids))
    return apply_affine(volumes.affine("segmentation"), voxels.mean(axis=0)) if len(voxels) else None


def _sides_are_right(volumes: Volumes) -> Iterator[str]:
    if "segmentation" in volumes.keys:
        left, right = (_centroid(volumes, PIAL_IDS[side]) for side in ("left", "right"))
        if left is not None and right is not None and right[0] - left[0] < MINIMUM_SEPARATION_MM:
            yield f"left hemisphere at x = {left[0]:.0f} mm, right one at {right[0]:.0f} mm in the affine's RAS"


def _head_is_upright(volumes: Volumes) -> Iterator[str]:
    if "segmentation" in volumes.keys:
        cerebrum = _centroid(volumes, (*PIAL_IDS["left"], *PIAL_IDS["right"]))
        cerebellum = _centroid(volumes, CEREBELLUM_IDS)
        if cerebrum is not None and cerebellum is not None:
            away = cerebellum - cerebrum
            cosine = away @ CEREBELLUM_DIRECTION / max(float(np.linalg.norm(away)), 1e-6)
            if cosine < np.cos(np.deg2rad(MAXIMUM_TILT_DEG)):
                x, y, z = away
                yield (
                    f"cerebellum {x:.0f} mm right, {y:.0f} mm in front of and {z:.0f} mm above the cerebrum in the affine's "
                    "RAS, where it lies behind and below"
                )


def _sides_are_alike(volumes: Volumes) -> Iterator[str]:
    if "segmentation" not in volumes.keys:
        return
    protocol = Protocol.load(str(volumes.entry.get("protocol", "synthseg_head")))
    labels = np.minimum(volumes["segmentation"].astype(np.int64), len(protocol))  # those beyond are another rule's
    counts = np.bincount(labels.ravel(), minlength=len(protocol) + 1)[:-1]
    fluid = is_fluid(protocol.freesurfer_ids)  # whose sides differ in health as well
    ml = counts * abs(np.linalg.det(volumes.affine("segmentation")[:3, :3])) / 1000
    for label, other in enumerate(protocol.mirror_permutation):
        if label < other and not fluid[label] and ml[label] + ml[other] > MINIMUM_SIDES_ML:
            if max(ml[label], ml[other]) > MAXIMUM_SIDE_RATIO * min(ml[label], ml[other]):
                names = protocol.structures[label].name, protocol.structures[other].name
                yield f"{names[0]} has {ml[label]:.1f} ml and {names[1]} {ml[other]:.1f} ml"


def _head_is_plausible(volumes: Volumes) -> Iterator[str]:
    if "segmentation" in volumes.keys:
        voxel_ml = abs(np.linalg.det(volumes.affine("segmentation")[:3, :3])) / 1000
        brain_ml = float((is_brain(volumes.ids) & (volumes.ids != 24)).sum() * voxel_ml)
        if not BRAIN_RANGE_ML[0] <= brain_ml <= BRAIN_RANGE_ML[1]:
            yield f"brain of {brain_ml:.0f} ml, {BRAIN_RANGE_ML[0]:.0f} to {BRAIN_RANGE_ML[1]:.0f} are plausible"


def _distances_fit_the_labels(volumes: Volumes) -> Iterator[str]:
    if not {"distance", "segmentation"} <= set(volumes.keys):
        return
    for channel, (side, table) in enumerate(CHANNELS):
        inside, labelled = volumes["distance"][..., channel] < 0, np.isin(volumes.ids, table[side])
        dice = 2 * float((inside & labelled).sum()) / max(1, int(inside.sum() + labelled.sum()))
        if dice < MINIMUM_AGREEMENT:
            yield f"inside of channel {('lp', 'lw', 'rp', 'rw')[channel]} and the labels in it overlap with Dice {dice:.2f}"


def _coordinates_are_plausible(volumes: Volumes) -> Iterator[str]:
    if not {"mni", "segmentation"} <= set(volumes.keys):
        return
    mni = volumes["mni"]
    step = volumes.ids.shape[0] // mni.shape[0]
    brain = is_brain(volumes.ids)[(slice(step // 2, None, step),) * 3]
    sides = [
        mni[np.isin(volumes.ids, PIAL_IDS[side])[(slice(step // 2, None, step),) * 3]] for side in ("left", "right")
    ]
    if all(map(len, sides)):
        left, right = (float(side[:, 0].mean()) for side in sides)
        if right - left < MINIMUM_SEPARATION_MM:
            yield f"left hemisphere at MNI x = {left:.0f} mm, right one at {right:.0f} mm"
    folded = int((compute_jacobian(mni, volumes.affine("mni"))[brain] <= 0).sum())
    if folded:
        yield f"the map to MNI space folds at {folded} of {int(brain.sum())} brain voxels"
    if brain.any() and np.abs(mni[brain]).max() > MAXIMUM_MNI_MM:
        yield f"brain at {np.abs(mni[brain]).max():.0f} mm from the template's origin"


RULES: dict[str, Callable[[Volumes], Iterator[str]]] = {
    "one grid": _grids_agree,
    "known ids": _ids_are_known,
    "targets": _targets_hold_something,
    "intensities": _values_are_in_range,
    "left and right": _sides_are_right,
    "axes": _head_is_upright,
    "sides alike": _sides_are_alike,
    "head size": _head_is_plausible,
    "distances": _distances_fit_the_labels,
    "coordinates": _coordinates_are_plausible,
}
