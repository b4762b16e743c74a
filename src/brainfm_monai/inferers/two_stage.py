"""The way of a scan through a network: crop, encode, find the brain, encode a box around the brain, decode."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from monai.networks.layers import GaussianFilter
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor

from brainfm_monai.inferers.execution import MEMORY_MODES, choose_memory
from brainfm_monai.networks import MultiTaskNet, UNet, autocast, encode_by_planes, parse_precision, plane_ranges
from brainfm_monai.tasks import TaskLayout

HEAD = 0.05  # intensity in [0, 1] above which a voxel is head or noise
TRAINING_SIZE_MM = (144.0, 176.0, 144.0)  # field of view of a scan of train.json
MINIMUM_BRAIN_MM3 = 1000.0  # a cubic centimetre; a smaller brain has no position
RAMP_MM = 8.0  # from the faces of the box inwards, in which the second stage gains its weight: no seam in the maps
STEP_MM = 4.0  # from point to point of the grid on which coordinates are smoothed
MINIMUM_WEIGHT = 1e-6  # of the brain around a point, below which the rest is taken as 0
ROI_SIZE = 160  # voxels: the windows of mode "windows", the size of BrainFM's training
SEARCH_PLANES = 16  # of the backbone's grid, in which the brain is looked for at a time
PLANES = 4  # of the backbone's grid, decoded at a time: 56 channels of 4 planes of 2 mm are interpolated to 0.1 GB
MIRROR_AXIS = 2  # left-right in RAS+ order

WHOLE = (slice(None), slice(None))  # all samples and channels

Box = tuple[slice, ...]
Maps = Iterator[tuple[slice, Tensor]]  # planes of the output, and the maps there
Planes = Callable[[int, int], Tensor]  # returns the maps of the planes from a to b of the backbone's grid


class TwoStageInferer(Inferer):
    """Run a network on the box around the head, and again on a box of fixed size around the brain.

    The maps are decoded from the mean of both stages' features, the MNI coordinates from the second stage alone: they
    are learnt in a field of view of one size, and a neck or a face in the image moves them by several mm. The
    coordinates are the affine map that fits the second stage best plus a Gaussian-smoothed rest. In the air around the
    head each map has its value of :attr:`~brainfm_monai.tasks.TaskLayout.outside_values`. A network that is no
    :class:`~brainfm_monai.networks.MultiTaskNet` is run in one stage.

    Args:
        layout: names of the network's output channels.
        mirror: average with the maps of the left-right mirror image.
        second_look: run the second stage; without segmentation or MNI coordinates in the layout there is one stage.
        memory: ``full``: all channels. ``low``: the segmentation is decided, one channel of labels stands in place of
            its logits, and the U-Nets of published checkpoints are evaluated by chunks of planes. ``windows``: all
            channels, features from overlapping windows, for networks whose features of a whole head do not fit.
            ``auto``: see :func:`~brainfm_monai.inferers.choose_memory`.
        precision: float32, bfloat16 or float16; ``None``: the fastest of the device. The maps are float32 in any case.
        labels: labels that mode ``low`` may choose; ``None``: all.
        threshold, margin: the first box contains what is brighter, and so many voxels more on each side.
        multiple: the box is padded with zeros to a multiple of this size, which the poolings of a network need.
        size_mm: size of the second stage's box, which is padded with zeros where the image is smaller.
        sigma_mm: standard deviation of the Gaussian that smooths the coordinates.
        context: apply the network's :class:`~brainfm_monai.networks.ContextHead`, if it has one.

    ValueError if there is no such memory mode or precision.
    """

    def __init__(
        self, layout: TaskLayout, mirror: bool = True, second_look: bool = True, memory: str = "auto",
        precision: str | None = None, labels: Sequence[int] | None = None, threshold: float = HEAD, margin: int = 4,
        multiple: int = 32, size_mm: Sequence[float] = TRAINING_SIZE_MM, sigma_mm: float = 8.0, context: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if memory not in MEMORY_MODES:
            raise ValueError(f"memory: one of {list(MEMORY_MODES)} is needed, found '{memory}'")
        parse_precision(precision, torch.device("cpu"))
        self.layout, self.mirror, self.memory, self.precision = layout, mirror, memory, precision
        self.second_look = second_look and {"segmentation", "mni"} <= set(layout.tasks)
        every = range(layout.tasks["segmentation"].channels if "segmentation" in layout.tasks else 0)
        self.excluded = [] if labels is None else sorted(set(every) - set(labels))
        self.threshold, self.margin, self.multiple = threshold, margin, multiple
        self.size_mm, self.sigma_mm, self.context = tuple(size_mm), sigma_mm, context

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images (B, 1, H, W, D) in RAS+ order, voxels of 1 mm, values in [0, 1], to (B, layout.channels, H, W, D).

        In mode ``low`` the channels are ``layout.label_channels``. Maps are float32, metadata are kept. ValueError if
        mode ``low`` or ``second_look`` is asked of a network that is no ``MultiTaskNet``.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        outputs = [self._infer(sample, network) for sample in image.split(1)]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if isinstance(inputs, MetaTensor):
            output = MetaTensor(output).copy_meta_from(inputs)
            output.is_batch = inputs.is_batch
        return output

    def _infer(self, image: Tensor, network: Callable[..., Tensor]) -> Tensor:
        """Crop, predict chunks of planes, and write them into the values of the air around the head."""
        box = head_box(image, self.threshold, self.margin)
        head = image[(*WHOLE, *box)]
        multiple = math.lcm(self.multiple, network.stride if isinstance(network, MultiTaskNet) else 1)
        memory = choose_memory(head, network) if self.memory == "auto" else self.memory
        output = None
        for planes, maps in self._predict(pad_to_multiple(head, multiple), network, memory):
            if output is None:
                output = self._air(maps.shape[1], image)
                inside = output[(*WHOLE, *box)]
            inside[:, :, planes] = maps[:, :, : inside[:, :, planes].shape[2], : head.shape[3], : head.shape[4]]
        assert output is not None
        return output

    def _air(self, channels: int, image: Tensor) -> Tensor:
        """Output of a volume without a head, (1, channels, H, W, D); features, of another number of channels, are 0."""
        values = self.layout.outside_values
        if channels != len(values):
            decided = channels == self.layout.label_channels
            values = [0.0, *values[len(values) - channels + 1 :]] if decided else [0.0] * channels
        return _fill(values, image)

    def _predict(self, image: Tensor, network: Callable[..., Tensor], memory: str) -> Maps:
        if isinstance(network, MultiTaskNet):
            encode = partial(self._encode, network.backbone, memory, ROI_SIZE // network.stride)
            read = self._average(network.pool(image), network, encode)
            yield from self._decode(read, network, image.shape[2:], memory == "low")
            return
        name = type(network).__name__
        if self.second_look:
            raise ValueError(f"second_look: a MultiTaskNet is needed, got {name}: set second_look to false")
        if memory == "low":
            raise ValueError(f"memory: mode low needs a MultiTaskNet, got {name}: take full or windows")
        run = partial(self._encode, network, memory, ROI_SIZE)
        maps = run(image).float()
        if self.mirror:
            maps.add_(self.layout.mirror(run(image.flip(MIRROR_AXIS)).float())).mul_(0.5)
        yield slice(0, maps.shape[2]), maps

    def _encode(self, network: Callable[..., Tensor], memory: str, roi_size: int, image: Tensor) -> Tensor:
        """What a backbone, or a whole network, makes of an image in the precision and the memory mode asked for."""
        if memory == "windows":
            windows = SlidingWindowInferer([min(roi_size, n) for n in image.shape[2:]], overlap=0.5, mode="gaussian")
            features = windows(image, lambda window: self._encode(network, "full", roi_size, window).float())
            assert isinstance(features, Tensor)
            return features
        dtype = parse_precision(self.precision, image.device)
        if memory == "low" and isinstance(network, UNet):
            return encode_by_planes(network, image.to(dtype))
        with autocast(image.device, dtype):
            return network(image.to(dtype))

    def _average(self, image: Tensor, network: MultiTaskNet, encode: Callable[[Tensor], Tensor]) -> Planes:
        """Maps on the backbone's grid, the mean of those of the image and of the mirror image.

        With a mirror image, the maps of the image take the place of its features, which are larger.
        """
        decode = self._look(image, network, encode)
        if not self.mirror:
            return decode
        size, total = (1, self.layout.channels, *image.shape[2:]), image.shape[2]
        maps = torch.empty(size, device=image.device, memory_format=torch.channels_last_3d)
        for a, b in plane_ranges(total, 1, PLANES):
            maps[:, :, a:b] = decode(a, b)
        del decode  # and the features
        decode = self._look(image.flip(MIRROR_AXIS), network, encode)
        for a, b in plane_ranges(total, 1, PLANES):
            maps[:, :, a:b].add_(self.layout.mirror(decode(total - b, total - a))).mul_(0.5)
        return lambda a, b: maps[:, :, a:b]

    def _look(self, image: Tensor, network: MultiTaskNet, encode: Callable[[Tensor], Tensor]) -> Planes:
        """Both stages of an image on the backbone's grid (1, 1, h, w, d): decodes planes (1, channels, b - a, w, d)."""
        features, coordinates, box = self._look_twice(encode(image), image, network, encode)
        context, added = network.context, torch.empty(0)
        if context is not None:  # in the box around the brain, of the size of its training; around it there is nothing
            added = _fill(self.layout.outside_values[network.head.out_channels :], features)
            if self.context:
                with autocast(image.device, parse_precision(self.precision, image.device)):
                    added[box] = context(features[box], image[box])

        def decode(a: int, b: int) -> Tensor:
            maps = network.head(features[:, :, a:b])
            if coordinates is not None:
                maps[:, network.layout.slices["mni"]] = coordinates[:, :, a:b]
            return maps if context is None else torch.cat([maps, added[:, :, a:b]], dim=1)

        return decode

    def _look_twice(
        self, features: Tensor, image: Tensor, network: MultiTaskNet, encode: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None, Box]:
        """The mean of both stages' features, and the coordinates and the box of the second, if there is one."""
        if not self.second_look:
            return features, None, WHOLE
        voxel_mm = float(network.stride)
        size = [round(mm / voxel_mm) for mm in self.size_mm]
        logits, mni = (self.layout.slices[name] for name in ("segmentation", "mni"))
        labels = [network.head(part)[0, logits].argmax(0) for part in features.split(SEARCH_PLANES, dim=2)]
        brain = torch.as_tensor(self.layout.protocol.is_brain).to(features.device)[torch.cat(labels)]
        box = (*WHOLE, *centre_box(brain, size))
        inside = torch.zeros_like(brain)
        inside[box[2:]] = brain[box[2:]]
        if float(inside.sum()) * voxel_mm**3 < MINIMUM_BRAIN_MM3:
            return features, None, WHOLE
        part = image[box]
        padding = [extra for n, m in zip(size[::-1], part.shape[:1:-1], strict=True) for extra in (0, n - m)]
        second = encode(nnf.pad(part, padding).contiguous())[(*WHOLE, *map(slice, part.shape[2:]))].float()
        features = features.float()
        coordinates = features.new_zeros(1, mni.stop - mni.start, *features.shape[2:])
        coordinates[box] = network.head(second)[:, mni]
        coordinates[0] = smooth_coordinates(coordinates[0], inside, self.sigma_mm / voxel_mm, voxel_mm)
        weight = 0.5 * edge_ramp(second.shape[2:], RAMP_MM / voxel_mm).to(second)
        features[box] = torch.lerp(features[box], second, weight)
        return features, coordinates, box

    def _decode(self, read: Planes, network: MultiTaskNet, shape: Sequence[int], decide: bool) -> Maps:
        """Interpolation to the image's grid and the choice of a label, a few planes at a time."""
        stride = network.stride
        height, *size = (n // stride for n in shape)
        context = 0 if stride == 1 else 1  # plane on each side that the interpolation reads
        for a, b in plane_ranges(height, 1, PLANES):
            first, last = max(a - context, 0), min(b + context, height)
            maps = network.upsample(read(first, last), [n * stride for n in (last - first, *size)])
            maps = maps[:, :, (a - first) * stride : (b - first) * stride]
            if decide:
                if self.excluded:
                    maps[:, self.excluded] = -torch.inf
                maps = self.layout.choose_labels(maps)
            yield slice(a * stride, b * stride), maps


def _fill(values: Sequence[float], like: Tensor) -> Tensor:
    """A volume (1, channels, H, W, D) of one value in each channel."""
    fill = torch.tensor(values, device=like.device).reshape(1, -1, 1, 1, 1)
    return fill.expand(-1, -1, *like.shape[2:]).clone()


def head_box(image: Tensor, threshold: float = HEAD, margin: int = 0) -> tuple[slice, ...]:
    """Box around the head in an image, (1, 1, H, W, D); without a head the whole volume."""
    first, last = generate_spatial_bounding_box(image[0], lambda x: x > threshold, margin=margin, allow_smaller=True)
    return tuple(slice(a, b or None) for a, b in zip(first, last, strict=True))


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Zeros behind a volume, (B, C, H, W, D), up to a multiple of its sides."""
    return nnf.pad(image, [extra for size in image.shape[:1:-1] for extra in (0, -size % multiple)]).contiguous()


def centre_box(mask: Tensor, size: Sequence[int]) -> tuple[slice, ...]:
    """Box of a given size in a volume, around the middle of a mask (H, W, D), or of the volume if the mask is empty."""
    sides = []
    for a, b, length, total in zip(*generate_spatial_bounding_box(mask[None]), size, mask.shape, strict=True):
        twice_middle = a + b if b else total  # without a mask the ends are 0
        first = min(max((twice_middle - length) // 2, 0), max(total - length, 0))
        sides.append(slice(first, min(first + length, total)))
    return tuple(sides)


def edge_ramp(size: Sequence[int], width: float) -> Tensor:
    """Weight that rises from near 0 at the faces of a box to 1 within ``width`` voxels, shape ``size``."""
    weight = torch.ones(())
    for n in size:
        centres = torch.arange(n) + 0.5
        weight = weight[..., None] * (torch.minimum(centres, n - centres) / width).clamp_max(1)
    return weight


def smooth_coordinates(coordinates: Tensor, mask: Tensor, sigma_vox: float, voxel_mm: float) -> Tensor:
    """The affine map that fits MNI coordinates (3, H, W, D) best, plus the rest smoothed over a mask (H, W, D)."""
    step = max(round(STEP_MM / voxel_mm), 1)
    axes = (torch.arange(n, device=mask.device) for n in mask.shape)
    index = torch.stack(torch.meshgrid(*axes, indexing="ij")).float()
    points = torch.cat([index, torch.ones_like(index[:1])])
    # The host's solver takes coordinates that do not span space (an untrained network's), a GPU's does not.
    matrix, target = (x[:, mask].T.double().cpu() for x in (points, coordinates))
    fit = torch.linalg.lstsq(matrix, target).solution.T.to(points)
    affine = torch.einsum("ij,jhwd->ihwd", fit, points)
    weighted = torch.cat([(coordinates - affine) * mask, mask[None].float()])[None]
    coarse = GaussianFilter(3, sigma_vox / step)(nnf.avg_pool3d(pad_to_multiple(weighted, step), step))
    values = coarse[:, :3] / coarse[:, 3:].clamp_min(MINIMUM_WEIGHT)
    rest = nnf.interpolate(values, scale_factor=step, mode="trilinear", align_corners=False)[0]
    return affine + rest[(slice(None), *map(slice, mask.shape))]
