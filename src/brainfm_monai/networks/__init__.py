"""Networks: one backbone, one 1x1x1 convolution for all tasks, one tensor out."""

from brainfm_monai.networks.execution import autocast, checkpoint_activations, parse_precision, prepare_network
from brainfm_monai.networks.multitask import ContextHead, FeatureMap, MultiTaskNet, trainable_parameters
from brainfm_monai.networks.planes import encode_by_planes, plane_ranges
from brainfm_monai.networks.residual import AdditiveUNet, TwoScaleUNet
from brainfm_monai.networks.unet import ResidualUNet, UNet

__all__ = [
    "AdditiveUNet", "ContextHead", "FeatureMap", "MultiTaskNet", "ResidualUNet", "TwoScaleUNet", "UNet", "autocast",
    "checkpoint_activations", "encode_by_planes", "parse_precision", "plane_ranges", "prepare_network",
    "trainable_parameters",
]  # fmt: skip
