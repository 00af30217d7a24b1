"""Test the Trainer: each step, each precision, non-finite values, evaluation and resume."""

import copy
import gc
import itertools
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
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
from errors import NonFiniteError
from experiment.log import RunLog
from helpers.sample_data import create_data
from kernels import reference
from train import Trainer

CPU = torch.device("cpu")
SETTINGS = {"dataset": "synthetic", "nImages": 40, "imageSize": 8, "depth": 10, "growthRate": 4,
            "batchSize": 16, "nGPU": 0, "nEpochs": 4}  # fmt: skip
DTYPES = {"double": torch.float64}  # of images; float32 in other precisions


def build(**changed: object) -> tuple[Trainer, DataSplits]:
    """Make a trainer as the program does, and its data: 3 steps an epoch, the last of 8 images."""
    flags = (SETTINGS | changed).items()
    opt = opts.parse([f"--{name}={value}" for name, value in flags if value is not None])
    data = create_data(opt)
    return Trainer(opt, models.factory.create(opt, len(data.classes)), CPU, RunLog(None)), data


@dataclass
class FixedBatches:
    """Load the same batches in every epoch."""

    pairs: list[tuple[Tensor, Tensor]]

    @property
    def sampler(self) -> BatchSampler:
        """Number the images from 0 on."""
        sizes = [len(targets) for _, targets in self.pairs]
        return BatchSampler(torch.arange(sum(sizes)), sizes[0])

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.pairs[start:])


def random_batches(sizes: list[int], precision: str = "single") -> FixedBatches:
    dtype = DTYPES.get(precision)
    pairs = [(torch.randn(n, 3, 8, 8, dtype=dtype), torch.randint(10, (n,))) for n in sizes]
    return FixedBatches(pairs)


def nothing() -> None:
    """Do nothing after a step."""


def run_epoch(trainer: Trainer, data: DataSplits, on_step_end: Callable[[], None] = nothing):
    """Run one epoch as main.py does; return its record."""
    trained = trainer.train(data.train, on_step_end)
    return trainer.finish_epoch(trained, trainer.evaluate(data.val, nothing))


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copy weights and momentum."""
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    momentum = trainer.state_dict()["momentum"]
    return weights | {f"momentum of {name}": m.clone() for name, m in momentum.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# One SGD step:
LR, DECAY = 0.1, 0.01


def sgd_written_out(
    model: nn.Module,
    batches: FixedBatches,
    momentum: float,
    *,
    decayed: Callable[[Tensor], bool] = lambda parameter: True,
    nesterov: bool = True,
    dampening: float = 0.0,
) -> dict[str, Tensor]:
    """Compute steps of SGD in float64; return the new weights and momentum."""
    model = copy.deepcopy(model).double().train()
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for images, targets in batches.pairs:
        model.zero_grad()
        F.cross_entropy(model(images.double()), targets).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = p.grad + (DECAY * p if decayed(p) else 0)
                velocity[name] = momentum * velocity[name] + (1 - dampening) * gradient
                p -= LR * (gradient + momentum * velocity[name] if nesterov else velocity[name])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if momentum:
        weights |= {f"momentum of {name}": v for name, v in velocity.items()}
    return weights


def step_difference(
    precision: str, momentum: float = 0.9, form: str = "true", **wrong: object
) -> float:
    """Return the largest difference of five steps of the Trainer from SGD written out.

    Args:
        form: `--nesterov`.
    """
    flags = {"LR": LR, "momentum": momentum, "weightDecay": DECAY, "nesterov": form}
    trainer, _ = build(precision=precision, **flags)
    before = copy.deepcopy(trainer.model)
    # 3x3 weights lie channels last: had the fused kernel paired them with gradients or momentum
    # in another order, they would differ.
    layer = before.get_parameter("features.denseblock1.denselayer1.conv2.weight")
    assert not layer.is_contiguous()
    batches = random_batches([8, 8, 8, 8, 5], precision)
    trainer.train(batches, nothing)
    got, want = weights_of(trainer), sgd_written_out(before, batches, momentum, **wrong)
    assert got.keys() == want.keys()
    return max((got[n].double() - want[n]).abs().max().item() for n in want)


@pytest.mark.parametrize(
    ("precision", "momentum", "limit"),
    [("double", 0.9, 1e-12), ("double", 0, 1e-12), ("single", 0.9, 1e-4)],
)
def test_steps_equal_sgd_written_out(precision, momentum, limit):
    assert step_difference(precision, momentum) < limit


def test_plain_momentum_equals_sgd_written_out():
    assert step_difference("double", form="false", nesterov=False) < 1e-12
    assert step_difference("double", form="false") > 1e-4  # Nesterov's


@pytest.mark.parametrize(
    "wrong",
    [
        {"decayed": lambda parameter: parameter.ndim > 1},  # none on BN and biases: many ports
        {"nesterov": False},
        {"dampening": 0.9},  # what the Lua optim package does unless told otherwise
    ],
    ids=["no decay on BN", "no Nesterov", "dampening"],
)
def test_steps_differ_from_sgd_with_a_mistake_in_it(wrong):
    assert step_difference("double", **wrong) > 1e-4


@pytest.mark.parametrize(
    ("changed", "want"),
    [
        (
            {"lrShape": "cosine"},
            [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(1, 13)],
        ),
        ({}, [0.1] * 3 + [0.01] * 3 + [0.001] * 6),  # milestones are epochs 2 and 3 of 4
        ({"milestones": "3,9"}, [0.1] * 6 + [0.01] * 6),
        ({"lrDecay": 0.2}, [0.1] * 3 + [0.02] * 3 + [0.004] * 6),
        ({"warmupSteps": 4}, [0.01] * 3 + [0.001] + [0.01] * 2 + [0.001] * 6),
    ],
    ids=["cosine", "multistep", "given milestones", "a fifth", "warm-up"],
)
def test_each_step_moves_the_weights_by_the_scheduled_rate(changed, want):
    # Without momentum and decay the movement is the rate times the gradient.
    trainer, data = build(precision="double", momentum=0, weightDecay=0, **changed)
    bias, used = trainer.model.classifier.bias, []
    before = bias.detach().clone()

    def measure() -> None:
        used.append(((before - bias.detach()) @ bias.grad / (bias.grad @ bias.grad)).item())
        before.copy_(bias.detach())

    records = [run_epoch(trainer, data, measure) for _ in range(4)]
    assert used == pytest.approx(want, abs=1e-12)
    assert [record["lr"] for record in records] == pytest.approx(want[2::3], abs=1e-15)


# Resume:
# The warm-up ends after step 2 of epoch 2.
RESUMED = {"dropRate": 0.3, "lrShape": "cosine", "warmupSteps": 5, "manualSeed": 3}


def saved(trainer: Trainer) -> dict:
    """Return the trainer's state as a checkpoint file restores it."""
    with tempfile.TemporaryDirectory() as directory:
        return checkpoints.load(checkpoints.save(Path(directory), trainer.state_dict(), keep=1))


def rest_of_run(trainer: Trainer, data: DataSplits, on_step_end: Callable[[], None] = nothing):
    """Return all that could differ until the end of epoch 3: each step, each epoch, the end."""
    steps, records = [], []

    def record_step() -> None:
        steps.append(trainer.metrics.state_dict())
        on_step_end()

    while trainer.epoch <= 3:
        record = run_epoch(trainer, data, record_step)
        records.append({k: v for k, v in record.items() if not k.endswith(("_s", "_wait"))})
    return {
        "steps": steps,
        "records": records,
        "weights": {n: t.tolist() for n, t in weights_of(trainer).items()},
        "buffers": {n: b.tolist() for n, b in trainer.model.named_buffers()},
        "scaler": trainer.scaler.state_dict(),
        "results": (trainer.results.best, trainer.results.last, trainer.position),
    }


@cache
def whole_run(precision: str) -> tuple[dict[int, dict], dict]:
    """Run without interruption; return its state after each step of epoch 2, and the run."""
    trainer, data = build(**RESUMED, precision=precision)
    states = {}

    def save() -> None:
        if trainer.epoch == 2:
            states[trainer.step] = saved(trainer)

    return states, rest_of_run(trainer, data, save)


def resumed(
    precision: str, step: int, sabotage=lambda trainer: None, **changed
) -> tuple[dict, dict]:
    """Resume after a step of epoch 2; return the results, and those of the whole run from there."""
    states, whole = whole_run(precision)
    fresh, data = build(**RESUMED | changed, precision=precision)
    torch.rand(100)  # other random numbers than the saved ones
    fresh.load_state_dict(states[step])
    sabotage(fresh)
    want = whole | {"steps": whole["steps"][3 + step :], "records": whole["records"][1:]}
    return rest_of_run(fresh, data), want


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_a_restored_trainer_goes_on_bit_for_bit(precision, step):
    got, want = resumed(precision, step)
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
def test_a_trainer_restored_in_part_goes_on_otherwise(sabotage, seed):
    got, want = resumed("single", 1, sabotage, manualSeed=seed)
    assert got["weights"] != want["weights"]
    assert got["records"] != want["records"]


NETWORKS = {
    "nin": {"widen": 0.1},
    "nin-svhn": {"widen": 0.05},
    "allcnn": {"widen": 0.1, "imageSize": 16},
    "dsn": {"widen": 0.1, "nesterov": "true"},
    "highway": {"widen": 0.1},
    "fractalnet": {"depth": 11, "widen": 0.05, "imageSize": 32, "dropPath": 0.3, "dropRate": 0.2},
    "resnet": {"depth": 14, "stochasticDepth": 0.4},
    "wideresnet": {"depth": 10, "widen": 0.5, "dropRate": 0.3},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_goes_on_bit_for_bit_in_the_middle_of_an_epoch(name):
    shape = {"depth": None, "growthRate": None, "netType": name, "warmupSteps": 5}
    flags, states = shape | NETWORKS[name], []
    trainer, data = build(**flags)

    def save() -> None:
        if (trainer.epoch, trainer.step) == (2, 1):
            states.append(saved(trainer))

    want = rest_of_run(trainer, data, save)
    for sabotage in (nothing, partial(torch.manual_seed, 99)):
        fresh, data = build(**flags)
        torch.rand(100)  # other random numbers than the saved ones
        fresh.load_state_dict(states[0])
        sabotage()
        got = rest_of_run(fresh, data)
        is_same = all(got[part] == want[part] for part in ("weights", "buffers", "results"))
        assert is_same == (sabotage is nothing)
        assert (got["steps"] == want["steps"][4:]) == (sabotage is nothing)
    assert name != "dsn" or trainer.model.progress == 0.5  # two of four epochs


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
def test_a_state_can_go_on_under_the_settings_that_override_may_change(before, after):
    trainer, data = build(**before)
    run_epoch(trainer, data)
    fresh, data = build(**after)
    fresh.load_state_dict(saved(trainer))
    want, got = trainer.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(got[name].to(want[name].dtype), want[name]) for name in want)
    assert run_epoch(fresh, data)["epoch"] == 2


# Precision, values not finite:
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
    trainer, data = build(precision=precision, nImages=64, nEpochs=10, batchSize=8)
    seen = set()
    trainer.model.classifier.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    losses = [run_epoch(trainer, data)["train_loss"] for _ in range(4)]
    assert seen == {logits}
    assert {p.dtype for p in trainer.model.parameters()} == {weights}
    assert {m.dtype for m in trainer.state_dict()["momentum"].values()} == {weights}
    assert losses[3] < 0.7 * losses[0]


def inject_image(batches: FixedBatches, trainer: Trainer, value: float) -> None:
    batches.pairs[2][0][0, 0, 0, 0] = value


def inject_logit(batches: FixedBatches, trainer: Trainer, value: float) -> None:
    # The loss is infinite while softmax minus target, its gradient, is finite: in half precision
    # an overflowing logit does this.
    with torch.no_grad():
        trainer.model.classifier.bias[batches.pairs[2][1][0]] = -value


def inject_gradient(batches: FixedBatches, trainer: Trainer, value: float) -> None:
    # Of the next step alone, whose loss is finite.
    def inject_nonfinite(gradient: Tensor) -> Tensor:
        hook.remove()
        return gradient.index_fill(0, torch.tensor([1]), value)

    weight = trainer.model.get_parameter("features.denseblock2.denselayer1.conv1.weight")
    hook = weight.register_hook(inject_nonfinite)


NONFINITE = {
    "NaN image": (inject_image, math.nan),
    "infinite image": (inject_image, math.inf),
    "infinite logit": (inject_logit, math.inf),
    "NaN gradient": (inject_gradient, math.nan),
    "infinite gradient": (inject_gradient, math.inf),
}
GRADIENTS = ["NaN gradient", "infinite gradient"]
# Gradients that overflow are usual in half precision, and no reason to stop.
STOPS = [
    (precision, case)
    for precision in ("single", "double", "half", "bf16")
    for case in NONFINITE
    if not (precision == "half" and case in GRADIENTS)
]


def inject_nonfinite(precision: str, case: str):
    """Make a trainer whose third step in epoch 2 has a loss or gradient that is not finite.

    Also its batches, what to call after each step, and the weights that this notes after step 2.
    """
    trainer, _ = build(precision=precision)
    trainer.epoch, trainer.global_step = 2, 5
    batches = random_batches([8] * 5, precision)
    if precision == "half":
        # Where long runs are: a higher scale overflows by itself and hides what is tested here.
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 1024.0})
    inject_nonfinite, value = NONFINITE[case]
    noted = []

    def on_step_end() -> None:
        if trainer.step == 2:
            # Every image of the next batch is of a class whose logit is about to be infinite.
            batches.pairs[2][1].fill_(0)
            inject_nonfinite(batches, trainer, value)
            noted.append(weights_of(trainer))

    return trainer, batches, on_step_end, noted


@pytest.mark.parametrize("case", GRADIENTS)
def test_a_gradient_that_is_not_finite_costs_half_precision_one_step(case):
    trainer, batches, on_step_end, _ = inject_nonfinite("half", case)
    weights, scales = [], []

    def note() -> None:
        on_step_end()
        weights.append(weights_of(trainer))
        scales.append(trainer.scaler.get_scale())

    trainer.train(batches, note)
    assert [same(*pair) for pair in itertools.pairwise(weights)] == [False, True, False, False]
    assert scales == [1024, 1024, 512, 512, 512]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("precision", "case"), STOPS)
def test_a_nonfinite_step_stops_before_it_changes_the_weights(precision, case, late):
    trainer, batches, on_step_end, noted = inject_nonfinite(precision, case)
    if late:  # on a GPU the guard is read only when something is shown; until then steps go on
        trainer.check_finite = nothing
        trainer.train(batches, on_step_end)
        with pytest.raises(NonFiniteError) as caught:
            Trainer.check_finite(trainer)
    else:
        with pytest.raises(NonFiniteError) as caught:
            trainer.train(batches, on_step_end)
        assert caught.value.details == {"batch": list(range(16, 24))}
    assert trainer.step == (5 if late else 3)
    assert same(weights_of(trainer), noted[0])
    assert caught.value.code == 5
    what = "a gradient" if case in GRADIENTS else "loss"
    report = caught.value.report()
    assert report.startswith(f"error: {what} is not finite at epoch 2, step 3; fix: ")
    assert "--LR" in report


@pytest.mark.parametrize("case", GRADIENTS)
# Evaluation:
def expected_errors(logits: Tensor, targets: Tensor) -> dict[str, float]:
    ranks = (logits > logits.gather(1, targets[:, None])).sum(dim=1)  # 0 for the largest logit
    errors = {f"test_top{k}": 100 * (ranks >= k).sum().item() / len(targets) for k in (1, 5)}
    return {"test_loss": F.cross_entropy(logits, targets).item(), **errors}


@pytest.mark.parametrize(
    ("precision", "crops", "limit"),
    [("single", 1, 1e-5), ("double", 1, 1e-12), ("double", 10, 1e-12)],
)
def test_evaluation_counts_every_image_once_by_the_mean_of_its_crops(precision, crops, limit):
    trainer, _ = build(precision=precision)
    trainer.num_crops = crops
    sizes, calls = [4, 4, 1], []
    images = random_batches([crops * size for size in sizes], precision)
    pairs = [
        (each, torch.randint(10, (n,))) for (each, _), n in zip(images.pairs, sizes, strict=True)
    ]
    got = trainer.evaluate(FixedBatches(pairs), lambda: calls.append(1), phase="test")
    assert len(calls) == 3

    with torch.no_grad():
        logits = trainer.model.eval()(torch.cat([images for images, _ in pairs]))
    targets = torch.cat([targets for _, targets in pairs])
    want = expected_errors(logits.view(9, crops, 10).mean(dim=1), targets)
    assert got == pytest.approx(want, abs=limit)
    assert got["test_top1"] == want["test_top1"]
    # A mean of the batches' means, or the crops of other images, would show.
    each = [trainer.evaluate(FixedBatches([pair]), nothing)["val_loss"] for pair in pairs]
    assert abs(sum(each) / 3 - want["test_loss"]) > 1e-4
    mixed = expected_errors(logits.view(crops, 9, 10).mean(dim=0), targets)
    assert (abs(mixed["test_loss"] - want["test_loss"]) > 1e-4) is (crops > 1)


@pytest.mark.parametrize("precision", ["single", "half"])
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
    trainer.step = 0
    trainer.train(data.train, nothing)  # with batch statistics again
    name = "features.norm5.running_mean"
    assert not torch.equal(trainer.model.state_dict()[name], state[name])


# Epochs, overhead:
def test_an_epoch_ends_with_its_record_and_a_fresh_start():
    trainer, data = build()
    record = run_epoch(trainer, data)
    errors = {f"{phase}_{name}" for phase in ("train", "val") for name in ("loss", "top1", "top5")}
    assert record.keys() == {"epoch", "lr", "images_per_s", "data_wait", "time_s"} | errors
    assert record["epoch"] == 1
    assert record["images_per_s"] == pytest.approx(40 / record["time_s"])
    assert 0 <= record["data_wait"] <= 1
    assert trainer.position == {"epoch": 2, "step": 0, "global_step": 3}
    assert trainer.is_between_epochs
    assert (trainer.metrics.count, trainer.time_s, trainer.data_s) == (0, 0, 0)

    after_each = []
    trainer.train(
        data.train, lambda: after_each.append((*trainer.position.values(), trainer.metrics.count))
    )
    assert after_each == [(2, 1, 4, 16), (2, 2, 5, 32), (2, 3, 6, 40)]
    assert not trainer.is_between_epochs


def test_the_time_of_an_epoch_includes_waiting_for_the_device_and_excludes_saving(monkeypatch):
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


def test_the_training_loss_is_the_mean_over_images():
    trainer, _ = build(momentum=0, LR=1e-12, weightDecay=0)  # so that the weights stay
    batches = random_batches([8, 8, 3])
    model, losses = copy.deepcopy(trainer.model).train(), []
    for images, targets in batches.pairs:
        losses.append(F.cross_entropy(model(images), targets).item() * len(targets))
    got = trainer.train(batches, nothing)
    assert got["train_loss"] == pytest.approx(sum(losses) / 19, abs=1e-5)
    assert trainer.metrics.count == 19


def test_tensors_do_not_pile_up_from_epoch_to_epoch():
    trainer, data = build()
    counts = []
    for _ in range(3):
        run_epoch(trainer, data)
        gc.collect()
        counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert counts[1] == counts[2]


@pytest.mark.parametrize("name", ["dsn", "fractalnet"])
def test_no_layer_output_outlives_a_step_in_a_cycle_of_references(name):
    """It would stay in memory until the garbage collector runs, at any time."""
    shape = {"depth": None, "growthRate": None, "netType": name}
    trainer, data = build(**shape | NETWORKS[name])
    batch, outputs = next(data.train.batches(1)), []
    for module in trainer.model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *call: outputs.append(weakref.ref(call[-1])))
    gc.disable()
    try:
        trainer._train_step(*batch)
        assert outputs and not any(output() is not None for output in outputs)
    finally:
        gc.enable()


class CountReads(TorchDispatchMode):
    """Count how often a value is read from a tensor, which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["single", "half"])
@pytest.mark.parametrize(("checks", "want"), [(True, [0, 1, 2, 5]), (False, [0, 0, 0, 1])])
def test_a_step_reads_nothing_but_the_check_that_the_cpu_makes_after_it(
    monkeypatch, precision, checks, want
):
    monkeypatch.setattr(reference, "_sums_directly", lambda *_: True)  # as on a GPU
    trainer, data = build(precision=precision, dropRate=0.2)
    if not checks:
        trainer.check_finite = nothing
    counted = []
    with CountReads() as reads:
        trainer.train(data.train, lambda: counted.append(reads.count))
    # The check follows what is done after a step; at the end its results are read as well.
    assert [*counted, reads.count] == want
