"""The conditions of an evaluation: what is done to every scan before the network sees it, by name and value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from brainfm_monai.io import read_table
from brainfm_monai.synthesis import SynthesisParams, SynthesisRanges, parse_ranges
from brainfm_monai.synthesis.acquisition import INTENSITY_TOP
from brainfm_monai.synthesis.contrasts import CONTRASTS
from brainfm_monai.synthesis.sampling import PROFILE_SIGMA

__all__ = ["SETTINGS", "Condition", "check_for_real_scans", "fix_acquisition", "make_laws", "parse_conditions"]

AXES = {"sagittal_slices_mm": 0, "coronal_slices_mm": 1, "axial_slices_mm": 2}
_TABLE = read_table(Path(__file__).with_name("settings.tsv"))
SETTINGS = {row["setting"]: row["meaning"] for row in _TABLE}  # what a condition may set
GENERATED_ALONE = [row["setting"] for row in _TABLE if row["scans"] == "generated"]
INVERTED = "inverted"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # it becomes part of file names
STD_OF_FWHM = 1 / math.sqrt(8 * math.log(2))  # of a Gaussian


@dataclass(frozen=True)
class Condition:
    """One thing that is done to every scan.

    Attributes:
        name: of the condition, different from all others.
        settings: names and values out of :data:`SETTINGS`; none leave a scan as it is.
        sweep: name of the curve that it is a point of; empty where it is none.
        value: its place on that curve.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sweep: str = ""
    value: float | str | None = None

    @property
    def axis_label(self) -> str:
        """What the values of its sweep are: the name of the setting that varies."""
        return next((key for key, value in self.settings.items() if value == self.value), self.sweep).replace("_", " ")


def parse_conditions(table: Mapping[str, Mapping[str, Any]]) -> tuple[Condition, ...]:
    """Read the conditions of a bundle config.

    Args:
        table: for each name its settings. A setting ``{"sweep": [v1, v2, ...]}`` means one condition for each value,
            ``<name>-<value>``, which together make a curve.

    Returns:
        The conditions, in the table's order.

    Raises:
        ValueError: if there is none, a name, a setting or a value is not one, or two settings of a condition are swept.
    """
    conditions: list[Condition] = []
    for name, settings in table.items():
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown or not re.fullmatch(NAME, name):
            found = f"the setting {', '.join(unknown)}" if unknown else "this name"
            raise ValueError(
                f"condition {name}: letters and digits name it, and {', '.join(SETTINGS)} set it; found {found}"
            )
        swept = [key for key, value in settings.items() if isinstance(value, Mapping) and "sweep" in value]
        if len(swept) > 1:
            raise ValueError(f"condition {name}: one setting may be swept, found {', '.join(swept)}")
        for value in settings[swept[0]]["sweep"] if swept else [None]:
            fixed = {**settings, swept[0]: value} if swept else dict(settings)
            _check(name, fixed)
            conditions.append(Condition(f"{name}-{value}" if swept else name, fixed, name if swept else "", value))
    names = [condition.name for condition in conditions]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        raise ValueError(f"conditions: different ones are needed, found {f'twice: {repeated}' if repeated else 'none'}")
    return tuple(conditions)


def _check(name: str, settings: Mapping[str, Any]) -> None:
    contrasts = (*CONTRASTS, "random", INVERTED)
    if settings.get("contrast", INVERTED) not in contrasts:
        raise ValueError(
            f"condition {name}: 'contrast' must be one of {', '.join(contrasts)}, got {settings['contrast']}"
        )
    spacing = settings.get("spacing_mm")
    slices = [settings[key] for key in AXES if key in settings]
    if spacing is not None and slices:
        raise ValueError(f"condition {name}: either 'spacing_mm' or slices are set, found both")
    lengths = [*slices, *(spacing or ()), settings.get("slice_fwhm_mm", 1)]
    if any(not isinstance(mm, int | float) or mm <= 0 for mm in lengths) or len(spacing or AXES) != len(AXES):
        raise ValueError(
            f"condition {name}: slices, their profile and the three spacings must be positive numbers of mm, got {lengths}"
        )
    make_laws(SynthesisRanges(), settings)


def check_for_real_scans(conditions: Sequence[Condition]) -> None:
    """Refuse what can be done to generated scans alone.

    Raises:
        ValueError: if a condition needs the anatomy behind a scan.
    """
    for condition in conditions:
        impossible = [key for key in GENERATED_ALONE if key in condition.settings]
        if condition.settings.get("contrast", INVERTED) != INVERTED:
            impossible.append(f"contrast {condition.settings['contrast']}")
        if impossible:
            raise ValueError(
                f"condition {condition.name}: for generated scans alone, found {', '.join(impossible)} on real ones"
            )


def make_laws(base: SynthesisRanges, settings: Mapping[str, Any]) -> SynthesisRanges:
    """The laws of the generator under a condition.

    Args:
        base: laws of what the condition does not set.
        settings: of a :class:`Condition`. The same seed draws the same of everything that the settings leave alone, so that
            conditions compare the same heads.

    Raises:
        ValueError: if a value does not fit its law.
    """
    changes: dict[str, Any] = dict(settings.get("ranges", {}))
    if "noise_percent" in settings:
        noise = tuple(value / 100 * INTENSITY_TOP for value in _pair(settings["noise_percent"]))
        changes |= {"noise_std": noise, "real_noise_std": noise}
    for key in ("bias_log_std", "bias_spacing_mm", "rotation_deg", "translation_mm"):
        if key in settings:
            changes[key] = _pair(settings[key])
    contrast = settings.get("contrast")
    if contrast == "random":
        changes |= {"contrast_prior_prob": 0.0}
    elif contrast == INVERTED:
        changes |= {"contrast_prior_prob": 1.0, "contrast_inversion_prob": 1.0}
    elif contrast is not None:
        changes |= {"contrast_prior_prob": 1.0, "contrast_inversion_prob": 0.0, "contrast_priors": (contrast,)}
    return parse_ranges({**asdict(base), **changes})


def _pair(value: Any) -> tuple[float, float]:
    low, high = value if isinstance(value, list | tuple) else (value, value)
    return float(low), float(high)


def fix_acquisition(params: SynthesisParams, settings: Mapping[str, Any]) -> SynthesisParams:
    """Put the slices and the gamma of a condition in place of the drawn ones.

    Args:
        params: a draw.
        settings: of a :class:`Condition`; a slice has a Gaussian profile, and is as thick as the distance to the next.
    """
    voxel_mm = params.geometry.voxel_mm
    spacing_mm = list(settings.get("spacing_mm", [voxel_mm] * len(AXES)))
    for key, axis in AXES.items():
        spacing_mm[axis] = settings.get(key, spacing_mm[axis])
    appearances = []
    for appearance in params.appearances:
        changes = {}
        if "spacing_mm" in settings or any(key in settings for key in AXES):
            mm = appearance.spacing.new_tensor(spacing_mm).expand_as(appearance.spacing)
            fwhm_mm = settings.get("slice_fwhm_mm")
            sigma_mm = PROFILE_SIGMA * mm if fwhm_mm is None else torch.full_like(mm, STD_OF_FWHM * fwhm_mm)
            sigma = torch.where(mm > voxel_mm, sigma_mm / voxel_mm, 0.0)
            changes = {"spacing": (mm / voxel_mm).clamp_min(1), "sigma": sigma}
        if "gamma" in settings:
            changes["gamma"] = torch.full_like(appearance.gamma, float(settings["gamma"]))
        appearances.append(replace(appearance, **changes))
    return replace(params, appearances=tuple(appearances))
