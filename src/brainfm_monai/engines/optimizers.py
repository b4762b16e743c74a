"""Muon beside AdamW in one optimizer, the learning rate by iterations or minutes, and the average of the weights."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from brainfm_monai.io import refuse_if

# Of the quintic iteration, chosen by its author so that singular values come near 1 fast, and not to 1 exactly.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7
ENDLESS = 10**9  # epochs of a training that its budget ends

Weights = tuple[Tensor, ...] | list[Tensor]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices, (..., N, M), to 0.6 to 1.3 (negligible ones aside), in float32.

    A Newton-Schulz iteration multiplies a matrix by polynomials of its Gram matrix, which commute: they are computed on
    the Gram matrix. ``torch.optim.Muon`` computes them on the matrix, in bfloat16, which most CPUs emulate.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.float()
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    gram = x @ x.mT
    product = identity = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(NEWTON_SCHULZ_STEPS):
        factor = a * identity + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    return product @ x


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose steps are orthogonal matrices for hidden convolutions, not for biases, norms, head and first kernel.

    ``torch.optim.Muon`` takes two-dimensional parameters alone, and the view (O, I h w d) of a kernel (O, I, h, w, d)
    does not exist where the channels of a voxel lie side by side in memory. (Jordan et al., Muon, 2024; Loshchilov and
    Hutter, Decoupled weight decay regularization, ICLR 2019.)

    Kernels of ``network.backbone`` with more than one input channel go by Muon, by steps of ``kernel_lr`` with
    ``momentum``, the others by AdamW with ``lr``; rates are not negative. Steps of a ``fused`` optimizer that are not
    finite are left out without a wait; kernels have no gradient after a step.
    """

    def __init__(
        self, network: nn.Module, lr: float = 2e-3, kernel_lr: float = 0.02, momentum: float = 0.95,
        weight_decay: float = 0.01, fused: bool = False,
    ) -> None:  # fmt: skip
        for name, rate in (("lr", lr), ("kernel_lr", kernel_lr)):
            refuse_if(rate < 0, f"MuonAdamW: '{name}' must not be negative", rate)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        kernels = {n: p for n, p in trained.items() if n.startswith("backbone.") and p.ndim > 2 and p.shape[1] > 1}
        rest = [p for name, p in trained.items() if name not in kernels]
        groups = [{"params": [*kernels.values()], "lr": kernel_lr, "momentum": momentum}, {"params": rest, "lr": lr}]
        super().__init__([g for g in groups if g["params"]], weight_decay=weight_decay, fused=fused or None)
        if kernels:
            self.register_step_pre_hook(lambda *_: self._step_kernels(self.param_groups[0]))

    @torch.no_grad()
    def _step_kernels(self, group: dict[str, Any]) -> None:
        """Step the kernels, and take their gradients, so that AdamW skips them."""
        device = group["params"][0].device
        finite = torch.as_tensor(1.0 - getattr(self, "found_inf", 0.0), device=device)  # 0: the step changes nothing
        of_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:  # AdamW asks every state for its step when it is loaded
                self.state[p] |= {"step": torch.zeros(()), "average": torch.zeros_like(p)}
            average = self.state[p]["average"]
            gradient = torch.where(finite > 0, p.grad, average)
            average.lerp_(gradient, 1 - group["momentum"])
            ahead = gradient.lerp(average, group["momentum"]).flatten(1)
            of_shape[ahead.shape].append((p, ahead))
            p.grad = None
        for (outputs, inputs), kernels in of_shape.items():
            # A step of a kernel with more outputs than inputs is as large for each output as one with as many.
            size = max(1.0, outputs / inputs) ** 0.5
            steps = orthogonalise(torch.stack([ahead for _, ahead in kernels])) * (finite * size)
            for (p, _), step in zip(kernels, steps, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"] * finite)
                p.add_(step.reshape(p.shape), alpha=-group["lr"])


def make_ema_multi_avg_fn(decay: float) -> Callable[[Weights, Weights, Tensor | int], None]:
    """``multi_avg_fn`` of :class:`torch.optim.swa_utils.AveragedModel` whose first steps forget the start faster.

    Step n keeps at most ``decay``, in [0, 1], else a ValueError, and (1 + n) / (10 + n) (as in TensorFlow).
    """
    refuse_if(not 0 <= decay <= 1, "make_ema_multi_avg_fn: 'decay' must be in [0, 1]", decay)

    @torch.no_grad()
    def update(averaged: Weights, current: Weights, number: Tensor | int) -> None:
        weight = 1 - torch.as_tensor((1 + number) / (10 + number)).clamp(max=decay)
        for average, value in zip(averaged, current, strict=True):
            average.lerp_(value, weight.to(average.dtype))

    return update


@dataclass(eq=False)
class TimeBudget:
    """Ends a training after some minutes of wall-clock time, and says how much of them is used up.

    The clock starts when the object is made; time between two sittings does not count. As much time is kept for the
    last validation as the longest pause between two iterations took so far.
    """

    minutes: float | None = None  # of all sittings together; None: no limit
    elapsed: float = field(default=0.0, init=False)  # seconds
    longest_pause: float = field(default=0.0, init=False)  # seconds
    _since: float = field(default_factory=lambda: time.monotonic(), init=False)
    _started: bool = field(default=False, init=False)

    @property
    def share(self) -> float | None:
        """Share of the budget that is used up, at least 0; None without a budget."""
        return None if self.minutes is None else self.elapsed / max(60 * self.minutes - self.longest_pause, 1e-3)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if self.minutes is not None:
            engine.add_event_handler(Events.STARTED, lambda: setattr(engine.state, "max_epochs", ENDLESS))
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._count, 60 * self.minutes)

    def _count(self, engine: Engine, limit: float) -> None:
        pause = time.monotonic() - self._since
        if idist.get_world_size() > 1:  # all processes take the same step and end together
            pause = cast(float, idist.broadcast(pause, src=0))
        self._since += pause
        self.elapsed += pause
        if self._started:  # the first pause is that of the start-up
            self.longest_pause = max(self.longest_pause, pause)
        self._started = True
        # At the end of an epoch a validation follows, after which there may be no time for another.
        at_end = engine.state.iteration % (engine.state.epoch_length or 1) == 0
        if self.elapsed + (2 if at_end else 1) * self.longest_pause >= limit:
            engine.state.max_epochs = engine.state.epoch
            engine.terminate_epoch()

    def state_dict(self) -> dict[str, float]:
        """Seconds that are used up, and the longest pause between two iterations."""
        return {"elapsed": self.elapsed, "longest_pause": self.longest_pause}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self.elapsed, self.longest_pause = self.elapsed + state["elapsed"], state["longest_pause"]


def make_warmup_stable_decay(
    warmup: int, total: int, decay_fraction: float = 0.2, budget: TimeBudget | None = None
) -> Callable[[int], float]:
    """Factor of the learning rate, in [0, 1], by the iteration from 0: linear warm-up, constant, linear decay to zero.

    It falls in the last ``decay_fraction`` of ``total`` iterations, or of the minutes of a budget.
    """

    def factor(iteration: int) -> float:
        share = None if budget is None else budget.share
        share = iteration / total if share is None else share
        rise, fall = (iteration + 1) / max(warmup, 1), (1 - share) / max(decay_fraction, 1 / total)
        return max(0.0, min(1.0, rise, fall))

    return factor
