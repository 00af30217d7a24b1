"""Test that class activation maps are exact, and drawn where in a picture the network looked."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from faults.contract import command
from helpers.inference import write_model
from helpers.networks import network, scramble
from helpers.tiny_networks import network as densenet
from helpers.tiny_networks import pictures
from models.densenet import DenseNet
from models.layers import GlobalMeanPool
from models.registry import ARCHITECTURES
from tools import classify
from tools.inference import class_maps
from tools.inference import network as inference

LINES = {
    "densenet": "--depth 10 --growthRate 4",
    "resnet": "--depth 8",
    "preresnet": "--depth 11 --bottleneck true",
    "wideresnet": "--depth 10 --widen 0.5",
    "nin": "--widen 0.05",
    "nin-svhn": "--widen 0.05",
    "allcnn": "--widen 0.05",
    "dsn": "--widen 0.05",
    "highway": "--widen 0.1",
    "fractalnet": "--depth 11 --columns 2 --widen 0.1",
}


def maps_of(model: nn.Module, images: Tensor, count: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest logits, their classes and the maps of these."""
    net = SimpleNamespace(model=model, scores=model)
    with torch.no_grad():
        (values, labels), maps = class_maps.top_classes(net, images, count)
    return values, labels, maps


class OnePlace(nn.Module):
    """Take one place of feature maps in place of the mean."""

    def __init__(self, y: int, x: int):
        super().__init__()
        self.y, self.x = y, x

    def forward(self, features: Tensor) -> Tensor:
        return features[..., self.y, self.x]


def bias_of(model: nn.Module, labels: Tensor) -> Tensor | float:
    """Return what is no part of a map; a network that classifies places has it in the places."""
    by_place = type(model).__name__ in ("NIN", "AllCNN", "DSN")
    return 0.0 if by_place else model.classifier.bias.detach()[labels]


def test_every_network_is_tested():
    assert LINES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", LINES)
def test_a_map_is_what_a_network_of_one_place_would_say_and_its_mean_is_the_logit(name):
    model = scramble(network(f"--netType {name} {LINES[name]}")).double().eval()
    nn.init.normal_(model.classifier.bias)
    size = 64 if name == "fractalnet" else 32  # it halves the image five times
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    logits, labels, maps = maps_of(model, images, 7)
    assert torch.equal(logits, logits.sort(descending=True).values)
    assert not model.global_pool._forward_pre_hooks and not model.classifier._forward_pre_hooks

    bias, scale = bias_of(model, labels), logits.abs().max()
    assert (maps.mean((2, 3)) + bias - logits).abs().max() < 1e-12 * scale
    assert (maps.roll(1, 1).mean((2, 3)) + bias - logits).abs().max() > 1e-3 * scale
    height, width = maps.shape[2:]
    assert height * width > 1
    for y, x in ((0, 0), (0, width - 1), (height - 1, 1)):
        model.global_pool = OnePlace(y, x)
        with torch.no_grad():
            wanted = model(images).gather(1, labels)
        assert (maps[..., y, x] + bias - wanted).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("level", range(5))
def test_maps_are_the_same_at_every_memory_level_and_close_in_16_bits(level):
    images = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    wanted = maps_of(densenet(0).eval(), images, 3)[2]
    model = densenet(level).eval()
    assert (maps_of(model, images, 3)[2] - wanted).abs().max() < 1e-12
    values, labels, maps = maps_of(model.bfloat16(), images.bfloat16(), 3)
    assert maps.dtype == torch.float64
    error = maps.mean((2, 3)) + model.classifier.bias.double()[labels] - values.double()
    assert error.abs().max() < 2**-7 * values.abs().max()


@pytest.mark.parametrize("form", ["BC", "ImageNet"])
@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("library", ["captum", "pytorch_grad_cam"])
def test_gradient_methods_agree_after_the_last_relu_and_see_another_map_before_it(
    library, level, form
):
    pytest.importorskip(library)
    model, (images, _) = densenet(level, form).float().eval(), pictures(form)
    images = images.float()
    _, labels, maps = maps_of(model, images, 1)
    wanted, targets = maps[:, 0].clamp(min=0), labels[:, 0].tolist()

    def found(layer: nn.Module) -> Tensor:
        if library == "captum":
            from captum.attr import LayerGradCam

            grad_cam = LayerGradCam(model, layer)
            got = grad_cam.attribute(images, target=labels[:, 0], relu_attributions=True)[:, 0]
        else:
            import pytorch_grad_cam as other
            from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

            with other.GradCAM(model=model, target_layers=[layer]) as cam:
                cam(images.clone(), [ClassifierOutputTarget(target) for target in targets])
                kept = cam.activations_and_grads
                both = kept.activations[0].numpy(), kept.gradients[0].numpy()
                got = torch.from_numpy(cam.get_cam_image(images, layer, targets, *both).clip(0))
        return got.detach().double() * wanted[0].numel()  # their weights are means, not sums

    def error(got: Tensor) -> float:
        return ((got - wanted).abs().max() / wanted.abs().max()).item()

    assert error(found(model.relu5)) < 1e-5
    assert error(found(model.features.norm5)) > 1e-2


CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
COLOURS = 2 * torch.eye(4, 3) - 1  # the last is black


def corner_images(labels: Tensor) -> Tensor:
    """Draw noise with a patch of the colour of its class in the corner of its class."""
    images = 0.3 * torch.randn(len(labels), 3, 16, 16)
    for image, label in zip(images, labels.tolist(), strict=True):
        down, right = CORNERS[label]
        image[:, 10 * down + 1 : 10 * down + 5, 10 * right + 1 : 10 * right + 5] += (
            2 * COLOURS[label, :, None, None]
        )
    return images


def test_the_maps_of_a_trained_network_point_into_the_corner_of_the_class():
    model = DenseNet((2, 2), 8, 16, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    for _ in range(40):
        labels = torch.randint(4, (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(corner_images(labels)), labels).backward()
        optimizer.step()
    model.eval()
    labels = torch.arange(200) % 4
    images = corner_images(labels)

    def share_that_points(model: nn.Module) -> float:
        _, found, maps = maps_of(model, images, 4)
        right = maps[found == labels[:, None]]  # (200, h, w)
        at, width = right.flatten(1).argmax(1), right.shape[2]
        corners = 2 * (at // width >= width // 2) + (at % width >= width // 2)
        return (corners == labels).double().mean().item()

    assert (maps_of(model, images, 4)[1][:, 0] == labels).double().mean() > 0.98
    assert share_that_points(model) > 0.98
    with torch.no_grad():  # the twin
        model.classifier.weight.copy_(model.classifier.weight.roll(1, 0))
    assert share_that_points(model) < 0.5


class Brightness(nn.Module):
    """Tell bright from dark by the mean of 8 x 8 places."""

    def __init__(self):
        super().__init__()
        self.global_pool, self.classifier = GlobalMeanPool(), nn.Linear(3, 2)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            self.classifier.bias.copy_(torch.tensor([99.0, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.global_pool(F.adaptive_avg_pool2d(images, 8)))


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize("size", [32, 72])
@pytest.mark.parametrize(("width", "height"), [(400, 200), (180, 300)], ids=str)
def test_the_peak_of_a_map_lies_on_what_causes_it_in_the_pixels_of_the_picture(
    size, width, height, turned, tmp_path, monkeypatch
):
    """The picture is cut to its centre; a bright spot lies in a corner of that."""
    flags = command(dataset="folder", imageSize=size, depth=10 if size == 32 else 121, growthRate=2)
    weights = write_model(tmp_path / "run", flags, ["bright", "dark"])
    net = dataclasses.replace(inference.load(weights, ["--exifRotate=true"]), model=Brightness())
    side = min(width, height) * (1 if size == 32 else 7 / 8)  # of what is cut out
    spots, reach = {}, int(side / 16)  # a place of the map
    for down, right in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        pixels = np.full((height, width, 3), 40, np.uint8)
        y, x = round(height / 2 + down * 5 / 16 * side), round(width / 2 + right * 5 / 16 * side)
        pixels[y - reach : y + reach, x - reach : x + reach] = 250
        exif = Image.Exif()
        if turned:  # as a camera held on its side stores it
            pixels, exif[0x112] = np.rot90(pixels), 6
        path = str(tmp_path / f"{down}{right}.jpg")
        Image.fromarray(pixels).save(path, quality=95, exif=exif)
        spots[path] = y, x

    def measure() -> tuple[float, int]:
        """Return how far, in places, a peak is from its spot, and what is coloured outside."""
        pngs, found = [Path(f"{path}.png") for path in spots], []
        assert len([*classify.lines(net, list(spots), 1, False, pngs)]) == 8
        for png, (path, spot) in zip(pngs, spots.items(), strict=True):
            sheet, shown = np.asarray(Image.open(png)), ImageOps.exif_transpose(Image.open(path))
            is_row = sheet.shape[1] > 2 * width
            top, left = (36, 24 + width) if is_row else (72 + height, 12)
            assert np.array_equal(sheet[36 : 36 + height, 12 : 12 + width], np.asarray(shown))
            panel = sheet[top : top + height, left : left + width].astype(int)
            orange = panel[..., 0] - panel[..., 2]
            outside = orange[[0, -1]] if height > width else orange[:, [0, -1]]
            peak = np.unravel_index(orange.argmax(), orange.shape)
            found.append((np.abs(np.subtract(peak, spot)).max() / side * 8, abs(outside).max()))
        return tuple(map(max, zip(*found, strict=True)))

    distance, outside = measure()
    assert distance < 1 and outside == 0
    whole = {"scaled": (size, size), "windows": [(0, 0)]}  # the twin
    place = class_maps.place
    monkeypatch.setattr(class_maps, "place", lambda m, cut, *a: place(m, cut._replace(**whole), *a))
    distance, outside = measure()
    assert distance > 1 and outside > 0
