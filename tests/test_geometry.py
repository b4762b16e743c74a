"""Known places in the world come out where they are, in every output, however the scan is stored.

The network is replaced by an oracle that reads the affine of what it is given and computes known fields of world coordinates:
whatever is lost on the way through the axes, the grids and the files shows as a distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

from brainfm_monai.outputs.template import TEMPLATE_SPACE, TO_SCAN, TO_TEMPLATE
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")
ORIENTATIONS = [
    (order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)
]
SHAPE, ZOOMS = (46, 54, 22), (1.3, 1.1, 2.6)
LEFT, RIGHT = np.array([-16.0, 4.0, 9.0]), np.array([11.0, -6.0, 2.0])  # centres of two balls, RAS mm
LEFT_RADIUS, RIGHT_RADIUS, WHITE_DEPTH = 12.0, 9.0, 2.2
BLOB_MM, SPOT_MM = np.array([-14.0, 6.0, 7.0]), 4.0  # a bright spot of the scan
TEMPLATE_BLOB_MM = np.array([8.0, -9.0, 6.0])  # and of the template
TO_MNI = np.array([[1.06, 0.03, -0.02, 3.0], [-0.04, 0.95, 0.06, -5.0], [0.01, -0.05, 1.02, 7.0], [0, 0, 0, 1]])
TEMPLATE_AFFINE = np.array([[2.0, 0, 0, -50], [0, 2.0, 0, -54], [0, 0, 2.0, -40], [0, 0, 0, 1]])
TEMPLATE_SHAPE = (52, 54, 50)
OUTPUTS = "segmentation,volumes,distance,surfaces,mni,transforms,bias_field"


def to_mni(world: np.ndarray) -> np.ndarray:
    """The true map to the template: affine and a smooth bend of up to 1.5 mm."""
    bend = 1.5 * np.exp(-((world - LEFT) ** 2).sum(-1, keepdims=True) / (2 * 20.0**2)) * np.array([1.0, -1.0, 0.5])
    return np.asarray(world @ TO_MNI[:3, :3].T + TO_MNI[:3, 3] + bend)


def world_of(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return np.asarray(index @ affine[:3, :3].T + affine[:3, 3])


def spot(world: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-((world - centre) ** 2).sum(-1) / (2 * SPOT_MM**2)), dtype=np.float32)


class Oracle(Inferer):
    """Known fields of the world coordinates of whatever it is given."""

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(inputs, MetaTensor)
        world = world_of(tuple(inputs.shape[2:]), np.asarray(inputs.affine, dtype=np.float64).reshape(-1, 4, 4)[0])
        left = np.linalg.norm(world - LEFT, axis=-1) - LEFT_RADIUS
        right = np.linalg.norm(world - RIGHT, axis=-1) - RIGHT_RADIUS
        output = torch.full((1, LAYOUT.channels, *world.shape[:3]), -9.0)
        output[0, 0] = 0.0
        output[0, 6], output[0, 20] = torch.from_numpy(-left).float(), torch.from_numpy(-right).float()  # cortex
        distance = np.stack([left, left + WHITE_DEPTH, right, right + WHITE_DEPTH])
        output[0, LAYOUT.slices["distance"]] = torch.from_numpy(distance).float()
        output[0, LAYOUT.slices["log_bias_field"]] = 0.1
        output[0, LAYOUT.slices["mni"]] = torch.from_numpy(np.moveaxis(to_mni(world), -1, 0) / 100).float()
        found = MetaTensor(output).copy_meta_from(inputs)
        found.is_batch = inputs.is_batch
        return found


def oblique_affine() -> np.ndarray:
    a, b, c = 0.21, -0.17, 0.12
    turn = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn = turn @ np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    turn = turn @ np.array([[np.cos(c), 0, np.sin(c)], [0, 1, 0], [-np.sin(c), 0, np.cos(c)]])
    affine = np.eye(4)
    affine[:3, :3] = turn * ZOOMS
    affine[:3, 3] = np.array([-3.0, 0.0, 4.0]) - affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


def reorder(
    shape: tuple[int, ...], order: tuple[int, ...], flips: tuple[bool, ...]
) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape after a permutation and flips of the axes, and the matrix from the new indices to the old ones."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, old in enumerate(order):
        matrix[old, new] = -1 if flips[new] else 1
        matrix[old, 3] = shape[old] - 1 if flips[new] else 0
    return tuple(shape[old] for old in order), matrix


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Folder of the results of one scan stored in all 48 ways; the template is small and has one bright spot."""
    folder = tmp_path_factory.mktemp("geometry")
    (folder / "in").mkdir()
    for number, (order, flips) in enumerate(ORIENTATIONS):
        shape, matrix = reorder(SHAPE, order, flips)
        affine = oblique_affine() @ matrix
        image = 20 + 1000 * spot(world_of(shape, affine), BLOB_MM)
        nib.save(nib.Nifti1Image(image, affine), folder / f"in/scan{number:02d}.nii")
    template = spot(world_of(TEMPLATE_SHAPE, TEMPLATE_AFFINE), TEMPLATE_BLOB_MM), TEMPLATE_AFFINE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfm_monai.outputs.template.load_template", lambda: template)
        # The scan is one bright spot: it knows nothing of the surfaces, and would move the white one.
        patch.setattr(
            "brainfm_monai.transforms.cortex.measure_white", lambda white, *_: (white, torch.zeros_like(white))
        )
        torch.save({"level": torch.zeros(1)}, folder / "none.pt")
        tasks: dict[str, Any] = {"layout#tasks": list(LAYOUT.tasks)}
        workflow = ConfigWorkflow(
            workflow_type="inference",
            config_file=str(repository / "bundle/configs/inference.json"),
            meta_file=str(repository / "bundle/configs/metadata.json"),
            logging_file=False,
            bundle_root=str(repository / "bundle"),
            input=str(folder / "in"),
            output_dir=str(folder / "out"),
            device="$torch.device('cpu')",
            inferer=Oracle(),
            network_def={"_target_": "torch.nn.Identity"},
            initialize=[],
            weights=str(folder / "none.pt"),
            outputs=OUTPUTS,
            surface_levels_mm=[0.0, 0.0],  # the distances of the oracle have no bias
            **tasks,
        )
        workflow.initialize()
        workflow.run()
    return folder / "out"


def load(folder: Path, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    image: Any = nib.load(folder / f"{folder.name}_{suffix}.nii.gz")
    return np.asarray(image.dataobj), np.asarray(image.affine)


def centroid_mm(weights: np.ndarray, affine: np.ndarray) -> np.ndarray:
    world = world_of(weights.shape, affine)
    return np.asarray((world * weights[..., None]).sum((0, 1, 2)) / weights.sum())


@pytest.mark.parametrize("number", range(48))
def test_volumes_and_maps_lie_where_they_are(results: Path, number: int) -> None:
    folder = results / f"scan{number:02d}"
    shape, matrix = reorder(SHAPE, *ORIENTATIONS[number])
    labels, affine = load(folder, "dseg")
    np.testing.assert_allclose(affine, oblique_affine() @ matrix, atol=1e-4)
    assert labels.shape == shape
    for label, centre, radius in ((6, LEFT, LEFT_RADIUS), (20, RIGHT, RIGHT_RADIUS)):
        found = np.argwhere(labels == label).mean(axis=0)
        truth = np.linalg.solve(affine[:3, :3], centre - affine[:3, 3])
        assert np.abs(found - truth).max() < 0.5
        count = (labels == label).sum() * np.prod(ZOOMS)
        assert count == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.05)
    world = world_of(shape, affine)
    distance, _ = load(folder, "distance")
    left = np.linalg.norm(world - LEFT, axis=-1) - LEFT_RADIUS
    right = np.linalg.norm(world - RIGHT, axis=-1) - RIGHT_RADIUS
    for channel, truth in enumerate((left, left + WHITE_DEPTH, right, right + WHITE_DEPTH)):
        near = np.abs(truth) < 1.5
        assert np.abs(distance[..., channel] - truth)[near].max() < 0.3
    coordinates, _ = load(folder, "mni")
    inner = left < -2
    assert np.abs(coordinates - to_mni(world))[inner].max() < 0.1


@pytest.mark.parametrize("number", range(48))
def test_surfaces_lie_where_they_are(results: Path, number: int) -> None:
    folder = results / f"scan{number:02d}"
    truth = {("L", "pial"): (LEFT, LEFT_RADIUS), ("L", "white"): (LEFT, LEFT_RADIUS - WHITE_DEPTH)}
    truth |= {("R", "pial"): (RIGHT, RIGHT_RADIUS), ("R", "white"): (RIGHT, RIGHT_RADIUS - WHITE_DEPTH)}
    for (side, name), (centre, radius) in truth.items():
        surface: Any = nib.load(folder / f"{folder.name}_hemi-{side}_{name}.surf.gii")
        vertices, faces = surface.agg_data("pointset"), surface.agg_data("triangle")
        assert np.abs(np.linalg.norm(vertices - centre, axis=1) - radius).max() < 0.1
        a, b, c = (vertices[faces[:, i]].astype(np.float64) - centre for i in range(3))
        volume = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6  # positive where triangles turn outwards
        assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.05)


def displacement(folder: Path, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each voxel of a field's grid goes, RAS mm, and where it is."""
    field, affine = load(folder, suffix)
    assert field.shape[3:] == (1, 3)
    start = world_of(field.shape[:3], affine)
    return start + field[:, :, :, 0] * [-1, -1, 1], start


@pytest.mark.parametrize("number", range(48))
def test_transforms_lead_where_they_should(results: Path, number: int) -> None:
    folder = results / f"scan{number:02d}"
    goal, start = displacement(folder, f"{TO_SCAN}_xfm")
    inside = np.linalg.norm(start - LEFT, axis=-1) < LEFT_RADIUS
    assert np.linalg.norm(goal - to_mni(start), axis=-1)[inside].max() < 0.5
    back, template_place = displacement(folder, f"{TO_TEMPLATE}_xfm")
    inside = np.linalg.norm(back - LEFT, axis=-1) < LEFT_RADIUS
    assert inside.sum() > 20
    assert np.linalg.norm(to_mni(back) - template_place, axis=-1)[inside].max() < 0.5
    moved, affine = load(folder, f"space-{TEMPLATE_SPACE}_image")
    np.testing.assert_allclose(centroid_mm(np.maximum(moved - 100, 0), affine), to_mni(BLOB_MM), atol=0.5)
    over, affine = load(folder, f"desc-{TEMPLATE_SPACE}_T1w")
    np.testing.assert_allclose(to_mni(centroid_mm(np.maximum(over - 0.1, 0), affine)), TEMPLATE_BLOB_MM, atol=0.5)


@pytest.mark.parametrize("number", [0, 13, 22, 47])
def test_itk_reads_the_transforms_as_we_do(results: Path, number: int) -> None:
    import itk

    folder = results / f"scan{number:02d}"
    prefix = f"{folder / folder.name}_"
    matrix = np.loadtxt(f"{prefix}from-scan_to-{TEMPLATE_SPACE}_mode-points_desc-affine_xfm.txt")
    reader = itk.TransformFileReaderTemplate[itk.D].New(FileName=f"{prefix}{TO_TEMPLATE}_desc-affine_xfm.tfm")
    reader.Update()
    affine = itk.down_cast(reader.GetTransformList().front())
    flip = np.array([-1, -1, 1])
    for point in (LEFT, RIGHT, BLOB_MM):
        in_template = (matrix @ [*point, 1])[:3]
        found = np.array(affine.TransformPoint([float(v) for v in in_template * flip])) * flip
        np.testing.assert_allclose(found, point, atol=1e-4)

    stored = itk.imread(f"{prefix}{TO_TEMPLATE}_xfm.nii.gz", itk.Vector[itk.F, 3])
    vectors = np.ascontiguousarray(itk.array_from_image(stored), dtype=np.float64)
    field = itk.image_view_from_array(
        vectors, ttype=itk.Image[itk.Vector[itk.D, 3], 3]
    )  # what ITK's transform takes in Python
    field.CopyInformation(stored)
    transform = itk.DisplacementFieldTransform[itk.D, 3].New(DisplacementField=field)
    ours = itk.imread(f"{prefix}space-{TEMPLATE_SPACE}_image.nii.gz", itk.F)
    moving = itk.imread(str(results.parent / f"in/{folder.name}.nii"), itk.F)
    moved = itk.resample_image_filter(moving, transform=transform, use_reference_image=True, reference_image=ours)
    theirs, mine = itk.array_from_image(moved), itk.array_from_image(ours)
    both = (theirs > 0) & (
        mine > 19.9
    )  # at the edge of the scan, whose background is 20, the one fades and the other ends
    assert both.mean() > 0.05
    assert mine[both].max() > 800
    assert np.abs(theirs - mine)[both].max() < 1  # of 1000


def test_the_two_directions_undo_each_other(results: Path) -> None:
    folder = results / "scan05"
    back, place = displacement(folder, f"{TO_TEMPLATE}_xfm")
    field, affine = load(folder, f"{TO_SCAN}_xfm")
    from scipy.ndimage import map_coordinates

    inside = np.linalg.norm(back - LEFT, axis=-1) < LEFT_RADIUS + 4
    index = np.linalg.solve(affine[:3, :3], (back[inside] - affine[:3, 3]).T)
    step = np.stack([map_coordinates(field[:, :, :, 0, axis], index, order=1) for axis in range(3)], axis=-1) * [
        -1,
        -1,
        1,
    ]
    assert np.linalg.norm(back[inside] + step - place[inside], axis=-1).max() < 0.05
