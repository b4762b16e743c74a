"""Checkpoints from which a training resumes as if it had never stopped, and the best weights."""

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import Tensor, nn

from brainfm_monai.io import first_line, refuse_if, write_whole

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TrainingCheckpoint:
    """Saves everything at the end of an epoch, whole or not at all, and resumes from the newest whole one at the start.

    The state of torch's own random generators is kept, too, for networks with dropout. With several processes, which
    must share the folder, the first one writes and all read.
    """

    save_dir: str | Path  # folder of the checkpoints, training_checkpoint_<iteration>.pt
    to_save: Mapping[str, Any]  # objects with state_dict and load_state_dict, by name; the trainer itself is added
    iterations: int | None = None  # between two further checkpoints, for long epochs; None: no further ones
    n_saved: int = 2  # number of checkpoints to keep

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the handlers whose work belongs in the checkpoint."""
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        if every := self.iterations:  # the end of an epoch is saved after its validation
            within = Events.ITERATION_COMPLETED(lambda e, n: n % every == 0 and n % e.state.epoch_length > 0)
            engine.add_event_handler(within, self.save)

    def saved(self) -> list[Path]:
        """The checkpoints of this and of earlier runs, oldest first."""
        paths = Path(self.save_dir).glob("training_checkpoint_*.pt")
        return sorted(paths, key=lambda path: int(path.stem.rsplit("_", 1)[1]))

    def save(self, engine: Any) -> None:
        """Write a checkpoint, and remove the oldest."""
        if idist.get_rank() > 0:
            return
        content = {name: item.state_dict() for name, item in {"trainer": engine, **self.to_save}.items()}
        content["random"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            content["random"]["cuda"] = torch.cuda.get_rng_state()
        folder = Path(self.save_dir)
        with write_whole(folder / f"training_checkpoint_{engine.state.iteration}.pt") as partial:
            torch.save(content, partial)
        killed = folder.glob(".*.partial.training_checkpoint_*.pt")  # left by a process, of another iteration
        for path in [*self.saved()[: -self.n_saved], *killed]:
            path.unlink()

    def resume(self, engine: Any) -> None:
        """Restore the newest whole checkpoint, but for the number of epochs; ValueError if none is whole or fits."""
        path = str(idist.broadcast(self._find_whole() if idist.get_rank() == 0 else "", src=0))
        if not path:
            return
        max_epochs, content = engine.state.max_epochs, torch.load(path, map_location="cpu", weights_only=True)
        try:
            Checkpoint.load_objects({"trainer": engine, **self.to_save}, content)
        except (ValueError, RuntimeError, KeyError) as error:
            rule = f"{path}: a checkpoint of this training is needed"
            raise ValueError(f"{rule}, found another: {first_line(error)}") from error
        engine.state.max_epochs = max_epochs
        # The data loaders' iterators, which are made after the start, draw a number each.
        first = Events.ITERATION_STARTED(once=engine.state.iteration + 1)
        engine.add_event_handler(first, _restore_random, content.get("random", {}))
        logger.info("resumes at iteration %d from %s", engine.state.iteration, path)

    def _find_whole(self) -> str:
        """Path of the newest checkpoint that can be read, empty without any checkpoint."""
        saved = self.saved()
        for path in reversed(saved):
            try:
                torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                logger.warning("%s: not a whole checkpoint, the one before is taken: %s", path, first_line(error))
            else:
                return str(path)
        rule = f"{self.save_dir}: one whole checkpoint is needed to resume"
        refuse_if(saved, rule, "none: remove them to begin anew")
        return ""


def _restore_random(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


@dataclass(eq=False)
class BestWeights:
    """Writes the weights that did best in validation, also over several sittings of a training."""

    network: nn.Module  # whose state dict is written, plain
    path: str | Path  # of the file

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI evaluator with a key metric, which compares, and whose best metric checkpoints keep."""
        self.evaluator = engine
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Write the weights if this validation was the best."""
        if engine.state.best_metric_epoch == engine.state.epoch and idist.get_rank() == 0:
            with write_whole(self.path) as partial:
                torch.save(self.network.state_dict(), partial)

    def state_dict(self) -> dict[str, float | int]:
        """The best metric and its epoch."""
        state = self.evaluator.state
        return {"best_metric": float(state.best_metric), "best_metric_epoch": int(state.best_metric_epoch)}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        vars(self.evaluator.state).update(state)
