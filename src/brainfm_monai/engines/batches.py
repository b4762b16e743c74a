"""A batch of subjects becomes images and targets on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.utils import convert_to_tensor
from torch import Tensor

from brainfm_monai.engines.draws import hash_key
from brainfm_monai.synthesis import FLAGS, LARGEST_SEED, SUBJECT_KEYS, Synthesizer

__all__ = ["SynthesisPrepareBatch"]


class SynthesisPrepareBatch(PrepareBatch):
    """Turns a batch of cached subjects into generated scans and their targets, on the engine's device.

    The seed of a subject is its entry ``seed``, which :class:`~brainfm_monai.engines.DrawnSubjects` adds. Without the entry the
    seed is a hash of the subject's name.

    Args:
        synthesizer: makes scans and targets.
        fixed: take the hash of the name in any case: every pass draws the same sample of a subject.
    """

    def __init__(self, synthesizer: Synthesizer, fixed: bool = False) -> None:
        self.synthesizer, self.fixed = synthesizer, fixed

    def seeds(self, batch: Mapping[str, Any]) -> list[int]:
        """One seed for each subject of a batch."""
        if "seed" in batch and not self.fixed:
            return [int(seed) for seed in batch["seed"]]
        return [hash_key(str(name)) % LARGEST_SEED for name in batch["subject"]]

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images, (B S, 1, H, W, D) in [0, 1], and the dictionary of targets for the loss.

        Raises:
            ValueError: if the subjects' generation labels follow different protocols; ``accumulation`` parts of one subject each
                may.
        """
        subject = {
            key: convert_to_tensor(batchdata[key], track_meta=False).to(device=device, non_blocking=non_blocking)
            for key in SUBJECT_KEYS
            if key in batchdata
        }
        # Flags decide what is drawn, and numbers are drawn on the host: flags stay there.
        subject |= {key: torch.as_tensor(value).cpu() for key, value in batchdata.items() if key.startswith(FLAGS)}
        protocols = sorted(set(batchdata.get("generation_protocol", [])))
        if len(protocols) > 1:
            raise ValueError(f"SynthesisPrepareBatch: a batch needs one 'generation_protocol', got {protocols}")
        targets = self.synthesizer(subject, self.seeds(batchdata), *protocols)
        image = targets.pop("image")
        return image, {key: value.to(image.device, non_blocking=True) for key, value in targets.items()}
