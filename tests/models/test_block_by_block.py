"""Each dense block runs in little memory where it can, as its modules are at that moment."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import models.factory
from distributed.world import BatchShard, World
from helpers.tiny_networks import largest_difference, network, norms, one_step, pictures
from models import memory_efficient
from models.densenet import DenseNet
from models.sync_batchnorm import BatchNorm

SHARED = pytest.mark.parametrize("level", memory_efficient.MEMORY_EFFICIENT_LEVELS)


@pytest.fixture
def ran(monkeypatch) -> list:
    """The blocks that have run in little memory."""
    found, original = [], memory_efficient.run_dense_block

    def recorded(block, *args, **kwargs):
        found.append(block)
        return original(block, *args, **kwargs)

    monkeypatch.setattr(memory_efficient, "run_dense_block", recorded)
    return found


def names(model: DenseNet, ran: list) -> list[str]:
    return [name for name, module in model.features.named_children() if module in ran]


# ------------------------------------------------------------ a batch normalisation that is changed


def settle(norm: nn.Module, **values: object) -> None:
    for name, value in values.items():
        setattr(norm, name, value)


def replaced(layer: nn.Module, name: str, norm: nn.Module) -> None:
    setattr(layer, name, norm.double())


CHANGES = {
    "eps": lambda layer, name: settle(getattr(layer, name), eps=0.3),
    "momentum": lambda layer, name: settle(getattr(layer, name), momentum=0.4),
    "cumulative": lambda layer, name: settle(getattr(layer, name), momentum=None),
    "evaluation": lambda layer, name: getattr(layer, name).eval(),
    "no statistics": lambda layer, name: settle(
        getattr(layer, name), track_running_stats=False, running_mean=None, running_var=None
    ),
    "not tracked": lambda layer, name: settle(getattr(layer, name), track_running_stats=False),
    "no buffers": lambda layer, name: settle(
        getattr(layer, name), running_mean=None, running_var=None
    ),
    "not affine": lambda layer, name: replaced(layer, name, BatchNorm(7, affine=False)),
    "another class": lambda layer, name: replaced(layer, name, nn.GroupNorm(1, 7)),
    "a subclass": lambda layer, name: replaced(
        layer,
        name,
        type("Half", (BatchNorm,), {"forward": lambda self, x: BatchNorm.forward(self, x) / 2})(7),
    ),
}


@SHARED
@pytest.mark.parametrize("change", CHANGES)
def test_one_changed_normalisation_makes_its_block_alone_run_as_modules(level, change, ran):
    images, targets = pictures()

    def step(level: int, change: str | None):
        model = network(level)
        one_step(model, images, targets)  # as it is at first, which nothing may remember
        ran.clear()
        if change:
            CHANGES[change](model.features.denseblock1.denselayer1, "norm1")
        return model, one_step(model, images, targets)

    model, got = step(level, change)
    assert names(model, ran) == ["denseblock2"]
    _, want = step(0, change)
    assert largest_difference(got, want) < 1e-10
    model, ordinary = step(level, None)
    assert names(model, ran) == ["denseblock1", "denseblock2"]
    assert got.keys() != ordinary.keys() or largest_difference(got, ordinary) > 1e-4


@pytest.mark.parametrize(
    ("place", "plain"),
    [
        ("features.denseblock1.denselayer2.norm2", "denseblock1"),
        ("features.transition1.norm", "denseblock1"),  # which reads the block
        ("features.denseblock2.denselayer1.norm1", "denseblock2"),
        ("features.norm5", "denseblock2"),
    ],
)
def test_a_block_is_decided_about_by_its_layers_and_what_reads_it(place, plain, ran):
    images, targets = pictures()
    model = network(2)
    norm = model.get_submodule(place)
    for name, value in (("eps", 0.3), ("momentum", None), ("training", False)):
        usual = getattr(norm, name)
        for given, want in ((value, {plain}), (usual, set())):
            ran.clear()
            setattr(norm, name, given)
            one_step(model, images, targets)
            assert {"denseblock1", "denseblock2"} - {*names(model, ran)} == want


def test_what_reads_a_block_must_be_a_batch_normalisation(ran):
    images, targets = pictures()

    def step(level: int):
        model = network(level)
        model.features.norm5 = nn.GroupNorm(1, model.classifier.in_features).double()
        return model, one_step(model, images, targets)

    model, got = step(2)
    assert names(model, ran) == ["denseblock1"]
    assert largest_difference(got, step(0)[1]) < 1e-10


def test_cumulative_statistics_are_moved_by_the_modules(ran):
    images, targets = pictures()

    def step(level: int, momentum: float | None = None):
        model = network(level)
        for norm in norms(model):
            norm.momentum = momentum
        return one_step(model, images, targets)

    assert largest_difference(step(2), step(0)) < 1e-10
    assert not ran
    assert largest_difference(step(2, 0.1), step(0)) > 1e-3
    assert len(ran) == 2


def test_the_modes_of_blocks_and_gradients_decide(ran):
    model, (images, _) = network(2), pictures()
    everything = ["denseblock1", "denseblock2"]
    for training, gradients, want in (
        (True, True, everything),
        (True, False, everything),
        (False, False, everything),
        (False, True, []),
    ):
        ran.clear()
        with torch.set_grad_enabled(gradients):
            model.train(training)(images)
        assert names(model, ran) == want
    model.train().features.denseblock2.training = False  # whose layers train: of its dropout alone
    ran.clear()
    model(images)
    assert names(model, ran) == ["denseblock1"]


def test_normalisations_of_different_replicas_do_not_run_together():
    block, last = network(2).features.denseblock2, network(2).features.norm5
    shard = BatchShard(World(), torch.device("cpu"))
    models.factory.attach_shard(block, shard, sync_norms=True)
    assert not memory_efficient.can_run(block, last)
    models.factory.attach_shard(last, shard, sync_norms=True)
    assert memory_efficient.can_run(block, last)


def test_converted_normalisations_are_seen(ran):
    model, (images, _) = network(2), pictures()
    model.features.denseblock1 = nn.SyncBatchNorm.convert_sync_batchnorm(model.features.denseblock1)
    with torch.no_grad():
        want = network(0).eval()(images)
        assert (model.eval()(images) - want).abs().max() < 1e-10
    assert names(model, ran) == ["denseblock2"]


# ------------------------------------------------------------------------------- changed networks


def inserted(model: DenseNet, before: str | None, module: nn.Module) -> DenseNet:
    """Put a module into the features, before another or at the end."""
    children = OrderedDict(model.features.named_children())
    items = [*children.items()]
    place = len(items) if before is None else [*children].index(before)
    items.insert(place, ("foreign", module.double()))
    model.features = nn.Sequential(OrderedDict(items))
    return model


@SHARED
@pytest.mark.parametrize(
    ("before", "want"),
    [
        ("conv0", ["denseblock1", "denseblock2"]),
        ("denseblock1", ["denseblock1", "denseblock2"]),
        ("transition1", ["denseblock2"]),
        ("denseblock2", ["denseblock1", "denseblock2"]),
        ("norm5", ["denseblock1"]),
        (None, ["denseblock1"]),
    ],
)
def test_foreign_modules_run_in_their_places(level, before, want, ran):
    images, targets = pictures()

    def step(level: int, slope: float):
        model = inserted(network(level), before, nn.LeakyReLU(slope))
        return model, one_step(model, images, targets)

    model, got = step(level, -0.5)
    assert names(model, ran) == want
    assert largest_difference(got, step(0, -0.5)[1]) < 1e-10
    assert largest_difference(got, step(0, -0.6)[1]) > 1e-4


@SHARED
def test_a_network_without_its_last_normalisation_runs(level, ran):
    images, targets = pictures()

    def step(level: int):
        model = network(level)
        del model.features.norm5
        return one_step(model, images, targets)

    assert largest_difference(step(level), step(0)) < 1e-10
    assert len(ran) == 1


# --------------------------------------------------------------------------------------- parameters


@SHARED
@pytest.mark.parametrize("form", ["BC, dropout", "basic"])
def test_parameters_may_be_others_for_one_call(level, form):
    images, targets = pictures(form)

    def gradients(level: int, seed: int) -> dict[str, Tensor]:
        model, other = network(level, form), network(level, form, seed=seed)
        state = {n: t.detach().clone().requires_grad_() for n, t in other.named_parameters()}
        torch.manual_seed(5)
        logits = functional_call(model, state, (images,))
        F.cross_entropy(logits, targets).backward()  # the network has its own again
        assert all(parameter.grad is None for parameter in model.parameters())
        return {"logits": logits.detach(), **{name: tensor.grad for name, tensor in state.items()}}

    assert largest_difference(gradients(level, 8), gradients(0, 8)) < 1e-10
    assert largest_difference(gradients(level, 8), gradients(0, 3)) > 1e-3


@SHARED
def test_a_parametrised_convolution_is_obeyed(level, ran):
    images, targets = pictures()

    def step(level: int):
        model = network(level)
        nn.utils.parametrizations.weight_norm(model.features.denseblock1.denselayer2.conv1)
        return one_step(model, images, targets)

    assert largest_difference(step(level), step(0)) < 1e-10
    assert len(ran) == 2


def test_a_forward_pass_walks_over_no_more_than_it_runs(monkeypatch):
    model, (images, targets) = network(2), pictures()

    def walk(*_, **__):
        raise AssertionError("all modules were visited")

    for name in ("named_modules", "named_children"):  # `modules` and `children` go through these
        monkeypatch.setattr(nn.Module, name, walk)
    F.cross_entropy(model(images), targets).backward()
    with pytest.raises(AssertionError, match="visited"):
        list(model.parameters())
