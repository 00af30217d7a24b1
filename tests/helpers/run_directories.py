"""Run directories for the tests of the tools that read them, written without training anything."""

import json
from pathlib import Path

import opts

DEVICE = {"device": "NVIDIA H200", "replicas": 1, "torch": "2.11.0"}


def record(epoch: int, error: float | None, lr: float = 0.1, **more: object) -> dict:
    """One epoch of log.jsonl: half an hour of training, six minutes of validation."""
    plain = {"epoch": epoch, "lr": lr, "train_top1": 50.0, "val_top1": error, "val_top5": 1.0}
    speed = {"images_per_s": 640.0, "memory_mb": 1000.0, "time_s": 1800.0, "val_time_s": 360.0}
    return plain | speed | DEVICE | more


def write_run(
    path: Path,
    flags: str,
    errors: list[float | None],
    state: str = "done",
    status: dict | None = None,
    data: dict | None = None,
    **more: object,
) -> Path:
    """A run directory without weights.

    Args:
        flags: of main.py.
        errors: of its epochs on the validation split.
        status: added to status.json.
        more: added to each record; None takes a field away.
    """
    path.mkdir(parents=True)
    opt = opts.parse(flags.split())
    (path / "config.yaml").write_text(opts.as_yaml(opt, exclude=opts.NOT_SAVED))
    records = [
        record(epoch, error, _rate(opt, epoch), **more)
        for epoch, error in enumerate(errors, start=1)
    ]
    lines = [
        {name: value for name, value in line.items() if value is not None or name == "val_top1"}
        for line in records
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {"state": state, "code": 0, "epoch": len(errors)} | (status or {})
    (path / "status.json").write_text(json.dumps(said))
    facts = {"training_set": "a", "test_set": "b", "train": 100, "val": 20, "test": None}
    (path / "data.json").write_text(json.dumps(facts | (data or {})))
    return path


def _rate(opt, epoch: int) -> float:
    return opt.LR * 0.1 ** len([milestone for milestone in opt.milestones if milestone <= epoch])
