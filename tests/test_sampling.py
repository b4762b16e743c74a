"""The laws of what is drawn: ten thousand draws, and the table that documents them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from brainfm_monai.anatomy import Protocol
from brainfm_monai.synthesis import SynthesisParams, SynthesisRanges, Synthesizer
from brainfm_monai.synthesis.sampling import Appearance, Geometry
from brainfm_monai.tasks import TaskLayout

COUNT = 10_000
SIGMAS = 5  # beyond which a mean would lie once in a million tests
HEAD = Protocol.load("synthseg_head")
LAYOUT = TaskLayout(["segmentation"], "synthseg_head")
RANGES = SynthesisRanges(
    mirror_prob=0.3,
    skull_strip_prob=0.4,
    head_removal_prob=0.2,
    hemisphere_prob=0.25,
    deface_prob=0.35,
    field_of_view_prob=0.15,
    contrast_prior_prob=0.5,
    head_cluster_prob=0.6,
    mixup_prob=0.4,
    resolution_weights=(0.1, 0.2, 0.3, 0.4),
    dissection_photo_prob=0.1,
    ghost_prob=0.2,
    rician_prob=0.7,
    lesion_prob=0.45,
)


def draw(ranges: SynthesisRanges, count: int, **flags: torch.Tensor) -> SynthesisParams:
    return Synthesizer(ranges, LAYOUT, (4, 4, 4)).draw(flags, range(count), device="cpu")


@pytest.fixture(scope="module")
def params() -> SynthesisParams:
    every = torch.ones(COUNT, dtype=torch.bool)
    return draw(RANGES, COUNT, available_T1w=every, available_FLAIR=every)


@pytest.fixture(scope="module")
def geometry(params: SynthesisParams) -> Geometry:
    return params.geometry


@pytest.fixture(scope="module")
def look(params: SynthesisParams) -> Appearance:
    return params.appearances[0]


def check_chance(happened: torch.Tensor, probability: float) -> None:
    tolerance = SIGMAS * (probability * (1 - probability) / len(happened)) ** 0.5
    assert float(happened.float().mean()) == pytest.approx(probability, abs=tolerance)


def check_uniform(values: torch.Tensor, low: float, high: float) -> None:
    values = values.flatten()
    assert float(values.min()) >= low - 1e-4
    assert float(values.max()) <= high + 1e-4
    assert float(values.mean()) == pytest.approx(
        (low + high) / 2, abs=SIGMAS * (high - low) / (12 * len(values)) ** 0.5
    )
    # The quarter nearest to the low end holds a quarter of the draws.
    check_chance(values < low + (high - low) / 4, 0.25)


def test_chances_are_those_that_were_asked_for(geometry: Geometry, look: Appearance) -> None:
    photo = (look.spacing[:, [0, 2]] == 1).all(1) & (look.spacing[:, 1] > 8.5)
    assert float(photo.float().mean()) == pytest.approx(0.1 * 0.4, abs=0.02)  # 8.5 to 12.5 mm is 0.4 of the photos' law
    check_chance(geometry.mirror, 0.3)
    check_chance(~geometry.hemispheres.all(1), 0.25)
    check_chance(~geometry.hemispheres[:, 0], 0.125)
    check_chance(geometry.face.abs().sum(1) > 0, 0.35)
    check_chance(geometry.field_of_view[:, 0, 0] > 0, 0.15)
    check_chance(geometry.lesion_coverage > 0, 0.45)
    check_chance(look.ghost_strength.abs().sum(1) > 0, 0.2)
    check_chance(look.cluster_offset.abs().sum(1) > 0, 0.6)
    skin = HEAD.label_of_id[511]
    removal = 1 - (1 - 0.2) * (1 - 0.1)  # of heads, and by photos
    check_chance(geometry.kept[:, skin] == 0, 1 - (1 - 0.4) * (1 - removal) * (1 - 0.25))
    check_chance(geometry.stripped, 0.4 * (1 - removal))


def test_a_mirror_that_is_not_asked_for_never_comes() -> None:
    # The reference mirrors 69 % of the samples for 0.5, and half of them for 0.
    for probability in (0.0, 1.0):
        ranges = dataclasses.replace(SynthesisRanges(), mirror_prob=probability)
        drawn = draw(ranges, 200)
        assert drawn.geometry.mirror.float().mean() == probability


def test_uniform_laws(geometry: Geometry, look: Appearance) -> None:
    check_uniform(geometry.translation, -20, 20)
    check_uniform(geometry.strip_threshold, 0.3, 0.7)
    check_uniform(geometry.velocity_spacing[:, 0], 18, 40)
    check_uniform(geometry.lesion_flow, 0, 10)
    check_uniform(geometry.lesion_coverage[geometry.lesion_coverage > 0], 0.001, 0.15)
    check_uniform(look.bias_spacing[:, 0], 32, 80)
    check_uniform(look.lesion_change, 0.3, 0.9)
    real = look.blend[:, 0] == 0
    check_uniform(look.noise_std[real], 0, 5)
    check_uniform(look.noise_std[~real], 5, 15)
    check_uniform(look.ghost_strength[look.ghost_strength > 0], 0.1, 0.5)
    offset = geometry.face[geometry.face[:, 2] > 0]
    check_uniform(offset[:, 2], 55, 75)
    check_uniform(torch.rad2deg(torch.atan2(-offset[:, 1], offset[:, 0])), 35, 55)


def test_the_linear_map_has_its_rotations_shears_and_scalings(geometry: Geometry) -> None:
    volume = torch.linalg.det(geometry.matrix)
    # Shears and rotations have determinant 1 to first order: what is left are three uniform scalings.
    assert float(volume.min()) > 0
    assert float(volume.mean()) == pytest.approx(1, abs=0.02)
    ranges = dataclasses.replace(SynthesisRanges(), shear=(0, 0), rotation_deg=(0, 0), scaling=(0.8, 1.2))
    matrix = draw(ranges, 2000).geometry.matrix
    check_uniform(torch.diagonal(matrix, dim1=1, dim2=2), 0.8, 1.2)


def test_velocity_and_bias_have_the_scale_of_their_law(geometry: Geometry, look: Appearance) -> None:
    # A normal number times a uniform one of [0, 4]: its variance is 4^2 / 3. Photos lose the component along their axis.
    photo = geometry.velocity[:, 1].flatten(1).abs().sum(1) == 0
    check_chance(photo, 0.1)
    variance = float(geometry.velocity[~photo].square().mean())
    assert variance == pytest.approx(16 / 3, rel=0.05)
    low, high = 0.1, 0.6
    is_ct = look.bias.flatten(1).abs().sum(1) == 0
    expected = (low**2 + low * high + high**2) / 3
    assert float(look.bias[~is_ct].square().mean()) == pytest.approx(expected, rel=0.05)
    synthetic = look.blend[:, 0] > 0
    check_chance(is_ct[synthetic], 0.5 * 0.25)  # a prior, and CT of four tables


def test_contrasts_lie_in_their_range_and_air_is_dark_as_often_as_asked(look: Appearance) -> None:
    ranges = dataclasses.replace(RANGES, contrast_prior_prob=0, dissection_photo_prob=0)
    plain = draw(ranges, 4000).appearances[0]
    check_uniform(plain.mean[:, 8], 25, 225)
    check_uniform(plain.std[:, 8], 5, 25)
    check_chance(plain.mean[:, 0] == 0, 0.5)
    assert float(look.mean.min()) >= 0
    assert float(look.mean.max()) <= 225


def test_resolution_families_come_with_their_weights_and_their_laws() -> None:
    ranges = dataclasses.replace(RANGES, dissection_photo_prob=0)
    look = draw(ranges, COUNT).appearances[0]
    spacing = look.spacing
    isotropic, clinical = (spacing == 1).all(1), (spacing == 1).sum(1) == 2
    low_field = (spacing[:, :2] >= 1.3).all(1) & (spacing[:, :2] <= 1.7).all(1) & (spacing[:, 2] >= 4.8)
    coarse = ~isotropic & ~clinical & ~low_field
    for family, weight in ((isotropic, 0.1), (clinical, 0.2), (low_field, 0.3), (coarse, 0.4)):
        check_chance(family, weight)
    check_uniform(spacing[clinical].amax(1), 2.5, 8.5)
    assert torch.bincount(spacing[clinical].argmax(1), minlength=3).min() > 500  # any axis
    check_uniform(spacing[coarse], 2, 5)
    check_uniform(spacing[low_field] - torch.tensor([1.3, 1.3, 4.8]), 0, 0.4)
    assert float(look.sigma[isotropic].max()) == 0
    # The profile is as wide as the slice is thick: ln 5 / pi of 4 to 6 mm, at most of the spacing.
    thick = look.sigma[clinical].amax(1)
    assert float((thick / spacing[clinical].amax(1).clamp_max(6)).max()) <= 1.15 * 0.5124
    assert float(thick.min()) >= 0.85 * 0.5123 * 2.5


def test_the_input_is_one_of_what_is_there_or_a_convex_mixture(look: Appearance) -> None:
    blend = look.blend
    torch.testing.assert_close(blend.sum(1), torch.ones(COUNT))
    assert float(blend[:, [2, 4]].max()) == 0
    alone = (blend == 1).any(1)
    mixed = ~alone
    # Synthetic, T1w and FLAIR by equal chance; of the synthetic ones the share of the mix-up.
    check_chance(mixed, 0.4 / 3)
    check_chance(blend[:, 1] == 1, 1 / 3)
    check_chance(blend[:, 3] == 1, 1 / 3)
    assert bool((blend[mixed][:, [0, 1, 3]] > 0).all())


def test_streams_of_different_seeds_and_ranks_differ(geometry: Geometry) -> None:
    assert len(geometry.translation[:, 0].unique()) > 0.99 * COUNT


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotation_deg", (15, -15), "'rotation_deg' must be two ascending numbers, found (15, -15)"),
        ("noise_std", (1, 2, 3), "'noise_std' must be two ascending numbers, found (1, 2, 3)"),
        ("rotation_deg", ("a", "b"), "'rotation_deg' must be two ascending numbers, found ('a', 'b')"),
        ("rotation_deg", 5, "'rotation_deg' must be two ascending numbers, found 5"),
        ("mirror_prob", 1.5, "'mirror_prob' must be in [0, 1], found 1.5"),
        ("mirror_prob", "often", "'mirror_prob' must be in [0, 1], found often"),
        ("gamma_log_std", "much", "'gamma_log_std' must be a number, found much"),
        (
            "resolution_weights",
            (1, 2, 3),
            "'resolution_weights' must be 4 numbers of at least 0, not all 0, found (1, 2, 3)",
        ),
        (
            "input_weights",
            (0, 0, 0, 0, 0),
            "'input_weights' must be 5 numbers of at least 0, not all 0, found (0, 0, 0, 0, 0)",
        ),
    ],
)
def test_ranges_say_what_is_wrong(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SynthesisRanges(**{field: value})  # type: ignore[arg-type]


def test_an_unknown_contrast_is_named() -> None:
    ranges = SynthesisRanges(contrast_prior_prob=1, contrast_priors=("T1w", "PD"))
    with pytest.raises(ValueError, match=r"names must be out of \['T1w', 'T2w', 'FLAIR', 'CT'\], found \['PD'\]"):
        draw(ranges, 1)


def test_the_sampling_table_has_one_row_for_each_field_with_its_default(repository: Path) -> None:
    lines = (repository / "docs" / "sampling.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[1].strip(" `"): cells for cells in (line.split("|") for line in lines if line.startswith("| `"))}
    fields = {field.name: field.default for field in dataclasses.fields(SynthesisRanges)}
    assert set(rows) == set(fields)
    for name, default in fields.items():
        stated = [cell.strip() for cell in rows[name][2].split(",")]
        expected = [str(e) for e in (default if isinstance(default, tuple) else (default,))]
        same = [
            s == e or (e not in {"True", "False"} and _is_number(e) and float(s) == float(e))
            for s, e in zip(stated, expected, strict=True)
        ]
        assert all(same), name
        assert all(cell.strip() for cell in rows[name][3:6]), f"{name}: law and unit, per what, and source"


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9.e-]+", text) is not None
