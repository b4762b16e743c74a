import dataclasses

import torch

from brainfm_monai.engines import SynthesisPrepareBatch
from brainfm_monai.synthesis import SynthesisRanges, Synthesizer
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "log_bias_field"])
RANGES = SynthesisRanges(translation_mm=(0, 0), field_of_view_prob=0)  # so that the small box stays in view


def make_batch(*names: str) -> dict[str, object]:
    labels = torch.zeros(len(names), 1, 16, 16, 16, dtype=torch.uint8)
    labels[:, :, 4:12, 4:12, 4:12] = 5
    return {"subject": list(names), "generation_labels": labels, "segmentation": labels}


def test_seeds_make_the_stream_and_ranks_differ() -> None:
    def images(seed: int) -> list[torch.Tensor]:
        prepare = SynthesisPrepareBatch(Synthesizer(RANGES, LAYOUT, (16, 16, 16)), seed=seed)
        return [prepare(make_batch("a"), "cpu")[0] for _ in range(2)]

    first, again, other = images(0), images(0), images(1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_validation_draws_the_same_sample_for_a_subject_whatever_its_company() -> None:
    prepare = SynthesisPrepareBatch(Synthesizer(RANGES, LAYOUT, (16, 16, 16)), fixed=True)
    alone, _ = prepare(make_batch("b"), "cpu")
    pair, targets = prepare(make_batch("a", "b"), "cpu")
    torch.testing.assert_close(pair[1:], alone, atol=1e-4, rtol=1e-4)
    assert not torch.equal(pair[0], pair[1])
    assert set(targets) == {"segmentation", "log_bias_field", "visible"}
    assert pair.shape == (2, 1, 16, 16, 16)


def test_stride_sets_the_voxel_of_the_scan() -> None:
    still = dataclasses.replace(RANGES, rotation_deg=(0, 0), shear=(0, 0), scaling=(1, 1), velocity_std_mm=(0, 0))
    still = dataclasses.replace(still, mirror_prob=0, skull_strip_prob=0, head_removal_prob=0)
    prepare = SynthesisPrepareBatch(Synthesizer(still, LAYOUT, (8, 8, 8), stride=2))
    _, targets = prepare(make_batch("a"), "cpu")
    assert int((targets["segmentation"] > 0).sum()) == 4**3
