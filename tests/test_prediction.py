"""Which outputs, which share of a list, many scans with broken ones among them, an interrupted run, and one image in Python."""

from __future__ import annotations

import html
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

import brainfm_monai
from brainfm_monai.io import ScanError
from brainfm_monai.networks import MultiTaskNet, TwoScaleUNet
from brainfm_monai.prediction import OUTPUTS, local_device, select_outputs, share_of
from brainfm_monai.prediction.loop import run_scans
from brainfm_monai.tasks import TaskLayout

FEATURES = [8, 8, 16]
LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a tiny network: only whether files are whole matters here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MultiTaskNet(TwoScaleUNet(1, FEATURES), LAYOUT, stride=2)
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save(network.state_dict(), path)
    return path


def write_scan(path: Path, seed: int = 0, size: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).random((size, size + 2, size - 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([1.5, 1.2, 2.0, 1.0])), path)
    return path


def test_outputs_are_chosen_by_name() -> None:
    everything = select_outputs("all", LAYOUT)
    absent = {"contrasts", "lesion", "age", "embedding", "uncertainty"}
    assert list(everything) == [name for name in OUTPUTS if name not in absent]
    rest = TaskLayout(["segmentation", "CT", "lesion", "age", "embedding"], uncertainty=["CT"])
    assert absent <= set(select_outputs("all", rest))
    assert list(select_outputs("report, volumes", LAYOUT)) == ["volumes", "report"]  # in the table's order
    assert list(select_outputs(["contrasts"], TaskLayout(["segmentation", "CT"]))) == ["contrasts"]
    assert "contrasts" in select_outputs("all", TaskLayout(["segmentation", "T1w"]))
    with pytest.raises(
        ValueError, match=r"outputs: 'all' or names out of segmentation, .* are needed, found thickness"
    ):
        select_outputs("volumes,thickness", LAYOUT)
    with pytest.raises(
        ValueError, match=r"outputs: 'contrasts' needs a network that predicts T1w or .*, found one for segmentation, "
    ):
        select_outputs("contrasts", LAYOUT)


@pytest.mark.parametrize(("count", "shards", "world"), [(20, 3, 1), (7, 4, 2), (2, 4, 3), (0, 2, 2)])
def test_shares_hold_every_scan_once(monkeypatch: pytest.MonkeyPatch, count: int, shards: int, world: int) -> None:
    shares = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        shares += [share_of(count, f"{shard}/{shards}") for shard in range(1, shards + 1)]
    assert sorted(number for share in shares for number in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2


def test_a_wrong_shard_is_refused() -> None:
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0"):
        with pytest.raises(ValueError, match="shard: i/n with i from 1 to n is needed, found"):
            share_of(4, wrong)
    assert share_of(3) == [0, 1, 2]


def test_the_device_is_a_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_device() == torch.device("cuda", 2)


def command(repository: Path, weights: Path, source: Path, output: Path, *more: str) -> list[str]:
    bundle = repository / "bundle"
    start = [sys.executable, "-m", "brainfm_monai", "predict", str(source), str(output), "--bundle", str(bundle)]
    settings = [
        "--weights",
        str(weights),
        "--network_def#backbone#features",
        str(FEATURES),
        "--device",
        "$torch.device('cpu')",
    ]
    settings += ["--layout#tasks", str([*LAYOUT.tasks])]
    return [*start, *settings, "--precision", "float32", "--outputs", "segmentation,volumes,distance,bias_field", *more]


# Ends its own process as `kill -9` does, at a moment that is known: the first file of a scan is at its place, the others not.
KILLER = """
import os, signal
from pathlib import Path

killed, begun = Path({killed!r}), []

def move_or_die(self, target):
    os.replace(self, target)
    if self.parent.parent.name == ".partial" and Path(target).parent != self.parent:
        begun.extend({{self.parent}} - {{*begun}})
        if len(begun) > {finished} and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return Path(target)

Path.replace = move_or_die
"""


def write_killer(folder: Path, finished: int) -> tuple[Path, Path]:
    """Code that kills the process of it after so many finished scans, and the file that is there when it has."""
    (folder / "killer.py").write_text(KILLER.format(killed=str(folder / "killed"), finished=finished))
    return folder / "killer.py", folder / "killed"


def finished(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix("_finished.json") for path in folder.glob("*/[!.]*_finished.json"))


def rows_of(table: Path) -> dict[str, list[str]]:
    return {line.split("\t")[0]: line.split("\t") for line in table.read_text().splitlines()[1:]}


def test_twenty_scans_with_two_broken_ones_survive_a_kill(repository: Path, weights: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    for number in range(18):
        write_scan(source / f"scan{number:02d}.nii.gz", number, size=40)
    (source / "broken_text.nii").write_text("this is not an image\n" * 50)
    cut = write_scan(source / "broken_cut.nii.gz", 5, size=40)
    cut.write_bytes(cut.read_bytes()[:9000])

    killer, _ = write_killer(tmp_path, finished=6)
    start = [sys.executable, "-c", f"exec(open({str(killer)!r}).read()); from brainfm_monai.cli import main; main()"]
    words = command(repository, weights, source, output)
    killed = subprocess.run([*start, *words[3:]], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = finished(output)
    assert first == [f"scan{number:02d}" for number in range(6)]
    (half,) = output.glob("*/*_unfinished.json")
    assert half.parent.name == "scan06"
    assert len(list(half.parent.iterdir())) == 2
    times = {name: (output / name / f"{name}_finished.json").stat().st_mtime_ns for name in first}
    for name in first:  # what is there is whole
        marker = json.loads((output / name / f"{name}_finished.json").read_text())
        assert sorted(marker["files"]) == sorted(
            f.name for f in (output / name).iterdir() if not f.name.endswith("_finished.json")
        )

    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "6 of 20 scans are finished already and are skipped" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("2 of 20 scans failed; the others are done")
    for name in ("broken_text.nii", "broken_cut.nii.gz"):
        assert f"{source / name}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert finished(output) == [f"scan{number:02d}" for number in range(18)]
    assert all((output / name / f"{name}_finished.json").stat().st_mtime_ns == times[name] for name in first)
    assert not (output / ".partial").exists()
    for folder in output.glob("scan*"):
        assert len(list(folder.iterdir())) == 18
        for file in folder.glob("*.nii.gz"):
            image: Any = nib.load(file)
            assert np.isfinite(image.get_fdata()).all()
    rows = rows_of(output / "summary.tsv")
    assert [name for name, row in rows.items() if row[2] == "failed"] == ["broken_cut", "broken_text"]
    assert sum(row[2] == "done" for row in rows.values()) == 18


def test_a_subject_whose_folder_has_control_characters_fails_alone(
    repository: Path, weights: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_scan(source / "sub-01/anat/sub-01_T1w.nii.gz")
    write_scan(source / "sub-0\n2/anat/sub-02_T1w.nii.gz")
    done = subprocess.run(command(repository, weights, source, output), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        "sub-0?2/anat/sub-02_T1w.nii.gz: the name of a scan must be one visible file name of 1 to 150 " in done.stderr
    )
    assert done.stderr.splitlines()[-1].endswith("1 of 2 scans failed; the others are done")
    assert (output / "sub-01/anat/sub-01_space-T1w_finished.json").is_file()
    rows = rows_of(output / "summary.tsv")
    assert {name: row[2] for name, row in rows.items()} == {"sub-01_space-T1w": "done", "sub-02_space-T1w": "failed"}


def test_shards_do_their_share_and_the_summary_tells_of_all(repository: Path, weights: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    for number in range(3):
        write_scan(source / f"scan{number}.nii.gz", number)
    subprocess.run(command(repository, weights, source, output, "--shard", "2/2"), check=True, capture_output=True)
    assert finished(output) == ["scan1"]
    assert [row[2] for row in rows_of(output / "summary.tsv").values()] == ["missing", "done", "missing"]
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *command(repository, weights, source, output)[1:],
    ]
    subprocess.run([sys.executable, *launch], check=True, capture_output=True)
    assert finished(output) == ["scan0", "scan1", "scan2"]


def test_a_plain_run_of_the_evaluator_writes_the_files(repository: Path, weights: Path, tmp_path: Path) -> None:
    """Other hosts of bundles call ``evaluator.run()`` and nothing else."""
    for name in ("one", "two"):
        write_scan(tmp_path / f"in/{name}.nii.gz")
    more: dict[str, Any] = {"network_def#backbone#features": FEATURES, "layout#tasks": list(LAYOUT.tasks)}
    workflow = ConfigWorkflow(
        workflow_type="inference",
        config_file=str(repository / "bundle/configs/inference.json"),
        logging_file=False,
        bundle_root=str(repository / "bundle"),
        input=str(tmp_path / "in"),
        output_dir=str(tmp_path / "out"),
        outputs="segmentation",
        weights=str(weights),
        **{**more, "surface_levels_mm": [1, 2]},
    )
    workflow.initialize()
    workflow.evaluator.run()
    assert finished(tmp_path / "out") == ["one", "two"]
    labels: Any = nib.load(tmp_path / "out/two/two_dseg.nii.gz")
    assert labels.shape == nib.load(tmp_path / "in/two.nii.gz").shape  # type: ignore[attr-defined]
    sidecar = json.loads((tmp_path / "out/two/two_dseg.json").read_text())
    assert sidecar["GeneratedBy"]["surface_levels_mm"] == [1, 2]
    assert sidecar["GeneratedBy"]["model"] == "brainfm-monai"  # whose weights these are: not those of BrainFM's authors

    def interrupt(_: Engine) -> None:
        raise KeyboardInterrupt

    loader = workflow.evaluator.data_loader
    workflow.evaluator.add_event_handler(Events.ITERATION_STARTED, interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(run_scans(workflow.evaluator, workflow.parser.get_parsed_content("writer"), [0]))
    assert workflow.evaluator.data_loader is loader  # an evaluator whose run was interrupted can run again


@pytest.fixture(scope="module")
def settings(repository: Path, weights: Path) -> dict[str, Any]:
    return {
        "bundle": str(repository / "bundle"),
        "weights": str(weights),
        "network_def#backbone#features": FEATURES,
        "layout#tasks": list(LAYOUT.tasks),
        "device": torch.device("cpu"),
        "precision": "float32",
    }


def test_a_notebook_shows_the_scan_with_its_labels(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = brainfm_monai.predict(write_scan(tmp_path / "scan.nii.gz"), **settings)
    found["warnings"].append("a <b>doubt</b>")
    shown = found._repr_html_()
    frame = re.search(r'<iframe srcdoc="([^"]*)"', shown)
    assert frame is not None
    page = html.unescape(frame[1])
    name = found["layout"].protocol.structures[3].name
    assert page.startswith("<!doctype html>")
    assert name in page
    assert ("new Niivue(" in page) == (importlib.util.find_spec("ipyniivue") is not None)
    assert "a &lt;b&gt;doubt&lt;/b&gt;" in shown
    assert f"<td>{name}</td>" in shown


def test_warnings_of_reading_are_warnings_of_the_prediction(tmp_path: Path, settings: dict[str, Any]) -> None:
    image: Any = nib.load(write_scan(tmp_path / "scan.nii"))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "unknown.nii")
    found = brainfm_monai.predict(tmp_path / "unknown.nii", **settings)
    assert any("states no orientation" in warning for warning in found["warnings"])
    assert found["warnings"] == found.scan.warnings  # what the page shows


def test_one_image_in_python(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = write_scan(tmp_path / "scan.nii.gz")
    found = brainfm_monai.predict(path, **settings)
    stored: Any = nib.load(path)
    for name, channels in {"segmentation": 1, "entropy": 1, "distance": 4, "bias_field": 1, "mni": 3}.items():
        assert found[name].shape == (channels, *stored.shape)
        np.testing.assert_allclose(found[name].affine, stored.affine, atol=1e-5)
    labels = found["segmentation"].numpy()[0]
    names = [s.name for s in found["layout"].protocol.structures]
    for label in np.unique(labels)[1:]:
        assert found["hard_volumes_mm3"][names[label]] == pytest.approx((labels == label).sum() * 1.5 * 1.2 * 2.0)
    assert set(found["volumes_mm3"]) == set(names[1:])
    assert list(found.table.columns) == ["name", "freesurfer_id", "side", "soft_mm3", "hard_mm3", "expected_dice"]
    assert found.table["hard_mm3"].sum() == pytest.approx(sum(found["hard_volumes_mm3"].values()), rel=1e-3)
    in_memory = brainfm_monai.predict(stored, **settings)
    tensor = MetaTensor(torch.from_numpy(np.asarray(stored.dataobj))[None], affine=torch.from_numpy(stored.affine))
    as_tensor = brainfm_monai.predict(tensor, **settings)
    for other in (in_memory, as_tensor):
        np.testing.assert_array_equal(other["segmentation"].numpy(), found["segmentation"].numpy())
    brain = brainfm_monai.predict(path, mode="brain", **settings)
    ids = found["layout"].protocol.freesurfer_ids[np.unique(brain["segmentation"].numpy())]
    assert ids.max() < 500


def test_python_tells_what_is_wrong(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"inference\.json: a config of the bundle is needed"):
        brainfm_monai.predict(tmp_path / "scan.nii", bundle=str(tmp_path))
    with pytest.raises(
        ScanError, match=r"none\.nii: a NIfTI, MGH or NRRD file or the folder of a DICOM series is needed"
    ):
        brainfm_monai.predict(tmp_path / "none.nii", **settings)
    with pytest.raises(ValueError, match="the weights must fit the network"):
        brainfm_monai.predict(
            write_scan(tmp_path / "scan.nii"), **{**settings, "network_def#backbone#features": [8, 8, 8]}
        )


def test_a_lost_workers_scans_are_done_elsewhere(repository: Path, weights: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out#1"
    for number in range(5):
        write_scan(source / f"scan{number}.nii.gz", number, size=40)
    (source / "broken.nii").write_text("this is not an image")
    killer, killed = write_killer(tmp_path, finished=0)
    words = command(repository, weights, source, output, "--cluster", "local:2")
    # every worker runs it before its first scan; one of them dies, and what the scheduler starts in its place does not
    preload = {"DASK_DISTRIBUTED__WORKER__PRELOAD": str([str(killer)])}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **preload})
    assert killed.exists()
    assert done.returncode == 1
    assert finished(output) == [f"scan{number}" for number in range(5)]
    assert re.search(r"6 scans for 2 workers; progress: http://", done.stderr)
    assert "1 of 6 scans failed; the others are done" in done.stderr
    assert [row[2] for row in rows_of(output / "summary.tsv").values()] == ["failed", *["done"] * 5]
    assert not (output / ".partial").exists()


def test_a_cluster_that_is_not_there_is_one_line(repository: Path, weights: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scan.nii.gz")
    done = subprocess.run(
        command(repository, weights, scan, tmp_path / "out", "--cluster", "10"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        "brainfm-monai: cluster: the address of a scheduler (tcp://host:port) or local:N is needed, found '10'"
        in done.stderr
    )


def test_tensors_of_every_real_type_are_images(settings: dict[str, Any]) -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (1, 20, 22, 17)))
    affine = torch.diag(torch.tensor([1.5, 1.2, 2.0, 1.0], dtype=torch.float64))
    logger = logging.getLogger("ignite.engine.engine.SupervisedEvaluator")
    found = [
        brainfm_monai.predict(MetaTensor(values.to(kind), affine=affine), **settings)["segmentation"]
        for kind in (torch.int64, torch.bool, torch.float16)
    ]
    assert all(bool((one == found[0]).all()) for one in found)
    assert not logger.disabled
    with pytest.raises(
        ScanError, match=r"image: real numbers of shape \(1, H, W, D\) are needed, found torch\.complex64"
    ):
        brainfm_monai.predict(MetaTensor(values.to(torch.complex64), affine=affine), **settings)


def test_no_command_at_run_time_opens_a_connection(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a network connection was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert "segmentation" in brainfm_monai.predict(write_scan(tmp_path / "scan.nii.gz"), **settings)


@pytest.mark.parametrize("place", ["full", "file"])
def test_an_output_that_cannot_be_written_is_one_line(
    repository: Path, weights: Path, tmp_path: Path, place: str
) -> None:
    """A disk that takes no more (the system limits the size of files), and an output folder below a file."""
    scans = tmp_path / "in"
    for number in range(2):
        write_scan(scans / f"<b>scan{number}.nii.gz", number, size=40)
    (tmp_path / "file").write_text("a file")
    output = tmp_path / place / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); " if place == "full" else ""
    # -B: Python would leave modules that it compiles cut off, and no later test could import them
    start = [sys.executable, "-B", "-c", f"{limit}import sys; from brainfm_monai.cli import main; main()"]
    words = command(repository, weights, scans, output)[3:]
    done = subprocess.run([*start, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    expected = "2 of 2 scans failed; the others are done" if place == "full" else "Not a directory"
    assert expected in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("full/out/[!.]*/*"))
    assert not (output / ".partial").exists()
