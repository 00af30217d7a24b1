"""Load the weights of another program or version into a network, by name."""

import re

from torch import Tensor, nn

from errors import CheckpointError
from models import lua_weights

# In old torchvision files, `...denselayer1.norm.1.weight` for `...denselayer1.norm1.weight`.
_OLD_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], reset_classifier: bool = False
) -> None:
    """Load a state dict of this project, torchvision, timm or a Lua network.

    Args:
        weights: names and tensors. Names may be those of old torchvision files (`norm.1` for
            `norm1`) or module positions of a Lua network (models/lua_weights.py).
        reset_classifier: keep the model's own classifier.

    Raises:
        CheckpointError: names or shapes do not fit; the model is unchanged.
    """
    if lua_weights.is_lua(weights):
        weights = lua_weights.to_model_names(weights, model)
    weights = {_OLD_KEY.sub(r"\1\2", name): tensor for name, tensor in weights.items()}
    expected, classifier = model.state_dict(), _classifier_prefix(model)
    if reset_classifier:
        weights |= {name: expected[name] for name in expected if name.startswith(classifier)}
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    for name in counters - weights.keys():  # files from before PyTorch 0.4.1 lack them
        weights[name] = expected[name]
    problems = state_dict_mismatches(weights, expected)
    if problems:
        shown = "; ".join(problems[:3]) + (f"; {len(problems)} in all" if len(problems) > 3 else "")
        only_classifier = all(problem.startswith(classifier) for problem in problems)
        fix = "add --resetClassifier true" if only_classifier else "give the flags of that network"
        raise CheckpointError(f"weights do not fit the network: {shown}", fix)
    model.load_state_dict(weights)


def state_dict_mismatches(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """List missing names, unknown names and shapes that differ, one phrase each."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in found.keys() & expected.keys()
        if found[name].shape != expected[name].shape
    ]
    return sorted(problems)


def _classifier_prefix(model: nn.Module) -> str:
    """Return the prefix of the classifier's tensors, `classifier.` or `fc.`."""
    (name,) = (name for name, module in model.named_modules() if module is model.classifier)
    return f"{name}."
