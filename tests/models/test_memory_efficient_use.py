"""Test memory levels 1 to 4 in use: evaluation, unusual ways of training, and kept memory."""

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from helpers.tiny_networks import (
    largest_difference,
    level_0_step,
    network,
    norms,
    one_step,
    pictures,
    results,
    step,
)
from kernels.backend import REFERENCE
from models import memory_efficient
from models.densenet import DenseNet

LEVELS = pytest.mark.parametrize("level", [1, *memory_efficient.MEMORY_EFFICIENT_LEVELS])
EFFICIENT_LEVELS = pytest.mark.parametrize("level", memory_efficient.MEMORY_EFFICIENT_LEVELS)
TWO_FORMS = pytest.mark.parametrize("form", ["BC, dropout", "basic"])


# Evaluation:
@LEVELS
@pytest.mark.parametrize("form", ["BC, dropout", "basic", "ImageNet"])
def test_evaluation_takes_each_batch_norms_own_running_statistics(level, form):
    model, images = network(level, form).eval(), pictures(form)[0]
    moved, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    norms(moved)[-2].running_mean += 0.1
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            want = network(0, form).eval()(images)
            got, other = model(images), moved(images)
        assert got.requires_grad is want.requires_grad is (context is torch.enable_grad)
        assert (got - want).abs().max() < 1e-10
        assert (other - want).abs().max() > 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@EFFICIENT_LEVELS
@TWO_FORMS
def test_gradients_pass_through_a_network_in_evaluation(level, form):
    got, want = (step(i, form, nn.Module.eval) for i in (level, 0))
    assert largest_difference(got, want) < 1e-10
    assert largest_difference(got, level_0_step(form)) > 1e-3


@EFFICIENT_LEVELS
def test_evaluation_in_lower_precision_is_as_near_as_level_0_is(level):
    images = pictures(count=16)[0].float()

    def logits(level: int, low: bool) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            return network(level).float().eval()(images)

    single, low_0, low_n = logits(0, False), logits(0, True), logits(level, True)
    assert low_n.dtype == low_0.dtype == torch.bfloat16
    assert 0 < (low_n - single).norm() < 1.5 * (low_0 - single).norm()
    assert (logits(level, False) - single).norm() < 1e-3 * (low_0 - single).norm()


@LEVELS
def test_no_images_give_no_logits(level):
    with torch.no_grad():
        assert network(level).eval()(torch.zeros(0, 3, 13, 10).double()).shape == (0, 3)


# Other ways of training:
@EFFICIENT_LEVELS
@TWO_FORMS
def test_training_mode_without_gradients_moves_the_statistics_alike(level, form):
    def passed(level: int) -> dict[str, Tensor]:
        model, images = network(level, form), pictures(form)[0]
        torch.manual_seed(5)
        with torch.no_grad():
            logits = model(images)
        assert not logits.requires_grad
        assert all(norm.num_batches_tracked == 1 for norm in norms(model))
        return {"logits": logits, **dict(model.named_buffers())}

    assert largest_difference(passed(level), passed(0)) < 1e-10


@EFFICIENT_LEVELS
@TWO_FORMS
def test_two_forward_passes_before_their_backward_do_not_mix(level, form):
    (first, targets), (second, _) = pictures(form), pictures(form, count=4, seed=9)

    def losses(model: nn.Module):
        torch.manual_seed(5)
        yield F.cross_entropy(model(first), targets)
        yield F.cross_entropy(model(second), targets[:4])

    interleaved, summed, sequential = network(level, form), network(level, form), network(0, form)
    for loss in list(losses(interleaved)):
        loss.backward()
    sum(losses(summed)).backward()
    for loss in losses(sequential):
        loss.backward()
    assert largest_difference(results(interleaved), results(sequential)) < 1e-10
    assert largest_difference(results(summed), results(sequential)) < 1e-10


@EFFICIENT_LEVELS
def test_a_retained_graph_gives_the_same_gradients_again(level):
    (images, targets), model = pictures(), network(level)
    loss = F.cross_entropy(model(images), targets)
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-12, atol=1e-14)
    assert any(gradient.abs().max() > 1e-3 for gradient in once)


@LEVELS
def test_saved_tensors_may_be_moved_elsewhere_until_backward(level):
    with saved_tensors_hooks(torch.clone, torch.clone):
        got = step(level, "BC, dropout")
    assert largest_difference(got, level_0_step("BC, dropout")) < 1e-10
    with saved_tensors_hooks(torch.clone, lambda x: 2 * x if x.is_floating_point() else x):
        other = step(level, "BC, dropout")
    assert largest_difference(other, level_0_step("BC, dropout")) > 1e-3


@EFFICIENT_LEVELS
def test_a_network_may_be_checkpointed_as_a_whole(level):
    model, (images, targets) = network(level), pictures()
    logits = checkpoint(model, images.requires_grad_(), use_reentrant=False)
    F.cross_entropy(logits, targets).backward()
    got = {name: value for name, value in results(model).items() if "gradient" in name}
    want = {name: level_0_step()[name] for name in got}
    assert largest_difference(got, want) < 1e-10


def test_backward_frees_what_it_has_used_while_the_loss_is_held():
    model, (images, _) = network(2), pictures()
    kept: list[weakref.ref] = []
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers(), images)}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images).sum()
    alive = [storage for storage in kept if storage() is not None]
    assert len(alive) > 10
    loss.backward()
    # The gradient of a sum over the logits needs nothing, and the loss itself is one number.
    assert sum(storage() is not None for storage in alive) <= 1


@EFFICIENT_LEVELS
def test_evaluation_in_inference_mode_leaves_training_possible(level):
    (images, targets), model = pictures(), network(level)
    with torch.inference_mode():
        model.eval()(images)
    got = one_step(model.train(), images, targets)
    assert largest_difference(got, level_0_step()) < 1e-10
    with torch.inference_mode():
        moved = model.train()(images)  # moves the statistics, as it does at level 0
    assert moved.is_inference()
    assert largest_difference(one_step(model, images, targets), got) > 1e-3


def test_networks_in_threads_do_not_disturb_each_other():
    (images, targets), levels = pictures(count=16), memory_efficient.MEMORY_EFFICIENT_LEVELS
    want = {level: step(level, count=16) for level in levels}

    def train(model: DenseNet) -> float:
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        expected = want[model.features.denseblock1.memory_level]
        got = results(model, loss=loss.detach(), image=expected["image"])
        return largest_difference(got, expected)

    models = [network(level) for level in levels for _ in range(4)]  # threads share the generator
    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(train, models)) < 1e-10


@EFFICIENT_LEVELS
@pytest.mark.parametrize("part", ["conv", "norm", "denseblock1", "features", "classifier", "stem"])
def test_parameters_that_want_no_gradient_get_none(level, part):
    images, targets = pictures("BC, dropout")

    def gradients(level: int) -> dict[str, Tensor]:
        model = network(level, "BC, dropout")
        for name, parameter in model.named_parameters():
            wanted = "conv0" not in name if part == "stem" else part not in name
            parameter.requires_grad_(wanted)
        torch.manual_seed(5)
        F.cross_entropy(model(images), targets).backward()  # nor do the images want one
        return results(model)

    got, want = gradients(level), gradients(0)
    assert largest_difference(got, want) < 1e-10
    withheld = [value for value in got.values() if value is None]
    assert 0 < len(withheld) < len(list(network(0).parameters()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, forward mode
@EFFICIENT_LEVELS
def test_second_and_forward_mode_derivatives_are_refused(level):
    images, targets = pictures()

    def second(level: int) -> None:
        model = network(level)
        loss = F.cross_entropy(model(images), targets)
        gradient = torch.autograd.grad(loss, model.features.conv0.weight, create_graph=True)[0]
        gradient.square().sum().backward()

    second(0)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second(level)
    model = network(level)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: model(x).sum())(images)
    with pytest.raises(RuntimeError, match="jvp"), torch.autograd.forward_ad.dual_level():
        model(torch.autograd.forward_ad.make_dual(images, images))


@LEVELS
def test_one_value_per_channel_is_refused_in_training(level):
    for stages, size in (((1, 1), 2), ((1,), 1)):
        images = torch.randn(1, 3, size, size, dtype=torch.float64)
        for i in (0, level):
            with pytest.raises(ValueError, match=r"value.* per channel"):
                network(i, stages=stages)(images)
        two = torch.cat([images, images + 1])
        assert network(level, stages=stages)(two).isfinite().all()
        with torch.no_grad():
            assert network(level, stages=stages).eval()(images).isfinite().all()


@LEVELS
def test_every_level_draws_as_many_random_numbers(level):
    def state_after(level: int, form: str, training: bool = True) -> Tensor:
        model, (images, _) = network(level, form).train(training), pictures()
        torch.manual_seed(5)
        model(images).sum().backward()
        return torch.get_rng_state()

    untouched = torch.manual_seed(5).get_state()
    drawn = state_after(0, "BC, dropout")
    assert torch.equal(state_after(level, "BC, dropout"), drawn)
    assert not torch.equal(drawn, untouched)
    assert torch.equal(state_after(level, "BC"), untouched)
    assert torch.equal(state_after(level, "BC, dropout", training=False), untouched)


# Kept for backward:
@cache
def kept_mb(level: int, num_layers: int = 16, drop_rate: float = 0.0) -> float:
    """Return the MB per image kept for backward by DenseNet-BC with k = 12, in single precision."""
    stages = (num_layers,) * 3
    model = DenseNet(stages, 12, 24, 10, drop_rate=drop_rate, memory_level=level)
    images = torch.randn(2, 3, 32, 32)
    given = {tensor.untyped_storage().data_ptr() for tensor in (images, *model.parameters())}
    kept = {}

    class Counting(saved_tensors_hooks):
        """Count what any hooks keep, those of a network's own too: only the innermost run."""

        def __init__(self, pack, unpack):
            def counted(tensor: Tensor):
                packed = pack(tensor)
                for piece in packed if isinstance(packed, tuple) else (packed,):
                    storage = piece.untyped_storage()
                    if storage.data_ptr() not in given:
                        kept[storage.data_ptr()] = storage
                return packed

            super().__init__(counted, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", Counting)
        with Counting(lambda tensor: tensor, lambda tensor: tensor):
            logits = model(images)
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in kept.values()) / len(images) / 1e6


def test_level_0_keeps_what_modules_and_concatenation_must():
    # MB of DenseNet-BC-100-12: the input of every batch norm, convolution and pooling.
    blocks = others = 0
    channels = 24
    for pixels in (32 * 32, 16 * 16, 8 * 8):
        for _ in range(16):
            blocks += 4e-6 * pixels * (2 * channels + 2 * 48)
            channels += 12
        others += 4e-6 * pixels * 2 * channels
        if pixels > 64:
            channels //= 2
            others += 4e-6 * pixels * channels
    assert blocks == pytest.approx(31.7, abs=0.1)
    assert kept_mb(0) == pytest.approx(blocks + others, rel=0.01)
    assert kept_mb(0, drop_rate=0.2) > 1.05 * (blocks + others)  # the masks


@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
@pytest.mark.parametrize(("level", "limit"), [(2, 6.0), (3, 1.9), (4, 1.0)])
def test_bc_100_12_keeps_a_few_megabytes_an_image(level, limit, drop_rate):
    assert 0.1 < kept_mb(level, drop_rate=drop_rate) < limit


def test_each_memory_level_keeps_less_than_the_one_before():
    kept = [kept_mb(level) for level in range(5)]
    assert kept == sorted(set(kept), reverse=True)
    assert kept[1] < 0.7 * kept[0] and kept[2] < kept[1] / 2


@pytest.mark.parametrize("level", range(5))
def test_memory_grows_linearly_with_depth_from_level_2_on(level):
    ratio = kept_mb(level, 16) / kept_mb(level, 8)
    assert ratio < 2.2 if level >= 2 else ratio > 2.3


@pytest.mark.parametrize(("level", "count"), [(2, 3), (3, 1), (4, 1)])
def test_above_level_2_all_layers_share_the_memory_of_their_bottlenecks(level, count):
    written = set()

    def conv1x1(source, norm, weight, target, dropout, reader):
        written.add(target.value.data_ptr())
        REFERENCE.conv1x1(source, norm, weight, target, dropout, reader)

    model, images = network(level, "one block"), pictures()[0]
    epilogue = memory_efficient.BlockEpilogue(model.features.norm5, window=(13, 10))
    features = model.features.conv0(images)
    block = model.features.denseblock1
    block.ops = replace(REFERENCE, conv1x1=conv1x1)
    memory_efficient.run_dense_block(block, epilogue, features)
    assert len(written) == count
