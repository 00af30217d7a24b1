"""Test kernels/dropout.py: masks look random, are scaled, and follow from seed and layer_id."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import models.factory
from kernels.dropout import DropoutSpec, draw_seed
from models.dense_block import DenseBlock, Dropout, apply_dropout
from models.densenet import Transition

SHAPE = (16, 16, 16, 32)  # 131,072 values: fractions have a deviation of at most 0.14 %
SIGMAS = 5  # a fair test of this kind fails by chance once in two million times


def seed(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int32)


def kept(
    rate: float = 0.3, number: int = 1, layer_id: int = 0, shape=SHAPE, start: int = 0
) -> Tensor:
    """Return the mask as booleans: True where a value is kept."""
    return DropoutSpec(rate, seed(number), layer_id).mask(torch.ones(shape), start) != 0


def correlation(left: Tensor, right: Tensor) -> float:
    """Return the correlation in standard deviations of that of independent values."""
    left, right = (x.double() - x.double().mean() for x in (left.flatten(), right.flatten()))
    return ((left * right).mean() / left.std() / right.std() * math.sqrt(left.numel())).item()


# Values:
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("number", "layer_id"), [(0, 0), (1, 77), (2**31 - 2, 1), (5, 10**12)])
def test_the_fraction_of_dropped_values_is_the_rate(rate, number, layer_id):
    dropped = ~kept(rate, number, layer_id)
    std = math.sqrt(rate * (1 - rate) / dropped.numel())
    assert abs(dropped.double().mean().item() - rate) < SIGMAS * std
    assert abs(dropped.double().mean().item() - 1.2 * rate) > SIGMAS * std


@pytest.mark.parametrize("axis", range(4))
def test_no_image_row_column_or_channel_is_dropped_more_than_others(axis):
    rate = 0.3
    fractions = (~kept(rate)).double().mean(dim=[i for i in range(4) if i != axis])
    std = math.sqrt(rate * (1 - rate) / (math.prod(SHAPE) / SHAPE[axis]))
    scores = (fractions - rate) / std
    assert scores.abs().max() < SIGMAS
    assert 0.3 < scores.std() < 2  # spread as chance does, neither more nor less


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_values_are_divided_by_the_probability_to_be_kept(dtype):
    x = torch.randn(SHAPE, dtype=dtype)
    mask = DropoutSpec(0.3, seed(1), 0).mask(x)
    assert (mask.dtype, mask.shape) == (dtype, x.shape)
    assert set(mask.unique().tolist()) == {0, torch.tensor(1 / 0.7, dtype=dtype).item()}
    assert torch.equal(mask != 0, kept(0.3))  # the same values whatever the precision


# Independence:
@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("layers", {"layer_id": 0}, {"layer_id": 1}),
        ("distant layers", {"layer_id": 3}, {"layer_id": 64}),
        ("seeds", {"number": 1}, {"number": 2}),
        ("seeds a power of two apart", {"number": 5}, {"number": 5 + 2**20}),
        ("images", {}, {"start": SHAPE[0]}),
        ("seed and layer_id exchanged", {"number": 1, "layer_id": 2}, {"number": 2, "layer_id": 1}),
    ],
)
def test_masks_are_independent_of_each_other(name, left, right):
    left, right = kept(**left), kept(**right)
    assert not torch.equal(left, right)
    assert abs(correlation(left, right)) < SIGMAS
    assert correlation(left, left) > 100  # what the same mask would give


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("distance", [1, 2, 4, 8])
def test_neighbours_are_independent(axis, distance):
    mask = kept()
    length = SHAPE[axis] - distance
    near, far = mask.narrow(axis, 0, length), mask.narrow(axis, distance, length)
    assert abs(correlation(near, far)) < SIGMAS


def test_one_value_is_dropped_independently_from_step_to_step():
    # One small mask under many seeds, as successive steps draw them.
    masks = torch.stack([kept(0.5, number, shape=(1, 1, 1, 8)).flatten() for number in range(1000)])
    scores = (masks.double().mean(0) - 0.5) / math.sqrt(0.25 / len(masks))
    assert scores.abs().max() < SIGMAS
    assert abs(correlation(masks[:-1], masks[1:])) < SIGMAS


# Tiles and overflow:
@pytest.mark.parametrize(("offset", "start", "stop"), [(0, 0, 3), (0, 3, 6), (4, 0, 2), (4, 2, 3)])
def test_the_mask_of_a_part_is_the_slice_of_the_mask_of_the_batch(offset, start, stop):
    shape = (7, 5, 3, 11)
    whole = kept(shape=shape)
    dropout = DropoutSpec(0.3, seed(1), 0, offset)  # a process's batch begins at image `offset`
    part = dropout.mask(torch.ones(stop - start, *shape[1:]), start) != 0
    assert torch.equal(part, whole[offset + start : offset + stop])
    assert not torch.equal(part, whole[offset + start + 1 : offset + stop + 1])


def test_a_network_takes_its_masks_from_where_its_part_of_the_batch_begins():
    x = torch.ones(5, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    for module in (Dropout(0.3), Transition(4, 4, 0.3)):
        run = module if isinstance(module, Dropout) else module.double()._dropout_avg_pool
        masks = {}
        for name, part, first in (("all", x, None), ("last two", x[3:], 3), ("wrong", x[3:], 2)):
            if first is not None:
                models.factory.attach_shard(module, SimpleNamespace(offset=first), sync_norms=False)
            torch.manual_seed(7)
            out = run(part)
            masks[name] = (out.detach(), torch.autograd.grad(out.sum(), x)[0][-2:])
        for i, mask in enumerate(masks["last two"]):  # forward and backward
            assert torch.equal(mask, masks["all"][i][-2:])
            assert not torch.equal(masks["wrong"][i], mask)


def is_kept(rate: float, number: int, layer_id: int, index: int) -> bool:
    """Hash an index modulo 2^32 in Python's unbounded numbers."""
    bits = 2**32

    def hash32(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % bits
        x = (x ^ (x >> 15)) * 0x846CA68B % bits
        return x ^ (x >> 16)

    key = hash32((number + layer_id * 0x3504F333) % bits)
    return hash32((hash32((index % bits) ^ key) + key) % bits) % 2**24 >= round(rate * 2**24)


@pytest.mark.parametrize("number", [0, 7, 2**31 - 2])
@pytest.mark.parametrize("layer_id", [0, 5, 2**31, 2**40 + 1])
@pytest.mark.parametrize("start", [0, 2**31 - 50, 2**32 - 50, 2**33])
def test_the_mask_is_a_hash_of_the_lowest_32_bits_of_the_index(number, layer_id, start):
    # One value an image, so that `start` is the index.
    mask = kept(0.4, number, layer_id, shape=(100, 1, 1, 1), start=start).flatten().tolist()
    assert mask == [is_kept(0.4, number, layer_id, start + i) for i in range(100)]
    assert mask != [is_kept(0.4, number, layer_id + 1, start + i) for i in range(100)]


# In the network:
def test_seeds_come_from_the_global_generator_and_are_resumed_with_it():
    state = torch.get_rng_state()
    seeds = [draw_seed(torch.device("cpu")) for _ in range(50)]
    torch.set_rng_state(state)
    assert seeds == [draw_seed(torch.device("cpu")) for _ in range(50)]
    assert all((x.dtype, x.shape, x >= 0) == (torch.int32, (1,), True) for x in seeds)
    assert len(set(map(int, seeds))) == 50


def block(rate: float, level: int = 0) -> DenseBlock:
    return DenseBlock(2, 3, 4, bottleneck=True, drop_rate=rate, memory_level=level)


@pytest.mark.parametrize(("rate", "training", "draws"), [(0.3, True, True), (0.3, False, False),
                                                         (0.0, True, False)])  # fmt: skip
def test_nothing_is_drawn_where_nothing_is_dropped(rate, training, draws):
    for module in (block(rate), Dropout(rate)):
        state = torch.get_rng_state()
        module.train(training)(torch.randn(2, 3, 4, 4, generator=torch.Generator()))
        assert torch.equal(torch.get_rng_state(), state) is not draws


def test_no_two_dropouts_of_a_step_share_a_mask():
    dropouts = block(0.3)
    first, second = (dropouts.dropouts(seed(1), i) for i in (0, 1))
    assert len({dropout.layer_id for dropout in (*first, *second)}) == 4
    assert {dropout.rate for dropout in (*first, *second)} == {0.3}
    assert dropouts.dropouts(None, 0) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_backward_passes_only_where_forward_did(layout):
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    dropout = DropoutSpec(0.3, seed(1), 2)
    out = apply_dropout(x * 1, dropout)
    out.backward(torch.full_like(out, 2.0))
    mask = dropout.mask(torch.ones(3, 5, 6, 4, dtype=torch.float64)).permute(0, 3, 1, 2)
    assert torch.equal(out, x * mask)
    assert torch.equal(x.grad, 2 * mask)  # exactly 0 where dropped
    assert 0 < (x.grad == 0).sum() < x.numel()
    other = DropoutSpec(0.3, seed(1), 3).mask(torch.ones(3, 5, 6, 4)).permute(0, 3, 1, 2)
    assert not torch.equal(x.grad, 2 * other)
    assert apply_dropout(x, None) is x
