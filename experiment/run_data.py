"""Read the classes and channel statistics of the run that weights are from; compare classes."""

import json
import math
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import opts
from cli.flag_reader import FlagParser
from datasets.folder_checks import spelling_fix
from errors import CheckpointError, UsageError

MODEL_FILES, DATA_FILE = ("model_last.pt", "model_best.pt"), "data.json"
CONFIG_FILE = "config.yaml"
NETWORK_FLAGS = ("bnEps", "inputRange", "preprocess")  # that weights bring with them
MAX_SHOWN = 3  # differences in one message


def run_directory(weights: Path) -> Path | None:
    """Return the run directory of a file of weights, or of what it links to; None outside of one.

    A model file may have been copied or renamed there: any `model_*.pt` counts.
    """
    for path in (weights.resolve(), weights):
        beside = (path.with_name(name).is_file() for name in (CONFIG_FILE, DATA_FILE))
        if path.match("model_*.pt") and any(beside):
            return path.parent
    return None


def read_beside(weights: Path, key: str | None = None) -> dict[str, list]:
    """Read what is known of the data that weights were trained on.

    A checkpoint and a safetensors file of tools.export say it themselves; beside a run's model file
    lies data.json.

    Args:
        key: of FILE:KEY, which is no file of this program.

    Returns:
        As `read_classes`, and `settings`, the NETWORK_FLAGS that are known; {} for other weights.

    Raises:
        UsageError: data.json is invalid.
    """
    import yaml

    import checkpoints  # loads torch
    from fileio import safetensors

    if key:
        return {}
    if directory := run_directory(weights):
        parser = FlagParser(opts.FLAGS)
        if (directory / CONFIG_FILE).is_file():
            parser.add(parser.parse_yaml(directory / CONFIG_FILE))
        data, settings = read_data_of(directory), parser.values
    elif metadata := safetensors.read_metadata(weights):
        try:
            data = parse_data(json.loads(metadata["data"]), weights)
            settings = yaml.safe_load(metadata["settings"])
            settings = {name: opts.FLAGS[name].parse(opts.as_text(settings[name]))
                        for name in NETWORK_FLAGS if name in settings}  # fmt: skip
        except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{weights} has invalid metadata", "use another file") from error
    else:
        try:
            state = checkpoints.load(weights)
        except CheckpointError:  # another kind of file: whoever loads it says whether it is sound
            return {}
        data, settings = parse_data(state["data"], weights), state["settings"]
    if not data:
        return {}
    return data | {"settings": {name: settings[name] for name in NETWORK_FLAGS if name in settings}}


def read_data_of(directory: Path) -> dict[str, list]:
    """Read data.json of a run as `read_classes` does; {} if it is missing."""
    path = directory / DATA_FILE
    try:
        return read_classes(path) if path.is_file() else {}
    except UsageError as error:
        raise UsageError(error.problems[0][0], "restore it, or move it away") from error


def check_classes(found: list[str], known: list[str]) -> None:
    """Raise CheckpointError if the classes of the data are not those of the run, in order."""
    differing = class_differences(found, known)
    if differing:
        others, missing = {*found} - {*known}, {*known} - {*found}
        fix = spelling_fix(others, missing) if others else None
        fix = fix or "name the class directories as the run's, or start another with --retrain FILE"
        raise CheckpointError(f"the classes are not the run's: {differing}", fix)


def note_classes(found: list[str], known: list[str], warn: Callable[[str], None]) -> None:
    """Note it if a classifier goes on from weights of a run with other classes."""
    differing = class_differences(found, known, "the weights'")
    if differing:
        fix = "--resetClassifier true starts with a random classifier"
        warn(f"the classifier was trained on other classes: {differing}; {fix}")


def class_differences(found: list[str], known: list[str], owner: str = "the run's") -> str:
    """Say which classes differ, by number: `class 1 is zebra, the run's is dog`; "" if none do."""
    pairs = enumerate(zip_longest(found, known))
    shown = [
        f"class {number} is {name or 'missing'}, {owner} is {other or 'missing'}"
        for number, (name, other) in pairs
        if name != other
    ]
    more = f"; {len(shown)} differ" if len(shown) > MAX_SHOWN else ""
    return "; ".join(shown[:MAX_SHOWN]) + more


def read_classes(path: Path) -> dict[str, list]:
    """Read class names from a text file, one a line, or a run's data.json.

    Returns:
        `classes` in the order of the outputs; from data.json also `mean` and `std` per channel, of
        pixels from 0 to 255, and the `thresholds` of independent outputs, if they are.

    Raises:
        UsageError: it cannot be read, or has no valid classes.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return parse_data(json.loads(content), path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name a file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not text, or not JSON", "name another file") from error
    classes = content.splitlines()
    if not classes or not all(name.strip() for name in classes):
        raise UsageError(f"{path} has a line without a name", "write the name of a class on each")
    return {"classes": classes}


def parse_data(data: object, path: Path) -> dict[str, list]:
    """Return classes, mean and std of a run's data.json, or raise UsageError."""
    try:
        classes, mean, std = (list(data[name]) for name in ("classes", "mean", "std"))
        mean, std = ([float(value) for value in values] for values in (mean, std))
        thresholds = {name: list(data[name]) for name in ("thresholds",) if name in data}
        for values in thresholds.values():
            # A run that began with weights that had some has an empty list.
            is_whole = len(values) in (0, len(classes))
            if not is_whole or {type(each) for each in values} - {float, type(None)}:
                raise ValueError
        named = all(isinstance(name, str) for name in classes)
        is_pair = len(mean) == len(std) > 0
        if not named or not is_pair or not all(map(math.isfinite, mean + std)):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{path} holds no classes, means and deviations of a run"
        raise UsageError(what, "name the data.json of a run") from error
    return {"classes": classes, "mean": mean, "std": std} | thresholds
