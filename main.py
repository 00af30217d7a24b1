"""Train, evaluate or resume a network: `python main.py --help`."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import experiment.directory
import opts
from cli import path_checks
from distributed import launcher, signals
from distributed.signals import Stop, kill_children
from errors import OutOfMemoryError, PeerError, Preempted, RunError
from experiment.directory import RunDirectory
from fileio import atomic


def main(argv: list[str]) -> int:
    """Run one command line; the exit code is 0, or that of an error class in errors.py."""
    signals.hold_standard_files()
    place = launcher.here()
    stop = Stop(place.launched, speaks=place.is_first).install()
    opt = world = None
    try:
        path_checks.check_here()
        opt = opts.parse(argv, place.size if place.launched else 0)
        if opt.printConfig:
            if place.is_first:
                print(opts.as_yaml(opt), end="")
            return 0
        path_checks.check(opt, place.is_first)
        if place.is_first and not opt.testOnly:
            experiment.directory.check_writable(Path(opt.save))
        if opt.replicas > 1 and not place.launched:
            return start_replicas(opt, argv)
        world, device = meet(opt, place)
        world.agree(opts.procedure(opt))
        done = evaluate(opt, world, device) if opt.testOnly else run(opt, stop, world, device)
        with contextlib.suppress(RunError):  # it is done, whatever becomes of the others
            world.leave()
        return done
    except RunError as error:
        if isinstance(error, PeerError) and stop.was_early:  # so was the one that is gone
            os._exit(Preempted.code)
        if opt and opt.debug and not isinstance(error, Preempted):
            traceback.print_exc()
        return end(error, opt, place, world)
    except Exception as error:
        if not place.launched:
            kill_children()
            raise
        traceback.print_exc()
        return end(error, opt, place, world)


def end(error: Exception, opt: SimpleNamespace | None, place: launcher.Place, world) -> int:
    """Say on standard error how the run ended, once for all its processes; the exit code."""
    if isinstance(error, Preempted):
        with contextlib.suppress(RunError):  # it is saved, whatever becomes of the others
            world.leave()
    else:
        kill_children()
        if world:
            error = world.fail(error)  # or what another process has failed with before
    code = error.code if isinstance(error, RunError) else 1
    if isinstance(error, RunError) and is_speaker(error, place, world):
        say(error)
        if world and not place.is_first:  # which is lost
            experiment.directory.judge_for_another(Path(opt.save), error)
    if world and world.size > 1:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)  # what torch would wait for now may never come
    return code


def is_speaker(error: RunError, place: launcher.Place, world) -> bool:
    """Whether this is the process that says how the run ended."""
    if world:
        return world.speaks
    if not place.launched:
        return True
    from distributed import rendezvous

    return rendezvous.is_first_to_say(place, error.report())


def say(error: RunError) -> None:
    """Print the line, or lines, of an error."""
    with contextlib.suppress(OSError):  # whoever was to read it may be gone
        print(error.report(), file=sys.stderr, flush=True)


def start_replicas(opt: SimpleNamespace, argv: list[str]) -> int:
    """`--nGPU N`: run N processes of this command, each on a GPU of its own."""
    import engine.device

    engine.device.select(opt.nGPU)  # all of them are there
    return launcher.replicas(opt.nGPU, partial(main, argv))


# What is heavy is imported where it is used, so that a mistyped flag is answered at once.


def meet(opt: SimpleNamespace, place: launcher.Place):
    """The other processes of the run, if any, and the device of this one."""
    if place.launched:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded

    import engine.device
    from distributed import rendezvous
    from experiment import console

    device = engine.device.select(opt.nGPU, place)
    engine.device.configure(opt.cudnn, opt.tf32)
    if not place.is_first:
        console.mute()
    world = rendezvous.join(place, device, opt.timeout)
    if place.launched and opt.nGPU not in (None, 0, place.local_size):
        started = f"{place.local_size} processes were started on this machine"
        opt.notes.append(f"nGPU {opt.nGPU} has no effect: {started}")
    for note in opt.notes:
        console.warn(note)
    return world, device


def run(opt: SimpleNamespace, stop: Stop, world, device) -> int:
    """Start or continue a run and bring it to its end."""
    import checkpoints
    import datasets.factory
    import datasets.file_loader
    import engine.device
    import models.factory
    import models.weights
    import train
    from distributed.world import Share
    from engine import cuda_graph
    from experiment import console, resume
    from experiment.log import RunLog
    from fileio import serialization

    ops = choose_kernels(opt, device)
    with contextlib.ExitStack() as opened:
        # Only the first process has the directory; what the others need of it, it tells them.
        directory = None
        if world.is_first:
            directory = opened.enter_context(RunDirectory(Path(opt.save)))
        world.watch(partial(end_stuck, world, directory))
        opened.enter_context(datasets.file_loader.worker_failures())
        state, is_complete = world.from_first(
            lambda: find_run(opt, directory, world.place),
            serialization.packed,
            serialization.unpacked,
        )
        resume.check_seen(Path(opt.save), world.numbers(resume.newest_step(Path(opt.save))))
        overrides = resume.check(opt, state, console.warn) if state else []
        if is_complete:
            console.say(f"=> {opt.save} is already complete")
            console.say(console.finished_line(state["last"], state["best"]))
            return 0
        data = create_data(opt, world, device)
        estimate, free_bytes = estimate_memory(opt, len(data.classes), world, device, ops)
        share = Share(world, device) if world.size > 1 else None
        model = models.factory.create(estimate.opt, len(data.classes), ops, share)
        log = RunLog(directory.path if directory else None)
        recorder = cuda_graph.recorder(opt.cudaGraph, device, data.is_resident)
        trainer = train.create(opt, model, device, log, world, share, recorder)
        if state:
            overrides += resume.restore(trainer, state, data.facts, console.warn, opt.override)
        elif opt.retrain != "none":
            models.weights.load_weights(model, read_weights(opt, world), opt.resetClassifier)
        saver = checkpoints.Saver(
            directory,
            trainer,
            stop,
            {"settings": opts.settings(opt), "data": data.facts, "overrides": overrides},
            keep=opt.keep,
            every_s=60 * opt.saveEvery,
        )
        if directory:
            directory.remember(overrides=overrides)  # what it departed from its first settings in
            begin(opt, directory, log, data, trainer)
        if state:
            continue_files(opt, directory, trainer, saver)

        stop.arm()
        for _ in range(trainer.epoch, opt.nEpochs + 1):
            with memory_errors(estimate.opt, lambda: estimate.advice(free_bytes)):
                trained = trainer.train(data.train, saver.after_step)
                since = time.perf_counter()
                tested = trainer.test(data.val, saver.after_step)
                where = {"val_time_s": time.perf_counter() - since}
            where |= engine.device.facts(device, world.size)
            record = trainer.finish_epoch(trained, tested) | where
            if directory:
                log.epoch(record, trainer.is_best)
            saver.end_epoch()
        with memory_errors(opt, lambda: "use a smaller --batchSize, with --override true"):
            finish(opt, directory, log, data, trainer, saver)
    return 0


def find_run(opt: SimpleNamespace, directory: RunDirectory, place: launcher.Place) -> tuple:
    """The checkpoint to go on from, if any, and whether nothing is left to do."""
    from experiment import console, resume

    state = resume.find(opt, console.warn)
    if state and resume.is_complete(opt, state, directory.status()):
        return state, True
    resume.check_progress(directory, state, place.restarted)
    return state, False


def choose_kernels(opt: SimpleNamespace, device):
    """What runs dense blocks on the device."""
    import kernels.backend
    from experiment import console

    ops, remark = kernels.backend.select(opt.kernels, device, opt.precision)
    if remark:
        console.warn(remark)
    return ops


def create_data(opt: SimpleNamespace, world, device, statistics=None):
    """The data of this process. One process of each machine downloads and unpacks it."""
    import datasets.factory
    from datasets.factory import Replica
    from distributed import rendezvous
    from experiment import console

    replica = Replica(world.rank, world.size, world.everyone)
    with world.first_on_machine():
        data = datasets.factory.create(opt, device, console.warn, statistics, replica)
    world.agree(data.facts | rendezvous.versions())
    return data


def read_weights(opt: SimpleNamespace, world) -> dict:
    """The weights that `--retrain` names, as the first process reads them."""
    import checkpoints
    from fileio import serialization

    return world.from_first(
        lambda: checkpoints.load_weights(Path(opt.retrain)),
        serialization.packed,
        serialization.unpacked,
    )


def estimate_memory(opt: SimpleNamespace, num_classes: int, world, device, ops):
    """What the run's steps will need, with `--optMemory auto` decided, and what there is."""
    import engine.device
    import engine.memory
    from engine.memory import Estimate
    from experiment import console

    estimate = Estimate(opt, num_classes, device, ops)
    free_bytes = engine.device.free_bytes(device)
    if free_bytes is not None:
        free_bytes = min(world.numbers(free_bytes))
    if opt.optMemory != "auto":
        return estimate, free_bytes
    level, remark = estimate.choose_level(free_bytes)
    level = max(world.numbers(level))  # the GPUs may be of different kinds
    if remark:
        console.warn(remark)
    decided = engine.memory.with_settings(opt, optMemory=level)
    return Estimate(decided, num_classes, device, ops), free_bytes


@contextlib.contextmanager
def memory_errors(opt: SimpleNamespace, advice: Callable[[], str]) -> Iterator[None]:
    """Say what would fit when there is no memory left."""
    import engine.memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not engine.memory.is_out_of_memory(error):
            raise
        level = "" if opt.optMemory is None else f" --optMemory {opt.optMemory}"
        what = f"out of memory with --batchSize {opt.batchSize}{level}"
        raise OutOfMemoryError(what, advice()) from error


def begin(opt: SimpleNamespace, directory: RunDirectory, log, data, trainer) -> None:
    """Write what a run is before it starts: its settings, its data, its first images."""
    import engine.device

    config = opts.as_yaml(opt, without=opts.OF_ONE_CALL)
    atomic.write_whole(directory.path / "config.yaml", config.encode())
    directory.write_json("data.json", data.facts)
    directory.write_status("running", **trainer.position)
    log.open(next_epoch=trainer.epoch)
    log.texts(config=config, device=engine.device.describe(trainer.device))
    if trainer.global_step == 0:
        log.images(next(iter(data.train.batches(trainer.epoch)))[0])


def continue_files(opt: SimpleNamespace, directory, trainer, saver) -> None:
    """Bring the files of a resumed run up to its checkpoint."""
    import checkpoints
    from experiment import console, resume

    if trainer.is_between_epochs:
        saver.save_models()  # the process that wrote the checkpoint may have died before this
    elsewhere = False
    if directory:
        resume.bring_best(opt, trainer, console.warn)
        elsewhere = not checkpoints.newest_first(directory.path)
    if any(trainer.world.maximum(elsewhere)):  # it goes on in a directory of its own
        saver.save()


def finish(opt: SimpleNamespace, directory, log, data, trainer, saver) -> None:
    """Measure the test set if it was kept for the end, and say how the run ended."""
    import checkpoints
    from experiment import console

    tested = {}
    if data.test is not None:
        # The paper's choice on SVHN: the model with the lowest validation error is the one tested.
        which, result = ("best", trainer.best) if trainer.best else ("last", trainer.last)
        if directory:  # the other processes take theirs from this one
            weights = checkpoints.load_weights(directory.path / f"model_{which}.pt")
            trainer.model.load_state_dict(weights)
        tested = trainer.test(data.test, saver.stop_if_asked, phase="test")
        console.say(console.tested_line(tested, f"{which} model, epoch {result['epoch']}"))
    if directory:
        log.close(opts.experiment(opt), trainer.results() | tested)
        position = trainer.position | {"epoch": opt.nEpochs}  # the last, not the one after it
        directory.write_status("done", 0, **position, **trainer.results(), **tested)
    console.say(console.finished_line(trainer.last, trainer.best))


def end_stuck(world, directory: RunDirectory | None, error: RunError) -> None:
    """End a process whose main thread waits for what will never come."""
    if directory:
        directory.judge(error)
    if world.speaks:
        say(error)
    os._exit(error.code)


def evaluate(opt: SimpleNamespace, world, device) -> int:
    """Evaluate the weights of `--resume` or `--retrain`, on the test set where there is one."""
    import datasets.factory
    import models.factory
    import models.weights
    import train
    from experiment import console, resume
    from experiment.log import RunLog
    from fileio import serialization

    world.watch(partial(end_stuck, world, None))
    ops = choose_kernels(opt, device)
    state = world.from_first(
        lambda: resume.find(opt, console.warn), serialization.packed, serialization.unpacked
    )
    if state:
        resume.check_network(opt, state)
    weights = state["model"] if state else read_weights(opt, world)
    statistics = (state["data"]["mean"], state["data"]["std"]) if state else None
    with datasets.file_loader.worker_failures():
        data = create_data(opt, world, device, statistics)
        if state:
            resume.check_data({"classes": data.classes}, state)
        if opt.optMemory == "auto":
            opt.optMemory = opts.FLAGS["optMemory"].default  # levels are about training
        model = models.factory.create(opt, len(data.classes), ops)
        trainer = train.create(opt, model, device, RunLog(None), world)
        models.weights.load_weights(model, weights)  # now that it has the precision of the run
        with memory_errors(opt, lambda: "use a smaller --batchSize"):
            tested = trainer.test(data.test or data.val, lambda: None, phase="test")
    console.say(f" * Results top1: {tested['test_top1']:6.3f}  top5: {tested['test_top5']:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
