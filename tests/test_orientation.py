"""The header against the anatomy: turned heads are recognised, and turned back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from brainfm_monai.inferers import OrientationInferer
from brainfm_monai.inferers.orientation import LARGEST_MISFIT_MM, apply_turn, describe_turn, list_turns, misfit
from brainfm_monai.networks import MultiTaskNet
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "mni"], "synthseg_head")
WITH_LESIONS = TaskLayout([*LAYOUT.tasks, "lesion"], "synthseg_head")  # which the head of the network lacks
LEFT_CORTEX = int(LAYOUT.protocol.label_of_id[3])


def make_turn(axes: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    return np.eye(3, dtype=int)[list(axes)] * np.array(signs)[:, None]


def test_there_are_24_turns_and_each_can_be_undone() -> None:
    volume = torch.arange(2 * 3 * 4.0).reshape(1, 1, 2, 3, 4)
    turns = list_turns()
    assert np.array_equal(turns[0], np.eye(3))
    assert len({turn.tobytes() for turn in turns}) == 24
    for turn in turns:
        assert np.linalg.det(turn) == pytest.approx(1)
        assert torch.equal(apply_turn(turn.T, apply_turn(turn, volume)), volume)
    assert {describe_turn(turn).split(",")[0] for turn in turns} == {f"by {n} degrees" for n in (0, 90, 120, 180)}
    lying = make_turn((0, 2, 1), (1, 1, -1))  # the volume's second axis is the head's from top to bottom
    assert torch.equal(apply_turn(lying, volume)[0, 0], volume[0, 0].permute(0, 2, 1).flip(2))
    assert describe_turn(lying).endswith("lie where the header says right, superior and posterior")


def test_misfit_is_small_for_an_upright_brain_and_large_for_a_mirrored_turned_or_scattered_one() -> None:
    brain = torch.ones(12, 14, 10, dtype=torch.bool)
    upright = torch.stack(torch.meshgrid(*(4.0 * torch.arange(n) for n in brain.shape), indexing="ij"))
    noise = torch.randn(upright.shape, generator=torch.Generator().manual_seed(0))
    assert misfit(brain, 0.9 * upright + noise, 4.0) == pytest.approx(
        1.7, abs=0.2
    )  # median of three dimensions, over 0.9
    assert misfit(brain, 0.2 * upright + 10 * noise, 4.0) > 40
    assert misfit(brain, upright * torch.tensor([-1.0, 1, 1]).reshape(3, 1, 1, 1), 4.0) == LARGEST_MISFIT_MM
    assert misfit(brain, upright[[0, 2, 1]] * torch.tensor([1.0, -1, 1]).reshape(3, 1, 1, 1), 4.0) == LARGEST_MISFIT_MM
    assert misfit(torch.zeros_like(brain), upright, 4.0) == LARGEST_MISFIT_MM


class Reader(nn.Module):
    """Sees where an image is brightest: right, front and top, in that order, is upright; else its coordinates are noise."""

    out_channels = LAYOUT.channels

    def forward(self, image: Tensor) -> Tensor:
        """Logits of one label, and coordinates."""
        size = image.shape[2:]
        seen = (image[0, 0] > 0.1).nonzero()
        bright = (image[0, 0] > 0.4).nonzero().float().mean(0)
        x, y, z = ((bright - seen.float().mean(0)) / (seen.max() + 1)).tolist()
        output = torch.zeros(1, LAYOUT.channels, *size)
        output[:, LEFT_CORTEX] = 5.0
        voxel_mm = 48.0 / float(seen.max() + 1)
        noise = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
        index = torch.stack(torch.meshgrid(*(torch.arange(n) * voxel_mm for n in size), indexing="ij"))
        output[0, LAYOUT.slices["mni"]] = (index if x > y > z > 0.05 else 30 * noise) / 100
        return output


def run(image: Tensor, fix: bool) -> tuple[Any, Any]:
    network = MultiTaskNet(Reader(), LAYOUT, stride=2)
    network.head = nn.Identity()  # type: ignore[assignment]

    def infer(inputs: Tensor, _: Any) -> Tensor:
        maps = network.upsample(network.backbone(network.pool(torch.as_tensor(inputs))), list(inputs.shape[2:]))
        return torch.cat([maps, maps[:, -1:]], dim=1)

    inputs = MetaTensor(image, meta={"warnings": ["earlier"]})
    return OrientationInferer(infer, WITH_LESIONS, fix)(inputs, network), inputs  # type: ignore[arg-type]


@pytest.fixture
def head() -> Tensor:
    image = torch.full((1, 1, 48, 48, 48), 0.2)
    image[..., 36:44, 32:40, 28:32] = 1.0  # off the middle by 16, 12 and 6 voxels
    return image


def test_an_upright_head_is_left_alone(head: Tensor) -> None:
    assert run(head, True)[1].meta["warnings"] == ["earlier"]


@pytest.mark.parametrize(
    "turn", [make_turn((0, 2, 1), (1, -1, 1)), make_turn((1, 2, 0), (1, -1, -1)), make_turn((0, 1, 2), (-1, -1, 1))]
)
def test_a_turned_head_is_warned_of_and_its_maps_return_to_the_grid_that_was_given(
    head: Tensor, turn: np.ndarray
) -> None:
    lying = apply_turn(turn, head)
    output, inputs = run(lying, False)
    (text,) = inputs.meta["warnings"]
    assert text.startswith("earlier\nthe orientation of the header does not fit the anatomy: the head is turned by")
    assert "pass --fix_orientation True" in text
    upright, _ = run(head, False)
    fixed, inputs = run(lying, True)
    assert "turned back by --fix_orientation" in inputs.meta["warnings"][0]
    np.testing.assert_array_equal(fixed, apply_turn(turn, upright))
    assert not np.array_equal(output, fixed)


def test_a_head_that_no_turn_explains_is_warned_of(head: Tensor) -> None:
    mirrored = head.flip(2)
    _, inputs = run(mirrored, True)  # no turn of a mirrored head is upright
    assert "no turn of the head fits clearly better" in inputs.meta["warnings"][0]


def test_a_slab_that_is_too_thin_for_coarse_voxels_is_left_alone(head: Tensor) -> None:
    output, inputs = run(head[..., 29:32], True)
    assert output.shape == (1, WITH_LESIONS.channels, 48, 48, 3)
    assert "no turn of the head fits clearly better" in inputs.meta["warnings"][0]
