import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from brainfm_monai.engines import (
    DrawnSubjects,
    DrawSampler,
    MultiTaskTrainer,
    NonFiniteStop,
    SynthesisPrepareBatch,
    TimeBudget,
    check_shards,
    make_grad_scaler,
    make_warmup_stable_decay,
)
from brainfm_monai.engines.trainer import split_batch
from brainfm_monai.inferers import AutocastInferer
from brainfm_monai.networks import MultiTaskNet, ResidualUNet, UNet, checkpoint_activations, parse_precision
from brainfm_monai.synthesis import LARGEST_SEED, SynthesisRanges, Synthesizer
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "log_bias_field"])
RANGES = SynthesisRanges(translation_mm=(0, 0), field_of_view_prob=0)  # so that the small box stays in view


def make_batch(*names: str) -> dict[str, object]:
    labels = torch.zeros(len(names), 1, 16, 16, 16, dtype=torch.uint8)
    labels[:, :, 4:12, 4:12, 4:12] = 5
    return {"subject": list(names), "generation_labels": labels, "segmentation": labels}


def test_seeds_decide_the_sample_and_names_do_where_seeds_are_missing() -> None:
    synthesizer = Synthesizer(RANGES, LAYOUT, (16, 16, 16))
    prepare = SynthesisPrepareBatch(synthesizer)
    batch = make_batch("a") | {"seed": torch.tensor([7])}
    assert torch.equal(prepare(batch, "cpu")[0], prepare(batch, "cpu")[0])
    assert not torch.equal(prepare(batch, "cpu")[0], prepare(batch | {"seed": torch.tensor([8])}, "cpu")[0])
    by_name = prepare(make_batch("a"), "cpu")[0]
    assert torch.equal(SynthesisPrepareBatch(synthesizer, fixed=True)(batch, "cpu")[0], by_name)


def test_no_two_subjects_of_a_validation_share_their_seed() -> None:
    names = [f"sub-{i:03}" for i in range(1, 101)] + ["training_seg_18", "training_seg_81"]
    seeds = SynthesisPrepareBatch(Synthesizer(RANGES, LAYOUT, (16, 16, 16)), fixed=True).seeds({"subject": names})
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < LARGEST_SEED for seed in seeds)


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
    prepare = SynthesisPrepareBatch(Synthesizer(still, LAYOUT, (8, 8, 8), scan_mm=2.0, label_mm=1.0))
    _, targets = prepare(make_batch("a"), "cpu")
    assert int((targets["segmentation"] > 0).sum()) == 4**3
    with pytest.raises(ValueError, match=r"Synthesizer: 'label_mm' must divide 'scan_mm' 2.0, found 1.5"):
        Synthesizer(still, LAYOUT, (8, 8, 8), scan_mm=2.0, label_mm=1.5)


def test_every_pass_takes_each_subject_once_and_the_draw_decides_the_seed() -> None:
    draws = DrawnSubjects([{"subject": name} for name in "abcde"], seed=3)
    passes = [[draws[5 * p + i]["subject"] for i in range(5)] for p in range(4)]
    assert all(sorted(names) == list("abcde") for names in passes)
    assert len({tuple(names) for names in passes}) > 1
    seeds = [draws[i]["seed"] for i in range(100)]
    assert len(set(seeds)) == 100
    again = DrawnSubjects([{"subject": name} for name in "abcde"], seed=3)
    assert [again[i]["seed"] for i in (99, 7)] == [seeds[99], seeds[7]]  # in any order
    other = DrawnSubjects([{"subject": name} for name in "abcde"], seed=4)
    assert not {other[i]["seed"] for i in range(100)} & set(seeds)
    with pytest.raises(ValueError, match="DrawnSubjects: 'data' must hold at least one subject, found none"):
        DrawnSubjects([])


def test_processes_share_the_draws_and_go_on_where_they_were() -> None:
    def first(sampler: DrawSampler, count: int) -> list[list[int]]:
        return [batch for _, batch in zip(range(count), sampler, strict=False)]

    alone = first(DrawSampler(4), 3)
    shared = [first(DrawSampler(2, rank, 2), 3) for rank in range(2)]
    assert [a + b for a, b in zip(*shared, strict=True)] == alone == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    later = DrawSampler(2, 1, 2)
    later.first = 8
    assert first(later, 1) == [[10, 11]]
    with pytest.raises(ValueError, match="validation: each of 2 processes needs a subject, found 1"):
        check_shards([0], 2)


def test_batches_are_cut_into_parts_of_nearly_one_size() -> None:
    batch = {"x": torch.arange(5), "name": list("abcde")}
    parts = split_batch(batch, 2)
    assert [part["name"] for part in parts] == [["a", "b", "c"], ["d", "e"]]
    assert torch.cat([part["x"] for part in parts]).tolist() == list(range(5))
    assert len(split_batch(batch, 9)) == 5


class SquaredError(nn.Module):
    def forward(self, pred: Tensor, target: dict[str, Tensor]) -> Tensor:
        error = (pred - target["y"]).square().mean(1)
        self.components = {"line": error.mean().detach()}
        return error.mean()


def make_data(count: int = 12) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, generator=generator), "y": torch.randn(1, generator=generator)} for _ in range(count)]


def train_line(
    data: list[dict[str, Any]], steps: int = 3, batch_size: int = 4, precision: str = "float32", **options: Any
) -> MultiTaskTrainer:
    network = nn.Linear(3, 1)
    nn.init.constant_(network.weight, 0.5)
    nn.init.zeros_(network.bias)
    fused = options.pop("fused", False)
    trainer = MultiTaskTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        epoch_length=steps,
        train_data_loader=torch.utils.data.DataLoader(data, batch_size=batch_size),  # type: ignore[arg-type]
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused),
        loss_function=SquaredError(),
        prepare_batch=lambda batch, *_, **__: (batch["x"], {"y": batch["y"]}),
        inferer=AutocastInferer(precision),
        decollate=False,
        **options,
    )
    trainer.run()
    return trainer


def weight_of(trainer: MultiTaskTrainer) -> Tensor:
    return trainer.network.state_dict()["weight"]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_batch_in_parts_is_one_step_of_the_whole_batch(parts: int) -> None:
    whole, cut = train_line(make_data()), train_line(make_data(), accumulation=parts)
    assert cut.state.iteration == whole.state.iteration == 3
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(cut.network.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    for key in ("loss", "gradient_norm"):
        torch.testing.assert_close(cut.state.output[key], whole.state.output[key])
    torch.testing.assert_close(cut.state.output["task_losses"]["line"], whole.state.output["task_losses"]["line"])


def test_gradients_are_clipped_by_their_norm() -> None:
    free, clipped = train_line(make_data(), steps=1), train_line(make_data(), steps=1, max_norm=0.1)
    torch.testing.assert_close(
        clipped.state.output["gradient_norm"], free.state.output["gradient_norm"]
    )  # before clipping
    grads = [
        torch.cat([p.grad.flatten() for p in t.network.parameters() if p.grad is not None]) for t in (free, clipped)
    ]
    assert float(grads[1].norm()) == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(grads[1] / grads[1].norm(), grads[0] / grads[0].norm())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_is_not_finite_is_left_out(fused: bool, parts: int) -> None:
    data = make_data()
    broken = [dict(item) for item in data]
    broken[5]["y"] = torch.tensor([torch.nan])  # in the second of three batches
    without = train_line(data[:4] + data[8:], steps=2, fused=fused)
    with_nan = train_line(broken, fused=fused, accumulation=parts)
    assert with_nan.state.output["loss"].isfinite()
    for name, value in without.network.state_dict().items():
        torch.testing.assert_close(with_nan.network.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_reduced_precision_stays_near_and_float16_survives_an_overflow() -> None:
    exact = weight_of(train_line(make_data()))
    near = weight_of(train_line(make_data(), precision="bfloat16"))
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.02)
    assert not torch.equal(near, exact)
    scaler = make_grad_scaler("float16", torch.device("cpu"))
    assert scaler.is_enabled()
    half = train_line(
        make_data(), precision="float16", scaler=torch.amp.GradScaler("cpu", init_scale=8.0), max_norm=100.0
    )
    torch.testing.assert_close(weight_of(half), exact, rtol=0.02, atol=0.01)
    large = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    overflow = train_line(make_data(), precision="float16", scaler=large)
    assert large.get_scale() < 2.0**127  # the steps were left out and the scale went down
    assert weight_of(overflow).isfinite().all()
    assert not make_grad_scaler("bfloat16", torch.device("cpu")).is_enabled()
    assert parse_precision("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(ValueError, match=r"precision: one of .* or null is needed, found 'half'"):
        AutocastInferer("half")
    with pytest.raises(ValueError, match="MultiTaskTrainer: 'accumulation' must be positive, found 0"):
        train_line(make_data(), accumulation=0)
    with pytest.raises(ValueError, match="MultiTaskTrainer: 'max_norm' must be positive, found 0"):
        train_line(make_data(), max_norm=0)


@pytest.mark.parametrize("backbone", [UNet, ResidualUNet])
def test_activation_checkpointing_changes_no_gradient_and_no_name(backbone: type[nn.Module]) -> None:
    network = MultiTaskNet(backbone(features=[8, 16]), LAYOUT)
    image = torch.linspace(0, 1, 8**3).reshape(1, 1, 8, 8, 8)

    def gradients() -> list[Tensor]:
        network.zero_grad()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
            output = network(image)
        output.square().mean().backward()
        counts.append(sum(kept))
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    counts: list[int] = []
    names = list(network.state_dict())
    plain = gradients()
    checkpoint_activations(network)
    for a, b in zip(gradients(), plain, strict=True):
        assert torch.equal(a, b)
    assert list(network.state_dict()) == names
    assert counts[1] < counts[0] / 2
    with pytest.raises(
        ValueError, match="activation_checkpointing: a network with levels of a U-Net is needed, found Linear"
    ):
        checkpoint_activations(nn.Linear(1, 1))


def test_rate_rises_stays_and_falls() -> None:
    factor = make_warmup_stable_decay(10, 100, 0.2)
    assert [factor(i) for i in (0, 4, 9, 50, 80)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert factor(90) == pytest.approx(0.5)
    assert factor(100) == 0


def test_a_budget_of_time_ends_the_training_with_the_rate_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr("brainfm_monai.engines.optimizers.time.monotonic", lambda: seconds[0])

    def run(state: dict[str, float] | None, stop: int | None = None) -> tuple[TimeBudget, list[float], int]:
        budget = TimeBudget(2.0)
        if state is not None:
            budget.load_state_dict(state)
        factor, rates = make_warmup_stable_decay(2, 10**6, 0.5, budget), []

        def step(engine: Engine, batch: int) -> None:
            rates.append(factor(engine.state.iteration - 1))
            seconds[0] += 1

        engine = Engine(step)
        budget.attach(engine)
        ends: list[int] = []
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: ends.append(e.state.iteration))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seconds.__setitem__(0, seconds[0] + 9))  # validation
        if stop is not None:
            engine.add_event_handler(Events.EPOCH_COMPLETED(once=stop), lambda: engine.terminate())
        start = seconds[0]
        engine.run(range(20), max_epochs=1)
        assert seconds[0] - start <= 120  # with the last validation
        return budget, rates, ends[-1]

    budget, rates, last = run(None)
    assert 80 <= last <= 100
    assert rates[:3] == pytest.approx([0.5, 1, 1])
    assert rates[40] == 1
    assert rates[-1] < 0.1
    assert budget.share is not None
    assert budget.share > 0.95

    half, _, _ = run(None, stop=2)
    seconds[0] += 10**4  # the time between two sittings does not count
    _, later, _ = run(half.state_dict())
    assert 30 <= len(later) <= 60
    assert later[-1] < 0.1
    assert TimeBudget().share is None


def test_processes_count_steps_that_are_not_finite_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # The loss of the other process is not finite, whose gradients make the scaler leave the step out in both.
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("ignite.distributed.all_reduce", lambda bad: bad + 1)
    stop = NonFiniteStop(max_in_row=2)
    output = {"loss": torch.ones(()), "gradient_norm": torch.tensor(torch.inf), "task_losses": {}}
    scaler = torch.amp.GradScaler("cpu")
    for iteration in (1, 2):
        state = SimpleNamespace(output=output, batch={"subject": ["a"], "seed": [3]}, iteration=iteration)
        engine: Any = SimpleNamespace(state=state, grad_scaler=scaler, accumulation=1)
        stop.remember(engine)
        if iteration == 1:
            stop.look(engine)
    with pytest.raises(FloatingPointError, match="found 2 steps in a row up to iteration 2"):
        stop.look(engine)


def test_batch_normalisations_of_several_processes_are_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    for norm in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3)):
        network = nn.Sequential(norm, nn.Linear(3, 1))
        MultiTaskTrainer(
            device=torch.device("cpu"), max_epochs=1, epoch_length=1, train_data_loader=[], network=network,
            optimizer=torch.optim.AdamW(network.parameters()), loss_function=SquaredError(),
        )  # fmt: skip
    assert caplog.messages == ["1 batch normalisations see the scans of one process alone"]
