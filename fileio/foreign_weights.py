"""Find the weights of a network in what any program saved.

A state dict may lie in dicts (`{"model": {"state_dict": ...}}`), its names may have prefixes of
modules around the network (`module._orig_mod.`), and there may be several: the weights and their
moving average, a student and its teacher. Each has a key of both parts, such as
`state_dict_ema.module`.
"""

import re
from collections.abc import Callable, Set
from typing import NamedTuple

from torch import Tensor

from errors import CheckpointError
from fileio.inert_pickle import Record

# Names of dicts and modules that stand for the network itself; that of the whole file is "".
PLAIN = {
    *("", "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("weights", "params", "timm_model", "encoder", "backbone"),
}
AVERAGE = re.compile(r"(^|.*_)(ema|swa|avg|average|averaged)(_.*|$)")
# Modules that PyTorch puts between others.
TRANSPARENT = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# A weight of each network whose name tells what stands before it.
FIRST_WEIGHTS = (
    *("features.conv0.weight", "layer1.0.conv1.weight", "stages.0.0.conv1.weight"),
    *("conv1_conv/kernel", "conv1_func._conv.weight"),
)
MAX_DEPTH = 4  # of dicts in dicts
Weights = dict[str, Tensor]


class Candidate(NamedTuple):
    """Hold a state dict, with the names that its network gives them."""

    weights: Weights
    prefix: str  # of these names in the file
    left: list[str]  # names outside of every network
    is_network: bool  # one of this program's; else names and prefix are as in the file


def find(state: object, key: str | None, warn: Callable[[str], None]) -> Weights:
    """Return the weights of one network.

    Args:
        state: what a file held.
        key: of the wanted weights, or the beginning of it; None takes the moving average if there
            is one.
        warn: called with a line for each choice.

    Raises:
        CheckpointError: there are no weights, those of several networks, or none of this key.
    """
    found = {}
    if isinstance(state, dict):
        _collect(state, (), found, frozenset() if key else set())
        if not found and (tensors := _tensors(state)):  # a file of vectors alone
            found = _split(tensors, ())
    if any(candidate.is_network for candidate in found.values()):
        found = {label: it for label, it in found.items() if it.is_network}
    if not found:
        raise _no_weights(state)
    label = _choose(found, key, warn)
    weights, prefix, left, _ = found[label]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warn(f"reads the weights under {prefix or 'no prefix'}, without {left[0]}{more}")
    return weights


def _collect(value: dict, path: tuple, found: dict[str, Candidate], seen: Set[int]) -> None:
    """Add the candidates in a dict and the dicts in it, by their labels.

    Args:
        seen: identities of dicts that are left out. A set collects them: of a dict under two names
            the first one counts. A frozenset holds those on the path alone: each name counts.
    """
    if id(value) in seen or len(path) > MAX_DEPTH:
        return
    seen |= {id(value)}
    tensors = _tensors(value)
    if any(tensor.dim() > 1 for tensor in tensors.values()):
        more = _split(tensors, path)
        if both := found.keys() & more:
            raise CheckpointError(f"holds two networks under {min(both)}", "save one of them alone")
        found |= more
    for name, item in value.items():
        if isinstance(name, str) and isinstance(item, dict):
            _collect(item, (*path, name), found, seen)


def _tensors(value: dict) -> Weights:
    """Return the tensors of a dict by name, but for the counter of torch's AveragedModel."""
    return {
        name: item
        for name, item in value.items()
        if isinstance(name, str) and isinstance(item, Tensor) and name != "n_averaged"
    }


def _split(tensors: Weights, path: tuple) -> dict[str, Candidate]:
    """Separate the networks in one state dict, and take the prefixes off their names."""
    full = {TRANSPARENT.sub("", name): tensor for name, tensor in tensors.items()}
    prefixes = {
        name.removesuffix(first)
        for name in full
        for first in FIRST_WEIGHTS
        if f".{name}".endswith(f".{first}")
    }
    if not prefixes:
        return {".".join(path): Candidate(tensors, "", [], False)}
    found, left = {}, [name for name in full if not name.startswith(tuple(prefixes))]
    for prefix in sorted(prefixes):
        others = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
        names = [name for name in full if name.startswith(prefix)]
        names = [name for name in names if not (others and name.startswith(others))]
        weights = {name.removeprefix(prefix): full[name] for name in names}
        label = ".".join((*path, *prefix.split(".")[:-1]))
        found[label] = Candidate(weights, prefix, left, True)
    return found


def _choose(found: dict[str, Candidate], key: str | None, warn: Callable[[str], None]) -> str:
    """Return the label of the wanted network."""
    labels = list(found)
    averages = [label for label in labels if any(map(AVERAGE.fullmatch, label.split(".")))]
    plain = [label for label in labels if PLAIN.issuperset(label.split("."))]
    # An average of the parameters alone lacks the statistics of BatchNorm.
    lacking = {label: _lacking(label, plain, found) for label in averages}
    if key:
        wanted = [label for label in labels if f"{label}.".startswith(f"{key}.")]
        what = f"holds {'more than one' if wanted else 'no'} {key}"
        lost = lacking.get(wanted[0], ()) if len(wanted) == 1 else ()
        if statistics := [name for name in lost if ".running_" in name]:
            what = f"holds parameters alone in {wanted[0]}: no {min(statistics)}"
            fix = f"name FILE:{plain[0]}" if plain[0] else "leave out the key"
            raise CheckpointError(what, fix)
    else:
        whole = [label for label in averages if not lacking[label]]
        wanted = whole or plain or labels
        what = "holds several networks"
        if len(whole) == 1 and len(labels) > 1:
            others = [label for label in plain or labels if label not in whole]
            warn(f"reads {whole[0]}, the moving average; name the other as FILE:{others[0]}")
        elif len(wanted) == 1 and averages and lacking[averages[0]]:
            reads, lacks = wanted[0] or "the weights", len(lacking[averages[0]])
            warn(f"reads {reads}; {averages[0]} lacks {lacks} of its tensors")
    if len(wanted) != 1:
        fix = " or ".join(f"FILE:{label}" for label in (wanted or labels)[:4] if label)
        raise CheckpointError(what, f"name {fix}" if fix else "leave out the key")
    return wanted[0]


def _lacking(label: str, plain: list[str], found: dict[str, Candidate]) -> set[str]:
    """Return the tensors that plain weights have and these lack, but for counters."""
    names = {name for other in plain for name in found[other].weights}
    names = {name for name in names if not name.endswith("num_batches_tracked")}
    return names - found[label].weights.keys()


def _no_weights(state: object) -> CheckpointError:
    """Return the error for a file without a state dict, with the class of what stands for it."""
    values = [state]
    if isinstance(state, dict):
        for name in sorted(state, key=lambda name: name not in PLAIN):
            values.append(state[name])
            if name in PLAIN and isinstance(state[name], dict):
                values += state[name].values()
    for value in values:
        if isinstance(value, Record):
            fix = "where it was made, save the weights: torch.save(model.state_dict(), FILE)"
            return CheckpointError(f"holds no state dict, but a pickled {value.name}", fix)
    return CheckpointError("holds no state dict", "name a file of weights")
