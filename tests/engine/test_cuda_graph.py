"""Test captured steps: a replay of the captured operations trains as eager steps do."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.optimizer
import models.factory
import opts
import train
from datasets.factory import DataSplits
from distributed.launcher import ProcessInfo
from engine import cuda_graph
from errors import NonFiniteError, UsageError
from experiment.log import RunLog
from faults.contract import OF_CLOCKS
from helpers.sample_data import create_data

CPU = torch.device("cpu")
FLAGS = (
    "--dataset synthetic --imageSize 8 --nImages 42 --batchSize 4 --nEpochs 4 --LR 0.05 --nGPU 0"
)
DENSENET = "--depth 10 --growthRate 4"  # where a line names no other network


class Recording(TorchDispatchMode):
    """Keep of a step what a CUDA graph keeps: operations and memory, and nothing of Python.

    A replay runs the same operations on the same tensors and puts each result where the first run
    had put it. A number that Python computes in every step would stay what it was.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        for operation, args, kwargs, results in self.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(_tensors(results), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(results) -> list[torch.Tensor]:
    listed = results if isinstance(results, tuple | list) else [results]
    return [one for one in listed if isinstance(one, torch.Tensor)]


class Capturer:
    """Stand in for cuda_graph.capture on the CPU."""

    def __init__(self):
        # Gives the tensors that a step changes: recording does a step, which is undone.
        self.state: Callable[[], list[torch.Tensor]] = list
        self.replays = 0

    def __call__(self, fn: Callable[[], None]) -> Callable[[], None]:
        recording = Recording()
        before = [(tensor, tensor.clone()) for tensor in self.state()]
        rng = torch.get_rng_state()
        with recording:
            fn()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        torch.set_rng_state(rng)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                recording.replay()

        return replay


def eagerly(fn: Callable[[], None]) -> Callable[[], None]:
    """Return a capturer that does not capture."""
    return fn


def build(line: str, capturer, data=None) -> tuple[train.Trainer, DataSplits]:
    """Make a trainer of a network that a line describes, and its data."""
    network = "" if "--netType" in line else DENSENET
    opt = opts.parse(f"{FLAGS} {network} {line}".split())
    data = data or create_data(opt)
    model = models.factory.create(opt, len(data.classes))
    trainer = train.Trainer(opt, model, CPU, RunLog(None), capturer=capturer)
    if isinstance(capturer, Capturer):
        capturer.state = lambda: [
            *trainer.model.state_dict().values(),
            *(state["momentum_buffer"] for state in trainer.optimizer.state.values()),
            *vars(trainer._guard).values(),
            *_tensors([group["lr"] for group in trainer.optimizer.param_groups]),
            *(metrics._totals for metrics in (trainer.metrics, trainer._eval_metrics)),
            *(graphed._batch_start for graphed in trainer._runner._graphed_steps.values()),
        ]
    return trainer, data


def epochs(trainer: train.Trainer, data: DataSplits, count: int = 2) -> dict:
    """Return all results of some epochs of training and evaluation."""
    results = []
    for _ in range(count):
        trained = trainer.train(data.train, lambda: None)
        tested = trainer.evaluate(data.val, lambda: None)
        record = trainer.finish_epoch(trained, tested)
        results.append({name: record[name] for name in record if name not in OF_CLOCKS})
    return {"results": results, **trainer.model.state_dict()}


def equal(found: dict, expected: dict) -> bool:
    results = found["results"] == expected["results"]
    return results and all(torch.equal(found[n], expected[n]) for n in found if n != "results")


@pytest.mark.parametrize(
    "line",
    [
        "--optMemory 0",
        "--optMemory 2 --bottleneck false",
        "--optMemory 2 --precision bf16 --augment false --momentum 0",
        "--optMemory 3 --precision double --lrShape cosine",
        "--optMemory 4 --dropRate 0.2",
        "--netType resnet --depth 8",
        "--netType preresnet --depth 11 --precision bf16",
    ],
)
def test_replayed_steps_train_as_eager_steps_do(line):
    capturer = Capturer()
    replayed = epochs(*build(line, capturer))
    # 42 images are 10 full batches and one of 2; the 8 of evaluation are 2.
    assert capturer.replays == 2 * (10 + 2) - 2 * cuda_graph.WARMUP_STEPS
    assert equal(replayed, epochs(*build(line, eagerly)))


def test_a_rate_that_python_keeps_would_be_replayed_as_it_was(monkeypatch):
    # The twin: what a recording cannot see change, or another seed, trains otherwise.
    line = "--lrShape cosine"
    trainer, data = build(line, Capturer())
    wanted = epochs(*build(line, eagerly))
    assert not equal(wanted, epochs(*build(f"{line} --manualSeed 1", eagerly)))

    def keep(optimizer, lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr

    monkeypatch.setattr(engine.optimizer, "set_lr", keep)
    assert not equal(epochs(trainer, data), wanted)


def test_an_epoch_is_continued_in_the_middle():
    whole, data = build("", Capturer())
    wanted = epochs(whole, data, count=1)
    first, _ = build("", Capturer(), data)

    def stop() -> None:
        if first.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(data.train, stop)
    second, _ = build("", Capturer(), data)
    second.load_state_dict(first.state_dict())
    assert second.step == 5
    assert equal(epochs(second, data, count=1), wanted)


@pytest.mark.parametrize(("split", "steps"), [("train", 9), ("val", 3)])
def test_a_process_replays_its_own_images(split, steps):
    opt = opts.parse(f"{FLAGS} {DENSENET}".replace("42", "160").split())

    def images_of(rank: int, replay: bool) -> torch.Tensor:
        batches = getattr(create_data(opt, process=ProcessInfo(rank, 2)), split)
        if not replay:
            return torch.cat(
                [images for images, _ in itertools.islice(batches.batches(2, 1), steps)]
            )
        seen = []
        step = cuda_graph.GraphedStep(batches, lambda *batch: seen.append(batch), eagerly, None)
        step.seek(epoch=2, step=1)
        for _ in range(steps):
            step()
        return torch.cat([images for images, _ in seen])

    for rank in range(2):
        found = images_of(rank, replay=True)
        assert torch.equal(found, images_of(rank, replay=False))
        assert not torch.equal(found, images_of(1 - rank, replay=False))


def test_a_step_that_cannot_be_captured_runs_eagerly_with_one_warning(capsys):
    def refuse(fn):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    assert equal(epochs(*build("", refuse)), epochs(*build("", eagerly)))
    line = "note: a step cannot be captured as a CUDA graph: operation not permitted when stream"
    assert capsys.readouterr().err.count(line) == 1


def test_a_loss_that_is_not_finite_is_reported_at_its_step_in_a_replay():
    trainer, data = build("", Capturer())

    def inject_nonfinite() -> None:
        if trainer.step == 7:  # replayed by then: the change is seen in memory only
            data.train.mean.fill_(float("nan"))

    with pytest.raises(NonFiniteError) as error:
        trainer.train(data.train, inject_nonfinite)
    assert "epoch 1, step 8" in error.value.report()


@pytest.mark.parametrize(
    ("device", "resident", "why"),
    [("cpu", True, "no CUDA device"), ("cuda", False, "images above 64 pixels")],
)
def test_a_graph_requested_where_there_can_be_none_is_an_error(device, resident, why):
    with pytest.raises(UsageError) as error:
        cuda_graph.make_capturer("true", torch.device(device), resident)
    assert why in error.value.report() and "; fix: use --cudaGraph auto" in error.value.report()
    for requested in ("auto", "false"):
        assert cuda_graph.make_capturer(requested, torch.device(device), resident) is None
