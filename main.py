"""Train, evaluate or resume a network: `python main.py --help`."""

import contextlib
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import opts
from cli import path_checks
from cli.flag_types import Settings
from distributed import launcher, signals
from distributed.signals import SignalHandler, kill_children
from errors import PeerError, Preempted, RunError
from experiment import lifecycle
from experiment.directory import RunDirectory, check_writable
from fileio import atomic


def main(argv: list[str]) -> int:
    """Run one command line; the exit code is 0, or that of an error class in errors.py."""
    signals.reserve_std_fds()
    process = launcher.from_env()
    handler = SignalHandler(process.has_launcher, verbose=process.is_rank0).install()
    opt = world = None
    try:
        path_checks.check_working_directory()
        opt = opts.parse(argv, process.size if process.has_launcher else 0)
        if opt.printConfig:
            if process.is_rank0:
                print(opts.as_yaml(opt), end="")
            return 0
        path_checks.check(opt, process.is_rank0)
        if process.is_rank0 and not opt.testOnly:
            check_writable(Path(opt.save))
        if opt.replicas > 1 and not process.has_launcher:
            return lifecycle.spawn_processes(opt, partial(main, argv))
        world, device = lifecycle.init_processes(opt, process)
        world.check_equal(opts.shared_settings(opt))
        code = evaluate(opt, world, device) if opt.testOnly else run(opt, handler, world, device)
        return lifecycle.exit_with_code(code, world)
    except RunError as error:
        if isinstance(error, PeerError) and handler.stopped_before_saving:
            os._exit(Preempted.code)  # the lost process was stopped too
        if opt and opt.debug and not isinstance(error, Preempted):
            traceback.print_exc()
        return lifecycle.exit_with_error(error, opt, process, world)
    except Exception as error:
        if not process.has_launcher:
            kill_children()
            raise
        traceback.print_exc()
        return lifecycle.exit_with_error(error, opt, process, world)


# What is heavy is imported where it is used, so that a mistyped flag is answered at once.


def run(opt: Settings, handler: SignalHandler, world, device) -> int:
    """Start or continue a run and bring it to its end."""
    import checkpoints
    import models.state_dicts
    import train
    from datasets.file_loader import translate_worker_errors
    from engine.memory import decide_level, memory_errors
    from experiment import console, resume

    ops = select_kernels(opt, device)
    # Only the first process has the directory; what the others need of it, it tells them.
    lock = RunDirectory(Path(opt.save)) if world.is_rank0 else contextlib.nullcontext()
    with lock as directory, translate_worker_errors():
        world.monitor.set_abort_handler(partial(lifecycle.abort, world, directory))
        state, is_complete = resume.load_checkpoint(opt, directory, world, console.warn)
        overrides = []
        if state:
            opt, state, overrides = resume.merge_settings(opt, state, console.warn)
        if is_complete:
            console.info(f"=> {opt.save} is already complete")
            console.info(console.format_final(state["last"], state["best"]))
            return 0
        # What is written down has `auto` as it was given: another machine may decide otherwise.
        config, settings = opts.as_yaml(opt, exclude=opts.NOT_SAVED), opts.settings(opt)

        data = create_data(opt, world, device)
        opt, suggestion = decide_level(opt, len(data.classes), device, ops, world, console.warn)
        trainer = create_trainer(opt, data, world, device, ops, directory)
        if state:
            overrides += resume.restore(trainer, state, data.metadata, console.warn, opt.override)
        elif opt.retrain != "none":
            weights = read_weights(opt, world)
            models.state_dicts.load_weights(trainer.model, weights, opt.resetClassifier)
        trainer.metadata = train.Metadata(settings, data.metadata, overrides)
        saver = checkpoints.CheckpointSaver(
            directory, trainer, handler, keep=opt.keep, every_s=60 * opt.saveEvery
        )
        if directory:
            write_run_files(config, directory, data, trainer)
        if state:
            sync_run_files(opt, directory, trainer, saver)

        handler.enable_saving()
        for _ in range(trainer.epoch, opt.nEpochs + 1):
            with memory_errors(opt, suggestion):
                train_epoch(data, trainer, saver)
        with memory_errors(opt, lambda: "use a smaller --batchSize, with --override true"):
            finalize(opt, directory, data, trainer, saver)
    return 0


def select_kernels(opt: Settings, device):
    """What runs dense blocks on the device."""
    import kernels.backend
    from experiment import console

    ops, warning = kernels.backend.select(opt.kernels, device, opt.precision)
    if warning:
        console.warn(warning)
    return ops


def create_data(opt: Settings, world, device, statistics=None):
    """The data of this process. One process of each machine downloads and unpacks it."""
    import datasets.factory
    from distributed import rendezvous
    from engine.precision import PRECISIONS
    from experiment import console

    with world.local_rank0_first():
        data = datasets.factory.create(
            opt,
            device,
            console.warn,
            dtype=PRECISIONS[opt.precision].dtype,
            statistics=statistics,
            process=world.process,
            all_gather=world.all_gather_json,
        )
    world.check_equal(data.metadata | rendezvous.code_version())
    return data


def create_trainer(opt: Settings, data, world, device, ops, directory: RunDirectory | None):
    """The network on the device, with its optimizer and its log."""
    import models.factory
    import train
    from distributed.world import BatchShard
    from engine import cuda_graph
    from experiment.log import RunLog

    shard = BatchShard(world, device) if world.size > 1 else None
    model = models.factory.create(opt, len(data.classes), ops, shard)
    log = RunLog(directory.path if directory else None)
    capturer = cuda_graph.make_capturer(opt.cudaGraph, device, data.is_resident)
    return train.Trainer(opt, model, device, log, world, shard, capturer)


def read_weights(opt: Settings, world) -> dict:
    """The weights that `--retrain` names, as the first process reads them."""
    import checkpoints
    from fileio import tensor_files

    return world.broadcast_result(
        lambda: checkpoints.load_weights(Path(opt.retrain)),
        tensor_files.to_bytes,
        tensor_files.from_bytes,
    )


def write_run_files(config: str, directory: RunDirectory, data, trainer) -> None:
    """Write what a run is before it starts: its settings, its data, its first images."""
    import engine.device

    # What it departed from its first settings in is in each status from here on.
    directory.set_status_fields(overrides=trainer.metadata.overrides)
    atomic.atomic_write(directory.path / "config.yaml", config.encode())
    directory.write_json("data.json", data.metadata)
    directory.write_status("running", **trainer.position)
    trainer.log.open(next_epoch=trainer.epoch)
    trainer.log.add_text(config=config, device=engine.device.describe(trainer.device))
    if trainer.global_step == 0:
        trainer.log.add_images(next(iter(data.train.batches(trainer.epoch)))[0])


def sync_run_files(opt: Settings, directory: RunDirectory | None, trainer, saver) -> None:
    """Bring the files of a resumed run up to its checkpoint."""
    import checkpoints
    from experiment import console, resume

    if trainer.is_between_epochs:
        saver.save_models()  # the process that wrote the checkpoint may have died before this
    is_new_directory = False
    if directory:
        resume.copy_best_model(opt, trainer, console.warn)
        is_new_directory = not checkpoints.list_checkpoints(directory.path)
    if any(trainer.world.all_reduce_max(is_new_directory)):  # it goes on in a directory of its own
        saver.save()


def train_epoch(data, trainer, saver) -> None:
    """Train an epoch from wherever it stands, evaluate it, log it and save it."""
    import engine.device
    from experiment.log import EpochRecord

    trained = trainer.train(data.train, saver.on_step_end)
    since = time.perf_counter()
    tested = trainer.evaluate(data.val, saver.on_step_end)
    val_time_s = time.perf_counter() - since
    record = EpochRecord(
        **trainer.finish_epoch(trained, tested),
        val_time_s=val_time_s,
        **engine.device.log_fields(trainer.device, trainer.world.size),
    )
    if trainer.world.is_rank0:
        trainer.log.epoch(record, trainer.results.is_best)
    saver.on_epoch_end()


def finalize(opt: Settings, directory: RunDirectory | None, data, trainer, saver) -> None:
    """Measure the test set if it was kept for the end, and say how the run ended."""
    import checkpoints
    from experiment import console

    tested, results = {}, trainer.results
    if data.test is not None:
        # The paper's choice on SVHN: the model with the lowest validation error is the one tested.
        kind, result = ("best", results.best) if results.best else ("last", results.last)
        if directory:  # the other processes take theirs from this one
            weights = checkpoints.load_weights(directory.path / f"model_{kind}.pt")
            trainer.model.load_state_dict(weights)
        tested = trainer.evaluate(data.test, saver.raise_if_stopping, phase="test")
        console.info(console.format_test(tested, f"{kind} model, epoch {result['epoch']}"))
    if directory:
        trainer.log.close(opts.training_settings(opt), results.flat() | tested)
        position = trainer.position | {"epoch": opt.nEpochs}  # the last, not the one after it
        directory.write_status("done", 0, **position, **results.flat(), **tested)
    console.info(console.format_final(results.last, results.best))


def evaluate(opt: Settings, world, device) -> int:
    """Evaluate the weights of `--resume` or `--retrain`, on the test set where there is one."""
    import models.factory
    import models.state_dicts
    import train
    from datasets.file_loader import translate_worker_errors
    from engine.memory import memory_errors
    from experiment import console, resume
    from experiment.log import RunLog
    from fileio import tensor_files

    world.monitor.set_abort_handler(partial(lifecycle.abort, world, None))
    ops = select_kernels(opt, device)
    state = world.broadcast_result(
        lambda: resume.find_checkpoint(opt, console.warn),
        tensor_files.to_bytes,
        tensor_files.from_bytes,
    )
    if state:
        resume.check_network(opt, state)
    weights = state["model"] if state else read_weights(opt, world)
    statistics = (state["data"]["mean"], state["data"]["std"]) if state else None
    with translate_worker_errors():
        data = create_data(opt, world, device, statistics)
        if state:
            resume.check_data({"classes": data.classes}, state)
        if opt.optMemory == "auto":
            opt = opt.replace(optMemory=opts.FLAGS["optMemory"].default)  # it is about training
        model = models.factory.create(opt, len(data.classes), ops)
        trainer = train.Trainer(opt, model, device, RunLog(None), world)
        models.state_dicts.load_weights(model, weights)  # now that it has the precision of the run
        with memory_errors(opt, lambda: "use a smaller --batchSize"):
            tested = trainer.evaluate(data.test or data.val, lambda: None, phase="test")
    console.info(f" * Results top1: {tested['test_top1']:6.3f}  top5: {tested['test_top5']:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
