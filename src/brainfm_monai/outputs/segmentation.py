"""Label maps, the tables of their names and colours, and volumes."""

from __future__ import annotations

import numpy as np

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import ABSENT, write_table, write_text
from brainfm_monai.outputs.result import ScanResult

__all__ = [
    "TOTALS",
    "compute_totals_mm3",
    "compute_volumes_mm3",
    "write_label_table",
    "write_segmentation",
    "write_volumes",
]

TOTALS = {
    "Total-Brain": "all structures of the brain without the ventricles and the fluid around it",
    "Intracranial-Volume": "all structures of the brain, the ventricles and the fluid around it",
}


def compute_volumes_mm3(labels: np.ndarray, affine: np.ndarray, count: int) -> np.ndarray:
    """Volume of every label: its number of voxels times the volume of a voxel.

    Args:
        labels: label map, any shape, integer in [0, count).
        affine: voxel indices to mm, shape (4, 4).
        count: number of labels.

    Returns:
        Volumes in mm^3, shape (count,).
    """
    voxel_mm3 = abs(np.linalg.det(affine[:3, :3]))
    return np.asarray(np.bincount(labels.reshape(-1), minlength=count) * voxel_mm3)


def compute_totals_mm3(volumes: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """Sums of volumes, shape (L,): :data:`TOTALS` says of which structures."""
    tissue = protocol.is_brain & ~protocol.is_fluid
    return {"Total-Brain": float(volumes[tissue].sum()), "Intracranial-Volume": float(volumes[protocol.is_brain].sum())}


def write_segmentation(scan: ScanResult) -> None:
    """Write the label map with the protocol's labels (``_dseg``) and with FreeSurfer's ids, and tables of names and colours."""
    protocol = scan.layout.protocol
    ids = protocol.freesurfer_ids.astype(np.int16)[scan.labels]
    scan.save_image("dseg", scan.labels, Description=f"labels of the protocol {protocol.name}; names in _dseg.tsv")
    scan.save_image("desc-freesurfer_dseg", ids, Description="FreeSurfer ids; 5xx and 9xx are tissues of the head")
    write_label_table(scan)


def write_label_table(scan: ScanResult) -> None:
    """Write the names, ids and colours of the labels.

    ``_dseg.tsv`` has the columns of a BIDS look-up table, ``_desc-lut_dseg.txt`` is a colour table for FreeView and 3D Slicer,
    ``_desc-itksnap_dseg.txt`` a label description for ITK-SNAP; all are of ``_dseg.nii.gz``.
    """
    structures = scan.layout.protocol.structures
    rows = [(s.label, s.name, s.freesurfer_id, s.side, "#{:02x}{:02x}{:02x}".format(*s.colour)) for s in structures]
    write_table(scan.path("dseg.tsv"), ("index", "name", "mapping", "side", "color"), rows)
    colours = [(s, " ".join(map(str, s.colour)), int(s.label > 0)) for s in structures]
    freeview = [f"{s.label} {s.name} {colour} {255 * shown}" for s, colour, shown in colours]
    write_text(scan.path("desc-lut_dseg.txt"), "\n".join(["# label name red green blue alpha", *freeview, ""]))
    snap = [f'{s.label} {colour} {shown} {shown} 1 "{s.name}"' for s, colour, shown in colours]
    write_text(scan.path("desc-itksnap_dseg.txt"), "\n".join(["# IDX -R- -G- -B- -A-- VIS MSH LABEL", *snap, ""]))


def write_volumes(scan: ScanResult) -> None:
    """Write the volume in mm^3 of every structure but the background: ``_volumes.tsv``.

    ``soft_mm3`` is the sum of the structure's probability over the voxels of the network's grid, ``hard_mm3`` counts voxels of
    ``_dseg``. The last rows are sums, defined in :data:`TOTALS`.
    """
    protocol = scan.layout.protocol
    hard = compute_volumes_mm3(scan.labels, scan.affine, len(protocol))
    best = hard if scan.soft_volumes_mm3 is None else scan.soft_volumes_mm3
    totals, hard_totals = compute_totals_mm3(best, protocol), compute_totals_mm3(hard, protocol)
    rows: list[tuple[object, ...]] = [
        (s.label, s.name, s.freesurfer_id, s.side, f"{best[s.label]:.1f}", f"{hard[s.label]:.1f}")
        for s in protocol.structures[1:]
    ]
    for name, volume in totals.items():
        rows.append((ABSENT, name, ABSENT, "none", f"{volume:.1f}", f"{hard_totals[name]:.1f}"))
    if scan.soft_volumes_mm3 is None:
        rows = [(*row[:4], ABSENT, row[5]) for row in rows]
    columns = ("index", "name", "freesurfer_id", "side", "soft_mm3", "hard_mm3")
    write_table(scan.path("volumes.tsv"), columns, rows)
    definitions = {name: {"Units": "mm^3", "Description": text} for name, text in TOTALS.items()}
    scan.write_sidecar(
        "volumes",
        soft_mm3={
            "Units": "mm^3",
            "Description": "sum of the structure's probability over the 1 mm voxels of the network",
        },
        hard_mm3={"Units": "mm^3", "Description": "voxels of _dseg times the volume of a voxel"},
        **definitions,
    )
    scan.summary.update({f"{name}_mm3": round(volume, 1) for name, volume in totals.items()})
    scan.summary.update({f"{s.name}_mm3": round(float(best[s.label]), 1) for s in protocol.structures[1:]})
