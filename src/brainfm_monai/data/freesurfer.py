"""The subjects of FreeSurfer's or FastSurfer's results, and any subject's volumes out of its files."""

import warnings
from pathlib import Path
from typing import Any

import igl
import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from scipy.spatial import cKDTree

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data import contrasts, labels
from brainfm_monai.data.registration import compute_mni_coordinates
from brainfm_monai.data.subjects import MNI_FACTOR, Source, Volumes
from brainfm_monai.io import refuse_if

# best first: parcellated ones agree with the surfaces at the cortex; those of FastSurfer follow
SEGMENTATIONS = "aparc+aseg aparc.DKTatlas+aseg aparc.a2009s+aseg aparc.DKTatlas+aseg.mapped".split()
SEGMENTATIONS += "aparc.DKTatlas+aseg.deep.withCC aparc.DKTatlas+aseg.deep aseg aseg.presurf aseg.auto".split()
SCANS = ("orig.mgz", "nu.mgz", "T1.mgz", "norm.mgz")  # with the head where there is one
SURFACES = ("lh.pial", "lh.white", "rh.pial", "rh.white")  # in the order of the distance's channels
LIMIT_MM = 7.0  # beyond the 6.4 mm at which stored distances saturate
EDGE_MM = 2.0  # of triangles: a point within the limit of one is near one of its corners
CENTRE_TOLERANCE_MM = 0.5
# from the MNI305 space of talairach.xfm to MNI152; the matrix of FreeSurfer's documentation of coordinate systems
MNI305_TO_MNI152 = np.array([
    [0.9975, -0.0073, 0.0176, -0.0429], [0.0146, 1.0009, -0.0024, 1.5496], [-0.0130, -0.0093, 0.9971, 1.1840],
    [0, 0, 0, 1],
])  # fmt: skip


def find_freesurfer(root: Path) -> list[Source]:
    """The subjects in a SUBJECTS_DIR, in alphabetical order, or the one of a folder; FileNotFoundError if none.

    The set is named after the folder; in derivatives, after the BIDS folder, so that its persons are the same.
    """
    is_subject = (root / "mri").is_dir()
    folders = [root] if is_subject else sorted(f.parent for f in root.glob("[!.]*/mri") if f.is_dir())
    folders = [f for f in folders if not f.name.startswith("fsaverage")]  # templates, which FreeSurfer links here
    rule = f"{root}: a folder with subjects of FreeSurfer (folders with mri/) is needed"
    refuse_if(not folders, rule, "none", FileNotFoundError)
    home = root.resolve().parent if is_subject else root.resolve()
    dataset = (home.parent.parent if home.parent.name == "derivatives" else home).name
    # a template lists its visits there; names as VISIT.long.TEMPLATE tie the others, see find_persons
    visits = {f.name: (f / "base-tps").read_text().split() for f in folders if (f / "base-tps").is_file()}
    person_of = {name: {"person": template} for template, names in visits.items() for name in (template, *names)}
    return [Source(f.name, find_files(f), {"dataset": dataset, **person_of.get(f.name, {})}) for f in folders]


def find_files(folder: Path) -> dict[str, Path]:
    """The files of a subject that its preparation uses, by role; a missing segmentation is reported when it is read."""
    candidates = [folder / "mri" / f"{name}.mgz" for name in SEGMENTATIONS]
    files = {"labels": next(filter(Path.is_file, candidates), candidates[0])}
    scans = [f for name in SCANS if (f := folder / "mri" / name).is_file()]
    files |= {"T1w": scans[0]} if scans else {}
    surfaces = {name: folder / "surf" / name for name in SURFACES}
    files |= surfaces if all(f.is_file() for f in surfaces.values()) else {}
    talairach = folder / "mri" / "transforms" / "talairach.xfm"
    return files | ({"talairach": talairach} if talairach.is_file() else {})


def make_volumes(subject: Source) -> tuple[Volumes, dict[str, Any]]:
    """The volumes of a subject: labels, distances, MNI coordinates, and every contrast on the box of the labels.

    Files by role are ``labels`` and their table ``ids``; contrasts, ``image`` (whose contrast is recognised),
    ``<contrast>_mask``, ``lesion``; ``talairach`` and :data:`SURFACES`. The first contrast is the reference, on which
    the labels lie; the others are registered to it rigidly and resampled once. Without ``generation_protocol``, the
    generation labels follow scan and surfaces. Returns values and affine by key, and facts for the record, with
    ``faults``. OSError if a file is missing, ValueError if a file is not what its role says, or the files do not fit.
    """
    files, settings, protocols = dict(subject.files), subject.facts, subject.protocols
    source, protocol = str(files["labels"]), Protocol.load(protocols["protocol"])
    painted = Protocol.load(protocols["generation_protocol"]) if "generation_protocol" in protocols else None
    table = labels.read_id_table(files["ids"]) if "ids" in files else settings.get("ids", {})
    ids, affine = labels.load_label_map(files["labels"], {int(key): value for key, value in table.items()})
    ids = labels.fold_ids(ids)
    for known in (painted, protocol) if painted else ():
        known.encode(np.unique(ids), source)  # the whole map, not only what the box will keep of it
    ids, affine = labels.crop_to_brain(ids, affine, settings["spatial_size"], source)
    start = MNI305_TO_MNI152 @ read_talairach(files["talairach"]) if "talairach" in files else None
    distance, scans, facts = None, dict[str, contrasts.BoxScan](), dict[str, Any]()
    if set(SURFACES) <= set(files):
        surfaces = [read_surface(files[name], nib.load(files["labels"])) for name in SURFACES]
        distance = np.stack([compute_surface_distance(*surface, affine, ids.shape) for surface in surfaces], axis=-1)
    if painted:
        generation = painted.encode(ids)
        # a training paints the contrasts; an id that a table lacks is reported here, before the registration
        labels.read_means(generation, painted, settings.get("simulated", []), source)
    else:
        image = files.pop("image", None)
        if image:
            files = {contrasts.recognise_contrast(image, ids, affine): image, **files}
        scans = contrasts.gather_scans(files, ids, affine)
        clusters = contrasts.cluster_extracerebral(scans["T1w"].values, ids > 0) if "T1w" in scans else None
        generation, name = labels.make_generation_labels(ids, distance, clusters)
        facts = {"generation_protocol": name, "distances_from": "labels" if distance is None else "surfaces"}
        facts |= {"simulated": labels.find_paintable(generation, name, scans)} if image else {}
        centre_mm = apply_affine(affine, np.array(ids.shape) / 2)
        moved = {key: contrasts.measure_motion(scan.motion, centre_mm) for key, scan in list(scans.items())[1:]}
        facts |= {"reference": next(iter(scans), None), "registered": moved}
    volumes: Volumes = {
        "generation_labels": (generation, affine),
        "segmentation": (protocol.encode(ids, "segmentation"), affine),
        "distance": (labels.compute_hemisphere_distances(ids) if distance is None else distance, affine),
        "mni": compute_mni_coordinates(ids, affine, factor=MNI_FACTOR, initial=start),
    }
    for key, scan in scans.items():
        volumes[key] = (contrasts.scale_contrast(scan.values, key, ids), affine)
        removed = contrasts.find_removed(key, scan, files.get(f"{key}_mask"), ids, affine, volumes["mni"][0])
        volumes |= {f"{key}_defacing_mask": (removed.astype(np.uint8), affine)} if removed.any() else {}
    if "lesion" in files:
        lesion, fault = contrasts.carry_lesion(files, settings.get("lesion_of", ""), scans, affine)
        volumes |= {"lesion": (lesion, affine)} if lesion is not None else {}
        facts |= {"faults": [fault]} if fault else {}
    return volumes, facts


def read_talairach(path: Path) -> np.ndarray:
    """Read the affine of ``talairach.xfm``, scanner RAS to MNI305 mm; ValueError if it holds no linear transform."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        numbers = text.split("Linear_Transform")[1].split("=")[1].split(";")[0].split()
        affine = np.vstack([np.array(numbers, dtype=float).reshape(3, 4), [0, 0, 0, 1]])
        np.linalg.inv(affine)
    except (IndexError, ValueError, np.linalg.LinAlgError):
        raise ValueError(f"{path}: an invertible 'Linear_Transform' of 3 x 4 numbers is needed, found none") from None
    return affine


def read_surface(path: Path, volume: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read a FreeSurfer surface: vertices in scanner RAS mm, shape (V, 3), and triangles, shape (T, 3).

    The file is in surface RAS, whose origin is the middle of the subject's conformed ``volume``. An error of one line
    if there is no such file, it is no surface, or was made on another volume.
    """
    refuse_if(not path.is_file(), f"{path}: a FreeSurfer surface is needed", "no such file", FileNotFoundError)
    try:
        with warnings.catch_warnings():  # older surfaces do not name their volume, of which nibabel warns
            warnings.simplefilter("ignore", UserWarning)
            vertices, triangles, info = nib.freesurfer.read_geometry(path, read_metadata=True)
    except Exception as error:  # numpy and nibabel raise several kinds for a damaged file
        raise ValueError(f"{path}: a FreeSurfer surface is needed, found {' '.join(str(error).split())}") from error
    centre = volume.header["Pxyz_c"].astype(float)
    stated = np.asarray(info.get("cras", centre), dtype=float)
    rule = f"{path}: a surface of the volume centred on {centre.round(1)} is needed"
    refuse_if(np.abs(stated - centre).max() > CENTRE_TOLERANCE_MM, rule, f"one of {stated.round(1)}")
    to_scanner = np.asarray(volume.affine) @ np.linalg.inv(volume.header.get_vox2ras_tkr())
    return vertices @ to_scanner[:3, :3].T + to_scanner[:3, 3], np.asarray(triangles, dtype=np.int64)


def compute_surface_distance(
    vertices: np.ndarray, triangles: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Signed distance in mm of voxel centres to a closed triangle surface, shape (H, W, D), float32, negative inside.

    The distance is that to the triangles, (T, 3), all turned the same way, with edges of at most 2 mm, up to 7 mm; the
    sign is that of the winding number, which small holes and crossings do not upset. The affine takes voxels to mm.
    """
    points = apply_affine(affine, np.indices(shape).reshape(3, -1).T)
    near = np.isfinite(cKDTree(vertices).query(points, distance_upper_bound=LIMIT_MM + EDGE_MM)[0])
    distance = np.full(len(points), LIMIT_MM, dtype=np.float32)
    squared = igl.point_mesh_squared_distance(points[near], vertices, triangles)[0]
    distance[near] = np.minimum(np.sqrt(squared), LIMIT_MM)
    distance[np.abs(igl.fast_winding_number(vertices, triangles, points)) > 0.5] *= -1
    return distance.reshape(shape)
