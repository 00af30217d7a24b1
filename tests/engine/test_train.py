"""The training loop: each step, each schedule, each precision, and going on from the middle."""

import copy
import gc
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
import models.factory
import opts
import train
from datasets.batch_sampler import BatchSampler
from datasets.factory import DataSplits
from engine import cuda_graph
from engine.schedule import LRSchedule
from errors import NonFiniteError
from experiment.log import RunLog
from helpers.sample_data import create_data
from train import Trainer

CPU = torch.device("cpu")
SETTINGS = {
    "dataset": "synthetic",
    "nImages": 40,
    "imageSize": 8,
    "depth": 16,
    "growthRate": 4,
    "batchSize": 16,
    "nGPU": 0,
    "nEpochs": 4,
}


def settings(**changed: object):
    argv = [f"--{name}={value}" for name, value in (SETTINGS | changed).items()]
    return opts.parse(argv)


def build(**changed: object) -> tuple[Trainer, DataSplits]:
    """A trainer as the program builds it, and its data: 3 steps an epoch, the last of 8 images."""
    opt = settings(**changed)
    data = create_data(opt)
    model = models.factory.create(opt, len(data.classes))
    return train.create_trainer(opt, model, CPU, RunLog(None)), data


@dataclass
class Listed:
    """Given batches, the same in every epoch."""

    pairs: list[tuple[Tensor, Tensor]]

    @property
    def sampler(self) -> BatchSampler:
        """Numbers the images from 0 on."""
        sizes = [len(targets) for _, targets in self.pairs]
        return BatchSampler(torch.arange(sum(sizes)), sizes[0])

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.pairs[start:])


def listed(sizes: list[int], dtype: torch.dtype = torch.float32) -> Listed:
    pairs = [(torch.randn(n, 3, 8, 8, dtype=dtype), torch.randint(10, (n,))) for n in sizes]
    return Listed(pairs)


def nothing() -> None:
    """What is done after a step when nothing is."""


def epoch(trainer: Trainer, data: DataSplits, after_step: Callable[[], None] = nothing) -> dict:
    """One whole epoch as main.py runs it."""
    trained = trainer.train(data.train, after_step)
    return trainer.finish_epoch(trained, trainer.evaluate(data.val, nothing))


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and momentum, copied."""
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    momentum = trainer.state_dict()["momentum"]
    assert momentum.keys() == weights.keys()
    return weights | {f"momentum of {name}": m.clone() for name, m in momentum.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[n].double() - right[n].double()).abs().max().item() for n in left)


# ------------------------------------------------------------------------------------ one SGD step

RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.01


def stated_steps(
    model: nn.Module,
    batches: Listed,
    *,
    decayed: Callable[[Tensor], bool] = lambda parameter: True,
    nesterov: bool = True,
    dampening: float = 0.0,
) -> dict[str, Tensor]:
    """SGD written out in float64, and what the weights and the momentum become."""
    model = copy.deepcopy(model).double().train()
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for images, targets in batches.pairs:
        model.zero_grad()
        F.cross_entropy(model(images.double()), targets).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = p.grad + (DECAY * p if decayed(p) else 0)
                velocity[name] = MOMENTUM * velocity[name] + (1 - dampening) * gradient
                p -= RATE * (gradient + MOMENTUM * velocity[name] if nesterov else velocity[name])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return weights | {f"momentum of {name}": v for name, v in velocity.items()}


def stepped(precision: str = "double") -> tuple[nn.Module, Listed, dict[str, Tensor]]:
    """A network, five batches, and what the trainer makes of them."""
    changed = {"precision": precision, "LR": RATE, "momentum": MOMENTUM, "weightDecay": DECAY}
    trainer, _ = build(**changed)
    before = copy.deepcopy(trainer.model)
    double = precision == "double"
    batches = listed([8, 8, 8, 8, 5], torch.float64 if double else torch.float32)
    trainer.train(batches, nothing)
    return before, batches, weights_of(trainer)


@pytest.mark.parametrize(("precision", "tolerance"), [("double", 1e-12), ("single", 1e-4)])
def test_steps_equal_sgd_written_out(precision, tolerance):
    model, batches, got = stepped(precision)
    # 3x3 weights lie channels last: had the fused kernel paired them with gradients or momentum
    # in another order, they would differ.
    layer = model.get_parameter("features.denseblock1.denselayer1.conv2.weight")
    assert not layer.is_contiguous()
    assert largest_difference(got, stated_steps(model, batches)) < tolerance


@pytest.mark.parametrize(
    "wrong",
    [
        {"decayed": lambda parameter: parameter.ndim > 1},  # none on BN and biases: many ports
        {"nesterov": False},
        {"dampening": MOMENTUM},  # what the Lua optim package does unless told otherwise
    ],
    ids=["no decay on BN", "no Nesterov", "dampening"],
)
def test_steps_differ_from_sgd_with_a_mistake_in_it(wrong):
    model, batches, got = stepped()
    assert largest_difference(got, stated_steps(model, batches, **wrong)) > 1e-4


def test_steps_equal_the_unfused_optimizer_of_pytorch():
    model, batches, got = stepped()
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), RATE, MOMENTUM, 0, DECAY, nesterov=True, fused=False, foreach=False
    )
    for images, targets in batches.pairs:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter, rtol=0, atol=1e-13)
        buffer = optimizer.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(got[f"momentum of {name}"], buffer, rtol=0, atol=1e-13)


def test_a_run_without_momentum_steps_down_the_gradient():
    trainer, _ = build(precision="double", momentum=0, weightDecay=0, LR=RATE)
    before = copy.deepcopy(trainer.model).train()
    batches = listed([8], torch.float64)
    trainer.train(batches, nothing)
    images, targets = batches.pairs[0]
    F.cross_entropy(before(images), targets).backward()
    for name, p in trainer.model.named_parameters():
        old = before.get_parameter(name)
        torch.testing.assert_close(p, old - RATE * old.grad, rtol=0, atol=1e-13)
    assert trainer.state_dict()["momentum"] == {}


# --------------------------------------------------------------------------------------- schedules


def stated_cosine(t: int, total: int) -> float:
    return 0.5 * 0.1 * (1 + math.cos(math.pi * t / total))


@pytest.mark.parametrize(
    ("changed", "want"),
    [
        ({"lrShape": "cosine"}, [stated_cosine(t, 12) for t in range(1, 13)]),
        ({}, [0.1] * 3 + [0.01] * 3 + [0.001] * 6),  # of 4 epochs, epochs 2 and 3 are the cuts
        ({"milestones": "3,4"}, [0.1] * 6 + [0.01] * 3 + [0.001] * 3),
        ({"milestones": "9"}, [0.1] * 12),
    ],
    ids=["cosine", "multistep", "own milestones", "milestone after the end"],
)
def test_each_step_moves_the_weights_by_the_scheduled_rate(changed, want):
    # Without momentum and decay the movement is the rate times the gradient.
    trainer, data = build(precision="double", momentum=0, weightDecay=0, **changed)
    bias, used = trainer.model.classifier.bias, []
    before = bias.detach().clone()

    def measure() -> None:
        used.append(((before - bias.detach()) @ bias.grad / (bias.grad @ bias.grad)).item())
        before.copy_(bias.detach())

    records = [epoch(trainer, data, measure) for _ in range(4)]
    assert used == pytest.approx(want, abs=1e-12)
    assert [record["lr"] for record in records] == pytest.approx(want[2::3], abs=1e-15)


def stated_rates(*spans: tuple[int, int, float]) -> dict[int, float]:
    return {n: rate for first, last, rate in spans for n in range(first, last + 1)}


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (
            "--dataset cifar10",
            stated_rates((1, 149, 0.1), (150, 224, 0.01), (225, 300, 0.001)),
        ),
        ("--dataset svhn", stated_rates((1, 19, 0.1), (20, 29, 0.01), (30, 40, 0.001))),
        ("--dataset imagenet", stated_rates((1, 30, 0.1), (31, 60, 0.01), (61, 90, 0.001))),
        (
            "--dataset imagenet --depth 161",
            stated_rates((1, 30, 0.1), (31, 60, 0.01), (61, 90, 0.001), (91, 100, 0.0001)),
        ),
        # 50 % and 75 % of 5 are no whole epochs: the first that have passed them.
        (
            "--dataset cifar10 --nEpochs 5",
            stated_rates((1, 2, 0.1), (3, 3, 0.01), (4, 5, 0.001)),
        ),
    ],
)
def test_the_rate_of_every_epoch_is_the_papers(line, want):
    opt = opts.parse(line.split())
    schedule = LRSchedule(opt.lrShape, opt.LR, opt.nEpochs, opt.milestones)
    rates = {n: schedule.lr(n, 1, 782) for n in range(1, opt.nEpochs + 1)}
    assert rates == pytest.approx(want, rel=1e-12)
    assert all(schedule.lr(n, 782, 782) == rates[n] for n in rates)  # the same all epoch long


def test_a_cosine_ends_at_zero_and_never_rises():
    schedule = LRSchedule("cosine", 0.1, 3, None)
    rates = [schedule.lr(n, step, 7) for n in (1, 2, 3) for step in range(1, 8)]
    assert rates == pytest.approx([stated_cosine(t, 21) for t in range(1, 22)], abs=1e-15)
    assert rates[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(rates))


# ------------------------------------------------------------------------ going on from the middle


def saved(trainer: Trainer, directory) -> dict:
    """The trainer's state as it comes back from a checkpoint file."""
    facts = {"settings": {}, "data": {}, "overrides": []}  # which main.py adds
    path = checkpoints.save(directory, {**trainer.state_dict(), **facts}, keep=1)
    return checkpoints.load(path)


def rest_of_run(
    trainer: Trainer,
    data: DataSplits,
    after_step: Callable[[list], None] = lambda steps: None,
) -> dict:
    """Everything that could differ until the third epoch's end: each step, each epoch, the end."""
    steps, records = [], []

    def note() -> None:
        steps.append(trainer.metrics.state_dict())
        after_step(steps)

    while trainer.epoch <= 3:
        record = epoch(trainer, data, note)
        records.append({k: v for k, v in record.items() if not k.endswith(("_s", "_wait"))})
    return {
        "steps": steps,
        "records": records,
        "weights": {n: t.tolist() for n, t in weights_of(trainer).items()},
        "buffers": {n: b.tolist() for n, b in trainer.model.named_buffers()},
        "scaler": trainer.scaler.state_dict(),
        "results": (trainer.results.best, trainer.results.last, trainer.position),
    }


def saved_on_the_way(directory, step: int, **changed: object) -> tuple[dict, dict]:
    """A run that is never stopped: its state after a step of epoch 2, and what came after that."""
    trainer, data = build(**changed)
    epoch(trainer, data)
    states = []

    def save(steps: list) -> None:
        if trainer.epoch == 2 and trainer.step == step:
            states.append(saved(trainer, directory))
            steps.clear()

    rest = rest_of_run(trainer, data, save)
    return states[0], rest


RESTORED = {"dropRate": 0.3, "lrShape": "cosine", "manualSeed": 3}


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_a_restored_trainer_goes_on_bit_for_bit(tmp_path, precision, step):
    state, want = saved_on_the_way(tmp_path, step, **RESTORED, precision=precision)
    fresh, data = build(**RESTORED, precision=precision)
    torch.rand(100)  # another place in the random numbers than the saved one
    fresh.load_state_dict(state)
    got = rest_of_run(fresh, data)
    for part in want:
        assert got[part] == want[part], part


def with_other_random_numbers(trainer: Trainer) -> None:
    torch.manual_seed(99)


def without_momentum(trainer: Trainer) -> None:
    for state in trainer.optimizer.state.values():
        state["momentum_buffer"].zero_()


def at_another_step(trainer: Trainer) -> None:
    trainer.step = 0


@pytest.mark.parametrize(
    ("sabotage", "seed"),
    [
        (with_other_random_numbers, 3),
        (without_momentum, 3),
        (at_another_step, 3),
        (lambda trainer: None, 4),  # other data, order and crops
    ],
    ids=["RNG", "momentum", "position", "seed"],
)
def test_a_trainer_restored_in_part_goes_on_otherwise(tmp_path, sabotage, seed):
    state, want = saved_on_the_way(tmp_path, 1, **RESTORED)
    fresh, data = build(**RESTORED | {"manualSeed": seed})
    fresh.load_state_dict(state)
    sabotage(fresh)
    got = rest_of_run(fresh, data)
    assert got["weights"] != want["weights"]
    assert got["records"] != want["records"]


def test_the_loss_scale_of_half_precision_is_restored(tmp_path):
    trainer, data = build(precision="half")
    trainer.train(data.train, nothing)
    trainer.scaler.update(1024.0)
    fresh, _ = build(precision="half")
    assert fresh.scaler.get_scale() == 65536
    fresh.load_state_dict(saved(trainer, tmp_path))
    assert fresh.scaler.get_scale() == 1024
    assert fresh.scaler.state_dict() == trainer.scaler.state_dict()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"momentum": 0.9}, {"momentum": 0}),
        ({"momentum": 0}, {"momentum": 0.9}),
        ({"precision": "single"}, {"precision": "half"}),
        ({"precision": "half"}, {"precision": "single"}),
        ({"precision": "single"}, {"precision": "double"}),
    ],
    ids=str,
)
def test_a_state_can_go_on_under_the_settings_that_override_may_change(tmp_path, before, after):
    trainer, data = build(**before)
    epoch(trainer, data)
    fresh, data = build(**after)
    fresh.load_state_dict(saved(trainer, tmp_path))
    want, got = trainer.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(got[name].to(want[name].dtype), want[name]) for name in want)
    assert epoch(fresh, data)["epoch"] == 2


# --------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("precision", "weights", "logits"),
    [
        ("single", torch.float32, torch.float32),
        ("double", torch.float64, torch.float64),
        ("half", torch.float32, torch.float16),
        ("bf16", torch.float32, torch.bfloat16),
    ],
)
def test_every_precision_learns(precision, weights, logits):
    trainer, data = build(precision=precision, nImages=128, nEpochs=10)
    seen = set()
    trainer.model.classifier.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    records = [epoch(trainer, data) for _ in range(4)]
    assert seen == {logits}
    assert {p.dtype for p in trainer.model.parameters()} == {weights}
    assert {m.dtype for m in trainer.state_dict()["momentum"].values()} == {weights}
    losses = [record["train_loss"] for record in records]
    assert losses[3] < 0.7 * losses[0]


def test_a_gradient_that_overflows_half_precision_is_skipped_and_the_scale_falls():
    trainer, _ = build(precision="half")
    batches = listed([16, 16])
    trainer.train(batches, nothing)
    trainer.scaler.update(2.0**20)  # so high that the next step overflows
    noted = [(weights_of(trainer), trainer.scaler.get_scale())]
    trainer.train(
        Listed(batches.pairs * 2),
        lambda: noted.append((weights_of(trainer), trainer.scaler.get_scale())),
    )
    (before, _), *after = noted
    assert [scale for _, scale in after] == [2.0**19, 2.0**18]
    assert same(after[0][0], before)
    assert same(after[1][0], before)


# ---------------------------------------------------------------- losses and gradients not finite


def spoil_image(batches: Listed, trainer: Trainer, value: float) -> None:
    batches.pairs[2][0][0, 0, 0, 0] = value


def spoil_logit(batches: Listed, trainer: Trainer, value: float) -> None:
    # The loss is infinite while softmax minus target, its gradient, is finite: in half precision
    # an overflowing logit does this.
    with torch.no_grad():
        trainer.model.classifier.bias[batches.pairs[2][1][0]] = -value


def spoil_gradient(batches: Listed, trainer: Trainer, value: float) -> None:
    # Of the next step alone, whose loss is finite.
    def spoil(gradient: Tensor) -> Tensor:
        hook.remove()
        return gradient.index_fill(0, torch.tensor([1]), value)

    weight = trainer.model.get_parameter("features.denseblock2.denselayer1.conv1.weight")
    hook = weight.register_hook(spoil)


SPOILERS = {
    "NaN image": (spoil_image, math.nan),
    "infinite image": (spoil_image, math.inf),
    "infinite logit": (spoil_logit, math.inf),
    "NaN gradient": (spoil_gradient, math.nan),
    "infinite gradient": (spoil_gradient, math.inf),
}
GRADIENTS = ["NaN gradient", "infinite gradient"]
# Gradients that overflow are usual in half precision, and no reason to stop.
STOPS = [
    (precision, spoiler)
    for precision in ("single", "double", "half", "bf16")
    for spoiler in SPOILERS
    if not (precision == "half" and spoiler in GRADIENTS)
]
LATE = ("single", "half")


def spoilt(precision: str, spoiler: str) -> tuple[Trainer, Listed, Callable[[], None], list]:
    """A trainer in its second epoch, whose third step has a loss or gradient that is not finite.

    Also what to call after each step, and the weights that it notes after the second.
    """
    trainer, _ = build(precision=precision)
    batches = listed([8] * 5, torch.float64 if precision == "double" else torch.float32)
    trainer.finish_epoch(trainer.train(batches, nothing), trainer.evaluate(batches, nothing))
    if precision == "half":
        # Where long runs are: a higher scale overflows by itself and hides what is tested here.
        trainer.scaler.update(1024.0)
    spoil, value = SPOILERS[spoiler]
    noted = []

    def after_step() -> None:
        if trainer.step == 2:
            # Every image of the next batch is of a class whose logit is about to be spoilt.
            batches.pairs[2][1].fill_(0)
            spoil(batches, trainer, value)
            noted.append(weights_of(trainer))

    return trainer, batches, after_step, noted


@pytest.mark.parametrize(("precision", "spoiler"), STOPS)
def test_what_is_not_finite_stops_in_its_step_before_it_touches_the_weights(precision, spoiler):
    trainer, batches, after_step, noted = spoilt(precision, spoiler)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train(batches, after_step)
    report = caught.value.report()
    assert caught.value.code == 5
    what = "a gradient" if spoiler in GRADIENTS else "loss"
    assert report.startswith(f"error: {what} is not finite at epoch 2, step 3; fix: ")
    assert "--LR" in report
    assert caught.value.details == {"batch": list(range(16, 24))}
    assert trainer.step == 3
    assert same(weights_of(trainer), noted[0])


@pytest.mark.parametrize(("precision", "spoiler"), [pair for pair in STOPS if pair[0] in LATE])
def test_what_is_read_late_still_names_its_step_and_has_stopped_all_later_ones(precision, spoiler):
    # On a GPU the check is read only when something is shown; until then steps go on.
    trainer, batches, after_step, noted = spoilt(precision, spoiler)
    trainer.check_finite = nothing
    trainer.train(batches, after_step)
    assert trainer.step == 5
    assert same(weights_of(trainer), noted[0])
    with pytest.raises(NonFiniteError) as caught:
        Trainer.check_finite(trainer)
    what = "a gradient" if spoiler in GRADIENTS else "loss"
    assert f"error: {what} is not finite at epoch 2, step 3;" in caught.value.report()


@pytest.mark.parametrize("spoiler", GRADIENTS)
def test_a_gradient_that_is_not_finite_costs_half_precision_one_step(spoiler):
    trainer, batches, after_step, _ = spoilt("half", spoiler)
    noted = []

    def note() -> None:
        after_step()
        noted.append((weights_of(trainer), trainer.scaler.get_scale()))

    trainer.train(batches, note)
    weights = [weights for weights, _ in noted]
    assert [same(*pair) for pair in itertools.pairwise(weights)] == [False, True, False, False]
    assert [scale for _, scale in noted] == [1024, 1024, 512, 512, 512]


def test_finite_losses_pass_the_same_check():
    trainer, batches, _, _ = spoilt("single", "NaN image")
    before = weights_of(trainer)
    trainer.train(batches, nothing)
    assert not same(weights_of(trainer), before)


# -------------------------------------------------------------------------------------- evaluation


def whole_set(trainer: Trainer, batches: Listed) -> tuple[Tensor, Tensor]:
    """All logits and targets, computed at once."""
    images = torch.cat([images for images, _ in batches.pairs])
    with torch.no_grad():
        logits = trainer.model.eval()(images)
    return logits, torch.cat([targets for _, targets in batches.pairs])


def stated_errors(logits: Tensor, targets: Tensor) -> dict[str, float]:
    places = (logits > logits.gather(1, targets[:, None])).sum(dim=1)  # 0 for the largest logit
    count = len(targets)
    return {
        "val_loss": F.cross_entropy(logits, targets).item(),
        "val_top1": 100 * (places >= 1).sum().item() / count,
        "val_top5": 100 * (places >= 5).sum().item() / count,
    }


@pytest.mark.parametrize(("precision", "tolerance"), [("single", 1e-5), ("double", 1e-12)])
def test_evaluation_counts_every_image_once(precision, tolerance):
    trainer, _ = build(precision=precision)
    batches = listed([8, 8, 3], torch.float64 if precision == "double" else torch.float32)
    got = trainer.evaluate(batches, nothing)
    want = stated_errors(*whole_set(trainer, batches))
    assert got == pytest.approx(want, abs=tolerance)
    assert got["val_top1"] == want["val_top1"]

    each = [trainer.evaluate(Listed([pair]), nothing)["val_loss"] for pair in batches.pairs]
    assert abs(sum(each) / 3 - want["val_loss"]) > 1e-4  # a mean of means would show


@pytest.mark.parametrize("precision", ["single", "half", "bf16"])
def test_evaluation_changes_nothing_and_repeats(precision):
    trainer, data = build(precision=precision, dropRate=0.5)
    trainer.train(data.train, nothing)
    before, state = weights_of(trainer), copy.deepcopy(trainer.model.state_dict())
    position, metrics = trainer.position, trainer.metrics.state_dict()
    first = trainer.evaluate(data.val, nothing)
    assert same(weights_of(trainer), before)
    assert same(trainer.model.state_dict(), state)
    assert (trainer.position, trainer.metrics.state_dict()) == (position, metrics)
    assert trainer.evaluate(data.val, nothing) == first


def test_training_after_an_evaluation_uses_batch_statistics_again():
    trainer, data = build()
    trainer.evaluate(data.val, nothing)
    before = trainer.model.features.norm5.running_mean.clone()
    trainer.train(data.train, nothing)
    assert not torch.equal(trainer.model.features.norm5.running_mean, before)


def test_evaluation_calls_back_after_each_batch_and_names_its_phase():
    trainer, _ = build()
    calls = []
    got = trainer.evaluate(listed([4, 4, 1]), lambda: calls.append(1), phase="test")
    assert len(calls) == 3
    assert got.keys() == {"test_loss", "test_top1", "test_top5"}


def test_evaluation_with_crops_is_of_their_mean():
    trainer, _ = build()
    trainer.num_crops = 10
    sizes = [2, 2, 1]
    crops = Listed([(torch.randn(10 * n, 3, 8, 8), torch.randint(10, (n,))) for n in sizes])
    logits, targets = whole_set(trainer, crops)
    want = stated_errors(logits.view(5, 10, 10).mean(dim=1), targets)
    assert trainer.evaluate(crops, nothing) == pytest.approx(want, abs=1e-5)
    # The crops of an image follow each other; taken every fifth they belong to others.
    mixed = stated_errors(logits.view(10, 5, 10).mean(dim=0), targets)
    assert abs(mixed["val_loss"] - want["val_loss"]) > 1e-3


# ------------------------------------------------------------------------------- results of epochs


def finish(trainer: Trainer, top1: float, loss: float = 1.0) -> dict:
    val = {"val_loss": loss, "val_top1": top1, "val_top5": top1 / 2}
    return trainer.finish_epoch({"lr": 0.1, "train_loss": 2.0}, val)


def test_best_is_the_lowest_error_and_last_the_newest():
    trainer, _ = build()
    flags = []
    for top1 in (30.0, 20.0, 25.0, 20.0):
        finish(trainer, top1)
        flags.append(trainer.results.is_best)
    assert flags == [True, True, False, False]  # an equal error is no better
    assert trainer.results.best == {"epoch": 2, "val_loss": 1.0, "val_top1": 20.0, "val_top5": 10.0}
    assert trainer.results.last == {"epoch": 4, "val_loss": 1.0, "val_top1": 20.0, "val_top5": 10.0}
    assert trainer.results.flat() == {
        "last_epoch": 4,
        "last_loss": 1.0,
        "last_top1": 20.0,
        "last_top5": 10.0,
        "best_epoch": 2,
        "best_loss": 1.0,
        "best_top1": 20.0,
        "best_top5": 10.0,
    }


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_never_best(loss):
    trainer, _ = build()
    finish(trainer, 0.0, loss)
    assert trainer.results.best is None
    assert not trainer.results.is_best
    finish(trainer, 50.0)
    assert trainer.results.best["epoch"] == 2
    finish(trainer, 10.0, loss)
    assert trainer.results.best["epoch"] == 2
    assert not trainer.results.is_best
    finish(trainer, 10.0)
    assert trainer.results.best["epoch"] == 4


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_checkpoint_after_a_validation_loss_that_is_not_finite_can_be_resumed(tmp_path, loss):
    # The weights are sound: the next epoch may well be finite again.
    trainer, data = build()
    epoch(trainer, data)
    finish(trainer, 50.0, loss)
    fresh, _ = build()
    fresh.load_state_dict(saved(trainer, tmp_path))
    assert fresh.results.best == trainer.results.best
    assert fresh.position == trainer.position


def test_an_epoch_ends_with_its_record_and_a_fresh_start():
    trainer, data = build()
    record = epoch(trainer, data)
    assert record["epoch"] == 1
    names = (
        "epoch lr train_loss train_top1 train_top5 val_loss val_top1 val_top5 images_per_s time_s"
    )
    assert set(names.split()) <= record.keys()
    assert trainer.position == {"epoch": 2, "step": 0, "global_step": 3}
    assert trainer.metrics.count == 0
    assert trainer.is_between_epochs
    assert (trainer.time_s, trainer.data_s) == (0, 0)
    assert record["images_per_s"] == pytest.approx(40 / record["time_s"])
    assert 0 <= record["data_wait"] <= 1

    after_each = []
    trainer.train(data.train, lambda: after_each.append((trainer.position, trainer.metrics.count)))
    assert [position["global_step"] for position, _ in after_each] == [4, 5, 6]
    assert [position["step"] for position, _ in after_each] == [1, 2, 3]
    assert [count for _, count in after_each] == [16, 32, 40]
    assert not trainer.is_between_epochs


def test_the_time_of_an_epoch_has_the_waiting_for_the_device_in_it_and_no_saving(monkeypatch):
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    for module in (train, cuda_graph):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    trainer, data = build()
    trainer.check_finite = lambda: take(5)
    trainer.train(data.train, lambda: take(100))
    assert trainer.time_s == 20  # three steps and the end


def test_training_sums_are_those_of_the_losses_that_were_trained_on():
    trainer, _ = build(momentum=0, LR=1e-12, weightDecay=0)  # so that the weights stay
    batches = listed([8, 8, 3])
    model, losses = copy.deepcopy(trainer.model).train(), []
    for images, targets in batches.pairs:
        losses.append(F.cross_entropy(model(images), targets).item() * len(targets))
    got = trainer.train(batches, nothing)
    assert got["train_loss"] == pytest.approx(sum(losses) / 19, abs=1e-5)
    assert trainer.metrics.count == 19


# ---------------------------------------------------------------------------------- memory, console


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("leaky", [False, True])
def test_tensors_do_not_pile_up_from_epoch_to_epoch(leaky):
    trainer, data = build()
    kept = []
    counts = []
    for _ in range(4):
        epoch(trainer, data, lambda: kept.append(torch.zeros(1)) if leaky else None)
        counts.append(live_tensors())
    assert (counts[1] == counts[2] == counts[3]) is not leaky


class Reads(TorchDispatchMode):
    """Counts how often a value is read from a tensor, for which a GPU would have to be waited."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_a_step_reads_nothing_but_the_check_that_the_cpu_makes_after_it(precision):
    def counts(trainer: Trainer, data: DataSplits) -> list[int]:
        counted = []
        with Reads() as reads:
            trainer.train(data.train, lambda: counted.append(reads.count))
        return [*counted, reads.count]

    # The check follows what is done after a step; at the end its results are read as well.
    assert counts(*build(precision=precision, dropRate=0.2)) == [0, 1, 2, 5]
    trainer, data = build(precision=precision, dropRate=0.2)
    trainer.check_finite = nothing
    assert counts(trainer, data) == [0, 0, 0, 1]


def test_the_lines_of_an_epoch_hold_what_the_luas_do(capsys):
    trainer, data = build()
    epoch(trainer, data)
    out = capsys.readouterr().out
    number = r"\s+\d+\.\d+"
    errors = rf"Time{number}  Data{number}  Err{number}  top1{number}  top5{number}"
    assert "=> Training epoch # 1\n" in out
    assert re.search(rf"^ \| Epoch: \[1\]\[3/3\]    {errors}  LR 0\.1$", out, re.MULTILINE)
    assert re.search(rf"^ \| Test: \[1\]\[1/1\]    {errors}$", out, re.MULTILINE)
