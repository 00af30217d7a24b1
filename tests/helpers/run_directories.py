"""Write run directories for the tests of the tools that read them, without training anything."""

import json
from pathlib import Path

import opts


def record(epoch: int, error: float | None, lr: float = 0.1, **more: object) -> dict:
    """Return one epoch of log.jsonl: half an hour of training, six minutes of validation."""
    losses = {"train_loss": 1.0, "val_loss": 2.0, "train_top1": 50.0, "val_top5": 1.0}
    speed = {"images_per_s": 640.0, "memory_mb": 1000.0, "time_s": 1800.0, "val_time_s": 360.0}
    device = {"device": "NVIDIA H200", "replicas": 1, "torch": "2.11.0"}
    return {"epoch": epoch, "lr": lr, "val_top1": error} | losses | speed | device | more


def write_run(
    path: Path,
    flags: str,
    errors: list[float | None],
    state: str = "done",
    status: dict | None = None,
    data: dict | None = None,
    **more: object,
) -> Path:
    """Write a run directory without weights.

    Args:
        flags: of main.py.
        errors: of its epochs on the validation split.
        status: added to status.json.
        data: added to data.json.
        more: added to each record; None takes a field away.
    """
    path.mkdir(parents=True)
    opt = opts.parse(flags.split())
    (path / "config.yaml").write_text(opts.as_yaml(opt, exclude=opts.NOT_SAVED))
    with open(path / "log.jsonl", "w") as log:
        for epoch, error in enumerate(errors, start=1):
            drops = sum(milestone <= epoch for milestone in opt.milestones)
            line = record(epoch, error, opt.LR * 0.1**drops, **more)
            kept = {name: value for name, value in line.items() if value is not None}
            log.write(json.dumps(kept) + "\n")
    outcome = {"state": state, "code": 0, "epoch": len(errors)} | (status or {})
    (path / "status.json").write_text(json.dumps(outcome))
    metadata = {"training_set": "a", "test_set": "b", "train": 100, "val": 20, "test": None}
    (path / "data.json").write_text(json.dumps(metadata | (data or {})))
    return path
