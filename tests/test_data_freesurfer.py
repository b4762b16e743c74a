"""Subjects out of FreeSurfer folders, which the tests build: volumes in conformed axes, surfaces by marching cubes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data import freesurfer, prepare
from brainfm_monai.data.contrasts import white_matter_level
from brainfm_monai.data.freesurfer import MNI305_TO_MNI152, read_talairach
from brainfm_monai.data.labels import PIAL_IDS, WHITE_IDS, load_label_map
from brainfm_monai.data.prepare import PreparationError, prepare_subjects
from brainfm_monai.data.registration import coarsen_affine
from brainfm_monai.data.subjects import read_record

SIZE = (40, 48, 44)
CONFORMED = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # axes left, inferior, anterior
SURFACES: tuple[tuple[str, str, dict[str, tuple[int, ...]]], ...] = (
    ("lh.pial", "left", PIAL_IDS),
    ("lh.white", "left", WHITE_IDS),
)
SURFACES += (("rh.pial", "right", PIAL_IDS), ("rh.white", "right", WHITE_IDS))
XFM = "MNI Transform File\n\nTransform_Type = Linear;\nLinear_Transform =\n1.1 0 0.1 -3\n0 1.05 0 4.5\n-0.1 0 1.2 6;\n"


def make_head() -> np.ndarray:
    """RAS map without symmetry: a larger left hemisphere, parcels, unsided ids, hippocampus, cerebellum."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    ids = np.zeros(SIZE, dtype=np.int32)
    for centre, radii, cortex, white, ventricle in (
        ((13, 25, 25), (9, 15, 11), 1022, 2, 4),
        ((28, 24, 24), (7, 13, 9), 2022, 41, 43),
    ):
        depth = (((grid - centre) / radii) ** 2).sum(axis=-1)
        ids[depth < 1] = cortex
        ids[depth < 0.45] = white
        ids[depth < 0.06] = ventricle
    ids[12:15, 27:30, 18:20] = 77
    ids[27:30, 25:28, 28:30] = 77
    ids[16:26, 10:17, 8:13] = 8
    return ids


def build_subject(folder: Path, ids: np.ndarray, affine: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A FreeSurfer folder out of a RAS map, and its surfaces in scanner mm."""
    for name in ("mri/transforms", "surf"):
        (folder / name).mkdir(parents=True)
    conformed = nib.as_closest_canonical(nib.Nifti1Image(ids.astype(np.float32), affine))
    orientation = nib.orientations.ornt_transform(
        nib.io_orientation(conformed.affine), nib.orientations.axcodes2ornt(("L", "I", "A"))
    )
    turned = conformed.as_reoriented(orientation)
    volume = nib.freesurfer.MGHImage(np.asarray(turned.dataobj).astype(np.int32), turned.affine)
    nib.save(volume, folder / "mri" / "aparc+aseg.mgz")
    bright = np.where(ids == 0, 0, np.where(np.isin(ids, (2, 41)), 110, 70)).astype(np.float32)
    bright[:, :, -6:] = np.arange(ids.shape[1])[None, :, None] * 3 + 20  # scalp of many shades
    t1w = nib.Nifti1Image(bright, affine).as_reoriented(orientation)
    nib.save(nib.freesurfer.MGHImage(np.asarray(t1w.dataobj).astype(np.uint8), t1w.affine), folder / "mri" / "orig.mgz")
    (folder / "mri" / "transforms" / "talairach.xfm").write_text(XFM, encoding="utf-8")
    folded = np.where((ids >= 1000) & (ids < 2000), 3, np.where(ids >= 2000, 42, ids))
    to_surface = volume.header.get_vox2ras_tkr() @ np.linalg.inv(volume.affine)
    surfaces = {}
    for name, side, table in SURFACES:
        level = make_level(folded, side, table)
        vertices, triangles, *_ = marching_cubes(level, 0.5)
        surfaces[name] = (apply_affine(affine, vertices), triangles)
        nib.freesurfer.write_geometry(folder / "surf" / name, apply_affine(to_surface, surfaces[name][0]), triangles)
    return surfaces


def make_level(ids: np.ndarray, side: str, table: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Smooth level set of a region; hypointensities lie in the white matter."""
    unsided = (ids == 77) & ((np.arange(ids.shape[0]) < ids.shape[0] / 2) == (side == "left"))[:, None, None]
    return gaussian_filter((np.isin(ids, table[side]) | unsided).astype(np.float32), 0.8)


def fake_coordinates(
    ids: np.ndarray, affine: np.ndarray, factor: int, initial: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The start that it is given: stands in for the registration, which has tests of its own."""
    grid = coarsen_affine(affine, factor)
    index = np.stack(np.meshgrid(*(np.arange(n // factor) for n in ids.shape), indexing="ij"), axis=-1)
    return apply_affine(initial @ grid, index).astype(np.float32), grid


@pytest.fixture(autouse=True)
def _no_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freesurfer, "compute_mni_coordinates", fake_coordinates)


@pytest.fixture
def affine() -> np.ndarray:
    """Scanner coordinates whose origin is far from the middle of the volume."""
    matrix = np.eye(4)
    matrix[:3, 3] = (-31.0, 12.0, -55.0)
    return matrix


def load(path: Path) -> Any:
    return nib.load(path)


def measure_independently(points: np.ndarray, vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Distance to points that are sampled densely on every triangle."""
    weights = np.array([(i, j, 5 - i - j) for i in range(6) for j in range(6 - i)]) / 5
    samples = np.einsum("kc,tcx->tkx", weights, vertices[triangles]).reshape(-1, 3)
    return np.asarray(cKDTree(samples).query(points)[0])


def test_a_subject_has_everything_where_the_scanner_says(tmp_path: Path, affine: np.ndarray) -> None:
    ids = make_head()
    surfaces = build_subject(tmp_path / "subjects" / "bert", ids, affine)
    (folder,) = prepare_subjects("freesurfer", tmp_path / "subjects", tmp_path / "out", size=SIZE)
    segmentation, distance = load(folder / "segmentation.nii.gz"), load(folder / "distance.nii.gz")
    assert nib.aff2axcodes(segmentation.affine) == ("R", "A", "S")
    protocol = Protocol.load("synthseg_brain")
    places = np.argwhere(np.ones(SIZE))
    source = np.rint(apply_affine(np.linalg.inv(affine) @ segmentation.affine, places)).astype(int)
    kept = ((source >= 0) & (source < SIZE)).all(axis=1)
    found = protocol.freesurfer_ids[np.asarray(segmentation.dataobj)[tuple(places[kept].T)]]
    truth = ids[tuple(source[kept].T)]
    side = np.where(source[kept][:, 0] < SIZE[0] / 2, 2, 41)
    expected = np.select([truth == 1022, truth == 2022, truth == 77], [3, 42, side], truth)
    np.testing.assert_array_equal(found, expected)
    for channel, (name, _, _) in enumerate(SURFACES):
        measured = measure_independently(apply_affine(segmentation.affine, places), *surfaces[name])
        error = np.abs(np.abs(distance.get_fdata()[..., channel].ravel()) - measured)[(measured > 0.3) & (measured < 5)]
        assert error.mean() < 0.03, name  # half a step of what is stored is 0.025
        assert error.max() < 0.08, name
    record = read_record(folder)
    assert record["kind"] == "freesurfer"
    assert record["distances_from"] == "surfaces"
    assert record["generation_protocol"] == "brainfm_generation"
    assert record["dataset"] == "subjects"
    mni = load(folder / "mni.nii.gz")
    start = MNI305_TO_MNI152 @ read_talairach(tmp_path / "subjects" / "bert" / "mri" / "transforms" / "talairach.xfm")
    np.testing.assert_allclose(mni.get_fdata()[2, 3, 4], apply_affine(start @ mni.affine, (2, 3, 4)), atol=0.01)


def test_partial_volume_follows_the_surfaces(tmp_path: Path, affine: np.ndarray) -> None:
    build_subject(tmp_path / "bert", make_head(), affine)
    (folder,) = prepare_subjects("freesurfer", tmp_path / "bert", tmp_path / "out", size=SIZE)
    codes = np.asarray(load(folder / "generation_labels.nii.gz").dataobj).astype(int)
    distance = load(folder / "distance.nii.gz").get_fdata()
    protocol = Protocol.load("brainfm_generation")
    pial, white = distance[..., [0, 2]].min(axis=-1), distance[..., [1, 3]].min(axis=-1)
    at_white = (codes >= 150) & (codes < 200)
    at_pial = (codes > 200) & (codes <= 250)
    assert at_white.sum() > 200
    assert at_pial.sum() > 200
    assert np.abs(white[at_white]).max() <= 0.501
    assert np.abs(pial[at_pial]).max() <= 0.53
    # the share of grey matter in the table's own words, against the distance
    grey = np.array([dict(s.mixture).get(3, 0.0) for s in protocol.structures])
    np.testing.assert_allclose(grey[codes[at_white]], white[at_white] + 0.5, atol=0.04)
    np.testing.assert_allclose(1 - grey[codes[at_pial]], pial[at_pial] + 0.5, atol=0.04)
    pure = codes[(np.abs(white) > 0.6) & (np.abs(pial) > 0.6)]
    assert {2, 3, 4, 8, 41, 42, 43} <= set(pure.tolist())
    assert {251, 252, 253, 254, 255} <= set(pure.tolist())  # classes of the scalp
    t1w = load(folder / "T1w.nii.gz").get_fdata()
    assert t1w.min() == 0
    white = np.isin(codes, (2, 41))
    assert np.median(t1w[white]) == pytest.approx(white_matter_level("T1w"), abs=1 / 255)


def test_without_surfaces_and_scans_the_labels_tell_the_distances(tmp_path: Path, affine: np.ndarray) -> None:
    build_subject(tmp_path / "bert", make_head(), affine)
    (tmp_path / "bert" / "surf" / "rh.white").unlink()
    (tmp_path / "bert" / "mri" / "orig.mgz").unlink()
    (tmp_path / "bert" / "mri" / "aparc+aseg.mgz").rename(tmp_path / "bert" / "mri" / "aparc.DKTatlas+aseg.deep.mgz")
    (folder,) = prepare_subjects("freesurfer", tmp_path / "bert", tmp_path / "out", size=SIZE)
    assert read_record(folder)["distances_from"] == "labels"
    ids = Protocol.load("synthseg_brain").freesurfer_ids[np.asarray(load(folder / "segmentation.nii.gz").dataobj)]
    np.testing.assert_array_equal(
        load(folder / "distance.nii.gz").get_fdata()[..., 3] < 0, np.isin(ids, WHITE_IDS["right"])
    )


def test_a_bad_subject_is_reported_and_templates_are_passed_over(tmp_path: Path, affine: np.ndarray) -> None:
    root = tmp_path / "subjects"
    build_subject(root / "good", make_head(), affine)
    (root / "empty" / "mri").mkdir(parents=True)
    (root / "fsaverage" / "mri").mkdir(parents=True)
    away = affine.copy()
    away[:3, 3] += 40
    build_subject(root / "wild", make_head(), affine)
    (root / "wild" / "mri" / "transforms" / "talairach.xfm").write_text("Linear_Transform = 1 2 3;", encoding="utf-8")
    with pytest.raises(PreparationError) as caught:
        prepare_subjects("freesurfer", root, tmp_path / "out", size=SIZE)
    message = str(caught.value).splitlines()
    assert message[0] == "2 of 3 subjects were not prepared:"
    assert "empty/mri/aparc+aseg.mgz: " in message[1]
    assert "found no such file" in message[1]
    assert "talairach.xfm: an invertible 'Linear_Transform' of 3 x 4 numbers is needed" in message[2]
    assert (tmp_path / "out" / "good" / "subject.json").is_file()
    before = json.loads((tmp_path / "out" / "good" / "subject.json").read_text(encoding="utf-8"))
    (root / "good" / "surf" / "lh.pial").write_bytes((root / "good" / "surf" / "rh.pial").read_bytes())
    with pytest.raises(PreparationError):
        prepare_subjects("freesurfer", root, tmp_path / "out", size=SIZE)
    after = json.loads((tmp_path / "out" / "good" / "subject.json").read_text(encoding="utf-8"))
    assert after["sources"]["lh.pial"] != before["sources"]["lh.pial"]  # a changed surface makes the subject anew
    with pytest.raises(FileNotFoundError, match="a folder with subjects of FreeSurfer"):
        prepare_subjects("freesurfer", tmp_path / "out", tmp_path / "other")


def test_a_template_tells_who_is_one_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ann1", "ann1.long.ann", "bob1", "bobs_mean", "fsaverage5")
    for name in names:
        (tmp_path / "study" / "derivatives" / "freesurfer" / name / "mri").mkdir(parents=True)
    root = tmp_path / "study" / "derivatives" / "freesurfer"
    (root / "bobs_mean" / "base-tps").write_text("bob1\nbob2\n", encoding="utf-8")
    sources: list[Any] = []
    monkeypatch.setattr(prepare, "make_subjects", lambda found, *_, **__: sources.extend(found))
    prepare_subjects("freesurfer", root, tmp_path / "out")
    persons = {source.name: source.facts.get("person") for source in sources}
    assert persons == dict.fromkeys(("bob1", "bobs_mean"), "bobs_mean") | dict.fromkeys(("ann1", "ann1.long.ann"))
    assert {source.facts["dataset"] for source in sources} == {"study"}


@pytest.mark.shared_data
def test_distances_of_a_real_brain_agree_with_an_independent_computation(tmp_path: Path, shared_data: Path) -> None:
    ids, affine = load_label_map(shared_data / "synthseg" / "training_label_maps" / "training_seg_08.nii.gz")
    brain = np.where(ids < 100, ids, 0)
    surfaces = build_subject(tmp_path / "real", brain, affine)
    size = (64, 48, 40)  # of the brain's middle: both hemispheres and their surfaces to each side
    (folder,) = prepare_subjects("freesurfer", tmp_path / "real", tmp_path / "out", size=size)
    distance = load(folder / "distance.nii.gz")
    index = np.argwhere(np.ones(size))[::7]
    points = apply_affine(distance.affine, index)
    folded = np.where(brain == 77, 2, brain)
    for channel, (name, side, table) in enumerate(SURFACES):
        vertices, triangles = surfaces[name]
        close = ((vertices > points.min(axis=0) - 8) & (vertices < points.max(axis=0) + 8)).all(axis=1)
        measured = measure_independently(points, vertices, triangles[close[triangles].any(axis=1)])
        level = map_coordinates(make_level(folded, side, table), apply_affine(np.linalg.inv(affine), points).T, order=1)
        truth = np.where(level > 0.5, -measured, measured)
        near = measured < 3
        error = np.abs(distance.get_fdata()[..., channel][tuple(index.T)] - truth)[near]
        assert near.sum() > 1000, name
        assert error.mean() < 0.05, (name, error.mean())
