"""Read the weights of a trained network, its settings, classes and channel statistics."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import opts
from cli import path_checks
from cli.config_files import EARLIER_SETTINGS
from cli.flag_reader import FlagParser
from cli.flag_types import Flag, Settings, as_text, text
from errors import CheckpointError, UsageError
from experiment.run_data import (
    CONFIG_FILE,
    DATA_FILE,
    MODEL_FILES,
    parse_data,
    read_data_of,
    run_directory,
)

SOURCES = """
CHECKPOINT is a run directory (its newest checkpoint is taken), a checkpoint_*.pt, a
model_*.pt in its run directory, an ONNX or safetensors file of tools.export, or plain weights (of
torchvision, timm, MONAI, torchxrayvision, segmentation-models-pytorch, Keras, Paddle; a .t7; a
model_*.pt on its own) together with main.py's flags for their network, such as --dataset imagenet
--depth 121. FILE:KEY names one of several networks in a file."""
CLASSES = Flag(
    "classes",
    text,
    None,
    "file with the name of a class on each line, or the data.json of a run, for plain weights",
    "those in CHECKPOINT, else numbers",
)
# Settings of a run that do not change what its network computes, or hold on its machine only.
RUN_ONLY = (*opts.NOT_SAVED, "data", "nGPU", "epochNumber", "retrain", "resetClassifier",
            "adaptChannels", "from", "paddleDropout")  # fmt: skip


class WeightsSource(NamedTuple):
    """Hold weights, and what their file or run directory tells about them."""

    weights: dict  # a state dict, perhaps with another program's names
    settings: dict[str, str]  # main.py's flags as text by name; {} if unknown
    # `classes` in the order of the outputs, and `mean` and `std` per channel of pixels from 0 to
    # 255, as in a run's data.json; an entry that is unknown is missing.
    data: dict[str, list]


def check_there(path: Path) -> None:
    """Raise CheckpointError when `path` does not exist."""
    if not path_checks.split_key(str(path))[0].exists():
        fix = "name a run directory or a file of weights"
        raise CheckpointError(f"no such file or directory: {path}", fix)


def read(path: Path) -> WeightsSource:
    """Read a run directory, or a file of weights in any supported format.

    Raises:
        CheckpointError: missing, damaged, or without weights.
        UsageError: config.yaml or data.json beside the weights is invalid.
    """
    check_there(path)
    path, key = path_checks.split_key(str(path))
    if path.suffix == ".onnx":
        from tools.inference import onnx_io

        weights, metadata = onnx_io.read(path)
        return WeightsSource(weights, *(_read_metadata(metadata, path) if metadata else ({}, {})))
    state = None if key else _read_checkpoint(path)
    if state:
        settings = {name: as_text(value) for name, value in state["settings"].items()}
        return WeightsSource(state["model"], settings, parse_data(state["data"], path))

    import checkpoints
    from experiment import console
    from fileio import safetensors

    weights = checkpoints.load_weights(path, key, console.warn)
    metadata = safetensors.read_metadata(path)
    if metadata:
        return WeightsSource(weights, *_read_metadata(metadata, path))
    directory = run_directory(path)
    return WeightsSource(weights, *(_read_run_files(directory) if directory else ({}, {})))


def _read_checkpoint(path: Path) -> dict | None:
    """Load a checkpoint, of a directory the newest valid one; None for another kind of file."""
    from experiment import console, resume

    wanted = SimpleNamespace(save=path.parent, resume=path, testOnly=True)
    try:
        return resume.find_checkpoint(wanted, console.warn)
    except CheckpointError as error:
        models = [name for name in MODEL_FILES if (path / name).is_file()]
        if models:
            (what, _) = error.problems[0]
            raise CheckpointError(what, f"name {path / models[0]}") from error
        # As this program names them; other programs write a checkpoint_7.pt.
        if path.is_dir() or path.match(f"checkpoint_{9 * '[0-9]'}.pt"):
            raise
    return None


def _read_metadata(metadata: dict[str, str], path: Path) -> tuple[dict, dict]:
    """Read settings and data from the metadata of an ONNX or safetensors file of tools.export."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            for name, key in ((CONFIG_FILE, "settings"), (DATA_FILE, "data")):
                Path(directory, name).write_text(metadata[key], encoding="utf-8")
            return _read_run_files(Path(directory))
    except (KeyError, UsageError) as error:
        what = f"{path} has invalid metadata: {str(error)[:100]}"
        raise CheckpointError(what, "use another file") from error


def _read_run_files(directory: Path) -> tuple[dict, dict]:
    """Read config.yaml and data.json of a run; {} for one that is missing."""
    config, raw = directory / CONFIG_FILE, []
    if config.is_file():
        parser = FlagParser(opts.FLAGS)
        raw = parser.parse_yaml(config)
        parser.add(raw)  # finds values that main.py would refuse, and names their line
        UsageError.raise_for(parser.problems)
    settings = {name: value for name, value, _ in raw}
    return (EARLIER_SETTINGS | settings if raw else {}), read_data_of(directory)


def merge_settings(settings: dict[str, str], main_flags: list[str] | tuple) -> Settings:
    """Merge the settings of a run with flags of main.py, which win."""
    given = {flag.partition("=")[0].removeprefix("--") for flag in main_flags}
    skipped = settings.keys() if "config" in given else {*given, *RUN_ONLY}
    if "config" not in given and os.path.isdir(settings.get("data", "")):  # on its own machine
        skipped -= {"data"} - given
    kept = [
        f"--{name}={value}" for name, value in settings.items() if value and name not in skipped
    ]
    opt = opts.parse([*kept, *main_flags])
    if opt.optMemory == "auto":  # levels matter in training only
        return opt.replace(optMemory=opts.FLAGS["optMemory"].default)
    return opt
