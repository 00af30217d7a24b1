"""Train, evaluate or resume a network: `python main.py --help`."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import opts
import storage
from errors import OutOfMemoryError, Preempted, RunError
from stopping import Stop, kill_children


def main(argv: list[str]) -> int:
    """Run one command line; the exit code is 0, or that of an error class in errors.py."""
    opt = None
    stop = Stop().install()
    try:
        opt = opts.parse(argv)
        if opt.printConfig:
            print(opts.as_yaml(opt), end="")
            return 0
        opts.check_paths(opt)
        if opt.testOnly:
            return evaluate(opt)
        storage.check_writable(Path(opt.save))
        return run(opt, stop)
    except Preempted as stopped:
        return report(stopped)
    except RunError as error:
        kill_children()
        if opt and opt.debug:
            traceback.print_exc()
        return report(error)
    except Exception:
        kill_children()
        raise


def report(error: RunError) -> int:
    """Say on standard error how the run ended; the exit code."""
    with contextlib.suppress(OSError):  # whoever was to read it may be gone
        print(error.report(), file=sys.stderr, flush=True)
    return error.code


# What is heavy is imported where it is used, so that a mistyped flag is answered at once.


def run(opt: SimpleNamespace, stop: Stop) -> int:
    """Start or continue a run and bring it to its end."""
    import checkpoints
    import datasets
    import devices
    import graphs
    import models
    import resume
    import runlog
    import train

    device, ops = prepare(opt)
    with storage.RunDirectory(Path(opt.save)) as directory, datasets.worker_failures():
        state = resume.find(opt, runlog.warn)
        overrides = resume.check(opt, state, runlog.warn) if state else []
        if state and resume.is_complete(opt, state, directory.status()):
            runlog.say(f"=> {directory.path} is already complete")
            runlog.say(runlog.finished_line(state["last"], state["best"]))
            return 0
        data = datasets.create(opt, device, runlog.warn)
        estimate = estimate_memory(opt, len(data.classes), device, ops)
        free_bytes = devices.free_bytes(device)
        model = models.create(estimate.opt, len(data.classes), ops)
        log = runlog.RunLog(directory.path)
        recorder = graphs.recorder(opt.cudaGraph, device, data.is_resident)
        trainer = train.create(opt, model, device, log, recorder)
        if state:
            resume.restore(trainer, state, data.facts, runlog.warn)
        elif opt.retrain != "none":
            weights = checkpoints.load_weights(Path(opt.retrain))
            models.load_weights(model, weights, opt.resetClassifier)
        saver = checkpoints.Saver(
            directory,
            trainer,
            stop,
            {"settings": opts.settings(opt), "data": data.facts, "overrides": overrides},
            keep=opt.keep,
            every_s=60 * opt.saveEvery,
        )
        begin(opt, directory, log, data, trainer)
        if state and trainer.is_between_epochs:
            saver.save_models()  # the process that wrote the checkpoint may have died before this
        if state:
            resume.bring_best(opt, trainer, runlog.warn)
            if not checkpoints.newest_first(directory.path):  # it goes on in a directory of its own
                saver.save()

        stop.armed = True
        for _ in range(trainer.epoch, opt.nEpochs + 1):
            with memory_errors(estimate.opt, lambda: estimate.advice(free_bytes)):
                trained = trainer.train(data.train, saver.after_step)
                tested = trainer.test(data.val, saver.after_step)
            memory = {"memory_mb": devices.peak_memory_mb(device)}
            log.epoch(trainer.finish_epoch(trained, tested) | memory, trainer.is_best)
            saver.end_epoch()
        with memory_errors(opt, lambda: "use a smaller --batchSize, with --override true"):
            finish(opt, directory, log, data, trainer, saver)
    return 0


def prepare(opt: SimpleNamespace):
    """The device and what runs dense blocks on it; says all remarks about the settings."""
    import devices
    import kernels
    import runlog

    device = devices.select(opt.nGPU)
    devices.configure(opt.cudnn, opt.tf32)
    ops, remark = kernels.select(opt.kernels, device, opt.precision)
    for note in [*opt.notes, *filter(None, [remark])]:
        runlog.warn(note)
    return device, ops


def estimate_memory(opt: SimpleNamespace, num_classes: int, device, ops):
    """What the run's steps will need, with `--optMemory auto` decided in its settings."""
    import devices
    import footprint
    import runlog

    estimate = footprint.Estimate(opt, num_classes, device, ops)
    if opt.optMemory != "auto":
        return estimate
    level, remark = estimate.choose_level(devices.free_bytes(device))
    if remark:
        runlog.warn(remark)
    decided = footprint.with_settings(opt, optMemory=level)
    return footprint.Estimate(decided, num_classes, device, ops)


@contextlib.contextmanager
def memory_errors(opt: SimpleNamespace, advice: Callable[[], str]) -> Iterator[None]:
    """Say what would fit when there is no memory left."""
    import footprint

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not footprint.is_out_of_memory(error):
            raise
        what = f"out of memory with --batchSize {opt.batchSize} --optMemory {opt.optMemory}"
        raise OutOfMemoryError(what, advice()) from error


def begin(opt: SimpleNamespace, directory: storage.RunDirectory, log, data, trainer) -> None:
    """Write what a run is before it starts: its settings, its data, its first images."""
    import devices

    config = opts.as_yaml(opt, without=opts.OF_ONE_CALL)
    storage.write_whole(directory.path / "config.yaml", config.encode())
    directory.write_json("data.json", data.facts)
    directory.write_status("running", **trainer.position)
    log.open(next_epoch=trainer.epoch)
    log.texts(config=config, device=devices.describe(trainer.device))
    if trainer.global_step == 0:
        log.images(next(iter(data.train.batches(trainer.epoch)))[0])


def finish(opt: SimpleNamespace, directory: storage.RunDirectory, log, data, trainer, saver):
    """Measure the test set if it was kept for the end, and say how the run ended."""
    import checkpoints
    import runlog

    tested = {}
    if data.test is not None:
        # The paper's choice on SVHN: the model with the lowest validation error is the one tested.
        which, result = ("best", trainer.best) if trainer.best else ("last", trainer.last)
        weights = checkpoints.load_weights(directory.path / f"model_{which}.pt")
        trainer.model.load_state_dict(weights)
        tested = trainer.test(data.test, saver.stop_if_asked, phase="test")
        runlog.say(runlog.tested_line(tested, f"{which} model, epoch {result['epoch']}"))
    log.close(opts.experiment(opt), trainer.results() | tested)
    position = trainer.position | {"epoch": opt.nEpochs}  # the last, not the one after it
    directory.write_status("done", 0, **position, **trainer.results(), **tested)
    runlog.say(runlog.finished_line(trainer.last, trainer.best))


def evaluate(opt: SimpleNamespace) -> int:
    """Evaluate the weights of `--resume` or `--retrain`, on the test set where there is one."""
    import checkpoints
    import datasets
    import models
    import resume
    import runlog
    import train

    device, ops = prepare(opt)
    state = resume.find(opt, runlog.warn)
    if state:
        resume.check_network(opt, state)
    weights = state["model"] if state else checkpoints.load_weights(Path(opt.retrain))
    statistics = (state["data"]["mean"], state["data"]["std"]) if state else None
    with datasets.worker_failures():
        data = datasets.create(opt, device, runlog.warn, statistics)
        if state:
            resume.check_data({"classes": data.classes}, state)
        if opt.optMemory == "auto":
            opt.optMemory = opts.FLAGS["optMemory"].default  # levels are about training
        model = models.create(opt, len(data.classes), ops)
        models.load_weights(model, weights)
        trainer = train.create(opt, model, device, runlog.RunLog(None))
        with memory_errors(opt, lambda: "use a smaller --batchSize"):
            tested = trainer.test(data.test or data.val, lambda: None, phase="test")
    runlog.say(f" * Results top1: {tested['test_top1']:6.3f}  top5: {tested['test_top5']:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
