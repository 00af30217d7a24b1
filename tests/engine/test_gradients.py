"""Test that GradientReducer averages over processes, and tells all of a non-finite value in one."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from engine.gradients import GradientReducer

SHAPES = [(4, 3, 3, 3), (4,), (5, 64)]
BAD = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


class Exchange(NamedTuple):
    """Provide the part of a world that `GradientReducer` needs."""

    size: int
    all_reduce_: Callable[[Tensor], None]


def draw(size: int, dtype: torch.dtype = torch.float64) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Draw the gradients of each process, 4-d ones channels last, and its loss."""
    gradients = [[torch.randn(shape, dtype=dtype) for shape in SHAPES] for _ in range(size)]
    for local in gradients:
        local[0] = local[0].to(memory_format=torch.channels_last)
    return gradients, [torch.rand((), dtype=dtype) for _ in range(size)]


def reduce_in_one(
    size: int, gradients: list[Tensor], loss: Tensor, all_reduce_: Callable[[Tensor], None]
) -> tuple[list[bool], list[Tensor]]:
    """Return one process's second step: whether loss and gradients are finite, and these."""
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    exchanges = iter([lambda tensor: None, all_reduce_])
    reducer = GradientReducer(parameters, Exchange(size, lambda tensor: next(exchanges)(tensor)))
    for step_gradients in ([torch.ones_like(gradient) for gradient in gradients], gradients):
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient.clone()
        finite = reducer.reduce(loss)
    assert all(one.dtype == torch.bool for one in finite)
    return [one.item() for one in finite], [parameter.grad for parameter in parameters]


def reduce_in_all(gradients: list[list[Tensor]], losses: list[Tensor]) -> list:
    """Do the same in every process: first all send their gradients, then all get the sum."""
    sent, size = [], len(losses)
    for local, loss in zip(gradients, losses, strict=True):
        reduce_in_one(size, local, loss, lambda tensor: sent.append(tensor.clone()))
    assert len(sent) == size  # one exchange in each
    total = torch.stack(sent).sum(dim=0)
    return [
        reduce_in_one(size, local, loss, lambda tensor: tensor.copy_(total))
        for local, loss in zip(gradients, losses, strict=True)
    ]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_every_process_gets_the_mean_gradient_in_the_memory_format_of_the_parameter(
    size, dtype, limit
):
    gradients, losses = draw(size, dtype)
    means = [torch.stack(alike).mean(dim=0) for alike in zip(*gradients, strict=True)]
    for finite, found in reduce_in_all(gradients, losses):
        assert finite == [True, True]
        for got, mean, own in zip(found, means, gradients[0], strict=True):
            torch.testing.assert_close(got, mean, rtol=0, atol=limit)
            assert (own - mean).abs().max() > 0.1  # its own gradient would have been seen
            assert got.stride() == own.stride()
        assert not found[0].is_contiguous()


@BAD
@pytest.mark.parametrize("rank", [0, 2])
def test_a_loss_that_is_not_finite_in_one_process_is_known_to_all(rank, value):
    gradients, losses = draw(3)
    losses[rank].fill_(value)
    assert [finite for finite, _ in reduce_in_all(gradients, losses)] == [[False, True]] * 3


@BAD
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_a_gradient_with_one_bad_number_in_one_process_is_known_to_all(index, size, value):
    gradients, losses = draw(size)
    gradients[-1][index][(-1,) * len(SHAPES[index])] = value
    found = [alone(gradients[0], losses[0])] if size == 1 else reduce_in_all(gradients, losses)
    assert [finite for finite, _ in found] == [[True, False]] * size


def test_infinities_that_would_cancel_out_are_seen():
    gradients, losses = draw(2)
    for rank, sign in enumerate((1, -1)):
        gradients[rank][0][0, 0, 0, 0] = sign * math.inf
        losses[rank].fill_(-sign * math.inf)
    assert [finite for finite, _ in reduce_in_all(gradients, losses)] == [[False, False]] * 2


def test_large_numbers_are_finite():
    gradients, losses = draw(3, torch.float32)
    for rank in range(3):
        gradients[rank][0].fill_(1e30)
        losses[rank].fill_(1e30)
    assert [finite for finite, _ in reduce_in_all(gradients, losses)] == [[True, True]] * 3


def alone(gradients: list[Tensor], loss: Tensor) -> tuple[list[bool], list[Tensor]]:
    return reduce_in_one(1, gradients, loss, pytest.fail)


@pytest.mark.parametrize("size", [1, 2])
def test_a_dropped_layer_goes_on_by_momentum_and_weight_decay(size):
    """Three steps of fused SGD on x^2; the second one drops the layer."""

    def move(reducing: bool) -> float:
        weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        reducer = GradientReducer([weight], Exchange(size, lambda bucket: bucket.mul_(size)))
        sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
        for is_dropped in (False, True, False):
            sgd.zero_grad(set_to_none=True)
            if not is_dropped:
                (weight**2).sum().backward()
            if reducing:
                assert all(finite.item() for finite in reducer.reduce(torch.zeros(())))
            sgd.step()
        return weight.item()

    x, v = 2.0, 0.0
    for slope in (2, 0, 2):
        v = 0.9 * v + slope * x + 0.01 * x
        x -= 0.1 * v
    assert move(reducing=True) == pytest.approx(x, rel=1e-14)
    assert abs(move(reducing=False) - x) > 0.1  # skipped by the optimizer


@BAD
def test_one_process_exchanges_nothing_and_keeps_its_gradients(value):
    (gradients,), (loss,) = draw(1)
    finite, found = alone(gradients, loss)
    assert finite == [True, True]
    assert all(map(torch.equal, found, gradients))
    assert alone(gradients, torch.full_like(loss, value))[0] == [False, True]
