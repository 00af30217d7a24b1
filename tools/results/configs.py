"""The configs of configs/ and the settings by which runs belong to them."""

import functools
from dataclasses import dataclass
from pathlib import Path

import opts
from cli.flag_types import Settings, as_text
from tools import cli
from tools.results import published

CONFIGS = cli.ROOT / "configs"
LAST, BEST = "last epoch", "best validation"
# Settings without a role that make a run another measurement all the same.
ALSO_COMPARABLE = ("retrain", "epochNumber", "tenCrop")
_counted: dict[tuple, tuple[int, int]] = {}  # by network: counting one takes up to a second


def counts(opt: Settings) -> tuple[int, int]:
    """Parameters and multiply-adds per image of the network of some settings.

    As the paper counts: for ten classes at CIFAR shape, in its CIFAR-100 columns too, and for a
    thousand at ImageNet shape.
    """
    shape = {name for name, flag in opts.FLAGS.items() if flag.role == "model"}
    shape |= {"imageSize", "shortcutType"}
    network = tuple((name, getattr(opt, name)) for name in sorted(shape))
    if network not in _counted:
        from torch.nn import BatchNorm2d

        from tools import describe

        classes = 1000 if opt.imagenetShape else 10
        model = describe.build(opt.replace(nClasses=classes))
        for module in model.modules():
            if isinstance(module, BatchNorm2d):  # counts nothing, and is half of the time here
                module.forward = _same
        parameters = sum(parameter.numel() for parameter in model.parameters())
        macs = sum(layer.macs for layer in describe.measure(model, opt.imageSize))
        _counted[network] = parameters, macs
    return _counted[network]


def _same(features):
    """What stands for a batch normalisation where shapes alone matter."""
    return features


@dataclass(frozen=True)
class Config:
    """A file of configs/.

    Args:
        name: its path below configs/ without the suffix, such as "c10plus/densenet-bc-L100-k12".
        claim: table, column, error and params of its line `paper:`; {} when it claims nothing.
    """

    name: str
    path: Path
    opt: Settings
    claim: dict[str, object]

    @functools.cached_property
    def comparable_settings(self) -> dict[str, str]:
        """Its settings as `comparable_settings` gives them."""
        return comparable_settings(self.opt)

    @property
    def parameters(self) -> int:
        """Trained numbers of its network, see `counts`."""
        return counts(self.opt)[0]

    @property
    def macs(self) -> int:
        """Multiply-adds of its network for one image, see `counts`."""
        return counts(self.opt)[1]

    @property
    def split(self) -> str:
        """Which epoch's error is the result, see `Run.split`."""
        return split_name(self.opt)


@functools.cache
def configs(root: Path = CONFIGS) -> dict[str, Config]:
    """All of configs/*/*.yaml by name.

    Raises:
        UsageError: one of them cannot be parsed.
    """
    paths = sorted(root.glob("*/*.yaml"))
    found = (_config(path, str(path.relative_to(root).with_suffix(""))) for path in paths)
    return {config.name: config for config in found}


def _config(path: Path, name: str) -> Config:
    opt = opts.parse(["--config", str(path)])
    claim = published.plain(path.read_text()).get("paper", {})
    if "error" in claim:
        claim |= {"error": float(claim["error"])}
    return Config(name, path, opt, claim)


def split_name(opt: Settings) -> str:
    """Name the errors that choose a result: the best epoch with a validation set, else the last."""
    return BEST if opt.validSize else LAST


def comparable_settings(opt: Settings) -> dict[str, str]:
    """The settings that must agree for two runs to be repetitions but for the seed, as texts."""
    settings = opts.training_settings(opt) | {name: getattr(opt, name) for name in ALSO_COMPARABLE}
    return {name: as_text(value) for name, value in settings.items() if name != "manualSeed"}
