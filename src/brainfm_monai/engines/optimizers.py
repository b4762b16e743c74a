"""Muon for the kernels of convolutions and AdamW for everything else, in one optimizer; the law of the weight average."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MuonAdamW", "make_ema_multi_avg_fn", "orthogonalise"]

# Of the quintic iteration, chosen by its author so that singular values come near 1 fast, and not to 1 exactly.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7

Weights = tuple[Tensor, ...] | list[Tensor]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices, (..., N, M), to 0.6 to 1.3 (negligible ones aside), in float32.

    Five steps of a Newton-Schulz iteration multiply a matrix by polynomials of its Gram matrix, which commute: they are computed
    on the (small) Gram matrix, and the matrix is multiplied once. ``torch.optim.Muon`` computes them on the matrix, in bfloat16,
    which most CPUs emulate.

    Reference:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
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
    """AdamW whose steps are orthogonal matrices for hidden convolutions: not for biases, norms, the head and the first kernel.

    ``torch.optim.Muon`` takes two-dimensional parameters alone, and the view (O, I h w d) of a kernel (O, I, h, w, d) does not
    exist where the channels of a voxel lie side by side in memory.

    Args:
        network: its parameters are optimised; kernels of ``network.backbone`` with more than one input channel by Muon.
        lr: learning rate of AdamW.
        kernel_lr: learning rate of Muon, whose steps change a kernel by so much of a matrix with singular values near 1.
        momentum: of Muon.
        weight_decay: of both, decoupled from the gradient.
        fused: see :class:`torch.optim.AdamW`; steps that are not finite are then left out without waiting for the device.

    Raises:
        ValueError: if a rate is negative.

    Reference:
        Jordan et al., Muon, 2024; Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019.
    """

    def __init__(
        self, network: nn.Module, lr: float = 2e-3, kernel_lr: float = 0.02, momentum: float = 0.95,
        weight_decay: float = 0.01, fused: bool = False,
    ) -> None:  # fmt: skip
        for name, rate in (("lr", lr), ("kernel_lr", kernel_lr)):
            if rate < 0:
                raise ValueError(f"MuonAdamW: '{name}' must not be negative, got {rate}")
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        kernels = {n: p for n, p in trained.items() if n.startswith("backbone.") and p.ndim > 2 and p.shape[1] > 1}
        rest = [p for name, p in trained.items() if name not in kernels]
        groups: list[dict[str, Any]] = [
            {"params": list(kernels.values()), "lr": kernel_lr, "momentum": momentum},
            {"params": rest, "lr": lr, "momentum": None},
        ]
        super().__init__([g for g in groups if g["params"]], weight_decay=weight_decay, fused=fused or None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay, and kernels have no gradient afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["momentum"] is not None:
                self._step_kernels(group)
        super().step()
        return loss

    def _step_kernels(self, group: dict[str, Any]) -> None:
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
            p.grad = None  # AdamW skips the kernel
        for (outputs, inputs), kernels in of_shape.items():
            # A step of a kernel with more outputs than inputs is as large for each output as one with as many.
            size = max(1.0, outputs / inputs) ** 0.5
            steps = orthogonalise(torch.stack([ahead for _, ahead in kernels])) * (finite * size)
            for (p, _), step in zip(kernels, steps, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"] * finite)
                p.add_(step.reshape(p.shape), alpha=-group["lr"])


def make_ema_multi_avg_fn(decay: float) -> Callable[[Weights, Weights, Tensor | int], None]:
    """``multi_avg_fn`` of :class:`torch.optim.swa_utils.AveragedModel`: an average whose first steps forget the start faster.

    Step n keeps the smaller of ``decay`` and (1 + n) / (10 + n) of the average, the law of TensorFlow's ExponentialMovingAverage.

    Raises:
        ValueError: if ``decay`` is not in [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"make_ema_multi_avg_fn: 'decay' must be in [0, 1], got {decay}")

    @torch.no_grad()
    def update(averaged: Weights, current: Weights, number: Tensor | int) -> None:
        weight = 1 - torch.as_tensor((1 + number) / (10 + number)).clamp(max=decay)
        for average, value in zip(averaged, current, strict=True):
            average.lerp_(value, weight.to(average.dtype))

    return update
