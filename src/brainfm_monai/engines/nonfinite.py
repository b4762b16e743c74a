"""A loss that is not finite: which subject, which seed, what was drawn; and the end of a training that diverges."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from brainfm_monai.engines.trainer import MultiTaskTrainer, split_batch
from brainfm_monai.io import write_text
from brainfm_monai.synthesis import Synthesizer, describe

logger = logging.getLogger(__name__)

LARGEST_LISTED = 512  # numbers of a drawn quantity in the JSON file; of larger ones, as noise, the shape is written


@dataclass(eq=False)
class NonFiniteStop:
    """Reports the samples of steps that were left out because they were not finite, and stops after several in a row.

    For each such step one line is logged and ``nonfinite_<iteration>_rank<rank>.json`` written, which has all that was
    drawn; ``Synthesizer(...)(subject, [seed], generation_protocol)`` draws the sample again. Processes stop together.
    """

    synthesizer: Synthesizer  # of the training
    output_dir: str | Path  # folder of the files
    max_in_row: int = 10  # steps after which the training stops
    interval: int = 1  # iterations between two looks, because each look waits for the device
    in_row: int = field(default=0, init=False)  # steps so far
    _steps: list[tuple[int, dict[str, Any], Tensor, dict[str, Tensor]]] = field(default_factory=list, init=False)

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`MultiTaskTrainer`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.remember)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.look)

    def remember(self, engine: MultiTaskTrainer) -> None:
        """Keep losses and norm of a step, and its batch without the volumes, until the next look."""
        output, batch = engine.state.output, engine.state.batch
        facts = {k: v for k, v in batch.items() if isinstance(v, list) or (isinstance(v, Tensor) and v.ndim == 1)}
        values = torch.cat([output["part_losses"].float(), output["gradient_norm"].reshape(1).float()])
        self._steps.append((engine.state.iteration, facts, values, output["task_losses"]))

    def look(self, engine: MultiTaskTrainer) -> None:
        """Read losses and norms since the last look; FloatingPointError after ``max_in_row`` bad steps in a row."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        values = torch.stack([values for _, _, values, _ in steps])
        # A scaled loss may overflow in its gradients: the scaler leaves that step out and scales less.
        judged = values[:, :-1] if engine.grad_scaler.is_enabled() else values
        bad = (~judged.isfinite()).any(1).float()
        if idist.get_world_size() > 1:  # a loss of one process is enough for all, or the others would wait for it
            bad = cast(Tensor, idist.all_reduce(bad))
        for (iteration, facts, _, tasks), row, is_bad in zip(steps, values.tolist(), (bad > 0).tolist(), strict=True):
            self.in_row = self.in_row + 1 if is_bad else 0
            if is_bad:
                self._report(engine, iteration, facts, row, tasks)
            if self.in_row >= self.max_in_row:
                found = f"{self.in_row} steps in a row up to iteration {iteration} where it is not"
                report = f"{Path(self.output_dir)}/nonfinite_*.json"
                raise FloatingPointError(f"training: the loss must be finite, found {found}: see {report}")

    def _report(
        self, engine: MultiTaskTrainer, iteration: int, facts: dict[str, Any], row: list[float],
        tasks: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        *losses, norm = row
        parts = split_batch(facts, engine.accumulation) if facts else []
        bad_parts = [part for part, loss in zip(parts, losses, strict=True) if not math.isfinite(loss)]
        samples = [self._describe(part, i) for part in bad_parts for i in range(len(next(iter(part.values()))))]
        named = [name for name, value in tasks.items() if not math.isfinite(float(value))]
        content = {"iteration": iteration, "rank": idist.get_rank(), "losses_of_parts": [str(loss) for loss in losses]}
        content |= {"gradient_norm": str(norm), "tasks": named, "samples": samples}

        def shorten(value: Tensor) -> Any:
            return value.tolist() if value.numel() <= LARGEST_LISTED else f"shape {tuple(value.shape)}"

        path = Path(self.output_dir) / f"nonfinite_{iteration:08d}_rank{idist.get_rank()}.json"
        write_text(path, json.dumps(content, indent=1, default=shorten))
        who = "; ".join(f"{s['subject']}, seed {s['seed']} ({s['summary']})" for s in samples) or "another process"
        what = f"loss of {', '.join(named)}" if named else "gradient"
        logger.warning("iteration %d: the %s is not finite: %s; step left out, see %s", iteration, what, who, path)

    def _describe(self, part: Mapping[str, Any], index: int) -> dict[str, Any]:
        facts = {key: value[index] for key, value in part.items()}
        flags = {key: value.reshape(1).cpu() for key, value in facts.items() if isinstance(value, Tensor)}
        seed, protocol = int(flags.pop("seed")), facts.get("generation_protocol")
        params = self.synthesizer.draw(flags, [seed], protocol, device="cpu")
        summary = " | ".join(", ".join(describe(params, i).splitlines()) for i in range(len(params.appearances)))
        drawn = {"geometry": vars(params.geometry), "appearances": [vars(a) for a in params.appearances]}
        values = {key: float(value) for key, value in flags.items()}
        return {
            "subject": facts["subject"], "seed": seed, "generation_protocol": protocol, "flags": values,
            "summary": summary, "drawn": drawn,
        }  # fmt: skip
