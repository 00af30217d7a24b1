"""Test which images each rank gets in each step, and which are held out of training."""

import itertools

import numpy as np
import pytest
import torch

from datasets.batch_sampler import BatchSampler, split_indices
from distributed.launcher import ProcessInfo
from errors import DataError

SIZES = range(1, 6)
EXTENTS = [(n, batch) for n in (1, 2, 3, 7, 8, 12, 13, 23, 30) for batch in (1, 2, 4, 5, 12)]
BOTH = pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])


def samplers(
    n: int, batch: int, size: int, whole: bool, seed: int | None = None
) -> list[BatchSampler]:
    """Return the sampler of each rank, over images that are not simply numbered from 0."""
    indices = 3 * torch.arange(n) + 1
    return [
        BatchSampler(indices, batch, seed, ProcessInfo(rank, size), whole) for rank in range(size)
    ]


def split(ranks: list[BatchSampler], epoch: int = 1) -> list[list[list[int]]]:
    """Return the images of each step and, within it, of each rank."""
    assert len({len(sampler) for sampler in ranks}) == 1  # or some would wait for the others
    orders = [sampler.epoch_indices(epoch) for sampler in ranks]
    return [
        [order[sampler.local_slice(step)].tolist()
         for sampler, order in zip(ranks, orders, strict=True)]
        for step in range(len(ranks[0]))
    ]  # fmt: skip


def reference(images: list[int], batch: int, size: int, whole: bool) -> list[list[list[int]]]:
    """Return the same from the batches of one process: taken whole in turn, or split by numpy."""
    batches = [images[i : i + batch] for i in range(0, len(images), batch)]
    if not whole:
        return [[part.tolist() for part in np.array_split(one, size)] for one in batches]
    batches += [[]] * (-len(batches) % size)
    return [batches[i : i + size] for i in range(0, len(batches), size)]


@BOTH
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [None, 5])
def test_each_rank_has_its_batches_or_its_part_of_each(size, whole, seed):
    for (n, batch), epoch in itertools.product(EXTENTS, (1, 2)):
        order = samplers(n, batch, 1, whole, seed)[0].epoch_indices(epoch).tolist()
        assert sorted(order) == [3 * i + 1 for i in range(n)]
        found = split(samplers(n, batch, size, whole, seed), epoch)
        assert found == reference(order, batch, size, whole), (n, batch)
        if size > 1 and n > 1:
            assert found != reference(order, batch, 1, whole)
        if size > 1 and min(n, batch) > 1:
            assert found != reference(order, batch, size, not whole)


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_full_steps_are_those_in_which_every_rank_has_the_same_number(size, whole):
    # Only these can be replayed: ranks that differ would wait for one another.
    for n, batch in EXTENTS:
        if not whole and batch % size:  # is refused
            continue
        ranks = samplers(n, batch, size, whole)
        full = [all(len(part) == ranks[0].local_batch for part in step) for step in split(ranks)]
        for sampler in ranks:
            assert full == [step < sampler.full_steps for step in range(len(sampler))], (n, batch)
            assert sampler.global_batch == size * sampler.local_batch
            assert sampler.global_batch == batch * (size if whole else 1)
            assert sampler.num_images == n


@BOTH
def test_any_rank_can_list_the_images_of_a_step(whole):
    ranks = samplers(23, 4, 3, whole, seed=2)
    for step, parts in enumerate(split(ranks, epoch=9)):
        for sampler in ranks:
            assert sampler.step_indices(9, step) == [*itertools.chain.from_iterable(parts)]
            assert sampler.step_indices(8, step) != sampler.step_indices(9, step)


def test_the_order_belongs_to_seed_and_epoch_and_to_nothing_else():
    def order(seed: int | None, epoch: int, batch_size: int = 4, **more) -> list[int]:
        torch.rand(3)  # other draws of the process make no difference
        sampler = BatchSampler(torch.arange(40), batch_size, seed, **more)
        return sampler.epoch_indices(epoch).tolist()

    wanted = order(7, 3)
    assert sorted(wanted) == list(range(40)) != wanted
    for more in (
        {"batch_size": 9},
        {"process": ProcessInfo(1, 2)},
        {"process": ProcessInfo(2, 3), "whole_batches": True},
    ):
        assert order(7, 3, **more) == wanted
    assert len({tuple(order(seed, epoch)) for seed in (7, 8) for epoch in (3, 4)}) == 4
    assert order(None, 3) == order(None, 4) == list(range(40))


def test_a_sampler_on_another_device_differs_in_nothing_else():
    sampler = BatchSampler(torch.arange(9), 4, seed=1, process=ProcessInfo(1, 2))
    moved = sampler.to(torch.device("meta"))
    assert moved.indices.is_meta and not sampler.indices.is_meta
    for name in ("batch_size", "seed", "process", "whole_batches", "num_images", "full_steps"):
        assert getattr(moved, name) == getattr(sampler, name)


@pytest.mark.parametrize("held_out", [0, 1, 30, 99])
def test_a_split_is_disjoint_complete_in_order_and_belongs_to_its_seed(held_out):
    kept, out = (part.tolist() for part in split_indices(100, held_out, seed=0))
    assert len(out) == held_out and sorted([*kept, *out]) == list(range(100))
    assert kept == sorted(kept) and out == sorted(out)
    assert split_indices(100, held_out, seed=0)[1].tolist() == out
    if held_out:
        assert split_indices(100, held_out, seed=1)[1].tolist() != out != list(range(held_out))


@pytest.mark.parametrize("held_out", [100, 101])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(held_out):
    with pytest.raises(DataError) as error:
        split_indices(100, held_out, seed=0)
    assert error.value.report() == (
        f"error: validSize {held_out} of 100 training images leaves none; fix: use less than 100"
    )
