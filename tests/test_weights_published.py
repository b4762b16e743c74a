"""Both published formats: checkpoints of the same layout, random and tiny, against their definition written out by hand."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
import torch.nn.functional as nnf
from monai.bundle import ConfigParser
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.weights import import_weights, load_published, load_weights

State = dict[str, Tensor]
BRAINFM_CHANNELS = {
    "T1": 1,
    "T2": 1,
    "FLAIR": 1,
    "CT": 1,
    "bias_field_log": 1,
    "segmentation": 56,
    "distance": 4,
    "registration": 3,
    "high_res_residual": 1,
}
BRAINFM_TASKS = {
    "T1": "T1w",
    "T2": "T2w",
    "FLAIR": "FLAIR",
    "CT": "CT",
    "bias_field_log": "log_bias_field",
    "segmentation": "segmentation",
    "distance": "distance",
    "registration": "mni",
    "high_res_residual": "super_resolution",
}
SUPERSYNTH_CHANNELS = {"reg": 3, "seg": 56, "T1": 1, "T2": 1, "FLAIR": 1, "LP": 1, "LW": 1, "RP": 1, "RW": 1}


def kernel(*shape: int) -> Tensor:
    return torch.randn(shape) * (2.0 / (shape[1] * 27)) ** 0.5


def norm(state: State, prefix: str, channels: int) -> None:
    state[f"{prefix}.weight"] = 1 + 0.2 * torch.randn(channels)
    state[f"{prefix}.bias"] = 0.2 * torch.randn(channels)


def make_brainfm(features: Sequence[int], heads: Sequence[str] = tuple(BRAINFM_CHANNELS)) -> State:
    """The state dict of weights.md section 1."""
    state: State = OrderedDict()

    def unit(prefix: str, i: int, o: int) -> None:
        norm(state, f"{prefix}.groupnorm", i)
        state[f"{prefix}.conv.weight"] = kernel(o, i, 3, 3, 3)

    for level, o in enumerate(features):
        i = 1 if level == 0 else features[level - 1]
        middle = max(o // 2, i)
        unit(f"backbone.encoders.{level}.basic_module.SingleConv1", i, middle)
        unit(f"backbone.encoders.{level}.basic_module.SingleConv2", middle, o)
    for number, level in enumerate(range(len(features) - 2, -1, -1)):
        unit(
            f"backbone.decoders.{number}.basic_module.SingleConv1",
            features[level] + features[level + 1],
            features[level],
        )
        unit(f"backbone.decoders.{number}.basic_module.SingleConv2", features[level], features[level])
    for head in heads:
        state[f"head.final_conv_{head}.weight"] = torch.randn(BRAINFM_CHANNELS[head], features[0], 1, 1, 1)
        state[f"head.final_conv_{head}.bias"] = torch.randn(BRAINFM_CHANNELS[head])
    return state


def apply_brainfm(state: State, image: Tensor) -> tuple[Tensor, State]:
    """Features and outputs by head, from the raw state dict."""

    def unit(x: Tensor, prefix: str) -> Tensor:
        groups = 8 if x.shape[1] >= 8 else 1
        x = nnf.group_norm(x, groups, state[f"{prefix}.groupnorm.weight"], state[f"{prefix}.groupnorm.bias"])
        return nnf.leaky_relu(nnf.conv3d(x, state[f"{prefix}.conv.weight"], padding=1), 0.01)

    def double(x: Tensor, name: str) -> Tensor:
        return unit(unit(x, f"backbone.{name}.basic_module.SingleConv1"), f"backbone.{name}.basic_module.SingleConv2")

    levels = len({key.split(".")[2] for key in state if key.startswith("backbone.encoders.")})
    skips = [double(image, "encoders.0")]
    for level in range(1, levels):
        skips.append(double(nnf.max_pool3d(skips[-1], 2), f"encoders.{level}"))
    x = skips.pop()
    for number in range(levels - 1):
        skip = skips.pop()
        x = double(torch.cat([skip, nnf.interpolate(x, size=skip.shape[2:])], 1), f"decoders.{number}")
    features = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    heads = [
        key.split("_", 2)[2].removesuffix(".weight")
        for key in state
        if key.startswith("head.") and key.endswith("weight")
    ]
    return features, {
        h: nnf.conv3d(features, state[f"head.final_conv_{h}.weight"], state[f"head.final_conv_{h}.bias"]) for h in heads
    }


def make_supersynth(features: Sequence[int], heads: Sequence[str] = tuple(SUPERSYNTH_CHANNELS)) -> dict[str, Any]:
    """The dictionary of weights.md section 2, without the quality network."""
    state: State = OrderedDict()

    def unit(prefix: str, i: int, o: int) -> None:
        state[f"{prefix}.conv.weight"] = kernel(o, i, 3, 3, 3)
        norm(state, f"{prefix}.groupnorm", o)

    for level, o in enumerate(features):
        i = 1 if level == 0 else features[level - 1]
        state[f"encoders.{level}.basic_module.conv1.weight"] = torch.randn(o, i, 1, 1, 1) / i**0.5
        state[f"encoders.{level}.basic_module.conv1.bias"] = torch.randn(o)
        unit(f"encoders.{level}.basic_module.conv2", o, o)
        unit(f"encoders.{level}.basic_module.conv3", o, o)
    for number, level in enumerate(range(len(features) - 2, -1, -1)):
        unit(f"decoders.{number}.basic_module.SingleConv1", features[level] + features[level + 1], features[level])
        unit(f"decoders.{number}.basic_module.SingleConv2", features[level], features[level])
    content: dict[str, Any] = {"backbone_state_dict": state}
    for head in heads:
        weight = torch.randn(SUPERSYNTH_CHANNELS[head], features[0], 1, 1, 1)
        content[f"{head}_state_dict"] = OrderedDict(weight=weight, bias=torch.randn(SUPERSYNTH_CHANNELS[head]))
    return content


def apply_supersynth(content: dict[str, Any], image: Tensor) -> State:
    """Outputs by head, from the raw dictionary."""
    state = content["backbone_state_dict"]

    def normed(x: Tensor, prefix: str) -> Tensor:
        x = nnf.conv3d(x, state[f"{prefix}.conv.weight"], padding=1)
        return nnf.group_norm(x, 8, state[f"{prefix}.groupnorm.weight"], state[f"{prefix}.groupnorm.bias"], eps=1e-5)

    def encode(x: Tensor, level: int) -> Tensor:
        prefix = f"encoders.{level}.basic_module"
        x = nnf.conv3d(x, state[f"{prefix}.conv1.weight"], state[f"{prefix}.conv1.bias"])
        y = normed(nnf.leaky_relu(normed(x, f"{prefix}.conv2"), 0.01), f"{prefix}.conv3")
        return nnf.leaky_relu(y + x, 0.1)

    levels = len({key.split(".")[1] for key in state if key.startswith("encoders.")})
    skips = [encode(image, 0)]
    for level in range(1, levels):
        skips.append(encode(nnf.max_pool3d(skips[-1], 2), level))
    x = skips.pop()
    for number in range(levels - 1):
        skip = skips.pop()
        x = torch.cat([skip, nnf.interpolate(x, size=skip.shape[2:])], 1)
        for name in ("SingleConv1", "SingleConv2"):
            x = nnf.leaky_relu(normed(x, f"decoders.{number}.basic_module.{name}"), 0.01)
    heads = [
        key.removesuffix("_state_dict")
        for key in content
        if key.endswith("_state_dict") and not key.startswith("backbone")
    ]
    return {h: nnf.conv3d(x, content[f"{h}_state_dict"]["weight"], content[f"{h}_state_dict"]["bias"]) for h in heads}


def settings(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(name="joint", nested=argparse.Namespace(lr=1e-4, **values), sizes=[1, 2])


def save_brainfm(path: Path, state: State, **values: Any) -> Path:
    content = {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.rand(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "epoch": 37,
        "submit_args": argparse.Namespace(),
        "gen_args": settings(),
        "train_args": settings(**values),
        "best_val_stats": {"loss": 0.5},
    }
    torch.save(content, path)
    return path


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max().clamp_min(1))
    )


@pytest.mark.parametrize(
    ("features", "heads"),
    [
        ((8, 16, 32, 64, 128, 256), tuple(BRAINFM_CHANNELS)),
        ((8, 16), ("segmentation", "distance")),
        ((16, 32, 64), ("registration", "CT")),
        ((16, 48, 32), tuple(BRAINFM_CHANNELS)[:-1]),
    ],
)
def test_a_brainfm_checkpoint_gives_what_its_definition_gives(
    tmp_path: Path, features: tuple[int, ...], heads: tuple[str, ...]
) -> None:
    torch.manual_seed(len(features))
    state = make_brainfm(features, heads)
    network, info = load_published(save_brainfm(tmp_path / "brainfm_pretrained.pth", state))
    image = torch.rand(1, 1, 32, 34, 40)
    features_expected, expected = apply_brainfm(state, image)
    with torch.no_grad():
        found = network.layout.split(network(image))
        assert_same(network.features(image), features_expected)
    assert set(found) == {BRAINFM_TASKS[head] for head in heads}
    for head, output in expected.items():
        assert_same(found[BRAINFM_TASKS[head]], output)
    assert not network.training
    assert (info["format"], info["epoch"], info["features"], info["ignored"]) == ("BrainFM", 37, features, ())


@pytest.mark.parametrize(
    ("features", "heads"),
    [
        ((8, 16, 32, 64, 128), tuple(SUPERSYNTH_CHANNELS)),
        ((16, 24), ("seg", "LP", "LW", "RP", "RW")),
        ((8, 8, 16), ("reg", "T1")),
    ],
)
def test_a_supersynth_checkpoint_gives_what_its_definition_gives(
    tmp_path: Path, features: tuple[int, ...], heads: tuple[str, ...]
) -> None:
    torch.manual_seed(len(features))
    content = make_supersynth(features, heads)
    torch.save(content, tmp_path / "SuperSynth.pth")
    network, info = load_published(tmp_path / "SuperSynth.pth")
    image = torch.rand(1, 1, 32, 16, 48)
    expected = apply_supersynth(content, image)
    with torch.no_grad():
        found = network.layout.split(network(image))
    names = {"reg": "mni", "seg": "segmentation", "T1": "T1w", "T2": "T2w", "FLAIR": "FLAIR"}
    for head, name in names.items():
        assert (name in found) == (head in heads)
        if head in heads:
            assert_same(found[name], expected[head])
    if "LP" in heads:
        assert_same(found["distance"], torch.cat([expected[h] for h in ("LP", "LW", "RP", "RW")], 1))
    assert info["format"] == "SuperSynth"
    assert "MNI" in info["template_space"]


def test_the_labels_are_those_of_the_published_list(tmp_path: Path) -> None:
    state = make_brainfm((8, 16), ["segmentation"])
    layout = load_published(save_brainfm(tmp_path / "b.pth", state))[0].layout
    ids = [s.freesurfer_id for s in layout.protocol.structures]
    assert ids[:20] == [0, 14, 15, 16, 24, 77, 85, 99, 901, 902, 906, 907, 908, 909, 911, 912, 914, 915, 916, 930]
    assert ids[20:38] == [2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 17, 18, 26, 819, 821, 843, 865, 869]
    assert ids[38:] == [41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 820, 822, 844, 866, 870]
    assert layout.protocol.mirror_permutation == [*range(20), *range(38, 56), *range(20, 38)]


def test_prefixes_of_ddp_half_precision_and_a_bare_state_dict_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = make_brainfm((8, 16), ["segmentation", "distance"])
    image = torch.rand(1, 1, 16, 16, 16)
    expected = load_published(save_brainfm(tmp_path / "plain.pth", state))[0](image)
    prefixed = save_brainfm(tmp_path / "ddp.pth", {f"module.{k}": v for k, v in state.items()})
    assert_same(load_published(prefixed)[0](image), expected, 0)
    torch.save(state, tmp_path / "bare.pth")
    assert_same(load_published(tmp_path / "bare.pth")[0](image), expected, 0)
    half = {k: v.half() for k, v in state.items()}
    network, _ = load_published(save_brainfm(tmp_path / "half.pth", half))
    assert all(p.dtype == torch.float32 for p in network.parameters())
    _, outputs = apply_brainfm({k: v.float() for k, v in half.items()}, image)
    assert_same(network.layout.split(network(image))["distance"], outputs["distance"])


def test_features_are_not_normalised_where_the_settings_say_so(tmp_path: Path) -> None:
    state = make_brainfm((8, 16), ["CT"])
    assert load_published(save_brainfm(tmp_path / "a.pth", state, unit_feat=True))[1]["unit_norm"]
    assert not load_published(save_brainfm(tmp_path / "b.pth", state, unit_feat=False))[1]["unit_norm"]


def test_what_has_no_place_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = make_brainfm((8, 16), ["CT"])
    state["head.final_conv_pathology.weight"] = torch.rand(1, 8, 1, 1, 1)
    state["head.final_conv_pathology.bias"] = torch.rand(1)
    _, info = load_published(save_brainfm(tmp_path / "b.pth", state))
    assert info["ignored"] == ("head pathology",)
    assert "left out, without use here: head pathology" in caplog.text
    content = make_supersynth((8, 16), ["T1", "LP", "LW"])
    torch.save(content, tmp_path / "s.pth")
    _, info = load_published(tmp_path / "s.pth")
    assert info["tasks"] == ("T1w",)
    assert info["ignored"] == ("head LP", "head LW")


def test_labels_without_a_protocol_are_numbered(tmp_path: Path) -> None:
    state = make_brainfm((8, 16), ["CT"])
    state["head.final_conv_segmentation.weight"] = torch.rand(18, 8, 1, 1, 1)
    state["head.final_conv_segmentation.bias"] = torch.rand(18)
    path = save_brainfm(tmp_path / "b.pth", state)
    assert [s.name for s in load_published(path)[0].layout.protocol.structures][:2] == ["Unknown", "label-1"]
    import_weights(path, tmp_path / "out")
    assert len(Protocol.load(tmp_path / "out/protocol.tsv")) == 18
    overrides = json.loads((tmp_path / "out/overrides.json").read_text())
    assert overrides["layout#protocol"] == "$@weights_dir + '/protocol.tsv'"


@pytest.mark.parametrize("make", ["brainfm", "supersynth"])
def test_import_writes_a_state_dict_and_what_the_bundle_needs_to_use_it(
    repository: Path, tmp_path: Path, make: str
) -> None:
    torch.manual_seed(1)
    path = tmp_path / "published.pth"
    if make == "brainfm":
        save_brainfm(path, make_brainfm((8, 16, 16)))
    else:
        torch.save(
            make_supersynth((8, 16, 16)) | {"conv_downarm_0_0_kernel": torch.rand(2)}, path
        )  # of its quality network
    import_weights(path, tmp_path / "out")
    published, info = load_published(path)
    assert info["ignored"] == (("conv_downarm_0_0_kernel",) if make == "supersynth" else ())
    (tmp_path / "out").rename(tmp_path / "moved")
    parser = ConfigParser()
    parser.read_config([str(repository / "bundle/configs/inference.json"), str(tmp_path / "moved/overrides.json")])
    assert parser["weights_dir"] == str(tmp_path / "out")
    parser["weights_dir"] = str(tmp_path / "moved")  # --weights_dir FOLDER
    network = parser.get_parsed_content("network_def")
    load_weights(network, parser.get_parsed_content("weights"))
    image = torch.rand(1, 1, 16, 16, 16)
    configs = [str(repository / "bundle/configs/inference.json"), str(tmp_path / "moved/overrides.json")]
    words: dict[str, Any] = {
        "weights_dir": str(tmp_path / "moved"),
        "ckpt_file": str(tmp_path / "moved/model.pt"),
        "meta_file": str(repository / "bundle/configs/metadata.json"),
    }
    monai.bundle.ckpt_export("network_def", str(tmp_path / "model.ts"), config_file=configs, **words)
    exported = torch.jit.load(tmp_path / "model.ts")
    with torch.no_grad():
        assert_same(network(image), published(image), 0)
        assert_same(exported(image), published(image))
    source = json.loads((tmp_path / "moved/source.json").read_text())
    assert source["format"].lower() == make
    assert len(source["sha256"]) == 64
    assert source["template_space"]
    assert source["licence"]
    state = torch.load(tmp_path / "moved/model.pt", weights_only=True)
    assert set(state) == set(network.state_dict())


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth: a file of weights is needed, found no such file"):
        load_published(tmp_path / "none.pth")
    cases: list[tuple[Any, str]] = [
        ({"state_dict": {}}, "a checkpoint of BrainFM .* or SuperSynth .* is needed, found state_dict"),
        ([1, 2], "is needed, found list"),
        ({"model": make_brainfm((8, 16), [])}, "at least one head out of segmentation, T1, .* is needed, found none"),
        (
            {"backbone_state_dict": {}},
            "at least two levels of the backbone are needed, found 0",
        ),
        (
            {"model": {key: x for key, x in make_brainfm((8, 16, 32)).items() if "encoders.0" not in key}},
            "kernels of 3 dimensions are needed in backbone.encoders.0, found none",
        ),
        (
            {"model": make_brainfm((8, 16), ["CT"]) | {"head.final_conv_CT.bias": torch.tensor([torch.nan])}},
            "finite weights are needed",
        ),
        (
            {
                "model": {
                    k: v
                    for k, v in make_brainfm((8, 16), ["CT"]).items()
                    if "decoders.0.basic_module.SingleConv2.conv" not in k
                }
            },
            r"Missing key\(s\) in state_dict: \"backbone\.decoders\.0\.1\.1\.weight\"",
        ),
        (
            {"model": make_brainfm((8, 16), ["CT"]) | {"head.final_conv_CT.weight": torch.rand(1, 9, 1, 1, 1)}},
            r"size mismatch for head\.weight",
        ),
    ]
    wide = make_brainfm((8, 16), ["distance"])
    wide |= {
        "head.final_conv_distance.weight": torch.rand(2, 8, 1, 1, 1),
        "head.final_conv_distance.bias": torch.rand(2),
    }
    cases.append(({"model": wide}, "the head of distance needs 4 channels, found 2"))
    for content, message in cases:
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message) as caught:
            load_published(tmp_path / "x.pth")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / "x.pth"))
