"""TorchScript and ONNX files by MONAI's commands give what the network gives; most networks here are tiny and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from brainfm_monai.weights import load_weights

ONNX_OPSET = 20  # group normalisation is of opset 18 to 21; 20 is what current runtimes all read
ONNX_OPTIONS: dict[str, Any] = {  # as in docs/networks.md
    "use_trace": True,
    "converter_kwargs": {
        "dynamo": True,
        "opset_version": ONNX_OPSET,
        "input_names": ["image"],
        "output_names": ["pred"],
        "dynamic_axes": {"image": {0: "n", 2: "h", 3: "w", 4: "d"}},
    },
}
BACKBONES: dict[str, tuple[dict[str, Any], int]] = {
    "UNet": ({"features": [8, 16], "unit_norm": True}, 1),
    "ResidualUNet": ({"features": [8, 16]}, 1),
    "TwoScaleUNet": ({"features": [8, 8, 16]}, 2),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # MONAI, torch.onnx and onnxscript warn of their own plans


def make_network(folder: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """A random network, and what MONAI's commands need to make it again: a configuration and a file of weights."""
    options, stride = BACKBONES[name]
    network_def = {
        "_target_": "brainfm_monai.networks.MultiTaskNet",
        "backbone": {"_target_": f"brainfm_monai.networks.{name}", **options},
        "layout": {"_target_": "brainfm_monai.TaskLayout", "tasks": ["segmentation", "distance", "mni"]},
        "stride": stride,
        "context": ["mni"],
    }
    (folder / "config.json").write_text(json.dumps({"network_def": network_def}))
    torch.manual_seed(0)
    net = ConfigParser({"network_def": network_def}).get_parsed_content("network_def").eval()
    for module in net.modules():
        if isinstance(
            module, nn.GroupNorm
        ):  # as after training: without it, features of a random network can be near 0 in length
            nn.init.uniform_(module.bias, 0.1, 0.5)
    torch.save(net.state_dict(), folder / "model.pt")
    files = {"config_file": str(folder / "config.json"), "ckpt_file": str(folder / "model.pt")}
    return net, {"net_id": "network_def", **files}


@pytest.mark.parametrize("name", BACKBONES)
def test_torchscript_gives_the_same_for_any_size(tmp_path: Path, name: str) -> None:
    net, words = make_network(tmp_path, name)
    monai.bundle.ckpt_export(filepath=str(tmp_path / "net.ts"), **words)
    scripted = torch.jit.load(tmp_path / "net.ts")
    for shape in ((1, 1, 16, 16, 16), (2, 1, 16, 24, 40)):
        image = torch.rand(shape)
        with torch.no_grad():
            torch.testing.assert_close(scripted(image), net(image), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(scripted.features(image), net.features(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_onnx_gives_the_same_for_another_size(tmp_path: Path, name: str) -> None:
    net, words = make_network(tmp_path, name)
    path = str(tmp_path / "net.onnx")
    monai.bundle.onnx_export(filepath=path, input_shape=[2, 1, 16, 16, 16], **words, **ONNX_OPTIONS)
    graph = onnx.load(path)
    assert [s.version for s in graph.opset_import if not s.domain] == [ONNX_OPSET]
    (given,) = graph.graph.input
    assert [d.dim_value for d in given.type.tensor_type.shape.dim] == [0, 1, 0, 0, 0]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 1, 24, 16, 32), (3, 1, 16, 24, 40)):
        image = torch.rand(shape)
        with torch.no_grad():
            expected = net(image)
        found = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.shared_data
def test_both_files_give_the_networks_maps_of_a_real_scan(repository: Path, shared_data: Path, tmp_path: Path) -> None:
    """A scan of 2 mm, two sizes; labels may differ where two logits are equal up to rounding."""
    path = shared_data / "open_ms" / "longitudinal" / "raw" / "patient01" / "study1_FLAIR.nii.gz"
    scan: Any = nib.load(path)
    voxels = torch.from_numpy(nib.as_closest_canonical(scan).get_fdata(dtype=np.float32))[None, None]
    bundle = repository / "bundle"
    files = {"config_file": str(bundle / "configs/inference.json"), "ckpt_file": str(bundle / "models/model.pt")}
    words: dict[str, Any] = {"net_id": "network_def", "bundle_root": str(bundle), **files}
    script_path, graph_path = (str(tmp_path / name) for name in ("model.ts", "model.onnx"))
    monai.bundle.ckpt_export(filepath=script_path, **words)
    monai.bundle.onnx_export(filepath=graph_path, input_shape=[2, 1, 64, 64, 64], **words, **ONNX_OPTIONS)
    parser = ConfigParser()
    parser.read_config(files["config_file"])
    parser["bundle_root"] = str(bundle)
    net = parser.get_parsed_content("network_def").eval()
    load_weights(net, files["ckpt_file"])
    script = torch.jit.load(script_path)
    for key, tensor in net.state_dict().items():
        assert torch.equal(script.state_dict()[key], tensor), key
    session = onnxruntime.InferenceSession(graph_path, providers=["CPUExecutionProvider"])
    for size in ((96, 112, 96), (64, 96, 80)):
        image = torch.nn.functional.interpolate(voxels, size=size, mode="trilinear")
        image = ((image - image.min()) / (image.quantile(0.999) - image.min())).clamp(0, 1)
        with torch.no_grad():
            expected = net(image)
            found = {"script": script(image), "graph": torch.from_numpy(session.run(None, {"image": image.numpy()})[0])}
        labels = expected[:, :44].argmax(1)
        assert len(labels.unique()) > 20
        for name, maps in found.items():
            assert float((maps - expected).abs().max()) < 1e-3 * float(expected.abs().max()), name
            assert float((maps[:, :44].argmax(1) != labels).float().mean()) < 1e-4, name
