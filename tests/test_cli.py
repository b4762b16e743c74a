"""The command: what it hands on, what it says, and how it fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigParser

from brainfm_monai import __version__, cli
from brainfm_monai.data import datalist as datalist_module
from brainfm_monai.networks import MultiTaskNet, UNet
from brainfm_monai.tasks import TaskLayout


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["brainfm-monai", *arguments])
    cli.main()


@pytest.fixture
def bundle_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asks MONAI to run, instead of running it."""
    runs: list[dict[str, Any]] = []
    monkeypatch.setattr(monai.bundle, "run", lambda **settings: runs.append(settings))
    return runs


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "version")
    assert capsys.readouterr().out.strip() == __version__


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--help")
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} .*\.$", shown, re.MULTILINE), name
    call(monkeypatch, "prepare", "--help")
    shown = capsys.readouterr().out
    assert "prepare bids" in shown
    assert "predict" not in shown


def test_help_of_a_command_tells_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "predict", "--help")
    shown = capsys.readouterr().out
    assert "brainfm-monai predict INPUT OUTPUT [--key value]..." in shown
    assert "--mirror True" in shown
    assert "NIfTI, MGH or NRRD file, folder of a DICOM series" in shown


def test_a_missing_folder_is_one_line_and_status_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "brainfm_monai", "data", "list", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"brainfm-monai: nowhere: a folder of prepared subjects is needed, .*\n", done.stderr)


@pytest.mark.parametrize("command", ["version", "--help"])
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    words = [sys.executable, "-m", "brainfm_monai", command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert "Broken pipe" not in said
    assert "Traceback" not in said


def test_an_unknown_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"brainfm-monai: a command is needed, found 'segment scan'"):
        call(monkeypatch, "segment", "scan")


@pytest.mark.parametrize(("words", "fault"), [(["compare", "a"], "SECOND"), (["compare", "a", "b", "--c", "d"], "--c")])
def test_a_missing_word_and_an_unknown_flag_are_named(
    monkeypatch: pytest.MonkeyPatch, words: list[str], fault: str
) -> None:
    with pytest.raises(SystemExit, match=rf"usage: brainfm-monai compare FIRST SECOND .*, found (no )?{fault}$"):
        call(monkeypatch, *words)


def test_a_missing_bundle_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit,
        match=r"^brainfm-monai: .*inference\.json: a config of the bundle is needed, .* pass --bundle FOLDER$",
    ):
        call(monkeypatch, "predict", "scan.nii", "out", "--bundle", str(tmp_path))


@pytest.mark.parametrize("command", [["train", "none.json"], ["evaluate", "none.json", "out"]])
def test_a_missing_datalist_is_named(monkeypatch: pytest.MonkeyPatch, repository: Path, command: list[str]) -> None:
    with pytest.raises(
        SystemExit, match=r"^brainfm-monai: none\.json: a datalist \(JSON\) is needed, found no such file$"
    ):
        call(monkeypatch, *command, "--bundle", str(repository / "bundle"))


def test_predict_runs_the_inference_config(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    bundle = repository / "bundle"
    call(monkeypatch, "predict", "scans", "out", "--bundle", str(bundle), "--device", "$torch.device('cpu')")
    (settings,) = bundle_runs
    assert settings["config_file"] == [str(bundle / "configs" / "inference.json")]
    assert settings["bundle_root"] == str(bundle)
    assert (settings["input"], settings["output_dir"], settings["device"]) == ("scans", "out", "$torch.device('cpu')")
    assert Path(settings["logging_file"]).is_file()
    assert Path(settings["meta_file"]).is_file()


def test_predict_hands_on_its_choices(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    bundle = repository / "bundle"
    options = [
        "--outputs",
        "volumes,report",
        "--participant_label",
        "01,02",
        "--precision",
        "float32",
        "--mirror",
        "False",
    ]
    options += ["--shard", "2/4", "--grid", "1mm", "--frame", "mean", "--mode", "brain", "--memory", "windows"]
    call(monkeypatch, "predict", "bids", "out", "participant", "--bundle", str(bundle), *options)
    (settings,) = bundle_runs
    assert (list(settings["outputs"]), settings["participant_label"]) == (["volumes", "report"], ["01", "02"])
    assert settings["precision"] == "float32"
    assert (settings["mirror"], settings["memory"]) == (False, "windows")
    assert [settings[key] for key in ("shard", "grid", "frame", "mode")] == ["2/4", "1mm", "mean", "brain"]


def test_files_of_imported_weights_are_found_beside_their_overrides(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    options = ["--bundle", str(repository / "bundle"), "--args_file", "moved/overrides.json"]
    call(monkeypatch, "predict", "scan.nii", "out", *options)
    call(monkeypatch, "predict", "scan.nii", "out", *options, "--weights_dir", "elsewhere")
    assert [settings["weights_dir"] for settings in bundle_runs] == ["moved", "elsewhere"]


def test_predict_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in {
        ("group",): "analysis_level: one of participant is needed, found 'group'",
        ("--precision", "half"): "precision: one of float32, bfloat16, float16 is needed, found 'half'",
        ("--memory", "tiny"): "memory: one of auto, full, low, windows is needed, found 'tiny'",
    }.items():
        with pytest.raises(SystemExit, match=message):
            call(monkeypatch, "predict", "bids", "out", *options)


def test_evaluate_lays_its_config_over_inference(
    monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    datalist = tmp_path / "datalist.json"
    datalist.write_text("{}", encoding="utf-8")
    call(monkeypatch, "evaluate", str(datalist), "out", "--bundle", str(repository / "bundle"))
    (settings,) = bundle_runs
    assert [Path(file).name for file in settings["config_file"]] == ["inference.json", "evaluate.json"]
    assert (settings["datalist"], settings["output_dir"]) == (str(datalist), "out")


def test_train_hands_on_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    datalist = tmp_path / "datalist.json"
    datalist.write_text("{}", encoding="utf-8")
    options = ["--max_epochs", "3", "--synthesis#rotation_deg", "[-10,10]"]
    call(monkeypatch, "train", str(datalist), "--bundle", str(repository / "bundle"), *options)
    (settings,) = bundle_runs
    assert [Path(file).name for file in settings["config_file"]] == ["train.json"]
    assert settings["max_epochs"] == 3
    assert settings["synthesis#rotation_deg"] == [-10, 10]
    assert "output_dir" not in settings
    call(monkeypatch, "train", str(datalist), "--bundle", str(repository / "bundle"), "--variant", "coarse")
    assert [Path(file).name for file in bundle_runs[1]["config_file"]] == ["train.json", "coarse.json"]


def test_variants_of_the_training_are_laid_over_it_in_order(
    monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    datalist, own = tmp_path / "datalist.json", tmp_path / "own.json"
    datalist.write_text("{}", encoding="utf-8")
    own.write_text("{}", encoding="utf-8")
    bundle = ["--bundle", str(repository / "bundle")]
    for variant, expected in {
        "small": ["small.json"],
        f"small,multi_gpu_train,{own}": ["small.json", "multi_gpu_train.json", "own.json"],
    }.items():
        call(monkeypatch, "train", str(datalist), *bundle, "--variant", variant)
        assert [Path(file).name for file in bundle_runs[-1]["config_file"]] == ["train.json", *expected]
    with pytest.raises(
        SystemExit, match=r"tiny.json: a config of the bundle is needed, found no such file; there are .*small"
    ):
        call(monkeypatch, "train", str(datalist), *bundle, "--variant", "tiny")


def test_names_for_validation_may_be_separated_by_commas(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def write_datalist(root: str, output: str = "datalist.json", **settings: Any) -> Path:
        given.update(settings, root=root, output=output)
        return tmp_path / "datalist.json"

    monkeypatch.setattr(datalist_module, "write_datalist", write_datalist)
    call(monkeypatch, "data", "list", "prepared", "--validation", "training_seg_18,training_seg_19")
    assert (given["root"], given["output"]) == ("prepared", "datalist.json")
    assert list(given["validation"]) == ["training_seg_18", "training_seg_19"]
    assert capsys.readouterr().out.strip() == str(tmp_path / "datalist.json")


def test_import_weights_tells_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"backbone.encoders.0.x": torch.zeros(1)}
    torch.save({"model": state}, tmp_path / "broken.pth")
    with pytest.raises(SystemExit, match=r"brainfm-monai: .*broken\.pth: a kernel of 3 dimensions|at least two levels"):
        call(monkeypatch, "import-weights", str(tmp_path / "broken.pth"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    network = MultiTaskNet(UNet(1, (8, 16), unit_norm=True), TaskLayout(["CT"], "brainfm"))
    names = {
        "0.0": "SingleConv1.groupnorm",
        "0.1": "SingleConv1.conv",
        "1.0": "SingleConv2.groupnorm",
        "1.1": "SingleConv2.conv",
    }
    published = {}
    for key, tensor in network.state_dict().items():
        part, *rest = key.split(".")
        if part == "backbone":
            arm, level, unit, layer, kind = rest
            key = f"backbone.{arm}.{level}.basic_module.{names[f'{unit}.{layer}']}.{kind}"
        published[key.replace("head.", "head.final_conv_CT.")] = tensor
    torch.save({"model": published}, tmp_path / "brainfm.pth")
    call(monkeypatch, "import-weights", str(tmp_path / "brainfm.pth"), str(tmp_path / "out"))
    assert capsys.readouterr().out.startswith("BrainFM: CT; licence of the authors")
    written = torch.load(tmp_path / "out/model.pt", weights_only=True)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(written[key], tensor, rtol=0, atol=0)


ODD = [
    "2024_05_02",
    "1.10",
    "01",
    "a#1",
    "study#1/scan#2.nii",
    "-x",
    "a b",
    "None",
    "True",
    "[x]",
    "1e3",
    "é",
    "'q'",
    "x,y",
]
EVALUATED = ["$HOME", "@input", "%x", "x@#y", "$__import__('os').abort()"]


@pytest.mark.parametrize("word", ODD + EVALUATED)
def test_paths_and_labels_reach_the_config_as_they_were_typed(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]], word: str
) -> None:
    bundle = ["--bundle", str(repository / "bundle")]
    call(
        monkeypatch,
        "predict",
        word,
        word,
        *bundle,
        "--weights",
        "w#" + word,
        "--participant_label",
        word.replace(",", ""),
    )
    call(monkeypatch, "predict", *bundle, f"--output={word}", f"--input={word}", f"--participant-label={word}")
    for settings in bundle_runs:
        parser = ConfigParser({key: settings[key] for key in ("input", "output_dir", "participant_label")})
        assert (parser.get_parsed_content("input"), parser.get_parsed_content("output_dir")) == (word, word)
    labels = [ConfigParser(run).get_parsed_content("participant_label") for run in bundle_runs]
    assert labels == [
        [word.replace(",", "").strip("[]' ") if word in ("[x]", "'q'") else word.replace(",", "")],
        labels[1],
    ]
    assert ConfigParser(bundle_runs[0]).get_parsed_content("weights") == "w#" + word


def test_participant_labels_are_several_words_as_bids_apps_have_them(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    bundle = ["--bundle", str(repository / "bundle")]
    for options in (
        ["--participant_label", "01", "02", *bundle],
        [*bundle, "--participant-label", "01", "02"],
        [*bundle, "--participant_label=01,02"],
        [*bundle, "--participant_label", "['01', '02']"],
    ):
        call(monkeypatch, "predict", "bids", "out", "participant", *options)
        assert bundle_runs[-1]["participant_label"] == ["01", "02"]


def test_lists_may_be_longer_than_the_name_of_a_file_and_empty(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    words, bundle = [f"{number:03}" for number in range(100)], ["--bundle", str(repository / "bundle")]
    call(monkeypatch, "predict", "bids", "out", *bundle, "--participant-label", ",".join(words), "--outputs", "[]")
    assert bundle_runs[0]["participant_label"] == words
    assert bundle_runs[0]["outputs"] == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--mirror=no", "--mirror: True or False is needed, found 'no'"),
        ("--overwrite=no", "--overwrite: True or False is needed, found 'no'"),
        ("--bundle", "--bundle: a value is needed, found none"),
        ("--weights", "--weights: a value is needed, found none"),
    ],
)
def test_a_switch_is_true_or_false_and_other_flags_have_a_value(
    monkeypatch: pytest.MonkeyPatch, bundle_runs: list[dict[str, Any]], word: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=rf"^brainfm-monai: {message}$"):
        call(monkeypatch, "predict", "in", "out", word)
    assert not bundle_runs


def test_a_number_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["data", "check", "x", "--jobs", "two"], ["data", "check", "x", "--jobs=1.5"]):
        with pytest.raises(SystemExit, match=r"^brainfm-monai: --\w+: a number \(int\) is needed, found '(two|1\.5)'$"):
            call(monkeypatch, *words)


def test_what_a_component_of_a_config_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cause: Exception, **_: Any) -> None:
        raise RuntimeError("Failed to instantiate component\n set debug") from cause

    monkeypatch.setattr(monai.bundle, "run", lambda **_: run(ValueError("window: two numbers are needed")))
    with pytest.raises(SystemExit, match=r"^brainfm-monai: window: two numbers are needed$"):
        call(monkeypatch, "predict", "in", "out")
    monkeypatch.setattr(monai.bundle, "run", lambda **_: run(TypeError("a fault of the program")))
    with pytest.raises(RuntimeError, match="Failed to instantiate"):
        call(monkeypatch, "predict", "in", "out")


def test_switches_need_no_value_and_take_no_path(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    bundle = str(repository / "bundle")
    call(
        monkeypatch, "predict", "--overwrite", "in", "out", "--mirror", "False", "--bundle", bundle, "--fix_orientation"
    )
    (settings,) = bundle_runs
    assert (settings["input"], settings["output_dir"]) == ("in", "out")
    assert (settings["overwrite"], settings["fix_orientation"], settings["mirror"]) == (True, True, False)
    call(monkeypatch, "predict", "--bundle", bundle, "--", "--in", "--out")
    assert (bundle_runs[1]["input"], bundle_runs[1]["output_dir"]) == ("--in", "--out")


def test_too_many_words_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, bundle_runs: list[dict[str, Any]]
) -> None:
    with pytest.raises(SystemExit, match=r"brainfm-monai: compare: 1 more words are possible, found c d$"):
        call(monkeypatch, "compare", "--first", "a", "--second", "b", "c", "d")
    assert not bundle_runs


def test_overrides_may_be_numbers_lists_and_expressions(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]]
) -> None:
    options = {
        "frame": ("2", 2),
        "window": ("[0,80]", [0, 80]),
        "score": ("1.5", 1.5),
        "images": ("[T1w,CT]", ["T1w", "CT"]),
        "device": ("$torch.device('cpu')", "$torch.device('cpu')"),
        "weights": ("$@bundle_root + '/m.pt'", "$@bundle_root + '/m.pt'"),
        "mode": ("2024_05_02", "2024_05_02"),
        "network_def#stride": ("1", 1),
        "text": ("a#b", "a#b"),
    }
    words = [word for key, (text, _) in options.items() for word in (f"--{key}", text)]
    call(monkeypatch, "predict", "in", "out", "--bundle", str(repository / "bundle"), *words)
    for key, (_, value) in options.items():
        assert bundle_runs[0][key] == value, key


def test_an_override_that_no_config_has_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
    tmp_path: Path,
    bundle_runs: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    subjects, bundle = tmp_path / "subjects.json", ("--bundle", str(repository / "bundle"))
    subjects.write_text("{}")
    train = ["train", str(subjects), *bundle, "--variant", "small", "--max_epochs", "1", "--loss#weights#mni", "0"]
    call(monkeypatch, *train)
    call(monkeypatch, "predict", "in", "out", *bundle, "--mode", "brain", "--participant_label", "01", "--shard", "1/2")
    call(monkeypatch, "evaluate", str(subjects), "out", *bundle, "--generated", "--scans_per_subject", "2")
    assert not caplog.messages
    call(monkeypatch, *train, "--max_epoch", "2")
    assert caplog.messages == ["--max_epoch: no config has this key, and nothing reads it"]
    assert len(bundle_runs) == 4


@pytest.mark.parametrize("word", ["cpu", "$torch.device('cpu')", '$torch.device("cpu")'])
def test_a_device_has_a_name(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]], word: str
) -> None:
    call(monkeypatch, "predict", "in", "out", "--bundle", str(repository / "bundle"), "--device", word)
    assert bundle_runs[0]["device"] == "$torch.device('cpu')"


@pytest.mark.parametrize("word", ["gpu", "$torch.device('gpu')"])
def test_a_device_that_this_machine_lacks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, repository: Path, bundle_runs: list[dict[str, Any]], word: str
) -> None:
    rule = r"^brainfm-monai: --device: a device of this machine is needed, found 'gpu': Expected one of cpu, cuda, .*$"
    with pytest.raises(SystemExit, match=rule):
        call(monkeypatch, "predict", "in", "out", "--bundle", str(repository / "bundle"), "--device", word)
    assert not bundle_runs


def test_a_missing_library_is_one_line_and_leaves_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "group absent", ("absent", "do", "Do nothing."))
    with pytest.raises(SystemExit) as found:
        call(monkeypatch, "group", "absent", "a", "b")
    assert str(found.value).startswith("brainfm-monai: the package 'brainfm_monai.absent' is needed, found none: ")
    call(monkeypatch, "group", "--help")
    assert "Do nothing." in capsys.readouterr().out
