"""An atlas in the template's space, carried to a scan: labels in the scan's grid, volumes and thickness by region."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.io import ABSENT, ScanError, read_labels, read_table, refuse_if, scan_stem, write_table
from brainfm_monai.outputs.cortex import grow_surfaces
from brainfm_monai.outputs.maps import compute_volumes_mm3
from brainfm_monai.outputs.result import TEMPLATE_SPACE, ScanResult
from brainfm_monai.outputs.template import fit_scan_to_template
from brainfm_monai.surfaces import compute_areas_mm2

COLUMNS = ("index", "name", "volume_mm3", "vertices", "area_mm2", "thickness_mm", "thickness_sd_mm")
LABEL_COLUMNS = ("index", "label")  # either names the label of a row, as BIDS and FreeSurfer's tables have it


@dataclass(frozen=True)
class Atlas:
    """Labels in the space of the template."""

    name: str  # of the file, without its suffixes
    labels: np.ndarray  # shape (H, W, D), integer; 0 is no region
    affine: np.ndarray  # voxel indices to RAS mm of the template, shape (4, 4)
    regions: dict[int, str]  # name of each label

    def at(self, points_mm: np.ndarray) -> np.ndarray:
        """Label of the voxel that each point of the template, (..., 3), lies in; 0 outside of the volume."""
        index = np.rint(apply_affine(np.linalg.inv(self.affine), points_mm)).astype(int)
        inside = ((index >= 0) & (index < self.labels.shape)).all(axis=-1)
        return np.asarray(np.where(inside, self.labels[tuple(np.moveaxis(index * inside[..., None], -1, 0))], 0))


def load_atlas(path: str | Path) -> Atlas:
    """Read an atlas, such as ``aal.nii.gz``, and its table ``aal.tsv`` with ``index`` or ``label``, and ``name``.

    The path is that of a label map in MNI152 space. ScanError if the label map cannot be read, the table is missing, or
    a label of the map has no row.
    """
    stem = scan_stem(path)
    table = Path(path).with_name(f"{stem}.tsv")
    rule = f"{table}: the table of the atlas, with the columns index and name, is needed"
    refuse_if(not table.is_file(), rule, "no such file", ScanError)
    rows = read_table(table)
    columns = [*rows[0]] if rows else ["no rows"]
    column = next((name for name in LABEL_COLUMNS if name in columns), "")
    rule, found = f"{table}: the columns index and name are needed", ", ".join(columns)
    refuse_if(not column or "name" not in columns, rule, found, ScanError)
    try:
        regions = {int(row[column]): row["name"] for row in rows}
    except ValueError as error:
        raise ScanError(f"{table}: whole numbers in the column {column} are needed, found {error}") from error
    rule, found = f"{table}: labels above 0 in the column {column} are needed", ", ".join(map(str, sorted(regions)[:3]))
    refuse_if(min({0, *regions}) < 0 or max({0, *regions}) == 0, rule, found, ScanError)
    volume = read_labels(path)
    unnamed = sorted(set(np.unique(volume.values).tolist()) - {0, *regions})
    found = f"none for {unnamed[0]}" if unnamed else ""
    refuse_if(unnamed, f"{table}: a row for every label of {path} is needed", found, ScanError)
    return Atlas(stem, volume.values, volume.affine, {label: name for label, name in regions.items() if label})


def write_atlas(scan: ScanResult, atlas: Atlas) -> None:
    """Write the atlas in the grid of the scan (``_atlas-NAME_dseg``), and its regions (``_atlas-NAME_regions.tsv``).

    A voxel of the brain, and a vertex half-way between white and pial surface, has the label of the point of the
    template that the predicted coordinates take it to. Thickness is the mean over a region's vertices, weighted by
    their area on the white surface, and its standard deviation.
    """
    suffix = f"atlas-{''.join(filter(str.isalnum, atlas.name))}"
    try:
        warp = fit_scan_to_template(scan)
    except ValueError as error:
        scan.warnings.append(f"no atlas: {error}")
        return
    brain = np.argwhere(scan.layout.protocol.is_brain[scan.labels])
    labels = np.zeros(scan.labels.shape, dtype=np.int32)
    labels[tuple(brain.T)] = atlas.at(warp(apply_affine(scan.affine, brain)))
    description = f"labels of {atlas.name} in the brain, carried from {TEMPLATE_SPACE}; names in _{suffix}_regions.tsv"
    scan.save_image(f"{suffix}_dseg", labels, Description=description)
    volumes = compute_volumes_mm3(labels, scan.affine, max(atlas.regions) + 1)
    parts = [np.zeros((0, 3))]  # label, area and thickness of the vertices
    for surface in grow_surfaces(scan).values() if "distance" in scan.maps else ():
        of_vertices = atlas.at(warp((surface.white_mm + surface.pial_mm) / 2))
        areas = compute_areas_mm2(surface.white_mm, surface.faces)
        parts.append(np.stack([of_vertices, areas, surface.thickness_mm], axis=1))
    vertices = np.concatenate(parts)
    rows: list[tuple[object, ...]] = []
    for label, name in sorted(atlas.regions.items()):
        _, areas, thickness = vertices[vertices[:, 0] == label].T
        sizes = [ABSENT] * 3
        if areas.sum():
            mean = float(np.average(thickness, weights=areas))
            deviation = float(np.sqrt(np.average((thickness - mean) ** 2, weights=areas)))
            sizes = [f"{areas.sum():.0f}", f"{mean:.3f}", f"{deviation:.3f}"]
        rows.append((label, name, f"{volumes[label]:.1f}", len(areas), *sizes))
    write_table(scan.path(f"{suffix}_regions.tsv"), COLUMNS, rows)
