from pathlib import Path

import pytest
import torch
from ignite.engine import Engine

from brainfm_monai.handlers import SegmentationDice, TrainingCheckpoint, make_task_loss_transform, make_warmup_stable_decay
from brainfm_monai.losses import MultiTaskLoss
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "mni"])


def test_rate_rises_stays_and_falls() -> None:
    factor = make_warmup_stable_decay(10, 100, 0.2)
    assert [factor(i) for i in (0, 4, 9, 50, 80)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert factor(90) == pytest.approx(0.5)
    assert factor(100) == 0


def test_dice_over_structures_that_occur_in_the_reference() -> None:
    truth = torch.zeros(1, 1, 4, 4, 4, dtype=torch.long)
    truth[..., :2] = 3
    truth[..., 2] = 7
    logits = torch.zeros(1, LAYOUT.channels, 4, 4, 4)
    found = truth.clone()
    found[:, :, 0] = 9  # a wrong structure in a quarter of the voxels; 9 itself is not in the reference
    logits.scatter_(1, found, 5.0)
    metric = SegmentationDice(LAYOUT)
    metric.update((logits, {"segmentation": truth}))
    of_three, of_seven = 2 * 24 / (24 + 32), 2 * 12 / (12 + 16)
    assert metric.compute() == pytest.approx((of_three + of_seven) / 2)


def make_trainer(folder: Path) -> tuple[Engine, torch.nn.Linear, list[float]]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
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
    TrainingCheckpoint(folder, {"network": net, "optimizer": optimizer}, n_saved=2).attach(trainer)
    return trainer, net, losses


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path) -> None:
    data = list(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    whole, net, expected = make_trainer(tmp_path / "whole")
    whole.run(data, max_epochs=6)
    first, _, losses = make_trainer(tmp_path / "parts")
    first.run(data, max_epochs=3)
    (tmp_path / "parts" / "training_checkpoint_9.pt.tmp").write_bytes(b"half")  # what a killed process may leave
    second, resumed, more = make_trainer(tmp_path / "parts")
    second.run(data, max_epochs=6)
    assert losses + more == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(resumed.weight, net.weight)
    assert sorted(p.name for p in (tmp_path / "parts").glob("*.pt")) == ["training_checkpoint_5.pt", "training_checkpoint_6.pt"]


def test_every_task_is_reported() -> None:
    loss = MultiTaskLoss(LAYOUT)
    targets = {
        "segmentation": torch.zeros(1, 1, 2, 2, 2, dtype=torch.long),
        "visible": torch.ones(1, 1, 2, 2, 2, dtype=torch.bool),
    }
    total = loss(torch.zeros(1, LAYOUT.channels, 2, 2, 2), targets)
    scalars = make_task_loss_transform(loss)({"loss": total})
    assert scalars == {"loss": pytest.approx(float(total)), "segmentation": pytest.approx(float(loss.components["segmentation"]))}
