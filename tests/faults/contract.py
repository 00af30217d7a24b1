"""Assert the contract of docs/faults.md: one line, an exit code, nothing lost."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoints
import experiment.log
from helpers.run_main import Ranks, Result, run
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
FLAGS = {"nEpochs": 3, "dropRate": 0.2, "nGPU": 0}  # of most runs that are disturbed
OF_CLOCKS = ("images_per_s", "data_wait", "time_s", "val_time_s", "memory_mb")


def command(**flags: object) -> list[str]:
    """Return a command line; a flag that is None is left out."""
    words = {True: "true", False: "false"}
    return [
        f"--{name}={words[value] if isinstance(value, bool) else value}"
        for name, value in flags.items()
        if value is not None
    ]


def tiny(**flags: object) -> list[str]:
    """Return the command line of a tiny run with some flags changed."""
    return command(**TINY | flags)


def write_files(root: Path, train: int = 6, val: int = 2, classes: str = "cat dog") -> Path:
    """Write so many images of each class for `TINY_FILES`."""
    counts = {"train": train, "val": val}
    write_folder(root, {s: dict.fromkeys(classes.split(), n) for s, n in counts.items()}, size=80)
    return root


def call(
    argv: list[str], size: int = 1, sabotages: dict[int, Callable] | None = None, **more
) -> list[Result]:
    """Run `main.py` in so many processes; `sabotages` are for some of them, by rank."""
    if size == 1:
        return [run(argv, (sabotages or {}).get(0))]
    return Ranks(argv, size, sabotages or {}, **more).wait()


def codes(results: list[Result]) -> list[int]:
    """Return the exit codes of several processes."""
    return [result.code for result in results]


def refused(result: Result, code: int, pattern: str) -> None:
    """Assert that a call ended with `code` and one line: `error: ...; fix: ...`."""
    # CPython's report of a thread that was starting when torch's handler of SIGCHLD raised.
    starting = r"Exception ignored in thread started by.*?\nKeyError: [^\n]*\n"
    err = re.sub(starting, "", result.err, flags=re.DOTALL)
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert result.code == code, result
    assert len(lines) == 1, result.err
    assert re.fullmatch(r"error: .+; fix: .+", lines[0]), result.err
    assert re.search(pattern, lines[0]), result.err


def refused_by_all(results: list[Result], code: int, pattern: str) -> None:
    """Assert that all processes ended with `code`, and that one of them says why."""
    assert set(codes(results)) == {code}, results
    said = [result for result in results if result.err]
    assert len(said) == 1, results
    refused(said[0], code, pattern)


def saved(directory: Path) -> dict[str, bytes]:
    """Read what must not change when something goes wrong later: the files a run has saved."""
    names = ("checkpoint_*.pt", "model_*.pt", "config.yaml", "log.jsonl", "data.json")
    return {path.name: path.read_bytes() for name in names for path in directory.glob(name)}


def check_whole(directory: Path) -> int:
    """Assert that every file is whole or has a temporary name; return the number of checkpoints."""
    steps = [checkpoints.load(path)["global_step"] for path in directory.glob("checkpoint_*.pt")]
    for path in directory.glob("model_*.pt"):
        assert checkpoints.load_weights(path)
    for path in directory.glob("*.json"):
        assert json.loads(path.read_text())
    epochs = [line["epoch"] for line in experiment.log.read_log(directory)]
    assert epochs == sorted(set(epochs))
    return len(steps)


def newest_step(directory: Path) -> int | None:
    """Return the global step of the newest checkpoint, which must be valid; None without one."""
    paths = checkpoints.list_checkpoints(directory)
    return checkpoints.load(paths[0])["global_step"] if paths else None


def status(directory: Path) -> dict:
    """Read the verdict of a run, as a caller who cannot see its exit code does."""
    return json.loads((directory / "status.json").read_text())


def records(directory: Path) -> list[dict]:
    """Read the log of a run without what depends on the clock and the memory."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in OF_CLOCKS}
        for line in lines
    ]


def losses(report: Path) -> dict[str, set[str]]:
    """Read the losses of each step from `sabotage.record_losses`: one, if all attempts agree."""
    seen: dict[str, set[str]] = {}
    for line in report.read_text().splitlines():
        step, loss, _ = line.split()
        seen.setdefault(step, set()).add(loss)
    return seen


def outcome(directory: Path) -> dict:
    """Collect everything that two runs of the same settings must agree in, to the last bit."""
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
    """Compute the SHA-256 of every tensor."""
    return {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }
