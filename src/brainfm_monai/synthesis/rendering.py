"""Rendering: images and targets out of a draw, pure and of fixed shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from brainfm_monai.functional import intensity, separable, spatial
from brainfm_monai.synthesis.ranges import SynthesisParams
from brainfm_monai.tasks import TASKS, TaskLayout

__all__ = ["render"]

VELOCITY_STEP = 4  # output voxels per voxel of the grid on which the velocity is integrated


def render(subject: Mapping[str, Tensor], params: SynthesisParams, layout: TaskLayout) -> dict[str, Tensor]:
    """Make images and targets of a batch: pure, of fixed shape, batch element by batch element the same as alone.

    Args:
        subject: ``generation_labels`` and ``segmentation``, (B, 1, h, w, d) integer; ``distance`` (mm) and ``mni`` (mm) where
            there are any, on the same grid or on a coarser one that covers the same box.
        params: the draw.
        layout: the tasks whose targets are wanted.

    Returns:
        ``image`` in [0, 1] and one entry for every task with a target, in the unit of the task table, all of the drawn
        spatial size; ``segmentation`` is a label map (B, 1, H, W, D), int64. ``visible`` marks the field of view.
    """
    labels = subject["generation_labels"]
    coordinates = _deform(params, labels.shape[2:])
    painted = nnf.avg_pool3d(intensity.paint_labels(labels, params.mean, params.std, params.paint_noise), params.stride)
    image = spatial.warp(painted, _coarser(coordinates, labels, painted))
    image, log_bias_field = _acquire(image, params)
    visible, stays = _visible(params, spatial.gather_nearest(labels, coordinates).long())
    image = intensity.normalise_percentiles(image * (visible & stays))
    segmentation = spatial.gather_nearest(subject["segmentation"], coordinates).long() * (visible & stays)
    targets = {"segmentation": _mirror_labels(segmentation, layout, params.mirror), "log_bias_field": log_bias_field}
    shrink = torch.linalg.det(params.matrix).abs().pow(-1 / 3).reshape(-1, 1, 1, 1, 1)
    for name, factor in (("distance", shrink), ("mni", 1 / TASKS["mni"].scale)):
        if name in layout.tasks and name in subject:
            dense = subject[name].to(image.dtype)
            dense = spatial.warp(dense, _coarser(coordinates, labels, dense), padding_mode="border")
            targets[name] = _mirror_channels(dense, name, params.mirror) * factor
    return {"image": image, "visible": visible, **{name: targets[name] for name in layout.tasks if name in targets}}


def _coarser(coordinates: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
    """Coordinates in a map that covers the same box as ``fine`` with fewer, larger voxels."""
    ratio = coordinates.new_tensor([n / m for n, m in zip(fine.shape[2:], coarse.shape[2:], strict=True)]).reshape(1, 3, 1, 1, 1)
    return (coordinates - (ratio - 1) / 2) / ratio


def _deform(params: SynthesisParams, source_size: Sequence[int]) -> Tensor:
    size = params.noise.shape[2:]
    coarse = [max(2, math.ceil(n / VELOCITY_STEP)) for n in size]
    columns = params.velocity.shape[-1]
    operators = [separable.control_point_operator(params.velocity_points[:, i], coarse[i], columns) for i in range(3)]
    step = params.velocity.new_tensor([n / c for n, c in zip(size, coarse, strict=True)]).reshape(1, 3, 1, 1, 1)
    flow = spatial.integrate_velocity(separable.apply_separable(params.velocity, operators) / step) * step
    displacement = nnf.interpolate(flow, size=tuple(size), mode="trilinear", align_corners=False)
    coordinates = spatial.sampling_coordinates(params.matrix, displacement, params.translation, source_size, params.stride)
    return torch.where(params.mirror.reshape(-1, 1, 1, 1, 1), coordinates.flip(2), coordinates)


def _acquire(image: Tensor, params: SynthesisParams) -> tuple[Tensor, Tensor]:
    size, columns = image.shape[2:], params.bias.shape[-1]
    smooth = [separable.control_point_operator(params.bias_points[:, i], size[i], columns) for i in range(3)]
    log_bias_field = separable.apply_separable(params.bias, smooth)
    image = intensity.apply_bias_field(intensity.apply_gamma(image, params.gamma), log_bias_field)
    slices = [separable.slice_operator(params.spacing[:, i], params.sigma[:, i], size[i]) for i in range(3)]
    back = [separable.upsampling_operator(params.spacing[:, i], size[i]) for i in range(3)]
    noisy = intensity.add_noise(separable.apply_separable(image, slices), params.noise, params.noise_std)
    return separable.apply_separable(noisy, back), log_bias_field


def _visible(params: SynthesisParams, labels: Tensor) -> tuple[Tensor, Tensor]:
    grid = spatial.identity_grid(labels.shape[2:], device=labels.device)
    first, last = (params.field_of_view[..., i].reshape(-1, 3, 1, 1, 1) for i in range(2))
    visible = ((grid >= first) & (grid <= last)).all(dim=1, keepdim=True)
    kept = torch.gather(params.kept, 1, labels.flatten(1)).reshape(labels.shape)
    around = nnf.avg_pool3d(kept, 3, stride=1, padding=1, count_include_pad=False)
    return visible, around > params.strip_threshold.reshape(-1, 1, 1, 1, 1)


def _mirror_labels(labels: Tensor, layout: TaskLayout, mirror: Tensor) -> Tensor:
    other = torch.tensor(layout.protocol.mirror_permutation, device=labels.device)[labels]
    return torch.where(mirror.reshape(-1, 1, 1, 1, 1), other, labels)


def _mirror_channels(values: Tensor, name: str, mirror: Tensor) -> Tensor:
    task = TASKS[name]
    sign = values.new_tensor(task.mirror_sign or (1,) * task.channels).reshape(1, -1, 1, 1, 1)
    other = values[:, list(task.mirror_order or range(task.channels))] * sign
    return torch.where(mirror.reshape(-1, 1, 1, 1, 1), other, values)
