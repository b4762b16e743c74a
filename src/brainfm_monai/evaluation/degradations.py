"""Scans of an evaluation under a condition: real ones made worse, and generated ones whose truth is known."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.evaluation.conditions import (
    Condition,
    check_for_real_scans,
    find_condition,
    fix_acquisition,
    make_laws,
)
from brainfm_monai.functional.intensity import normalise_percentiles
from brainfm_monai.synthesis import SUBJECT_KEYS, SynthesisRanges, Synthesizer, render, sample
from brainfm_monai.synthesis.acquisition import INTENSITY_TOP, acquire
from brainfm_monai.tasks import TASKS, TaskLayout

__all__ = ["TARGET", "DegradeScand", "GenerateScan"]

TARGET = "target_"  # before the name of a task: the truth, beside the prediction of that name
# laws under which the generator's acquisition leaves an image as it is
NOTHING: dict[str, Any] = {"gamma_log_std": 0.0, "bias_log_std": (0.0, 0.0), "resolution_weights": (1.0, 0.0, 0.0, 0.0)}
NOTHING |= {"noise_std": (0.0, 0.0), "real_noise_std": (0.0, 0.0), "rician_prob": 0.0, "head_cluster_prob": 0.0}


class DegradeScand(MapTransform):
    """Make real scans worse in a stated way: the acquisition of the generator, on the scan in place of a painted head.

    Intensities go through the condition's inversion, gamma and bias field, slices with their profile, noise, and the
    interpolation back to the voxels; references stay at the resolution that they have. Voxels that were exactly 0 (an
    extracted brain's surroundings) stay so. An added field becomes the entry ``target_log_bias_field``, added to one that is
    there: of a scan whose own field is unknown, the added one is the whole target.

    Args:
        keys: scans of shape (1, H, W, D) in [0, 1], RAS axes, 1 mm.
        conditions: those that the entry ``condition`` names.

    Raises:
        ValueError: if a condition can be made on generated scans alone.
    """

    def __init__(self, keys: KeysCollection, conditions: Sequence[Condition]) -> None:
        super().__init__(keys)
        self.conditions = tuple(conditions)
        check_for_real_scans(self.conditions)
        self.protocol, self.generation_protocol = (Protocol.load(f"synthseg_{name}") for name in ("head", "generation"))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Degrade the scans by the entries ``condition`` and ``seed``."""
        d = dict(data)
        settings = find_condition(self.conditions, str(d["condition"])).settings
        for key in self.key_iterator(d) if settings else ():
            scan, field = self._degrade(d[key], settings, int(d["seed"]))
            d[key] = _like(scan, d[key])
            if "bias_log_std" in settings:
                own = d.get(f"{TARGET}log_bias_field")
                d[f"{TARGET}log_bias_field"] = _like(field if own is None else field + own, d[key], with_history=False)
        return d

    def _degrade(self, image: Tensor, settings: Mapping[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        values = (image.as_tensor() if isinstance(image, MetaTensor) else image)[None].float()
        seen = values > 0
        if "contrast" in settings:  # the one that real scans have is the inverted one
            values = torch.where(seen, values.amax() - values, 0.0)
        without_contrast = {key: value for key, value in settings.items() if key != "contrast"}
        drawn = sample(
            make_laws(SynthesisRanges(**NOTHING), without_contrast),
            [torch.Generator().manual_seed(seed)],
            spatial_size=values.shape[2:],
            protocol=self.protocol,
            generation_protocol=self.generation_protocol,
            device=values.device,
        )
        scan, field, _ = acquire(values * INTENSITY_TOP, fix_acquisition(drawn, settings).appearances[0])
        return normalise_percentiles(scan * seen)[0], field[0]


class GenerateScan(Transform):
    """Turn a prepared subject into a generated scan under a condition, and its truth.

    Args:
        ranges: laws of what the conditions do not set.
        conditions: those that the entry ``condition`` names.
        layout: tasks whose truth is wanted.
        spatial_size: (H, W, D) of the scans.
        stride: their voxel in voxels of the subjects.
        source_mm: voxel of the subjects.
        device: of the generator; volumes of noise differ between kinds of devices, all other numbers do not.
    """

    def __init__(
        self,
        ranges: SynthesisRanges,
        conditions: Sequence[Condition],
        layout: TaskLayout,
        spatial_size: Sequence[int],
        stride: int = 1,
        source_mm: float = 1.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.conditions, self.layout, self.device = tuple(conditions), layout, torch.device(device)
        self.voxel_mm = stride * source_mm
        self.synthesizers = {
            c.name: Synthesizer(make_laws(ranges, c.settings), layout, spatial_size, self.voxel_mm, source_mm)
            for c in conditions
        }

    @torch.no_grad()
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the subject's volumes by ``image``, (1, H, W, D) in [0, 1], and ``target_<task>`` in the units of the files.

        ``target_segmentation`` holds FreeSurfer ids, ``target_distance`` and ``target_mni`` are in mm, ``target_CT`` in HU;
        ``target_visible`` marks the field of view. They lie in a grid with RAS axes, whose centre is the origin.
        """
        kept = {key: value for key, value in data.items() if key not in SUBJECT_KEYS}
        present = [key for key in SUBJECT_KEYS if key in data]
        subject = {key: convert_to_tensor(data[key], device=self.device, track_meta=False)[None] for key in present}
        condition = find_condition(self.conditions, str(data["condition"]))
        synthesizer = self.synthesizers[condition.name]
        drawn = synthesizer.draw(subject, [int(data["seed"])], data.get("generation_protocol"))
        made = render(subject, fix_acquisition(drawn, condition.settings), self.layout)
        affine = torch.diag(torch.tensor([self.voxel_mm] * 3 + [1.0], dtype=torch.float64))
        affine[:3, 3] = -self.voxel_mm * (torch.tensor(made["image"].shape[2:]) - 1) / 2
        scale = {name: TASKS[name].scale for name in made if name in TASKS and TASKS[name].scale != 1}
        in_files = {name: value * scale.get(name, 1) for name, value in made.items() if value.ndim == 5}
        maps = {name: MetaTensor(value[0], affine=affine) for name, value in in_files.items()}
        ids = torch.as_tensor(self.layout.protocol.freesurfer_ids, device=self.device)
        maps["segmentation"] = MetaTensor(ids[made["segmentation"][0]], affine=affine)
        image = maps.pop("image")
        image.meta["scan_name"] = str(data["name"])
        return {**kept, "image": image, **{TARGET + name: value for name, value in maps.items()}}


def _like(values: Tensor, source: Tensor, with_history: bool = True) -> Tensor:
    """Values with the metadata of a scan, and, of the scan itself, what was done to it."""
    if not isinstance(source, MetaTensor):
        return values
    tensor: MetaTensor = MetaTensor(values).copy_meta_from(source)
    if not with_history:
        tensor.applied_operations = []
    return tensor
