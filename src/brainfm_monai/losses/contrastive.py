"""Agreement of the features of several scans of one head."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

__all__ = ["compute_info_nce"]

TEMPERATURE = 0.1  # the best of SimCLR's for vectors of length 1 (Chen et al., ICML 2020, table 5)
LATTICE = 8  # points along each axis: 512 places to distinguish, whatever the size of the volume


def compute_info_nce(
    embedding: Tensor, mask: Tensor, samples: int, temperature: float = TEMPERATURE, lattice: int = LATTICE
) -> Tensor:
    """InfoNCE between the scans of one subject, which share their geometry: the same voxel in another scan is found again.

    Of each pair of scans, a voxel's embedding in the one is compared with those of all places of a fixed lattice in the other;
    the right one is that of the same place. Embeddings are divided by their length first.

    Args:
        embedding: shape (B S, C, H, W, D), the S samples of a subject one after the other.
        mask: places that count, shape (B S, 1, H, W, D); a place counts where it does in all samples of the subject.
        samples: S, at least 2.
        temperature: the similarities, in [-1, 1], are divided by it.
        lattice: places along each axis, at most.

    Returns:
        Loss per sample, shape (B S,): cross entropy, the mean over the other samples of its subject. It is 0 for all where fewer
        than two samples are given.

    Reference:
        van den Oord et al., arXiv 1807.03748 (InfoNCE); Chen et al., SimCLR, ICML 2020 (length 1, temperature).
    """
    steps = [max(1, size // lattice) for size in embedding.shape[2:]]
    places = tuple(slice(step // 2, step // 2 + step * (lattice - 1) + 1, step) for step in steps)
    vectors = nnf.normalize(embedding[:, :, *places].float().flatten(2), dim=1).unflatten(0, (-1, samples))
    counted = mask[:, :, *places].bool().flatten(1).unflatten(0, (-1, samples)).all(1)  # (B, P)
    with torch.autocast(
        embedding.device.type, enabled=False
    ):  # eight bits of a product would be seen at this temperature
        similarity = torch.einsum("bscp,btcq->bstpq", vectors, vectors) / temperature
    similarity = similarity.masked_fill(~counted[:, None, None, None], torch.finfo(torch.float32).min / 2)
    correct = similarity.log_softmax(-1).diagonal(dim1=-2, dim2=-1)  # (B, S, S, P)
    others = ~torch.eye(samples, dtype=torch.bool, device=embedding.device)[None, :, :, None]
    total = torch.where(counted[:, None, None] & others, -correct, 0.0).sum((2, 3))
    return (total / (counted.sum(1) * (samples - 1)).clamp_min(1)[:, None]).flatten()
