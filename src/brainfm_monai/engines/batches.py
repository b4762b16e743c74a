"""A batch of subjects becomes images and targets on the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.transforms import Randomizable
from monai.utils import convert_to_tensor
from torch import Tensor

from brainfm_monai.synthesis import LARGEST_SEED, SUBJECT_KEYS, Synthesizer

__all__ = ["SynthesisPrepareBatch"]


class SynthesisPrepareBatch(PrepareBatch, Randomizable):
    """Turns a batch of cached subjects into generated scans and their targets, on the engine's device.

    The seed of a subject is its entry ``seed``, which :class:`~brainfm_monai.engines.DrawnSubjects` puts there.

    Args:
        synthesizer: makes scans and targets.
        seed: of a stream of seeds for subjects that bring none.
        fixed: draw the same samples again at every pass, for validation: seeds then follow from the subject's name.
    """

    def __init__(self, synthesizer: Synthesizer, seed: int = 0, fixed: bool = False) -> None:
        self.synthesizer, self.seed, self.fixed = synthesizer, seed, fixed
        self.set_random_state(seed)

    def draw_seeds(self, batch: Mapping[str, Any]) -> list[int]:
        """One seed for each subject of a batch."""
        count = len(batch["generation_labels"])
        if self.fixed:
            # MONAI's datalist reader makes a path of a subject's name where such a folder exists: its last part is the name.
            return [self.seed + sum(Path(str(name)).name.encode()) for name in batch.get("subject", range(count))]
        if "seed" in batch:
            return [int(seed) for seed in batch["seed"]]
        return [int(s) for s in self.R.randint(0, LARGEST_SEED, size=count)]

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
        present = [key for key in SUBJECT_KEYS if key in batchdata]
        subject = {
            key: convert_to_tensor(batchdata[key], track_meta=False).to(device=device, non_blocking=non_blocking)
            for key in present
        }
        # What is available decides what is drawn, and numbers are drawn on the host: these few stay there.
        subject |= {
            key: torch.as_tensor(value).cpu() for key, value in batchdata.items() if key.startswith("available_")
        }
        protocols = sorted(set(batchdata.get("generation_protocol", [])))
        if len(protocols) > 1:
            raise ValueError(f"SynthesisPrepareBatch: a batch needs one 'generation_protocol', got {protocols}")
        targets = self.synthesizer(subject, self.draw_seeds(batchdata), *protocols)
        image = targets.pop("image")
        return image, {key: value.to(image.device, non_blocking=True) for key, value in targets.items()}
