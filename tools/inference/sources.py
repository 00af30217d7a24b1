"""Read a trained network's weights and facts from wherever they are."""

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
# Settings of a run that say nothing about what its network computes, or only on that machine.
OF_THE_RUN = (*opts.NOT_SAVED, "data", "nGPU", "epochNumber", "retrain", "resetClassifier")


@dataclass(frozen=True)
class TrainingFacts:
    """What a network was trained on.

    Args:
        classes: names in the order of its outputs.
        mean, std: per channel, of pixels from 0 to 255; None where they are not known.
    """

    classes: list[str]
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True)
class WeightsSource:
    """What a file or a run directory holds of a network.

    Args:
        weights: its state dict, or one of another program's.
        settings: main.py's flags as text by name; {} where they are not known.
        facts: None where they are not known.
    """

    weights: dict
    settings: dict[str, str]
    facts: TrainingFacts | None


def check_there(path: Path) -> None:
    """Raise CheckpointError when there is no `path`, before anything is loaded."""
    if not path.exists():
        fix = "name a run directory or a file of weights"
        raise CheckpointError(f"no such file or directory: {path}", fix)


def read(path: Path) -> WeightsSource:
    """What a run directory or a file holds.

    Raises:
        CheckpointError: missing, damaged or no weights.
        UsageError: the settings that lie with them are none.
    """
    if path.suffix == ".onnx":
        return _from_onnx(path)
    state = _checkpoint(path)
    if state:
        given = {name: as_text(value) for name, value in state["settings"].items()}
        return WeightsSource(state["model"], given, as_facts(state["data"], path))

    import checkpoints

    weights = checkpoints.load_weights(path)
    config, data = (path.parent / name for name in ("config.yaml", "data.json"))
    if path.name not in MODEL_FILES or not config.is_file():
        return WeightsSource(weights, {}, None)
    return WeightsSource(
        weights, read_settings(config), read_classes(data) if data.is_file() else None
    )


def _checkpoint(path: Path) -> dict | None:
    """The state in a checkpoint, or in the newest valid one of a directory; None: it is none."""
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
    """Of an ONNX file that tools.export did not write, the weights alone."""
    from tools.export import onnx_io

    weights, metadata = onnx_io.read(path)
    if not metadata:
        return WeightsSource(weights, {}, None)
    try:
        facts = as_facts(json.loads(metadata["data"]), path)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as config:
            config.write(metadata["settings"])
            config.flush()
            return WeightsSource(weights, read_settings(Path(config.name)), facts)
    except (KeyError, ValueError, RecursionError, UsageError) as error:
        what = f"{path} has invalid metadata: {str(error)[:100]}"
        raise CheckpointError(what, "use another file") from error


def settings(source: WeightsSource, main_flags: list[str] | tuple) -> Settings:
    """The settings of a network: those given over those of its run."""
    given = {flag.partition("=")[0].removeprefix("--") for flag in main_flags}
    kept = {} if "config" in given else source.settings
    known = [
        f"--{name}={value}"
        for name, value in kept.items()
        if value and name not in given and name not in OF_THE_RUN
    ]
    opt = opts.parse([*known, *main_flags])
    if opt.optMemory == "auto":  # levels are about training
        return opt.replace(optMemory=opts.FLAGS["optMemory"].default)
    return opt


def read_settings(path: Path) -> dict[str, str]:
    """The flags in a config file, as text by name.

    Raises:
        UsageError: it cannot be read, or has other flags than main.py.
    """
    parser = FlagParser(opts.FLAGS)
    raw = parser.parse_yaml(path)
    parser.add(raw)  # so that what is wrong is said with its line
    if parser.problems:
        raise UsageError.from_problems(parser.problems)
    return {name: value for name, value, _ in raw}


def count_classes(weights: dict, wanted: int | None) -> int:
    """Outputs of the classifier, the last matrix among some weights.

    Raises:
        CheckpointError: there is none, or it has not as many as wanted.
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
    """Class names from a text file of one a line, or all facts from a run's data.json.

    Raises:
        UsageError: it cannot be read or holds none.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return as_facts(json.loads(content), path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name a file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not text, or not JSON", "name another file") from error
    classes = content.splitlines()
    if not classes or not all(name.strip() for name in classes):
        raise UsageError(f"{path} has a line without a name", "write the name of a class on each")
    return TrainingFacts(classes)


def as_facts(data: object, path: Path) -> TrainingFacts:
    """The classes and statistics among the facts that a run writes down about its data.

    Raises:
        UsageError: they are not there, or invalid.
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
