"""Steps that are recorded once: a replay of the recorded operations trains as eager steps do."""

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
SMALL = (
    "--dataset synthetic --imageSize 8 --nImages 84 --batchSize 8 --nEpochs 4 --LR 0.05 --nGPU 0"
)
DENSENET = "--depth 10 --growthRate 4"  # where a line names no other network


class Recording(TorchDispatchMode):
    """What a CUDA graph keeps of a step: operations and memory, and nothing of Python.

    A replay runs the same operations on the same tensors and puts each result where the first run
    had put it. A number that Python computed anew in every step would stay what it was.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten._local_scalar_dense.default,):
            raise RuntimeError("operation not permitted when stream is capturing")
        results = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        for operation, args, kwargs, results in self.calls:
            again = operation(*args, **kwargs)
            pairs = zip(_tensors(results), _tensors(again), strict=True)
            for old, new in pairs:
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(results) -> list[torch.Tensor]:
    listed = results if isinstance(results, tuple | list) else [results]
    return [one for one in listed if isinstance(one, torch.Tensor)]


class Capturer:
    """A stand-in for cuda_graph.capture on the CPU.

    Args:
        state: gives the tensors that a step changes; recording does a step, so it is undone.
    """

    def __init__(self):
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
    """A capturer that does not capture."""
    return fn


def trainer_of(line: str, capturer, data=None) -> tuple[train.Trainer, DataSplits]:
    network = "" if "--netType" in line else DENSENET
    opt = opts.parse([*SMALL.split(), *network.split(), *line.split()])
    data = data or create_data(opt)
    model = models.factory.create(opt, len(data.classes))
    trainer = train.create_trainer(opt, model, CPU, RunLog(None), capturer=capturer)
    if isinstance(capturer, Capturer):
        capturer.state = lambda: [
            *trainer.model.state_dict().values(),
            *(state["momentum_buffer"] for state in trainer.optimizer.state.values()),
            *vars(trainer._guard).values(),
            *(
                lr
                for group in trainer.optimizer.param_groups
                if isinstance(lr := group["lr"], torch.Tensor)
            ),
            *(metrics._totals for metrics in (trainer.metrics, trainer._eval_metrics)),
            *(replayed._batch_start for replayed in trainer._runner._graphed_steps.values()),
        ]
    return trainer, data


def epochs(trainer: train.Trainer, data: DataSplits, count: int = 2) -> dict:
    """Everything that some epochs of training and evaluation leave behind."""
    results = []
    for _ in range(count):
        trained = trainer.train(data.train, lambda: None)
        tested = trainer.evaluate(data.val, lambda: None)
        record = trainer.finish_epoch(trained, tested)
        results.append({name: record[name] for name in record if name not in OF_CLOCKS})
    return {"results": results, **trainer.model.state_dict()}


def equal(mine: dict, theirs: dict) -> bool:
    results = mine["results"] == theirs["results"]
    return results and all(torch.equal(mine[n], theirs[n]) for n in mine if n != "results")


@pytest.mark.parametrize(
    "line",
    [
        "--optMemory 0",
        "--optMemory 2",
        "--optMemory 4 --dropRate 0.2",
        "--optMemory 2 --bottleneck false",
        "--optMemory 2 --precision bf16",
        "--optMemory 2 --precision double --lrShape cosine",
        "--optMemory 2 --augment false --momentum 0",
        "--netType resnet --depth 8",
        "--netType preresnet --depth 11 --precision bf16",
    ],
)
def test_replayed_steps_train_as_eager_steps_do(line):
    capturer = Capturer()
    replayed = epochs(*trainer_of(line, capturer))
    # 84 images are 10 full batches and one of 4; the first steps of each kind are eager.
    train_steps, test_steps = 2 * 10, 2 * (trainer_of(line, None)[1].val.sampler.num_images // 8)
    assert capturer.replays == train_steps + test_steps - 2 * cuda_graph.WARMUP_STEPS
    assert equal(replayed, epochs(*trainer_of(line, eagerly)))
    assert not equal(replayed, epochs(*trainer_of(f"{line} --manualSeed 1", eagerly)))


def test_a_rate_that_python_keeps_would_be_replayed_as_it_was(monkeypatch):
    # The twin: what a recording cannot see change makes another course of training.
    line, capturer = "--lrShape cosine", Capturer()
    trainer, data = trainer_of(line, capturer)
    wanted = epochs(*trainer_of(line, eagerly))

    def keep(optimizer, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate

    monkeypatch.setattr(engine.optimizer, "set_lr", keep)
    assert not equal(epochs(trainer, data), wanted)


def test_an_epoch_is_continued_in_the_middle():
    whole, data = trainer_of("", Capturer())
    wanted = epochs(whole, data, count=1)
    first, _ = trainer_of("", Capturer(), data)

    def stop() -> None:
        if first.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(data.train, stop)
    second, _ = trainer_of("", Capturer(), data)
    second.load_state_dict(first.state_dict())
    assert second.step == 5
    assert equal(epochs(second, data, count=1), wanted)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_replica_replays_its_own_images(split):
    # The 40 images of the test set are 5 batches.
    opt = opts.parse(f"{SMALL} {DENSENET}".replace("84", "200").split())

    def images_of(rank: int, replay: bool) -> list[torch.Tensor]:
        data = create_data(opt, process=ProcessInfo(rank, 2))
        batches, seen = getattr(data, split), []

        def keep(images: torch.Tensor, targets: torch.Tensor) -> None:
            seen.append(images)

        count = batches.sampler.full_steps - 1
        if replay:
            step = cuda_graph.GraphedStep(batches, keep, eagerly, pytest.fail)
            step.seek(epoch=2, step=1)
            for _ in range(count):
                step()
        else:
            for batch in itertools.islice(batches.batches(2, 1), count):
                keep(*batch)
        return seen

    assert len(images_of(0, True)) == {"train": 24, "val": 1}[split]
    for rank in range(2):
        mine, theirs = torch.cat(images_of(rank, True)), torch.cat(images_of(1 - rank, False))
        assert torch.equal(mine, torch.cat(images_of(rank, False)))
        assert not torch.equal(mine, theirs)


def test_what_cannot_be_recorded_runs_eagerly_and_says_so_once(capsys):
    def refuse(fn):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    assert equal(epochs(*trainer_of("", refuse)), epochs(*trainer_of("", eagerly)))
    line = "note: a step cannot be recorded as a CUDA graph: operation not permitted when stream"
    assert capsys.readouterr().err.count(line) == 1


def test_a_loss_that_is_not_finite_is_reported_at_its_step_in_a_replay():
    trainer, data = trainer_of("", Capturer())

    def spoil() -> None:
        if trainer.step == 7:  # replayed by then: the change is seen in memory only
            data.train.mean.fill_(float("nan"))

    with pytest.raises(NonFiniteError) as error:
        trainer.train(data.train, spoil)
    assert "epoch 1, step 8" in error.value.report()


def test_a_recording_refuses_to_read_from_the_device():
    with pytest.raises(RuntimeError, match="capturing"), Recording():
        torch.ones(1).item()


# --------------------------------------------------------------------------------- --cudaGraph


@pytest.mark.parametrize("requested", ["auto", "false"])
def test_without_a_gpu_steps_run_eagerly(requested):
    assert cuda_graph.make_capturer(requested, CPU, resident=True) is None


@pytest.mark.parametrize(
    ("device", "resident", "why"),
    [("cpu", True, "no CUDA device"), ("cuda", False, "images above 64 pixels")],
)
def test_a_graph_that_is_asked_for_where_there_can_be_none_is_an_error(device, resident, why):
    with pytest.raises(UsageError) as error:
        cuda_graph.make_capturer("true", torch.device(device), resident)
    assert why in error.value.report() and "; fix: use --cudaGraph auto" in error.value.report()
    assert cuda_graph.make_capturer("auto", torch.device(device), resident) is None
