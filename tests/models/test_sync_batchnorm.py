"""Replicas that share a batch compute what one process computes on all of it.

The replicas are threads of this process, which meet to exchange tensors.
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

TIMEOUT_S = 60
LEVELS = pytest.mark.parametrize("level", range(5))


class ThreadGroup:
    """Where the replicas of one batch exchange tensors; `log` has the shape of each."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        self._slots: list[tuple[str, Tensor]] = [None] * size
        self.log: list[tuple[str, tuple[int, ...]]] = []

    def exchange(self, rank: int, what: str, tensor: Tensor) -> Tensor:
        """The tensors of all replicas, stacked."""
        self._slots[rank] = (what, tensor.detach().clone())
        self._barrier.wait(TIMEOUT_S)
        kinds = {(kind, found.shape, found.dtype) for kind, found in self._slots}
        assert len(kinds) == 1, f"the replicas do not exchange the same: {kinds}"
        if rank == 0:
            self.log.append((what, tuple(tensor.shape)))
        found = torch.stack([found for _, found in self._slots])
        self._barrier.wait(TIMEOUT_S)
        return found

    def abort(self) -> None:
        """Let nobody wait for a replica that has failed."""
        self._barrier.abort()


@dataclass(eq=False)
class Part:
    """A replica's part of a batch: see distributed.world.BatchShard."""

    offset: int
    global_size: int
    rank: int
    weights: Tensor
    group: ThreadGroup

    def all_reduce_(self, tensor: Tensor) -> None:
        tensor.copy_(self.group.exchange(self.rank, "sum", tensor).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.group.exchange(self.rank, "gather", tensor)


def parts_of(sizes: tuple[int, ...]) -> list[Part]:
    """The shards of replicas that have so many images each."""
    group, total = ThreadGroup(len(sizes)), sum(sizes)
    weights = torch.tensor(sizes, dtype=torch.float64) / total
    return [Part(sum(sizes[:i]), total, i, weights, group) for i in range(len(sizes))]


def replicas_of(level: int, parts: list[Part], sync: bool = True, form="BC", **changes):
    """A network for each part, made one after the other: threads share PyTorch's generator."""
    made = [network(level, form, **changes) for _ in parts]
    for model, part in zip(made, parts, strict=True):
        models.factory.attach_shard(model, part, sync)
    return made


def on_each(work: Callable[[nn.Module, Part], Results], made: list, parts: list[Part]) -> list:
    """What the work of each replica, in a thread of its own, results in."""

    def guarded(model: nn.Module, part: Part) -> Results:
        try:
            return work(model, part)
        except BaseException:
            part.group.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(guarded, *pair) for pair in zip(made, parts, strict=True)]
    errors = [future.exception() for future in futures]
    real = [error for error in errors if error and type(error) is not threading.BrokenBarrierError]
    for error in real or filter(None, errors):
        raise error
    return [future.result() for future in futures]


@pytest.fixture(autouse=True)
def generators(monkeypatch) -> threading.local:
    """A generator of each thread's own, as each process has; dropout draws from it."""
    local = threading.local()

    def draw_seed(device: torch.device) -> Tensor:
        return torch.randint(2**31 - 1, (1,), dtype=torch.int32, generator=local.generator)

    monkeypatch.setattr(dense_block, "draw_seed", draw_seed)
    return local


# ---------------------------------------------------------------------------------- whole networks


def step(model: nn.Module, images: Tensor, targets: Tensor, generators, scale=1.0) -> Results:
    """Logits, gradients and buffers of a training step whose loss is multiplied by `scale`."""
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


def together(level, form, sizes, generators, *, sync=True, alter=lambda part: None) -> Results:
    """A step of several replicas, put together; asserts that they end with the same buffers."""
    images, targets = pictures(form, count=sum(sizes))
    parts = parts_of(sizes)

    def work(model: DenseNet, part: Part) -> Results:
        own = slice(part.offset, part.offset + sizes[part.rank])
        mine = images[own], targets[own]
        if not sizes[part.rank]:
            mine = torch.zeros_like(images[:1]), torch.zeros_like(targets[:1])
        scale = part.weights[part.rank].item() * len(sizes)
        alter(part)
        return step(model, *mine, generators, scale)

    found = on_each(work, replicas_of(level, parts, sync, form), parts)
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


def alone(form: str, count: int, generators, level: int = 0) -> Results:
    """A step of one process on the whole batch."""
    return step(network(level, form), *pictures(form, count=count), generators)


@LEVELS
@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1), (3, 2), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("form", ["BC, dropout", "basic, dropout"])
def test_replicas_compute_what_one_process_does(level, sizes, form, generators):
    got = together(level, form, sizes, generators)
    assert largest_difference(got, alone(form, sum(sizes), generators)) < 1e-10


@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize("form", ["ImageNet", "BC"])
def test_so_does_every_form_of_the_network(level, form, generators):
    got = together(level, form, (2, 1), generators)
    assert largest_difference(got, alone(form, 3, generators)) < 1e-10


@LEVELS
def test_without_synchronisation_each_replica_has_moments_of_its_own(level, generators):
    got = together(level, "BC", (2, 2), generators, sync=False)
    images, targets = pictures(count=4)
    first = step(network(level), images[:2], targets[:2], generators)
    halves = [first, step(network(level), images[2:], targets[2:], generators)]
    for name in (name for name in got if "gradient" in name):
        torch.testing.assert_close(got[name], (halves[0][name] + halves[1][name]) / 2)
    assert torch.equal(got["logits"], torch.cat([half["logits"] for half in halves]))
    assert largest_difference(got, alone("BC", 4, generators)) > 1e-3


@LEVELS
@pytest.mark.parametrize(
    "alter",
    [
        lambda part: setattr(part, "offset", 0),
        lambda part: setattr(part, "global_size", part.global_size + 1),
        lambda part: setattr(part, "weights", part.weights.flip(0)),
    ],
    ids=["offset", "global_size", "weights"],
)
def test_a_wrong_shard_shows(level, alter, generators):
    got = together(level, "BC, dropout", (3, 2), generators, alter=alter)
    assert largest_difference(got, alone("BC, dropout", 5, generators)) > 1e-4


@LEVELS
def test_a_replica_without_images_leaves_no_trace(level, generators):
    # Its image of zeros is in no moment, so that no moment has a gradient to pass to it.
    parts, (images, targets) = parts_of((3, 0)), pictures(count=3)

    def work(model: DenseNet, part: Part) -> Results:
        mine = (torch.ones_like(images[:1]), targets[:1]) if part.rank else (images, targets)
        return step(model, *mine, generators, scale=2.0 - 2 * part.rank)

    real, idle = on_each(work, replicas_of(level, parts), parts)
    assert all((v == 0).all() for n, v in idle.items() if "gradient" in n or n == "image")
    assert max(value.abs().max() for name, value in real.items() if "gradient" in name) > 1e-3
    assert all(torch.equal(idle[name], real[name]) for name in idle if "running" in name)


@LEVELS
def test_each_normalisation_exchanges_once_forward_and_once_backward(level):
    parts, (images, targets) = parts_of((1, 1)), pictures(count=2)

    def work(model: DenseNet, part: Part) -> None:
        F.cross_entropy(model(images[part.rank :][:1]), targets[:1]).backward()

    model, _ = made = replicas_of(level, parts)
    on_each(work, made, parts)
    num_norms, log = len(norms(model)), parts[0].group.log
    assert [what for what, _ in log] == ["gather"] * num_norms + ["sum"] * num_norms
    assert {len(shape) for _, shape in log} == {2} == {shape[0] for _, shape in log}
    numbers = sum(shape[1] for _, shape in log[:num_norms])
    # The moments of a channel are exchanged once at levels 2 to 4, by every reader at 0 and 1.
    channels = [2 * 4 * 5 + block.out_channels for block in blocks(model)]
    everybody = sum(norm.num_features for norm in norms(model))
    assert numbers == (sum(channels) if level >= 2 else everybody)
    assert sum(channels) < everybody


def blocks(model: DenseNet) -> list[dense_block.DenseBlock]:
    return [module for module in model.modules() if isinstance(module, dense_block.DenseBlock)]


@LEVELS
def test_evaluation_exchanges_nothing(level):
    parts, images = parts_of((1, 1)), pictures(count=1)[0]
    model = network(level).eval()
    want = model(images)
    models.factory.attach_shard(model, parts[0], True)
    assert torch.equal(model(images), want)  # else it would wait for the other replica
    with torch.no_grad():
        assert torch.equal(model(images), network(level).eval()(images))
    assert not parts[0].group.log


@pytest.mark.parametrize("level", [0, 2])
def test_one_value_per_channel_in_all_is_refused(level, generators):
    def train(sizes: tuple[int, ...]) -> list[Results]:
        def work(model: DenseNet, part: Part) -> Results:
            return step(model, images[part.rank :][:1], targets[:1], generators)

        images, targets = torch.randn(2, 3, 1, 1, dtype=torch.float64), torch.tensor([0])
        parts = parts_of(sizes)
        return on_each(work, replicas_of(level, parts, stages=(1,)), parts)

    with pytest.raises(ValueError, match="value per channel"):
        train((1, 0))
    assert all(result["logits"].isfinite().all() for result in train((1, 1)))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_lower_precision_is_as_near_as_one_process_is(level, low, generators):
    images, targets = pictures(count=16)

    def train(sizes: tuple[int, ...], low: torch.dtype | None) -> Tensor:
        def work(model: DenseNet, part: Part) -> Tensor:
            own = slice(part.offset, part.offset + sizes[part.rank])
            model.float()
            with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
                loss = F.cross_entropy(model(images[own].float()), targets[own])
            (loss * part.weights[part.rank].item()).backward()
            return torch.cat([p.grad.flatten() for p in model.parameters()])

        parts = parts_of(sizes)
        return sum(on_each(work, replicas_of(level, parts, sync=len(sizes) > 1), parts))

    exact = train((16,), None)
    errors = [(train(sizes, low) - exact).norm() / exact.norm() for sizes in ((16,), (9, 7))]
    assert 1e-4 < errors[1] < 1.5 * errors[0]
    assert (train((9, 7), None) - exact).norm() < 1e-4 * exact.norm()


# ------------------------------------------------------------------------------------ one module


def normalised(x: Tensor, upstream: Tensor, sizes: tuple[int, ...] | None) -> Results:
    """A training step of one normalisation, by PyTorch's own or by replicas of ours."""

    def work(norm: nn.BatchNorm2d, x: Tensor, upstream: Tensor) -> Results:
        norm = norm.to(torch.promote_types(x.dtype, torch.float32))
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = norm(x)
        out.backward(upstream)
        gradients = {"dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
        return {"out": out.detach(), **gradients, **dict(norm.named_buffers())}

    channels = x.shape[1]
    if sizes is None:
        return work(nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3), x, upstream)

    def replica(norm: sync_batchnorm.BatchNorm, part: Part) -> Results:
        models.factory.attach_shard(norm, part, True)
        own = slice(part.offset, part.offset + sizes[part.rank])
        return work(norm, x[own], upstream[own])

    parts = parts_of(sizes)
    ours = [sync_batchnorm.BatchNorm(channels, eps=1e-3, momentum=0.3) for _ in parts]
    found = on_each(replica, ours, parts)
    return found[0] | {
        "out": torch.cat([result["out"] for result in found]),
        "dx": torch.cat([result["dx"] for result in found]),
        "dweight": sum(result["dweight"] for result in found),
        "dbias": sum(result["dbias"] for result in found),
    }


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 2, 1, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_a_normalisation_equals_pytorchs_on_the_whole_batch(sizes, layout, dtype, tolerance):
    x, upstream = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64)
    x = (2 * x + torch.arange(5).view(5, 1, 1)).to(dtype).contiguous(memory_format=layout)
    upstream = upstream.to(dtype).contiguous(memory_format=layout)
    got, want = normalised(x, upstream, sizes), normalised(x, upstream, None)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    assert max(relative_differences(got, want).values()) < tolerance
    assert got["out"].is_contiguous(memory_format=layout)
    other = normalised(x[:3], upstream[:3], None)
    assert (got["dx"][:3].double() - other["dx"].double()).abs().max() > 0.02  # its own moments


def test_means_far_from_zero_leave_single_precision_its_digits():
    x, upstream = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64)
    x = (x + 1000).float()
    got = normalised(x, upstream.float(), (2, 4))
    want = normalised(x.double(), upstream, None)
    assert max(relative_differences(got, want).values()) < 1e-3
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert (naive - x.var((0, 2, 3), correction=0)).abs().max() > 1e-2


# ------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("sync", [True, False])
def test_the_settings_decide_whether_normalisations_are_synchronised(sync):
    line = "--dataset cifar10 --depth 10 --growthRate 4 --dropRate 0.1"
    opt = SimpleNamespace(**vars(opts.parse(line.split())) | {"syncBN": sync})
    shard = parts_of((1, 1))[1]
    model, single = models.factory.create(opt, 10, shard=shard), models.factory.create(opt, 10)
    dropping = [*blocks(model), *(m for m in model.modules() if type(m) is dense_block.Dropout)]
    assert len(dropping) == 5
    assert all(module.shard is shard for module in dropping)
    assert {norm.shard for norm in norms(model)} == ({shard} if sync else {None})
    assert {getattr(module, "shard", None) for module in single.modules()} == {None}
    assert largest_difference(model.state_dict(), single.state_dict()) == 0
