"""TorchScript and ONNX files give what the network gives; the networks here are tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import SwinUNETR
from torch import nn

from brainfm_monai.exports import ONNX_OPSET, export_bundle, export_onnx, export_torchscript
from brainfm_monai.networks import MultiTaskNet, ResidualUNet, TwoScaleUNet, UNet
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights import load_weights

LAYOUT = TaskLayout(["segmentation", "distance", "mni"])
torch.manual_seed(0)  # weights of the networks below are the same in every process
BACKBONES = {
    "UNet": (UNet(1, (8, 16), unit_norm=True), 1),
    "ResidualUNet": (ResidualUNet(1, (8, 16)), 1),
    "TwoScaleUNet": (TwoScaleUNet(1, (8, 8, 16)), 2),
}


def network(name: str) -> MultiTaskNet:
    torch.manual_seed(0)
    net = MultiTaskNet(*BACKBONES[name][:1], LAYOUT, BACKBONES[name][1], context=["mni"]).eval()
    for module in net.modules():
        if isinstance(
            module, nn.GroupNorm
        ):  # as after training: without it, features of a random network can be near 0 in length
            nn.init.uniform_(module.bias, 0.1, 0.5)
    return net


@pytest.mark.parametrize("name", BACKBONES)
def test_torchscript_gives_the_same_for_any_size(tmp_path: Path, name: str) -> None:
    net = network(name)
    export_torchscript(net, tmp_path / "net.ts")
    scripted = torch.jit.load(tmp_path / "net.ts")
    for shape in ((1, 1, 16, 16, 16), (2, 1, 16, 24, 40)):
        image = torch.rand(shape)
        with torch.no_grad():
            torch.testing.assert_close(scripted(image), net(image), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(scripted.features(image), net.features(image), atol=1e-5, rtol=1e-5)
    assert [f.name for f in tmp_path.iterdir()] == ["net.ts"]


@pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn of their own plans
@pytest.mark.parametrize("name", BACKBONES)
def test_onnx_gives_the_same_for_another_size(tmp_path: Path, name: str) -> None:
    assert export_onnx(network(name), tmp_path / "net.onnx", size=16) < 1e-4  # compared by onnxruntime
    graph = onnx.load(tmp_path / "net.onnx")
    assert [s.version for s in graph.opset_import if not s.domain] == [ONNX_OPSET]
    (image,) = graph.graph.input
    dimensions = image.type.tensor_type.shape.dim
    assert [d.dim_value for d in dimensions] == [0, 1, 0, 0, 0]
    assert [f.name for f in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_differs_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"net\.onnx: the graph must agree with the network to -1, found a difference of"
    ):
        export_onnx(network("ResidualUNet"), tmp_path / "net.onnx", size=16, tolerance=-1)
    assert not list(tmp_path.iterdir())


def test_the_bundles_network_is_exported_with_its_weights(repository: Path, tmp_path: Path) -> None:
    bundle = repository / "bundle"
    path = export_bundle(tmp_path / "model.ts", bundle)
    state, weights = torch.jit.load(path).state_dict(), torch.load(bundle / "models/model.pt", weights_only=True)
    for key, tensor in weights.items():
        torch.testing.assert_close(state[key], tensor.float(), rtol=0, atol=0)


@pytest.mark.shared_data
@pytest.mark.filterwarnings("ignore")
def test_both_files_give_the_networks_maps_of_a_real_scan(repository: Path, shared_data: Path, tmp_path: Path) -> None:
    """A scan of 2 mm, two sizes; labels may differ where two logits are equal up to rounding."""
    path = shared_data / "open_ms" / "longitudinal" / "raw" / "patient01" / "study1_FLAIR.nii.gz"
    scan: Any = nib.load(path)
    voxels = torch.from_numpy(nib.as_closest_canonical(scan).get_fdata(dtype=np.float32))[None, None]
    bundle = repository / "bundle"
    configs = [bundle / "configs/inference.json"]
    parser = ConfigParser()
    parser.read_config([str(config) for config in configs])
    net = parser.get_parsed_content("network_def").eval()
    load_weights(net, bundle / "models/model.pt")
    script = torch.jit.load(export_bundle(tmp_path / "model.ts", bundle))
    graph = export_bundle(tmp_path / "model.onnx", bundle)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
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


def test_messages(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.pt: the suffix \.ts \(TorchScript\) or \.onnx is needed, found '\.pt'"):
        export_bundle(tmp_path / "a.pt", repository)
    swin = MultiTaskNet(SwinUNETR(1, 12, feature_size=12), LAYOUT, out_channels=12)
    with pytest.raises(ValueError, match=r"a\.ts: a network that can be scripted is needed: \S+") as caught:
        export_torchscript(swin, tmp_path / "a.ts")
    assert "\n" not in str(caught.value)
