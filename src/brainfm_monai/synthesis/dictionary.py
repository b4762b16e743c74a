"""MONAI dictionary transforms of the generator, for one subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_tensor

from brainfm_monai.synthesis.synthesizer import LARGEST_SEED, SUBJECT_KEYS, Synthesizer
from brainfm_monai.tasks import TASKS

__all__ = ["FillMissingd", "RandSynthesized"]


class RandSynthesized(Randomizable, MapTransform):
    """Turns one subject into a generated scan and its targets; see :class:`Synthesizer` and :func:`render`.

    It gives the numbers that ``brainfm_monai.engines.SynthesisPrepareBatch`` gives for the same seed.

    Args:
        synthesizer: makes scan and targets.
        keys: of the subject, volumes of shape (C, H, W, D) and numbers; absent ones are left out.
    """

    def __init__(self, synthesizer: Synthesizer, keys: KeysCollection = SUBJECT_KEYS) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.synthesizer = synthesizer
        self.sample_seed = 0

    def randomize(self, data: Any | None = None) -> None:
        """Draw the seed of the sample, which is the only number drawn from ``self.R``."""
        self.sample_seed = int(self.R.randint(0, LARGEST_SEED))

    def __call__(self, data: Mapping[Any, Any], randomize: bool = True) -> dict[Any, Any]:
        """Return the data without the subject, with ``image`` and every target; several samples stand on the first axis."""
        if randomize:
            self.randomize()
        kept = {key: value for key, value in data.items() if key not in self.keys}
        subject = {
            str(key): convert_to_tensor(data[key], track_meta=False)[None] for key in self.key_iterator(dict(data))
        }
        available = {
            key: torch.as_tensor(value).reshape(1) for key, value in kept.items() if str(key).startswith("available_")
        }
        subject |= {str(key): value for key, value in available.items()}
        out = self.synthesizer(subject, [self.sample_seed], kept.get("generation_protocol"))
        one = len(self.synthesizer.ranges) == 1
        return {**kept, **{name: value[0] if one else value for name, value in out.items()}}


class FillMissingd(MapTransform):
    """Adds zeros for what a subject lacks, and says so, so that subjects with different targets fit in one batch.

    Args:
        keys: volumes, and scalars such as ``age``, that every item shall have; ``available_<key>`` becomes 1 or 0.
        reference: key of a volume (C, H, W, D) of the same grid, which every item has.
        channels: of each key, or of all.
        dtype: of the zeros.
    """

    def __init__(
        self,
        keys: KeysCollection,
        reference: str = "generation_labels",
        channels: Sequence[int] | int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.reference, self.dtype = reference, dtype
        self.channels = [channels] * len(self.keys) if isinstance(channels, int) else list(channels)
        if len(self.channels) != len(self.keys):
            raise ValueError(f"FillMissingd: 'channels' must be one number or {len(self.keys)}, got {self.channels}")

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the data with every key and its availability."""
        filled = dict(data)
        for key, channels in zip(self.keys, self.channels, strict=True):
            filled[f"available_{key}"] = torch.tensor(float(key in data))
            scalar = key in TASKS and TASKS[key].kind == "scalar"
            if scalar:  # a batch is made of tensors or of numbers, not of both
                filled[key] = torch.as_tensor(data.get(key, 0.0), dtype=self.dtype)
            elif key not in data:
                filled[key] = torch.zeros(channels, *data[self.reference].shape[1:], dtype=self.dtype)
        return filled
