"""The contract of docs/faults.md in a few functions: one line, an exit code, nothing lost."""

import hashlib
import json
import re
from pathlib import Path

import torch

import checkpoints
import experiment.log
from helpers.run_main import Result
from helpers.sample_data import write_folder

# A run of four steps an epoch that takes a few hundredths of a second.
TINY = {
    "dataset": "synthetic",
    "nImages": 32,
    "imageSize": 8,
    "nClasses": 3,
    "depth": 10,
    "growthRate": 2,
    "batchSize": 8,
    "nThreads": 0,
}
# The same over files, which loader processes read where nThreads is not 0; see `write_files`.
TINY_FILES = {
    "dataset": "folder",
    "imageSize": 72,
    **dict.fromkeys(("d1", "d2", "d3", "d4"), 1),
    "initChannels": 4,
    "growthRate": 2,
    "batchSize": 2,
}
OF_CLOCKS = ("images_per_s", "data_wait", "time_s", "val_time_s", "memory_mb")


def command(**flags: object) -> list[str]:
    """A command line; a flag that is None is left out."""
    words = {True: "true", False: "false"}
    return [
        f"--{name}={words[value] if isinstance(value, bool) else value}"
        for name, value in flags.items()
        if value is not None
    ]


def tiny(**flags: object) -> list[str]:
    """The command line of a tiny run with some flags changed."""
    return command(**TINY | flags)


def write_files(root: Path) -> Path:
    """Two classes of six and two images for `TINY_FILES`."""
    counts = {"train": {"cat": 6, "dog": 6}, "val": {"cat": 2, "dog": 2}}
    write_folder(root, counts, size=80)
    return root


def refused(result: Result, code: int, pattern: str) -> None:
    """Assert that a call ended with `code` and one line: `error: ...; fix: ...`."""
    lines = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    assert result.code == code, result
    assert len(lines) == 1, result.err
    assert re.fullmatch(r"error: .+; fix: .+", lines[0]), result.err
    assert re.search(pattern, lines[0]), result.err


def saved(directory: Path) -> dict[str, bytes]:
    """What must not change when something goes wrong later: the files a run has saved."""
    names = ("checkpoint_*.pt", "model_*.pt", "config.yaml", "log.jsonl", "data.json")
    return {path.name: path.read_bytes() for name in names for path in directory.glob(name)}


def check_whole(directory: Path) -> int:
    """Assert that every file is whole or has a temporary name; how many checkpoints there are."""
    steps = [checkpoints.load(path)["global_step"] for path in directory.glob("checkpoint_*.pt")]
    for path in directory.glob("model_*.pt"):
        assert checkpoints.load_weights(path)
    for path in directory.glob("*.json"):
        assert json.loads(path.read_text())
    epochs = [line["epoch"] for line in experiment.log.read_log(directory)]
    assert epochs == sorted(set(epochs))
    return len(steps)


def status(directory: Path) -> dict:
    """The verdict of a run, for whoever cannot see its exit code."""
    return json.loads((directory / "status.json").read_text())


def records(directory: Path) -> list[dict]:
    """The log of a run without what depends on the clock and the memory."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in OF_CLOCKS}
        for line in lines
    ]


def losses(report: Path) -> dict[str, set[str]]:
    """The losses of each step in what `sabotage.record_losses` wrote: one, if all tries agree."""
    seen: dict[str, set[str]] = {}
    for line in report.read_text().splitlines():
        step, loss, _ = line.split()
        seen.setdefault(step, set()).add(loss)
    return seen


def outcome(directory: Path) -> dict:
    """Everything that two runs of the same settings must agree in, to the last bit."""
    checkpoint = max(directory.glob("checkpoint_*.pt"))
    state = torch.load(checkpoint, weights_only=True)
    return {
        "checkpoint": checkpoint.name,
        "weights": digests(torch.load(directory / "model_last.pt", weights_only=True)),
        "best": digests(torch.load(directory / "model_best.pt", weights_only=True)),
        "momentum": digests(state["momentum"]),
        "rng": digests(state["rng"]),
        "results": (state["last"], state["best"]),
        "log": records(directory),
    }


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """sha256 of every tensor."""
    return {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }
