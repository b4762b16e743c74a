"""Contrasts of a subject that has no scans: painted on its labels from the package's tables, without noise."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import suppress

import numpy as np
from nibabel.affines import voxel_sizes

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.datalist import split_names
from brainfm_monai.synthesis.acquisition import INTENSITY_TOP
from brainfm_monai.synthesis.contrasts import CONTRASTS, read_contrasts

__all__ = ["choose_contrasts", "find_paintable", "read_means", "simulate_contrasts"]

AIR_HU = -1000.0
# Labels end in steps of a voxel, where a scan's profile blends the tissues of a voxel. A Gaussian of this width, chosen, has a
# full width at half maximum of 1.2 mm, about a voxel: it takes the steps away and leaves sulci and thin bone.
SMOOTHING_MM = 0.5


def choose_contrasts(names: Sequence[str] | str) -> list[str]:
    """Names of contrasts in the order of the package, each once.

    Args:
        names: out of T1w, T2w, FLAIR and CT; in a text, commas separate them.

    Raises:
        ValueError: if there is no such contrast.
    """
    asked = split_names(names)
    unknown = [name for name in asked if name not in CONTRASTS]
    if unknown:
        raise ValueError(f"prepare: 'contrasts' must be out of {', '.join(CONTRASTS)}, got {', '.join(unknown)}")
    return [name for name in CONTRASTS if name in asked]


def read_means(labels: np.ndarray, protocol: Protocol, names: Sequence[str], source: str) -> dict[str, np.ndarray]:
    """The intensity of every label in some contrasts.

    Magnetic resonance is divided by the top of the tables' scale, which is how the generator joins painted and real images. The
    quantile by which real scans are scaled would put white matter at 1 in T1w, and not at 0.3 to 0.7, where it was measured in
    four real heads: the labels do not tell fat, the brightest there, from other soft tissue. Partial-volume codes get the
    weighted means of their parts, and the background is air: 0, or -1000 HU.

    Args:
        labels: labels of ``protocol`` that will be painted, any shape.
        protocol: of the generation labels, L of them.
        names: out of T1w, T2w, FLAIR and CT.
        source: name for messages.

    Returns:
        By contrast, float32 of shape (L,): HU for CT, [0, 1] for the others.

    Raises:
        ValueError: if a table does not know an id that the labels hold, or that a mixture among them is made of.
    """
    painted = (protocol.mixture_weights[np.unique(labels)] > 0).any(axis=0)
    means = {}
    for name, mean in zip(names, read_contrasts(names, protocol)[0].numpy(), strict=True):
        unknown = protocol.freesurfer_ids[painted & np.isnan(mean)].tolist()
        if unknown:
            raise ValueError(
                f"{source}: the table of {name} must know every id that is painted, found no {unknown[:10]}"
            )
        air, top = (AIR_HU, 1.0) if name == "CT" else (0.0, INTENSITY_TOP)
        pure = np.where(protocol.freesurfer_ids == 0, air, np.nan_to_num(mean)) / top
        means[name] = (protocol.mixture_weights @ pure).astype(np.float32)
    return means


def find_paintable(labels: np.ndarray, protocol: str, has: Container[str]) -> list[str]:
    """The contrasts that a subject lacks and whose tables know all of its labels."""
    names = []
    for name in CONTRASTS:
        with suppress(ValueError):
            if name not in has and read_means(labels, Protocol.load(protocol), [name], ""):
                names.append(name)
    return names


def simulate_contrasts(
    labels: np.ndarray, affine: np.ndarray, protocol: Protocol, names: Sequence[str], source: str
) -> dict[str, np.ndarray]:
    """Paint contrasts on the generation labels of a subject: the mean of each label, see :func:`read_means`, a little smoothed.

    Args:
        labels: labels of ``protocol``, shape (H, W, D).
        affine: voxels to mm.
        protocol: of the generation labels.
        names: out of T1w, T2w, FLAIR and CT.
        source: name for messages.

    Returns:
        By name, float32 of shape (H, W, D): HU for CT, [0, 1] for the others.

    Raises:
        ValueError: see :func:`read_means`.
    """
    from scipy import ndimage  # an optional dependency

    sigma_vox = SMOOTHING_MM / voxel_sizes(affine)
    means = read_means(labels, protocol, names, source)
    return {name: ndimage.gaussian_filter(mean[labels], sigma_vox, mode="nearest") for name, mean in means.items()}
