"""One subject: volumes of its anatomy and of its scans, on one box, out of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data import contrasts, labels
from brainfm_monai.data.distances import compute_hemisphere_distances, compute_surface_distance, read_surface
from brainfm_monai.data.intensities import cluster_extracerebral, scale_intensities
from brainfm_monai.data.registration import compute_mni_coordinates
from brainfm_monai.data.subjects import MNI_FACTOR, Volumes

SURFACES = ("lh.pial", "lh.white", "rh.pial", "rh.white")  # in the order of the distance's channels
# from the MNI305 space of talairach.xfm to MNI152; the matrix of FreeSurfer's documentation of coordinate systems
MNI305_TO_MNI152 = np.array([
    [0.9975, -0.0073, 0.0176, -0.0429], [0.0146, 1.0009, -0.0024, 1.5496], [-0.0130, -0.0093, 0.9971, 1.1840], [0, 0, 0, 1]
])  # fmt: skip


def make_volumes(
    files: Mapping[str, Path], settings: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Volumes, dict[str, Any]]:
    """The volumes of a subject: labels, distances, MNI coordinates, and every contrast on the box of the labels.

    The first contrast among the files is the reference, on which the labels lie; the others are registered to it rigidly and
    resampled once. A file of the role ``image`` is a reference whose contrast is recognised.

    Args:
        files: by role: ``labels``; a contrast, ``image``, ``<contrast>_mask``, ``lesion``; ``talairach`` and :data:`SURFACES`.
        settings: ``spatial_size`` of the box in voxels; ``contrast`` of an image, ``lesion_of``, ``simulated`` contrasts.
        options: ``protocol`` of the segmentation; ``ids``, see :func:`read_id_table`; ``generation_protocol`` for label maps
            alone: without it, the generation labels follow the scan and the surfaces, see :func:`make_generation_labels`.

    Returns:
        Values and affine by key, as :func:`write_subject` takes them, and facts for the record, with ``faults``.

    Raises:
        OSError: if the label map or a surface is missing.
        ValueError: if a file is not what its name says, an id is unknown, or labels, surfaces and scans do not fit.
    """
    files, source, protocol = dict(files), str(files["labels"]), Protocol.load(options["protocol"])
    painted = Protocol.load(options["generation_protocol"]) if "generation_protocol" in options else None
    table = labels.read_id_table(options["ids"], options["protocol"]) if options.get("ids") else None
    ids, affine = labels.load_label_map(files["labels"], table)
    ids = labels.fold_ids(ids)
    for known in (painted, protocol) if painted else ():
        known.encode(np.unique(ids), source)  # the whole map, not only what the box will keep of it
    ids, affine = labels.cut_to_brain(ids, affine, settings["spatial_size"], source)
    start = MNI305_TO_MNI152 @ read_talairach(files["talairach"]) if "talairach" in files else None
    has_surfaces = all(name in files for name in SURFACES)
    volume: Any = nib.load(files["labels"]) if has_surfaces else None
    surfaces = [read_surface(files[name], volume) for name in SURFACES] if has_surfaces else []
    parts = [compute_surface_distance(*surface, affine, ids.shape) for surface in surfaces]
    distance = np.stack(parts, axis=-1) if has_surfaces else compute_hemisphere_distances(ids)
    scans: dict[str, contrasts.BoxScan] = {}
    facts: dict[str, Any] = {}
    if painted:
        generation = painted.encode(ids)
        # contrasts are painted when a training reads the subject; an id that a table lacks is reported before the registration
        labels.read_means(generation, painted, settings.get("simulated", []), source)
    else:
        if "image" in files:
            image = files.pop("image")
            files = {settings["contrast"] or contrasts.recognise_contrast(image, ids, affine): image, **files}
        scans = contrasts.gather_scans(files, ids, affine)
        clusters = cluster_extracerebral(scans["T1w"].values, ids > 0) if "T1w" in scans else None
        generation, name = labels.make_generation_labels(ids, distance if has_surfaces else None, clusters)
        facts = {"generation_protocol": name, "distances_from": "surfaces" if has_surfaces else "labels"}
        facts |= {"simulated": labels.find_paintable(generation, name, scans)} if "contrast" in settings else {}
        centre_mm = apply_affine(affine, np.array(ids.shape) / 2)
        moved = {key: contrasts.measure_motion(scan.motion, centre_mm) for key, scan in list(scans.items())[1:]}
        facts |= {"reference": next(iter(scans), None), "registered": moved}
    volumes: Volumes = {
        "generation_labels": (generation, affine),
        "segmentation": (protocol.encode(ids, "segmentation"), affine),
        "distance": (distance, affine),
        "mni": compute_mni_coordinates(ids, affine, factor=MNI_FACTOR, initial=start),
    }
    for key, scan in scans.items():
        volumes[key] = (scan.values if key == "CT" else scale_intensities(scan.values), affine)
        removed = contrasts.find_removed(key, scan, files.get(f"{key}_mask"), ids, affine, volumes["mni"][0])
        volumes |= {f"{key}_defacing_mask": (removed.astype(np.uint8), affine)} if removed.any() else {}
    if "lesion" in files:
        lesion, fault = contrasts.carry_lesion(files, settings.get("lesion_of", ""), scans, affine)
        volumes |= {"lesion": (lesion, affine)} if lesion is not None else {}
        facts |= {"faults": [fault]} if fault else {}
    return volumes, facts


def read_talairach(path: Path) -> np.ndarray:
    """Read the affine of ``talairach.xfm``, from scanner RAS to MNI305 mm; ValueError if it holds no linear transform."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        numbers = text.split("Linear_Transform")[1].split("=")[1].split(";")[0].split()
        affine = np.vstack([np.array(numbers, dtype=float).reshape(3, 4), [0, 0, 0, 1]])
        np.linalg.inv(affine)
    except (IndexError, ValueError, np.linalg.LinAlgError):
        raise ValueError(f"{path}: an invertible 'Linear_Transform' of 3 x 4 numbers is needed, found none") from None
    return affine
