"""Configs, cells and logs of runs that nobody has done."""

from pathlib import Path
from types import SimpleNamespace

from tools.results import match


def opt(**settings) -> SimpleNamespace:
    """A DenseNet-BC of CIFAR shape."""
    known = {"netType": "densenet", "bottleneck": True, "reduction": 0.5, "lrShape": "multistep"}
    return SimpleNamespace(
        **known | {"depth": 100, "growthRate": 12, "nEpochs": 4, "validSize": 0} | settings
    )


def config(parameters: int, macs: int, **settings) -> SimpleNamespace:
    return SimpleNamespace(opt=opt(**settings), parameters=parameters, macs=macs)


BASIC = {"bottleneck": False, "reduction": 1.0}


CONFIGS = {
    "t/big": config(20, 200, depth=250),
    "t/small": config(10, 100),
    "t/basic": config(15, 300, **BASIC),
    "u/other": config(1, 2),
}


def cell(name: str, *errors: float) -> match.SeedGroup:
    found = CONFIGS[name]
    run = {"opt": found.opt, "parameters": found.parameters, "macs": found.macs, "config": name}
    return match.SeedGroup([SimpleNamespace(error=error, **run) for error in errors])


def record(epoch: int, lr: float, loss: float | None = 1.0) -> dict:
    return {"epoch": epoch, "lr": lr, "train_loss": loss, "val_loss": 2.0,
            "train_top1": 50.0 / epoch, "val_top1": 60.0 / epoch}  # fmt: skip


RATES = (0.1, 0.1, 0.01, 0.001)


def logged(name: str | None = "t/small", path: str = "runs/x-seed3", **settings):
    records = [record(epoch, rate) for epoch, rate in enumerate(RATES, start=1)]
    return SimpleNamespace(opt=opt(**settings), records=records, config=name, path=Path(path))
