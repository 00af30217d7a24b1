"""Which images each replica gets in which step, and which are held out of training."""

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
    """The sampler of each replica, over images that are not simply numbered from 0."""
    indices = 3 * torch.arange(n) + 1
    return [
        BatchSampler(indices, batch, seed, ProcessInfo(rank, size), whole) for rank in range(size)
    ]


def split(replicas: list[BatchSampler], epoch: int = 1) -> list[list[list[int]]]:
    """The images of each step and, within it, of each replica."""
    assert len({len(sampler) for sampler in replicas}) == 1  # or some would wait for ever
    orders = [sampler.epoch_indices(epoch) for sampler in replicas]
    return [
        [
            order[sampler.local_slice(step)].tolist()
            for sampler, order in zip(replicas, orders, strict=True)
        ]
        for step in range(len(replicas[0]))
    ]


def reference(n: int, batch: int, size: int, whole: bool) -> list[list[list[int]]]:
    """The same, from the batches of one process, which are dealt out or cut up by numpy."""
    images = [3 * i + 1 for i in range(n)]
    batches = [images[i : i + batch] for i in range(0, n, batch)]
    if not whole:
        return [[part.tolist() for part in np.array_split(one, size)] for one in batches]
    batches += [[]] * (-len(batches) % size)
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def flatten(parts) -> list:
    return [*itertools.chain.from_iterable(parts)]


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_each_replica_has_its_batches_or_its_part_of_each(size, whole):
    for n, batch in EXTENTS:
        found = split(samplers(n, batch, size, whole))
        assert found == reference(n, batch, size, whole), (n, batch)
        if size > 1 and n > 1:
            assert found != split(samplers(n, batch, 1, whole))


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_every_image_is_dealt_once_and_in_the_order_of_one_process(size, whole):
    for (n, batch), epoch in itertools.product(EXTENTS, (1, 2)):
        found = flatten(flatten(split(samplers(n, batch, size, whole, seed=5), epoch)))
        assert found == samplers(n, batch, 1, whole, seed=5)[0].epoch_indices(epoch).tolist(), (
            n,
            batch,
        )
        assert sorted(found) == [3 * i + 1 for i in range(n)]


@pytest.mark.parametrize("size", SIZES)
def test_a_step_of_training_has_the_same_images_for_every_number_of_replicas(size):
    for n, batch in EXTENTS:
        alone = split(samplers(n, batch, 1, False, seed=5))
        together = split(samplers(n, batch, size, False, seed=5))
        assert [flatten(step) for step in together] == [flatten(step) for step in alone]
        other = split(samplers(n, batch, size, False, seed=6))
        assert n < 7 or [flatten(step) for step in other] != [flatten(step) for step in alone]


@pytest.mark.parametrize("size", SIZES)
def test_every_batch_of_an_evaluation_is_one_of_one_process(size):
    # What is computed of a batch depends on what else is in it, in the last bits.
    for n, batch in EXTENTS:
        alone = flatten(split(samplers(n, batch, 1, True)))
        assert [one for one in flatten(split(samplers(n, batch, size, True))) if one] == alone
        parts = [one for one in flatten(split(samplers(n, batch, size, False))) if one]
        assert (parts != alone) == (size > 1 and min(n, batch) > 1)


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_the_first_replica_is_never_without_an_image_and_parts_are_even(size, whole):
    for n, batch in EXTENTS:
        for step in split(samplers(n, batch, size, whole)):
            counts = [len(part) for part in step]
            assert counts[0] > 0
            assert counts == sorted(counts, reverse=True)
            assert whole or counts[0] - counts[-1] <= 1


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_full_steps_are_those_of_which_every_replica_has_the_same_number(size, whole):
    # In these alone a step can be replayed: replicas that differ would wait for one another.
    for n, batch in EXTENTS:
        if not whole and batch % size:  # is refused
            continue
        replicas = samplers(n, batch, size, whole)
        steps = split(replicas)
        full = [all(len(part) == replicas[0].local_batch for part in step) for step in steps]
        for sampler in replicas:
            assert full == [step < sampler.full_steps for step in range(len(sampler))], (n, batch)
            assert (
                sampler.global_batch == size * sampler.local_batch == batch * (size if whole else 1)
            )
            assert sampler.num_images == n
            for step in range(sampler.full_steps):
                first = sampler.local_slice(0).start + step * sampler.global_batch
                assert sampler.local_slice(step) == slice(first, first + sampler.local_batch)


@BOTH
def test_the_images_of_a_step_can_be_named_by_any_replica(whole):
    replicas = samplers(23, 4, 3, whole, seed=2)
    for step, parts in enumerate(split(replicas, epoch=9)):
        for sampler in replicas:
            assert sampler.step_indices(9, step) == flatten(parts)
            assert sampler.step_indices(8, step) != flatten(parts)


def test_the_order_belongs_to_seed_and_epoch_and_to_nothing_else():
    def order(seed: int | None, epoch: int, **more) -> list[int]:
        torch.rand(3)  # what else the process draws makes no difference
        return (
            BatchSampler(torch.arange(40), **{"batch_size": 4} | more, seed=seed)
            .epoch_indices(epoch)
            .tolist()
        )

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


def test_a_deal_on_another_device_is_the_same_deal():
    sampler = BatchSampler(torch.arange(9), 4, seed=1, process=ProcessInfo(1, 2))
    moved = sampler.to(torch.device("meta"))
    assert moved.indices.is_meta and not sampler.indices.is_meta
    for name in ("batch_size", "seed", "process", "whole_batches", "num_images", "full_steps"):
        assert getattr(moved, name) == getattr(sampler, name)


# ---------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("held_out", [0, 1, 30, 99])
def test_a_split_is_disjoint_complete_and_in_order(held_out):
    kept, out = split_indices(100, held_out, seed=0)
    assert len(out) == held_out
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(100))
    assert kept.tolist() == sorted(kept.tolist()) and out.tolist() == sorted(out.tolist())


def test_a_split_belongs_to_its_seed():
    first, again, other = (split_indices(100, 30, seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again != other
    assert first != list(range(30))


@pytest.mark.parametrize("held_out", [100, 101])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(held_out):
    with pytest.raises(DataError) as error:
        split_indices(100, held_out, seed=0)
    assert error.value.report() == (
        f"error: validSize {held_out} of 100 training images leaves none; fix: use less than 100"
    )
