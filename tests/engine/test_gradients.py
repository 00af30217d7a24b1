"""engine/gradients.py: the mean over replicas, and that all of them hear of what is not finite.

The replicas are threads of this process, which meet to add up what they have.
"""

import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.gradients import GradientReducer

TIMEOUT_S = 60
SIZES = pytest.mark.parametrize("size", [2, 3, 5])
Spoil = Callable[[int, Tensor, list[Tensor]], Tensor]


class Exchange(NamedTuple):
    """What `GradientReducer` needs of a world."""

    size: int
    all_reduce_: Callable[[Tensor], None]


class Replicas:
    """Copies of a network, each with images of its own.

    Args:
        size: how many there are.
        dtype: of their parameters.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float64):
        first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
        first = first.to(dtype, memory_format=torch.channels_last)
        self.models = [copy.deepcopy(first) for _ in range(size)]
        self.images = torch.randn(size, 7, 3, 6, 6, dtype=dtype)
        self.targets = torch.randint(5, (size, 7))
        self.sums = 0  # reductions so far
        self._barrier, self._slots = threading.Barrier(size), [None] * size
        self.reducers = [
            GradientReducer(list(model.parameters()), Exchange(size, self._sum_of(rank)))
            for rank, model in enumerate(self.models)
        ]

    def _sum_of(self, rank: int) -> Callable[[Tensor], None]:
        def all_reduce_(tensor: Tensor) -> None:
            assert tensor.is_contiguous()
            self._slots[rank] = tensor.clone()
            self._barrier.wait(TIMEOUT_S)
            tensor.copy_(torch.stack(self._slots).sum(dim=0))
            self.sums += rank == 0
            self._barrier.wait(TIMEOUT_S)

        return all_reduce_

    def loss(self, rank: int, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.images[rank]), self.targets[rank])

    def apart(self) -> list[list[Tensor]]:
        """The gradients of each replica, computed one after the other in copies."""
        found = []
        for rank, model in enumerate(copy.deepcopy(self.models)):
            parameters = list(model.parameters())
            found.append(torch.autograd.grad(self.loss(rank, model), parameters))
        return found

    def together(self, spoil: Spoil | None = None) -> list[tuple[bool, bool]]:
        """Backward in each replica, then `GradientReducer.reduce`: what that says to each.

        Args:
            spoil: given a rank, its loss and its gradients, changes these and returns the loss.
        """

        def work(rank: int) -> tuple[bool, bool]:
            model = self.models[rank]
            model.zero_grad(set_to_none=True)
            loss = self.loss(rank, model)
            loss.backward()
            if spoil:
                loss = spoil(rank, loss.detach(), [p.grad for p in model.parameters()])
            finite_loss, finite_gradients = self.reducers[rank].reduce(loss)
            assert finite_loss.dtype == finite_gradients.dtype == torch.bool
            return finite_loss.item(), finite_gradients.item()

        with ThreadPoolExecutor(len(self.models)) as pool:
            return list(pool.map(work, range(len(self.models))))

    def found(self) -> list[list[Tensor]]:
        """The gradients that each replica now has."""
        return [[p.grad for p in model.parameters()] for model in self.models]


def relative_difference(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest, over that of the largest value."""
    largest = max(tensor.abs().max() for tensor in theirs)
    pairs = zip(mine, theirs, strict=True)
    return max((a - b).abs().max() / largest for a, b in pairs).item()


# ------------------------------------------------------------------------------------------ means


@SIZES
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_every_replica_gets_the_mean_gradient_in_one_reduction(size, dtype, limit):
    replicas = Replicas(size, dtype)
    apart = replicas.apart()
    mean = [torch.stack(alike).mean(dim=0) for alike in zip(*apart, strict=True)]
    assert replicas.together() == [(True, True)] * size
    assert replicas.sums == 1
    for found in replicas.found():
        assert relative_difference(found, mean) < limit
        assert all(map(torch.equal, found, replicas.found()[0]))
    # The twins: what one replica has alone, and the sum.
    assert relative_difference(apart[0], mean) > 0.1
    assert relative_difference([size * one for one in mean], mean) > 0.9


def test_a_second_step_does_not_remember_the_first():
    replicas = Replicas(3)
    replicas.together()
    first = [gradient.clone() for gradient in replicas.found()[0]]
    replicas.images = replicas.images.flip(0) + 1
    mean = [torch.stack(alike).mean(dim=0) for alike in zip(*replicas.apart(), strict=True)]
    replicas.together()
    assert relative_difference(replicas.found()[1], mean) < 1e-14
    assert relative_difference(first, mean) > 0.1


def test_gradients_lie_in_memory_as_their_parameters_do():
    replicas = Replicas(2)
    replicas.together()
    for model in replicas.models:
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
        assert not model[0].weight.is_contiguous()  # else nothing would have been seen


def test_replicas_that_step_by_the_mean_stay_alike_and_go_where_one_process_goes():
    # The fused kernel reads gradients, weights and momentum one after the other in memory.
    replicas = Replicas(2)
    want = copy.deepcopy(replicas.models[0])
    for parameter, *apart in zip(want.parameters(), *replicas.apart(), strict=True):
        parameter.grad = torch.stack(apart).mean(dim=0).contiguous()
    torch.optim.SGD(want.parameters(), lr=0.1).step()
    replicas.together()
    for model in replicas.models:
        torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
        for mine, theirs in zip(model.parameters(), want.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_loss_that_is_not_finite_in_one_replica_is_known_to_all(rank, value):
    def spoil(mine: int, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        return torch.full_like(loss, value) if mine == rank else loss

    assert Replicas(3).together(spoil) == [(False, True)] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("parameter", range(6))
def test_one_number_that_is_not_finite_in_one_replica_is_known_to_all(parameter, rank, value):
    def spoil(mine: int, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        if mine == rank:
            gradients[parameter][(-1,) * gradients[parameter].dim()] = value
        return loss

    assert Replicas(3).together(spoil) == [(True, False)] * 3


def test_infinities_that_would_cancel_out_are_seen():
    def spoil(mine: int, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        gradients[0][0, 0, 0, 0] = math.inf if mine else -math.inf
        return torch.full_like(loss, -math.inf if mine else math.inf)

    assert Replicas(2).together(spoil) == [(False, False)] * 2


def test_large_numbers_are_finite():
    def spoil(mine: int, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        gradients[0].fill_(1e30)
        return torch.full_like(loss, 1e30)

    assert Replicas(3, torch.float32).together(spoil) == [(True, True)] * 3


# -------------------------------------------------------------------------------- one replica alone


def alone(spoil: Callable[[list[Tensor]], None] = lambda gradients: None) -> list[bool]:
    """What is said of the loss and the gradients of one replica, which must stay as they are."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    model.to(memory_format=torch.channels_last)
    loss = model(torch.randn(7, 3, 6, 6)).square().mean()
    loss.backward()
    spoil([p.grad for p in model.parameters()])
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    reducer = GradientReducer(list(model.parameters()), Exchange(1, pytest.fail))
    finite = [one.item() for one in reducer.reduce(loss)]
    for parameter, (gradient, values) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient.nan_to_num(9), values.nan_to_num(9))
    return finite


def test_one_replica_keeps_its_gradients_as_they_are():
    assert alone() == [True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("parameter", range(4))
def test_one_replica_hears_of_its_own_number_that_is_not_finite(parameter, value):
    def spoil(gradients: list[Tensor]) -> None:
        gradients[parameter][(-1,) * gradients[parameter].dim()] = value

    assert alone(spoil) == [True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_replica_hears_of_its_own_loss(value):
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    finite_loss, finite_gradients = GradientReducer([parameter], Exchange(1, pytest.fail)).reduce(
        torch.tensor(value)
    )
    assert (finite_loss.item(), finite_gradients.item()) == (False, True)
