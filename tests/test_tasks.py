"""The task table and the layout of the one output tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brainfm_monai import TASKS, Protocol, TaskLayout
from brainfm_monai.tasks import MAX_DISTANCE_MM, bound_log_scale

FIRST_WEIGHTS = ["segmentation", "distance", "log_bias_field", "mni"]
SHAPE = (6, 5, 4)


@pytest.fixture
def layout() -> TaskLayout:
    return TaskLayout(list(TASKS), "brainfm")


def make_output(layout: TaskLayout) -> Tensor:
    """A tensor in which no two channels, places or samples are alike."""
    return torch.randn(2, layout.channels, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_slices_of_the_first_weights() -> None:
    layout = TaskLayout(FIRST_WEIGHTS, "synthseg_head")
    assert layout.channels == 52
    assert layout.slices == {
        "segmentation": slice(0, 44),
        "distance": slice(44, 48),
        "log_bias_field": slice(48, 49),
        "mni": slice(49, 52),
    }


def test_the_segmentation_comes_first_and_the_rest_keep_their_order() -> None:
    layout = TaskLayout(["mni", "T1w", "segmentation", "CT"], "brainfm")
    assert list(layout.tasks) == ["segmentation", "mni", "T1w", "CT"]
    assert layout.channels == 56 + 3 + 1 + 1


def test_slices_cover_every_channel_once(layout: TaskLayout) -> None:
    covered = [i for where in layout.slices.values() for i in range(where.start, where.stop)]
    assert covered == list(range(layout.channels))


def test_channel_names_come_from_protocol_and_table(layout: TaskLayout) -> None:
    names = layout.channel_names
    assert len(names) == layout.channels
    assert names[:56] == [s.name for s in Protocol.load("brainfm").structures]
    assert names[layout.slices["distance"]] == ["lp", "lw", "rp", "rw"]


def test_every_task_has_a_name_per_channel_and_mirror_rule_that_fits() -> None:
    assert TASKS["distance"].outside == MAX_DISTANCE_MM
    for name, task in TASKS.items():
        assert name == task.name
        assert len(task.channel_names) == task.channels
        assert sorted(task.mirror_order) in ([], list(range(task.channels)))
        assert len(task.mirror_sign) in (0, task.channels)


def test_split_gives_views(layout: TaskLayout) -> None:
    output = make_output(layout)
    parts = layout.split(output)
    assert list(parts) == list(layout.tasks)
    assert torch.equal(torch.cat(list(parts.values()), dim=1), output)
    assert parts["mni"].data_ptr() == output[:, layout.slices["mni"]].data_ptr()


def test_split_names_the_tasks_where_channels_are_missing(layout: TaskLayout) -> None:
    with pytest.raises(
        ValueError,
        match=r"^TaskLayout\.split: 'output' must have 87 channels for \['segmentation', .*\], got \(1, 7, 2, 2, 2\)$",
    ):
        layout.split(torch.zeros(1, 7, 2, 2, 2))


@pytest.mark.parametrize("protocol", ["brainfm", "synthseg_head"])
@pytest.mark.parametrize("task", list(TASKS))
def test_mirroring_twice_is_the_identity(task: str, protocol: str) -> None:
    layout = TaskLayout([task], protocol)
    output = make_output(layout)
    mirrored = layout.mirror(output)
    assert not torch.equal(mirrored, output)
    assert torch.equal(layout.mirror(mirrored), output)


def test_mirroring_all_tasks_is_mirroring_each(layout: TaskLayout) -> None:
    output = make_output(layout)
    parts = layout.split(layout.mirror(output))
    for name, part in layout.split(output).items():
        assert torch.equal(parts[name], TaskLayout([name], layout.protocol).mirror(part))


def test_mirroring_moves_a_structure_to_the_other_side_and_label() -> None:
    layout = TaskLayout(["segmentation"], "synthseg_head")
    label = {s.name: s.label for s in layout.protocol.structures}
    output = torch.zeros(1, layout.channels, *SHAPE)
    output[0, label["Left-Hippocampus"], 1, 2, 3] = 5.0
    output[0, label["Brain-Stem"], 2, 0, 0] = 5.0
    found = layout.mirror(output)[0].nonzero().tolist()
    assert sorted(found) == sorted([[label["Right-Hippocampus"], 4, 2, 3], [label["Brain-Stem"], 3, 0, 0]])


def test_mirroring_swaps_the_distances_of_the_hemispheres() -> None:
    layout = TaskLayout(["distance"])
    output = torch.arange(4.0).reshape(1, 4, 1, 1, 1).expand(1, 4, *SHAPE)
    assert layout.mirror(output)[0, :, 0, 0, 0].tolist() == [2.0, 3.0, 0.0, 1.0]  # lp lw rp rw -> rp rw lp lw


def test_mirroring_turns_the_sign_of_x() -> None:
    layout = TaskLayout(["mni"])
    x = torch.tensor([-0.3, -0.2, -0.1, 0.1, 0.2, 0.4])
    output = torch.zeros(1, 3, *SHAPE)
    output[0, 0], output[0, 1], output[0, 2] = x[:, None, None], 0.7, -0.5
    mirrored = layout.mirror(output)[0]
    assert mirrored[0, :, 0, 0].tolist() == pytest.approx((-x.flip(0)).tolist())
    assert torch.all(mirrored[1] == 0.7)
    assert torch.all(mirrored[2] == -0.5)


def test_images_are_flipped_alone() -> None:
    layout = TaskLayout(["T1w"])
    output = make_output(layout)
    assert torch.equal(layout.mirror(output), output.flip(2))


@pytest.mark.parametrize("tasks", [[], ["T1w", "T1w"], ["pathology"]])
def test_wrong_tasks_are_named(tasks: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"^TaskLayout: 'tasks' must be different names out of \['segmentation', .*\], got \["
    ):
        TaskLayout(tasks)


def test_labels_in_place_of_logits_are_split_like_them() -> None:
    layout = TaskLayout(["mni", "segmentation", "CT"])
    output = torch.rand(2, layout.channels, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    decided = layout.choose_labels(output)
    assert decided.shape[1] == layout.label_channels == 5
    parts, whole = layout.split(decided), layout.split(output)
    assert list(parts) == list(whole)
    torch.testing.assert_close(parts["segmentation"][:, 0].long(), whole["segmentation"].argmax(1))
    for task in ("mni", "CT"):
        torch.testing.assert_close(parts[task], whole[task], rtol=0, atol=0)
    without = TaskLayout(["CT", "mni"])
    assert without.label_channels == without.channels == 4
    assert without.choose_labels(output[:, :4]).shape == (2, 4, 3, 4, 5)


def test_scales_of_error_come_last_with_a_channel_for_each_channel() -> None:
    plain = TaskLayout(FIRST_WEIGHTS)
    layout = TaskLayout(FIRST_WEIGHTS, uncertainty=["mni", "distance"])
    assert layout.channels == 52 + 3 + 4
    assert {name: layout.slices[name] for name in plain.slices} == plain.slices
    assert list(layout.tasks)[-2:] == ["mni_log_scale", "distance_log_scale"]
    assert layout.channel_names[52:55] == ["x_log_scale", "y_log_scale", "z_log_scale"]
    assert (layout.label_channels, plain.label_channels) == (16, 9)
    output = make_output(layout)
    decided = layout.split(layout.choose_labels(output))
    torch.testing.assert_close(decided["distance_log_scale"], output[:, 55:], rtol=0, atol=0)


def test_scales_of_error_mirror_with_their_channels_and_have_no_sign() -> None:
    layout = TaskLayout(["distance", "mni"], uncertainty=["distance", "mni"])
    output = make_output(layout)
    mirrored = layout.mirror(output)
    assert torch.equal(layout.mirror(mirrored), output)
    parts, before = layout.split(mirrored), layout.split(output.flip(2))
    assert torch.equal(parts["distance_log_scale"], before["distance_log_scale"][:, [2, 3, 0, 1]])
    assert torch.equal(parts["mni_log_scale"], before["mni_log_scale"])
    assert torch.equal(parts["mni"][:, 0], -before["mni"][:, 0])


def test_outside_the_head_the_scale_is_the_least_where_the_value_is_known() -> None:
    layout = TaskLayout(["segmentation", "mni", "CT", "lesion"], uncertainty=["mni", "CT"])
    outside = dict(zip(layout.channel_names, layout.outside_values, strict=True))
    assert outside["CT_log_scale"] == -7
    assert outside["x_log_scale"] == outside["x"] == 0
    assert outside["CT"] == -1
    assert outside["lesion"] == -20


def test_the_bound_of_a_scale_is_smooth_and_close_to_nothing_near_zero() -> None:
    values = torch.tensor([-1e9, -30.0, -0.1, 0.0, 0.1, 30.0, 1e9])
    bounded = bound_log_scale(values)
    assert bounded.tolist() == pytest.approx([-7, -7, -0.1, 0, 0.1, 7, 7], abs=5e-3)
    assert bound_log_scale(torch.tensor([1.0], dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("uncertainty", [["segmentation"], ["T1w"], ["mni", "mni"]])
def test_scales_of_what_has_none_are_named(uncertainty: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"^TaskLayout: 'uncertainty' must be different names out of \['distance', 'mni'\], got \["
    ):
        TaskLayout(FIRST_WEIGHTS, uncertainty=uncertainty)


def test_the_embedding_has_as_many_channels_as_asked_for() -> None:
    layout = TaskLayout(["embedding", "segmentation", "age"], embedding_channels=5)
    assert layout.slices["embedding"] == slice(44, 49)
    assert layout.channel_names[44:] == [*(f"embedding_{i}" for i in range(5)), "age"]
    assert len(TaskLayout(["embedding"]).channel_names) == 16


def test_every_map_that_is_trained_can_be_written_and_has_a_name_of_its_own() -> None:
    layout = TaskLayout(list(TASKS), uncertainty=["mni", "CT", "super_resolution"])
    for task in layout.tasks.values():
        assert task.outputs, task.name
        assert layout.maps[task.entry] is task
        assert task.stem or task.kind == "scalar"
    stems = [task.stem for task in layout.tasks.values() if task.stem]
    assert len(set(stems)) == len(stems)
    assert (layout.maps["CT_scale"].stem, layout.maps["mni_scale"].output_unit) == ("desc-synthetic_ctscale", "mm")


def test_maps_are_in_the_unit_of_their_files() -> None:
    values = torch.tensor([[-4.0, 0.0, 0.5]])
    found = {
        name: TASKS[name].to_map(values)[0].tolist() for name in ("lesion", "log_bias_field", "CT", "mni", "distance")
    }
    assert found["lesion"] == pytest.approx([0.01799, 0.5, 0.62246], abs=1e-5)  # a probability, not a logit
    assert found["log_bias_field"] == pytest.approx([0.01832, 1.0, 1.64872], abs=1e-5)
    assert found["CT"] == pytest.approx([-4000, 0, 500])
    assert found["mni"] == pytest.approx([-400, 0, 50])
    assert found["distance"] == pytest.approx([-3, 0, 0.5])
    torch.testing.assert_close(TASKS["embedding"].to_map(torch.full((4, 2), -3.0)), torch.full((4, 2), -0.5))
