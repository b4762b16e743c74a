"""What the generator paints: generation labels of a subject with a scan, and the contrasts painted on labels without one."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import suppress

import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.subjects import split_names
from brainfm_monai.synthesis.acquisition import INTENSITY_TOP
from brainfm_monai.synthesis.contrasts import CONTRASTS, read_contrasts

__all__ = ["choose_contrasts", "find_paintable", "make_generation_labels", "read_means", "simulate_contrasts"]

PROTOCOL, HEAD_PROTOCOL = "brainfm_generation", "synthseg_generation"
FIRST_HEAD_ID = 500
WHITE, GREY, FLUID_OR_NOTHING = (2, 41), (3, 42), (0, 24)
WHITE_TO_GREY, GREY_TO_FLUID, STEPS = 150, 200, 50  # first codes of the two ramps, and steps of 2 %
FIRST_CLUSTER = 251
HYPOINTENSITIES, HYPOINTENSITY_CODE = (77, 78, 79), 77
TRANSITION_MM = 1.0  # a voxel: the ramp of a boundary that runs through its centre
AIR_HU = -1000.0
# Labels end in steps of a voxel, where a scan's profile blends the tissues of a voxel. A Gaussian of this width, chosen, has a
# full width at half maximum of 1.2 mm, about a voxel: it takes the steps away and leaves sulci and thin bone.
SMOOTHING_MM = 0.5


def make_generation_labels(
    ids: np.ndarray, distance: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> tuple[np.ndarray, str]:
    """Labels for the generator, and the name of their protocol.

    A map that labels the head outside the brain follows ``synthseg_generation``. Any other one follows ``brainfm_generation``.

    Where a surface passes through a voxel of white matter and cortex, or of cortex and fluid, the label is the code of their
    mixture: the share goes from 0 to 1 over one millimetre of signed distance, centred on the surface.

    Args:
        ids: map of FreeSurfer ids, shape (H, W, D), parcels folded.
        distance: distances in mm to left pial, left white, right pial and right white surfaces, shape (H, W, D, 4);
            without it no voxel is mixed.
        clusters: classes 1 to 5 of the head outside the brain, 0 elsewhere, shape (H, W, D).

    Returns:
        Labels, shape (H, W, D), uint8, and ``"synthseg_generation"`` or ``"brainfm_generation"``.

    Raises:
        ValueError: if an id is not in the protocol.
    """
    if (ids >= FIRST_HEAD_ID).any():
        return Protocol.load(HEAD_PROTOCOL).encode(ids, "generation labels"), HEAD_PROTOCOL
    brain_ids = np.where(np.isin(ids, HYPOINTENSITIES), HYPOINTENSITY_CODE, ids)
    if brain_ids.max() >= 100:  # from there on the codes are mixtures, and no ids of structures
        too_large = np.unique(ids[brain_ids >= 100])[:10]
        raise ValueError(f"generation labels: FreeSurfer ids below 100 are needed, found {too_large}")
    labels = Protocol.load(PROTOCOL).encode(brain_ids, "generation labels")
    if clusters is not None:
        outside = (labels == 0) & (clusters > 0)
        labels[outside] = clusters[outside] + FIRST_CLUSTER - 1
    if distance is None:
        return labels, PROTOCOL
    pial, white = distance[..., [0, 2]].min(axis=-1), distance[..., [1, 3]].min(axis=-1)
    share_grey, share_fluid = (np.clip(d / TRANSITION_MM + 0.5, 0, 1) for d in (white, pial))
    at_white = np.isin(ids, WHITE + GREY) & (share_grey > 0) & (share_grey < 1)
    at_pial = np.isin(ids, GREY + FLUID_OR_NOTHING) & (share_fluid > 0) & (share_fluid < 1)
    at_pial &= white > TRANSITION_MM / 2
    labels[at_white] = WHITE_TO_GREY + np.rint(share_grey[at_white] * STEPS)
    labels[at_pial] = GREY_TO_FLUID + np.rint(share_fluid[at_pial] * STEPS)
    return labels, PROTOCOL


def choose_contrasts(names: Sequence[str] | str) -> list[str]:
    """Names of contrasts in the order of the package, each once; in a text, commas separate them.

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
            needed = f"{source}: the table of {name} must know every id that is painted"
            raise ValueError(f"{needed}, found no {unknown[:10]}")
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
    """
    sigma_vox = SMOOTHING_MM / voxel_sizes(affine)
    means = read_means(labels, protocol, names, source)
    return {name: ndimage.gaussian_filter(mean[labels], sigma_vox, mode="nearest") for name, mean in means.items()}
