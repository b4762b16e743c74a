"""Generation labels of subjects with a scan: anatomy, partial volume at the cortical surfaces, classes outside the brain."""

from __future__ import annotations

import numpy as np

from brainfm_monai.anatomy import Protocol

__all__ = ["PROTOCOL", "make_generation_labels"]

PROTOCOL, HEAD_PROTOCOL = "brainfm_generation", "synthseg_generation"
FIRST_HEAD_ID = 500
WHITE, GREY = (2, 41), (3, 42)
FLUID_OR_NOTHING = (0, 24)
WHITE_TO_GREY, GREY_TO_FLUID, STEPS = 150, 200, 50  # first codes of the two ramps, and steps of 2 %
FIRST_CLUSTER = 251
HYPOINTENSITIES, HYPOINTENSITY_CODE = (77, 78, 79), 77
TRANSITION_MM = 1.0  # a voxel: the ramp of a boundary that runs through its centre


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
        raise ValueError(
            f"generation labels: FreeSurfer ids below 100 are needed, found {np.unique(ids[brain_ids >= 100])[:10]}"
        )
    labels = Protocol.load(PROTOCOL).encode(brain_ids, "generation labels")
    if clusters is not None:
        outside = (labels == 0) & (clusters > 0)
        labels[outside] = clusters[outside] + FIRST_CLUSTER - 1
    if distance is None:
        return labels, PROTOCOL
    pial, white = distance[..., [0, 2]].min(axis=-1), distance[..., [1, 3]].min(axis=-1)
    share_grey, share_fluid = (np.clip(d / TRANSITION_MM + 0.5, 0, 1) for d in (white, pial))
    cerebrum = np.isin(ids, WHITE + GREY)
    at_white = cerebrum & (share_grey > 0) & (share_grey < 1)
    at_pial = (
        np.isin(ids, GREY + FLUID_OR_NOTHING) & (share_fluid > 0) & (share_fluid < 1) & (white > TRANSITION_MM / 2)
    )
    labels[at_white] = WHITE_TO_GREY + np.rint(share_grey[at_white] * STEPS)
    labels[at_pial] = GREY_TO_FLUID + np.rint(share_fluid[at_pial] * STEPS)
    return labels, PROTOCOL
