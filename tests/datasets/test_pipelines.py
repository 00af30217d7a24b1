"""Test what is done to an image from its file to the batch, on large photographs and elsewhere."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from datasets import pipelines
from datasets.decode import DecodeOptions
from datasets.pipelines import LargeImages, SmallImages
from helpers.sample_data import noise

PLAIN = (0.0,) * 3, (1.0,) * 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> str:
    """Write a JPEG of 1441 x 1083 pixels with soft shades, sharp edges and fine grain."""
    rows, columns = np.mgrid[0:1083, 0:1441] / 100
    shades = [np.sin(rows * a + b) * np.cos(columns * b - a) for a, b in ((1, 2), (2, 1), (0.5, 3))]
    pixels = 128 + 80 * np.stack(shades, -1) + 40 * (np.sin(9 * rows) > columns / 20)[..., None]
    pixels += np.random.default_rng(0).normal(0, 4, pixels.shape)
    path = tmp_path_factory.mktemp("photograph") / "large.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return str(path)


def prepared(path: str, pipeline: LargeImages) -> tuple[torch.Tensor, float]:
    """Return the (H, W, 3) pixels of an image, and by how much it was reduced in decoding."""
    picture, _ = pipeline.read(path, DecodeOptions(), 1, 0)
    return pipeline.prepare(picture)[0][0].int(), picture.cut.box.height / picture.extent[0]


@pytest.mark.parametrize(("size", "scale"), [(66, 2), (112, 2), (140, 1)])
def test_a_large_photograph_is_evaluated_at_a_reduced_scale_where_that_changes_little(
    photograph, size, scale, monkeypatch
):
    pixels, found = prepared(photograph, LargeImages(size, "antialias", PLAIN, CPU))
    image = tv.pil_to_tensor(Image.open(photograph))
    resized = tv.resize(image, round(size * 256 / 224), v2.InterpolationMode.BICUBIC)
    wanted = tv.center_crop(resized, size).permute(1, 2, 0).int()
    difference = (pixels - wanted).abs().double()
    assert found == scale
    assert difference.mean() < 0.3 and difference.max() <= (3 if scale > 1 else 0)
    monkeypatch.setattr(pipelines, "EVALUATION_MARGIN", 1)
    pixels, found = prepared(photograph, LargeImages(size, "antialias", PLAIN, CPU))
    difference = (pixels - wanted).abs().double()
    assert found > scale and difference.mean() > 0.3


def test_a_large_photograph_is_trained_on_at_a_reduced_scale_but_not_with_torch7(photograph):
    scales = {}
    for resize in ("antialias", "torch7"):
        pipeline = LargeImages(66, resize, PLAIN, CPU, seed=0)
        pictures = [pipeline.read(photograph, DecodeOptions(), 1, i)[0] for i in range(30)]
        scales[resize] = {p.cut.box.height / p.extent[0] for p in pictures}
        for picture in pictures:
            assert min(picture.extent) >= 66 or picture.extent == picture.pixels.shape[:2]
    assert scales["torch7"] == {1} and scales["antialias"] >= {4, 8}


@pytest.mark.parametrize("pipeline", [
    SmallImages(8, PLAIN), LargeImages(66, "antialias", PLAIN, CPU, seed=3),
    LargeImages(66, "torch7", PLAIN, CPU), LargeImages(66, "torch7", PLAIN, CPU, ten_crops=True),
], ids=["small", "augmented", "torch7", "ten-crops"])  # fmt: skip
def test_pipelines_can_be_sent_to_loader_processes(pipeline, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(noise(1, 90)[0]).save(path)

    def fields(pipeline):
        return pipeline.prepare(pipeline.read(str(path), DecodeOptions(), 1, 0)[0])

    here = fields(pipeline)
    batch = pipeline.finish([here], CPU)  # makes what stays on the device
    sent = pickle.loads(pickle.dumps(pipeline))
    assert all(map(torch.equal, fields(sent), here))
    assert torch.equal(sent.finish([fields(sent)], CPU), batch)
