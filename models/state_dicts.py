"""Load the weights of another program or version into a network, by name."""

from collections.abc import Callable

from torch import Tensor, nn

from errors import CheckpointError
from models import lua_weights

COMPANIONS = "companions"  # of a classifier, which only train (models/plain.py)


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    reset_classifier: bool = False,
    *,
    classifier_fix: str = "add --resetClassifier true",
    adapt_channels: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> None:
    """Load a state dict by this project's names, or of a Lua network.

    Args:
        weights: names and tensors of any floating-point precision. Names may be module positions of
            a Lua network (models/lua_weights.py); models/weight_formats.py converts others.
        reset_classifier: keep the model's own classifier, whatever the weights have as theirs.
        classifier_fix: what helps if everything but the classifier fits.
        adapt_channels: fit a first convolution of another number of channels as timm does: to one
            channel the sum over all, else repeated and scaled, so that an image whose channels are
            equal gives the same.
        warn: called with a line if weights are converted or left out.

    Raises:
        CheckpointError: names or shapes do not fit; the model is unchanged.
    """
    if lua_weights.is_lua(weights):
        weights = lua_weights.to_model_names(weights, model)
    weights = dict(weights)
    expected, classifier = model.state_dict(), _classifier_prefixes(model)
    body = {_root(name) for name in expected if not name.startswith(classifier)}
    if reset_classifier:
        weights = {name: tensor for name, tensor in weights.items() if _root(name) in body}
        weights |= {name: expected[name] for name in expected if name.startswith(classifier)}
    # Files from before PyTorch 0.4.1 have no counters, those of a network that only evaluates no
    # companions.
    absent = {name for name in expected if name.endswith("num_batches_tracked")}
    if COMPANIONS not in map(_root, weights):
        absent |= {name for name in expected if _root(name) == COMPANIONS}
    for name in absent - weights.keys():
        weights[name] = expected[name]
    known = {*body, *map(_root, classifier)}
    outside = sorted(name for name in weights if _root(name) not in known)
    if outside and expected.keys() <= weights.keys():  # a loss or another head beside the network
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        warn(f"reads the weights of the network, without {outside[0]}{more}")
        weights = {name: tensor for name, tensor in weights.items() if _root(name) in known}
    _fit_channels(weights, expected, adapt_channels, warn)
    problems = state_dict_mismatches(weights, expected)
    if problems:
        shown = "; ".join(problems[:3]) + (f"; {len(problems)} in all" if len(problems) > 3 else "")
        # Names outside of the body, fc.weight of a DenseNet for one, are of another classifier.
        is_other = all(_root(problem.split()[0]) not in body for problem in problems)
        is_other = is_other and any(problem.startswith(classifier) for problem in problems)
        fix = classifier_fix if is_other else _advice(weights, expected)
        if all(_root(problem) == COMPANIONS for problem in problems):  # they read every pixel
            fix = "give the --imageSize that these weights were trained at"
        raise CheckpointError(f"weights do not fit the network: {shown}", fix)
    model.load_state_dict(weights)


def _advice(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Say which flags describe the network of these weights, if it is another DenseNet."""
    found, own = (
        lua_weights.densenet_flags([tuple(w.shape) for w in state.values() if w.dim() == 4])
        for state in (weights, expected)
    )
    return f"use {found}" if found and found != own else "give the flags of that network"


def _root(name: str) -> str:
    return name.partition(".")[0]


def _fit_channels(
    weights: dict[str, Tensor],
    expected: dict[str, Tensor],
    adapt: bool,
    warn: Callable[[str], None],
) -> None:
    """Adapt a first convolution of another number of channels, or refuse it."""
    name = next(name for name, tensor in expected.items() if tensor.dim() == 4)
    found = weights.get(name)
    if found is None or found.dim() != 4 or found.shape[1] == expected[name].shape[1]:
        return
    channels, wanted = found.shape[1], expected[name].shape[1]
    if not adapt:
        what = f"the first convolution of these weights takes {channels} channels, not {wanted}"
        of_files = f"use --nChannels {channels}, or " if channels in (1, 3) else ""
        raise CheckpointError(what, f"{of_files}add --adaptChannels true")
    found = found.to(expected[name].dtype)
    if wanted == 1:
        weights[name], how = found.sum(1, keepdim=True), "summed into one"
    else:
        repeated = found.repeat(1, -(-wanted // channels), 1, 1)[:, :wanted]
        weights[name], how = repeated * channels / wanted, f"repeated over {wanted}, and scaled"
    warn(f"{name} takes {channels} channels: {how}")


def state_dict_mismatches(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """List missing names, unknown names and shapes that differ, one phrase each."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in found.keys() & expected.keys()
        if found[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} holds {str(found[name].dtype).removeprefix('torch.')} numbers"
        for name in found.keys() & expected.keys()
        if not _is_same_kind(found[name], expected[name])
    ]
    return sorted(problems)


def _is_same_kind(found: Tensor, expected: Tensor) -> bool:
    """Tell quantised weights from weights; a counter may be a float, as an average is."""
    if expected.is_floating_point():
        return found.is_floating_point()
    return bool((found == found.to(expected.dtype)).all())


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of classifiers' tensors: `classifier.` or `fc.`, those of companions."""
    heads = [model.classifier, *getattr(model, COMPANIONS, ())]
    return tuple(f"{name}." for name, module in model.named_modules() if module in heads)
