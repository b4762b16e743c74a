"""Networks as TorchScript and ONNX files, for programs that do not have this package."""

import math
import warnings
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from brainfm_monai.io import find_bundle, find_config, first_line, literal, refuse_if, write_whole
from brainfm_monai.weights import load_weights

ONNX_OPSET = 20  # group normalisation is of opset 18 to 21; 20 is what current runtimes all read
ONNX_TOLERANCE = 1e-4  # of the largest output
DYNAMIC_AXES = (0, 2, 3, 4)  # all but the channel


def export_torchscript(network: nn.Module, path: str | Path) -> None:
    """Write a network as TorchScript, for any batch and size that it takes; ValueError if it cannot be scripted."""
    try:
        scripted = torch.jit.script(network.eval())
    except Exception as error:  # torch.jit raises many kinds
        raise ValueError(f"{path}: a network that can be scripted is needed: {first_line(error)}") from error
    with write_whole(path) as partial:
        torch.jit.save(scripted, partial)


def export_onnx(network: nn.Module, path: str | Path, size: int = 64, tolerance: float = ONNX_TOLERANCE) -> float:
    """Write a network over one of our U-Nets as ONNX, for any batch and size, and compare it on another size.

    The graph is traced with a cube of ``size`` voxels along each side, an even multiple of what the network needs.
    Returns the largest difference, relative to the largest output; if it exceeds the tolerance, nothing is written,
    which is a ValueError. The network is put into evaluation mode.
    """
    import onnxruntime

    network, image, second = network.eval(), _ramp(1, size, size, size), _ramp(2, size, size * 3 // 2, size * 2)
    shapes = (dict.fromkeys(DYNAMIC_AXES, torch.export.Dim.DYNAMIC),)
    with write_whole(path) as partial, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch and onnxscript warn of their own plans
        torch.onnx.export(
            network, (image,), partial, opset_version=ONNX_OPSET, input_names=["image"], output_names=["pred"],
            dynamic_shapes=shapes, external_data=False, dynamo=True, verbose=False,
        )  # fmt: skip
        expected = network(second)
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"image": second.numpy()})[0])
        difference = float((found - expected).abs().max() / expected.abs().max())
        rule = f"{path}: the graph must agree with the network to {tolerance:g}"
        refuse_if(not difference <= tolerance, rule, f"a difference of {difference:g}")
    return difference


def _ramp(*shape: int) -> Tensor:
    """A batch of images in [0, 1] without symmetry, shape (B, 1, H, W, D)."""
    return torch.linspace(0, 1, math.prod(shape)).pow(2).mul(37).remainder(1).reshape(shape[0], 1, *shape[1:])


def export_bundle(
    output: str | Path, bundle: str | Path = "bundle", overrides: str | Path = "", size: int = 64
) -> Path:
    """Write the bundle's network with its weights as TorchScript (.ts) or ONNX (.onnx), for any size of scan.

    Args:
        output: the file, whose path is returned; its suffix decides, others are refused.
        bundle: folder of the bundle.
        overrides: overrides.json of imported weights, wherever its folder lies; empty: the bundle's own.
        size: side of the cube that an ONNX graph is traced with, an even multiple of what the network needs.
    """
    path = Path(output)
    rule = f"{path}: the suffix .ts (TorchScript) or .onnx is needed"
    refuse_if(path.suffix not in {".ts", ".onnx"}, rule, f"'{path.suffix}'")
    configs = [find_config(bundle, "inference.json"), *([Path(overrides)] if str(overrides) else [])]
    parser = ConfigParser()
    parser.read_config([str(config) for config in configs])
    parser["bundle_root"] = literal(str(find_bundle(bundle)))
    parser["weights_dir"] = literal(str(configs[-1].parent))
    network = parser.get_parsed_content("network_def")
    load_weights(network, parser.get_parsed_content("weights"))
    if path.suffix == ".onnx":
        export_onnx(network, path, size)
    else:
        export_torchscript(network, path)
    return path
