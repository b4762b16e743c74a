"""A second look at the brain."""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import Tensor

from brainfm_monai.inferers import SecondLookInferer
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "mni"], "synthseg_head")
BRAIN, SKIN = (LAYOUT.protocol.label_of_id[i] for i in (3, 511))


class Guess:
    """Labels by intensity; coordinates are voxel indices of the head, stretched where more than the brain is seen.

    It knows where a voxel lies from the image itself, which holds a ramp along every axis: a crop does not change that.
    """

    def __init__(self, low: bool = False) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.low = low

    def __call__(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape[2:]))
        code = (image[:, 0] * 1e6).round().long()
        label, x, y, z = code // 10**6 % 10, code // 10**4 % 100, code // 100 % 100, code % 100
        labels = torch.where(label == 2, BRAIN, torch.where(label == 1, SKIN, 0))[:, None]
        segmentation = labels.float() if self.low else torch.nn.functional.one_hot(labels[:, 0], 44).movedim(-1, 1).float()
        stretch = 1.0 if len(self.seen) == 2 else 1.25
        mni = torch.stack([x, y, z], 1).float() * stretch + (0 if stretch == 1 else 7)
        distance = torch.full_like(mni[:, :1], float(len(self.seen))).expand(-1, 4, -1, -1, -1)
        return torch.cat([segmentation, distance, mni], 1)


def head() -> Tensor:
    """A head of 40 x 48 x 64 with a brain that lies to one side of it; double precision holds the ramps."""
    x, y, z = torch.meshgrid(torch.arange(40), torch.arange(48), torch.arange(64), indexing="ij")
    label = torch.zeros(40, 48, 64, dtype=torch.int64)
    label[2:38, 3:45, 1:63] = 1
    label[20:36, 8:30, 40:60] = 2
    return ((label * 10**6 + x * 10**4 + y * 100 + z).double() / 1e6)[None, None]


def test_coordinates_are_those_of_the_second_look() -> None:
    for low in (False, True):
        network = Guess(low)
        image = MetaTensor(head(), affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
        inferer = SecondLookInferer(SimpleInferer(), LAYOUT, size=(24, 32, 28))
        output = inferer(image, network)
        assert isinstance(output, MetaTensor)
        assert torch.equal(output.affine, image.affine)
        assert network.seen == [(40, 48, 64), (24, 32, 28)]  # 16 to 40, 2 to 34, 36 to 64
        parts = LAYOUT.split(output.as_tensor())
        index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (40, 48, 64)), indexing="ij")).float()
        torch.testing.assert_close(parts["mni"][0].float(), index, atol=1e-3, rtol=0)  # outside, too: the affine map is exact


def test_other_maps_are_the_mean_of_both_looks_without_a_seam() -> None:
    for low in (False, True):
        first = LAYOUT.split(Guess(low)(head()))
        network = Guess(low)

        def look(image: Tensor, network: Guess = network) -> Tensor:
            output = network(image)
            if len(network.seen) == 2:
                LAYOUT.split(output)["segmentation"].zero_()  # no say in the labels
            return output

        parts = LAYOUT.split(SecondLookInferer(SimpleInferer(), LAYOUT, size=(24, 32, 28))(head(), look))
        assert torch.equal(parts["segmentation"], first["segmentation"])
        distance = parts["distance"][0, 0]  # 1 in the first look, 2 in the second, whose box is 16 to 40, 2 to 34, 36 to 64
        assert (distance[24:32, 10:26, 44:56] == 1.5).all()
        assert (distance[:16] == 1).all()
        assert (distance[:, :2] == 1).all()
        assert (distance[:, 34:] == 1).all()
        assert (distance[..., :36] == 1).all()
        for axis in range(3):  # a ramp of 8 voxels to half of the difference
            assert distance.diff(dim=axis).abs().max() <= 1 / 16


def test_coordinates_are_smooth_and_keep_their_bend() -> None:
    clean = Guess()
    noise = 3 * torch.randn(1, 3, 24, 32, 28, generator=torch.Generator().manual_seed(0))

    def network(image: Tensor, noise: Tensor) -> Tensor:
        output = clean(image)
        if len(clean.seen) == 2:
            mni = output[:, LAYOUT.slices["mni"]]
            mni[:, 1] += 0.06 * (mni[:, 2] - 50).square()  # a bend that no affine map has
            mni += noise
        return output

    def look(sigma: float, noise: Tensor) -> Tensor:
        clean.seen.clear()
        inferer = SecondLookInferer(SimpleInferer(), LAYOUT, size=(24, 32, 28), sigma=sigma)
        output = inferer(head(), lambda image: network(image, noise))
        return output[0, LAYOUT.slices["mni"], 20:36, 8:30, 40:60].float()

    exact = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (40, 48, 64)), indexing="ij")).float()[:, 20:36, 8:30, 40:60]
    exact[1] += 0.06 * (exact[2] - 50).square()
    error = (look(2, noise) - exact).abs().mean((1, 2, 3))
    assert (error < 0.8).all(), error  # the noise alone: 2.4; forward, without the bend: 1.5


def test_a_volume_smaller_than_the_box_goes_on_with_zeros() -> None:
    network = Guess()
    output = SecondLookInferer(SimpleInferer(), LAYOUT, size=(24, 32, 80))(head(), network)
    assert network.seen == [(40, 48, 64), (24, 32, 80)]
    index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (40, 48, 64)), indexing="ij")).float()
    torch.testing.assert_close(output[0, LAYOUT.slices["mni"]].float(), index, atol=1e-3, rtol=0)


def test_one_look_where_two_are_of_no_use() -> None:
    without = TaskLayout(["segmentation", "distance"], "synthseg_head")
    network = Guess()
    SecondLookInferer(SimpleInferer(), LAYOUT, enabled=False)(head(), network)
    assert len(network.seen) == 1
    network = Guess()
    SecondLookInferer(SimpleInferer(), without)(head(), lambda x: network(x)[:, : without.channels])
    assert len(network.seen) == 1
    network = Guess()
    SecondLookInferer(SimpleInferer(), LAYOUT)(torch.zeros(1, 1, 16, 16, 16), network)  # no brain
    assert len(network.seen) == 1


def test_coordinates_that_do_not_fill_space_are_taken_as_they_are() -> None:
    flat = Guess()

    def network(image: Tensor) -> Tensor:
        output = flat(image)
        output[:, LAYOUT.slices["mni"]] = 0.25 * len(flat.seen)  # the same everywhere, as of an untrained network
        return output

    output = SecondLookInferer(SimpleInferer(), LAYOUT)(head(), network)
    assert len(flat.seen) == 2
    torch.testing.assert_close(output[:, LAYOUT.slices["mni"]], torch.full((1, 3, 40, 48, 64), 0.5), atol=1e-5, rtol=0)
