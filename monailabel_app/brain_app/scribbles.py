"""Scribbles: MONAI Label's graph cut, set for scans of any contrast and geometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    LoadImaged,
    ScaleIntensityRangePercentilesd,
)
from monailabel.scribbles.infer import GMMBasedGraphCut, HistogramBasedGraphCut
from monailabel.scribbles.transforms import (
    AddBackgroundScribblesFromROId,
    ApplyGraphCutOptimisationd,
    MakeISegUnaryd,
)
from monailabel.transform.post import BoundingBoxd, Restored

from brainfm_monai.transforms import ScanSpacingd

__all__ = ["GaussianMixtureScribbles", "HistogramScribbles"]

PIXDIM_MM = 2.0  # a head of 128^3 voxels is cut in seconds
PERCENTILES = (0.5, 99.5)  # of a scan, which become 0 and 1: magnetic resonance has no units
LAMBDA, SIGMA = 5.0, 0.1  # weight of the smoothness and width of its intensities, on the scale of [0, 1]


class _AnyContrast:
    """Transforms of the scan and of the scribbles: scaled by percentiles, brought back with the affine."""

    scribbles_bg_label: int
    scribbles_fg_label: int
    lamda: float
    sigma: float

    def pre_transforms(self, data: Any = None) -> list[Callable[..., Any]]:
        """Scan and scribbles on a grid of 2 mm."""
        keys = ["image", "label"]
        self._spacing = ScanSpacingd(keys=keys, pixdim=[PIXDIM_MM] * 3, mode=["bilinear", "nearest"])
        low, high = PERCENTILES
        return [
            LoadImaged(keys=keys),
            EnsureChannelFirstd(keys=keys),
            EnsureTyped(keys=keys),
            AddBackgroundScribblesFromROId(
                "label", "roi", "meta_dict", self.scribbles_bg_label, self.scribbles_fg_label
            ),
            self._spacing,
            ScaleIntensityRangePercentilesd("image", lower=low, upper=high, b_min=0.0, b_max=1.0, clip=True),
        ]

    def post_transforms(self, data: Any = None) -> list[Callable[..., Any]]:
        """Graph cut, and the way back to the scan's grid."""
        labels = {"scribbles_bg_label": self.scribbles_bg_label, "scribbles_fg_label": self.scribbles_fg_label}
        return [
            MakeISegUnaryd(image="image", logits="prob", scribbles="label", unary="unary", **labels),
            ApplyGraphCutOptimisationd(
                unary="unary", pairwise="image", post_proc_label="pred", lamda=self.lamda, sigma=self.sigma
            ),
            EnsureTyped("pred"),
            Invertd("pred", Compose([self._spacing]), "image", nearest_interp=True),
            Restored("pred", ref_image="image"),
            BoundingBoxd("pred", result="result", bbox="bbox"),
        ]


class HistogramScribbles(_AnyContrast, HistogramBasedGraphCut):
    """Likelihood by histograms of the scribbles."""

    def __init__(self) -> None:
        super().__init__(
            description="Histogram of the scribbles and graph cut, any contrast", lamda=LAMBDA, sigma=SIGMA
        )


class GaussianMixtureScribbles(_AnyContrast, GMMBasedGraphCut):
    """Likelihood by Gaussian mixtures of the scribbles."""

    def __init__(self) -> None:
        super().__init__(
            description="Gaussian mixture of the scribbles and graph cut, any contrast", lamda=LAMBDA, sigma=SIGMA
        )
