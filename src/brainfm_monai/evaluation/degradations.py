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
from brainfm_monai.evaluation.conditions import fix_acquisition, make_laws
from brainfm_monai.functional.intensity import normalise_percentiles
from brainfm_monai.synthesis import SUBJECT_KEYS, SynthesisRanges, Synthesizer, render, sample
from brainfm_monai.synthesis.acquisition import INTENSITY_TOP, acquire
from brainfm_monai.tasks import TASKS, TaskLayout

__all__ = ["TARGET", "DegradeScand", "GenerateScan", "to_freesurfer_ids"]

TARGET = "target_"  # before the name of a task: the truth, beside the prediction of that name
# laws under which the generator's acquisition leaves an image as it is
UNCHANGED = SynthesisRanges(
    gamma_log_std=0.0, bias_log_std=(0.0, 0.0), resolution_weights=(1.0, 0.0, 0.0, 0.0), noise_std=(0.0, 0.0),
    real_noise_std=(0.0, 0.0), rician_prob=0.0, head_cluster_prob=0.0,
)  # fmt: skip


def to_freesurfer_ids(labels: Tensor, protocol: Protocol) -> Tensor:
    """FreeSurfer ids of the labels of a protocol, same shape, int64, without metadata."""
    plain = convert_to_tensor(labels, dtype=torch.long, track_meta=False)
    return torch.as_tensor(protocol.freesurfer_ids, device=plain.device)[plain]


class DegradeScand(MapTransform):
    """Make real scans worse in a stated way: the acquisition of the generator, on the scan in place of a painted head.

    Intensities go through the condition's inversion, gamma and bias field, slices with their profile, noise, and the
    interpolation back to the voxels; references stay at the resolution that they have. Voxels that were exactly 0 (an
    extracted brain's surroundings) stay so, unless the condition sets ``keep_zeros`` to false. An added field becomes the entry
    ``target_log_bias_field``, added to one that is there: of a scan whose own field is unknown, the added one is the whole target.

    Args:
        keys: scans of shape (1, H, W, D) in [0, 1], RAS axes, 1 mm.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)
        # the generator's draw asks for them; nothing is painted here
        self.protocol, self.generation_protocol = (Protocol.load(f"synthseg_{name}") for name in ("head", "generation"))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Degrade the scans by the entries ``settings``, which is removed, and ``seed``."""
        d = dict(data)
        settings = d.pop("settings")
        for key in self.key_iterator(d) if settings else ():
            scan, field = self._degrade(d[key], settings, int(d["seed"]))
            d[key] = MetaTensor(scan).copy_meta_from(d[key])
            if "bias_log_std" in settings:
                own = d.get(f"{TARGET}log_bias_field")
                d[f"{TARGET}log_bias_field"] = MetaTensor(field if own is None else field + own, affine=d[key].affine)
        return d

    def _degrade(self, image: MetaTensor, settings: Mapping[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        values = image.as_tensor()[None].float()
        nonzero = values > 0
        if "contrast" in settings:  # the one that real scans have is the inverted one
            values = torch.where(nonzero, values.amax() - values, 0.0)
        without_contrast = {key: value for key, value in settings.items() if key != "contrast"}
        drawn = sample(
            make_laws(UNCHANGED, without_contrast),
            [torch.Generator().manual_seed(seed)],
            spatial_size=values.shape[2:],
            protocol=self.protocol,
            generation_protocol=self.generation_protocol,
            device=values.device,
        )
        scan, field, _ = acquire(values * INTENSITY_TOP, fix_acquisition(drawn, settings).appearances[0])
        return normalise_percentiles(scan * nonzero if settings.get("keep_zeros", True) else scan)[0], field[0]


class GenerateScan(Transform):
    """Turn a prepared subject into a generated scan under a condition, and its truth.

    Args:
        ranges: laws of what the conditions do not set.
        layout: tasks whose truth is wanted.
        spatial_size: (H, W, D) of the scans.
        stride: their voxel in voxels of the subjects.
        source_mm: voxel of the subjects.
        device: of the generator; volumes of noise differ between kinds of devices, all other numbers do not.
    """

    def __init__(
        self,
        ranges: SynthesisRanges,
        layout: TaskLayout,
        spatial_size: Sequence[int],
        stride: int = 1,
        source_mm: float = 1.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.ranges, self.layout, self.device = ranges, layout, torch.device(device)
        self.spatial_size, self.voxel_mm, self.source_mm = tuple(spatial_size), stride * source_mm, source_mm

    @torch.no_grad()
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the subject's volumes by ``image``, (1, H, W, D) in [0, 1], and ``target_<task>`` in the units of the files.

        The entries ``settings``, which is removed, and ``seed`` say how. ``target_segmentation`` holds FreeSurfer ids,
        ``target_distance`` and ``target_mni`` are in mm, ``target_CT`` in HU; ``target_visible`` marks the field of view. They
        lie in a grid with RAS axes, whose centre is the origin.
        """
        d = {key: value for key, value in data.items() if key not in SUBJECT_KEYS}
        settings = d.pop("settings")
        present = [key for key in SUBJECT_KEYS if key in data]
        subject = {key: convert_to_tensor(data[key], device=self.device, track_meta=False)[None] for key in present}
        laws = make_laws(self.ranges, settings)
        synthesizer = Synthesizer(laws, self.layout, self.spatial_size, self.voxel_mm, self.source_mm)
        drawn = synthesizer.draw(subject, [int(d["seed"])], d.get("generation_protocol"))
        made = render(subject, fix_acquisition(drawn, settings), self.layout)
        affine = torch.eye(4, dtype=torch.float64)
        affine[:3] *= self.voxel_mm
        affine[:3, 3] = affine[:3, :3] @ (1 - torch.tensor(self.spatial_size, dtype=torch.float64)) / 2
        made["segmentation"] = to_freesurfer_ids(made["segmentation"], self.layout.protocol)
        for name, value in made.items():
            scale = TASKS[name].scale if name in TASKS else 1.0
            if value.ndim == 5:
                in_file = value[0] if scale == 1 else value[0] * scale
                d["image" if name == "image" else TARGET + name] = MetaTensor(in_file, affine=affine)
        d["image"].meta["scan_name"] = str(d["name"])
        return d
