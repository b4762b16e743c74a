import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from PIL import ImageFont

from brainfm_monai.handlers import (
    BestWeights,
    TrainingCheckpoint,
    ValidationScores,
    compose_panel,
)
from brainfm_monai.slices import TEXT_PIXELS
from brainfm_monai.tasks import TASKS, TaskLayout

LAYOUT = TaskLayout(["segmentation", "mni"])


def test_dice_over_structures_that_occur_in_the_reference() -> None:
    truth = torch.zeros(1, 1, 4, 4, 4, dtype=torch.long)
    truth[..., :2] = 3
    truth[..., 2] = 7
    logits = torch.zeros(1, LAYOUT.channels, 4, 4, 4)
    found = truth.clone()
    found[:, :, 0] = 9  # a wrong structure in a quarter of the voxels; 9 itself is not in the reference
    logits.scatter_(1, found, 5.0)
    metric = ValidationScores(LAYOUT)
    assert math.isnan(metric.compute()["mean_dice"])  # a number in any case: MONAI compares it
    metric.update((logits, {"segmentation": truth}))
    of_three, of_seven = 2 * 24 / (24 + 32), 2 * 12 / (12 + 16)
    assert metric.compute() == {"mean_dice": pytest.approx((of_three + of_seven) / 2)}


def make_trainer(folder: Path, **options: Any) -> tuple[Engine, torch.nn.Sequential, list[float]]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    losses: list[float] = []

    def step(engine: Engine, batch: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = ((net(batch) - batch.sum()) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        return losses[-1]

    trainer = Engine(step)
    trainer.state.max_epochs = 6
    TrainingCheckpoint(folder, {"network": net, "optimizer": optimizer}, n_saved=2, **options).attach(trainer)
    return trainer, net, losses


DATA = list(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, net, expected = make_trainer(tmp_path / "whole")
    whole.run(DATA, max_epochs=6)
    first, _, losses = make_trainer(tmp_path / "parts")
    first.run(DATA, max_epochs=3)
    (tmp_path / "parts" / ".ab12.partial.training_checkpoint_99.pt").write_bytes(
        b"half"
    )  # what a killed process may leave
    second, resumed, more = make_trainer(tmp_path / "parts")
    torch.rand(7)  # the global generator is elsewhere by now: dropout goes on with that of the checkpoint
    second.run(DATA, max_epochs=6)
    assert losses + more == expected
    assert torch.equal(resumed.state_dict()["0.weight"], net.state_dict()["0.weight"])
    assert names_of(tmp_path / "parts") == ["training_checkpoint_20.pt", "training_checkpoint_24.pt"]
    assert len(list((tmp_path / "parts").iterdir())) == 2


def test_a_checkpoint_that_is_not_whole_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _, expected = make_trainer(tmp_path)
    trainer.run(DATA, max_epochs=3)
    newest = tmp_path / "training_checkpoint_12.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    with caplog.at_level(logging.WARNING):
        resumed, _, losses = make_trainer(tmp_path)
        resumed.run(DATA, max_epochs=3)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(f"{newest}: not a whole checkpoint, the one before is taken")
    assert "\n" not in message
    assert losses == expected[8:]
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="one whole checkpoint is needed to resume, found none"):
        make_trainer(tmp_path)[0].run(DATA, max_epochs=3)


def test_a_checkpoint_within_an_epoch_goes_on_within_it(tmp_path: Path) -> None:
    def last(trainer: Engine) -> None:
        if trainer.state.iteration == 7:
            raise KeyboardInterrupt

    interrupted, _, losses = make_trainer(tmp_path, iterations=3)
    interrupted.add_event_handler(Events.ITERATION_COMPLETED, last)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(DATA, max_epochs=3)
    assert names_of(tmp_path) == ["training_checkpoint_4.pt", "training_checkpoint_6.pt"]
    resumed, _, more = make_trainer(tmp_path, iterations=3)
    resumed.run(DATA[2:] + DATA[:2], max_epochs=3)  # the sampler's part: data from where the iteration was
    assert more[0] == losses[6]
    assert resumed.state.iteration == 12
    assert names_of(tmp_path) == ["training_checkpoint_12.pt", "training_checkpoint_9.pt"]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path)[0].run(DATA, max_epochs=1)
    other = Engine(lambda engine, batch: None)
    TrainingCheckpoint(tmp_path, {"network": torch.nn.Linear(5, 5)}).attach(other)
    with pytest.raises(
        ValueError, match=r"training_checkpoint_4.pt: a checkpoint of this training is needed, found another"
    ):
        other.run(DATA, max_epochs=2)


def make_evaluator(best: BestWeights, scores: list[float]) -> Engine:
    """What MONAI's evaluator does with its key metric."""
    evaluator: Any = Engine(lambda engine, batch: None)
    evaluator.state.best_metric, evaluator.state.best_metric_epoch = -1, -1

    def compare(engine: Any) -> None:
        score = scores[engine.state.epoch - 1]
        if engine.state.best_metric_epoch == -1 or score > engine.state.best_metric:
            engine.state.best_metric, engine.state.best_metric_epoch = score, engine.state.epoch

    evaluator.add_event_handler(Events.EPOCH_COMPLETED, compare)
    best.attach(evaluator)
    return evaluator


def test_best_weights_are_not_overwritten_by_worse_ones_after_a_resume(tmp_path: Path) -> None:
    network, path = torch.nn.Linear(1, 1), tmp_path / "model.pt"
    best = BestWeights(network, path)
    make_evaluator(best, [0.2, 0.8, 0.5]).run([0], max_epochs=3)
    assert best.state_dict() == {"best_metric": 0.8, "best_metric_epoch": 2}
    written = path.read_bytes()

    for score in (0.7, 0.9):
        later = BestWeights(torch.nn.Linear(1, 1), path)
        evaluator = make_evaluator(later, [score])
        later.load_state_dict(best.state_dict())
        evaluator.run([0], max_epochs=1)
        assert (path.read_bytes() == written) == (score < 0.8)


def test_errors_of_tasks_in_their_units() -> None:
    layout = TaskLayout(["segmentation", "distance", "log_bias_field", "mni", "T1w"])
    shape = (2, 4, 4, 4)
    target = {
        "segmentation": torch.ones(2, 1, 4, 4, 4, dtype=torch.long),
        "visible": torch.ones(2, 1, 4, 4, 4, dtype=torch.bool),
        "distance": torch.full((2, 4, 4, 4, 4), 1.0),
        "log_bias_field": torch.linspace(-1, 1, 64).reshape(1, 1, 4, 4, 4).repeat(2, 1, 1, 1, 1),
        "mni": torch.zeros(2, 3, 4, 4, 4),
        "available_mni": torch.tensor([1.0, 0.0]),
        "available_T1w": torch.zeros(2),
        "T1w": torch.zeros(2, 1, 4, 4, 4),
    }
    target["distance"][:, :, 0] = 5.0  # beyond 3 mm: does not count
    target["mni"][1] = torch.nan
    parts = {
        "segmentation": torch.zeros(2, len(layout.protocol), 4, 4, 4),
        "distance": torch.full((2, 4, 4, 4, 4), 9.0),  # clipped to 3
        "log_bias_field": target["log_bias_field"] * 1.5 + 7,  # a constant does not count
        "mni": torch.tensor([0.03, 0.0, 0.04]).reshape(1, 3, 1, 1, 1).expand(2, 3, *shape[1:]),
        "T1w": torch.zeros(2, 1, 4, 4, 4),
    }
    metric = ValidationScores(layout)
    metric.update((torch.cat([parts[name] for name in layout.tasks], dim=1), target))
    true, pred = (values.double().exp() for values in (target["log_bias_field"][0], parts["log_bias_field"][0]))
    gain = (true * pred).sum() / pred.square().sum()
    bias = float((gain * pred - true).norm() / true.norm())
    expected = {"mean_dice": 0.0, "distance_mae_mm": 2.0, "log_bias_error": bias, "mni_error_mm": 5.0}
    assert metric.compute() == pytest.approx(expected, rel=1e-4)  # no T1w: nobody has it


def test_captions_of_a_panel_do_not_run_into_each_other() -> None:
    layout = TaskLayout([*TASKS])
    size = (36, 44, 36)  # of a training at 4 mm, the smallest there is
    picture = compose_panel(torch.zeros(1, *size), torch.zeros(layout.channels, *size), {}, layout)
    drawn = [name for name, task in layout.tasks.items() if task.picture]
    font = ImageFont.load_default(TEXT_PIXELS)
    for name in drawn:
        assert font.getlength(f"{name} (true)") + 4 < picture.shape[1] / (len(drawn) + 1), name


def test_a_panel_shows_prediction_and_target_with_the_right_on_the_left_and_the_top_up() -> None:
    layout = TaskLayout(["segmentation", "distance", "age"])
    image = torch.zeros(1, 8, 10, 12)
    image[0, 4:, :, 6] = 1.0  # right half of the middle axial plane
    image[0, 4, :, 9:] = 0.5  # upper end of the middle sagittal plane
    pred = torch.zeros(layout.channels, 8, 10, 12)
    pred[3] = 1.0
    pred[44] = torch.linspace(-1, 1, 10).reshape(1, 10, 1)  # left pial surface through the middle
    target = {"segmentation": torch.full((1, 8, 10, 12), 3), "distance": torch.full((4, 8, 10, 12), 3.0)}
    picture = compose_panel(image, pred, target | {"available_distance": torch.tensor(0.0)}, layout)
    height, width = picture.shape[0] // 3, picture.shape[1] // 4  # three planes; input, prediction, target, distance
    field = picture.reshape(3, height, 4, width, 3).transpose(0, 2, 1, 3, 4)
    axial = field[0, 0, height // 2, :, 0]
    assert axial[width // 2 - 30 : width // 2 - 6].min() == 255  # right of the subject on the left
    assert axial[width // 2 + 12 : width // 2 + 30].max() == 0
    sagittal = field[2, 0, :, width // 2, 0]
    assert (sagittal[12:27] > 100).all()
    assert not sagittal[90:120].any()
    labels, truth, distance = field[0, 1:, 30:-45, 30:-30]
    assert np.array_equal(labels, truth)
    assert labels.any()
    assert (distance == [255, 64, 64]).all(-1).any()  # the line of the surface
