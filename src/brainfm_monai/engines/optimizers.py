"""Muon for the kernels of convolutions, AdamW for everything else, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

__all__ = ["MuonAdamW", "orthogonalise"]

# Of the quintic iteration, chosen by its author so that singular values come near 1 fast, and not to 1 exactly.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7


def orthogonalise(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1, by five steps of a Newton-Schulz iteration.

    The steps multiply the matrix by polynomials of its Gram matrix, which commute: they are taken on the (small) Gram matrix, and
    the matrix is multiplied once.

    Args:
        matrix: shape (N, M).

    Returns:
        Same shape, float32; singular values that were not negligible lie between 0.6 and 1.3.

    Reference:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + EPS)
    gram = x @ x.T
    identity = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    product = identity
    for _ in range(NEWTON_SCHULZ_STEPS):
        factor = a * identity + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x.T if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Steps of orthogonal matrices for hidden convolutions, those of AdamW for biases, norms, the head and what sees the image.

    torch's own Muon takes matrices alone; a kernel (O, I, h, w, d) is one of shape (O, I h w d) here.

    Args:
        network: its parameters are optimised; kernels of ``network.backbone`` with more than one input channel by Muon.
        lr: learning rate of AdamW.
        kernel_lr: learning rate of Muon, whose steps change a kernel by so much of a matrix with singular values near 1.
        momentum: of Muon.
        betas: of AdamW.
        weight_decay: of both, decoupled from the gradient.

    Raises:
        ValueError: if a rate is negative.

    Reference:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024; Loshchilov and Hutter, Decoupled weight
        decay regularization, ICLR 2019.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 2e-3,
        kernel_lr: float = 0.02,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        for name, rate in (("lr", lr), ("kernel_lr", kernel_lr)):
            if rate < 0:
                raise ValueError(f"MuonAdamW: '{name}' must not be negative, got {rate}")
        kernels, others = _divide(network.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": kernels, "lr": kernel_lr, "muon": True},
            {"params": others, "lr": lr, "muon": False},
        ]
        defaults = {"momentum": momentum, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._step_kernels if group["muon"] else self._step_others)(parameters, group)
        return loss

    def _step_kernels(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            assert p.grad is not None
            if not self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
            average = self.state[p]["average"]
            average.lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(average, group["momentum"]).flatten(1)
            # A step of a kernel with more outputs than inputs is as large for each output as one with as many.
            size = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(orthogonalise(ahead).reshape(p.shape), alpha=-group["lr"] * size)

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["mean"] for s in states],
            [s["square"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def _divide(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Kernels inside the backbone, and the rest; what is frozen is neither."""
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in parameters:
        if p.requires_grad:
            inside = name.startswith("backbone.") and p.ndim > 2 and p.shape[1] > 1
            (kernels if inside else others).append(p)
    return kernels, others
