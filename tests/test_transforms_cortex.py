"""Cortex and white matter of a label map meet where the scan shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from brainfm_monai.tasks import TaskLayout
from brainfm_monai.transforms import FindBoundariesd, cortex

SHAPE = (64, 40, 36)
CENTRES, RADII = {"l": (18, 19, 17), "r": (47, 19, 17)}, {"l": 10.3, "r": 8.3}  # of white matter; cortex is 3 mm thick
IDS = {"l": (2, 3), "r": (41, 42)}
LAYOUT = TaskLayout(["segmentation", "distance"], "synthseg_head")
LABEL = LAYOUT.protocol.label_of_id
LABELS = len(LAYOUT.protocol.structures)


def distance_to(side: str) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    return np.asarray(np.linalg.norm(index - np.array(CENTRES[side]), axis=-1) - RADII[side], dtype=np.float32)


TRUE = {side: distance_to(side) for side in "lr"}


def case(noise: float = 0.0, white: float = 0.7) -> dict[Any, Any]:
    """Labels and distances put the boundary 0.8 mm too deep; the scan has it in its place, with a ventricle within."""
    labels = np.zeros(SHAPE, np.uint8)
    for side, ids in IDS.items():
        for limit, freesurfer_id in ((3.0, ids[1]), (-0.8, ids[0])):
            labels[TRUE[side] < limit] = LABEL[freesurfer_id]
    labels[17:20, 18:21, 16:19] = LABEL[4]
    share = (0.5 - np.minimum(TRUE["l"], TRUE["r"])).clip(0, 1)  # of white matter in a voxel
    image = 0.5 + (white - 0.5) * share + noise * np.random.default_rng(0).normal(size=SHAPE)
    channels = np.stack([TRUE[side] + error for side in "lr" for error in (-3.0, 0.8)]).clip(-3, 3)
    maps = {"pred": labels[None], "segmentation": labels[None].copy(), "image": image[None], "distance": channels}
    tensors = {name: MetaTensor(torch.from_numpy(values), affine=torch.eye(4)) for name, values in maps.items()}
    return {**tensors, "image": tensors["image"].float(), "soft_volumes": torch.arange(LABELS).double()}


@pytest.mark.parametrize("white", [0.7, 0.3])
def test_cortex_and_white_matter_meet_where_the_scan_shows_it(white: float) -> None:
    before, found = case(white=white), FindBoundariesd(["pred", "segmentation"], LAYOUT)(case(white=white))
    assert torch.equal(found["pred"], found["segmentation"])
    labels, old = (d["pred"].numpy()[0] for d in (found, before))
    changed = labels != old
    for side, ids in IDS.items():
        pair = [LABEL[i] for i in ids]
        inside = (TRUE[side] < 0) & (old != LABEL[4])
        assert (old == pair[0]).sum() < 0.8 * inside.sum()
        assert (labels == pair[0]).sum() == pytest.approx(inside.sum(), rel=0.03)
        assert set(np.unique(labels[changed & (TRUE[side] < 3)])) == {pair[0]}  # cortex that is white matter
        moved = found["soft_volumes"][pair] - before["soft_volumes"][pair]
        grown = [int((labels == label).sum()) - int((old == label).sum()) for label in pair]
        assert grown[0] > 100
        assert moved.tolist() == pytest.approx([0.5 * n for n in grown])  # voxels of 1 mm^3
    others = [i for i in range(LABELS) if i not in {LABEL[k] for ids in IDS.values() for k in ids}]
    assert not np.isin(old[changed], others).any()
    assert torch.equal(found["soft_volumes"][others], before["soft_volumes"][others])


def test_a_level_moves_the_boundary_where_the_scan_counts() -> None:
    moved = FindBoundariesd("pred", LAYOUT, (0.8, 0.0))(case())["pred"]
    inside = (TRUE["l"] < 0) & (case()["pred"].numpy()[0] != LABEL[4])
    assert (moved.numpy()[0] == LABEL[2]).sum() == pytest.approx(inside.sum(), rel=0.01)


@pytest.mark.parametrize("without", ["contrast", "distance", "cortex"])
def test_labels_stay_without_contrast_distances_or_cortex(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    item = case(noise=0.6) if without == "contrast" else case()
    if without == "distance":
        del item["distance"]
    if without == "cortex":
        monkeypatch.setattr(cortex, "HEMISPHERES", {"l": (2, 9999), "r": (9999, 42)})
    before = item["pred"].clone()
    soft = item["soft_volumes"].clone()
    found = FindBoundariesd(["pred", "missing"], LAYOUT)(item)
    assert torch.equal(found["pred"], before)
    if without != "contrast":
        assert torch.equal(found["soft_volumes"], soft)
