"""Memory levels 2 to 4 in use: evaluation, frozen layers, several processes, and what they keep."""

import copy
import multiprocessing
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import helpers.run_main  # noqa: F401 (lets processes find the tests)
from helpers.tiny_networks import largest_difference, network, norms, one_step, pictures, results
from kernels.backend import REFERENCE
from models import memory_efficient
from models.densenet import DenseNet

LEVELS = pytest.mark.parametrize("level", [1, *memory_efficient.MEMORY_EFFICIENT_LEVELS])
SHARED = pytest.mark.parametrize("level", memory_efficient.MEMORY_EFFICIENT_LEVELS)
FORM = pytest.mark.parametrize("form", ["BC, dropout", "basic", "ImageNet"])


# ------------------------------------------------------------------------------------- evaluation


@LEVELS
@FORM
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_takes_each_normalisations_own_running_statistics(level, form, context):
    model, images = network(level, form).eval(), pictures(form)[0]
    moved, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    norms(moved)[-2].running_mean += 0.1
    with context():
        want = network(0, form).eval()(images)
        got, other = model(images), moved(images)
    assert got.requires_grad is want.requires_grad is (context is torch.enable_grad)
    assert (got - want).abs().max() < 1e-10
    assert (other - want).abs().max() > 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@LEVELS
@FORM
def test_gradients_pass_through_a_network_in_evaluation(level, form):
    images, targets = pictures(form)
    got, want = (one_step(network(i, form).eval(), images, targets) for i in (level, 0))
    assert largest_difference(got, want) < 1e-10
    assert largest_difference(one_step(network(level, form), images, targets), want) > 1e-3


@SHARED
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_evaluation_in_lower_precision_is_as_near_as_level_0_is(level, low):
    images = pictures(count=32)[0].float()

    def logits(level: int, low: torch.dtype | None) -> Tensor:
        model = network(level).float().eval()
        with torch.no_grad(), torch.autocast("cpu", low or torch.bfloat16, enabled=bool(low)):
            return model(images)

    single, low_0, low_n = logits(0, None), logits(0, low), logits(level, low)
    assert low_n.dtype == low_0.dtype == low
    assert 0 < (low_n - single).norm() < 1.5 * (low_0 - single).norm()
    assert (logits(level, None) - single).norm() < 1e-3 * (low_0 - single).norm()


@LEVELS
def test_no_images_have_no_logits(level):
    with torch.no_grad():
        assert network(level).eval()(torch.zeros(0, 3, 13, 10).double()).shape == (0, 3)


# ------------------------------------------------------------------------- other ways of training


@LEVELS
@FORM
def test_training_mode_without_gradients_moves_the_statistics_alike(level, form):
    images, _ = pictures(form)

    def passed(level: int) -> dict[str, Tensor]:
        model = network(level, form)
        torch.manual_seed(5)
        with torch.no_grad():
            logits = model(images)
        assert not logits.requires_grad
        return {"logits": logits, **dict(model.named_buffers())}

    got, want = passed(level), passed(0)
    assert largest_difference(got, want) < 1e-10
    before = {"logits": want["logits"], **dict(network(0, form).named_buffers())}
    assert largest_difference(want, before) >= 1  # the counters at least have moved


@LEVELS
@FORM
def test_a_second_forward_before_backward_spoils_nothing(level, form):
    (first, targets), (second, _) = pictures(form), pictures(form, count=4, seed=9)

    def losses(model: nn.Module):
        torch.manual_seed(5)
        yield F.cross_entropy(model(first), targets)
        yield F.cross_entropy(model(second), targets[:4])

    interleaved, summed, sequential = network(level, form), network(level, form), network(0, form)
    both = list(losses(interleaved))
    for loss in both:
        loss.backward()
    sum(losses(summed)).backward()
    for loss in losses(sequential):
        loss.backward()
    assert largest_difference(results(interleaved), results(sequential)) < 1e-10
    assert largest_difference(results(summed), results(sequential)) < 1e-10
    alone = network(0, form)
    next(losses(alone)).backward()
    assert largest_difference(results(interleaved), results(alone)) > 1e-3


@LEVELS
def test_a_kept_graph_gives_the_same_gradients_again(level):
    images, targets = pictures()
    model = network(level)
    loss = F.cross_entropy(model(images), targets)
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-12, atol=1e-14)
    assert any(gradient.abs().max() > 1e-3 for gradient in once)


@LEVELS
def test_what_is_kept_may_be_moved_elsewhere_until_backward(level):
    images, targets = pictures("BC, dropout")
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        got = one_step(network(level, "BC, dropout"), images, targets)
    want = one_step(network(0, "BC, dropout"), images, targets)
    assert largest_difference(got, want) < 1e-10
    doubled = torch.autograd.graph.saved_tensors_hooks(
        torch.clone, lambda x: 2 * x if x.is_floating_point() else x
    )
    with doubled:
        other = one_step(network(level, "BC, dropout"), images, targets)
    assert largest_difference(other, want) > 1e-3


@LEVELS
def test_a_network_may_be_checkpointed_as_a_whole(level):
    images, targets = pictures()
    model = network(level)
    images.requires_grad_()

    def gradients(run) -> list[Tensor]:
        model.zero_grad()
        F.cross_entropy(run(images), targets).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plainly = gradients(model)
    again = gradients(lambda x: checkpoint(model, x, use_reentrant=False))
    for mine, theirs in zip(again, plainly, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("setting", ["eps", "momentum"])
def test_batch_norms_that_differ_are_each_obeyed(setting):
    images, targets = pictures()

    def step(level: int, value: float) -> dict[str, Tensor]:
        model = network(level)
        setattr(norms(model)[1], setting, value)
        return one_step(model, images, targets)

    assert largest_difference(step(2, 0.3), step(0, 0.3)) < 1e-10
    assert largest_difference(step(2, 0.2), step(0, 0.3)) > 1e-4


def test_what_backward_has_used_is_free_though_the_loss_is_still_held():
    model = network(2)
    images, _ = pictures()
    kept: list[weakref.ref] = []
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers(), images)}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images).sum()
    alive = [storage for storage in kept if storage() is not None]
    assert len(alive) > 10
    loss.backward()
    # The gradient of a sum over the logits needs nothing, and the loss itself is one number.
    assert sum(storage() is not None for storage in alive) <= 1


@LEVELS
@FORM
def test_evaluation_in_inference_mode_leaves_training_possible(level, form):
    images, targets = pictures(form)
    model = network(level, form)
    with torch.inference_mode():
        model.eval()(images)
    got = one_step(model.train(), images, targets)
    assert largest_difference(got, one_step(network(0, form), images, targets)) < 1e-10
    with torch.inference_mode():
        moved = model.train()(images)  # which moves the statistics, as it does at level 0
    assert moved.is_inference()
    again = one_step(model, images, targets)
    assert largest_difference(again, got) > 1e-3


@LEVELS
def test_networks_that_take_turns_do_not_disturb_each_other(level):
    images, targets = pictures()
    first, second = network(level, seed=3), network(level, seed=8)
    losses = [F.cross_entropy(model(images), targets) for model in (first, second, first, second)]
    with torch.no_grad():
        second.eval()(images)
        second.train()
    for loss in (losses[2], losses[1], losses[0], losses[3]):
        loss.backward()
    for model, seed in ((first, 3), (second, 8)):
        alone = network(0, seed=seed)
        for _ in range(2):
            F.cross_entropy(alone(images), targets).backward()
        assert largest_difference(results(model), results(alone)) < 1e-10
    assert largest_difference(results(first), results(second)) > 1e-3


@SHARED
def test_threads_that_train_at_the_same_time_do_not_disturb_each_other(level):
    images, targets = pictures(count=16)
    want = [one_step(network(level, seed=seed), images, targets) for seed in range(4)]

    def train(seed: int) -> float:
        model, differences = network(level, seed=0), []
        model.load_state_dict(states[seed])
        for _ in range(10):
            model.load_state_dict(states[seed])
            model.zero_grad()
            loss = F.cross_entropy(model(images), targets)
            loss.backward()
            got = results(model, loss=loss.detach(), image=want[seed]["image"])
            differences.append(largest_difference(got, want[seed]))
        return max(differences)

    states = [copy.deepcopy(network(level, seed=seed).state_dict()) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(train, range(4))) < 1e-10
    assert largest_difference(want[0], want[1]) > 1e-3


# Which modules are put into evaluation, or into training, after the whole network was put into the
# other.
def freeze(model: DenseNet, what: str) -> None:
    block = model.features.denseblock1
    if what == "one norm":
        block.denselayer2.norm1.eval()
    elif what == "one block":
        block.eval()
    elif what == "the tail":
        model.features.norm5.eval()
    elif what == "all norms":
        for norm in norms(model):
            norm.eval()
    elif what == "all but the norms":
        model.eval()
        for norm in norms(model):
            norm.train()


FROZEN = ["one norm", "one block", "the tail", "all norms", "all but the norms"]


@LEVELS
@pytest.mark.parametrize("what", FROZEN)
@pytest.mark.parametrize("gradients", [True, False])
def test_frozen_normalisations_are_frozen_as_at_level_0(level, what, gradients):
    images, targets = pictures("BC, dropout")

    def step(level: int, what: str) -> dict[str, Tensor]:
        model = network(level, "BC, dropout")
        freeze(model, what)
        if gradients:
            return one_step(model, images, targets)
        torch.manual_seed(5)
        with torch.no_grad():
            return {"logits": model(images), **dict(model.named_buffers())}

    want = step(0, what)
    assert largest_difference(step(level, what), want) < 1e-10
    assert largest_difference(step(level, "nothing"), want) > 1e-3


@LEVELS
@FORM
@pytest.mark.parametrize("part", ["conv", "norm", "denseblock1", "features", "classifier", "stem"])
def test_parameters_that_want_no_gradient_get_none(level, form, part):
    images, targets = pictures(form)

    def step(level: int) -> dict[str, Tensor]:
        model = network(level, form)
        for name, parameter in model.named_parameters():
            wanted = "conv0" not in name if part == "stem" else part not in name
            parameter.requires_grad_(wanted)
        torch.manual_seed(5)
        F.cross_entropy(model(images), targets).backward()  # nor do the images
        return results(model)

    got, want = step(level), step(0)
    assert largest_difference(got, want) < 1e-10
    withheld = {name for name, value in got.items() if value is None}
    assert 0 < len(withheld) < len(list(network(0, form).parameters()))


@SHARED
def test_a_second_derivative_is_refused_in_so_many_words(level):
    images, targets = pictures()

    def second(level: int) -> None:
        model = network(level)
        loss = F.cross_entropy(model(images), targets)
        gradient = torch.autograd.grad(loss, model.features.conv0.weight, create_graph=True)[0]
        gradient.square().sum().backward()

    second(0)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second(level)


@LEVELS
def test_one_value_per_channel_is_refused_in_training(level):
    for count, size in ((1, 2), (1, 1)):
        images = torch.randn(count, 3, size, size, dtype=torch.float64)
        stages = (1, 1) if size == 2 else (1,)
        for i in (0, level):
            with pytest.raises(ValueError, match=r"value.* per channel"):
                network(i, stages=stages)(images)
        two = torch.cat([images, images + 1])
        assert network(level, stages=stages)(two).isfinite().all()
        with torch.no_grad():
            assert network(level, stages=stages).eval()(images).isfinite().all()


@LEVELS
def test_every_level_draws_as_many_random_numbers(level):
    images, _ = pictures()

    def state_after(level: int, form: str, training: bool = True) -> Tensor:
        model = network(level, form).train(training)
        torch.manual_seed(5)
        model(images).sum().backward()
        return torch.get_rng_state()

    torch.manual_seed(5)
    untouched = torch.get_rng_state()
    drawn = state_after(0, "BC, dropout")
    assert torch.equal(state_after(level, "BC, dropout"), drawn)
    assert not torch.equal(drawn, untouched)
    assert torch.equal(state_after(level, "BC"), untouched)
    assert torch.equal(state_after(level, "BC, dropout", training=False), untouched)


# -------------------------------------------------------------------------------- two processes


def replica(rank: int, folder: Path) -> None:
    """One of two processes that train on half a batch each; saves the gradients it ends with."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    images, targets = pictures("BC, dropout", count=8)
    half = slice(4 * rank, 4 * rank + 4)
    found = {}
    for level in memory_efficient.MEMORY_EFFICIENT_LEVELS:
        model = network(level, "BC, dropout")
        parallel = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(5)
        F.cross_entropy(parallel(images[half]), targets[half]).backward()
        found[level] = results(model)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_average_of_their_gradients(tmp_path):
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=replica, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    images, targets = pictures("BC, dropout", count=8)
    alone = []
    for half in (slice(0, 4), slice(4, 8)):
        model = network(0, "BC, dropout")
        torch.manual_seed(5)
        F.cross_entropy(model(images[half]), targets[half]).backward()
        alone.append(results(model))
    for rank in (0, 1):
        for got in torch.load(tmp_path / f"{rank}.pt", weights_only=True).values():
            average = {name: (alone[0][name] + alone[1][name]) / 2 if "gradient" in name
                       else alone[rank][name] for name in got}  # fmt: skip
            assert largest_difference(got, average) < 1e-10
            assert largest_difference(got, alone[rank]) > 1e-3


# -------------------------------------------------------------------------- kept for backward


def kept_mb(level: int, num_layers: int = 16, drop_rate: float = 0.0) -> float:
    """MB per image that backward finds kept of DenseNet-BC with k = 12, in single precision."""
    stages = (num_layers,) * 3
    model = DenseNet(stages, 12, 24, 10, drop_rate=drop_rate, memory_level=level)
    images = torch.randn(2, 3, 32, 32)
    given = {tensor.untyped_storage().data_ptr() for tensor in (images, *model.parameters())}
    kept = {}

    class Counting(torch.autograd.graph.saved_tensors_hooks):
        """Count what hooks keep, also those that a network sets itself: only the inner ones run."""

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


def naive_mb() -> tuple[float, float]:
    """What modules and concatenation keep of DenseNet-BC-100-12: in the blocks, and in all.

    Every normalisation its input, every convolution its input, every pooling its input.
    """
    blocks = others = 0
    channels = 24
    for pixels in (32 * 32, 16 * 16, 8 * 8):
        for _ in range(16):
            blocks += pixels * (2 * channels + 2 * 48)
            channels += 12
        others += pixels * 2 * channels
        if pixels > 64:
            channels //= 2
            others += pixels * channels
    return 4e-6 * blocks, 4e-6 * (blocks + others)


def test_level_0_keeps_what_modules_and_concatenation_must():
    blocks, everything = naive_mb()
    assert blocks == pytest.approx(31.7, abs=0.1)
    assert kept_mb(0) == pytest.approx(everything, rel=0.01)
    assert kept_mb(0, drop_rate=0.2) > 1.05 * everything  # the masks


@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
@pytest.mark.parametrize(("level", "limit"), [(2, 6.0), (3, 1.9), (4, 1.0)])
def test_bc_100_12_keeps_a_few_megabytes_an_image(level, limit, drop_rate):
    assert 0.1 < kept_mb(level, drop_rate=drop_rate) < limit


def test_each_memory_level_keeps_less_than_the_one_before():
    kept = [kept_mb(level) for level in range(5)]
    assert kept == sorted(kept, reverse=True)
    assert kept[1] < 0.7 * kept[0] and kept[2] < kept[1] / 2
    assert len(set(kept)) == 5


@pytest.mark.parametrize(("level", "count"), [(2, 3), (3, 1), (4, 1)])
def test_above_level_2_all_layers_share_the_memory_of_their_bottlenecks(level, count):
    written = set()

    def conv1x1(source, norm, weight, target, dropout):
        written.add(target.value.data_ptr())
        REFERENCE.conv1x1(source, norm, weight, target, dropout)

    model, images = network(level, "one block"), pictures()[0]
    epilogue = memory_efficient.BlockEpilogue(model.features.norm5, window=(13, 10))
    features = model.features.conv0(images)
    ops = replace(REFERENCE, conv1x1=conv1x1)
    memory_efficient.run_dense_block(model.features.denseblock1, epilogue, features, ops, level)
    assert len(written) == count


@pytest.mark.parametrize("level", range(5))
def test_twice_the_depth_is_twice_the_memory_but_for_concatenation(level):
    ratio = kept_mb(level, 32) / kept_mb(level, 16)
    assert ratio < 2.2 if level >= 2 else ratio > 2.5
