import dataclasses
import re
from pathlib import Path

import pytest
import torch

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional import separable, spatial
from brainfm_monai.synthesis import SynthesisParams, SynthesisRanges, render, sample
from brainfm_monai.tasks import TASKS, TaskLayout

SIZE = (24, 28, 20)
GENERATION = Protocol.load("synthseg_generation")
LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])
LEFT_CORTEX, RIGHT_CORTEX = LAYOUT.protocol.label_of_id[3], LAYOUT.protocol.label_of_id[42]
# A draw of these does nothing: the sample is the subject itself.
STILL = SynthesisRanges(
    rotation_deg=(0, 0),
    shear=(0, 0),
    scaling=(1, 1),
    translation_mm=(0, 0),
    velocity_std_mm=(0, 0),
    mirror_prob=0,
    gamma_log_std=0,
    bias_log_std=(0, 0),
    isotropic_prob=1,
    noise_std=(0, 0),
    skull_strip_prob=0,
    field_of_view_prob=0,
    std=(0, 0),
    dark_background_prob=1,
)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(
    ranges: SynthesisRanges, *seeds: int, stride: int = 1, spatial_size: tuple[int, int, int] | None = None
) -> SynthesisParams:
    size = spatial_size or tuple(n // stride for n in SIZE)
    return sample(ranges, generators(*seeds), source_size=SIZE, spatial_size=size, protocol=GENERATION, stride=stride)


def make_subject(batch: int = 1) -> dict[str, torch.Tensor]:
    """An asymmetric head: skin around, left cortex a box, right cortex a smaller and lower one; world coordinates as MNI."""
    ids = torch.zeros(SIZE, dtype=torch.long)
    ids[2:22, 3:25, 2:18] = 511
    ids[4:11, 6:22, 4:16] = 3
    ids[13:19, 6:15, 4:9] = 42
    labels, segmentation = (torch.as_tensor(p.encode(ids.numpy()))[None, None] for p in (GENERATION, LAYOUT.protocol))
    world = spatial.identity_grid(SIZE) - torch.tensor([11.5, 13.5, 9.5]).reshape(1, 3, 1, 1, 1)
    distance = torch.cat([world[:, :1] + 4, world[:, :1] + 3, 4 - world[:, :1], 5 - world[:, :1]], dim=1).clamp(-6.4, 6.35)
    subject = {"generation_labels": labels, "segmentation": segmentation, "distance": distance, "mni": world}
    return {name: value.expand(batch, *value.shape[1:]) for name, value in subject.items()}


def test_a_draw_of_nothing_gives_the_subject_itself() -> None:
    subject = make_subject()
    out = render(subject, draw(STILL, 3), LAYOUT)
    assert torch.equal(out["segmentation"], subject["segmentation"].long())
    torch.testing.assert_close(out["distance"], subject["distance"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out["mni"] * 100, subject["mni"], atol=1e-3, rtol=0)
    assert float(out["log_bias_field"].abs().max()) == 0
    # Painted without spread: one intensity for each label, and nothing else.
    for label in subject["generation_labels"].unique():
        assert float(out["image"][subject["generation_labels"] == label].std()) < 1e-4


def test_the_same_seed_gives_the_same_sample_in_any_batch() -> None:
    ranges = SynthesisRanges(contrast_prior_prob=0.5, field_of_view_prob=0.5)
    batch = render(make_subject(3), draw(ranges, 5, 6, 7), LAYOUT)
    for place, seed in enumerate((5, 6, 7)):
        alone = render(make_subject(), draw(ranges, seed), LAYOUT)
        for name, value in alone.items():
            torch.testing.assert_close(batch[name][place : place + 1], value, atol=1e-4, rtol=1e-4)
    assert float((batch["image"][0] - batch["image"][1]).abs().mean()) > 0.01


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    render(make_subject(), draw(SynthesisRanges(), 1), LAYOUT)
    assert torch.equal(torch.get_rng_state(), before)


def test_mirror_moves_everything_to_the_other_side_by_the_tables() -> None:
    subject = make_subject()
    plain, mirrored = (render(subject, draw(dataclasses.replace(STILL, mirror_prob=p), 0), LAYOUT) for p in (0, 1))
    assert torch.equal(mirrored["image"], plain["image"].flip(2))
    left = plain["segmentation"] == LEFT_CORTEX
    assert int(left.sum()) > 0
    assert torch.equal(mirrored["segmentation"].flip(2) == RIGHT_CORTEX, left)
    torch.testing.assert_close(mirrored["distance"], plain["distance"].flip(2)[:, [2, 3, 0, 1]])
    torch.testing.assert_close(mirrored["mni"][:, 0], -plain["mni"].flip(2)[:, 0])
    torch.testing.assert_close(mirrored["mni"][:, 1:], plain["mni"].flip(2)[:, 1:])


def test_image_and_every_target_move_together() -> None:
    ranges = dataclasses.replace(STILL, rotation_deg=(12, 12), translation_mm=(2, 2), velocity_std_mm=(1, 1), scaling=(0.9, 0.9))
    subject = make_subject()
    params = draw(ranges, 4)
    out = render(subject, params, LAYOUT)
    # MNI is the source position here, so it tells where every output voxel comes from.
    source = out["mni"] * 100 + torch.tensor([11.5, 13.5, 9.5]).reshape(1, 3, 1, 1, 1)
    inside = ((source > 1) & (source < torch.tensor(SIZE).reshape(1, 3, 1, 1, 1) - 2)).all(1, keepdim=True)
    expected = spatial.gather_nearest(subject["segmentation"], source).long()
    assert float((out["segmentation"] == expected)[inside].float().mean()) > 0.999
    shrink = float(torch.linalg.det(params.matrix)) ** (-1 / 3)
    assert shrink == pytest.approx(1 / 0.9, rel=1e-4)
    distance = spatial.warp(subject["distance"], source, padding_mode="border") * shrink
    torch.testing.assert_close(out["distance"] * inside, distance * inside, atol=1e-3, rtol=0)
    painted = spatial.gather_nearest(subject["generation_labels"], source)
    core = inside & (torch.nn.functional.max_pool3d((painted != GENERATION.label_of_id[3]).float(), 5, 1, 2) == 0)
    assert int(core.sum()) > 50
    assert float(out["image"][core].std()) < 1e-3


def test_coarser_targets_and_stride_two_keep_world_positions() -> None:
    subject = make_subject()
    half = {**subject, "mni": torch.nn.functional.avg_pool3d(subject["mni"], 2)}
    fine = render(subject, draw(STILL, 0, stride=2), LAYOUT)
    coarse = render(half, draw(STILL, 0, stride=2), LAYOUT)
    assert fine["image"].shape[2:] == (12, 14, 10)
    torch.testing.assert_close(fine["mni"] * 100, half["mni"], atol=1e-3, rtol=0)
    torch.testing.assert_close(coarse["mni"], fine["mni"], atol=1e-5, rtol=0)


def test_millimetres_stay_millimetres_on_a_coarser_source() -> None:
    ranges = dataclasses.replace(
        SynthesisRanges(), velocity_std_mm=(4, 4), translation_mm=(6, 6), isotropic_prob=0, clinical_spacing_mm=(8, 8)
    )
    draws = [
        sample(ranges, generators(*range(40)), source_size=SIZE, spatial_size=SIZE, protocol=GENERATION, source_mm=mm)
        for mm in (1.0, 2.0)
    ]
    torch.testing.assert_close(draws[1].translation * 2, draws[0].translation)
    torch.testing.assert_close(draws[1].velocity * 2, draws[0].velocity)
    clinical = draws[0].spacing == 8
    assert int(clinical.sum()) > 3
    assert torch.equal(draws[1].spacing[clinical], torch.full((int(clinical.sum()),), 4.0))
    torch.testing.assert_close(draws[1].sigma[clinical] * 2, draws[0].sigma[clinical])


def test_skull_stripping_removes_the_head_from_image_and_segmentation() -> None:
    out = render(make_subject(), draw(dataclasses.replace(STILL, skull_strip_prob=1), 0), LAYOUT)
    assert set(out["segmentation"].unique().tolist()) == {0, LEFT_CORTEX, RIGHT_CORTEX}
    assert float(out["image"][:, :, 2, 3, 2].max()) == 0
    assert float(out["image"][:, :, 7, 12, 10].min()) > 0


def test_field_of_view_empties_everything_outside_it() -> None:
    ranges = dataclasses.replace(STILL, field_of_view_prob=1, field_of_view_loss=(0.25, 0.25))
    out = render(make_subject(), draw(ranges, 0), LAYOUT)
    assert torch.equal(out["visible"][0, 0].nonzero().amin(0), torch.tensor([6, 7, 5]))
    assert torch.equal(out["visible"][0, 0].nonzero().amax(0), torch.tensor([17, 20, 14]))
    assert float((out["image"] * ~out["visible"]).abs().max()) == 0
    assert int((out["segmentation"] * ~out["visible"]).max()) == 0


def test_bias_target_is_what_the_image_was_multiplied_with() -> None:
    ranges = dataclasses.replace(STILL, bias_log_std=(0.4, 0.4))
    plain, biased = (render(make_subject(), draw(r, 2), LAYOUT) for r in (STILL, ranges))
    ratio = biased["image"] / (plain["image"] * biased["log_bias_field"].exp())
    seen = ratio[(plain["image"] > 0.1) & (biased["image"] < 0.98)]
    assert float(biased["log_bias_field"].std()) > 0.05
    assert float(seen.std() / seen.mean()) < 1e-3


def test_no_target_for_what_the_subject_lacks() -> None:
    subject = {name: value for name, value in make_subject().items() if name != "distance"}
    assert "distance" not in render(subject, draw(STILL, 0), LAYOUT)


def test_laws_of_many_draws() -> None:
    ranges = SynthesisRanges(skull_strip_prob=0.4, mirror_prob=0.3)
    count = 2000
    small = (4, 4, 4)
    params = sample(ranges, generators(*range(count)), source_size=small, spatial_size=small, protocol=GENERATION)
    five_sigma = 5 * (0.25 / count) ** 0.5
    assert float(params.mirror.float().mean()) == pytest.approx(0.3, abs=five_sigma)
    assert float((params.kept[:, -1] == 0).float().mean()) == pytest.approx(0.4, abs=five_sigma)
    dark = params.mean[:, 0] == 0
    assert float(dark.float().mean()) == pytest.approx(0.5, abs=five_sigma)
    assert float(params.mean[:, 1:].min()) >= 25
    assert float(params.mean[:, 1:].max()) <= 225
    assert float(params.mean[:, 5].mean()) == pytest.approx(125, abs=5 * 200 / (12 * count) ** 0.5)
    assert float(params.spacing.min()) >= 1
    assert float(params.spacing.max()) <= 8.5
    one = (params.spacing == 1).all(1).float().mean()
    assert float(one) == pytest.approx(0.25, abs=five_sigma)
    assert set(params.velocity_points.unique().tolist()) == {5, 6, 7, 8, 9, 10}
    assert set(params.bias_points.unique().tolist()) == {3, 4, 5, 6}
    assert float(torch.linalg.det(params.matrix).min()) > 0


def test_both_sides_of_a_structure_share_their_contrast() -> None:
    params = draw(SynthesisRanges(contrast_prior_prob=0.5), 0, 1, 2, 3)
    mirror = GENERATION.mirror_permutation
    assert torch.equal(params.mean, params.mean[:, mirror])
    assert torch.equal(params.std, params.std[:, mirror])


def test_velocity_fields_of_the_default_ranges_do_not_fold() -> None:
    # Half the size of the published volumes with half their largest displacement: the same shape of field.
    ranges = dataclasses.replace(STILL, velocity_std_mm=(2, 2), velocity_fraction=(0.06, 0.06))
    size = (80, 80, 80)
    params = sample(ranges, generators(0), source_size=size, spatial_size=size, protocol=GENERATION)
    operators = [separable.control_point_operator(params.velocity_points[:, i], n, 10) for i, n in enumerate(size)]
    flow = spatial.integrate_velocity(separable.apply_separable(params.velocity, operators))
    assert float(flow.abs().max()) > 3
    assert float((spatial.jacobian_determinant(spatial.identity_grid(size) + flow) <= 0).float().mean()) < 1e-4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotation_deg", (15, -15), "'rotation_deg' must be two ascending numbers, got (15, -15)"),
        ("noise_std", (1, 2, 3), "'noise_std' must be two ascending numbers, got (1, 2, 3)"),
        ("mirror_prob", 1.5, "'mirror_prob' must be in [0, 1], got 1.5"),
    ],
)
def test_ranges_say_what_is_wrong(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SynthesisRanges(**{field: value})  # type: ignore[arg-type]


def test_mirror_rules_are_their_own_inverse() -> None:
    for task in TASKS.values():
        order = task.mirror_order or tuple(range(task.channels))
        assert [order[i] for i in order] == list(range(task.channels))


def test_the_sampling_table_has_one_row_for_each_field_with_its_default(repository: Path) -> None:
    lines = (repository / "docs" / "sampling.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[1].strip(" `"): cells[2] for cells in (line.split("|") for line in lines if line.startswith("| `"))}
    fields = {field.name: field.default for field in dataclasses.fields(SynthesisRanges)}
    assert set(rows) == set(fields)
    for name, default in fields.items():
        stated = [cell.strip() for cell in rows[name].split(",")]
        expected = list(default if isinstance(default, tuple) else (default,))
        assert [float(s) if isinstance(e, float | int) else s for s, e in zip(stated, expected, strict=True)] == expected, name
