"""Test on files of other libraries that their weights compute here what they compute there."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm.models.densenet
import torch
from torchvision.models.densenet import DenseNet

import checkpoints
import models.factory
import models.state_dicts
import opts
from errors import CheckpointError
from models.layers import set_eps
from models.weight_formats import FORMATS, export_weights, import_weights
from tools.export.proof import restate

FILES = Path(__file__).parent / "library_files"
TINY = "--dataset imagenet --nGPU 0 --optMemory 0 --growthRate 4 --initChannels 8"
TINY += " --d1 1 --d2 2 --d3 1 --d4 1"
LIBRARIES = {  # file: its library, channels, outputs
    "monai.pt": ("monai", 3, 5),
    "segmentation-models.pt": ("segmentation-models", 3, 5),
    "torchxrayvision.pt": ("torchxrayvision", 1, 18),
    "keras.weights.h5": ("keras", 3, 5),
    "keras.h5": ("keras", 3, 5),
    "keras.keras": ("keras", 3, 5),
    "paddle.pdparams": ("paddle", 3, 5),
}
# Largest difference from what the library computed, over the largest output: the libraries' own
# single precision, where they did not compute in double.
LIMITS = {"monai": 1e-15, "segmentation-models": 1e-15}


def images(channels: int) -> torch.Tensor:
    draws = np.random.default_rng(channels).normal(size=(2, channels, 65, 65))
    return torch.from_numpy(draws.astype(np.float32)).double()


def network(channels: int, classes: int) -> torch.nn.Module:
    opt = opts.parse(f"{TINY} --nChannels {channels}".split())
    return models.factory.create(opt, classes).double().eval()


def read(file: str):
    """Read a file of LIBRARIES as it is converted; return it with a network that holds it."""
    library, channels, classes = LIBRARIES[file]
    weights = checkpoints.load_weights(FILES / file)
    imported = import_weights(weights, library, [].append, 0.2)
    model = network(channels, classes)
    is_encoder = library == "segmentation-models"
    models.state_dicts.load_weights(model, imported.weights, reset_classifier=is_encoder)
    set_eps(model, imported.settings.get("bnEps", 1e-5))
    return imported, model


def output(library: str, logits: torch.Tensor, thresholds: list | None) -> torch.Tensor:
    """Return what the library returns: features of an encoder, scores with torchxrayvision."""
    if library == "segmentation-models":
        return logits.relu().mean((2, 3))
    if library != "torchxrayvision":
        return logits
    scores, rows = logits.sigmoid(), []
    for column, threshold in zip(scores.T, thresholds, strict=True):
        t = threshold or 0.5
        below, above = column / t / 2, 1 - (1 - column) / (1 - t) / 2
        rows.append(torch.where(column < t, below, above) if threshold else 0 * column + 0.5)
    return torch.stack(rows, 1)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("file", LIBRARIES)
@torch.no_grad()
def test_weights_of_a_library_compute_what_it_computed(file):
    library = LIBRARIES[file][0]
    imported, model = read(file)
    x = images(LIBRARIES[file][1])
    ours = (model.features if library == "segmentation-models" else model)(x)
    theirs = torch.from_numpy(np.load(FILES / "outputs.npz")[library]).double()
    limit = LIMITS.get(library, 1e-6)
    assert relative(output(library, ours, imported.thresholds), theirs) <= limit
    # The rules as tools.export restates them, from the library's names and layouts.
    restated = restate(imported.format, imported.source)(x)
    # The 3x3 of Paddle's network with dropout were scaled, and rounded.
    assert relative(restated, ours) <= (1e-6 if library == "paddle" else 1e-13)

    # Twins: what names and values do not show must be known.
    if library == "keras":
        set_eps(model, 1e-5)
        assert 1e-9 < relative(model(x), ours) < 1e-6
    if library == "paddle":
        unscaled = import_weights(imported.source, "paddle", [].append).weights
        models.state_dicts.load_weights(model, unscaled)
        assert relative(model(x), theirs) > 0.01


@pytest.mark.parametrize("file", LIBRARIES)
def test_weights_go_back_to_a_library_as_they_came(file):
    imported, _ = read(file)
    back = export_weights(imported.weights, imported.format, imported.thresholds)
    assert back.keys() == imported.source.keys()
    for name, tensor in imported.source.items():
        found = back[name].double().numpy()
        # Paddle's 3x3 are multiplied by 0.8 and divided by it.
        is_scaled = "bn_ac_func2._conv" in name
        ulps = np.spacing(tensor.abs().numpy()) if is_scaled else 0
        apart = np.abs(found - tensor.double().numpy())
        assert ((apart <= ulps) | np.isnan(tensor.numpy())).all(), name
        assert np.isnan(found).tolist() == np.isnan(tensor.numpy()).tolist()
    assert all(tensor.is_contiguous() for tensor in back.values())


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("monai.pt", "reads MONAI's weights, by their names; its dropout_prob"),
        (
            "segmentation-models.pt",
            "segmentation-models-pytorch's weights, by .*; an encoder",
        ),
        (
            "torchxrayvision.pt",
            "torchxrayvision's .*; inputRange -1024.0, 1024.0; nChannels 1; its",
        ),
        ("keras.weights.h5", "Keras's weights, by their names; bnEps 1.001e-05; running variances"),
        (
            "paddle.pdparams",
            "Paddle's weights, .*; if its network has dropout=P, add --paddleDropout P",
        ),
    ],
)
def test_the_library_is_told_in_one_line_by_the_names_in_the_file(file, shown):
    notes, library = [], LIBRARIES[file][0]
    weights = checkpoints.load_weights(FILES / file)
    assert import_weights(weights, None, notes.append).format == FORMATS[library]
    (line,) = notes

    assert re.search(shown, line), line
    # With --from the same, and no doubt.
    import_weights(weights, library, notes.append)
    assert notes[1] == line.replace(", by their names", "")


def test_weights_of_another_library_than_the_one_named_are_refused():
    weights = checkpoints.load_weights(FILES / "monai.pt")
    for name in FORMATS.keys() - {"monai", "torchvision", "timm"}:
        with pytest.raises(CheckpointError, match=f"as {FORMATS[name].title}'s DenseNets have"):
            import_weights(weights, name, [].append)
    # The names of these are the program's own, and the network misses its own.
    with pytest.raises(CheckpointError, match="do not fit"):
        models.state_dicts.load_weights(
            network(3, 5), import_weights(weights, "timm", [].append).weights
        )


def test_another_network_of_a_library_and_half_of_one_are_refused():
    weights = checkpoints.load_weights(FILES / "keras.h5")
    residual = weights | {"conv2_block1_0_conv/kernel": torch.ones(1, 1, 4, 4)}
    with pytest.raises(CheckpointError, match="have a conv2_block1_0_conv/kernel, as Keras's"):
        import_weights(residual, None, [].append)
    weights = checkpoints.load_weights(FILES / "monai.pt")
    half = {name.replace("denseblock2.denselayer2.layers", "denseblock2.denselayer2"): tensor
            for name, tensor in weights.items()}  # fmt: skip
    with pytest.raises(CheckpointError, match=r"have a features\.denseblock2\.denselayer2\.conv1"):
        import_weights(half, None, [].append)
    # A classifier of another name does not make an encoder.
    other = {name.replace("class_layers.out", "head"): w for name, w in weights.items()}
    other = {name.replace(".layers", ""): tensor for name, tensor in other.items()}
    assert import_weights(other, None, [].append).format is None


def timm_network(**arguments) -> dict[str, torch.Tensor]:
    return timm.models.densenet.DenseNet(4, (1, 2, 1, 1), 5, **arguments).state_dict()


def volumes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: w[..., None] if w.dim() == 4 else w for name, w in weights.items()}


@pytest.mark.parametrize(
    ("weights", "shown"),
    [
        (lambda: timm_network(stem_type="deep"), "a deep stem of three convolutions"),
        (lambda: timm_network(stem_type="deep_tiered"), "a deep stem of three convolutions"),
        (lambda: {"features.pool0.1.filt": torch.ones(1, 1, 3, 3)} | timm_network(),
         "anti-aliased pooling"),
        (lambda: DenseNet(4, (1, 2, 1, 1), 8, bn_size=2, num_classes=5).state_dict(),
         "8 channels in bottlenecks of k=4, not 4k"),
        (lambda: volumes(timm_network()), "convolutions in 3 dimensions"),
    ],
    ids=["deep", "tiered", "blur", "bottleneck", "3d"],
)  # fmt: skip
def test_a_densenet_that_is_not_the_papers_is_refused_by_what_differs(weights, shown):
    before = {name: tensor.clone() for name, tensor in weights().items()}
    with pytest.raises(CheckpointError, match=shown):
        import_weights(before, None, [].append)


@pytest.mark.parametrize(
    ("build", "fix"),
    [
        (lambda: DenseNet(4, (1, 2, 1, 1), 6, num_classes=5), "give the flags of that network"),
        (lambda: DenseNet(32, (6, 12, 32, 32), 64, num_classes=5),
         "use --depth 169 --growthRate 32 --initChannels 64 --bottleneck true --reduction 0.5"),
        (lambda: DenseNet(48, (6, 12, 36, 24), 96, num_classes=5),
         "use --depth 161 --growthRate 48 --initChannels 96 --bottleneck true --reduction 0.5"),
    ],
)  # fmt: skip
def test_another_depth_or_width_is_refused_with_the_flags_that_fit(build, fix):
    imported = import_weights(build().state_dict(), None, [].append)
    model = network(3, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        models.state_dicts.load_weights(model, imported.weights)
    line = caught.value.report()
    assert "features.conv0.weight has shape" in line and line.endswith(f"; fix: {fix}")
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


@pytest.mark.parametrize("value", [-0.1, 0.0, 1.0, float("inf")])
def test_thresholds_that_are_no_probabilities_are_refused(value):
    weights = checkpoints.load_weights(FILES / "torchxrayvision.pt")
    weights["op_threshs"][3] = value
    with pytest.raises(CheckpointError, match="op_threshs of these weights"):
        import_weights(weights, None, [].append)


def mutate(weights: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Take away, add, rename or reshape some tensors, or give them another type."""
    weights = dict(weights)
    for name in rng.sample([*weights], rng.choice((1, 1, 2, 40))):
        tensor = weights.pop(name)
        shapes = ((), (0,), (*tensor.shape, 1), tensor.shape[1:], tensor.shape[::-1])
        other = rng.choice(("gone", "renamed", "shape", "shape", "type"))
        if other == "renamed":
            weights[name.replace(rng.choice("123"), rng.choice("0459"))] = tensor
        elif other == "shape":
            weights[name] = torch.ones(rng.choice(shapes))
        elif other == "type":
            weights[name] = tensor.to(rng.choice((torch.int8, torch.bool, torch.float64)))
    return weights


@pytest.mark.parametrize("file", LIBRARIES)
def test_weights_of_any_other_names_and_shapes_fit_or_are_refused_in_one_line(file):
    rng, refused = random.Random(file), 0
    library, channels, classes = LIBRARIES[file]
    weights, model = checkpoints.load_weights(FILES / file), network(channels, classes)
    for number in range(60):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            found = import_weights(mutate(weights, rng), rng.choice((library, None)), [].append)
            models.state_dicts.load_weights(model, found.weights, bool(number % 2))
        except CheckpointError as error:
            assert re.fullmatch(r"error: [^\n]+; fix: [^\n]+", error.report())
            after = model.state_dict()
            assert all(torch.equal(before[name], after[name]) for name in before)
            refused += 1
    assert refused > 20


def test_what_stands_beside_a_network_may_have_any_shape():
    weights = timm_network() | {
        "criterion.anchors": torch.ones(1, 2, 3),
        "head.x": torch.ones(5 * (1,)),
    }
    found, notes = import_weights(weights, None, [].append), []
    models.state_dicts.load_weights(network(3, 5), found.weights, warn=notes.append)
    assert notes == ["reads the weights of the network, without criterion.anchors and 1 more"]
