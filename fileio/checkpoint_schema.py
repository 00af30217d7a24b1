"""Define the entries of a checkpoint and the values that each may have."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

MAX_COUNT = 2**53  # larger numbers are not exact as floats
RESULT = ("epoch", "val_loss", "val_top1", "val_top5")
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def is_plain(value: object) -> bool:
    """Accept None, a bool, number or string, or a flat list of these."""
    items = value if isinstance(value, list | tuple) else [value]
    return all(map(_is_scalar, items))


def _is_scalar(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**64
    return value is None or isinstance(value, float | str)


def is_plain_dict(value: object) -> bool:
    """Accept a dict from names to plain values."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and is_plain(item) for name, item in value.items()
    )


def is_count(value: object) -> bool:
    """Accept a non-negative integer."""
    return type(value) is int and 0 <= value < MAX_COUNT


def is_time(value: object) -> bool:
    """Accept a non-negative, finite number of seconds."""
    return isinstance(value, float) and 0 <= value < math.inf


def are_tensors(value: object) -> bool:
    """Accept a dict from names to tensors."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def is_scaler(value: object) -> bool:
    """Accept the state of a GradScaler, which is {} if disabled."""
    return isinstance(value, dict) and (not value or _numbers(value, SCALER))


def is_rng(value: object) -> bool:
    """Accept the states of torch's random number generators."""
    if not are_tensors(value) or any(state.dtype != torch.uint8 for state in value.values()):
        return False
    try:
        torch.Generator().set_state(value["cpu"])
    except (KeyError, RuntimeError, TypeError):
        return False
    return True


def is_result(value: object) -> bool:
    """Accept the errors of an epoch, or None before the first has ended."""
    return value is None or (_numbers(value, RESULT) and is_count(value["epoch"]))


def is_metrics(value: object) -> bool:
    """Accept the running sums of an epoch (engine.metrics), or None at its start."""
    if value is None:
        return True
    if not isinstance(value, dict) or not is_count(value.get("count")):
        return False
    totals = value.get("totals")
    return isinstance(totals, list) and _numbers(dict(enumerate(totals)), range(3))


def _numbers(value: object, names: tuple[str, ...] | range) -> bool:
    """Accept a dict with exactly these names and a number for each."""
    if not isinstance(value, dict) or value.keys() != set(names):
        return False
    return all(
        isinstance(number, float) or (isinstance(number, int) and abs(number) < MAX_COUNT)
        for number in value.values()
    )


FIELDS: dict[str, Callable[[object], bool]] = {
    "model": are_tensors,
    "momentum": are_tensors,
    "scaler": is_scaler,
    "rng": is_rng,
    "epoch": is_count,
    "step": is_count,
    "global_step": is_count,
    "device": lambda value: isinstance(value, str),
    "threads": is_count,
    "replicas": is_count,
    "sums": is_metrics,
    "time_s": is_time,
    "data_s": is_time,
    "best": is_result,
    "last": is_result,
    "settings": is_plain_dict,
    "data": is_plain_dict,
    "overrides": lambda value: isinstance(value, list) and is_plain(value),
    "defaults": lambda value: value is None or (isinstance(value, list) and is_plain(value)),
}


def with_defaults(state: dict) -> dict:
    """Add the entries that older versions of the program did not write."""
    added = {"replicas": 1, "defaults": None}
    return state | {name: state.get(name, value) for name, value in added.items()}


def rewind_to_epoch_start(state: dict) -> dict:
    """Return a state at the start of its epoch, discarding the steps done."""
    return state | {"step": 0, "sums": None, "time_s": 0.0, "data_s": 0.0}


def validate(state: dict) -> str | None:
    """Say what is wrong with a state; None if nothing is."""
    missing = sorted(FIELDS.keys() - state.keys())
    if missing:
        more = f" and {len(missing) - 3} more entries" if len(missing) > 3 else ""
        return f"lacks {', '.join(missing[:3])}{more}"
    invalid = [name for name, is_valid in FIELDS.items() if not is_valid(state[name])]
    return f"has an invalid {', '.join(invalid)}" if invalid else None
