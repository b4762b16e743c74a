"""The conditions of an evaluation: what is done to real scans, and how scans are generated, by name and value."""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import convert_to_tensor
from nibabel.processing import fwhm2sigma
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional.intensity import normalise_percentiles
from brainfm_monai.io import find_repeated, read_table, refuse_if
from brainfm_monai.outputs import resample
from brainfm_monai.synthesis import SUBJECT_KEYS, SynthesisParams, SynthesisRanges, Synthesizer, parse_ranges, render
from brainfm_monai.synthesis.acquisition import acquire
from brainfm_monai.synthesis.ranges import CONTRASTS, INTENSITY_TOP
from brainfm_monai.synthesis.sampling import PROFILE_SIGMA
from brainfm_monai.tasks import TASKS, TaskLayout

# settings that are laws of the generator, a number or a range, with the names of these laws
LAWS = {key: [key] for key in ("bias_log_std", "bias_spacing_mm", "rotation_deg", "translation_mm")}
LAWS["noise_percent"] = ["noise_std", "real_noise_std"]
SLICES = ("sagittal_slices_mm", "coronal_slices_mm", "axial_slices_mm")  # by the axis along which they lie
_TABLE = read_table(Path(__file__).with_name("settings.tsv"))
SETTINGS = {row["setting"]: row["meaning"] for row in _TABLE}  # what a condition may set
GENERATED_ALONE = [row["setting"] for row in _TABLE if row["scans"] == "generated"]
INVERTED = "inverted"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # it becomes part of file names
TARGET = "target_"  # before the name of a task: the truth, beside the prediction of that name
# laws under which the generator's acquisition leaves an image as it is
UNCHANGED = SynthesisRanges(
    gamma_log_std=0.0, bias_log_std=(0.0, 0.0), resolution_weights=(1.0, 0.0, 0.0, 0.0), noise_std=(0.0, 0.0),
    real_noise_std=(0.0, 0.0), rician_prob=0.0, head_cluster_prob=0.0,
)  # fmt: skip


Settings = Mapping[str, Any]  # out of SETTINGS; none leave a scan as it is
Conditions = Mapping[str, Settings]  # what is done to every scan, by name


def parse_conditions(table: Conditions) -> dict[str, dict[str, Any]]:
    """Read the conditions of a bundle config, settings by name; a wrong name, setting, value or none is a ValueError.

    One setting of a condition may be ``{"sweep": [v1, v2, ...]}``: a condition for each value, ``<name>-<value>``.
    """
    conditions: list[tuple[str, dict[str, Any]]] = []
    for name, settings in table.items():
        refuse_if(not re.fullmatch(NAME, name), f"condition {name}: letters and digits name it", "this name")
        unknown = ", ".join(sorted(set(settings) - set(SETTINGS)))
        refuse_if(unknown, f"condition {name}: {', '.join(SETTINGS)} set it", f"the setting {unknown}")
        swept = [key for key, value in settings.items() if isinstance(value, Mapping) and "sweep" in value]
        refuse_if(len(swept) > 1, f"condition {name}: one setting may be swept", ", ".join(swept))
        for value in settings[swept[0]]["sweep"] if swept else [None]:
            conditions.append((f"{name}-{value}" if swept else name, {**settings, **dict.fromkeys(swept, value)}))
            _check(name, conditions[-1][1])
    repeated = find_repeated(name for name, _ in conditions)
    found = f"twice: {repeated}" if repeated else "none"
    refuse_if(repeated or not conditions, "conditions: different ones are needed", found)
    return dict(conditions)


def _check(name: str, settings: Settings) -> None:
    contrasts, contrast = (*CONTRASTS, "random", INVERTED), settings.get("contrast", INVERTED)
    refuse_if(
        contrast not in contrasts, f"condition {name}: 'contrast' must be one of {', '.join(contrasts)}", contrast
    )
    spacing, slices = settings.get("spacing_mm"), [settings[key] for key in SLICES if key in settings]
    refuse_if(spacing is not None and slices, f"condition {name}: either 'spacing_mm' or slices are set", "both")
    lengths = [*slices, *(spacing or ()), settings.get("slice_fwhm_mm", 1)]
    is_wrong = any(not isinstance(mm, int | float) or mm <= 0 for mm in lengths) or len(spacing or SLICES) != 3
    rule = f"condition {name}: slices, their profile and the three spacings must be positive numbers of mm"
    refuse_if(is_wrong, rule, lengths)
    make_laws(SynthesisRanges(), settings)


def check_for_real_scans(conditions: Conditions) -> None:
    """Refuse, by a ValueError, conditions that need the anatomy behind a scan, which generated scans alone have."""
    for name, settings in conditions.items():
        impossible = [key for key in GENERATED_ALONE if key in settings]
        if (contrast := settings.get("contrast", INVERTED)) != INVERTED:
            impossible.append(f"contrast {contrast}")
        found = f"{', '.join(impossible)} on real ones"
        refuse_if(impossible, f"condition {name}: for generated scans alone", found)


def make_laws(base: SynthesisRanges, settings: Settings) -> SynthesisRanges:
    """The laws of the generator under a condition, over those of the base; ValueError if a value does not fit its law.

    The same seed draws the same of everything that the settings leave alone, so that conditions compare the same heads.
    """
    changes: dict[str, Any] = dict(settings.get("ranges", {}))
    for key, laws in LAWS.items():
        if key in settings:
            given = settings[key]
            low, high = map(float, given if isinstance(given, list | tuple) else (given, given))
            if key == "noise_percent":
                low, high = low / 100 * INTENSITY_TOP, high / 100 * INTENSITY_TOP
            changes |= dict.fromkeys(laws, (low, high))
    if contrast := settings.get("contrast"):
        changes["contrast_prior_prob"] = float(contrast != "random")
        if contrast != "random":
            changes["contrast_inversion_prob"] = float(contrast == INVERTED)
        if contrast in CONTRASTS:
            changes["contrast_priors"] = (contrast,)
    return parse_ranges({**asdict(base), **changes})


def fix_acquisition(params: SynthesisParams, settings: Settings) -> SynthesisParams:
    """Put the slices, each as thick as the distance to the next, and the gamma of a condition into a draw."""
    voxel_mm = params.geometry.voxel_mm
    spacing_mm = settings.get("spacing_mm") or [settings.get(key, voxel_mm) for key in SLICES]
    for appearance in params.appearances:
        if settings.keys() & {"spacing_mm", *SLICES}:
            mm = appearance.spacing.new_tensor(spacing_mm).expand_as(appearance.spacing)
            fwhm_mm = settings.get("slice_fwhm_mm")
            sigma_mm = PROFILE_SIGMA * mm if fwhm_mm is None else torch.full_like(mm, float(fwhm2sigma(fwhm_mm)))
            appearance.spacing = (mm / voxel_mm).clamp_min(1)
            appearance.sigma = torch.where(mm > voxel_mm, sigma_mm / voxel_mm, 0.0)
        if "gamma" in settings:
            appearance.gamma = torch.full_like(appearance.gamma, float(settings["gamma"]))
    return params


def to_freesurfer_ids(labels: Tensor, protocol: Protocol) -> Tensor:
    """FreeSurfer ids of the labels of a protocol, same shape, int64, without metadata."""
    plain = convert_to_tensor(labels, dtype=torch.long, track_meta=False)
    return torch.as_tensor(protocol.freesurfer_ids, device=plain.device)[plain]


class DegradeScan(Transform):
    """Make a real scan worse in a stated way: the acquisition of the generator, on the scan in place of a painted head.

    The scan is ``image``, (1, H, W, D) in [0, 1], RAS axes, 1 mm. Voxels that were exactly 0 (an extracted brain's
    surroundings) stay so, unless the condition sets ``keep_zeros`` to false. An added field becomes the entry
    ``target_log_bias_field``, added to one that is there.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Degrade the scan by the entries ``settings``, which is removed, and ``seed``."""
        d = dict(data)
        if not (settings := d.pop("settings")):
            return d
        laws = make_laws(UNCHANGED, {key: value for key, value in settings.items() if key != "contrast"})
        image: MetaTensor = d["image"]
        values = image.as_tensor()[None].float()
        nonzero = values > 0
        if "contrast" in settings:  # the one that real scans have is the inverted one
            values = torch.where(nonzero, values.amax() - values, 0.0)
        synthesizer = Synthesizer(laws, TaskLayout(["segmentation"]), values.shape[2:])  # nothing is painted
        drawn = synthesizer.draw({}, [int(d["seed"])], device=values.device)
        scan, field, _ = acquire(values * INTENSITY_TOP, fix_acquisition(drawn, settings).appearances[0])
        scan = normalise_percentiles(scan * nonzero if settings.get("keep_zeros", True) else scan)[0]
        d["image"] = MetaTensor(scan).copy_meta_from(image)
        if "bias_log_std" in settings:
            key, grid = f"{TARGET}log_bias_field", (image.shape[1:], np.asarray(image.affine))
            own = resample(d[key], *grid).as_tensor() if key in d else 0
            d[key] = MetaTensor(field[0] + own, affine=image.affine)
        return d


@dataclass(eq=False)
class GenerateScan(Transform):
    """Turn a prepared subject into a generated scan under a condition, and its truth; noise depends on the device."""

    ranges: SynthesisRanges  # laws of what the conditions do not set
    layout: TaskLayout  # tasks whose truth is wanted
    spatial_size: Sequence[int]  # voxels of a scan (H, W, D)
    stride: int = 1  # voxels of the subjects in a voxel of a scan
    source_mm: float = 1.0  # voxel of the subjects
    device: str | torch.device = "cpu"

    @torch.no_grad()
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the subject's volumes and ``settings`` by ``image``, (1, H, W, D) in [0, 1], and ``target_<task>``.

        Targets have the units of the files and FreeSurfer ids; ``target_visible`` marks the field of view. The grid has
        RAS axes, and its centre is the origin.
        """
        d = {key: value for key, value in data.items() if key not in SUBJECT_KEYS}
        settings = d.pop("settings")
        present = [key for key in SUBJECT_KEYS if key in data]
        subject = {key: convert_to_tensor(data[key], device=self.device, track_meta=False)[None] for key in present}
        laws, voxel_mm = make_laws(self.ranges, settings), self.stride * self.source_mm
        synthesizer = Synthesizer(laws, self.layout, self.spatial_size, voxel_mm, self.source_mm)
        drawn = synthesizer.draw(subject, [int(d["seed"])], d.get("generation_protocol"))
        made = render(subject, fix_acquisition(drawn, settings), self.layout)
        affine = torch.diag(torch.tensor([voxel_mm] * 3 + [1.0], dtype=torch.float64))
        affine[:3, 3] = affine[:3, :3] @ (1 - torch.tensor(self.spatial_size, dtype=torch.float64)) / 2
        made["segmentation"] = to_freesurfer_ids(made["segmentation"], self.layout.protocol)
        for name, value in made.items():
            scale = TASKS[name].scale if name in TASKS else 1
            if value.ndim == 5:
                in_file = value[0] if scale == 1 else value[0] * scale
                d["image" if name == "image" else TARGET + name] = MetaTensor(in_file, affine=affine)
        d["image"].meta["scan_name"] = str(d["name"])
        return d
