"""A loss that is no number: which subject, which seed, what was drawn; and the end of a training that has lost its way."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from brainfm_monai.engines.trainer import MultiTaskTrainer, split_batch
from brainfm_monai.synthesis import IMAGES, Synthesizer, describe

__all__ = ["NonFiniteStop"]

logger = logging.getLogger(__name__)

LARGEST_LISTED = 512  # numbers of one drawn quantity in the JSON file; of larger ones, such as noise, the shape is told


class NonFiniteStop:
    """Names the samples of steps that were left out because they were not finite, and stops after several in a row.

    For each such step one line is logged and ``nonfinite_<iteration>_rank<rank>.json`` written, which has all that was drawn;
    ``Synthesizer(...)(subject, [seed], generation_protocol)`` draws the sample again.

    Args:
        synthesizer: of the training.
        output_dir: folder of the files.
        max_in_row: steps in a row after which the training stops.
        interval: iterations between two looks, because each look waits for the device.
    """

    def __init__(
        self, synthesizer: Synthesizer, output_dir: str | Path, max_in_row: int = 10, interval: int = 1
    ) -> None:
        self.synthesizer, self.output_dir = synthesizer, Path(output_dir)
        self.max_in_row, self.interval = max_in_row, interval
        self.in_row = 0
        self._kept: list[tuple[int, int, dict[str, Any], Tensor, dict[str, Tensor]]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`MultiTaskTrainer`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.remember)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.look)

    def remember(self, engine: MultiTaskTrainer) -> None:
        """Keep the facts of a step, without its volumes, until somebody looks."""
        output, batch = engine.state.output, engine.state.batch
        facts = {k: v for k, v in batch.items() if isinstance(v, list) or (isinstance(v, Tensor) and v.ndim == 1)}
        facts |= {f"has_{name}": [True] * len(batch[name]) for name in IMAGES if name in batch}
        values = torch.cat([output["part_losses"].float(), output["gradient_norm"].reshape(1).float()])
        self._kept.append((engine.state.iteration, engine.state.epoch, facts, values, output["task_losses"]))

    def look(self, engine: MultiTaskTrainer) -> None:
        """Read what the steps since the last look have come to.

        Raises:
            FloatingPointError: after ``max_in_row`` steps in a row that were not finite.
        """
        kept, self._kept = self._kept, []
        if not kept:
            return
        # A scaled loss may overflow in its gradients: the scaler leaves that step out and scales less.
        overflow_is_normal = engine.grad_scaler.is_enabled()
        for row, (iteration, epoch, facts, _, tasks) in zip(
            torch.stack([v for _, _, _, v, _ in kept]).tolist(), kept, strict=True
        ):
            *losses, norm = row
            bad = not all(math.isfinite(loss) for loss in losses)
            if not bad and (overflow_is_normal or math.isfinite(norm)):
                self.in_row = 0
                continue
            self.in_row += 1
            self._report(engine, iteration, epoch, facts, losses, norm, tasks)
            if self.in_row >= self.max_in_row:
                found = f"{self.in_row} steps in a row up to iteration {iteration} where it is not"
                raise FloatingPointError(
                    f"training: the loss must be finite, found {found}: see {self.output_dir}/nonfinite_*.json"
                )

    def _report(
        self,
        engine: MultiTaskTrainer,
        iteration: int,
        epoch: int,
        facts: Mapping[str, Any],
        losses: list[float],
        norm: float,
        tasks: Mapping[str, Tensor],
    ) -> None:
        parts = split_batch(facts, engine.accumulation) if facts else []
        here = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        samples = [self._describe_sample(parts[i], place) for i in here for place in range(_length(parts[i]))]
        named = [name for name, value in tasks.items() if not math.isfinite(float(value))]
        content = {
            "iteration": iteration,
            "epoch": epoch,
            "rank": idist.get_rank(),
            "losses_of_parts": [str(loss) for loss in losses],
            "gradient_norm": str(norm),
            "tasks": named,
            "samples": samples,
        }
        path = self.output_dir / f"nonfinite_{iteration:08d}_rank{idist.get_rank()}.json"
        self.output_dir.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        beside.replace(path)
        who = "; ".join(f"{s['subject']}, seed {s['seed']} ({s['summary']})" for s in samples) or "another process"
        what = f"loss of {', '.join(named)}" if named else "gradient"
        logger.warning("iteration %d: the %s is not finite: %s; step left out, see %s", iteration, what, who, path)

    def _describe_sample(self, part: Mapping[str, Any], place: int) -> dict[str, Any]:
        facts = {key: value[place] for key, value in part.items()}
        seed, protocol = facts.get("seed"), facts.get("generation_protocol")
        known: dict[str, Any] = {
            "subject": Path(str(facts.get("subject", "a subject"))).name,
            "seed": None if seed is None else int(seed),
        }
        known |= {"generation_protocol": protocol}
        known["available"] = {k: bool(v) for k, v in facts.items() if k.startswith("available_")}
        if seed is None:
            return {**known, "summary": "drawn without a seed"}
        # The numbers are drawn on the host, whatever the device of the training.
        subject = {"generation_labels": torch.zeros(1)} | {
            k: v.reshape(1) for k, v in facts.items() if k.startswith("available_")
        }
        subject |= {name: torch.zeros(1) for name in IMAGES if f"has_{name}" in facts}
        params = self.synthesizer.draw({k: v.cpu() for k, v in subject.items()}, [int(seed)], protocol)
        summaries = [", ".join(describe(params, i).splitlines()) for i in range(len(params.appearances))]
        drawn = {"geometry": _list(params.geometry), "appearances": [_list(a) for a in params.appearances]}
        return {**known, "summary": " | ".join(summaries), "drawn": drawn}


def _length(part: Mapping[str, Any]) -> int:
    return len(next(iter(part.values())))


def _list(params: Any) -> dict[str, Any]:
    """Fields of a draw as JSON; of large ones the shape."""
    return {field.name: _plain(getattr(params, field.name)) for field in dataclasses.fields(params)}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= LARGEST_LISTED else f"shape {tuple(value.shape)}"
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
