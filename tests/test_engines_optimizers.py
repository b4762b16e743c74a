"""Muon and AdamW in one optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from brainfm_monai.engines import MuonAdamW, make_ema_multi_avg_fn
from brainfm_monai.engines.optimizers import orthogonalise
from brainfm_monai.networks import AdditiveUNet, MultiTaskNet
from brainfm_monai.tasks import TaskLayout


def network() -> MultiTaskNet:
    """A tiny random network."""
    torch.manual_seed(0)
    return MultiTaskNet(AdditiveUNet(1, (4, 8)), TaskLayout(["distance"]))


def set_gradients(net: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -2, 8 if 8 in shape else 16)) @ v
    found = orthogonalise(matrix)
    inside = u.T @ found @ v.T
    assert found.shape == shape
    assert 0.6 < float(inside.diagonal().min()) <= float(inside.diagonal().max()) < 1.3
    assert float((inside - torch.diag(inside.diagonal())).abs().max()) < 1e-3


def test_the_steps_on_the_gram_matrix_are_those_on_the_matrix() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 30)
    expected = x.double() / x.double().norm()
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalise(x), expected.float(), atol=1e-4, rtol=1e-4)


def test_kernels_are_divided_from_the_rest() -> None:
    net = network()
    assert isinstance(net.backbone, AdditiveUNet)
    net.backbone.encoders[0].requires_grad_(False)
    optimizer = MuonAdamW(net)
    kernels, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    names = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert {id(p) for p in names.values()} == kernels | others
    assert {name for name, p in names.items() if id(p) in kernels} == {
        *(f"backbone.bottom.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)),
        *("backbone.decoders.0.0.conv1.weight", "backbone.decoders.0.0.conv2.weight"),
        *("backbone.down.0.weight", "backbone.up.0.weight"),
    }  # not the stem, which sees the image, and not the head


def test_the_rest_takes_the_steps_of_adamw() -> None:
    ours, theirs = network(), network()
    optimizer = MuonAdamW(ours, lr=0.01, kernel_lr=0.0, weight_decay=0.1)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        for net, steps in ((ours, optimizer), (theirs, other)):
            set_gradients(net, step)
            steps.step()
    kernels = {id(p) for p in optimizer.param_groups[0]["params"]}
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if id(p) not in kernels:
            torch.testing.assert_close(p, q)


def test_a_kernel_steps_along_the_orthogonal_matrix_of_its_averaged_gradient() -> None:
    net = network()
    optimizer = MuonAdamW(net, kernel_lr=0.5, momentum=0.9, weight_decay=0.1)
    kernel = net.get_parameter("backbone.decoders.0.0.conv1.weight")
    before = kernel.detach().clone()
    set_gradients(net, 0)
    assert kernel.grad is not None
    direction = orthogonalise((kernel.grad * (0.1 + 0.9 * 0.1)).flatten(1)).reshape(kernel.shape)
    optimizer.step()
    torch.testing.assert_close(kernel.detach(), before * (1 - 0.05) - 0.5 * direction, atol=1e-5, rtol=1e-5)


def test_it_goes_on_from_its_state() -> None:
    net = network()
    optimizer = MuonAdamW(net)
    set_gradients(net, 0)
    optimizer.step()
    other = copy.deepcopy(net)
    resumed = MuonAdamW(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n, steps in ((net, optimizer), (other, resumed)):
        set_gradients(n, 1)
        steps.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=0, rtol=0)


def test_a_parameter_without_a_gradient_stays() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    MuonAdamW(net).step()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_step_that_is_not_finite_changes_nothing_on_the_device() -> None:
    net = network()
    optimizer = MuonAdamW(net, fused=True, weight_decay=0.1)
    set_gradients(net, 0)
    optimizer.step()
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(net, 1)
    for p in net.parameters():
        assert p.grad is not None
        p.grad.fill_(torch.nan)
    vars(optimizer).update(found_inf=torch.ones(()), grad_scale=None)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for number, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[number][key]) for key, value in values.items())


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    net = network().cuda().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = MuonAdamW(net, fused=True)
    for finite in (True, False, True):
        for p in net.parameters():
            p.grad = torch.ones_like(p) if finite else torch.full_like(p, torch.nan)
        found = torch.zeros((), device="cuda") if finite else torch.ones((), device="cuda")
        vars(optimizer).update(found_inf=found, grad_scale=None)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in net.parameters())


def test_the_layout_of_kernels_in_memory_does_not_matter() -> None:
    plain, last = network(), network().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    for net in (plain, last):
        optimizer = MuonAdamW(net)
        for step in range(2):
            set_gradients(net, step)
            optimizer.step()
    for p, q in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_average_forgets_the_random_start() -> None:
    net = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(net.weight, 0.0)
    average = AveragedModel(net, multi_avg_fn=make_ema_multi_avg_fn(0.99))
    average.update_parameters(net)  # the first is copied
    torch.nn.init.constant_(net.weight, 1.0)
    left = 1.0
    for n in range(1, 2000):
        average.update_parameters(net)
        left *= min(0.99, (1 + n) / (10 + n))
        if n in (1, 10, 1999):
            assert float(average.module.state_dict()["weight"]) == pytest.approx(1 - left, abs=1e-5)
    with pytest.raises(ValueError, match=r"make_ema_multi_avg_fn: 'decay' must be in \[0, 1\], found 2"):
        make_ema_multi_avg_fn(2)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"MuonAdamW: 'kernel_lr' must not be negative, found -1"):
        MuonAdamW(network(), kernel_lr=-1)
