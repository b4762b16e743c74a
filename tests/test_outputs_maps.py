"""What is computed for the files: surfaces, the fit to the template, images, and warnings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from nibabel.affines import apply_affine

from brainfm_monai.functional import spatial
from brainfm_monai.io import ScanError, read_table
from brainfm_monai.outputs import RunSettings, ScanResult, collect_warnings, resample, template
from brainfm_monai.outputs.cortex import compute_ribbon, write_distances
from brainfm_monai.outputs.maps import write_lesions, write_synthetic_images
from brainfm_monai.outputs.quality import write_quality
from brainfm_monai.outputs.result import SHOWN
from brainfm_monai.outputs.template import Warp, fit_affine, fit_warp, fold_fraction, grid_points, invert_warp
from brainfm_monai.prediction import OUTPUTS, select_outputs
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "mni"], "synthseg_head")
LEFT, RIGHT = 6, 20  # cortex


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return np.asarray(np.linalg.norm(index - np.array(centre), axis=-1) - radius, dtype=np.float32)


def test_the_ribbon_of_two_shells() -> None:
    shape = (40, 20, 20)
    distance = {"lp": ball(shape, (10, 10, 10), 8), "rp": ball(shape, (29, 10, 10), 8)}
    distance |= {"lw": distance["lp"] + 2.5, "rw": distance["rp"] + 3.0}
    ribbon = compute_ribbon(distance)
    assert (ribbon[10, 10, 10], ribbon[29, 10, 10], ribbon[3, 10, 10], ribbon[36, 10, 10], ribbon[0, 0, 0]) == (
        2,
        41,
        3,
        42,
        0,
    )


def test_the_ribbon_follows_the_levels_of_the_weights_and_the_scan(tmp_path: Path) -> None:
    """The predicted boundaries stand 0.8 mm off in both hemispheres, of which the left one is the larger."""
    shape = (64, 40, 36)
    centres, radii = {"l": (18, 19, 17), "r": (47, 19, 17)}, {"l": 10.3, "r": 8.3}
    true = {side: ball(shape, centres[side], radii[side]) for side in "lr"}
    channels = [true[side] + error for side in "lr" for error in (-3.0 + 0.8, 0.8)]  # pial, white
    maps = {"distance": np.stack(channels).clip(-3, 3), "segmentation": np.zeros((1, *shape), np.float32)}
    tensors = {name: MetaTensor(torch.from_numpy(values), affine=torch.eye(4)) for name, values in maps.items()}
    share = (0.5 - np.minimum(true["l"], true["r"])).clip(0, 1)  # of white matter in a voxel
    image = MetaTensor(torch.from_numpy(0.3 + 0.4 * share[None]).float(), affine=torch.eye(4))
    layout = TaskLayout(["segmentation", "distance"], "synthseg_head")

    def write(name: str, **more: Any) -> np.ndarray:
        (tmp_path / name).mkdir()
        scan = ScanResult("scan", tmp_path, tmp_path / name, layout, np.zeros(shape), np.eye(4), tensors, **more)
        write_distances(scan)
        return np.asarray(nib.load(tmp_path / name / "scan_desc-ribbon_dseg.nii.gz").dataobj)  # type: ignore[attr-defined]

    plain = write("plain")
    levelled = write("levelled", settings=RunSettings(surface_levels_mm=(0.8, 0.8)))
    refined = write("refined", normalised=image)
    for side, white, cortex in (("l", 2, 3), ("r", 41, 42)):
        inside = true[side] < 0
        assert (plain == white).sum() < 0.85 * inside.sum()
        np.testing.assert_array_equal(levelled == white, inside)
        np.testing.assert_array_equal(levelled == cortex, ~inside & (true[side] < 3))
        assert (refined == white).sum() == pytest.approx(inside.sum(), rel=0.06)
        assert not (refined[~np.isin(plain, (white, cortex))] == white).any()


MATRIX = np.array([[1.1, 0.1, 0, 4], [-0.05, 0.9, 0.1, -6], [0.02, -0.1, 1.05, 9], [0, 0, 0, 1]])


def test_outliers_do_not_move_the_affine() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-60, 60, (3000, 3))
    goal = apply_affine(MATRIX, points) + rng.normal(0, 0.5, (3000, 3))
    goal[:500] += rng.uniform(40, 90, (500, 3))
    found = fit_affine(points, goal)
    assert np.linalg.norm(apply_affine(found, points) - apply_affine(MATRIX, points), axis=1).max() < 1.0
    with pytest.raises(ValueError, match="affine fit: points that fill a volume are needed, found 3"):
        fit_affine(points[:3], goal[:3])


def test_a_warp_without_folds_comes_out_of_coordinates_with_folds_and_has_an_inverse() -> None:
    shape, affine = (36, 40, 32), np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-36, -40, -32)
    rng = np.random.default_rng(0)
    brain = ball(shape, (18, 20, 16), 13) < 0
    noisy = apply_affine(MATRIX, grid_points(shape, affine)) + rng.normal(0, 3.0, (*shape, 3))
    assert fold_fraction(Warp(noisy, affine, MATRIX), brain) > 0.1
    warp = fit_warp(
        np.moveaxis(noisy, -1, 0),
        brain,
        affine,
        fit_affine(apply_affine(affine, np.argwhere(brain)), noisy[brain]),
        spacing_vox=1,
    )
    assert fold_fraction(warp) == 0
    error = np.linalg.norm(warp.points - apply_affine(MATRIX, grid_points(shape, affine)), axis=-1)
    assert error[brain].mean() < 0.5
    back = invert_warp(
        warp, (30, 30, 30), np.diag([2.0, 2.0, 2.0, 1.0]) - np.pad(np.array([[30.0], [30], [30]]), ((0, 1), (3, 0)))
    )
    round_trip = warp(back.points) - grid_points((30, 30, 30), back.affine)
    assert np.abs(round_trip).max() < 0.05
    mirrored = Warp(warp.points[::-1], affine, MATRIX)
    assert fold_fraction(mirrored) > 0.99


def test_the_template_is_the_one_that_nilearn_gives() -> None:
    from nilearn.datasets import load_mni152_template

    intensities, affine = template.load_template()
    expected = load_mni152_template(resolution=1)
    np.testing.assert_array_equal(intensities, expected.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(affine, expected.affine)


def test_an_image_read_axis_by_axis_through_a_warp_is_that_read_voxel_by_voxel(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    affine = np.array([[3.0, 0, 0, -20], [0, 3.0, 0, -30], [0, 0, 3.0, -10], [0, 0, 0, 1]])
    points = apply_affine(MATRIX, grid_points((14, 16, 12), affine)) + rng.normal(0, 2.0, (14, 16, 12, 3))
    warp, image = Warp(points.astype(np.float32), affine, MATRIX), torch.from_numpy(rng.random((1, 20, 24, 22)))
    image_affine = np.diag([2.5, 2.0, 2.0, 1.0]) + np.pad(np.array([[-22.0], [-25], [-20]]), ((0, 1), (3, 0)))
    # axes in another order, two of them backwards, other voxels, reaching beyond the grid of the warp
    grid_affine = np.array([[0, 0, -1.3, 24], [0.9, 0, 0, -31], [0, -1.1, 0, 30], [0, 0, 0, 1.0]])
    by_axes = template.resample_through(image, image_affine, (41, 39, 37), grid_affine, warp)
    monkeypatch.setattr(template, "SAME_VOXELS", -1.0)  # no grid has the axes of another
    by_voxels = template.resample_through(image, image_affine, (41, 39, 37), grid_affine, warp)
    np.testing.assert_allclose(by_axes, by_voxels, atol=2e-5)
    assert by_voxels.std() > 0.1
    turned = grid_affine.copy()
    turned[:3, :3] = turned[:3, :3] @ np.array([[1, 0.02, 0], [-0.02, 1, 0], [0, 0, 1]])
    monkeypatch.undo()
    assert np.abs(template.resample_through(image, image_affine, (41, 39, 37), turned, warp) - by_voxels).max() > 0.01
    block = torch.zeros_like(image)
    block[:, 8:12, 9:16, 6:9] = image[:, 8:12, 9:16, 6:9]
    for grid in (grid_affine, turned):  # what is computed near the block alone is what is computed everywhere
        near = template.resample_through(block, image_affine, (41, 39, 37), grid, warp)
        index = apply_affine(np.linalg.inv(image_affine), warp(grid_points(near.shape, grid)))
        everywhere = spatial.warp(block[None].float(), torch.from_numpy(np.moveaxis(index, -1, 0)[None]).float())
        np.testing.assert_allclose(near, everywhere[0, 0], atol=2e-5)
        assert 0.001 < (near != 0).mean() < 0.1
    assert not template.resample_through(torch.zeros_like(image), image_affine, (41, 39, 37), turned, warp).any()


def make_scan(
    folder: Path, labels: np.ndarray, affine: np.ndarray, layout: TaskLayout = LAYOUT, **maps: Any
) -> ScanResult:
    """A scan whose maps lie in its own grid."""
    tensors = {
        name: MetaTensor(torch.as_tensor(value), affine=torch.from_numpy(affine))
        for name, value in {"segmentation": labels[None], **maps}.items()
    }
    nib.save(nib.Nifti1Image(labels.astype(np.float32) + 1, affine), folder / "scan.nii")
    return ScanResult("scan", folder / "scan.nii", folder, layout, labels, affine, tensors)


def test_synthetic_images_are_written_in_their_units(tmp_path: Path) -> None:
    layout = TaskLayout(["segmentation", "T1w", "CT"], "synthseg_head")  # no weights predict these yet
    labels = np.zeros((6, 7, 8), dtype=np.uint8)
    labels[2:4, 2:4, 2:4] = LEFT
    t1w, ct = np.full((1, 6, 7, 8), 0.25, np.float32), np.full((1, 6, 7, 8), 37.4, np.float32)
    write_synthetic_images(make_scan(tmp_path, labels, np.eye(4), layout, T1w=t1w, CT=ct))
    assert sorted(f.name for f in tmp_path.glob("*.nii.gz")) == [
        "scan_desc-synthetic_T1w.nii.gz",
        "scan_desc-synthetic_ct.nii.gz",
    ]
    found: Any = nib.load(tmp_path / "scan_desc-synthetic_ct.nii.gz")
    np.testing.assert_allclose(found.get_fdata(), 37)
    found = nib.load(tmp_path / "scan_desc-synthetic_T1w.nii.gz")
    np.testing.assert_allclose(found.get_fdata(), 0.25, atol=1e-4)


def test_lesions_are_written_as_probability_mask_and_table(tmp_path: Path) -> None:
    layout = TaskLayout(["segmentation", "lesion"], "synthseg_head")
    affine = np.array([[-1.0, 0, 0, 4], [0, 0, 2.0, -6], [0, -1.0, 0, 5], [0, 0, 0, 1]])  # axes exchanged, x mirrored
    probability = np.full((1, 6, 7, 8), 0.1, np.float32)
    probability[0, 1, 2, 3:5], probability[0, 4, 5, 6] = 0.9, 0.7
    scan = make_scan(tmp_path, np.full((6, 7, 8), LEFT, np.uint8), affine, layout, lesion=probability)
    write_lesions(scan)
    mask: Any = nib.load(tmp_path / "scan_label-lesion_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), probability[0] > 0.5)
    written: Any = nib.load(tmp_path / "scan_label-lesion_probseg.nii.gz")
    np.testing.assert_allclose(written.get_fdata(), probability[0], atol=1e-3)
    rows = read_table(tmp_path / "scan_lesions.tsv")
    assert [tuple(row.values()) for row in rows] == [
        ("1", "4.0", "3.0", "1.0", "3.0"),  # the middle of voxels (1, 2, 3) and (1, 2, 4)
        ("2", "2.0", "0.0", "6.0", "0.0"),
    ]
    assert scan.summary == {"lesion_count": 2, "lesion_volume_ml": 0.006}
    empty = make_scan(tmp_path, np.zeros((6, 7, 8), np.uint8), affine, layout, lesion=probability * 0)
    write_lesions(empty)
    assert empty.summary == {"lesion_count": 0, "lesion_volume_ml": 0.0}
    assert read_table(tmp_path / "scan_lesions.tsv") == []


def test_age_embedding_and_scales_of_error_are_written(tmp_path: Path) -> None:
    layout = TaskLayout(["segmentation", "mni", "age", "embedding"], uncertainty=["mni"], embedding_channels=2)
    labels = np.zeros((6, 7, 8), dtype=np.uint8)
    labels[2:4] = LEFT
    age = np.where(labels > 0, 40.0, 90.0)[None].astype(np.float32)
    vectors = np.stack([np.full(labels.shape, 0.6), np.full(labels.shape, -0.8)]).astype(np.float32)
    scales = np.stack([np.full(labels.shape, value) for value in (1.0, 2.0, 4.0)]).astype(np.float32)
    scan = make_scan(tmp_path, labels, np.eye(4), layout, age=age, embedding=vectors, mni_scale=scales)
    for name, write in select_outputs("age,embedding,uncertainty", layout).items():
        assert name in OUTPUTS
        write(scan)
    assert scan.summary == {"age_years": 40.0}
    embedding: Any = nib.load(tmp_path / "scan_desc-embedding_features.nii.gz")
    np.testing.assert_allclose(embedding.get_fdata()[1, 1, 1], [0.6, -0.8], atol=1e-3)
    scale: Any = nib.load(tmp_path / "scan_mniscale.nii.gz")
    np.testing.assert_allclose(scale.get_fdata()[1, 2, 3], [1, 2, 4], atol=1e-3)


def test_nearest_keeps_the_type(tmp_path: Path) -> None:
    labels = MetaTensor(torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4), affine=torch.eye(4))
    moved = resample(labels, (4, 6, 8), np.diag([0.5, 0.5, 0.5, 1.0]), mode="nearest")
    assert moved.dtype == torch.uint8
    assert set(moved.unique().tolist()) == set(range(24))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, -1, 1), (-1, -1, -1), (1, 1, 1)])
def test_the_same_voxels_in_another_order_are_not_interpolated(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    """Against MONAI's resampling, with axes of three lengths, permuted and flipped, and an oblique affine."""
    oblique = np.array([[0.9, 0.1, 0, -20], [-0.1, 1.1, 0.2, 7], [0.05, -0.2, 1.3, 3], [0, 0, 0, 1]])
    source = MetaTensor(
        torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)), affine=torch.from_numpy(oblique)
    )
    turn = np.eye(4)
    turn[:3, :3] = np.eye(3)[:, order] * signs
    shape = tuple((4, 5, 6)[axis] for axis in order)
    turn[:3, 3] = [n - 1 if turn[axis, :3].sum() < 0 else 0 for axis, n in enumerate((4, 5, 6))]
    apply = SpatialResample(padding_mode="border", dtype=np.float32)
    found = resample(source, shape, oblique @ turn)
    expected = apply(source, dst_affine=torch.from_numpy(oblique @ turn), spatial_size=shape)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.affine, oblique @ turn)
    np.testing.assert_array_equal(found.unique(), source.unique())
    moved = oblique @ turn @ np.array([[1, 0, 0, 0.4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    between = resample(source, shape, moved)  # four tenths of a voxel away
    expected = apply(source, dst_affine=torch.from_numpy(moved), spatial_size=shape)
    np.testing.assert_allclose(between.numpy(), expected.numpy(), atol=1e-4)
    larger = resample(source, (4, 5, 7), oblique)  # the border goes on
    np.testing.assert_array_equal(larger[..., 6], source[..., 5])


def head(left_first: bool = False, top: int = 26) -> np.ndarray:
    """Two blocks of cortex of 1.1 litres in voxels of 4 mm; right at low indices of the first axis, which runs to the right."""
    labels = np.zeros((40, 46, 34), dtype=np.uint8)
    labels[6:20, 6:40, 6:top], labels[20:34, 6:40, 6:top] = (LEFT, RIGHT) if left_first else (RIGHT, LEFT)
    return labels


LPS = np.array([[-4.0, 0, 0, 80], [0, -4.0, 0, 92], [0, 0, 4.0, -68], [0, 0, 0, 1]])
RAS = np.array([[4.0, 0, 0, -80], [0, 4.0, 0, -92], [0, 0, 4.0, -68], [0, 0, 0, 1]])


def coordinates(affine: np.ndarray, matrix: np.ndarray | None = None) -> np.ndarray:
    points = apply_affine(np.eye(4) if matrix is None else matrix, grid_points((40, 46, 34), affine))
    return np.moveaxis(points, -1, 0).astype(np.float32)


def test_a_good_scan_is_warned_of_by_nothing(tmp_path: Path) -> None:
    entropy = np.zeros((1, 40, 46, 34), dtype=np.float32)
    assert collect_warnings(make_scan(tmp_path, head(), LPS, mni=coordinates(LPS), entropy=entropy)) == []


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    swapped = collect_warnings(make_scan(tmp_path, head(left_first=True), LPS))
    assert swapped == ["left and right contradict the affine: structures of the left side lie to the right"]
    cut = collect_warnings(make_scan(tmp_path, head()[:, :, 12:], LPS))
    assert any(w.startswith("part of the brain is out of view") and "inferior side" in w for w in cut)
    small = collect_warnings(make_scan(tmp_path, head(), LPS @ np.diag([0.4, 0.4, 0.4, 1])))
    assert any(w.startswith("implausible intracranial volume: ") for w in small)
    one_side = head()
    one_side[20:30][one_side[20:30] == LEFT] = 0
    assert any(
        w.startswith("left and right differ: Cerebral-Cortex")
        for w in collect_warnings(make_scan(tmp_path, one_side, LPS))
    )
    mirrored = coordinates(RAS, np.diag([-1.0, 1, 1, 1]))
    told = collect_warnings(make_scan(tmp_path, head(left_first=True), RAS, mni=mirrored))
    assert told == ["left and right contradict the affine: the head is mirrored on its way to the template"]
    upside_down = coordinates(RAS, np.diag([-1.0, 1, -1, 1]))
    told = collect_warnings(make_scan(tmp_path, head(left_first=True), RAS, mni=upside_down))
    assert told == ["the head lies 180 degrees from the axes of the affine: the orientation may be wrong"]
    vague = np.full((1, 40, 46, 34), 0.4, dtype=np.float32)
    assert any(
        "mean entropy within the brain is 0.40" in w
        for w in collect_warnings(make_scan(tmp_path, head(), LPS, entropy=vague))
    )
    assert collect_warnings(make_scan(tmp_path, np.zeros((40, 46, 34), np.uint8), LPS)) == [
        "no brain was found in this scan"
    ]


@pytest.mark.parametrize(
    ("modality", "bone", "thickness", "warned"),
    [
        ("mr: no units", 0.9, 4, True),
        ("mr: no units", 0.2, 4, False),
        ("ct: units", 0.9, 4, False),
        ("mr: a", 0.9, 0, False),
    ],
)
def test_a_ct_of_another_scale_is_warned_of(
    tmp_path: Path, modality: str, bone: float, thickness: int, warned: bool
) -> None:
    labels, bone_label = head(), LAYOUT.protocol.label_of_id[515]
    labels[8:32, :thickness, 4:30] = bone_label
    values = np.where(labels == bone_label, bone, 0.7)[None].astype(np.float32)
    scan = replace(make_scan(tmp_path, labels, LPS), modality=modality, normalised=MetaTensor(torch.from_numpy(values)))
    assert collect_warnings(scan) == (
        ["bone is as bright as brain: if this is a CT, Hounsfield units are needed, found another scale"] * warned
    )


def test_a_mode_that_leaves_a_side_out_does_not_miss_it(tmp_path: Path) -> None:
    labels = head()
    labels[labels == RIGHT] = 0
    scan = make_scan(tmp_path, labels, LPS)
    half = ScanResult(
        "s", scan.source, tmp_path, LAYOUT, labels, LPS, scan.maps, settings=RunSettings(mode="left_hemisphere")
    )
    assert collect_warnings(half) == []


def test_entropy_is_told_for_each_structure(tmp_path: Path) -> None:
    labels = head()
    entropy = np.where(labels == LEFT, 0.1, 0.3)[None].astype(np.float32)
    scan = make_scan(tmp_path, labels, LPS, entropy=entropy)
    write_quality(scan)
    rows = [line.split("\t") for line in (tmp_path / "scan_qc.tsv").read_text().splitlines()]
    mean = {row[1]: row[2] for row in rows[1:]}
    assert (mean["Left-Cerebral-Cortex"], mean["Right-Cerebral-Cortex"], mean["Left-Thalamus"]) == (
        "0.1000",
        "0.3000",
        "n/a",
    )
    assert scan.summary["brain_entropy"] == pytest.approx(0.2)


def write_atlas_files(folder: Path, table: str = "index\tname\n7\tleft, behind\n3\tright\n") -> Path:
    """Label 7 to the left of the middle and behind it, label 3 to the right; voxels of 8 mm, axes from front and from right."""
    labels = np.zeros((30, 32, 24), dtype=np.int16)
    labels[:15, :], labels[15:, 16:] = 3, 7
    affine = np.array([[-8.0, 0, 0, 116], [0, -8.0, 0, 124], [0, 0, 8.0, -92], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(labels, affine), folder / "halves.nii.gz")
    (folder / "halves.tsv").write_text(table)
    return folder / "halves.nii.gz"


@pytest.mark.parametrize("affine", [LPS, RAS])
def test_an_atlas_is_carried_to_the_scan_with_left_on_the_left(tmp_path: Path, affine: np.ndarray) -> None:
    shift = np.eye(4)
    shift[:3, 3] = (-1 if affine is LPS else 1, -7, 4)  # no voxel lies on the border of two regions
    labels = head(left_first=affine is RAS)
    scan = make_scan(tmp_path, labels, affine, mni=coordinates(affine, shift))
    *_, write = select_outputs("segmentation", LAYOUT, write_atlas_files(tmp_path)).values()
    write(scan)
    image = nib.load(tmp_path / "scan_atlas-halves_dseg.nii.gz")
    np.testing.assert_allclose(image.affine, affine)  # type: ignore[attr-defined]
    carried = np.asarray(image.dataobj)  # type: ignore[attr-defined]
    behind = apply_affine(affine, grid_points(labels.shape, np.eye(4)))[..., 1] - 7 < 0
    np.testing.assert_array_equal(carried == 3, labels == RIGHT)
    np.testing.assert_array_equal(carried == 7, (labels == LEFT) & behind)
    rows = read_table(tmp_path / "scan_atlas-halves_regions.tsv")
    assert [(row["index"], row["name"]) for row in rows] == [("3", "right"), ("7", "left, behind")]
    assert float(rows[0]["volume_mm3"]) == pytest.approx((labels == RIGHT).sum() * 64)
    assert rows[0]["thickness_mm"] == "n/a"  # no distances, no surfaces


def test_thickness_of_an_atlas_is_that_of_the_side_it_lies_on(tmp_path: Path) -> None:
    shape, affine = (40, 46, 34), LPS @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] = (40, 46, -34)
    layout = TaskLayout(["segmentation", "distance", "mni"], "synthseg_head")
    right, left = (ball(shape, (centre, 23, 17), 8) * 2 for centre in (10, 29))  # mm; right at low indices
    distance = np.stack([left, left + 2, right, right + 4]).clip(-6, 6)  # lp, lw, rp, rw
    labels = np.where(left < 0, LEFT, np.where(right < 0, RIGHT, 0)).astype(np.uint8)
    points = np.moveaxis(apply_affine(affine, grid_points(shape, np.eye(4))), -1, 0).astype(np.float32)
    scan = make_scan(tmp_path, labels, affine, layout, distance=distance, mni=points)
    atlas = write_atlas_files(tmp_path)
    names = [name for name in select_outputs("volumes", layout, atlas) if name.startswith("atlas ")]
    select_outputs("volumes", layout, atlas)[names[0]](scan)
    thickness = {
        row["name"]: float(row["thickness_mm"]) for row in read_table(tmp_path / "scan_atlas-halves_regions.tsv")
    }
    assert thickness["right"] == pytest.approx(4, abs=0.3)
    assert thickness["left, behind"] == pytest.approx(2, abs=0.3)


def test_the_page_shows_what_the_atlas_warns_of(tmp_path: Path) -> None:
    selected = select_outputs("volumes,quality,report", LAYOUT, write_atlas_files(tmp_path))
    assert {name.split()[0] for name, write in selected.items() if write not in SHOWN} == {"volumes", "atlas"}


@pytest.mark.parametrize(
    ("table", "finding"),
    [
        ("number\tname\n", "the columns index and name are needed, found no rows"),
        ("index\tregion\n7\ta\n", "the columns index and name are needed, found index, region"),
        ("index\tname\n7\ta\n", "a row for every label of .*, found none for 3"),
        ("index\tname\nseven\ta\n", "whole numbers in the column index are needed"),
        ("index\tname\n0\tair\n", "labels above 0 in the column index are needed, found 0"),
    ],
)
def test_an_atlas_without_names_is_refused(tmp_path: Path, table: str, finding: str) -> None:
    with pytest.raises(ScanError, match=f"halves.tsv: {finding}"):
        select_outputs("segmentation", LAYOUT, write_atlas_files(tmp_path, table))
    (tmp_path / "halves.tsv").unlink()
    with pytest.raises(ScanError, match=r"halves\.tsv: the table of the atlas, .*, found no such file"):
        select_outputs("segmentation", LAYOUT, tmp_path / "halves.nii.gz")
