"""The contract of docs/faults.md in a few functions: one line, an exit code, nothing lost."""

import hashlib
import json
import re
from pathlib import Path

import torch
from program import Result

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
OF_CLOCKS = ("images_per_s", "data_wait", "time_s", "memory_mb")


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
