"""The way of a scan through a network: crop, encode, find the brain, encode a box around the brain, decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor

from brainfm_monai.inferers.coordinates import centre_box, edge_ramp, smooth_coordinates
from brainfm_monai.inferers.memory import ALIASES, MEMORY_MODES, choose_memory
from brainfm_monai.networks import MultiTaskNet, ResidualUNet, UNet, autocast, encode_by_planes, parse_precision
from brainfm_monai.networks.planes import plane_ranges
from brainfm_monai.tasks import TaskLayout

__all__ = ["TwoStageInferer"]

TRAINING_SIZE_MM = (144.0, 176.0, 144.0)  # field of view of a scan of train.json
MINIMUM_BRAIN_MM3 = 1000.0  # a cubic centimetre; a smaller brain has no position
RAMP_MM = 8.0  # from the faces of the box inwards, in which the second stage gains its weight: no seam in the maps
ROI_SIZE = 160  # voxels: the windows of mode "windows", the size of BrainFM's training
SEARCH_PLANES = 16  # of the backbone's grid, in which the brain is looked for at a time
PLANES = 4  # of the backbone's grid, decoded at a time: 56 channels of 4 planes of 2 mm are interpolated to 0.1 GB
MIRROR_AXIS = 2  # left-right in RAS+ order

Maps = Iterator[tuple[slice, Tensor]]
Planes = Callable[[int, int], Tensor]  # returns the maps of the planes from a to b of the backbone's grid


@dataclass(frozen=True)
class _Encoded:
    """Features of an image, (1, C, h, w, d), and the smoothed MNI coordinates of the second stage, (1, 3, h, w, d), if any."""

    features: Tensor
    coordinates: Tensor | None

    def decode(self, network: MultiTaskNet, first: int, last: int) -> Tensor:
        """Maps of planes of the backbone's grid, (1, layout.channels, last - first, w, d), float32."""
        maps = network.head(self.features[:, :, first:last])
        if self.coordinates is not None:
            maps[:, network.layout.slices["mni"]] = self.coordinates[:, :, first:last]
        return maps


class TwoStageInferer(Inferer):
    """Run a network on the box around the head, and again on a box of fixed size around the brain.

    The maps are decoded from the mean of both stages' features, the MNI coordinates from the second stage alone: they are
    learnt in a field of view of one size, and a neck or a face in the image moves them by several mm. The coordinates are the
    affine map that fits the second stage best plus a Gaussian-smoothed rest. In the air around the head each map has its
    value of :attr:`~brainfm_monai.tasks.TaskLayout.outside_values`. A network that is no
    :class:`~brainfm_monai.networks.MultiTaskNet` is run in one stage.

    Args:
        layout: names of the network's output channels.
        mirror: average with the maps of the left-right mirror image.
        second_look: run the second stage; without segmentation or MNI coordinates in the layout there is one stage.
        memory: ``full``: all channels. ``low``: the segmentation is decided, one channel of labels stands in place of its
            logits, and the U-Nets of published checkpoints are evaluated by chunks of planes. ``windows``: all channels,
            features from overlapping windows, for networks whose features of a whole head do not fit. ``auto``: see
            :func:`~brainfm_monai.inferers.choose_memory`.
        precision: float32, bfloat16 or float16; ``None``: the fastest of the device. The maps are float32 in any case.
        labels: labels that mode ``low`` may choose; ``None``: all.
        threshold: intensity in [0, 1] above which a voxel is head or noise; the box contains all of them.
        margin: voxels by which the box is larger on each side.
        multiple: the box is padded with zeros to a multiple of this size, which the poolings of a network need.
        size_mm: size of the second stage's box; the box is padded with zeros where the image is smaller. Voxels are 1 mm.
        sigma_mm: standard deviation of the Gaussian that smooths the coordinates.

    Raises:
        ValueError: if there is no such memory mode or precision.
    """

    def __init__(
        self,
        layout: TaskLayout,
        mirror: bool = True,
        second_look: bool = True,
        memory: str = "auto",
        precision: str | None = None,
        labels: Sequence[int] | None = None,
        threshold: float = 0.05,
        margin: int = 4,
        multiple: int = 32,
        size_mm: Sequence[float] = TRAINING_SIZE_MM,
        sigma_mm: float = 8.0,
    ) -> None:
        super().__init__()
        self.memory = ALIASES.get(memory, memory)
        if self.memory not in MEMORY_MODES:
            raise ValueError(f"memory: one of {list(MEMORY_MODES)} is needed, found '{memory}'")
        parse_precision(precision, torch.device("cpu"))
        self.layout, self.mirror, self.precision = layout, mirror, precision
        self.second_look = second_look and {"segmentation", "mni"} <= set(layout.tasks)
        every = range(layout.tasks["segmentation"].channels if "segmentation" in layout.tasks else 0)
        self.excluded = [] if labels is None else sorted(set(every) - set(labels))
        self.threshold, self.margin, self.multiple = threshold, margin, multiple
        self.size_mm, self.sigma_mm = tuple(size_mm), sigma_mm

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Maps of images in RAS+ order with voxels of 1 mm.

        Args:
            inputs: shape (B, 1, H, W, D), intensities in [0, 1]; metadata go to the result.
            network: network in evaluation mode.
            args: not used.
            kwargs: not used.

        Returns:
            Float32 of shape (B, layout.channels, H, W, D); in mode ``low`` (B, layout.label_channels, H, W, D).

        Raises:
            ValueError: if mode ``low`` or ``second_look`` is asked of a network that is no ``MultiTaskNet``.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        outputs = [self._infer(sample, network) for sample in image.split(1)]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if not isinstance(inputs, MetaTensor):
            return output
        tensor = MetaTensor(output).copy_meta_from(inputs)
        tensor.is_batch = inputs.is_batch
        return tensor

    def _infer(self, image: Tensor, network: Callable[..., Tensor]) -> Tensor:
        """Crop, predict chunks of planes, and write them into the values of the air around the head."""
        first, last = generate_spatial_bounding_box(
            image[0], lambda x: x > self.threshold, margin=self.margin, allow_smaller=True
        )
        box = tuple(slice(a, b or n) for a, b, n in zip(first, last, image.shape[2:], strict=True))  # none found: all
        head = image[:, :, *box]
        multiple = math.lcm(self.multiple, network.stride if isinstance(network, MultiTaskNet) else 1)
        padding = [extra for size in head.shape[:1:-1] for extra in (0, -size % multiple)]
        memory = choose_memory(head, network) if self.memory == "auto" else self.memory
        output = None
        padded = nnf.pad(head, padding).contiguous()
        for planes, maps in self._predict(padded, network, memory):
            if output is None:
                output = self._air(maps.shape[1], image)
                inside = output[:, :, *box]
            inside[:, :, planes] = maps[:, :, : inside[:, :, planes].shape[2], : head.shape[3], : head.shape[4]]
        assert output is not None
        return output

    def _air(self, channels: int, image: Tensor) -> Tensor:
        """Output of a volume without a head, (1, channels, H, W, D); features, of another number of channels, are 0 there."""
        values = self.layout.outside_values
        if channels != len(values):
            decided = channels == self.layout.label_channels
            values = [0.0, *values[len(values) - channels + 1 :]] if decided else [0.0] * channels
        fill = torch.tensor(values, device=image.device).reshape(1, -1, 1, 1, 1)
        return fill.expand(-1, -1, *image.shape[2:]).clone()

    def _predict(self, image: Tensor, network: Callable[..., Tensor], memory: str) -> Maps:
        """Planes of the output, and the maps there."""
        if isinstance(network, MultiTaskNet):
            encode = self._make_encoder(network.backbone, memory, ROI_SIZE // network.stride)
            grid = network.pool(image)
            yield from self._decode(self._average(grid, network, encode), network, grid.shape[2:], memory == "low")
            return
        name = type(network).__name__
        if self.second_look:
            raise ValueError(f"second_look: a MultiTaskNet is needed, got {name}: set second_look to false")
        if memory == "low":
            raise ValueError(f"memory: mode low needs a MultiTaskNet, got {name}: take full or windows")
        run = self._make_encoder(network, memory, ROI_SIZE)
        maps = run(image).float()
        if self.mirror:
            maps.add_(self.layout.mirror(run(image.flip(MIRROR_AXIS)).float())).mul_(0.5)
        yield slice(0, maps.shape[2]), maps

    def _make_encoder(
        self, network: Callable[[Tensor], Tensor], memory: str, roi_size: int
    ) -> Callable[[Tensor], Tensor]:
        """A backbone, or a whole network, in the precision and the memory mode that are asked for."""

        def encode(image: Tensor) -> Tensor:
            dtype = parse_precision(self.precision, image.device)
            if memory == "low" and isinstance(network, UNet | ResidualUNet):
                return encode_by_planes(network, image.to(dtype))
            with autocast(image.device, dtype):
                return network(image.to(dtype))

        def encode_windows(image: Tensor) -> Tensor:
            windows = SlidingWindowInferer([min(roi_size, n) for n in image.shape[2:]], overlap=0.5, mode="gaussian")
            features = windows(image, lambda window: encode(window).float())
            assert isinstance(features, Tensor)
            return features

        return encode_windows if memory == "windows" else encode

    def _encode(self, image: Tensor, network: MultiTaskNet, encode: Callable[[Tensor], Tensor]) -> _Encoded:
        """Both stages of one image on the backbone's grid, (1, 1, h, w, d)."""
        features, voxel_mm = encode(image), float(network.stride)
        if not self.second_look:
            return _Encoded(features, None)
        size = [round(mm / voxel_mm) for mm in self.size_mm]
        brain = self._find_brain(features, network)
        box = centre_box(brain, size)
        known = torch.zeros_like(brain)
        known[box] = brain[box]
        if float(known.sum()) * voxel_mm**3 < MINIMUM_BRAIN_MM3:
            return _Encoded(features, None)
        part = image[:, :, *box]
        inside = tuple(slice(n) for n in part.shape[2:])
        padding = [extra for n, m in zip(size[::-1], part.shape[:1:-1], strict=True) for extra in (0, n - m)]
        second = encode(nnf.pad(part, padding).contiguous())[:, :, *inside].float()
        features, mni = features.float(), self.layout.slices["mni"]
        coordinates = features.new_zeros(1, mni.stop - mni.start, *features.shape[2:])
        coordinates[:, :, *box] = network.head(second)[:, mni]
        coordinates[0] = smooth_coordinates(coordinates[0], known, self.sigma_mm / voxel_mm, voxel_mm)
        weight = 0.5 * edge_ramp(second.shape[2:], RAMP_MM / voxel_mm).to(second)
        features[:, :, *box] = torch.lerp(features[:, :, *box], second, weight)
        return _Encoded(features, coordinates)

    def _find_brain(self, features: Tensor, network: MultiTaskNet) -> Tensor:
        """Where a label of the brain is the most probable, (h, w, d)."""
        logits = self.layout.slices["segmentation"]
        labels = [network.head(part)[0, logits].argmax(0) for part in features.split(SEARCH_PLANES, dim=2)]
        return torch.as_tensor(self.layout.protocol.is_brain).to(features.device)[torch.cat(labels)]

    def _average(self, image: Tensor, network: MultiTaskNet, encode: Callable[[Tensor], Tensor]) -> Planes:
        """Maps of the planes of the backbone's grid, the mean of those of the image and of the mirror image.

        With a mirror image, the maps of the image take the place of its features, which are larger.
        """
        encoded = self._encode(image, network, encode)
        if not self.mirror:
            return partial(encoded.decode, network)
        size, layout = (1, self.layout.channels, *image.shape[2:]), torch.channels_last_3d
        maps = torch.empty(size, device=image.device, memory_format=layout)
        total = image.shape[2]
        for a, b in plane_ranges(total, 1, PLANES):
            maps[:, :, a:b] = encoded.decode(network, a, b)
        del encoded
        mirrored = self._encode(image.flip(MIRROR_AXIS), network, encode)
        for a, b in plane_ranges(total, 1, PLANES):
            maps[:, :, a:b].add_(self.layout.mirror(mirrored.decode(network, total - b, total - a))).mul_(0.5)
        return lambda a, b: maps[:, :, a:b]

    def _decode(self, read: Planes, network: MultiTaskNet, size: Sequence[int], decide: bool) -> Maps:
        """Interpolation to the image's grid and the choice of a label, a few planes at a time."""
        stride = network.stride
        context = 0 if stride == 1 else 1  # plane on each side that the interpolation reads
        for a, b in plane_ranges(size[0], 1, PLANES):
            first, last = max(a - context, 0), min(b + context, size[0])
            maps = network.upsample(read(first, last), [(last - first) * stride, size[1] * stride, size[2] * stride])
            maps = maps[:, :, (a - first) * stride : (b - first) * stride]
            if decide:
                if self.excluded:
                    maps[:, self.excluded] = -torch.inf
                maps = self.layout.choose_labels(maps)
            yield slice(a * stride, b * stride), maps
