"""A second look at the brain."""

from __future__ import annotations

from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from brainfm_monai.inferers import TwoStageInferer
from brainfm_monai.networks import MultiTaskNet, TwoScaleUNet
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "mni"], "synthseg_head")
BRAIN, SKIN = (LAYOUT.protocol.label_of_id[i] for i in (3, 511))


class Guess(nn.Module):
    """Features that are an output: labels by intensity; coordinates are voxel indices of the head, stretched at the first look.

    It knows where a voxel lies from the image itself, which holds a ramp along every axis: a crop does not change that.
    """

    out_channels = LAYOUT.channels

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape[2:]))
        code = (image[:, 0] * 1e6).round().long()
        label, x, y, z = code // 10**6 % 10, code // 10**4 % 100, code // 100 % 100, code % 100
        labels = torch.where(label == 2, BRAIN, torch.where(label == 1, SKIN, 0))
        segmentation = torch.nn.functional.one_hot(labels, 44).movedim(-1, 1).float()
        stretch = 1.0 if len(self.seen) == 2 else 1.25
        mni = torch.stack([x, y, z], 1).float() * stretch + (0 if stretch == 1 else 7)
        distance = torch.full_like(mni[:, :1], float(len(self.seen))).expand(-1, 4, -1, -1, -1)
        return torch.cat([segmentation, distance, mni], 1)


def make(backbone: nn.Module) -> MultiTaskNet:
    """A network whose output is its features."""
    network = MultiTaskNet(backbone, LAYOUT)
    with torch.no_grad():
        network.head.weight.copy_(torch.eye(LAYOUT.channels).reshape(LAYOUT.channels, -1, 1, 1, 1))
        network.head.bias = None
    return network


@torch.no_grad()
def look(backbone: nn.Module, image: Tensor, layout: TaskLayout = LAYOUT, **options: Any) -> Tensor:
    options = {"mirror": False, "precision": "float32", "memory": "full", "threshold": -1, "multiple": 1, **options}
    return TwoStageInferer(layout, **options)(image, make(backbone))


def head() -> Tensor:
    """A head of 40 x 48 x 64 with a brain that lies to one side of it; double precision holds the ramps."""
    x, y, z = torch.meshgrid(torch.arange(40), torch.arange(48), torch.arange(64), indexing="ij")
    label = torch.zeros(40, 48, 64, dtype=torch.int64)
    label[2:38, 3:45, 1:63] = 1
    label[20:36, 8:30, 40:60] = 2
    return ((label * 10**6 + x * 10**4 + y * 100 + z).double() / 1e6)[None, None]


def voxels() -> Tensor:
    """Indices of the voxels of the head."""
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in (40, 48, 64)), indexing="ij")).float()


def test_coordinates_are_those_of_the_second_look() -> None:
    guess = Guess()
    image = MetaTensor(head(), affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    output = look(guess, image, size_mm=(24, 32, 28))
    assert isinstance(output, MetaTensor)
    assert torch.equal(output.affine, image.affine)
    assert guess.seen == [(40, 48, 64), (24, 32, 28)]  # 16 to 40, 3 to 35, 36 to 64
    mni = output.as_tensor()[0, LAYOUT.slices["mni"]]
    torch.testing.assert_close(mni, voxels(), atol=1e-3, rtol=0)  # outside, too: the affine map is exact


class ChangedMind(Guess):
    """Surer, at the second look, of skin where the first one sees brain."""

    def forward(self, image: Tensor) -> Tensor:
        output = super().forward(image)
        if len(self.seen) == 2:
            output[:, BRAIN] = 0
            output[:, SKIN] = 2
        return output


def test_other_maps_are_the_mean_of_both_looks_without_a_seam() -> None:
    parts = LAYOUT.split(look(ChangedMind(), head(), size_mm=(24, 32, 28)))
    distance = parts["distance"][0, 0]  # 1 in the first look, 2 in the second, whose box is 16 to 40, 3 to 35, 36 to 64
    assert (distance[24:32, 11:27, 44:56] == 1.5).all()
    assert (distance[:16] == 1).all()
    assert (distance[:, :3] == 1).all()
    assert (distance[:, 35:] == 1).all()
    assert (distance[..., :36] == 1).all()
    for axis in range(3):  # a ramp of 8 voxels to half of the difference
        assert distance.diff(dim=axis).abs().max() <= 1 / 16
    labels = parts["segmentation"][0].argmax(0)
    assert (labels[24:32, 11:27, 44:56] == SKIN).all()
    assert (labels[20, 8:30, 40:60] == BRAIN).all()  # where the second look counts less
    assert (labels[2:16, 3:45, 1:63] == SKIN).all()
    assert (labels[:2] == 0).all()


class OfImage(nn.Module):
    """A context head whose only map is the image."""

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        assert features.shape[2:] == image.shape[2:]
        return image.float()


@torch.no_grad()
def test_the_context_head_sees_the_box_of_the_second_look_and_nothing_around_it() -> None:
    layout = TaskLayout([*LAYOUT.tasks, "lesion"])
    outside, lesion = layout.outside_values[-1], LAYOUT.channels
    network, image = make(Guess()), head()
    network.context = OfImage()  # type: ignore[assignment]
    options: dict[str, Any] = {
        "mirror": False,
        "precision": "float32",
        "memory": "full",
        "threshold": -1,
        "multiple": 1,
    }
    output = TwoStageInferer(layout, size_mm=(24, 32, 28), **options)(image, network)
    expected = torch.full((40, 48, 64), outside)
    expected[16:40, 3:35, 36:64] = image[0, 0, 16:40, 3:35, 36:64].float()
    torch.testing.assert_close(output[0, lesion], expected)
    network.backbone.seen.clear()  # type: ignore[operator, union-attr]
    output = TwoStageInferer(layout, size_mm=(24, 32, 28), context=False, **options)(image, network)
    assert (output[0, lesion] == outside).all()


class Bent(Guess):
    """Coordinates with a bend that no affine map has, and noise."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, image: Tensor) -> Tensor:
        output = super().forward(image)
        if len(self.seen) == 2:
            mni = output[:, LAYOUT.slices["mni"]]
            mni[:, 1] += 0.06 * (mni[:, 2] - 50).square()
            mni += self.noise
        return output


def test_coordinates_are_smooth_and_keep_their_bend() -> None:
    noise = 3 * torch.randn(1, 3, 24, 32, 28, generator=torch.Generator().manual_seed(0))
    found = look(Bent(noise), head(), size_mm=(24, 32, 28), sigma_mm=2)[0, LAYOUT.slices["mni"], 20:36, 8:30, 40:60]
    exact = voxels()[:, 20:36, 8:30, 40:60]
    exact[1] += 0.06 * (exact[2] - 50).square()
    error = (found - exact).abs().mean((1, 2, 3))
    assert (error < 0.8).all(), error  # the noise alone: 2.4; forward, without the bend: 1.5


def test_a_volume_smaller_than_the_box_goes_on_with_zeros() -> None:
    guess = Guess()
    output = look(guess, head(), size_mm=(24, 32, 80))
    assert guess.seen == [(40, 48, 64), (24, 32, 80)]
    torch.testing.assert_close(output[0, LAYOUT.slices["mni"]], voxels(), atol=1e-3, rtol=0)


def test_one_look_where_two_are_of_no_use() -> None:
    without = TaskLayout(["segmentation", "distance"], "synthseg_head")
    guess = Guess()
    once = look(guess, head(), second_look=False)
    assert len(guess.seen) == 1
    torch.testing.assert_close(once[0, LAYOUT.slices["mni"]], voxels() * 1.25 + 7)
    guess = Guess()
    look(guess, head(), layout=without)
    assert len(guess.seen) == 1
    guess = Guess()
    output = look(guess, torch.zeros(1, 1, 16, 16, 16))  # no brain
    assert len(guess.seen) == 1
    torch.testing.assert_close(output[0, LAYOUT.slices["mni"]], torch.full((3, 16, 16, 16), 7.0))


class Flat(Guess):
    """Coordinates that are the same everywhere, as of an untrained network."""

    def forward(self, image: Tensor) -> Tensor:
        output = super().forward(image)
        output[:, LAYOUT.slices["mni"]] = 0.25 * len(self.seen)
        return output


def test_coordinates_that_do_not_fill_space_are_taken_as_they_are() -> None:
    flat = Flat()
    output = look(flat, head())
    assert len(flat.seen) == 2
    torch.testing.assert_close(output[:, LAYOUT.slices["mni"]], torch.full((1, 3, 40, 48, 64), 0.5), atol=1e-5, rtol=0)


@torch.no_grad()
def test_memory_modes_and_precisions_give_the_same_two_looks() -> None:
    torch.manual_seed(0)
    network = MultiTaskNet(TwoScaleUNet(features=(8, 8, 16)), LAYOUT, stride=2).eval()  # random weights
    image = torch.rand(2, 1, 32, 40, 48, generator=torch.Generator().manual_seed(1))

    def run(memory: str, precision: str = "float32", second_look: bool = True) -> Tensor:
        inferer = TwoStageInferer(LAYOUT, True, second_look, memory, precision, size_mm=(24, 32, 28))
        return inferer(image, network)

    full, low, windows = (run(memory) for memory in ("full", "low", "windows"))
    torch.testing.assert_close(low, LAYOUT.choose_labels(full), atol=1e-4, rtol=0)
    torch.testing.assert_close(windows, full, atol=1e-4, rtol=0)  # one window holds the image
    rounded, once = run("full", "bfloat16"), run("full", second_look=False)
    for name, part in LAYOUT.split(full).items():
        change, rounding = (float((LAYOUT.split(x)[name] - part).abs().mean()) for x in (once, rounded))
        assert change > 3 * rounding, name


@torch.no_grad()
def test_coordinates_are_not_rounded_to_bfloat16() -> None:
    torch.manual_seed(0)
    network = MultiTaskNet(TwoScaleUNet(features=(8, 8, 16)), LAYOUT).eval()  # no stride, so nothing is interpolated
    image = torch.rand(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(1))
    inferer = TwoStageInferer(LAYOUT, memory="full", precision="bfloat16", size_mm=(16, 16, 16), multiple=1)
    mni = inferer(image, network)[:, LAYOUT.slices["mni"]]
    assert (mni.bfloat16().float() != mni).float().mean() > 0.9
