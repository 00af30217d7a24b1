"""Train, evaluate or resume a network: `python main.py --help`."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import opts
from cli import network_settings, path_checks
from cli.flag_types import Settings
from distributed import launcher, signals
from distributed.signals import SignalHandler, kill_children
from errors import PeerError, Preempted, RunError, UsageError
from experiment import lifecycle
from experiment.directory import RunDirectory, check_writable
from fileio import atomic


def main(argv: list[str]) -> int:
    """Run one command line; return 0, or the exit code of an error class in errors.py."""
    signals.reserve_std_fds()
    process = launcher.from_env()
    handler = SignalHandler(process.has_launcher, verbose=process.is_rank0).install()
    opt = world = None
    try:
        # Parse the flags, and check paths before torch is imported.
        path_checks.check_working_directory()
        opt = opts.parse(argv, process.size if process.has_launcher else 0)
        if opt.printConfig:
            if process.is_rank0:
                print(opts.as_yaml(opt), end="")
            return 0
        path_checks.check(opt, process.is_rank0)
        if process.is_rank0 and not opt.testOnly:
            check_writable(Path(opt.save))
        # Start the processes of --nGPU, or connect to those that a launcher has started.
        if opt.replicas > 1 and not process.has_launcher:
            return lifecycle.spawn_processes(opt, partial(main, argv))
        world, device = lifecycle.init_processes(opt, process)
        world.check_equal(opts.shared_settings(opt))
        # Train or evaluate.
        code = evaluate(opt, world, device) if opt.testOnly else run(opt, handler, world, device)
        return lifecycle.exit_with_code(code, world)
    except RunError as error:
        if isinstance(error, PeerError) and handler.signum and not handler.can_save:
            os._exit(Preempted.code)  # the signal ended the lost peer as well
        if opt and opt.debug and not isinstance(error, Preempted):
            traceback.print_exc()
        return lifecycle.exit_with_error(error, opt, process, world)
    except Exception as error:
        if not process.has_launcher:
            kill_children()
            raise
        traceback.print_exc()
        return lifecycle.exit_with_error(error, opt, process, world)


# The functions below import torch when called, so that a mistyped flag is reported at once.


def run(opt: Settings, handler: SignalHandler, world, device) -> int:
    """Train from scratch, or from the run's checkpoint, to the last epoch; then finalize."""
    import checkpoints
    import train
    from datasets.file_loader import translate_worker_errors
    from engine.memory import decide_level, memory_errors
    from experiment import console, resume

    # Rank 0 locks the run directory and sends the other ranks what they need from it.
    lock = RunDirectory(Path(opt.save)) if world.is_rank0 else contextlib.nullcontext()
    with lock as directory, translate_worker_errors():
        world.monitor.set_abort_handler(partial(lifecycle.abort, world, directory))

        # Read the checkpoint, if any, and merge its settings with those given.
        state, is_complete = resume.load_checkpoint(opt, directory, world, console.warn)
        overrides = []
        if state:
            opt, state, overrides = resume.merge_settings(opt, state, console.warn)
        if is_complete:
            console.info(f"=> {opt.save} is already complete")
            console.info(console.format_final(state["last"], state["best"]))
            return 0
        # What the weights of --retrain say about their network wins over the defaults.
        pretrained = None
        if not state and opt.retrain != "none":
            opt, *pretrained = read_weights(opt, world, console.warn)
        # Record `--optMemory auto` as `auto`: another machine may choose another level.
        config, settings = opts.as_yaml(opt, exclude=opts.NOT_SAVED), opts.settings(opt)

        # Build data, model and trainer.
        ops = select_kernels(opt, device, world)
        data = create_data(opt, world, device, state and state["data"])
        opt, suggestion = decide_level(opt, len(data.classes), device, ops, world, console.warn)
        trainer = create_trainer(opt, data, world, device, ops, directory)

        # Load the checkpoint, or the weights of --retrain.
        if state:
            overrides += resume.restore(trainer, state, data.metadata, console.warn, opt.override)
        elif pretrained:
            load_pretrained(opt, trainer.model, data, *pretrained)
        defaults = opts.default_names(opt)
        trainer.metadata = train.Metadata(settings, data.metadata, overrides, defaults)

        # Write the files that describe the run.
        saver = checkpoints.CheckpointSaver(
            directory, trainer, handler, keep=opt.keep, every_s=60 * opt.saveEvery
        )
        if directory:
            write_run_files(config, directory, data, trainer, saver)
        if state:
            resume.sync_run_files(opt, directory, trainer, saver, console.warn)

        # Train.
        handler.can_save = True
        while trainer.epoch <= opt.nEpochs:
            with memory_errors(opt, suggestion):
                train_epoch(data, trainer, saver)
        with memory_errors(opt, lambda: "use a smaller --batchSize, with --override true"):
            finalize(opt, directory, data, trainer, saver)
    return 0


def train_epoch(data, trainer, saver) -> None:
    """Train the rest of the current epoch, evaluate it, log it and save it."""
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
    """Evaluate the test set if it was kept for the end, and write how the run ended."""
    import checkpoints
    from experiment import console

    if not saver.has_saved:  # no step was left, as in a run that is shorter now
        saver.save()
    tested, results, phase = {}, trainer.results, "val"
    trainer.epoch = opt.nEpochs  # the trainer stands at the next one
    if data.test is not None:
        phase = "test"
        # As the paper does on SVHN, test the model with the lowest validation error.
        kind, result = ("best", results.best) if results.best else ("last", results.last)
        if directory:  # the other ranks get the weights from rank 0 in `evaluate`
            weights = checkpoints.load_weights(directory.path / f"model_{kind}.pt")
            trainer.model.load_state_dict(weights)
        tested = trainer.evaluate(data.test, saver.raise_if_stopping, phase)
        console.info(console.format_test(tested, f"{kind} model, epoch {result['epoch']}"))
    elif trainer.evaluated is None:  # another process evaluated the last epoch
        trainer.evaluate(data.val, saver.raise_if_stopping)
    if directory:
        trainer.log.confusion(trainer.evaluated, data.classes, phase, opt.nEpochs)
        trainer.log.close(opts.training_settings(opt), results.flat() | tested)
        directory.write_status("done", 0, **trainer.position, **results.flat(), **tested)
    console.info(console.format_final(results.last, results.best))


def evaluate(opt: Settings, world, device) -> int:
    """Evaluate the weights of `--resume` or `--retrain`, on the test set where there is one."""
    import models.factory
    import models.state_dicts
    import train
    from datasets.file_loader import translate_worker_errors
    from engine.memory import memory_errors
    from experiment import console, resume, run_data
    from experiment.log import RunLog
    from fileio import tensor_files

    # Read the checkpoint, or the weights of --retrain.
    world.monitor.set_abort_handler(partial(lifecycle.abort, world, None))
    state = world.broadcast_result(
        lambda: resume.find_checkpoint(opt, console.warn),
        tensor_files.to_bytes,
        tensor_files.from_bytes,
    )
    if state:
        opt = resume.match_network(opt, state)
        weights, known = state["model"], state["data"]
    else:
        opt, (weights, *_), known = read_weights(opt, world)
    ops = select_kernels(opt, device, world)
    # Build data, model and trainer.
    with translate_worker_errors():
        data = create_data(opt, world, device, known)
        if "classes" in known:
            run_data.check_classes(data.classes, known["classes"])
        if opt.optMemory == "auto":
            opt = opt.replace(optMemory=opts.FLAGS["optMemory"].default)  # auto is about training
        model = models.factory.create(opt, len(data.classes), ops)
        trainer = train.Trainer(opt, model, device, RunLog(None), world)
        fix = (
            f"use weights with a classifier of {len(data.classes)} classes, or train one: "
            "leave out --testOnly and add --resetClassifier true"
        )
        # After the trainer has set the dtype.
        models.state_dicts.load_weights(
            model,
            weights,
            classifier_fix=fix,
            adapt_channels=opt.adaptChannels,
            warn=console.warn,
        )
        # Evaluate.
        with memory_errors(opt, lambda: "use a smaller --batchSize"):
            tested = trainer.evaluate(data.test or data.val, lambda: None, phase="test")
    console.info(f" * Results top1: {tested['test_top1']:6.3f}  top5: {tested['test_top5']:6.3f}")
    return 0


def select_kernels(opt: Settings, device, world):
    """Select the implementation of dense blocks, the same in every process."""
    from engine.backend_choice import select_backend
    from engine.precision import cpu_note
    from experiment import console

    ops, warning = select_backend(opt, device, world)
    for note in (warning, cpu_note(device, opt.precision)):
        if note:
            console.warn(note)
    return ops


def create_data(opt: Settings, world, device, known: dict | None = None):
    """Load this rank's data, which one rank of each machine downloads and unpacks first.

    Args:
        known: classes, mean and std that a trained network expects, if they are known.
    """
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
            statistics=(known["mean"], known["std"]) if known else None,
            classes=known.get("classes") if known else None,
            process=world.process,
            all_gather=world.all_gather_json,
        )
    world.check_equal(data.metadata | rendezvous.code_version())
    return data


def create_trainer(opt: Settings, data, world, device, ops, directory: RunDirectory | None):
    """Build the network on the device, with its optimizer and its log."""
    import models.factory
    import train
    from distributed.world import BatchShard
    from engine import cuda_graph
    from experiment.log import RunLog

    shard = BatchShard(world, device) if world.size > 1 else None
    model = models.factory.create(opt, len(data.classes), ops, shard)
    log = RunLog(directory.path if directory else None)
    is_random = network_settings.has_random_depth(opt)  # decides on the host what is computed
    capturer = cuda_graph.make_capturer("false" if is_random else opt.cudaGraph, device)
    return train.Trainer(opt, model, device, log, world, shard, capturer)


def read_weights(opt: Settings, world, warn: Callable[[str], None] | None = None) -> tuple:
    """Read the weights of `--retrain` on rank 0, for all ranks, and what is known about them.

    Args:
        warn: called with a note where data.json beside them is invalid; None: that is an error.

    Returns:
        The settings, with those that the weights need; a models.weight_formats.Imported; what
        experiment.run_data.read_beside tells of the run that they are from, or {}.
    """
    import json

    import checkpoints
    from experiment import console, run_data
    from fileio import tensor_files
    from models.weight_formats import import_weights

    path, key = path_checks.split_key(opt.retrain)

    def read_beside() -> dict:
        try:
            return run_data.read_beside(path, key)
        except UsageError as error:
            if not warn:
                raise
            warn(f"the classes of the weights are not known: {error}")
            return {}

    weights = world.broadcast_result(
        lambda: checkpoints.load_weights(path, key, console.warn),
        tensor_files.to_bytes,
        tensor_files.from_bytes,
    )
    imported = import_weights(weights, vars(opt)["from"], console.warn, opt.paddleDropout)
    if opt.paddleDropout and not (imported.format and imported.format.scales_dropout):
        console.warn("paddleDropout has no effect on these weights")
    known = world.broadcast_result(
        read_beside, lambda found: json.dumps(found).encode(), json.loads
    )
    # A file of this program knows more than its names tell, of the pixels for one.
    own = {"nChannels"} if known else imported.settings.keys()
    brought = {name: value for name, value in imported.settings.items() if name in own}
    brought |= known.get("settings", {})
    return network_settings.adopt(opt, brought, console.warn), imported, known


def load_pretrained(opt: Settings, model, data, imported, known: dict) -> None:
    """Load the weights of `--retrain`, and note it if their classifier has other classes."""
    import models.state_dicts
    from experiment import console, run_data

    models.state_dicts.load_weights(
        model,
        imported.weights,
        opt.resetClassifier,
        adapt_channels=opt.adaptChannels,
        warn=console.warn,
    )
    if (imported.thresholds, known.get("thresholds")) != (None, None):
        data.metadata["thresholds"] = []  # of a network that a softmax trains, none holds
    if known and not opt.resetClassifier:
        run_data.note_classes(data.classes, known["classes"], console.warn)


def write_run_files(config: str, directory: RunDirectory, data, trainer, saver) -> None:
    """Write the settings, the data's description and the first images before the run starts.

    Where checkpoints are, settings and data are those of the newest one: they are written after the
    next one, so that a start that fails before it leaves them as they were.
    """
    import checkpoints
    import engine.device

    def describe() -> None:
        directory.set_status_fields(overrides=trainer.metadata.overrides)
        atomic.atomic_write(directory.path / "config.yaml", config.encode())
        directory.write_json("data.json", data.metadata)

    if checkpoints.list_checkpoints(directory.path):
        saver.after_first_save = describe
    else:
        describe()
    directory.write_status("running", **trainer.position)
    trainer.log.open(next_epoch=trainer.epoch)
    trainer.log.add_text(config=config, device=engine.device.describe(trainer.device))
    if trainer.global_step == 0:
        trainer.log.add_images(next(iter(data.train.batches(trainer.epoch)))[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
