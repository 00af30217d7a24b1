"""Test that replicas that share a batch compute what one process computes on all of it.

The replicas are threads of this process, which exchange tensors at a barrier.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models.factory
import opts
from helpers.tiny_networks import (
    Results,
    largest_difference,
    network,
    norms,
    pictures,
    relative_differences,
)
from models import dense_block, sync_batchnorm
from models.densenet import DenseNet
from models.layers import set_eps

TIMEOUT_S = 300
LEVELS = pytest.mark.parametrize("level", range(5))


class ThreadGroup:
    """Exchange tensors between the replicas of a batch; `log` has the shape of each."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        self._slots: list[tuple[str, Tensor]] = [None] * size
        self.log: list[tuple[str, tuple[int, ...]]] = []
        self.abort = self._barrier.abort

    def exchange(self, rank: int, operation: str, tensor: Tensor) -> Tensor:
        """Return the tensors of all replicas, stacked."""
        self._slots[rank] = (operation, tensor.detach().clone())
        self._barrier.wait(TIMEOUT_S)
        kinds = {(kind, found.shape, found.dtype) for kind, found in self._slots}
        assert len(kinds) == 1, f"the replicas do not exchange the same: {kinds}"
        if rank == 0:
            self.log.append((operation, tuple(tensor.shape)))
        found = torch.stack([found for _, found in self._slots])
        self._barrier.wait(TIMEOUT_S)
        return found


@dataclass(eq=False)
class ThreadShard:
    """Hold a thread's part of a batch, with the interface of distributed.world.BatchShard."""

    offset: int
    size: int
    global_size: int
    rank: int
    weights: Tensor
    group: ThreadGroup

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + self.size)

    def all_reduce_(self, tensor: Tensor) -> None:
        tensor.copy_(self.group.exchange(self.rank, "sum", tensor).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.group.exchange(self.rank, "gather", tensor)


def make_shards(*sizes: int) -> list[ThreadShard]:
    """Make shards of replicas with so many images each."""
    group, total = ThreadGroup(len(sizes)), sum(sizes)
    weights = torch.tensor(sizes, dtype=torch.float64) / total
    return [
        ThreadShard(sum(sizes[:i]), size, total, i, weights, group) for i, size in enumerate(sizes)
    ]


def make_replicas(level: int, shards: list, sync: bool = True, form="BC", **changes) -> list:
    """Make a network for each shard, one after the other: threads share PyTorch's generator."""
    replicas = [network(level, form, **changes) for _ in shards]
    for model, shard in zip(replicas, shards, strict=True):
        models.factory.attach_shard(model, shard, sync)
    return replicas


def on_each(run: Callable[[nn.Module, ThreadShard], Results], replicas: list, shards: list) -> list:
    """Return the results of run(replica, shard), each in a thread of its own."""

    def guarded(model: nn.Module, shard: ThreadShard) -> Results:
        try:
            return run(model, shard)
        except BaseException:
            shard.group.abort()  # the others wait for this replica
            raise

    with ThreadPoolExecutor(len(shards)) as pool:
        futures = [pool.submit(guarded, *pair) for pair in zip(replicas, shards, strict=True)]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda e: type(e) is threading.BrokenBarrierError):
        raise error
    return [future.result() for future in futures]


@pytest.fixture(autouse=True)
def generators(monkeypatch) -> threading.local:
    """Make a generator for each thread, as each process has one; dropout draws from it."""
    local = threading.local()

    def draw_seed(device: torch.device) -> Tensor:
        return torch.randint(2**31 - 1, (1,), dtype=torch.int32, generator=local.generator)

    monkeypatch.setattr(dense_block, "draw_seed", draw_seed)
    return local


# Whole networks:
def step(model: nn.Module, images: Tensor, targets: Tensor, generators, scale=1.0) -> Results:
    """Return logits, gradients and buffers of a training step, its loss multiplied by `scale`."""
    generators.generator = torch.Generator().manual_seed(5)
    images = images.clone().requires_grad_()
    logits = model(images)
    (F.cross_entropy(logits, targets) * scale).backward()
    return {
        "logits": logits.detach(),
        "image": images.grad,
        **{f"gradient of {name}": p.grad for name, p in model.named_parameters()},
        **dict(model.named_buffers()),
        "random numbers": generators.generator.get_state(),
    }


def together(level, form, sizes, generators, *, sync=True, alter=lambda shard: None) -> Results:
    """Combine the results of replicas' steps; assert that they end with the same buffers."""
    (images, targets), shards = pictures(form, count=sum(sizes)), make_shards(*sizes)

    def run(model: DenseNet, shard: ThreadShard) -> Results:
        own = images[shard.own], targets[shard.own]
        if not shard.size:
            own = torch.zeros_like(images[:1]), torch.zeros_like(targets[:1])
        scale = shard.weights[shard.rank].item() * len(sizes)
        alter(shard)
        return step(model, *own, generators, scale)

    found = on_each(run, make_replicas(level, shards, sync, form), shards)
    for result in found:
        assert torch.equal(result["random numbers"], found[0]["random numbers"])
        if sync:
            assert all(torch.equal(result[n], found[0][n]) for n in result if "running" in n)
    real = [result for result, size in zip(found, sizes, strict=True) if size]
    joined = {
        "logits": torch.cat([result["logits"] for result in real]),
        "image": torch.cat([result["image"] for result in real]) / len(sizes),
    }
    averaged = {
        name: sum(result[name] for result in found) / len(sizes)
        for name in found[0]
        if "gradient" in name
    }
    return found[0] | averaged | joined


def alone(form: str, count: int, generators) -> Results:
    """Run a step of one process on the whole batch."""
    return step(network(0, form), *pictures(form, count=count), generators)


@LEVELS
@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("BC, dropout", (2, 2)),
        ("BC, dropout", (2, 3, 0)),
        ("basic, dropout", (3, 2)),
        ("basic, dropout", (1, 1, 1, 1)),
        ("BC", (2, 1)),
        ("ImageNet", (2, 1)),
    ],
)
def test_replicas_compute_what_one_process_does(level, form, sizes, generators):
    got = together(level, form, sizes, generators)
    assert largest_difference(got, alone(form, sum(sizes), generators)) < 1e-10


@LEVELS
def test_replicas_divide_by_the_epsilon_of_the_network(level, generators, monkeypatch):
    usual, make = alone("BC", 4, generators), network

    def with_eps(*args, **changes) -> DenseNet:
        set_eps(model := make(*args, **changes), 0.1)
        return model

    monkeypatch.setitem(globals(), "network", with_eps)
    got = together(level, "BC", (2, 2), generators)
    assert largest_difference(got, alone("BC", 4, generators)) < 1e-10
    assert largest_difference(got, usual) > 1e-3


@LEVELS
def test_without_synchronisation_each_replica_has_statistics_of_its_own(level, generators):
    got = together(level, "BC", (2, 2), generators, sync=False)
    images, targets = pictures(count=4)
    halves = [
        step(network(level), images[own], targets[own], generators)
        for own in (slice(0, 2), slice(2, 4))
    ]
    for name in (name for name in got if "gradient" in name):
        torch.testing.assert_close(got[name], (halves[0][name] + halves[1][name]) / 2)
    assert torch.equal(got["logits"], torch.cat([half["logits"] for half in halves]))
    assert largest_difference(got, alone("BC", 4, generators)) > 1e-3


@pytest.mark.parametrize("level", [0, 2, 4])
@pytest.mark.parametrize(
    "alter",
    [
        lambda shard: setattr(shard, "offset", 0),
        lambda shard: setattr(shard, "global_size", shard.global_size + 1),
        lambda shard: setattr(shard, "weights", shard.weights.flip(0)),
    ],
    ids=["offset", "global_size", "weights"],
)
def test_a_wrong_shard_shows(level, alter, generators):
    got = together(level, "BC, dropout", (3, 2), generators, alter=alter)
    assert largest_difference(got, alone("BC, dropout", 5, generators)) > 1e-4


@LEVELS
def test_a_replica_without_images_leaves_no_trace(level, generators):
    # No statistic depends on its image of zeros, so none has a gradient to pass to it.
    shards, (images, targets) = make_shards(3, 0), pictures(count=3)

    def run(model: DenseNet, shard: ThreadShard) -> Results:
        own = (torch.ones_like(images[:1]), targets[:1]) if shard.rank else (images, targets)
        return step(model, *own, generators, scale=2.0 - 2 * shard.rank)

    real, idle = on_each(run, make_replicas(level, shards), shards)
    assert all((v == 0).all() for n, v in idle.items() if "gradient" in n or n == "image")
    assert max(value.abs().max() for name, value in real.items() if "gradient" in name) > 1e-3
    assert all(torch.equal(idle[name], real[name]) for name in idle if "running" in name)


def blocks(model: DenseNet) -> list[dense_block.DenseBlock]:
    return [module for module in model.modules() if isinstance(module, dense_block.DenseBlock)]


@LEVELS
def test_each_batch_norm_exchanges_once_forward_and_once_backward(level, generators):
    shards, (images, targets) = make_shards(1, 1), pictures(count=2)
    model, _ = replicas = make_replicas(level, shards)
    on_each(
        lambda model, shard: step(model, images[shard.own], targets[shard.own], generators),
        replicas,
        shards,
    )
    num_norms, log = len(norms(model)), shards[0].group.log
    assert [what for what, _ in log] == ["gather"] * num_norms + ["sum"] * num_norms
    assert {len(shape) for _, shape in log} == {2} == {shape[0] for _, shape in log}
    exchanged = sum(shape[1] for _, shape in log[:num_norms])
    # Levels 2 to 4 exchange a channel's statistics once; levels 0 and 1 once for every reader.
    channels = sum(2 * 4 * 5 + block.out_channels for block in blocks(model))
    readers = sum(norm.num_features for norm in norms(model))
    assert channels < readers
    assert exchanged == (channels if level >= 2 else readers)


@LEVELS
def test_evaluation_exchanges_nothing(level):
    shards, images = make_shards(1, 1), pictures(count=1)[0]
    model = network(level).eval()
    want = model(images)
    models.factory.attach_shard(model, shards[0], True)
    assert torch.equal(model(images), want)  # an exchange would wait for the other replica
    with torch.no_grad():
        assert torch.equal(model(images), network(level).eval()(images))
    assert not shards[0].group.log


@pytest.mark.parametrize("level", [0, 2])
def test_one_value_per_channel_over_all_replicas_is_refused(level, generators):
    def train(*sizes: int) -> list[Results]:
        def run(model: DenseNet, shard: ThreadShard) -> Results:
            return step(model, images[shard.rank :][:1], targets, generators)

        images, targets = torch.randn(2, 3, 1, 1, dtype=torch.float64), torch.tensor([0])
        shards = make_shards(*sizes)
        return on_each(run, make_replicas(level, shards, stages=(1,)), shards)

    with pytest.raises(ValueError, match="value per channel"):
        train(1, 0)
    assert all(result["logits"].isfinite().all() for result in train(1, 1))


@pytest.mark.parametrize("level", [0, 2])
def test_lower_precision_is_as_near_as_one_process_is(level, generators):
    images, targets = pictures(count=16)

    def train(*sizes: int, low: bool = True) -> Tensor:
        def run(model: DenseNet, shard: ThreadShard) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = F.cross_entropy(model.float()(images[shard.own].float()), targets[shard.own])
            (loss * shard.weights[shard.rank].item()).backward()
            return torch.cat([p.grad.flatten() for p in model.parameters()])

        shards = make_shards(*sizes)
        return sum(on_each(run, make_replicas(level, shards, sync=len(sizes) > 1), shards))

    exact = train(16, low=False)
    errors = [(train(*sizes) - exact).norm() / exact.norm() for sizes in ((16,), (9, 7))]
    assert 1e-4 < errors[1] < 1.5 * errors[0]
    assert (train(9, 7, low=False) - exact).norm() < 1e-4 * exact.norm()


# One module:
def normalised(x: Tensor, upstream: Tensor, sizes: tuple[int, ...] | None) -> Results:
    """Run a step of one batch norm: PyTorch's on the whole batch, or this project's on replicas."""

    def run(norm: nn.BatchNorm2d, x: Tensor, upstream: Tensor) -> Results:
        norm = norm.to(torch.promote_types(x.dtype, torch.float32))
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = norm(x)
        out.backward(upstream)
        gradients = {"dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
        return {"out": out.detach(), **gradients, **dict(norm.named_buffers())}

    options = {"num_features": x.shape[1], "eps": 1e-3, "momentum": 0.3}
    if sizes is None:
        return run(nn.BatchNorm2d(**options), x, upstream)

    def on_replica(norm: sync_batchnorm.BatchNorm, shard: ThreadShard) -> Results:
        models.factory.attach_shard(norm, shard, True)
        return run(norm, x[shard.own], upstream[shard.own])

    shards = make_shards(*sizes)
    found = on_each(on_replica, [sync_batchnorm.BatchNorm(**options) for _ in shards], shards)
    joined = {name: torch.cat([result[name] for result in found]) for name in ("out", "dx")}
    summed = {name: sum(result[name] for result in found) for name in ("dweight", "dbias")}
    return found[0] | joined | summed


@pytest.mark.parametrize("sizes", [(6,), (1, 2, 1, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_a_batch_norm_equals_pytorchs_on_the_whole_batch(sizes, layout, dtype, tolerance):
    x, upstream = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64)
    x = (2 * x + torch.arange(5).view(5, 1, 1)).to(dtype).contiguous(memory_format=layout)
    upstream = upstream.to(dtype).contiguous(memory_format=layout)
    got, want = normalised(x, upstream, sizes), normalised(x, upstream, None)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    assert max(relative_differences(got, want).values()) < tolerance
    assert got["out"].is_contiguous(memory_format=layout)
    other = normalised(x[:3], upstream[:3], None)  # statistics of half of the batch
    assert (got["dx"][:3].double() - other["dx"].double()).abs().max() > 0.02


def test_means_far_from_zero_leave_single_precision_its_digits():
    x, upstream = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64)
    x = (x + 1000).float()
    got = normalised(x, upstream.float(), (2, 4))
    want = normalised(x.double(), upstream, None)
    assert max(relative_differences(got, want).values()) < 1e-3
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert (naive - x.var((0, 2, 3), correction=0)).abs().max() > 1e-2


# Settings:
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize(
    ("line", "num_dropouts"),
    [
        ("--depth 10 --growthRate 4 --dropRate 0.1", 5),
        ("--netType resnet --depth 20 --shortcutType B", 0),
        ("--netType preresnet --depth 20", 0),
    ],
)
def test_the_settings_decide_whether_batch_norms_are_synchronised(line, num_dropouts, sync):
    opt = SimpleNamespace(**vars(opts.parse(line.split())) | {"syncBN": sync})
    shard = make_shards(1, 1)[1]
    model, single = models.factory.create(opt, 10, shard=shard), models.factory.create(opt, 10)
    dropping = [*blocks(model), *(m for m in model.modules() if type(m) is dense_block.Dropout)]
    assert len(dropping) == num_dropouts
    assert all(module.shard is shard for module in dropping)
    assert {norm.shard for norm in norms(model)} == ({shard} if sync else {None})
    assert {getattr(module, "shard", None) for module in single.modules()} == {None}
    assert largest_difference(model.state_dict(), single.state_dict()) == 0
