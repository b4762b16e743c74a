"""Weights are loaded when they fit exactly, and refused in one line when they do not."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool3d, interpolate

from brainfm_monai.networks import AdditiveUNet, MultiTaskNet, TwoScaleUNet, UNet
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights import find_tasks, load_pretrained, load_weights, read_state_dict


def network(channels: int = 3) -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Conv3d(1, channels, 1), second=nn.Conv3d(channels, 2, 1)))


def test_weights_that_fit_are_loaded(tmp_path: Path) -> None:
    source, target = network(), network()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    load_weights(target, tmp_path / "model.pt")
    for key, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], tensor, rtol=0, atol=0)


def test_the_first_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    target = network()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    torch.save(network(4).state_dict(), path)
    with pytest.raises(
        ValueError,
        match=r"model\.pt: the weights must fit the network, found 'first\.weight' of shape \(4, 1, 1, 1, 1\)",
    ):
        load_weights(target, path)
    state = network().state_dict()
    torch.save({key: tensor for key, tensor in state.items() if key != "second.bias"}, path)
    with pytest.raises(
        ValueError, match=r"found no 'second\.bias' where the network has 'second\.bias' of shape \(2,\)"
    ):
        load_weights(target, path)
    torch.save({**state, "third.bias": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"found 'third\.bias' of shape \(1,\) where the network has no 'third"):
        load_weights(target, path)
    for key, tensor in target.state_dict().items():
        torch.testing.assert_close(before[key], tensor, rtol=0, atol=0)


def test_a_file_that_is_no_state_dict_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match=r"model\.pt: a file of weights is needed, found no such file"):
        read_state_dict(path)
    for content in (b"not a checkpoint", b"", b"\x80\x02cos\nsystem\nq\x00."):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"a checkpoint of tensors, numbers and text is needed|cannot be read as one"
        ) as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)
    torch.save({"state_dict": network().state_dict()}, path)
    with pytest.raises(
        ValueError, match="a plain state dict of tensors is needed, found 'state_dict' of type OrderedDict"
    ):
        read_state_dict(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="a plain state dict of tensors is needed, found Tensor"):
        read_state_dict(path)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_that_are_not_dense_are_refused(tmp_path: Path, kind: str) -> None:
    torch.save({"a": torch.ones(2).to_sparse() if kind == "sparse" else torch.ones(2, device=kind)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: .*, found 'a', which is sparse, quantized or without values$"):
        read_state_dict(tmp_path / "w.pt")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"weight": Trap()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="and was not loaded"):
        read_state_dict(tmp_path / "model.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_two_scale_network_begins_with_the_output_of_the_coarse_one(tmp_path: Path) -> None:
    first, all_tasks = TaskLayout(["segmentation", "mni"]), TaskLayout(["segmentation", "T1w", "mni"])
    coarse = MultiTaskNet(AdditiveUNet(features=(16, 32, 64)), first).eval()
    fine = MultiTaskNet(TwoScaleUNet(features=(8, 16, 32, 64)), all_tasks).eval()
    torch.save(coarse.state_dict(), tmp_path / "coarse.pt")
    fresh = fine.head.weight.detach()[all_tasks.slices["T1w"]].clone()
    assert load_pretrained(fine, tmp_path / "coarse.pt", first) == ["T1w"]
    image = torch.rand(1, 1, 16, 16, 16)
    expected = first.split(interpolate(coarse(avg_pool3d(image, 2)), scale_factor=2))
    found = all_tasks.split(fine(image))
    for name in first.tasks:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    assert torch.equal(fine.head.weight[all_tasks.slices["T1w"]], fresh)

    before = {name: tensor.clone() for name, tensor in fine.state_dict().items()}
    assert load_pretrained(fine, "") == []
    state = coarse.state_dict()
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    for name, content, message in (
        ("other", {"head.weight": state["head.weight"], "head.bias": state["head.bias"]}, "found none for 'backbone"),
        ("head", headless, r"the head must have the 47 channels of \['segmentation', 'mni'\] .*, found no head"),
    ):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=rf"{name}\.pt: .*{message}"):
            load_pretrained(fine, tmp_path / f"{name}.pt", first)
    with pytest.raises(ValueError, match=r"coarse\.pt: the head must have the 48 channels of .*, found 47"):
        load_pretrained(fine, tmp_path / "coarse.pt")  # rows of another layout are never copied by number
    with pytest.raises(FileNotFoundError, match=r"absent\.pt: a file of weights is needed, found no such file"):
        load_pretrained(fine, tmp_path / "absent.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in fine.state_dict().items())


def test_lesions_are_predicted_where_the_weights_have_a_head_for_them(tmp_path: Path) -> None:
    names = ["segmentation", "CT", "lesion"]
    networks = {
        "plain.pt": MultiTaskNet(UNet(features=(8, 16)), TaskLayout(names[:2])),
        "lesions.pt": MultiTaskNet(UNet(features=(8, 16)), TaskLayout(names), context=["lesion"]),
    }
    for name, network in networks.items():
        torch.save(network.state_dict(), tmp_path / name)
    assert find_tasks(tmp_path / "plain.pt", names, ["lesion"]) == ["segmentation", "CT"]
    assert find_tasks(tmp_path / "lesions.pt", names, ["lesion"]) == names
    (tmp_path / "broken.pt").write_text("no weights")
    for name in ("absent.pt", "broken.pt"):  # which loading reports
        assert find_tasks(tmp_path / name, names, ["lesion"]) == names
