"""Annotate, correct, train, infer again: with a real MONAI Label server, its own bundle app and ours."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from nibabel.affines import from_matvec
from nibabel.processing import resample_from_to

from brainfm_monai.anatomy import Protocol

# warnings of MONAI Label and of what it imports are not ours
pytestmark = [pytest.mark.label, pytest.mark.filterwarnings("default")]
pytest.importorskip("monailabel", reason="MONAI Label needs an environment of its own: make test-label")

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "brain_multitask"
START_S, ANSWER_S, TRAINING_S = 600, 900, 2400  # limits for a machine with much other work; none is waited for


def find_port() -> int:
    """A free port below those that the system gives to any process that asks for some port, before the server listens."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port below 32768 is free")


class Server:
    """One running server.

    Args:
        kind: ``stock``: MONAI Label's own ``monaibundle`` app with the bundle linked in; ``ours``: ``monailabel_app``.
        bundle: folder of the bundle.
        folder: for the studies, the app and the log.
    """

    def __init__(self, kind: str, bundle: Path, folder: Path) -> None:
        self.kind, self.bundle, self.studies = kind, bundle, folder / "studies"
        self.studies.mkdir(parents=True)
        self.port = find_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        conf = self._make_app(folder)
        command = [sys.executable, "-m", "monailabel.main", "start_server", "--studies", str(self.studies)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *conf]
        with self.log.open(
            "w"
        ) as log:  # one thread, as every test has: beside other programs, threads wait for threads
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._wait()

    def _make_app(self, folder: Path) -> list[str]:
        if self.kind == "ours":
            return ["--app", str(REPOSITORY / "monailabel_app"), "--conf", "bundle", str(self.bundle)]
        run(["-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", str(folder)])
        model = folder / "monaibundle" / "model" / MODEL
        model.parent.mkdir(parents=True, exist_ok=True)
        model.symlink_to(self.bundle)
        local = ["--conf", "models", MODEL, "--conf", "zoo_source", "local", "--conf", "sam2", "false"]
        return ["--app", str(folder / "monaibundle"), *local]

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                requests.get(f"{self.url}/info/", timeout=60)
                return
            except (requests.ConnectionError, requests.Timeout):
                time.sleep(0.5)
        raise RuntimeError(f"the server did not start: {self.tail()}")

    def tail(self) -> str:
        """End of the server's log."""
        return self.log.read_text(errors="replace")[-4000:]

    def get(self, path: str) -> Any:
        """JSON of an address."""
        answer = requests.get(f"{self.url}{path}", timeout=ANSWER_S)
        assert answer.ok, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def post(self, path: str, params: dict[str, Any] | None = None) -> Any:
        """JSON of an address that takes JSON."""
        answer = requests.post(f"{self.url}{path}", json=params, timeout=ANSWER_S)
        assert answer.ok, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def upload(self, image: str, path: Path) -> requests.Response:
        """Put a scan into the datastore."""
        with path.open("rb") as file:
            return requests.put(
                f"{self.url}/datastore/", params={"image": image}, files={"file": (path.name, file)}, timeout=ANSWER_S
            )

    def save_label(self, image: str, path: Path, label_info: list[dict[str, Any]]) -> None:
        """Save a corrected label, as 3D Slicer does."""
        params = json.dumps({"label_info": label_info, "model": MODEL})
        with path.open("rb") as file:
            answer = requests.put(
                f"{self.url}/datastore/label",
                params={"image": image, "tag": "final"},
                data={"params": params},
                files={"label": (path.name, file)},
                timeout=ANSWER_S,
            )
        assert answer.ok, answer.text

    def infer(self, model: str, image: str, output: str = "image", **params: Any) -> requests.Response:
        """Run a task on a scan."""
        return requests.post(
            f"{self.url}/infer/{model}",
            params={"image": image, "output": output},
            data={"params": json.dumps(params)},
            timeout=ANSWER_S,
        )

    def infer_file(self, model: str, image: str, path: Path, **params: Any) -> Path:
        """Run a task on a scan and keep the file that it returns."""
        answer = self.infer(model, image, **params)
        assert answer.ok, f"{model}: {answer.status_code} {answer.text}"
        path.write_bytes(answer.content)
        return path

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The state of a training (``train``) or of a batch inference (``batch/infer``) when it has ended."""
        end = time.monotonic() + TRAINING_S
        while time.monotonic() < end:
            state: dict[str, Any] = self.get(f"/{kind}/")
            if state["status"] not in ("SUBMITTED", "RUNNING"):
                return state
            time.sleep(1)
        raise TimeoutError(f"{kind}: {self.tail()}")

    def stop(self) -> None:
        """End the server and what it started."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


def run(words: list[str]) -> str:
    """Run a command of Python; what it prints."""
    done = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def copy_bundle(kind: str, folder: Path) -> Path:
    """A copy of the bundle, which trainings may write into, and whose trainings are shorter.

    The stock app gets what a model zoo distributes, with the package inside; ours what it needs of the repository.
    """
    target = folder / MODEL
    if kind == "stock":
        archive = run([str(REPOSITORY / "packaging" / "make_bundle.py"), "--output", str(folder)]).strip()
        shutil.unpack_archive(archive, folder)
    else:
        for part in ("configs", "models"):
            shutil.copytree(REPOSITORY / "bundle" / part, target / part, ignore=shutil.ignore_patterns("model_*"))
    values = target / "configs" / "label_train.json"
    values.write_text(json.dumps({**json.loads(values.read_text()), **SHORT_TRAINING}))
    return target


FAST = ["--mirror", "False", "--second_look", "False", "--memory", "low"]  # what a click gets
DELETED, GROWN = "left-hippocampus", "left-thalamus"  # by the annotator
KEPT = [s.name.lower() for s in Protocol.load("synthseg_head").structures[1:33] if s.name.lower() != DELETED]
SCANS = ("las", "oblique", "small")
SHORT_TRAINING = {"epoch_length": 2, "spatial_size": [48, 56, 48]}  # steps, voxels of 2 mm: the middle of the brain
LARGER_DICE = 0.02  # of the corrected structure, after a training of a few steps
SMALLEST_AGREEMENT = 0.9  # Dice of the other structures with what they were before the training
SMALLEST_DICE = 0.99  # of a structure of at least a thousand voxels, against the same network by another command


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nilearn's brain at 2 mm without its right frontal pole: from right to left, oblique with exchanged axes, and small.

    The template is symmetric; without the pole a mirrored result shows. The oblique scan has the middle of the brain,
    the small one a cube of it: requests whose point is not the scan are answered in a second.
    """
    from nilearn.datasets import load_mni152_template

    folder = tmp_path_factory.mktemp("scans")
    template = load_mni152_template(resolution=2)
    values = np.rint(template.get_fdata() / template.get_fdata().max() * 1000).astype(np.int16)
    where = nib.affines.apply_affine(template.affine, np.moveaxis(np.indices(values.shape), 0, -1))
    values[(where[..., 0] > 5) & (where[..., 1] > 35)] = 0  # mm, RAS
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = values.shape[0] - 1
    las = nib.Nifti1Image(values[::-1].copy(), template.affine @ flip)
    a, b = np.deg2rad([12, 9])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    matrix = (turn @ tilt)[:, [2, 0, 1]] * [2.0, -2.0, 3.0]
    shape = (44, 104, 80)
    grid = from_matvec(matrix, np.array([0, -18, 8]) - matrix @ ((np.array(shape) - 1) / 2))
    oblique = resample_from_to(nib.Nifti1Image(values.astype(np.float32), template.affine), (shape, grid), order=1)
    images = {"las": las, "oblique": nib.Nifti1Image(np.rint(oblique.get_fdata()).astype(np.int16), grid)}
    images["small"] = las.slicer[34:66, 42:74, 30:62]
    assert nib.aff2axcodes(las.affine) == ("L", "A", "S")
    paths = {name: folder / f"{name}.nii.gz" for name in images}
    paths["small"] = tmp_path_factory.mktemp("small") / "small.nii.gz"  # which the command does not segment
    for name, image in images.items():
        nib.save(image, paths[name])
    return paths


@pytest.fixture(scope="module", params=["stock", "ours"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which app; the tests of this file run in their order, first with one app, then with the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared subjects, for both apps: the second finds what the first prepared of the same scan and label."""
    return tmp_path_factory.mktemp("subjects")


@pytest.fixture(scope="module")
def bundle(kind: str, subjects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle for each app: a training adds weights to it."""
    copy = copy_bundle(kind, tmp_path_factory.mktemp(f"bundle_{kind}"))
    (copy / "training_label").mkdir()
    (copy / "training_label" / "subjects").symlink_to(subjects)
    return copy


@pytest.fixture(scope="session")
def predicted(scans: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Labels of the command, with the settings of a click."""
    output = tmp_path_factory.mktemp("predicted")
    words = ["--bundle", str(REPOSITORY / "bundle"), "--outputs", "segmentation", *FAST]
    run(["-m", "brainfm_monai", "predict", str(scans["las"].parent), str(output), *words])
    return {name: output / name / f"{name}_dseg.nii.gz" for name in ("las", "oblique")}


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    """Labels of the first click on each scan."""
    return {}


@pytest.fixture(scope="session")
def correction(predicted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The label of one scan with a segment deleted and one grown, as Slicer saves it: what is left is numbered anew."""
    from scipy import ndimage

    image: Any = nib.load(predicted["las"])
    labels, numbers = (
        np.array(image.dataobj),
        {s.name.lower(): s.label for s in Protocol.load("synthseg_head").structures},
    )
    labels[ndimage.binary_dilation(labels == numbers[GROWN])] = numbers[GROWN]
    moved = np.zeros_like(labels)
    for value, name in enumerate(KEPT, start=1):
        moved[labels == numbers[name]] = value
    path = tmp_path_factory.mktemp("correction") / "las.nii.gz"
    nib.save(nib.Nifti1Image(moved, image.affine), path)
    return path


@pytest.fixture(scope="module")
def server(kind: str, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the app."""
    running = Server(kind, bundle, tmp_path_factory.mktemp(kind))
    yield running
    running.stop()


def _labels(path: Path) -> tuple[np.ndarray, np.ndarray, np.dtype[Any]]:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj), image.affine, image.get_data_dtype()


def _dice(one: np.ndarray, two: np.ndarray) -> dict[int, float]:
    large = [label for label, count in enumerate(np.bincount(two.ravel())) if label and count >= 1000]
    return {
        label: 2 * ((one == label) & (two == label)).sum() / ((one == label).sum() + (two == label).sum())
        for label in large
    }


def _names(server: Server) -> dict[str, int]:
    labels: dict[str, int] = server.get("/info/")["models"][MODEL]["labels"]
    return labels


def test_the_structures_are_named_and_numbered_from_one(server: Server) -> None:
    info = server.get("/info/")
    labels = info["models"][MODEL]["labels"]
    assert sorted(labels.values()) == list(range(1, 44))
    assert labels["bone-cancellous"] == 42
    assert labels["right-hippocampus"] == labels["left-hippocampus"] + 14
    config = info["models"][MODEL]["config"]
    assert config["mode"] == ["whole_head", "brain"]
    assert config["memory"][0] == "low"
    assert not config["mirror"]
    assert not config["second_look"]
    assert MODEL in info["trainers"]
    if server.kind == "ours":
        assert {"uncertainty", "random", "first"} <= set(info["strategies"])
        assert info["models"]["histogram"]["type"] == "scribbles"
        assert info["colours"]["left-hippocampus"] == [220, 216, 20]
        script = requests.get(f"{server.url}/slicer.py", timeout=ANSWER_S).text
        assert '"left-hippocampus": [220, 216, 20]' in script
        compile(script, "slicer.py", "exec")


def test_the_list_of_structures_may_leave_out_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "monailabel_app"))
    task = importlib.import_module("brain_app.segmentation").SegmentationTask(
        str(REPOSITORY / "bundle"), {"structures": "brain"}
    )
    assert sorted(task.labels.values()) == list(range(1, 33))
    assert task.config()["mode"] == ["brain"]


def test_scans_are_uploaded(server: Server, scans: dict[str, Path]) -> None:
    for name, path in scans.items():
        assert server.upload(name, path).json() == {"image": name}
    assert server.get("/datastore/")["total"] == len(scans)


@pytest.mark.parametrize("name", ["las", "oblique"])
def test_labels_are_those_of_predict_in_the_grid_of_the_scan(
    server: Server,
    scans: dict[str, Path],
    predicted: dict[str, Path],
    name: str,
    answers: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    labels, affine, dtype = _labels(server.infer_file(MODEL, name, tmp_path / "labels.nii.gz"))
    answers[name] = labels
    expected, _, _ = _labels(predicted[name])
    _, grid, _ = _labels(scans[name])
    assert dtype == np.uint8
    assert labels.shape == expected.shape
    assert np.allclose(affine, grid, atol=1e-4)
    assert min(_dice(labels, expected).values()) > SMALLEST_DICE
    left, right = (np.argwhere(labels == _names(server)[f"{side}-hippocampus"]).mean(0) for side in ("left", "right"))
    assert (affine[:3, :3] @ (left - right))[0] < -20  # mm, RAS: the left is to the left of the right


def test_json_and_both_and_the_client(server: Server, tmp_path: Path) -> None:
    from monailabel.client import MONAILabelClient

    known = server.infer(MODEL, "small", "json").json()
    assert known["label_names"] == _names(server)
    both = server.infer(MODEL, "small", "all")
    assert both.headers["content-type"].startswith("multipart/form-data")
    client = MONAILabelClient(server.url, str(tmp_path))
    assert client.info()["models"][MODEL]["type"] == "segmentation"
    file, _ = client.infer(MODEL, "small", {"mode": "brain", "result_dtype": "uint8"})
    labels, _, dtype = _labels(Path(file))
    assert dtype == np.uint8
    assert labels.any()
    assert labels.max() <= 32  # no tissue of the head


def test_maps_come_from_one_pass_with_their_own_geometry(
    server: Server, scans: dict[str, Path], tmp_path: Path
) -> None:
    if server.kind == "stock":
        pytest.skip("the stock app has the segmentation alone")
    known = server.infer("brain_maps", "oblique", "json").json()
    assert {"T1w", "T2w", "FLAIR", "CT", "bias_corrected", "bias_field", "distance", "lesion"} == set(known["maps"])
    assert known["volumes_mm3"]["Left-Hippocampus"] > 1000
    scan: Any = nib.load(scans["oblique"])
    for tag in ("bias_corrected", "distance", "lesion"):
        image: Any = nib.load(server.infer_file(tag, "oblique", tmp_path / f"{tag}.nii.gz"))
        assert image.shape[:3] == scan.shape
        assert np.allclose(image.affine, scan.affine, atol=1e-4)
    t1w: Any = nib.load(server.infer_file("T1w", "oblique", tmp_path / "T1w.nii.gz"))
    assert nib.aff2axcodes(t1w.affine) == ("R", "A", "S")  # the network's grid
    there = resample_from_to(
        nib.Nifti1Image(t1w.get_fdata(), t1w.affine), (scan.shape, scan.affine), order=1
    ).get_fdata()
    assert nib.aff2axcodes(scan.affine)[1] == "L"  # the axis that a mirrored map would differ along
    brain = np.asarray(scan.dataobj) > 100
    values = np.asarray(scan.dataobj)[brain]
    fit, mirrored = (np.corrcoef(image[brain], values)[0, 1] for image in (there, there[:, ::-1]))
    assert fit > max(0.7, mirrored)
    stored = server.get("/datastore/?output=all")["objects"]["oblique"]["labels"]
    assert {"T1w", "CT", "distance", "original"} <= set(stored)
    assert server.get("/datastore/")["completed"] == 0  # maps are no labels


def test_scribbles_find_a_structure_in_an_oblique_scan(
    server: Server, scans: dict[str, Path], predicted: dict[str, Path], tmp_path: Path
) -> None:
    if server.kind == "stock":
        pytest.skip("the stock app has no scribbles")
    from scipy import ndimage

    labels, affine, _ = _labels(predicted["oblique"])
    names = _names(server)
    fluid = labels == names["left-lateral-ventricle"]
    around = ndimage.binary_dilation(fluid, iterations=3) & ~ndimage.binary_dilation(fluid, iterations=1)
    scribbles = np.zeros(labels.shape, np.uint8)
    scribbles[around & (labels != names["left-inf-lat-vent"])] = 2  # background
    scribbles[ndimage.binary_erosion(fluid)] = 3  # foreground
    path = tmp_path / "scribbles.nii.gz"
    nib.save(nib.Nifti1Image(scribbles, affine), path)
    info = [{"name": "background_scribbles", "id": 2}, {"name": "foreground_scribbles", "id": 3}]
    box = np.argwhere(ndimage.binary_dilation(fluid, iterations=5))
    roi = [int(x) for pair in zip(box.min(0), box.max(0), strict=True) for x in pair]
    with path.open("rb") as file:
        answer = requests.post(
            f"{server.url}/infer/histogram",
            params={"image": "oblique", "output": "image"},
            data={"params": json.dumps({"label_info": info, "roi": roi})},
            files={"label": (path.name, file)},
            timeout=ANSWER_S,
        )
    assert answer.ok, answer.text
    (tmp_path / "cut.nii.gz").write_bytes(answer.content)
    cut, grid, _ = _labels(tmp_path / "cut.nii.gz")
    assert cut.shape == labels.shape
    assert np.allclose(grid, affine, atol=1e-4)
    assert 2 * ((cut > 0) & fluid).sum() / ((cut > 0).sum() + fluid.sum()) > 0.6


def test_the_next_scan_is_offered(server: Server) -> None:
    strategies = ["first", "random"] + (["uncertainty"] if server.kind == "ours" else [])
    for strategy in strategies:
        chosen = server.post(f"/activelearning/{strategy}", {})
        assert chosen["id"] in SCANS
    if server.kind == "ours":
        assert chosen["scored"] == chosen["unlabeled"] == len(SCANS)
        assert 0 < chosen["score"] < 0.5
        scores = [server.get(f"/datastore/image/info?image={name}")["uncertainty"]["model.pt"] for name in SCANS]
        assert chosen["score"] == max(scores)
        assert min(scores) < max(scores)


@pytest.fixture(scope="module")
def corrected(server: Server, correction: Path) -> Path:
    """The corrected label, saved on the server."""
    server.save_label("las", correction, [{"name": name, "idx": value} for value, name in enumerate(KEPT, start=1)])
    return correction


def test_a_corrected_label_counts(server: Server, corrected: Path) -> None:
    assert server.get("/datastore/")["completed"] == 1
    info = server.get("/datastore/label/info?label=las&tag=final")
    assert info["label_info"][0]["name"] == "3rd-ventricle"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _dice_of(name: str, labels: np.ndarray, path: Path, names: dict[str, int]) -> float:
    """Dice of a structure with the corrected label, whose values are those that are left."""
    corrected = np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
    one, two = labels == names[name], corrected == KEPT.index(name) + 1
    return float(2 * (one & two).sum() / (one.sum() + two.sum()))


def test_training_makes_weights_that_answer_as_the_correction(
    server: Server, corrected: Path, bundle: Path, answers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    shipped, names, before = _hash(bundle / "models" / "model.pt"), _names(server), answers["las"]
    known, found = set(bundle.glob("models/*.pt")), [before]
    for epochs in (2, 1):  # the second click trains, too
        server.post(f"/train/{MODEL}", {"max_epochs": epochs, "device": "cpu"})
        state = server.wait_for("train")
        assert state["status"] == "DONE", state["details"]
        (new,) = set(bundle.glob("models/*.pt")) - known
        known.add(new)
        labels = _labels(server.infer_file(MODEL, "las", tmp_path / f"{new.stem}.nii.gz", model_filename=new.name))[0]
        assert all((labels != other).any() for other in found)
        found.append(labels)
    old, first, second = (_dice_of(GROWN, labels, corrected, names) for labels in found)
    assert first > old + LARGER_DICE
    assert second > old + LARGER_DICE
    still = {
        label: dice for label, dice in _dice(found[1], before).items() if label not in (names[GROWN], names[DELETED])
    }
    assert np.mean(list(still.values())) > SMALLEST_AGREEMENT
    assert _hash(bundle / "models" / "model.pt") == shipped
    again = _labels(server.infer_file(MODEL, "las", tmp_path / "again.nii.gz", model_filename="model.pt"))[0]
    assert np.array_equal(again, before)  # going back is one option
    if server.kind == "ours":
        info = server.get("/info/")
        assert info["models"][MODEL]["config"]["model_filename"][0] == new.name  # served at once
        assert info["train_stats"][MODEL]["epoch"] == info["train_stats"][MODEL]["total_epochs"] == 1


def test_the_subject_of_a_corrected_label_has_what_is_left_under_its_names(
    bundle: Path, server: Server, corrected: Path
) -> None:
    # one subject, of all trainings through both apps: what was prepared is not prepared again
    (folder,) = [path.parent for path in bundle.glob("training_label/subjects/las*/segmentation.nii.gz")]
    present = set(np.unique(np.asarray(nib.load(folder / "segmentation.nii.gz").dataobj)).astype(int))  # type: ignore[attr-defined]
    names = _names(server)
    assert names[DELETED] not in present
    assert {names["right-hippocampus"], names["left-amygdala"], names["right-accumbens-area"]} <= present


def test_batch_inference_as_slicer_asks_for_it(server: Server) -> None:
    # Slicer sends multi_gpu, which divides by the number of GPUs in the stock app
    params = {"device": "cpu"} | (
        {"multi_gpu": False} if server.kind == "stock" else {"multi_gpu": True, "gpus": "all"}
    )
    labels = server.studies / "labels" / "original"
    assert not (labels / "small.nii.gz").exists()
    server.post(f"/batch/infer/{MODEL}?images=unlabeled", params)
    state = server.wait_for("batch/infer")
    assert state["status"] == "DONE", state["details"]
    assert {path.name for path in labels.iterdir()} == {"oblique.nii.gz", "small.nii.gz"}


def test_eight_requests_at_once(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.infer(MODEL, "small", mode="brain"), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({hashlib.sha256(answer.content).hexdigest() for answer in answers}) == 1


def test_a_broken_upload_is_refused_and_the_server_lives_on(server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"this is no scan")
    answer = server.upload("broken", broken)
    if answer.ok:  # the stock app takes any file, and fails when it is asked for labels
        answer = server.infer(MODEL, "broken")
    assert answer.status_code in ({422} if server.kind == "ours" else {500}), answer.text
    if server.kind == "ours":
        assert "broken" in json.loads(answer.text)["detail"]
        assert server.infer(MODEL, "nobody").status_code == 404
    assert server.infer(MODEL, "small", "json", mode="brain").ok
