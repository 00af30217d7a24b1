"""Compute default milestones, and what becomes of them when the length of a run changes."""

from cli.flag_types import Settings, as_text
from models.registry import ARCHITECTURES


def default_milestones(num_epochs: int, imagenet: bool, net_type: str = "densenet") -> list[int]:
    """Return the epochs, counted from 1, at which the rate drops (docs/parity.md).

    CIFAR and SVHN: the first epochs that are >= 50 % and >= 75 % of `num_epochs`, for residual
    networks 81 and 122 of 164 in proportion, for others those of their papers. ImageNet: every
    thirty epochs.
    """
    if imagenet:
        return list(range(31, num_epochs + 1, 30))
    parts = ARCHITECTURES[net_type].milestones
    return [-(-num_epochs * part // whole) for part, whole in parts]  # rounded up


def follow_length(
    saved: list[int], default: list[int], epochs_trained: int, num_epochs: int
) -> list[int]:
    """Return the milestones of a run that goes on with another length.

    Those that it has passed stay. The others are the `default` ones of the new length, at the
    earliest the next epoch, since the rate of an epoch that is trained does not change any more.
    """
    passed = [epoch for epoch in saved if epoch <= epochs_trained]
    later = [max(epoch, epochs_trained + 1) for epoch in default[len(passed) :]]
    return passed + [epoch for epoch in later if epoch <= num_epochs]


def describe_rates(lr: float, milestones: list[int], num_epochs: int, decay: float = 0.1) -> str:
    """Name the rate from each milestone on: `LR 0.01 from epoch 150, 0.001 from epoch 225`."""
    # Of equal milestones the last one decides.
    rates = {epoch: f"{lr * decay**drops:g}" for drops, epoch in enumerate(milestones, start=1)}
    parts = [f"{rate} from epoch {epoch}" for epoch, rate in rates.items() if epoch <= num_epochs]
    return f"LR {', '.join(parts)}" if parts else f"LR {lr:g} in every epoch"


def start_notes(opt: Settings, from_config: str) -> list[str]:
    """List what the user should know about the rate of a run that begins.

    Args:
        from_config: what becomes of milestones of another length, see `config_files.add_file`.
    """
    if opt.lrShape != "multistep":
        return []
    if from_config:
        rates = describe_rates(opt.LR, opt.milestones, opt.nEpochs, opt.lrDecay)
        if from_config == "follow":
            return [f"milestones follow nEpochs {opt.nEpochs}: {rates}"]
        stay = f"milestones of the config stay with nEpochs {opt.nEpochs}: {rates}"
        return [f"{stay}; --milestones sets others"]
    if "milestones" not in opt.defaults or 1 not in opt.milestones:
        return []
    # As in Lua, a very short run has no epoch at the initial rate.
    epochs = range(1, opt.nEpochs + 1)
    drops = (sum(epoch >= milestone for milestone in opt.milestones) for epoch in epochs)
    shown = " and ".join(dict.fromkeys(f"{opt.LR * opt.lrDecay**count:g}" for count in drops))
    return [
        f"nEpochs {opt.nEpochs} trains at LR {shown}: its milestones are "
        f'{as_text(opt.milestones)}; --milestones "[]" trains at {opt.LR:g}'
    ]
