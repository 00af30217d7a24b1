"""Test images of one channel, and of others than three: decoding, statistics, colours, datasets."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

import opts
from datasets import factory, file_loader, image_folder, regions, resize
from datasets.colour import Augment, colour_draws
from datasets.cuts import centre_crop, random_sized_crop, ten_crops
from datasets.decode import DecodeOptions, decode
from datasets.draws import uniforms
from datasets.memory_loader import ImageTensors, channel_statistics
from datasets.pipelines import LargeImages, SmallImages
from datasets.regions import Box, Region, decode_region
from helpers.fb_resnet import augment_colours
from helpers.image_files import png
from helpers.sample_data import create_data, error_line, noise, read_all, write_folder

CPU = torch.device("cpu")
GREY, RGB = DecodeOptions(channels=1), DecodeOptions()
COLOURS = noise(1, 96)[0]
FEW = COLOURS // 64 * 64  # a palette holds these
ALIKE = np.repeat(COLOURS[..., :1], 3, 2)
COUNTS = {"train": {"a": 5, "b": 4}, "val": {"a": 2, "b": 1}}


def luma(pixels: np.ndarray) -> np.ndarray:
    """Weigh (..., 3) as the ITU's R 601 does, in 16 bits and rounded: (..., 1)."""
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[..., None]


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


FILES = {
    "colour PNG": lambda: encoded(Image.fromarray(COLOURS), "PNG"),
    "colour JPEG": lambda: encoded(Image.fromarray(COLOURS), "JPEG"),
    "turned JPEG": lambda: encoded(Image.fromarray(COLOURS[:64]), "JPEG", exif=exif(6)),
    "mirrored JPEG": lambda: encoded(Image.fromarray(COLOURS[:64]), "JPEG", exif=exif(2)),
    "grey JPEG": lambda: encoded(Image.fromarray(COLOURS[..., 0]), "JPEG"),
    "CMYK JPEG": lambda: encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"),
    "palette": lambda: encoded(Image.fromarray(FEW).quantize(64), "PNG"),
    "LA": lambda: encoded(Image.fromarray(COLOURS[..., 0]).convert("LA"), "PNG"),
    "RGBA": lambda: encoded(Image.fromarray(COLOURS).convert("RGBA"), "PNG"),
    "1 bit": lambda: encoded(Image.fromarray(COLOURS[..., 0]).convert("1"), "PNG"),
    "grey PNG": lambda: encoded(Image.fromarray(COLOURS[..., 0]), "PNG"),
    "16-bit grey PNG": lambda: png(257 * COLOURS[..., :1].astype(np.uint16)),
    "16-bit colour PNG": lambda: png(257 * COLOURS.astype(np.uint16)),
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_grey_image_is_the_luma_of_the_colours_whatever_the_file_by_both_decoders(
    tmp_path, name, rotate
):
    path = tmp_path / "image"
    path.write_bytes(FILES[name]())
    options = [DecodeOptions(exif_rotate=rotate, channels=channels) for channels in (1, 3)]
    (grey, remarks), (colour, same_remarks) = (decode(path, each) for each in options)
    wanted = luma(np.asarray(colour))
    assert grey.mode == "L" and remarks == same_remarks
    assert np.array_equal(np.asarray(grey)[..., None], wanted)
    if name.startswith(("grey", "16-bit grey")):  # not rounded again
        assert np.array_equal(wanted, np.asarray(colour)[..., :1])
    if name == "16-bit grey PNG":
        assert np.array_equal(wanted[..., 0], COLOURS[..., 0])
    for box in (Box(0, 0, *grey.size), Box(3, 5, 40, 31)):
        found = decode_region(path, options[0], lambda *_, box=box: Region(box))
        cut = wanted[box.top : box.top + box.height, box.left : box.left + box.width]
        assert np.array_equal(found.pixels, cut) and found.remarks == remarks


def test_a_jpeg_decoded_at_a_reduced_scale_is_the_luma_of_its_colours(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(FILES["colour JPEG"]())
    choose = lambda width, height: Region(Box(0, 0, width, height), (24, 24))  # noqa: E731
    grey = decode_region(path, GREY, choose).pixels
    assert grey.shape == (24, 24, 1)
    assert np.array_equal(grey, luma(decode_region(path, RGB, choose).pixels))


CUTS = {
    "centre": lambda size, kind: centre_crop(96, 80, size, kind),
    "ten crops": lambda size, kind: ten_crops(96, 80, size, kind),
    "random": lambda size, kind: random_sized_crop(96, 80, size, uniforms(0, 1, 5)[0], kind),
}


@pytest.mark.parametrize("kind", ["antialias", "torch7"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("channels", [1, 4])
def test_every_resize_treats_one_channel_as_each_of_three(kind, cut, channels):
    cut = CUTS[cut](65, kind)
    box = cut.box
    alike = ALIKE[box.top : box.top + box.height, box.left : box.left + box.width].copy()

    def resized(pixels: np.ndarray) -> torch.Tensor:
        if kind == "torch7":  # two pictures: their pixels lie one behind the other
            one = resize.pack(pixels, cut, 65)
            both = [torch.cat([field, field]) for field in one]
            return resize.torch7(resize.Packed(*both), 65)
        return resize.antialias(pixels, pixels.shape[:2], cut, 65).permute(0, 3, 1, 2)

    wanted = resized(alike)[:, :1]
    found = resized(np.repeat(alike[..., :1], channels, 2))
    wanted = wanted.expand(-1, channels, -1, -1)
    # Floats of Torch7's resize are summed in another order.
    assert torch.allclose(found, wanted, rtol=0, atol=1e-3 * (kind == "torch7"))


@pytest.mark.parametrize("file", ["colour JPEG", "grey JPEG", "16-bit grey PNG", "palette"])
@pytest.mark.parametrize("pipeline", ["small", "large", "ten crops", "torch7"])
def test_a_grey_file_is_prepared_like_the_luma_of_its_pixels(tmp_path, file, pipeline):
    (tmp_path / "image").write_bytes(FILES[file]())
    pixels = luma(np.asarray(decode(tmp_path / "image")[0])).astype(np.uint8)
    Image.fromarray(np.repeat(pixels, 3, 2)).save(tmp_path / "alike.png")

    def prepare(name: str, channels: int) -> torch.Tensor:
        statistics = ((100.0,) * channels, (50.0,) * channels)
        if pipeline == "small":
            made = SmallImages(32, statistics, channels=channels)
        else:
            kind, crops = ("torch7" if pipeline == "torch7" else "antialias"), pipeline[:3] == "ten"
            made = LargeImages(80, kind, statistics, CPU, ten_crops=crops)
        picture, _ = made.read(str(tmp_path / name), DecodeOptions(channels=channels), 1, 0)
        fields = made.prepare(picture)
        assert made.channels == channels
        assert sum(field.nbytes for field in fields) <= made.image_bytes
        return made.finish([fields], CPU)

    grey, colours = prepare("image", 1), prepare("alike.png", 3)
    assert grey.shape == (10 if pipeline == "ten crops" else 1, 1, *colours.shape[2:])
    assert torch.allclose(grey.expand_as(colours), colours, rtol=0, atol=1e-6)


# Colours:
@pytest.mark.parametrize("has_lighting", [False, True])
def test_grey_images_get_brightness_and_contrast_with_the_draws_of_colours_and_no_lighting(
    has_lighting,
):
    images = torch.from_numpy(noise(20, 65)).movedim(-1, 1)[:, :1].contiguous()
    draws = colour_draws(uniforms(0, epoch=1, first=0, count=20))
    grey = Augment(((100.0,), (50.0,)), "cpu", torch.float64)(images.clone(), draws)
    for image, found, row in zip(images, grey, draws.numpy(), strict=True):
        pixels = image.expand(3, -1, -1).movedim(0, -1).double().numpy() / 255
        lighting, is_mirrored = row[6:9] * has_lighting, bool(row[9])
        order = tuple(row[3:6].astype(int))
        wanted = augment_colours(pixels, tuple(row[:3]), order, lighting, is_mirrored)
        wanted = wanted * np.array((0.229, 0.224, 0.225)) + np.array((0.485, 0.456, 0.406))
        difference = np.abs(found[0].numpy() - (255 * wanted[..., 0] - 100) / 50).max()
        assert (difference < 1e-9) == (not has_lighting)


# Statistics:
def settings(root, *flags: str, size: int = 65):
    fixed = ["--dataset=folder", f"--data={root}", "--precision=double", "--nThreads=0"]
    return opts.parse([*fixed, f"--imageSize={size}", "--nChannels=1", *flags])


def test_statistics_of_a_large_grey_folder_are_of_its_training_files_each_counting_alike(tmp_path):
    written, notes = write_folder(tmp_path, COUNTS, size=70), []
    bright = np.full((10, 300), 250, np.uint8)
    bright[0] = 0
    Image.fromarray(bright).save(tmp_path / "train" / "a" / "wide.png")
    data = create_data(settings(tmp_path), notes.append)
    greys = [*luma(written["train"][0]), bright]
    mean = np.mean([grey.mean() for grey in greys])
    of_squares = np.mean([np.square(grey.astype(float)).mean() for grey in greys])
    assert data.metadata["mean"] == pytest.approx([mean])
    assert data.metadata["std"] == pytest.approx([math.sqrt(of_squares - mean**2)])
    assert notes == ["grey images: lighting and saturation, which change colours, are left out"]
    # The test images are normalised by them, here without a resize to speak of.
    images, _ = read_all(data.val)
    assert images.shape == (3, 1, 65, 65)
    levels = images * data.metadata["std"][0] + mean
    assert torch.allclose(levels, levels.round(), atol=1e-9) and levels.min() >= 0


def test_only_so_many_files_are_measured_spread_over_the_set_and_always_the_same(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(image_folder, "MEASURED", 4)
    write_folder(tmp_path, {"train": {"a": 9, "b": 7}, "val": {"a": 1, "b": 1}}, size=66)
    seen = []

    def spy(path, options):
        seen.append(int(path[-8:-4]))
        return decode(path, options)

    monkeypatch.setattr(image_folder, "decode", spy)
    first = create_data(settings(tmp_path, "--augment=false")).metadata
    assert len(seen) == 4 and max(np.diff(sorted(seen))) <= 6
    again = create_data(settings(tmp_path, "--augment=false")).metadata
    assert seen[:4] == seen[4:] and first == again
    seen.clear()
    known = ([1.5], [2.5])
    found = create_data(settings(tmp_path, "--augment=false"), statistics=known).metadata
    assert (found["mean"], found["std"]) == known and len(seen) == 1  # whether anything varies


def test_files_that_cannot_be_measured_are_one_line_and_constant_ones_too(tmp_path):
    write_folder(tmp_path, COUNTS, size=66)
    for path in (tmp_path / "train").glob("*/*"):
        path.write_bytes(b"damaged")
    line = error_line(create_data, settings(tmp_path))
    assert "none of 9 training images can be read to measure them, last " in line
    for path in (tmp_path / "train").glob("*/*"):
        Image.new("L", (66, 66), 7).save(path, "PNG")
    assert "no channel varies: all pixels of all 9 training images are (7)" in error_line(
        create_data, settings(tmp_path)
    )


@pytest.mark.parametrize("size", [8, 65])
def test_a_test_of_grey_weights_uses_their_statistics_or_measures_training_images(tmp_path, size):
    write_folder(tmp_path, COUNTS, size=70)
    known, flags = ([10.0], [20.0]), ("--testOnly=true", "--retrain=w.pt")
    tested = create_data(settings(tmp_path, *flags, size=size), statistics=known)
    assert (tested.metadata["mean"], tested.train) == ([10.0], None)
    of_others = ([1.0] * 3, [2.0] * 3)  # of weights that --adaptChannels fits
    ours = create_data(settings(tmp_path, "--augment=false", size=size)).metadata["mean"]
    measured = create_data(settings(tmp_path, *flags, size=size), statistics=of_others)
    assert measured.metadata["mean"] == ours
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    line = error_line(create_data, settings(tmp_path, *flags, size=size))
    assert "are not known, and" in line and "has no training images to compute them" in line


def test_an_input_range_maps_black_and_white_to_its_ends_in_memory_and_in_files(tmp_path):
    write_folder(tmp_path, COUNTS, size=65)
    for path in (tmp_path / "val").glob("*/*"):
        half = np.zeros((65, 65), np.uint8)
        half[:, 33:] = 255
        Image.fromarray(half).save(path)
    for size, channels in ((65, 1), (65, 3), (8, 1), (8, 3)):
        flags = "--inputRange=-1024,1024", f"--nChannels={channels}", "--augment=false"
        opt = settings(tmp_path, *flags[:1], *flags[2:], size=size).replace(nChannels=channels)
        data = create_data(opt)
        images, _ = read_all(data.val)
        assert images.shape[1] == channels
        assert (images.min().item(), images.max().item()) == (-1024, 1024)
        assert data.metadata["std"] == pytest.approx([255 / 2048] * channels)
        # It wins over what is known.
        other = create_data(opt, statistics=([1.0] * channels, [1.0] * channels))
        assert other.metadata["mean"] == data.metadata["mean"]
    assert factory.expected_statistics(opt.replace(inputRange=[0.0, 1.0])) == ((0,) * 3, (255,) * 3)


# Datasets in memory:
def test_digits_in_grey_keep_their_pixels_and_get_their_own_statistics():
    three, one = (
        create_data(opts.parse(f"--dataset digits --nChannels {channels}".split()))
        for channels in (3, 1)
    )
    pixels = one.train.images.pixels
    assert torch.equal(pixels, three.train.images.pixels[..., :1]) and pixels.is_contiguous()
    assert one.metadata["mean"] == three.metadata["mean"][:1]


def test_colours_in_memory_become_grey_by_the_formula():
    pixels = torch.from_numpy(noise(1030, 8))
    images = ImageTensors(pixels, torch.zeros(1030, dtype=torch.int64)).to_grey()
    assert images.pixels.dtype == torch.uint8
    assert np.array_equal(images.pixels.numpy(), luma(pixels.numpy()))


@pytest.mark.parametrize(
    ("dataset", "channels", "found"),
    [
        ("cifar10", 1, None),
        ("svhn", 1, ((0.0,), (255.0,))),  # pixels are divided by 255
        ("synthetic", 4, ((127.5,) * 4, (64.0,) * 4)),
        ("folder", 1, None),
    ],
)
def test_published_constants_of_three_colours_are_not_those_of_grey(dataset, channels, found):
    size = 224 if dataset == "folder" else 32
    assert factory.DATASETS[dataset].statistics_at(size, channels) == found


def test_synthetic_images_have_any_number_of_channels_and_three_are_as_before():
    four, three = (
        create_data(opts.parse(f"--dataset synthetic --nImages 20 --nChannels {n}".split()))
        for n in (4, 3)
    )
    images, _ = read_all(four.train)
    assert images.shape == (20, 4, 32, 32) and len(four.metadata["std"]) == 4
    # Computed by the version before there was a choice.
    assert three.metadata["training_set"] == FINGERPRINT


FINGERPRINT = "61e95453d848c6775ea8ba1993f6cd5b0e00c5dec9ece9770a3b1aaf86096479"


def test_a_constant_channel_of_four_is_named_by_its_number():
    pixels = torch.randint(256, (9, 4, 4, 4), dtype=torch.uint8)
    pixels[..., 2] = 7
    notes = []
    mean, std = channel_statistics(pixels, torch.arange(9), notes.append)
    assert (mean[2], std[2]) == (7, 1)
    assert notes == ["all pixels of all 9 training images have the same channel 2"]


def test_a_batch_of_grey_images_that_are_all_skipped_is_empty_and_has_one_channel(tmp_path):
    write_folder(tmp_path, {"val": {"a": 1}}, size=66)
    (tmp_path / "val" / "a" / "0000.png").write_bytes(b"damaged")
    samples = [(str(tmp_path / "val" / "a" / "0000.png"), 0)]
    unreadable = file_loader.UnreadableImages("skip", 1000, lambda line: None)
    loader = factory.evaluation_loader(
        settings(tmp_path), samples, CPU, ([0.0], [1.0]), unreadable, torch.float64
    )
    ((images, targets),) = loader.batches(1)
    assert images.shape == (0, 1, 65, 65) and len(targets) == 0


def test_the_fast_decoder_reads_the_grey_of_ordinary_jpegs(tmp_path, monkeypatch):
    path = tmp_path / "image.jpg"
    path.write_bytes(FILES["colour JPEG"]())
    monkeypatch.setattr(regions, "decode", lambda *_: pytest.fail("Pillow decodes"))
    whole = lambda width, height: Region(Box(0, 0, width, height))  # noqa: E731
    assert decode_region(path, GREY, whole).pixels.shape == (96, 96, 1)
