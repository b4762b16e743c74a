"""Networks: one backbone, one 1x1x1 convolution for all tasks, one tensor out."""

from brainfm_monai.networks.library import LIBRARY, library_backbone
from brainfm_monai.networks.multitask import FeatureMap, MultiTaskNet, trainable_parameters
from brainfm_monai.networks.quality import QUALITY_SCORES, QualityNet, score_segmentation
from brainfm_monai.networks.residual import AdditiveUNet, TwoScaleUNet
from brainfm_monai.networks.slabs import has_slabs, slab_features
from brainfm_monai.networks.unet import ResidualUNet, UNet

__all__ = [
    "LIBRARY",
    "QUALITY_SCORES",
    "AdditiveUNet",
    "FeatureMap",
    "MultiTaskNet",
    "QualityNet",
    "ResidualUNet",
    "TwoScaleUNet",
    "UNet",
    "has_slabs",
    "library_backbone",
    "score_segmentation",
    "slab_features",
    "trainable_parameters",
]
