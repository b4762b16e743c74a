"""Grids, affine matrices, flows, warping and lesions, in voxel coordinates: channel i lies along axis i."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

LESION_EDGE = 0.2  # width of a lesion's soft edge before it is carried, in stds of the noise
SLAB = 2**17  # voxels that are sampled at once on a CPU: corners and weights of a slab stay in its cache


def identity_grid(size: Sequence[int], *, device: torch.device | None = None) -> Tensor:
    """Voxel coordinates of a grid of size (H, W, D), (1, 3, H, W, D), in float32."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def affine_matrix(rotation_deg: Tensor, shear: Tensor, scaling: Tensor) -> Tensor:
    """Linear part of an affine map, (B, 3, 3): A = diag(s) SHx SHy SHz Rx Ry Rz (as in BrainFM).

    Rotations about H, W, D and scalings are (B, 3). Shears are (B, 3, 2): SHi adds those of the other axes to row i.
    """
    angle = rotation_deg * (math.pi / 180.0)
    matrix = torch.diag_embed(scaling)
    eye = torch.eye(3, device=scaling.device, dtype=scaling.dtype)
    unit = torch.eye(9, device=scaling.device, dtype=scaling.dtype).reshape(9, 3, 3)
    for i in range(3):
        j, k = (n for n in range(3) if n != i)
        first, second = shear[:, i, :, None, None].unbind(1)
        matrix = matrix @ (eye + first * unit[3 * i + j] + second * unit[3 * i + k])
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        cos, sin = angle[:, i].cos()[:, None, None], angle[:, i].sin()[:, None, None]
        matrix = matrix @ (unit[4 * i] + cos * (unit[4 * j] + unit[4 * k]) + sin * (unit[3 * k + j] - unit[3 * j + k]))
    return matrix


def sampling_coordinates(
    matrix: Tensor, translation: Tensor, points: Tensor, size: Sequence[int], source_size: Sequence[int], stride: int
) -> Tensor:
    """Where in the source points of the output look, (B, 3, H, W, D), in source voxels: A s (p - c_out) + c_source + t.

    A are matrices (B, 3, 3), t translations (B, 3) in source voxels, p points (B, 3, H, W, D) in output voxels; s is
    the stride, c the centres of output and source.
    """
    moved = torch.stack([points[:, i] - (n - 1) / 2 for i, n in enumerate(size)], 1) * stride
    turned = torch.bmm(matrix, moved.flatten(2)) + translation[:, :, None]
    return torch.stack([turned[:, i] + (n - 1) / 2 for i, n in enumerate(source_size)], 1).reshape(points.shape)


def warp(source: Tensor, coordinates: Tensor, *, padding_mode: str = "zeros") -> Tensor:
    """Linear samples (B, C, H, W, D) of a floating source (B, C, h, w, d) at coordinates (B, 3, H, W, D) in its voxels.

    This is the one place where (H, W, D) order turns into grid_sample's xyz. Other coordinates are a ValueError.
    """
    if coordinates.shape[1] != 3:
        raise ValueError(f"warp: 'coordinates' must have shape (B, 3, H, W, D), got {tuple(coordinates.shape)}")
    scaled = [coordinates[:, i].to(source.dtype) * (2 / max(n - 1, 1)) - 1 for i, n in enumerate(source.shape[2:])]
    grid = torch.stack(scaled[::-1], dim=1).movedim(1, -1)  # written in long runs, several times faster
    return nnf.grid_sample(source, grid, padding_mode=padding_mode, align_corners=True)


def warp_all(sources: Sequence[Tensor], coordinates: Tensor, *, padding_mode: str = "border") -> list[Tensor]:
    """Linear sampling of several sources (B, C_i, h, w, d), float32, of one grid, else a ValueError; see :func:`warp`.

    ``grid_sample`` goes voxel by voxel and channel by channel on a CPU. There the eight corners and their weights are
    made once for a slab of voxels, and each source is a weighted sum of rows of a table: several times faster.
    """
    if len({source.shape[2:] for source in sources}) > 1:
        raise ValueError(f"warp_all: 'sources' must lie on one grid, got {[tuple(s.shape) for s in sources]}")
    if coordinates.device.type != "cpu":
        return [warp(source, coordinates, padding_mode=padding_mode) for source in sources]
    size, voxels = sources[0].shape[2:], coordinates[0, 0].numel()
    warped = [source.new_empty(len(coordinates), voxels, source.shape[1]) for source in sources]
    index = torch.empty(min(SLAB, voxels), 8, dtype=torch.int32)
    weight = torch.empty(min(SLAB, voxels), 8)
    for b, points in enumerate(coordinates.flatten(2)):
        tables = [_tables(source[b]) for source in sources]
        for start in range(0, voxels, SLAB):
            stop = min(start + SLAB, voxels)
            i, w = index[: stop - start], weight[: stop - start]
            _fill_corners(points[:, start:stop], size, padding_mode, i, w)
            for out, parts in zip(warped, tables, strict=True):
                rows = [nnf.embedding_bag(i, part, per_sample_weights=w, mode="sum") for part in parts]
                out[b, start:stop] = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return [out.movedim(-1, 1).contiguous().unflatten(2, coordinates.shape[2:]) for out in warped]


def _tables(source: Tensor) -> list[Tensor]:
    """A source (C, h, w, d) as tables with a row for each voxel, without a copy: one of C columns, or C of one."""
    last = source.movedim(0, -1)
    channels = [last] if last.is_contiguous() else list(source)
    # Twice: a single column gets the stride of 1 that the kernel wants.
    return [channel.reshape(-1).reshape(-1, len(source) // len(channels)) for channel in channels]


def _fill_corners(points: Tensor, size: Sequence[int], padding_mode: str, index: Tensor, weight: Tensor) -> None:
    """Write flat index and weight of the eight voxels around points (3, N) into two tensors of shape (N, 8)."""
    places, shares = [], []
    for position, n, stride in zip(points, size, (size[1] * size[2], size[2], 1), strict=True):
        below = position.floor()
        after, first = position - below, below.int()
        pair, weights = (first, first + 1), (1 - after, after)
        if padding_mode == "zeros":
            weights = tuple(w * ((i >= 0) & (i < n)) for i, w in zip(pair, weights, strict=True))
        places.append([i.clamp(0, n - 1) * stride for i in pair])
        shares.append(weights)
    (x, y, z), (u, v, w) = places, shares
    row = torch.stack([a + b for a in x for b in y], 1)
    product = torch.stack([a * b for a in u for b in v], 1)
    for half in range(2):
        torch.add(row, z[half][:, None], out=index[:, 4 * half : 4 * half + 4])
        torch.mul(product, w[half][:, None], out=weight[:, 4 * half : 4 * half + 4])


def gather_nearest(source: Tensor, coordinates: Tensor) -> Tensor:
    """Nearest voxels of a source (B, C, h, w, d) of any type at coordinates (B, 3, H, W, D); 0 outside."""
    h, w, d = source.shape[2:]
    x, y, z = coordinates.round().long().unbind(1)
    inside = (x >= 0) & (x < h) & (y >= 0) & (y < w) & (z >= 0) & (z < d)
    index = (x.clamp(0, h - 1) * w + y.clamp(0, w - 1)) * d + z.clamp(0, d - 1)
    values = torch.gather(source.flatten(2), 2, index.flatten(1)[:, None].expand(-1, source.shape[1], -1))
    return values.reshape(*source.shape[:2], *index.shape[1:]) * inside[:, None]


def average_neighbours(volume: Tensor) -> Tensor:
    """Mean over the 3 x 3 x 3 voxels around each voxel of a floating volume (B, C, H, W, D), borders repeated."""
    # Sums of shifted views: several times faster on a CPU than a pooling or a convolution of that size.
    padded = nnf.pad(volume, [1] * 6, mode="replicate")
    for dim in (2, 3, 4):
        inner = volume.shape[dim]
        padded = padded.narrow(dim, 0, inner) + padded.narrow(dim, 1, inner) + padded.narrow(dim, 2, inner)
    return padded / 27


def integrate_velocity(velocity: Tensor, steps: int = 6) -> Tensor:
    """Displacement (B, 3, H, W, D) of a velocity at time 1, voxels, by squarings (Arsigny et al., MICCAI 2006)."""
    grid = identity_grid(velocity.shape[2:], device=velocity.device)
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = displacement + warp(displacement, grid + displacement, padding_mode="border")
    return displacement


def jacobian_determinant(coordinates: Tensor) -> Tensor:
    """Determinant (B, 1, H, W, D) of the derivative of voxel coordinates (B, 3, H, W, D), by central differences."""
    over_h, over_w, over_d = torch.gradient(coordinates, dim=(2, 3, 4))
    (a, b, c), (d, e, f), (g, h, i) = (over.split(1, dim=1) for over in (over_h, over_w, over_d))
    return a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)


def compute_curl(potential: Tensor) -> Tensor:
    """Curl of a vector potential (B, 3, H, W, D) by central differences: a velocity without divergence, per voxel."""
    over_h, over_w, over_d = torch.gradient(potential, dim=(2, 3, 4))
    return torch.stack([over_w[:, 2] - over_d[:, 1], over_d[:, 0] - over_h[:, 2], over_h[:, 1] - over_w[:, 0]], 1)


def make_lesions(field: Tensor, region: Tensor, share: Tensor) -> Tensor:
    """Lesions with soft edges where a smooth field (B, 1, H, W, D) is highest, in [0, 1]; a lesion exceeds one half.

    They cover a share (B,) of a region, a mask of the field's shape. (Liu et al., PEPSI, MICCAI 2024.)
    """
    limits = torch.finfo(field.dtype)
    values = torch.where(region, field, limits.min).flatten(1).sort(dim=1, descending=True).values
    count = (share * region.flatten(1).sum(1)).round().long().clamp_max(values.shape[1] - 1)[:, None]
    level = torch.where(count > 0, values.gather(1, (count - 1).clamp_min(0)), limits.max)
    edge = LESION_EDGE * field.flatten(1).std(dim=1).clamp_min(limits.tiny)
    level, edge = (value.reshape(-1, 1, 1, 1, 1) for value in (level, edge))
    return ((field - level) / edge + 0.5).clamp(0, 1) * region


def carry(soft: Tensor, velocity: Tensor, distance: Tensor) -> Tensor:
    """Carry a map (B, C, H, W, D) along a velocity (B, 3, H, W, D), whose root mean square becomes ``distance`` (B,).

    PEPSI (above) advects by an ODE solver; the exponential of a velocity without divergence is such a flow too.
    """
    size = velocity.square().sum(1).flatten(1).mean(1).sqrt().clamp_min(torch.finfo(velocity.dtype).tiny)
    flow = integrate_velocity(velocity * (distance / size).reshape(-1, 1, 1, 1, 1))
    return warp(soft, identity_grid(soft.shape[2:], device=soft.device) + flow)
