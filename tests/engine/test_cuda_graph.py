"""Test captured steps: a replay of the captured operations trains as eager steps do."""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.optimizer
import main
import models.factory
import opts
import train
from datasets.batch_sampler import BatchSampler
from datasets.factory import DataSplits
from distributed.launcher import ProcessInfo
from distributed.world import World
from engine import cuda_graph
from engine.memory import MemoryTracker
from errors import NonFiniteError, PeerError, UsageError
from experiment.log import RunLog
from faults.contract import OF_CLOCKS
from helpers.sample_data import create_data, write_folder
from kernels import reference

CPU = torch.device("cpu")
FLAGS = (
    "--dataset synthetic --imageSize 8 --nImages 42 --batchSize 4 --nEpochs 4 --LR 0.05 --nGPU 0"
)
DENSENET = "--depth 10 --growthRate 4"  # where a line names no other network


@pytest.fixture(autouse=True)
def _sums_as_on_a_gpu(monkeypatch):
    """Sum as on a GPU, where plain PyTorch reads no value of a tensor: a capture forbids it."""
    monkeypatch.setattr(reference, "_sums_directly", lambda *_: True)


class Recording(TorchDispatchMode):
    """Keep of a step what a CUDA graph keeps: operations and memory, and nothing of Python.

    A replay runs the same operations on the same tensors and puts each result where the first run
    had put it. A number that Python computes in every step would stay what it was.

    Args:
        refused: name of an operation that cannot be captured, and the error that says so.
    """

    def __init__(self, refused: tuple[str, Exception] = ("", KeyError())):
        super().__init__()
        self.calls, self.refused = [], refused

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        name, error = self.refused
        if operation._opname == name:
            raise error
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
    """Stand in for cuda_graph.Capturer on the CPU; `refused` as in Recording."""

    def __init__(self, *refused):
        # Gives the tensors that a step changes: recording does a step, which is undone.
        self.state: Callable[[], list[torch.Tensor]] = list
        self.replays = self.in_memory = 0
        self.refused = refused

    @contextmanager
    def memory(self) -> Iterator[None]:
        self.in_memory += 1
        yield

    def capture(self, fn: Callable[[], None]) -> Callable[[], None]:
        recording = Recording(*self.refused)
        before = [(tensor, tensor.clone()) for tensor in self.state()]
        rng = torch.get_rng_state()
        try:
            with recording:
                fn()
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            torch.set_rng_state(rng)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                recording.replay()

        return replay


class Eagerly:
    """Capture nothing: a replay is the step."""

    memory = nullcontext

    def capture(self, fn: Callable[[], None]) -> Callable[[], None]:
        return fn


eagerly = Eagerly()


def build(line: str, capturer, data=None) -> tuple[train.Trainer, DataSplits]:
    """Make a trainer of a network that a line describes, and its data."""
    words = f"{FLAGS} {'' if '--netType' in line or '--d1' in line else DENSENET} {line}".split()
    flags = dict(zip(words[::2], words[1::2], strict=True))  # the last one of a name counts
    if flags["--dataset"] == "folder":
        del flags["--nImages"]
    opt = opts.parse([word for flag in flags.items() for word in flag])
    data = data or create_data(opt, warn=lambda _: None)
    model = models.factory.create(opt, len(data.classes))
    trainer = train.Trainer(opt, model, CPU, RunLog(None), capturer=capturer)
    if isinstance(capturer, Capturer):
        capturer.state = partial(held_between_steps, trainer)
    return trainer, data


def held_between_steps(trainer: train.Trainer) -> list[torch.Tensor]:
    """List the tensors that a step may change, but for its gradients."""
    holders = [trainer._guard, trainer.metrics, trainer._eval_metrics, trainer.scaler]
    for graphed in trainer._runner._graphed_steps.values():
        holders.append(graphed.batches)
    return [
        *trainer.model.state_dict().values(),
        *(state["momentum_buffer"] for state in trainer.optimizer.state.values()),
        *_tensors([group["lr"] for group in trainer.optimizer.param_groups]),
        *_tensors([value for holder in holders for value in vars(holder).values()]),
    ]


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
        "--netType dsn --widen 0.1 --LR 0.01",  # its progress lies in device memory
    ],
)
def test_replayed_steps_train_as_eager_steps_do(line):
    capturer = Capturer()
    replayed = epochs(*build(line, capturer))
    # 42 images are 10 full batches and one of 2; the 8 of evaluation are 2.
    assert capturer.replays == 2 * (10 + 2) - 2 * cuda_graph.WARMUP_STEPS
    assert equal(replayed, epochs(*build(line, eagerly)))


FILES = (
    "--dataset folder --data {} --imageSize 72 --d1 1 --d2 1 --d3 1 --d4 1 --initChannels 4 "
    "--growthRate 2 --nThreads 0"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Write 15 + 11 images, and one more each that is unreadable; return the flags of a run."""
    root = tmp_path_factory.mktemp("folder")
    counts = {"train": {"cat": 7, "dog": 8}, "val": {"cat": 5, "dog": 6}}
    write_folder(root, counts, size=80)
    for split in counts:
        (root / split / "dog" / "bad.png").write_bytes(b"no picture")
    return f"{FILES.format(root)} --onBadImage skip"


def full_batches(loader, num_epochs: int) -> int:
    """Count the batches in which no image is missing."""
    sizes = [len(targets) for k in range(num_epochs) for _, targets in loader.batches(k + 1)]
    assert sizes.count(4) < len(sizes)
    return sizes.count(4)


@pytest.mark.parametrize(
    "line", ["", "--precision bf16 --optMemory 3 --dropRate 0.2", "--precision half"]
)
def test_replayed_steps_over_files_train_as_eager_steps_do(folder, line):
    capturer = Capturer()
    trainer, data = build(f"{folder} {line}", capturer)
    replayed = epochs(trainer, data, count=3)
    expected = full_batches(data.train, 3) + full_batches(data.val, 3)
    assert capturer.replays == expected - 2 * cuda_graph.WARMUP_STEPS > 0
    assert equal(replayed, epochs(*build(f"{folder} {line}", eagerly), count=3))
    assert not equal(replayed, epochs(*build(f"{folder} {line} --manualSeed 1", eagerly), count=3))


def test_replayed_ten_crops_are_evaluated_as_eager_ones(folder):
    # Batches of one image: 11 of 12 are read.
    capturer = Capturer()
    replayed = epochs(*build(f"{folder} --tenCrop true", capturer), count=1)
    assert capturer.replays == 11 - cuda_graph.WARMUP_STEPS
    assert equal(replayed, epochs(*build(f"{folder} --tenCrop true", eagerly), count=1))


def test_a_buffer_that_is_not_filled_anew_would_train_on_one_batch(folder, monkeypatch):
    # The twin of the two above.
    def fill(buffer, *batch):
        buffer._batch = buffer._batch or tuple(tensor.clone() for tensor in batch)

    wanted = epochs(*build(folder, eagerly))
    monkeypatch.setattr(cuda_graph.BatchBuffer, "fill", fill)
    assert not equal(epochs(*build(folder, Capturer())), wanted)


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


@pytest.mark.parametrize("source", ["memory", "files"])
def test_an_epoch_is_continued_in_the_middle(source, folder):
    line, batch = ("", 4) if source == "memory" else (folder, 2)
    build_again = partial(build, f"{line} --batchSize {batch}")
    whole, data = build_again(Capturer())
    wanted = epochs(whole, data, count=1)
    first, _ = build_again(Capturer(), data)

    def stop() -> None:
        if first.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(data.train, stop)
    second, _ = build_again(Capturer(), data)
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
        resident = cuda_graph.ResidentBatches(batches)
        resident.seek(epoch=2, step=1)
        return torch.cat([resident.next()[0] for _ in range(steps)])

    for rank in range(2):
        found = images_of(rank, replay=True)
        assert torch.equal(found, images_of(rank, replay=False))
        assert not torch.equal(found, images_of(1 - rank, replay=False))


class TritonError(Exception):
    """Stand for errors of Triton, which have no class in common."""


# Operations of a step in half precision: of its batch, forward, backward, update, metrics.
STAGES = ["index", "convolution", "convolution_backward", "where", "_fused_sgd_",
          "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_", "topk"]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [RuntimeError("not permitted\nand more"), TritonError()])
def test_a_step_whose_capture_breaks_off_runs_eagerly_with_one_note(stage, error, capsys):
    capturer = Capturer((stage, error))
    trainer, data = build("--precision half", capturer)
    found = epochs(trainer, data)
    assert capturer.replays == 0
    reason = "not permitted" if isinstance(error, RuntimeError) else "TritonError"
    line = f"note: a step cannot be captured as a CUDA graph: {reason}; it runs eagerly; "
    assert capsys.readouterr().err.count(line) == 1
    assert equal(found, epochs(*build("--precision half", eagerly)))


@pytest.mark.parametrize("stage", ["_fused_sgd_", "_amp_update_scale_"])
def test_what_a_broken_capture_leaves_in_python_would_spoil_the_next_step(stage, monkeypatch):
    # The twin: after the update the scaler refuses a second one, before it squares its scale.
    monkeypatch.setattr(engine.optimizer, "reset_step", lambda *_: None)
    run = partial(epochs, *build("--precision half", Capturer((stage, TritonError()))))
    if stage == "_amp_update_scale_":
        with pytest.raises(RuntimeError, match="already been called"):
            run()
    else:
        assert not equal(run(), epochs(*build("--precision half", eagerly)))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        PeerError("process 1 is lost", "run it again"),
    ],
)
def test_an_error_that_ends_a_run_ends_it_in_a_capture_as_well(error):
    trainer, data = build("", Capturer(("convolution", error)))
    with pytest.raises(type(error)):
        trainer.train(data.train, lambda: None)


def test_smaller_batches_and_later_warm_ups_share_the_memory_of_graphs(folder):
    # The unreadable image of the folder is in a batch before training is captured.
    for line, smaller, early in (("", [1, 0], 0), (folder, None, 1)):
        capturer = Capturer()
        trainer, data = build(line, capturer)
        if smaller is None:
            smaller = [len(s.sampler) - full_batches(s, 1) for s in (data.train, data.val)]
        epochs(trainer, data)
        eager = 2 * sum(smaller) - early + cuda_graph.WARMUP_STEPS  # of evaluation
        assert capturer.in_memory == eager, line


def test_training_warms_up_outside_of_the_memory_of_a_graph_of_evaluation():
    # So it is in a run that resumes between the last step of an epoch and its evaluation. What a
    # first training step makes and keeps must not lie where a replay of evaluation writes.
    capturer = Capturer()
    trainer, data = build("", capturer)
    trainer.evaluate(data.val, lambda: None)
    evaluated = capturer.in_memory
    seen = []
    step = trainer._train_step
    trainer._train_step = lambda *batch: (seen.append(capturer.in_memory), step(*batch))
    trainer._train_step.__name__ = "_train_step"
    trainer.train(data.train, lambda: None)
    assert seen[: cuda_graph.WARMUP_STEPS] == [evaluated] * cuda_graph.WARMUP_STEPS
    assert capturer.in_memory > evaluated  # the smaller last batch, after the capture


def test_a_pool_in_which_a_capture_has_failed_is_not_used_again():
    capturer = Capturer(("convolution", TritonError()))
    trainer, data = build("", capturer)
    trainer.evaluate(data.val, lambda: None)
    before = capturer.in_memory
    epochs(trainer, data)
    assert capturer.in_memory == before > 0


@pytest.mark.parametrize("precision", ["single", "half", "bf16"])
@pytest.mark.parametrize("level", [0, 2, 4])
def test_no_tensor_but_the_gradients_outlives_a_step(precision, level):
    """Test it from the first step on: a replay overwrites what is made in its memory."""
    trainer, data = build(f"--precision {precision} --optMemory {level} --dropRate 0.1", None)
    batch = next(iter(data.train.batches(1)))
    for mode, step in (("train", trainer._train_step), ("eval", trainer._eval_step)):
        getattr(trainer.model, mode)()
        owned = held_between_steps(trainer)
        with torch.set_grad_enabled(mode == "train"), MemoryTracker(CPU) as tracker:
            step(*batch)
        gc.collect()
        owned += [parameter.grad for parameter in trainer.model.parameters()]
        known = {tensor.untyped_storage()._cdata for tensor in (*owned, *batch)}
        assert set(tracker.alive) <= known


def test_the_host_queues_no_more_than_two_replays_over_files(monkeypatch):
    """Test with a pretended device, on which steps end only when somebody waits for them."""
    queued = []

    def record_event():
        queued.append(SimpleNamespace(synchronize=lambda: queued.pop(0)))
        return queued[-1]

    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=record_event)
    )
    buffer, lengths = cuda_graph.BatchBuffer(), []
    buffer._batch = (None, SimpleNamespace(is_cuda=True))
    for _ in range(5):
        buffer.run(lambda: None)
        lengths.append(len(queued))
    assert lengths == [1, 2, 2, 2, 2]


class TwoRanks(World):
    """Stand for two processes, of which the other one has batches of given sizes."""

    def __init__(self, rank: int, others: list[int]):
        super().__init__(ProcessInfo(rank, 2))
        self._others = iter(others)

    def all_gather_int(self, value: int) -> list[int]:
        return [value, next(self._others)] if self.rank == 0 else [next(self._others), value]


def test_all_processes_replay_a_step_over_files_or_none_does():
    sizes = [[4, 4]] * 6 + [[3, 4], [4, 3], [4, 4], [0, 4], [4, 4], [2, 1]]
    replayed = []
    for rank in range(2):
        own, others = ([each[r] for each in sizes] for r in (rank, 1 - rank))
        capturer = Capturer()
        runner = cuda_graph.StepRunner(TwoRanks(rank, others), None, capturer, pytest.fail)
        loader = SimpleNamespace(
            sampler=BatchSampler(torch.arange(8 * 12), 8, process=ProcessInfo(rank, 2)),
            batches=lambda epoch, start, own=own: (
                (torch.ones(n, 3), torch.ones(n, dtype=torch.int64)) for n in own
            ),
        )
        modes, total = [], torch.zeros(())

        def step(images, targets, total=total):
            total += images.sum()

        for stats in runner.run(step, loader, epoch=1):
            modes.append(capturer.replays)
            assert stats.num_images == sum(sizes[len(modes) - 1])
        replayed.append([after - before for before, after in itertools.pairwise([0, *modes])])
    assert replayed[0] == replayed[1] == [0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0]


def test_a_loss_that_is_not_finite_is_reported_at_its_step_in_a_replay():
    trainer, data = build("", Capturer())

    def inject_nonfinite() -> None:
        if trainer.step == 7:  # replayed by then: the change is seen in memory only
            data.train.mean.fill_(float("nan"))

    with pytest.raises(NonFiniteError) as error:
        trainer.train(data.train, inject_nonfinite)
    assert "epoch 1, step 8" in error.value.report()


def test_a_graph_requested_where_there_can_be_none_is_an_error():
    with pytest.raises(UsageError) as error:
        cuda_graph.make_capturer("true", CPU)
    line = "error: cudaGraph: there is no CUDA device; fix: use --cudaGraph auto"
    assert error.value.report() == line
    for requested in ("auto", "false"):
        assert cuda_graph.make_capturer(requested, CPU) is None


@pytest.mark.parametrize(
    ("network", "wanted"),
    [("resnet --stochasticDepth 0.5", "false"), ("fractalnet --dropPath 0.1", "false"),
     ("resnet", "auto"), ("fractalnet", "auto")],
)  # fmt: skip
def test_steps_that_draw_what_they_compute_run_eagerly(network, wanted, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "Trainer", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "make_capturer", lambda requested, _: asked.append(requested))
    opt = opts.parse(f"{FLAGS.replace('Size 8', 'Size 32')} --netType {network}".split())
    main.create_trainer(opt, create_data(opt), World(), CPU, None, None)
    assert asked == [wanted]


def test_graphs_are_captured_for_files_and_for_images_in_memory_alike(monkeypatch):
    """Test with a pretended device; test_gpu.py has the real one."""
    for name in ("Stream", "current_stream", "set_stream", "MemPool"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(wait_stream=print))
    for requested in ("auto", "true"):
        capturer = cuda_graph.make_capturer(requested, torch.device("cuda"))
        assert isinstance(capturer, cuda_graph.Capturer)
    assert cuda_graph.make_capturer("false", torch.device("cuda")) is None
