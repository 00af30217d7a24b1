"""Read the weights of a trained network, its settings, classes and channel statistics."""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import opts
from cli.flag_reader import FlagParser
from cli.flag_types import Flag, Settings, as_text, text
from errors import CheckpointError, UsageError

SOURCES = """CHECKPOINT is a run directory (its newest checkpoint is taken), a checkpoint_*.pt, a
model_*.pt in its run directory, an ONNX file of tools.export, or plain weights (of torchvision or
timm, a .t7, a model_*.pt on its own) together with main.py's flags for their network, such as
--dataset imagenet --depth 121."""
CLASSES = Flag(
    "classes",
    text,
    None,
    "file with the name of a class on each line, or the data.json of a run, for plain weights",
    "those in CHECKPOINT, else numbers",
)
MODEL_FILES = ("model_last.pt", "model_best.pt")
# Settings of a run that do not change what its network computes, or hold on its machine only.
RUN_ONLY = (*opts.NOT_SAVED, "data", "nGPU", "epochNumber", "retrain", "resetClassifier")


@dataclass(frozen=True)
class TrainingFacts:
    """Describes the data that a network was trained on.

    Args:
        classes: names in the order of its outputs.
        mean, std: per channel, of pixels from 0 to 255; None if unknown.
    """

    classes: list[str]
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True)
class WeightsSource:
    """Weights, and what their file or run directory tells about them.

    Args:
        weights: a state dict, perhaps with another program's names.
        settings: main.py's flags as text by name; {} if unknown.
        facts: None if unknown.
    """

    weights: dict
    settings: dict[str, str]
    facts: TrainingFacts | None


def check_there(path: Path) -> None:
    """Raise CheckpointError when `path` does not exist."""
    if not path.exists():
        fix = "name a run directory or a file of weights"
        raise CheckpointError(f"no such file or directory: {path}", fix)


def read(path: Path) -> WeightsSource:
    """Read a run directory, or a file of weights in any supported format.

    Raises:
        CheckpointError: missing, damaged, or without weights.
        UsageError: config.yaml or data.json beside the weights is invalid.
    """
    if path.suffix == ".onnx":
        return _from_onnx(path)
    state = _checkpoint(path)
    if state:
        given = {name: as_text(value) for name, value in state["settings"].items()}
        return WeightsSource(state["model"], given, parse_facts(state["data"], path))

    import checkpoints

    weights = checkpoints.load_weights(path)
    config, data = (path.parent / name for name in ("config.yaml", "data.json"))
    if path.name not in MODEL_FILES or not config.is_file():
        return WeightsSource(weights, {}, None)
    return WeightsSource(
        weights, read_settings(config), read_classes(data) if data.is_file() else None
    )


def _checkpoint(path: Path) -> dict | None:
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
        if path.is_dir() or path.name.startswith("checkpoint_"):
            raise
    return None


def _from_onnx(path: Path) -> WeightsSource:
    """Read an ONNX file: only its weights unless tools.export wrote it."""
    from tools.inference import onnx_io

    weights, metadata = onnx_io.read(path)
    if not metadata:
        return WeightsSource(weights, {}, None)
    try:
        facts = parse_facts(json.loads(metadata["data"]), path)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as config:
            config.write(metadata["settings"])
            config.flush()
            return WeightsSource(weights, read_settings(Path(config.name)), facts)
    except (KeyError, ValueError, RecursionError, UsageError) as error:
        what = f"{path} has invalid metadata: {str(error)[:100]}"
        raise CheckpointError(what, "use another file") from error


def merge_settings(source: WeightsSource, main_flags: list[str] | tuple) -> Settings:
    """Merge the settings of a run with flags of main.py, which win."""
    given = {flag.partition("=")[0].removeprefix("--") for flag in main_flags}
    kept = {} if "config" in given else source.settings
    known = [
        f"--{name}={value}"
        for name, value in kept.items()
        if value and name not in given and name not in RUN_ONLY
    ]
    opt = opts.parse([*known, *main_flags])
    if opt.optMemory == "auto":  # levels matter in training only
        return opt.replace(optMemory=opts.FLAGS["optMemory"].default)
    return opt


def read_settings(path: Path) -> dict[str, str]:
    """Read the flags of a config file as text by name.

    Raises:
        UsageError: it cannot be read, or has a flag that main.py does not take.
    """
    parser = FlagParser(opts.FLAGS)
    raw = parser.parse_yaml(path)
    parser.add(raw)  # reports errors with their line
    if parser.problems:
        raise UsageError.from_problems(parser.problems)
    return {name: value for name, value, _ in raw}


def count_classes(weights: dict, wanted: int | None) -> int:
    """Count the outputs of the classifier, the last matrix of the weights.

    Raises:
        CheckpointError: there is no matrix, or `wanted` is another number.
    """
    matrices = [tensor for tensor in weights.values() if tensor.dim() == 2]
    if not matrices:
        raise CheckpointError("these weights have no classifier", "use those of a whole network")
    found = len(matrices[-1])
    if wanted not in (None, found):
        what = f"the weights have {found} classes, nClasses is {wanted}"
        raise CheckpointError(what, "leave out --nClasses")
    return found


def read_classes(path: Path) -> TrainingFacts:
    """Read class names from a text file, one a line, or all facts from a run's data.json.

    Raises:
        UsageError: it cannot be read, or has no valid classes.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return parse_facts(json.loads(content), path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name a file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not text, or not JSON", "name another file") from error
    classes = content.splitlines()
    if not classes or not all(name.strip() for name in classes):
        raise UsageError(f"{path} has a line without a name", "write the name of a class on each")
    return TrainingFacts(classes)


def parse_facts(data: object, path: Path) -> TrainingFacts:
    """Check the classes and channel statistics of a run's data.json.

    Raises:
        UsageError: missing or invalid.
    """
    try:
        classes, mean, std = (list(data[name]) for name in ("classes", "mean", "std"))
        named = all(isinstance(name, str) for name in classes)
        statistics = [float(value) for value in (*mean, *std)]
        if not named or len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, statistics)):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{path} holds no classes, means and deviations of a run"
        raise UsageError(what, "name the data.json of a run") from error
    return TrainingFacts(classes, statistics[:3], statistics[3:])
