"""What every measure means, for the page: mask, unit and normalisation, in one sentence each."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEFINITIONS", "HEADLINES", "Headline", "define"]

MASK = "within the head: where the reference label map is not 0 (without one, where the scan as it is exceeds 5 % of its range)"
RANGE = "0.1 and 99.9 % of the reference there brought to 0 and 1 (CT: 0 to 80 HU)"
SCALED = "a real T1w, T2w or FLAIR as reference is first scaled as in training: minimum to 0, 99.9 % in its head to 1"
FITTED = " after the gain and offset that fit the prediction best to the reference there"
# metric -> definition; those of images are said once
DEFINITIONS: dict[str, str] = {
    "mean_dice": "Dice averaged over left and right parts of the structures and those without sides; absent ones are left out",
    "mean_dice_merged": "Dice averaged over the structures, left and right taken as one",
    "dice": "2 |A and B| / (|A| + |B|) of predicted and reference voxels; not defined where the reference lacks the structure",
    "hd95": "95th percentile of the distances between both surfaces, the larger of the two directions, mm",
    "volume_error": "(predicted - reference volume) / reference volume, signed",
    "volume": "predicted volume, mL",
    "reference_volume": "volume in the reference, mL",
    "l1": f"mean absolute difference {MASK} and the reference reaches; {RANGE}; {SCALED}",
    "psnr": "10 log10(1 / mean squared difference), same mask and range, dB",
    "ssim": "structural similarity, Gaussian window of 1.5 voxels, same mask and range",
    "ms_ssim": "multi-scale structural similarity, five scales, same mask and range",
    "mae": f"mean absolute difference {MASK}, HU",
    "normalised_l2": f"||w o - t|| / ||t|| of predicted factor o and true factor t, w = <o, t> / <o, o>, {MASK}",
    "corrected_l1": "mean absolute difference of the scan divided by either field, each divided by its mean, same mask",
    "distance_error": f"mean absolute error of the signed distance where the true one is below 3 mm, {MASK}, mm",
    "thickness": "mean over the predicted cortex of the distance to the white plus that to the pial surface, mm",
    "reference_thickness": "the same of the reference, mm",
    "thickness_error": "difference of the two means, signed, mm",
    "thickness_absolute_error": "mean over the voxels of the reference's cortex, mm",
    "error_mean": "distance between predicted and true template coordinates, mean within the evaluated structures, mm",
    "error_p95": "its 95th percentile, mm",
    "fold_fraction": "share of these voxels where the predicted coordinates fold space (Jacobian determinant at most 0)",
    "warped_dice": "Dice of the template's tissues pulled through predicted and through true coordinates",
    "warped_dice_labels": "Dice of the template's tissues pulled through predicted coordinates and those of the reference labels",
    "sensitivity": "share of the reference's lesion voxels that are found",
    "precision": "share of the found lesion voxels that are right",
    "error": "predicted - true age, years",
    "absolute_error": "its magnitude, years",
}


class Headline(NamedTuple):
    """A number at the top of the page, and a row of curves: the mean of a metric over its structures and sides.

    Attributes:
        title: what the page calls it.
        task: of the rows.
        metric: of the rows.
        unit: shown behind values; empty for pure numbers.
        digits: after the point.
        higher_is_better: which way is good.
    """

    title: str
    task: str
    metric: str
    unit: str
    digits: int
    higher_is_better: bool


HEADLINES: tuple[Headline, ...] = (
    Headline("Dice, sides apart", "segmentation", "mean_dice", "", 3, True),
    Headline("Dice, sides merged", "segmentation", "mean_dice_merged", "", 3, True),
    Headline("surface distance of structures (HD95)", "segmentation", "hd95", "mm", 2, False),
    Headline("error of cortical distances", "distance", "distance_error", "mm", 2, False),
    Headline("error of thickness", "distance", "thickness_absolute_error", "mm", 2, False),
    Headline("bias field, normalised L2", "log_bias_field", "normalised_l2", "", 3, False),
    Headline("template coordinates", "mni", "error_mean", "mm", 2, False),
    *(
        Headline(f"{name}: {label}", name, metric, unit, digits, higher)
        for name in ("T1w", "T2w", "FLAIR", "CT")
        for label, metric, unit, digits, higher in (
            ("L1", "l1", "", 3, False),
            ("PSNR", "psnr", "dB", 1, True),
            ("SSIM", "ssim", "", 3, True),
        )
    ),
    Headline("lesions: Dice", "lesion", "dice", "", 3, True),
    Headline("age", "age", "absolute_error", "years", 1, False),
)


def define(metric: str) -> str:
    """Definition of a metric by its name; empty for an unknown one."""
    if metric.endswith("_fitted"):
        return f"{metric.removesuffix('_fitted')}{FITTED}"
    return DEFINITIONS.get(metric, "")
