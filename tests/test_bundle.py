"""The bundle's contract for inference: metadata, required ids, the network's shape, and what MONAI Label reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out

from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights import load_weights


@pytest.fixture
def metadata(repository: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((repository / "bundle/configs/metadata.json").read_text())
    return content


@pytest.fixture
def parser(repository: Path) -> ConfigParser:
    """The inference configuration, with nothing of it instantiated."""
    parser = ConfigParser()
    parser.read_config(str(repository / "bundle/configs/inference.json"))
    parser["bundle_root"] = str(repository / "bundle")
    return parser


def test_metadata_follow_the_schema(repository: Path, tmp_path: Path, metadata: dict[str, Any]) -> None:
    name = "meta_schema_20240725.json"  # the copy in tests/data keeps verify_metadata from downloading it
    assert metadata["schema"].endswith(name)
    schema = shutil.copy(repository / "tests/data" / name, tmp_path / name)
    digest = "cd64aa8a5904426f6fc6855dabe46af8c742d5bad644b4e9cfb78ebad09ad678"
    verify_metadata(str(repository / "bundle/configs/metadata.json"), schema, hash_val=digest, hash_type="sha256")
    broken = tmp_path / "metadata.json"
    broken.write_text(json.dumps({k: v for k, v in metadata.items() if k != "task"}))
    with pytest.raises(ValueError, match="'task' is a required property"):
        verify_metadata(str(broken), schema, hash_val=digest, hash_type="sha256")


def test_the_versions_changes_are_told(metadata: dict[str, Any]) -> None:
    assert metadata["version"] in metadata["changelog"]


def test_inference_has_every_required_property(repository: Path, tmp_path: Path, parser: ConfigParser) -> None:
    torch.save(parser.get_parsed_content("network_def").state_dict(), tmp_path / "random.pt")
    workflow = ConfigWorkflow(
        workflow_type="inference",
        config_file=str(repository / "bundle/configs/inference.json"),
        meta_file=str(repository / "bundle/configs/metadata.json"),
        logging_file=False,
        bundle_root=str(repository / "bundle"),
        weights=str(tmp_path / "random.pt"),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    with pytest.raises(
        SystemExit, match="input: a scan or a folder of scans is needed, found none: pass --input SCAN_OR_FOLDER"
    ):
        workflow.run()


def test_the_networks_shape_is_the_one_stated(repository: Path, tmp_path: Path, metadata: dict[str, Any]) -> None:
    config = str(repository / "bundle/configs/inference.json")
    verify_net_in_out("network_def", str(repository / "bundle/configs/metadata.json"), config, device="cpu")
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] -= 1
    wrong = tmp_path / "metadata.json"
    wrong.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="output channel number `57` doesn't match: `56`"):
        verify_net_in_out("network_def", str(wrong), config, device="cpu")


def test_metadata_name_the_labels_and_maps_of_the_configured_layout(
    metadata: dict[str, Any], parser: ConfigParser
) -> None:
    # MONAI Label offers every entry of outputs.pred.channel_def as a segment, so it holds the labels and nothing else.
    layout: TaskLayout = parser.get_parsed_content("layout")
    outputs = metadata["network_data_format"]["outputs"]
    assert next(iter(outputs)) == "pred"
    names = ["background", *(s.name for s in layout.protocol.structures[1:])]
    assert outputs["pred"]["channel_def"] == {str(label): name for label, name in enumerate(names)}
    assert outputs["pred"]["num_channels"] == layout.channels
    written = metadata["network_data_format"]["post_processed_outputs"]
    for name in ("distance", "mni"):
        assert list(written[name]["channel_def"].values()) == list(layout.tasks[name].channel_names)


def test_what_monai_label_reads_is_there(parser: ConfigParser) -> None:
    for name in ("network_def", "inferer"):
        assert parser.get_parsed_content(name) is not None
    kinds = [type(t).__name__ for t in parser.get_parsed_content("postprocessing").transforms]
    # MONAI Label runs these on every request: nothing here may write. Without Invertd its labels would lie in a wrong grid.
    assert kinds == ["SplitTasksd", "FindBoundariesd", "RestoreDetaild", "Invertd", "CastToTyped"]
    assert parser["postprocessing#transforms#5#keys"] == "pred"


def test_an_annotator_gets_the_fast_settings_and_a_run_the_accurate_ones(parser: ConfigParser) -> None:
    names = ("mode", "mirror", "second_look", "memory")
    assert [parser.get_parsed_content(name) for name in names] == ["whole_head", True, True, "auto"]
    config: Any = parser.config
    config["use_click"] = False  # what MONAI Label does to the config of every bundle
    parser.parse()
    assert [parser.get_parsed_content(name) for name in names] == ["whole_head", False, False, "low"]
    split, find, delete, *_ = parser.get_parsed_content("postprocessing").transforms
    assert not split.probabilities
    assert find.relabel
    assert set(delete.keys) == {
        "segmentation",
        "distance",
        "bias_field",
        "mni",
        "T1w",
        "T2w",
        "FLAIR",
        "CT",
        "lesion",
        "boundaries",
    }
    parser["displayable_configs"].update(
        mode="brain", mirror=True
    )  # what MONAI Label does with the request of a client
    parser.parse()
    assert [parser.get_parsed_content(name) for name in names] == ["brain", True, False, "low"]


def test_an_expression_holds_at_most_one_call(repository: Path) -> None:
    for path in sorted((repository / "bundle/configs").glob("inference*.json")):
        for item in _strings(json.loads(path.read_text())):
            assert not item.startswith("$") or item.count("(") <= 1, f"{path.name}: {item}"


def _strings(config: Any) -> list[str]:
    if isinstance(config, str):
        return [config]
    children = config.values() if isinstance(config, dict) else config if isinstance(config, list) else []
    return [item for child in children for item in _strings(child)]


def test_the_shipped_weights_fit_the_network_and_the_zoo(repository: Path, parser: ConfigParser) -> None:
    path = repository / "bundle/models/model.pt"
    assert path.stat().st_size < 25e6  # larger files do not travel with a bundle
    network = parser.get_parsed_content("network_def")
    before = network.head.weight.clone()
    load_weights(network, path)
    assert not torch.equal(network.head.weight, before)
    assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())
