"""Numbered draws of subjects, batches made of them on the device, and the step of a training.

The number of a draw decides its subject and seed, and so its scan. There is no stream of random numbers to store: a
training that resumes at draw n sees what an uninterrupted training would see, and two processes with one subject each
see what one process with two subjects would see.
"""

import copy
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, pairwise
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import PrepareBatch, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys, convert_to_tensor
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset, Sampler

from brainfm_monai.engines.optimizers import TimeBudget
from brainfm_monai.io import refuse_if
from brainfm_monai.networks import MultiTaskNet, checkpoint_activations, parse_precision
from brainfm_monai.synthesis import FLAGS, LARGEST_SEED, SUBJECT_KEYS, Synthesizer

logger = logging.getLogger(__name__)


def hash_key(*key: int | str) -> int:
    """Deterministic 64-bit hash of a key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=2)
def _shuffle(subjects: int, seed: int, number: int) -> list[int]:
    return sorted(range(subjects), key=lambda i: hash_key(seed, number, i))


@dataclass(eq=False)
class DrawnSubjects(Dataset[dict[str, Any]]):
    """The subjects in an endless sequence of shuffled passes, each with the ``seed`` of its draw."""

    data: Sequence[Mapping[str, Any]]  # such as a MONAI CacheDataset of dictionaries; none are a ValueError
    seed: int = 0  # of the sequence

    def __post_init__(self) -> None:
        refuse_if(not len(self.data), "DrawnSubjects: 'data' must hold at least one subject", "none")

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """The subject of a draw, and ``seed``, in [0, LARGEST_SEED); every pass over the subjects takes each once."""
        number, position = divmod(draw, len(self.data))
        subject = self.data[_shuffle(len(self.data), self.seed, number)[position]]
        return {**subject, "seed": hash_key(self.seed, draw) % LARGEST_SEED}


@dataclass(eq=False)
class DrawSampler(Sampler[list[int]]):
    """Numbers of draws, batch after batch, without end: a ``batch_sampler`` for :class:`DrawnSubjects`.

    A step consists of the next draws for all processes together; process r takes the r-th part.
    """

    batch_size: int = 1  # subjects of one process in one step
    rank: int = 0  # of this process
    processes: int = 1
    first: int = field(default=0, init=False)  # the draw at which the next iterator starts

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of numbers, from ``first`` on."""
        for start in count(self.first + self.rank * self.batch_size, self.processes * self.batch_size):
            yield list(range(start, start + self.batch_size))


@dataclass(eq=False)
class SynthesisPrepareBatch(PrepareBatch):
    """Turns a batch of cached subjects into generated scans and their targets, on the engine's device."""

    synthesizer: Synthesizer  # makes scans and targets
    fixed: bool = False  # take the hash of the name in any case

    def seeds(self, batch: Mapping[str, Any]) -> list[int]:
        """The entry ``seed``, or without it, as in a validation, a hash of the subject's name: always the same scan."""
        if "seed" in batch and not self.fixed:
            return [int(seed) for seed in batch["seed"]]
        return [hash_key(str(name)) % LARGEST_SEED for name in batch["subject"]]

    def __call__(
        self, batchdata: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The images, (B S, 1, H, W, D) in [0, 1], and the targets; two generation protocols are a ValueError."""
        plain = {key: convert_to_tensor(batchdata[key], track_meta=False) for key in SUBJECT_KEYS if key in batchdata}
        subject = {key: value.to(device=device, non_blocking=non_blocking) for key, value in plain.items()}
        # Flags decide what is drawn, and numbers are drawn on the host: flags stay there.
        subject |= {key: torch.as_tensor(value).cpu() for key, value in batchdata.items() if key.startswith(FLAGS)}
        protocols = sorted(set(batchdata.get("generation_protocol", [])))
        refuse_if(len(protocols) > 1, "SynthesisPrepareBatch: a batch needs one 'generation_protocol'", protocols)
        targets = self.synthesizer(subject, self.seeds(batchdata), *protocols)
        image = targets.pop("image")
        return image, {key: value.to(image.device, non_blocking=True) for key, value in targets.items()}


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
    # With the channels of a voxel side by side in memory, a step takes 6 % less time in float32 on a CPU, and 18 % more
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
    """MONAI's supervised trainer, without the steps that are not finite, in any of the processes.

    A batch is one step, computed in ``accumulation`` parts, one by one, to save memory. After each iteration
    ``state.output`` has, besides MONAI's keys (image, label and prediction of the last part), ``task_losses``,
    ``gradient_norm`` and ``samples``, the number of scans. Nothing here waits for the device, unless the optimizer is
    not fused. ``state.draws``, which checkpoints keep, counts the draws of all processes: with :class:`DrawSampler` a
    resumed training continues with the right one.

    ``max_norm`` is the positive norm to which larger gradients are scaled down, ``scaler`` that of the loss for
    float16; ``average`` is updated after every step, ``budget`` ends the training, ``options`` are those of MONAI.
    """

    def __init__(
        self, *, accumulation: int = 1, max_norm: float | None = None, scaler: torch.amp.GradScaler | None = None,
        average: AveragedModel | None = None, budget: TimeBudget | None = None, **options: Any,
    ) -> None:  # fmt: skip
        refuse_if(accumulation < 1, "MultiTaskTrainer: 'accumulation' must be positive", accumulation)
        refuse_if(max_norm is not None and max_norm <= 0, "MultiTaskTrainer: 'max_norm' must be positive", max_norm)
        super().__init__(**options)
        self.accumulation, self.max_norm, self.average = accumulation, max_norm, average
        self.grad_scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.state.draws, self.draws_of_step = 0, 0
        self.state_dict_user_keys.append("draws")
        sampler = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(sampler, DrawSampler):  # the iterator that is made after this event starts where the training is
            self.draws_of_step = sampler.processes * sampler.batch_size
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
        size, parts = len(next(iter(batchdata.values()))), split_batch(batchdata, self.accumulation)
        sums, shares, samples = defaultdict[str, Any](float), defaultdict[str, float](float), 0
        for part in parts:
            share = len(next(iter(part.values()))) / size
            # Gradients of all processes are summed once for a step, with those of its last part.
            waits = isinstance(self.network, DistributedDataParallel) and part is not parts[-1]
            with cast(DistributedDataParallel, self.network).no_sync() if waits else nullcontext():
                losses = self._compute_part(part, share)
            samples += len(self.state.output[CommonKeys.IMAGE])
            for name, loss in losses.items():  # of a task: the mean over the parts that have its targets
                sums[name] = sums[name] + share * loss
                shares[name] += share
        means = {name: total / shares[name] for name, total in sums.items()}
        self.state.output |= {CommonKeys.LOSS: means.pop(CommonKeys.LOSS), "task_losses": means}
        self.state.output |= {"gradient_norm": self._step(), "samples": samples}
        if self.average is not None:
            self.average.update_parameters(getattr(self.network, "module", self.network))
        self.state.draws += self.draws_of_step
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return cast(dict[str, Any], self.state.output)

    def _compute_part(self, part: dict[str, Any], share: float) -> dict[str, Tensor]:
        """Losses of a part by task and in all, whose gradients are added to those of the parts before."""
        image, target = self.prepare_batch(part, self.state.device, self.non_blocking, **self.to_kwargs)
        pred = self.inferer(image, self.network)
        loss: Tensor = self.loss_function(pred, target).mean()
        # Where the loss is not finite its gradient might be: a target that is NaN has no slope.
        gradient = torch.where(loss.detach().isfinite(), share, torch.nan).to(loss.dtype)
        self.grad_scaler.scale(loss).backward(gradient)
        self.state.output = {CommonKeys.IMAGE: image, CommonKeys.LABEL: target, CommonKeys.PRED: pred}
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


@dataclass(eq=False)
class NonFiniteStop:
    """Reports subjects and seeds of steps that are left out because they are not finite, and stops after some in a row.

    ``Synthesizer(...)(subject, [seed], generation_protocol)`` draws a sample again. Processes stop together.
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
