"""The step of a training: a batch in parts, gradients of all processes, their norm, and no step that is not finite."""

import copy
import logging
import math
from collections.abc import Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel

from brainfm_monai.engines.batches import DrawSampler
from brainfm_monai.engines.optimizers import TimeBudget
from brainfm_monai.io import refuse_if
from brainfm_monai.networks import MultiTaskNet, checkpoint_activations, parse_precision

logger = logging.getLogger(__name__)


def start_processes(backend: str | None = None) -> None:
    """Join the group of processes that torchrun started, unless this process has joined; nccl with GPUs, else gloo."""
    if idist.backend() is None:
        idist.initialize(backend or ("nccl" if torch.cuda.is_available() else "gloo"))


def check_shards(data: Sized, processes: int) -> None:
    """Check that each process gets a part of the data of the validation; else a ValueError."""
    rule = f"validation: each of {processes} processes needs a subject"
    refuse_if(len(data) < processes, rule, f"{len(data)}: list more or start fewer")


def prepare_for_training(
    network: MultiTaskNet, device: str | torch.device, precision: str | None = None,
    activation_checkpointing: bool = False, compile: bool = False,
) -> MultiTaskNet:  # fmt: skip
    """A copy of a network on a device, for scans in the voxels of its backbone."""
    device = torch.device(device)
    trained = copy.deepcopy(network).to(device)
    # The channels of a voxel lie side by side in memory: a step takes 6 % less time in float32 on a CPU, and 18 % more
    # in bfloat16 (TwoScaleUNet on AVX512).
    if device.type != "cpu" or parse_precision(precision, device) != torch.bfloat16:
        trained = trained.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    trained.stride = 1
    if activation_checkpointing:
        checkpoint_activations(trained)
    if compile:
        trained.compile()
    return trained


def make_grad_scaler(precision: str | None, device: str | torch.device) -> torch.amp.GradScaler:
    """Scaler of the loss for float16, whose gradients would vanish (Micikevicius et al., ICLR 2018); else idle."""
    device = torch.device(device)
    return torch.amp.GradScaler(device.type, enabled=parse_precision(precision, device) == torch.float16)


def split_batch(batch: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """Cut a batch, tensors and lists of length B, along its first axis into at most B parts of nearly equal length."""
    size = len(next(iter(batch.values())))
    parts = min(parts, size)
    bounds = [-(-i * size // parts) for i in range(parts + 1)]
    return [{key: value[a:b] for key, value in batch.items()} for a, b in pairwise(bounds)]


class MultiTaskTrainer(SupervisedTrainer):
    """MONAI's supervised trainer, with one optimizer step for each batch, whatever the parts it is computed in.

    A step that is not finite is left out, in all processes, over which gradients are summed. After each iteration
    ``state.output`` has, besides MONAI's keys (of the last part), ``loss``, the mean of the batch, ``task_losses``,
    ``gradient_norm`` and ``samples``, the number of scans. Nothing here waits for the device, unless the optimizer is
    not fused. ``state.draws``, which checkpoints keep, counts the draws of all processes: with :class:`DrawSampler` a
    resumed training continues with the right one.

    Args:
        accumulation: positive number of parts in which a batch is computed, one by one, to save memory.
        max_norm: positive norm to which larger gradients are scaled down.
        scaler: of the loss, for float16.
        average: average of the network's weights, updated after every step.
        budget: ends the training after its minutes.
        options: arguments of :class:`monai.engines.SupervisedTrainer`.
    """

    def __init__(
        self, *, accumulation: int = 1, max_norm: float | None = None, scaler: torch.amp.GradScaler | None = None,
        average: AveragedModel | None = None, budget: TimeBudget | None = None, **options: Any,
    ) -> None:  # fmt: skip
        for name, value in {"accumulation": accumulation, "max_norm": 1.0 if max_norm is None else max_norm}.items():
            refuse_if(value <= 0, f"MultiTaskTrainer: '{name}' must be positive", value)
        super().__init__(**options)
        self.accumulation, self.max_norm, self.average = accumulation, max_norm, average
        self.grad_scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.state.draws, self.draws_of_step = 0, 0
        self.state_dict_user_keys.append("draws")
        sampler = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(sampler, DrawSampler):  # the iterator that is made after this event starts where the training is
            self.draws_of_step = sampler.step
            self.add_event_handler(Events.EPOCH_STARTED, lambda: setattr(sampler, "first", self.state.draws))
        if budget is not None:
            budget.attach(self)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
        if norms and idist.get_world_size() > 1:
            logger.warning("%d batch normalisations see the scans of one process alone", len(norms))

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> dict[str, Any]:
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = split_batch(batchdata, self.accumulation)
        sizes = [len(next(iter(part.values()))) for part in parts]
        weights, losses, samples = [size / sum(sizes) for size in sizes], [], 0
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True), start=1):
            # Gradients of all processes are summed once for a batch, with those of its last part.
            waits = isinstance(self.network, DistributedDataParallel) and number < len(parts)
            with cast(DistributedDataParallel, self.network).no_sync() if waits else nullcontext():
                losses.append(self._compute_part(part, weight))
            samples += len(self.state.output[CommonKeys.IMAGE])
        means = _average(losses, weights)
        self.state.output |= {CommonKeys.LOSS: means.pop(CommonKeys.LOSS), "task_losses": means, "samples": samples}
        self.state.output["gradient_norm"] = self._step()
        if self.average is not None:
            self.average.update_parameters(getattr(self.network, "module", self.network))
        self.state.draws += self.draws_of_step
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return cast(dict[str, Any], self.state.output)

    def _compute_part(self, part: dict[str, Any], weight: float) -> dict[str, Tensor]:
        """Loss of a part and of its tasks; its gradients are added to those of the parts before."""
        image, target = self.prepare_batch(part, self.state.device, self.non_blocking, **self.to_kwargs)
        pred = self.inferer(image, self.network)
        loss: Tensor = self.loss_function(pred, target).mean()
        self.state.output = {CommonKeys.IMAGE: image, CommonKeys.LABEL: target, CommonKeys.PRED: pred}
        # Where the loss is not finite its gradient might be: a target that is NaN has no slope.
        gradient = torch.where(loss.detach().isfinite(), weight, torch.nan).to(loss.dtype)
        self.grad_scaler.scale(loss).backward(gradient)
        return {CommonKeys.LOSS: loss.detach(), **getattr(self.loss_function, "components", {})}

    def _step(self) -> Tensor:
        """Step the optimizer if all is finite; return the norm of the gradients of all processes before clipping."""
        self.grad_scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.max_norm is not None:
            clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        if not self.grad_scaler.is_enabled():  # a scaler checks the gradients itself
            if self.optimizer.defaults.get("fused"):
                # A fused optimizer reads this number on the device, as a GradScaler sets it.
                vars(self.optimizer).update(found_inf=(~norm.isfinite()).float(), grad_scale=None)
            elif not bool(norm.isfinite()):
                self.optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return norm


def _average(losses: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """Mean of each loss over the parts that have it."""
    means = {}
    for name in dict.fromkeys(name for part in losses for name in part):
        pairs = [(weight, part[name]) for weight, part in zip(weights, losses, strict=True) if name in part]
        means[name] = torch.stack([weight * value for weight, value in pairs]).sum() / sum(w for w, _ in pairs)
    return means


@dataclass(eq=False)
class NonFiniteStop:
    """Reports the samples of steps that were left out because they were not finite, and stops after several in a row.

    One line for each such step has subjects and seeds, by which ``Synthesizer(...)(subject, [seed],
    generation_protocol)`` draws a sample again. Processes stop together.
    """

    max_in_row: int = 10  # steps after which the training stops
    interval: int = 1  # iterations between two looks, because each look waits for the device
    in_row: int = field(default=0, init=False)  # steps so far
    _steps: list[tuple[int, str, Tensor, dict[str, Tensor]]] = field(default_factory=list, init=False)

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`MultiTaskTrainer`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.remember)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval) | Events.EPOCH_COMPLETED, self.look)

    def remember(self, engine: MultiTaskTrainer) -> None:
        """Keep loss, norm and samples of a step until the next look."""
        output, batch = engine.state.output, engine.state.batch
        samples = "; ".join(f"{n}, seed {int(seed)}" for n, seed in zip(batch["subject"], batch["seed"], strict=True))
        values = torch.stack([output[CommonKeys.LOSS].float(), output["gradient_norm"].float()])
        self._steps.append((engine.state.iteration, samples, values, output["task_losses"]))

    def look(self, engine: MultiTaskTrainer) -> None:
        """Read losses and norms since the last look; FloatingPointError after ``max_in_row`` bad steps in a row."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        # A scaled loss may overflow in its gradients: the scaler leaves that step out and scales less.
        judged = torch.stack([values[:1] if engine.grad_scaler.is_enabled() else values for _, _, values, _ in steps])
        bad = (~judged.isfinite()).any(1).float()
        if idist.get_world_size() > 1:  # a loss of one process is enough for all, or the others would wait for it
            bad = cast(Tensor, idist.all_reduce(bad))
        for (iteration, samples, _, tasks), is_bad in zip(steps, (bad > 0).tolist(), strict=True):
            self.in_row = self.in_row + 1 if is_bad else 0
            if is_bad:
                named = [name for name, value in tasks.items() if not math.isfinite(float(value))]
                what = f"loss of {', '.join(named)}" if named else "gradient"
                logger.warning("iteration %d: the %s is not finite: %s; step left out", iteration, what, samples)
            found = f"{self.in_row} steps in a row up to iteration {iteration} where it is not"
            refuse_if(self.in_row >= self.max_in_row, "training: the loss must be finite", found, FloatingPointError)
