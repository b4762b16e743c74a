"""The inference configuration itself, with tiny networks that are random or compute something known."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor, nn

from brainfm_monai.networks import MultiTaskNet, TwoScaleUNet
from brainfm_monai.tasks import TaskLayout

FEATURES = [8, 8, 16]
LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")
OUTPUTS = (
    "segmentation,volumes,bias_field,distance,mni"  # those of the network's maps: the others have tests of their own
)
FILES = (
    "biasfield.json",
    "biasfield.nii.gz",
    "desc-biascorrected_image.json",
    "desc-biascorrected_image.nii.gz",
    "desc-freesurfer_dseg.json",
    "desc-freesurfer_dseg.nii.gz",
    "desc-itksnap_dseg.txt",
    "desc-lut_dseg.txt",
    "desc-ribbon_dseg.json",
    "desc-ribbon_dseg.nii.gz",
    "distance.json",
    "distance.nii.gz",
    "dseg.json",
    "dseg.nii.gz",
    "dseg.tsv",
    "finished.json",
    "mni.json",
    "mni.nii.gz",
    "volumes.json",
    "volumes.tsv",
)
RESULTS = ["dataset_description.json", "sub-1_T1w", "sub-2_T1w", "summary.tsv"]
Predict = Callable[..., None]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random but reproducible weights of the tiny network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MultiTaskNet(TwoScaleUNet(1, FEATURES), LAYOUT, stride=2)
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def predict(repository: Path, weights: Path) -> Predict:
    """Run bundle/configs/inference.json in this process; keywords override its values."""

    def run(source: Path, output_dir: Path, **overrides: Any) -> None:
        values: dict[str, Any] = {
            "input": str(source),
            "output_dir": str(output_dir),
            "bundle_root": str(repository / "bundle"),
            "weights": str(weights),
            "device": "$torch.device('cpu')",
            "network_def#backbone#features": FEATURES,
            "layout#tasks": list(LAYOUT.tasks),
            "precision": "float32",
            "outputs": OUTPUTS,
        }
        if "network_def" in overrides:  # a network that knows sides without seeing them has no use for a mirror image
            values |= {"mirror": False, "second_look": False}
        workflow = ConfigWorkflow(
            workflow_type="inference",
            config_file=str(repository / "bundle/configs/inference.json"),
            meta_file=str(repository / "bundle/configs/metadata.json"),
            logging_file=False,
            **{
                k: v
                for k, v in (values | overrides).items()
                if "network_def" not in overrides or not k.startswith("network_def#")
            },
        )
        workflow.initialize()
        workflow.run()

    return run


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A smooth random image without symmetry, values 0 to 1000."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 1, 5, 5, 5)))
    fine = nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)
    return np.asarray(fine[0, 0] * 1000, dtype=np.float32)


def oblique_affine(zooms_mm: tuple[float, float, float]) -> np.ndarray:
    """Affine of RAS-like axes, turned by about 12 degrees about two of them."""
    a, b = 0.21, -0.17
    turn = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn = turn @ np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * zooms_mm
    affine[:3, 3] = (-13.0, 21.0, 8.0)
    return affine


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def load(folder: Path, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    image: Any = nib.load(folder / f"{folder.name}_{suffix}.nii.gz")
    return np.asarray(image.dataobj), image.affine


ORIENTATIONS = [
    (order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)
]


def reorder(data: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Array with its first three axes permuted, then flipped, and the matrix from its indices to the old ones."""
    rest = tuple(range(3, data.ndim))
    turned = np.flip(data.transpose(*order, *rest), tuple(axis for axis in range(3) if flips[axis]))
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, old in enumerate(order):
        matrix[old, new] = -1 if flips[new] else 1
        matrix[old, 3] = data.shape[old] - 1 if flips[new] else 0
    return turned, matrix


def test_turning_a_scans_axes_changes_nothing_but_the_order_of_the_outputs_arrays(
    tmp_path: Path, predict: Predict
) -> None:
    # The network is random: any dependence on the order of the axes would show in its outputs.
    data, affine = blobs((21, 26, 17)), oblique_affine((1.1, 0.9, 1.6))
    for number, (order, flips) in enumerate(ORIENTATIONS):
        turned, matrix = reorder(data, order, flips)
        save(tmp_path / f"in/scan{number:02d}.nii.gz", turned, affine @ matrix)
    predict(tmp_path / "in", tmp_path / "out", outputs="segmentation,distance,mni,bias_field")
    reference = {name: load(tmp_path / "out/scan00", name)[0] for name in ("dseg", "distance", "mni", "biasfield")}
    assert len(np.unique(reference["dseg"])) > 3
    for number, (order, flips) in enumerate(ORIENTATIONS):
        for name, step in (
            ("dseg", 0),
            ("distance", 0.011),
            ("mni", 0.051),
            ("biasfield", 1.1e-3),
        ):  # steps of the files
            found, found_affine = load(tmp_path / f"out/scan{number:02d}", name)
            expected, matrix = reorder(reference[name], order, flips)
            np.testing.assert_allclose(found_affine, affine @ matrix, atol=1e-4)
            np.testing.assert_allclose(found, expected, rtol=0, atol=step, err_msg=f"{name} {order} {flips}")


class Threshold(nn.Module):
    """A network that knows: left thalamus where the image is bright; MNI coordinates are its own voxel indices."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.tensor(0.5))

    def forward(self, image: Tensor) -> Tensor:
        output = torch.full((1, LAYOUT.channels, *image.shape[2:]), -9.0)
        output[:, 0] = self.level
        output[:, 11] = image[:, 0]
        output[:, LAYOUT.slices["distance"]] = 5.0 * (self.level - image)
        output[:, LAYOUT.slices["log_bias_field"]] = np.log(2.0)
        index = torch.meshgrid(*(torch.arange(n) for n in image.shape[2:]), indexing="ij")
        output[:, LAYOUT.slices["mni"]] = torch.stack(index).float() / 100
        return output


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory, predict: Predict) -> tuple[Path, np.ndarray, np.ndarray]:
    """Folder of results, affine and centre (world mm) of a bright ball in an oblique scan of thick slices, stored as LPS-like."""
    tmp_path = tmp_path_factory.mktemp("phantom")
    shape, zooms = (40, 44, 12), (1.3, 1.1, 4.5)
    affine = oblique_affine(zooms) @ np.array([[-1, 0, 0, 39], [0, -1, 0, 43], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=float)
    centre = (affine @ [23.0, 18.0, 5.0, 1.0])[:3]
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(world - centre, axis=-1)
    save(tmp_path / "ball.nii.gz", (100 / (1 + np.exp((distance - 11) / 1.5))).astype(np.float32), affine)
    torch.save(Threshold().state_dict(), tmp_path / "threshold.pt")
    predict(tmp_path / "ball.nii.gz", tmp_path / "out", network_def=Threshold(), weights=str(tmp_path / "threshold.pt"))
    return tmp_path / "out/ball", affine, centre


def test_maps_of_an_oblique_scan_of_thick_slices_lie_in_its_grid(phantom: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, affine, centre = phantom
    assert sorted(f.name for f in folder.iterdir()) == [f"ball_{suffix}" for suffix in FILES]
    labels, found = load(folder, "dseg")
    assert labels.dtype == np.uint8
    assert labels.shape == (40, 44, 12)
    np.testing.assert_allclose(found, affine, atol=1e-5)
    assert set(np.unique(labels)) == {0, 11}
    mean_index = np.argwhere(labels == 11).mean(axis=0)
    offset_vox = np.linalg.solve(affine[:3, :3], centre - affine[:3, 3]) - mean_index
    assert np.abs(offset_vox).max() < 0.5
    volume_mm3 = (labels == 11).sum() * abs(np.linalg.det(affine[:3, :3]))
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * 11**3, rel=0.05)


def test_dense_maps_have_units_and_follow_the_scans_geometry(phantom: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, affine, _ = phantom
    distance, found = load(folder, "distance")
    np.testing.assert_allclose(found, affine, atol=1e-5)
    assert distance.shape == (40, 44, 12, 4)
    assert np.abs(distance).max() <= 3
    labels, _ = load(folder, "dseg")
    ball = np.argwhere(labels == 11)
    box = tuple(slice(a, b + 1) for a, b in zip(ball.min(0), ball.max(0), strict=True))
    field = load(folder, "biasfield")[0]
    np.testing.assert_allclose(field[box], 1.0, atol=1e-3)  # its median in the head is 1
    assert field[0, 0, 0] == pytest.approx(0.5, abs=1e-3)  # the network says 2; air far from the head is not computed
    np.testing.assert_allclose(distance[0, 0, 0], 3.0, atol=1e-6)
    index_mm, _ = load(folder, "mni")
    # The network wrote its own indices: 1 mm per step along the axes of the scan, turned to RAS, from a common origin.
    inner = index_mm[box]
    for axis, step in enumerate((-1.3, -1.1, 4.5)):
        np.testing.assert_allclose(np.diff(inner[..., axis], axis=axis), step, atol=0.051)  # steps of the file


def test_freesurfer_map_and_volumes_agree_with_the_label_map(phantom: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, affine, _ = phantom
    labels, _ = load(folder, "dseg")
    ids, found = load(folder, "desc-freesurfer_dseg")
    np.testing.assert_allclose(found, affine, atol=1e-5)
    np.testing.assert_array_equal(ids, np.where(labels == 11, 10, 0))
    rows = [line.split("\t") for line in (folder / "ball_volumes.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "name", "freesurfer_id", "side", "soft_mm3", "hard_mm3", "expected_dice"]
    volumes = {row[1]: float(row[5]) for row in rows[1:]}
    assert volumes.pop("Left-Thalamus") == pytest.approx((labels == 11).sum() * 1.3 * 1.1 * 4.5, abs=0.1)
    assert volumes.pop("Total-Brain") == volumes.pop("Intracranial-Volume") > 0
    assert not any(volumes.values())


def bad_scan(folder: Path, kind: str) -> Path:
    """Write a scan that cannot be used."""
    data = blobs((16, 16, 16))
    path = folder / f"{kind}.nii"
    if kind == "text":
        path.write_text("this is not an image\n" * 50)
        return path
    images = {
        "zero": np.zeros_like(data),
        "nan": np.full_like(data, np.nan),
        "frames": np.stack([data, data], axis=-1),
        "slice": data[..., 0],
        "thin": data[..., :1],
    }
    return save(path, images[kind])


BAD = {
    "text": "a NIfTI header is needed, found b'this' and the magic word b'not'",
    "zero": "an image with contrast is needed, found the value 0 in every voxel",
    "nan": r"finite voxels are needed, found none",
    "frames": r"one 3-D volume is needed, found 4-D data of shape \(16, 16, 16, 2\): pass --frame N",
    "slice": r"a 3-D volume of at least 2 voxels along each axis is needed, found shape \(16, 16\)",
    "thin": r"a 3-D volume of at least 2 voxels along each axis is needed, found shape \(16, 16, 1\)",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_scan_ends_the_run_with_one_line_and_no_output(kind: str, tmp_path: Path, predict: Predict) -> None:
    path = bad_scan(tmp_path, kind)
    with pytest.raises(SystemExit, match=BAD[kind]) as end:
        predict(path, tmp_path / "out")
    assert str(path) in str(end.value.code)
    assert "\n" not in str(end.value.code)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_an_empty_folder_end_the_run(tmp_path: Path, predict: Predict) -> None:
    with pytest.raises(
        SystemExit, match=r"none\.nii: a scan or a folder of scans is needed, found no such file or folder"
    ):
        predict(tmp_path / "none.nii", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty: a folder of scans \(.*\) is needed, found none in it"):
        predict(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_end_the_run(tmp_path: Path, predict: Predict) -> None:
    scan = save(tmp_path / "scan.nii", blobs((16, 16, 16)))
    with pytest.raises(
        SystemExit, match=r"random\.pt: the weights must fit the network, found 'backbone\.\S+' of shape"
    ) as end:
        predict(scan, tmp_path / "out", **{"network_def#backbone#features": [8, 8, 8]})
    assert "\n" not in str(end.value.code)
    assert not (tmp_path / "out").exists()


def test_among_many_scans_a_bad_one_is_skipped_and_the_rest_is_done(
    tmp_path: Path, predict: Predict, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("sub-1/T1w.nii.gz", "sub-2/T1w.nii.gz"):
        save(tmp_path / "in" / name, blobs((16, 16, 16)), oblique_affine((1.5, 1.5, 1.5)))
    bad_scan(tmp_path / "in", "frames")
    with pytest.raises(SystemExit, match="1 of 3 scans failed; the others are done"):
        predict(tmp_path / "in", tmp_path / "in/out")
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        f"{tmp_path / 'in/frames.nii'}: one 3-D volume is needed, found 4-D data of shape (16, 16, 16, 2): "
        "pass --frame N (from 0) or --frame mean"
    ]
    assert sorted(f.name for f in (tmp_path / "in/out").iterdir()) == sorted([".failed", *RESULTS])
    summary = [line.split("\t")[:4] for line in (tmp_path / "in/out/summary.tsv").read_text().splitlines()]
    assert [row[0] for row in summary] == ["scan", "frames", "sub-1_T1w", "sub-2_T1w"]
    assert [row[2] for row in summary] == ["status", "failed", "done", "done"]
    assert summary[1][3].startswith(str(tmp_path / "in/frames.nii"))
    assert (tmp_path / "in/out/sub-2_T1w/sub-2_T1w_dseg.nii.gz").is_file()
    (tmp_path / "in/frames.nii").unlink()
    predict(tmp_path / "in", tmp_path / "in/out")  # results of the first run are no scans, and may be replaced
    assert sorted(f.name for f in (tmp_path / "in/out").iterdir()) == sorted([".failed", *RESULTS])


def test_an_mgz_scan_is_read(tmp_path: Path, predict: Predict) -> None:
    affine = oblique_affine((1.0, 1.2, 2.0))
    nib.save(nib.MGHImage(blobs((20, 18, 16)), affine), tmp_path / "norm.mgz")
    predict(tmp_path / "norm.mgz", tmp_path / "out", outputs="segmentation,volumes")
    labels, found = load(tmp_path / "out/norm", "dseg")
    assert labels.shape == (20, 18, 16)
    np.testing.assert_allclose(found, affine, atol=1e-4)


def test_the_command_works_from_another_folder_and_fails_in_one_line(
    repository: Path, weights: Path, tmp_path: Path
) -> None:
    save(tmp_path / "scan.nii.gz", blobs((24, 20, 16)))
    bundle = repository / "bundle"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(bundle / "configs/inference.json")]
    command += ["--bundle_root", str(bundle), "--output_dir", "OUT", "--weights", str(weights)]
    command += [
        "--network_def#backbone#features",
        str(FEATURES),
        "--layout#tasks",
        str([*LAYOUT.tasks]),
        "--outputs",
        OUTPUTS,
    ]
    done = subprocess.run(
        [*command, "--input", "scan.nii.gz"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1/1" in done.stderr  # the progress bar
    assert sorted(f.name for f in (tmp_path / "OUT/scan").iterdir()) == [f"scan_{suffix}" for suffix in FILES]
    failed = subprocess.run(
        [*command, "--input", "none.nii"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert (
        failed.stderr.splitlines()[-1]
        == "none.nii: a scan or a folder of scans is needed, found no such file or folder"
    )
    assert "Traceback" not in failed.stderr
