"""Prove that a library's network computes what ours does from the same weights.

The library itself is run where it is installed and has such a network. Else a restatement of its
rules is, in double precision, from its own names and layouts, and without a module of PyTorch.
"""

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli.flag_types import Settings
from errors import CheckpointError, RunError, UsageError
from experiment import console
from fileio import tensor_files
from models import weight_formats as formats
from models.layers import set_eps
from models.weight_formats import WeightFormat, Weights
from tools.inference.network import LoadedModel

LIMIT_DOUBLE = 1e-12  # of the largest logit, between two networks in double precision
LIMIT_SINGLE = 1e-5  # if the library's computes in single precision
ANOTHER = "use --to onnx or --to weights"
Logits = Callable[[Tensor], Tensor]  # of normalised images (N, C, H, W)
MODULES = {  # that define the networks
    "torchvision": "torchvision.models.{}",
    "timm": "timm.models.{}",
    "monai": "monai.networks.nets",
    "torchxrayvision": "torchxrayvision.models",
    "segmentation-models": "segmentation_models_pytorch.encoders.densenet",
    "keras": "keras.applications",
    "paddle": "paddle.vision.models",
}


def compare(
    name: str,
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    limit: float,
    error: type[RunError] = RunError,
) -> None:
    """Print how far the logits of two networks differ on the same images.

    Args:
        name: of their network and of the images, for messages.
        limit: largest difference allowed, as a fraction of the largest logit.
        error: class of the error that is raised beyond the limit.

    Raises:
        CheckpointError: one of our logits is not finite.
        RunError: the difference exceeds the limit.
    """
    count = 0
    difference, largest = torch.zeros(2, dtype=torch.float64)
    for images in batches:
        with torch.no_grad():
            wanted, found = ours(images).double(), theirs(images).double()
        if found.shape != wanted.shape:
            what = f"{name}: logits of shape {(*found.shape,)} instead of {(*wanted.shape,)}"
            raise error(what, "nothing was written; report it, or use another --to")
        if not torch.isfinite(wanted).all():
            what = "the network's logits are not finite"
            raise CheckpointError(what, "use weights of a network that was trained")
        count += len(images)
        difference = torch.maximum(difference, (found - wanted).abs().max())
        largest = torch.maximum(largest, wanted.abs().max())
    if not count:  # no image was given, or none can be read
        return
    relative = difference / largest if difference else difference
    off = f"logits at most {difference:.2e} off, {relative:.1e} of the largest"
    console.info(f"{name}, {count} images: {off if difference else 'logits equal bit for bit'}")
    if not relative <= limit:  # also if it is NaN
        what = f"{name}: logits differ by {relative:.1e} of the largest, beyond rounding"
        raise error(what, "nothing was written; report it, or use another --to")


def random_images(opt: Settings) -> list[Tensor]:
    """Draw noise (n, C, size, size) as the network expects pixels, in batches of two sizes."""
    generator = torch.Generator().manual_seed(0)
    shape = (opt.nChannels, opt.imageSize, opt.imageSize)
    low, high = opt.inputRange or (-2, 2)
    noise = [torch.randn(count, *shape, generator=generator) for count in (1, 3)]
    # Each channel of an image has a brightness, or all images would be the same to a mean.
    noise = [batch + torch.randn(*batch.shape[:2], 1, 1, generator=generator) for batch in noise]
    return [batch * (high - low) / 4 + (high + low) / 2 for batch in noise]


def prove(net: LoadedModel, format: WeightFormat, weights: Weights) -> None:
    """Compare our network with a library's, both with its epsilon; say what another changes.

    Args:
        weights: by the library's names, as its file has them.

    Raises:
        CheckpointError: the logits do not depend on the image, so that nothing could be compared.
        UsageError: the library has no such network, or it computes something else.
    """
    opt = net.opt
    name, theirs, dtype = build_peer(opt, format, weights, len(net.classes))
    own = copy.deepcopy(net.model).cpu().double().eval()
    own = own if format.has_classifier else own.features
    model = copy.deepcopy(own)
    set_eps(model, format.eps)
    images = [batch.to(dtype) for batch in random_images(opt)]
    # Scaled weights are rounded to the precision of the file.
    limit = LIMIT_SINGLE if dtype == torch.float32 or format.drop_rate else LIMIT_DOUBLE

    def ours(batch: Tensor) -> Tensor:
        return model(batch.double())

    with torch.no_grad():
        if not ours(images[-1]).std(0).any():
            what = "the network's logits are the same for all images"
            raise CheckpointError(what, "use weights of a network that was trained")
    compare(name, ours, theirs, images, limit, UsageError)
    if opt.bnEps != format.eps:
        eps = f"epsilon {opt.bnEps:g} of this network instead of {format.title}'s {format.eps:g}"
        compare(eps, ours, lambda batch: own(batch.double()), images, LIMIT_SINGLE, UsageError)


def build_peer(
    opt: Settings, format: WeightFormat, weights: Weights, classes: int
) -> tuple[str, Logits, torch.dtype]:
    """Build the library's network if possible, or restate it.

    Returns:
        Its name for messages, its function, and the type that it computes in.

    Raises:
        UsageError: the library does not have this network.
        RunError: a residual network cannot be built, since the library is not installed.
    """
    name = format.name
    residual = ("resnet",) if name in ("torchvision", "timm") else ()
    if not opt.imagenetShape or opt.netType not in ("densenet", *residual):
        where = "" if opt.imagenetShape else f" for images of {opt.imageSize} pixels"
        raise UsageError(f"{name} has no {opt.netType}{where}", ANOTHER)
    try:
        try:
            module = importlib.import_module(MODULES[name].format(opt.netType))
        except Exception as error:  # a library that is broken may raise anything
            raise LookupError(f"tools.export needs {name} to compare with") from error
        builder = {"keras": _of_keras, "paddle": _of_paddle}.get(name, _of_torch)
        logits = builder(module, opt, format, weights, classes)
    except LookupError as error:
        if opt.netType != "densenet":
            raise RunError(str(error), f"pip install {name}, or use --to onnx") from error
        is_narrow = name == "timm" and opt.initChannels != 2 * opt.growthRate
        if not opt.bottleneck or opt.reduction != 0.5 or is_narrow:
            what = f"{name} has no such densenet: its blocks have other widths"
            raise UsageError(what, ANOTHER) from error
        rules = f"a restatement of {format.title}'s rules in double precision"
        return rules, restate(format, weights), torch.float64
    if builder is _of_torch:
        return f"{format.title} in double precision", logits, torch.float64
    return f"{format.title} in single precision", logits, torch.float32


def _of_torch(
    module: ModuleType, opt: Settings, format: WeightFormat, weights: Weights, classes: int
) -> Logits:
    name = format.name
    k, channels, stages = opt.growthRate, opt.initChannels, opt.stages
    if opt.netType == "resnet":
        block = module.Bottleneck if opt.bottleneck else module.BasicBlock
        peer = module.ResNet(block, list(stages), num_classes=classes)
    elif name == "torchvision":
        peer = module.DenseNet(k, stages, channels, num_classes=classes)
    elif name == "timm":  # it has 2k channels in its stem, and no argument for another number
        peer = module.DenseNet(k, stages, num_classes=classes)
    elif name == "monai":
        peer = module.DenseNet(2, opt.nChannels, classes, channels, k, stages)
    elif name == "torchxrayvision":
        thresholds = weights.get(formats.THRESHOLDS)
        peer = module.DenseNet(k, stages, channels, num_classes=classes, op_threshs=thresholds)
    else:
        sizes = {"growth_rate": k, "block_config": stages, "num_init_features": channels}
        peer = module.DenseNetEncoder([0] * 6, **sizes)
    stem = peer.conv1 if opt.netType == "resnet" else peer.features.conv0
    if stem.in_channels != opt.nChannels:  # as their users replace it
        stem.weight = nn.Parameter(stem.weight.new_empty(len(stem.weight), opt.nChannels, 7, 7))
        stem.in_channels = opt.nChannels
    try:
        peer.double().load_state_dict(dict(weights))  # double first: no weight is rounded
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:100]
        raise UsageError(f"{name} has no such {opt.netType}: {first}", ANOTHER) from error
    peer.eval()
    if name == "torchxrayvision":  # it calibrates in single precision only
        return lambda images: peer.classifier(peer.features2(images))
    return (lambda images: peer(images)[-1]) if name == "segmentation-models" else peer


def _of_keras(
    module: ModuleType, opt: Settings, format: WeightFormat, weights: Weights, classes: int
) -> Logits:
    create = getattr(module, f"DenseNet{opt.depth}", None)
    if not create or (opt.growthRate, opt.initChannels) != (32, 64):
        raise LookupError
    shape = (opt.imageSize, opt.imageSize, opt.nChannels)
    peer = create(weights=None, input_shape=shape, classes=classes, classifier_activation=None)
    if {layer.epsilon for layer in peer.layers if hasattr(layer, "epsilon")} != {format.eps}:
        raise LookupError
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "it.weights.h5")
        tensor_files.save_weights(path, weights)
        peer.load_weights(path)

    def logits(images: Tensor) -> Tensor:
        found = peer(images.permute(0, 2, 3, 1).numpy(), training=False)
        return torch.from_numpy(np.array(found.detach() if hasattr(found, "detach") else found))

    return logits


def _of_paddle(
    module: ModuleType, opt: Settings, format: WeightFormat, weights: Weights, classes: int
) -> Logits:
    import paddle

    if opt.depth not in (121, 161, 169, 201, 264):
        raise LookupError
    peer = module.DenseNet(opt.depth, dropout=format.drop_rate, num_classes=classes)
    peer.eval()
    for name, parameter in peer.state_dict().items():  # set_state_dict only warns of other shapes
        if name not in weights or tuple(parameter.shape) != tuple(weights[name].shape):
            raise LookupError
        parameter.set_value(weights[name].float().numpy())
    return lambda images: torch.from_numpy(peer(paddle.to_tensor(images.numpy())).numpy())


def restate(format: WeightFormat, weights: Weights) -> Logits:
    """Return the function that a library's network computes in evaluation.

    It takes only names from `format`: a wrong layout, epsilon or factor there would show. An
    encoder's result is its last batch norm, (N, C, h, w).
    """
    eps = 1.001e-5 if format.name == "keras" else 1e-5
    keep = 1 - format.drop_rate if format.name == "paddle" else 1

    def variable(name: str, place: formats.Place) -> Tensor:
        return weights[formats.variable_name(format, place, name)].double()

    def norm(x: Tensor, place: formats.Place) -> Tensor:
        of_channels = (variable(name, place)[:, None, None] for name in format.norm[:4])
        scale, shift, mean, var = of_channels
        return (x - mean) / (var + eps).sqrt() * scale + shift

    def conv(x: Tensor, place: formats.Place, stride: int = 1, padding: int = 0) -> Tensor:
        kernel = variable(format.kernel, place)
        kernel = kernel.permute(3, 2, 0, 1) if format.name == "keras" else kernel
        return F.conv2d(F.pad(x, [padding] * 4), kernel, stride=stride)

    def logits(images: Tensor) -> Tensor:
        for place in formats.walk(format, weights):
            match place[0]:
                case formats.STEM_CONV:
                    x = conv(images.double(), place, stride=2, padding=3)
                case formats.STEM_NORM:
                    x = F.max_pool2d(norm(x, place).relu(), 3, stride=2, padding=1)
                case formats.NORM1:
                    new = norm(x, place).relu()
                case formats.CONV1:
                    new = conv(new, place)
                case formats.NORM2:
                    new = norm(new, place).relu()
                case formats.CONV2:
                    new = conv(new, place, padding=1)
                    x = torch.cat([x, keep * new], 1)
                case formats.TRANSITION_NORM:
                    x = norm(x, place).relu()
                case formats.TRANSITION_CONV:
                    x = F.avg_pool2d(conv(x, place), 2)
                case formats.LAST_NORM:
                    x = norm(x, place)
                case formats.CLASSIFIER if format.has_classifier:
                    matrix = variable(format.kernel, place)
                    matrix = matrix if format.name in ("keras", "paddle") else matrix.T
                    x = x.relu().mean((2, 3)) @ matrix + variable("bias", place)
        return x

    return logits
