"""Maps as files: labels and volumes, synthetic contrasts, bias field, lesions, age, embedding, scales of error."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import ABSENT, read_table, write_table, write_text
from brainfm_monai.outputs.result import ScanResult, once_per_scan

TOTALS = {"Total-Brain": "all structures of the brain without the ventricles and the fluid around it"}
TOTALS["Intracranial-Volume"] = "all structures of the brain, the ventricles and the fluid around it"
SMALLEST_FACTOR = 1e-3  # of a bias field that a scan is divided by
LESION_THRESHOLD = 0.5
EXPECTED_DICE = Path(__file__).with_name("expected_dice.tsv")
DICE_TEXT = "Dice to expect against a manual label, out of the mean entropy of the structure; n/a: not calibrated"


def compute_volumes_mm3(labels: np.ndarray, affine: np.ndarray, count: int) -> np.ndarray:
    """Volume of each of ``count`` labels in mm^3, (count,): its voxels in a map of any shape, times that of a voxel."""
    return np.asarray(np.bincount(labels.reshape(-1), minlength=count) * abs(np.linalg.det(affine[:3, :3])))


@once_per_scan
def hard_volumes_mm3(scan: ScanResult) -> np.ndarray:
    """Volume of each label of the label map in the grid of the files, mm^3, (L,)."""
    return compute_volumes_mm3(scan.labels, scan.affine, len(scan.layout.protocol))


def compute_totals_mm3(volumes: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """Sums of volumes, shape (L,): :data:`TOTALS` says of which structures."""
    parts = (protocol.is_brain & ~protocol.is_fluid, protocol.is_brain)
    return {name: float(volumes[part].sum()) for name, part in zip(TOTALS, parts, strict=True)}


def write_segmentation(scan: ScanResult) -> None:
    """Write the label map with the protocol's labels (``_dseg``) and FreeSurfer's ids, and tables of the labels.

    ``_dseg.tsv`` has the columns of a BIDS look-up table, ``_desc-lut_dseg.txt`` is a colour table for FreeView and 3D
    Slicer, ``_desc-itksnap_dseg.txt`` a label description for ITK-SNAP; all are of ``_dseg.nii.gz``.
    """
    protocol = scan.layout.protocol
    ids = protocol.freesurfer_ids.astype(np.int16)[scan.labels]
    scan.save_image("dseg", scan.labels, Description=f"labels of the protocol {protocol.name}; names in _dseg.tsv")
    scan.save_image("desc-freesurfer_dseg", ids, Description="FreeSurfer ids; 5xx and 9xx are tissues of the head")
    structures = protocol.structures
    rows = [(s.label, s.name, s.freesurfer_id, s.side, "#{:02x}{:02x}{:02x}".format(*s.colour)) for s in structures]
    write_table(scan.path("dseg.tsv"), ("index", "name", "mapping", "side", "color"), rows)
    colours = [(s, " ".join(map(str, s.colour)), int(s.label > 0)) for s in structures]
    freeview = [f"{s.label} {s.name} {colour} {255 * shown}" for s, colour, shown in colours]
    write_text(scan.path("desc-lut_dseg.txt"), "\n".join(["# label name red green blue alpha", *freeview, ""]))
    snap = [f'{s.label} {colour} {shown} {shown} 1 "{s.name}"' for s, colour, shown in colours]
    write_text(scan.path("desc-itksnap_dseg.txt"), "\n".join(["# IDX -R- -G- -B- -A-- VIS MSH LABEL", *snap, ""]))


@once_per_scan
def structure_entropy(scan: ScanResult) -> np.ndarray:
    """Mean entropy of the voxels of each label in the network's grid, shape (L,); NaN where a label has none."""
    labels = scan.in_network_grid("segmentation").reshape(-1)
    count = np.bincount(labels, minlength=len(scan.layout.protocol))
    total = np.bincount(labels, weights=scan.in_network_grid("entropy").reshape(-1), minlength=len(count))
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


@once_per_scan
def expect_dice(scan: ScanResult) -> dict[int, float]:
    """The Dice to expect of each label that was calibrated for the weights in use; see ``expected_dice.tsv``.

    It is a straight line in the mean entropy of the structure, fitted on generated heads that were not trained on by
    ``benchmarks/expected_dice.py``. There is none for other weights, nor where the entropy is not known.
    """
    if "entropy" not in scan.maps:
        return {}
    protocol, entropy = scan.layout.protocol, structure_entropy(scan)
    lines = {
        protocol.label_of_id[int(i)]: (float(row["intercept"]), float(row["slope"]))
        for row in read_table(EXPECTED_DICE)
        if row["weights_sha256"] == scan.settings.weights_sha256
        for i in row["freesurfer_ids"].split()
        if int(i) in protocol.label_of_id
    }
    dice = {label: intercept + slope * entropy[label] for label, (intercept, slope) in lines.items()}
    return {label: float(np.clip(x, 0, 1)) for label, x in dice.items() if np.isfinite(x)}


def write_volumes(scan: ScanResult) -> None:
    """Write the volume in mm^3 of every structure but the background: ``_volumes.tsv``.

    ``soft_mm3`` is the sum of the structure's probability over the voxels of the network's grid, ``hard_mm3`` counts
    voxels of ``_dseg``; ``expected_dice`` is that of :func:`expect_dice`. The last rows are sums, defined in
    :data:`TOTALS`.
    """
    protocol, soft, hard = scan.layout.protocol, scan.soft_volumes_mm3, hard_volumes_mm3(scan)
    best, named = hard if soft is None else soft, protocol.structures[1:]
    totals, hard_totals = compute_totals_mm3(best, protocol), compute_totals_mm3(hard, protocol)
    dice = {label: f"{x:.2f}" for label, x in expect_dice(scan).items()}
    rows: list[Any] = [
        (s.label, s.name, s.freesurfer_id, s.side, best[s.label], hard[s.label], dice.get(s.label, ABSENT))
        for s in named
    ]
    rows += [(ABSENT, name, ABSENT, "none", totals[name], hard_totals[name], ABSENT) for name in TOTALS]
    columns = ("index", "name", "freesurfer_id", "side", "soft_mm3", "hard_mm3", "expected_dice")
    table = [(*who, ABSENT if soft is None else f"{first:.1f}", f"{second:.1f}", x) for *who, first, second, x in rows]
    write_table(scan.path("volumes.tsv"), columns, table)
    soft_text = "sum of the structure's probability over the 1 mm voxels of the network"
    texts = {"soft_mm3": soft_text, "hard_mm3": "voxels of _dseg times the volume of a voxel", **TOTALS}
    entries = {key: {"Units": "mm^3", "Description": text} for key, text in texts.items()}
    scan.write_sidecar("volumes", **entries, expected_dice={"Description": DICE_TEXT})
    scan.summary.update({f"{name}_mm3": round(volume, 1) for name, volume in totals.items()})
    scan.summary.update({f"{s.name}_mm3": round(float(best[s.label]), 1) for s in named})


def write_synthetic_images(scan: ScanResult) -> None:
    """Write ``_T1w``, ``_T2w``, ``_FLAIR``, ``_ct`` (HU) and the super-resolved scan that the network has, at 1 mm."""
    for entry, task in scan.layout.maps.items():
        if task.kind == "image" and entry in scan.maps:
            text = f"{entry} as the network makes it of the scan, 1 mm"
            scan.save_map(entry, scan.in_network_grid(entry), text, scan.network_affine)


def write_bias_field(scan: ScanResult) -> None:
    """Write the bias field, a factor, and the scan divided by it; the field's median in the head is 1.

    The scale of a bias field is free: the network's is that of its training, and of no meaning in a scan.
    """
    field, head = scan.in_grid("bias_field"), scan.labels > 0
    field = field / (np.median(field[0][head]) if head.any() else 1.0)
    scan.save_map("bias_field", field, "the scan is too bright by this factor; median in the head 1")
    corrected, text = scan.image.cpu().numpy() / field.clip(min=SMALLEST_FACTOR), "the scan divided by the bias field"
    scan.save_image("desc-biascorrected_image", corrected[0], Units="as in the scan", Description=text)


def write_lesions(scan: ScanResult) -> None:
    """Write the probability of lesions, the mask where it is above a half, and the volume and place of each lesion."""
    probability = scan.in_grid("lesion")
    mask = probability[0] > LESION_THRESHOLD
    scan.save_map("lesion", probability, "probability of a lesion, to be looked at: not every one is found or is one")
    scan.save_image("label-lesion_mask", mask.astype(np.uint8), Description=f"probability above {LESION_THRESHOLD}")
    pieces, count = ndimage.label(mask, np.ones((3, 3, 3)))
    numbers, voxels = pieces[mask], nib.affines.apply_affine(scan.affine, np.argwhere(mask))
    volumes = compute_volumes_mm3(numbers, scan.affine, count + 1)[1:]
    sums = [np.bincount(numbers, axis, count + 1)[1:] for axis in voxels.T]
    lesions = np.column_stack([volumes, *(axis / np.bincount(numbers, minlength=count + 1)[1:] for axis in sums)])
    rows = [(index, *(f"{number:.1f}" for number in row)) for index, row in enumerate(lesions, 1)]
    write_table(scan.path("lesions.tsv"), ("index", "volume_mm3", "x_mm", "y_mm", "z_mm"), rows)
    scan.summary.update({"lesion_count": count, "lesion_volume_ml": round(float(volumes.sum()) / 1000, 3)})


def write_age(scan: ScanResult) -> None:
    """Write the age, the mean of its map over the head, in years: ``_age.json``, and a column of the summary."""
    head, ages = scan.in_network_grid("segmentation") > 0, scan.in_network_grid("age")
    scan.summary["age_years"] = round(float(ages[head].mean() if head.any() else ages.mean()), 1)
    scan.write_sidecar("age", Age=scan.summary["age_years"], Units=scan.layout.maps["age"].output_unit)


def write_embedding(scan: ScanResult) -> None:
    """Write the embedding of every voxel in the network's grid, a vector of length 1: ``_desc-embedding_features``."""
    text = "vectors of length 1, to be compared by their cosine"
    scan.save_map("embedding", scan.in_network_grid("embedding"), text, scan.network_affine)


def write_uncertainty(scan: ScanResult) -> None:
    """Write the scale of the error of every map that has one, in the unit of the map: ``_<file of the map>scale``."""
    text = "scale b of the error by Laplace's law exp(-|error| / b) / 2b, as the network predicts it"
    for entry, task in scan.layout.maps.items():
        if task.kind == "log_scale" and entry in scan.maps:
            scan.save_map(entry, scan.in_grid(entry), text)
