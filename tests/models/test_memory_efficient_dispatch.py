"""Test that a dense block runs memory-efficiently if its modules, as they are then, allow it."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import models.factory
from distributed.world import BatchShard, World
from helpers.tiny_networks import (
    largest_difference,
    level_0_step,
    network,
    norms,
    one_step,
    pictures,
    step,
)
from models import memory_efficient
from models.densenet import DenseNet
from models.sync_batchnorm import BatchNorm

EFFICIENT_LEVELS = pytest.mark.parametrize("level", memory_efficient.MEMORY_EFFICIENT_LEVELS)
BLOCKS = ["denseblock1", "denseblock2"]


@pytest.fixture
def ran(monkeypatch) -> list:
    """List the blocks that have run in the memory-efficient way."""
    found, original = [], memory_efficient.run_dense_block

    def recorded(block, *args, **kwargs):
        found.append(block)
        return original(block, *args, **kwargs)

    monkeypatch.setattr(memory_efficient, "run_dense_block", recorded)
    return found


def names(model: DenseNet, ran: list) -> list[str]:
    return [name for name, module in model.features.named_children() if module in ran]


def setting(**values: object):
    """Return a change of attributes of the first batch norm of a network."""

    def change(model: DenseNet) -> None:
        for name, value in values.items():
            setattr(model.features.denseblock1.denselayer1.norm1, name, value)

    return change


def replacing(make):
    """Return a replacement of the first batch norm of a network, which has 7 channels."""
    return lambda model: setattr(model.features.denseblock1.denselayer1, "norm1", make().double())


class HalfBatchNorm(BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


# Changed batch norms:
CHANGES = {
    "eps": setting(eps=0.3),
    "momentum": setting(momentum=0.4),
    "cumulative": setting(momentum=None),
    "evaluation": setting(training=False),
    "no statistics": setting(track_running_stats=False, running_mean=None, running_var=None),
    "not tracked": setting(track_running_stats=False),
    "no buffers": setting(running_mean=None, running_var=None),
    "not affine": replacing(lambda: BatchNorm(7, affine=False)),
    "another class": replacing(lambda: nn.GroupNorm(1, 7)),
    "PyTorch's": replacing(lambda: nn.BatchNorm2d(7)),
    "a subclass": replacing(lambda: HalfBatchNorm(7)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_changed_batch_norm_makes_its_block_alone_run_as_modules(change, ran):
    (images, targets), model = pictures(), network(2)
    one_step(model, images, targets)
    assert names(model, ran) == BLOCKS
    ran.clear()
    CHANGES[change](model)  # between two steps: nothing may remember how it was
    got = one_step(model, images, targets)
    assert names(model, ran) == ["denseblock2"]
    plain = network(0)
    one_step(plain, images, targets)
    CHANGES[change](plain)
    assert largest_difference(got, one_step(plain, images, targets)) < 1e-10


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("features.denseblock1.denselayer2.norm2", "denseblock1"),
        ("features.transition1.norm", "denseblock1"),  # it reads the block
        ("features.denseblock2.denselayer1.norm1", "denseblock2"),
        ("features.norm5", "denseblock2"),
    ],
)
def test_the_batch_norms_of_a_block_and_of_its_reader_decide(name, block, ran):
    (images, targets), model = pictures(), network(2)
    norm = model.get_submodule(name)
    for attribute, value in (("eps", 0.3), ("momentum", None), ("training", False)):
        usual = getattr(norm, attribute)
        for given, want in ((value, {block}), (usual, set())):
            ran.clear()
            setattr(norm, attribute, given)
            one_step(model, images, targets)
            assert {*BLOCKS} - {*names(model, ran)} == want


def test_the_modes_of_blocks_and_of_autograd_decide(ran):
    model, (images, _) = network(2), pictures()
    for training, gradients, want in (
        (True, True, BLOCKS),
        (True, False, BLOCKS),
        (False, False, BLOCKS),
        (False, True, []),
    ):
        ran.clear()
        with torch.set_grad_enabled(gradients):
            model.train(training)(images)
        assert names(model, ran) == want
    model.train().features.denseblock2.training = False  # of its dropout; its layers train
    ran.clear()
    model(images)
    assert names(model, ran) == ["denseblock1"]


def freeze_norms(model: DenseNet) -> None:
    for norm in norms(model):
        norm.eval()


def freeze_all_but_norms(model: DenseNet) -> None:
    model.eval()
    for norm in norms(model):
        norm.train()


FREEZES = {
    "one norm": lambda model: model.features.denseblock1.denselayer2.norm1.eval(),
    "one block": lambda model: model.features.denseblock1.eval(),
    "the last norm": lambda model: model.features.norm5.eval(),
    "all norms": freeze_norms,
    "all but norms": freeze_all_but_norms,
}


@EFFICIENT_LEVELS
@pytest.mark.parametrize("freeze", FREEZES.values(), ids=FREEZES)
def test_frozen_batch_norms_are_frozen_as_at_level_0(level, freeze):
    want = level_0_step("BC, dropout", freeze)
    assert largest_difference(step(level, "BC, dropout", freeze), want) < 1e-10
    assert largest_difference(level_0_step("BC, dropout"), want) > 1e-3

    def logits(level: int) -> dict[str, Tensor]:
        model, (images, _) = network(level, "BC, dropout"), pictures()
        freeze(model)
        torch.manual_seed(5)
        with torch.no_grad():
            return {"logits": model(images), **dict(model.named_buffers())}

    assert largest_difference(logits(level), logits(0)) < 1e-10


def test_batch_norms_of_different_replicas_do_not_run_together():
    block, last = network(2).features.denseblock2, network(2).features.norm5
    shard = BatchShard(World(), torch.device("cpu"))
    models.factory.attach_shard(block, shard, sync_norms=True)
    assert not memory_efficient.can_run(block, last)
    models.factory.attach_shard(last, shard, sync_norms=True)
    assert memory_efficient.can_run(block, last)


# Changed networks:
def insert(before: str | None, slope: float):
    """Return an insertion of a module into the features, before another or at the end."""

    def change(model: DenseNet) -> None:
        items = [*model.features.named_children()]
        names = [name for name, _ in items]
        position = len(items) if before is None else names.index(before)
        items.insert(position, ("extra", nn.LeakyReLU(slope)))
        model.features = type(model.features)(OrderedDict(items))

    return change


def replace_last_norm(model: DenseNet) -> None:
    model.features.norm5 = nn.GroupNorm(1, model.classifier.in_features).double()


def delete_last_norm(model: DenseNet) -> None:
    del model.features.norm5


def replace_last_relu(model: DenseNet) -> None:
    model.relu5 = nn.LeakyReLU(0.5)


def replace_relu_of_transition(model: DenseNet) -> None:
    model.features.transition1.relu = nn.LeakyReLU(0.5)


def insert_into_transition(model: DenseNet) -> None:
    model.features.transition1.append(nn.LeakyReLU(0.5))


def weight_norm(model: DenseNet) -> None:
    nn.utils.parametrizations.weight_norm(model.features.denseblock1.denselayer2.conv1)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (insert("conv0", -0.5), BLOCKS),
        (insert("denseblock1", -0.5), BLOCKS),
        (insert("transition1", -0.5), ["denseblock2"]),
        (insert("denseblock2", -0.5), BLOCKS),
        (insert("norm5", -0.5), ["denseblock1"]),
        (insert(None, -0.5), ["denseblock1"]),
        (replace_last_norm, ["denseblock1"]),
        (delete_last_norm, ["denseblock1"]),
        (replace_last_relu, ["denseblock1"]),
        (replace_relu_of_transition, ["denseblock2"]),
        (insert_into_transition, ["denseblock2"]),
        (weight_norm, BLOCKS),
    ],
)
def test_changed_networks_compute_what_they_do_at_level_0(change, want, ran):
    (images, targets), model = pictures(), network(2)
    change(model)
    got = one_step(model, images, targets)
    assert names(model, ran) == want
    assert largest_difference(got, step(0, change=change)) < 1e-10


def test_a_changed_network_computes_something_else():
    changed = step(2, change=insert("denseblock2", -0.5))
    other = step(0, change=insert("denseblock2", -0.6))
    assert largest_difference(changed, other) > 1e-4


@EFFICIENT_LEVELS
def test_parameters_may_be_others_for_one_call(level):
    images, targets = pictures("BC, dropout")

    def gradients(level: int, seed: int) -> dict[str, Tensor]:
        model, other = (network(level, "BC, dropout", seed=s) for s in (3, seed))
        state = {n: t.detach().clone().requires_grad_() for n, t in other.named_parameters()}
        torch.manual_seed(5)
        logits = functional_call(model, state, (images,))
        F.cross_entropy(logits, targets).backward()  # the network has its own parameters again
        assert all(parameter.grad is None for parameter in model.parameters())
        return {"logits": logits.detach(), **{name: tensor.grad for name, tensor in state.items()}}

    assert largest_difference(gradients(level, 8), gradients(0, 8)) < 1e-10
    assert largest_difference(gradients(level, 8), gradients(0, 3)) > 1e-3


def test_a_forward_pass_visits_no_more_modules_than_it_runs(monkeypatch):
    model, (images, targets) = network(2), pictures()

    def visit(*_, **__):
        raise AssertionError("all modules were visited")

    for name in ("named_modules", "named_children"):  # `modules` and `children` go through these
        monkeypatch.setattr(nn.Module, name, visit)
    F.cross_entropy(model(images), targets).backward()
    with pytest.raises(AssertionError, match="visited"):
        list(model.parameters())
