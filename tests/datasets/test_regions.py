"""Test that a region of an image file is what Pillow decodes there, at a reduced scale as well."""

import errno
import io
import math
import os
import random
from functools import partial

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from datasets import jpeg, regions
from datasets.decode import ROTATED, DecodeOptions, decode
from datasets.regions import Box, Region, decode_region
from datasets.retries import with_retries
from faults.fuzz import mutated
from helpers.image_files import jpeg_segment, png
from helpers.sample_data import error_line, noise

HEIGHT, WIDTH = 117, 171  # of no block's multiple


def photograph(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Draw waves of all colours that grow finer downwards, with a little noise."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 19 + i) * np.cos(y * (1 + y / height) / (31 - 5 * i)) for i in range(3)]
    pixels = 128 + 100 * np.stack(waves, 2) + np.random.default_rng(0).normal(0, 2, (*x.shape, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def boxes(width: int, height: int, count: int = 12) -> list[Box]:
    """Draw boxes, the first of which are all of the picture and its corners."""
    found, draw = [Box(0, 0, width, height), Box(width - 1, height - 1, 1, 1)], random.Random(0)
    found += [Box(0, 0, 9, 8), Box(width - 9, 0, 9, 8), Box(0, height - 8, 9, 8)]
    while len(found) < count:
        left, top = draw.randrange(width), draw.randrange(height)
        found.append(Box(left, top, draw.randint(1, width - left), draw.randint(1, height - top)))
    return found


def cut(picture: np.ndarray, box: Box) -> np.ndarray:
    return picture[box.top : box.top + box.height, box.left : box.left + box.width]


def read(path, box: Box, least=None, **options) -> regions.Decoded:
    return decode_region(path, DecodeOptions(**options), lambda *size: Region(box, least))


def outcome(call, path) -> object:
    """Return an array, or the error with which it ends."""
    try:
        return call(path)
    except Exception as error:
        return type(error), str(error)


def same(one: object, other: object) -> bool:
    both = isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
    return (
        np.array_equal(one, other) if both else not isinstance(other, np.ndarray) and one == other
    )


@pytest.fixture
def write(tmp_path):
    """Write a file, whatever its content is, by the name of a JPEG."""

    def write(data: bytes):
        (tmp_path / "image.jpg").write_bytes(data)
        return tmp_path / "image.jpg"

    return write


@pytest.fixture
def without_pillow(monkeypatch):
    """Fail where Pillow decodes in place of the faster decoder."""
    monkeypatch.setattr(regions, "decode", lambda *_: pytest.fail("Pillow decodes"))


PHOTO = photograph()
EXIF = Image.Exif()
EXIF[0x010E] = "a description"
PLAIN = {
    f"{subsampling}{' progressive' * progressive}{' restarts' * (rows > 0)} {quality}": encoded(
        PHOTO, subsampling=subsampling, progressive=progressive, quality=quality,
        restart_marker_rows=rows,
    )
    for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
    for progressive, rows, quality in ((False, 0, 95), (False, 1, 40), (True, 0, 75))
} | {
    "4:4:0": simplejpeg.encode_jpeg(np.asarray(PHOTO), colorsubsampling="440"),
    "grey": encoded(PHOTO.convert("L")),
    "grey progressive": encoded(PHOTO.convert("L"), progressive=True),
    "stored as RGB": encoded(PHOTO, keep_rgb=True),
    "junk at the end": encoded(PHOTO) + b"junk" * 99,
    "junk before the end": encoded(PHOTO)[:-2] + b"junk" * 99 + b"\xff\xd9",
    "two pictures": encoded(PHOTO, "MPO", save_all=True, append_images=[photograph(50, 50)]),
    "comments": encoded(PHOTO)[:2] + jpeg_segment(0xFE, bytes(65_000)) * 9 + encoded(PHOTO)[2:],
    "EXIF and XMP": encoded(PHOTO, exif=EXIF, xmp=b"<x tiff:Orientation='6'/>"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_region_of_a_jpeg_is_what_pillow_decodes_there(write, without_pillow, name):
    """Read the same pixels although the decoder stops below the region."""
    path = write(PLAIN[name])
    picture = np.asarray(Image.open(io.BytesIO(PLAIN[name])).convert("RGB"))
    for box in boxes(WIDTH, HEIGHT):
        pixels, extent, remarks = read(path, box)
        assert np.array_equal(pixels, cut(picture, box))
        assert extent == (box.height, box.width) and remarks == []
    beside = Box(8, 8, 50, 50)  # such a mistake would be seen
    assert not np.array_equal(read(path, beside._replace(top=9)).pixels, cut(picture, beside))


@pytest.mark.parametrize("height", range(1, 36))
def test_every_height_of_a_region_needs_the_rows_that_are_decoded(write, without_pillow, height):
    """End the region at each row of a block, where colours depend on the rows below."""
    box = Box(0, 3, WIDTH, height)
    for name in ("4:4:4 95", "4:2:0 95", "4:1:1 95", "4:4:0", "grey"):
        picture = np.asarray(Image.open(io.BytesIO(PLAIN[name])).convert("RGB"))
        assert np.array_equal(read(write(PLAIN[name]), box).pixels, cut(picture, box))


def ycck() -> bytes:
    """Make a CMYK JPEG whose Adobe segment says YCCK."""
    data = bytearray(encoded(PHOTO.convert("CMYK")))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


TRANSPARENT = np.concatenate([noise(1, 40)[0], noise(1, 40)[0][..., :1]], 2)
OTHERS = {
    "CMYK": encoded(PHOTO.convert("CMYK")), "YCCK": ycck(), "PNG": encoded(PHOTO, "PNG"),
    "CMYK progressive": encoded(PHOTO.convert("CMYK"), progressive=True),
    "palette": encoded(PHOTO.quantize(64), "PNG"), "WebP": encoded(PHOTO, "WEBP"),
    "TIFF": encoded(PHOTO, "TIFF"), "GIF": encoded(PHOTO, "GIF"), "BMP": encoded(PHOTO, "BMP"),
    "PPM": encoded(PHOTO, "PPM"), "transparent": png(TRANSPARENT),
    "16 bits, dark": png(noise(1, 40)[0].astype(np.uint16) * 9),
    "fill bytes": encoded(PHOTO)[:2] + b"\xff" * 5 + encoded(PHOTO)[2:],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_region_of_any_other_file_is_a_part_of_the_whole(write, name):
    """Read it with the notes of the whole, and in memory that may be written."""
    path = write(OTHERS[name])
    image, noted = decode(path)
    for box in boxes(*image.size, count=6):
        pixels, extent, remarks = read(path, box, least=(1, 1))
        assert np.array_equal(pixels, cut(np.asarray(image), box)) and pixels.flags.writeable
        assert extent == (box.height, box.width) and remarks == noted
    assert bool(noted) == (name in ("transparent", "16 bits, dark"))


def oriented(orientation: int, **settings) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, exif=exif, **settings)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("progressive", [False, True])
def test_a_region_of_a_turned_photo_is_one_of_the_upright_photo(
    write, without_pillow, orientation, progressive
):
    data = oriented(orientation, progressive=progressive)
    path, stored = write(data), Image.open(io.BytesIO(data))
    for rotate, picture in ((True, ImageOps.exif_transpose(stored)), (False, stored)):
        for box in boxes(*picture.size):
            asked = []

            def choose(*size, box=box, asked=asked):
                asked.append(size)
                return Region(box)

            pixels, _, remarks = decode_region(path, DecodeOptions(exif_rotate=rotate), choose)
            assert np.array_equal(pixels, cut(np.asarray(picture), box))
            assert asked == [picture.size] and min(pixels.strides) > 0
            assert remarks == ([ROTATED] if orientation > 1 and not rotate else [])


@pytest.mark.parametrize("exif", [b"", b"junk" * 9, b"II*\0\x08\0\0\0\xff\xff", b"II*\0\xff\xff"])
def test_damaged_exif_neither_turns_nor_refuses_a_region(write, without_pillow, exif):
    data = encoded(PHOTO)
    path = write(data[:2] + jpeg_segment(0xE1, b"Exif\0\0" + exif) + data[2:])
    pixels, _, remarks = read(path, Box(0, 0, WIDTH, HEIGHT), exif_rotate=True)
    assert np.array_equal(pixels, Image.open(io.BytesIO(data))) and remarks == []


def test_a_damaged_profile_is_no_reason_to_decode_slowly(write, without_pillow):
    """Read a file that Pillow opens only without its profile."""
    data, segment = encoded(PHOTO), jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\4\4")
    pixels = read(write(data[:2] + segment + data[2:]), Box(0, 0, WIDTH, HEIGHT)).pixels
    assert np.array_equal(pixels, Image.open(io.BytesIO(data)))


# Damage:
@pytest.mark.parametrize("name", ["4:2:0 95", "4:2:0 restarts 40", "4:2:0 progressive 75"])
@pytest.mark.parametrize("part", [0.001, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused_even_below_the_region(write, name, part):
    path = write(PLAIN[name][: int(part * len(PLAIN[name]))])
    error = outcome(lambda path: read(path, Box(0, 0, 20, 3)).pixels, path)
    assert isinstance(error, tuple) and error == outcome(decode, path)


@pytest.mark.parametrize("name", ["4:2:0 95", "4:2:2 95", "grey"])
def test_damage_below_the_region_never_shows_the_image_before(write, name):
    """Put a table where pixels should go on, which libjpeg refuses after a warning."""
    data = PLAIN[name]
    for part in (0.3, 0.6, 0.9):
        read(write(encoded(PHOTO.transpose(Image.Transpose.ROTATE_180))), Box(0, 0, WIDTH, HEIGHT))
        at = int(part * len(data))
        path = write(data[:at] + b"\xff\xdb\0\3\xff" + data[at:])
        for height in (20, HEIGHT):
            error = outcome(lambda path, h=height: read(path, Box(0, 0, 20, h)).pixels, path)
            assert error == outcome(decode, path) == (OSError, error[1])


def test_a_damaged_jpeg_is_read_as_pillow_reads_it_or_refused_alike(write):
    kinds = ["4:2:0 95", "4:4:4 restarts 40", "4:2:0 progressive 75", "grey", "EXIF and XMP"]
    kinds, counts = [PLAIN[name] for name in kinds], {"read": 0, "refused": 0}
    small = DecodeOptions(max_pixels=10**6)
    for seed in range(300):
        draw = random.Random(seed)
        path = write(mutated(draw.choice(kinds), draw))
        chosen = []

        def choose(width, height, draw=draw, chosen=chosen):
            if not chosen:
                chosen.append(draw.choice(boxes(width, height)))
            return Region(*chosen)

        region = outcome(lambda path, f=choose: decode_region(path, small, f).pixels, path)
        whole = outcome(lambda path: np.asarray(decode(path, small)[0]), path)
        if isinstance(whole, np.ndarray):
            whole = cut(whole, *chosen)
        assert same(region, whole), seed
        counts["read" if isinstance(whole, np.ndarray) else "refused"] += 1
    assert min(counts.values()) > 50


def test_what_is_no_image_file_is_refused_as_before(tmp_path, write):
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    names = (tmp_path, pipe, tmp_path / "missing.jpg")
    for path in (*names, write(b"")):
        error = outcome(lambda path: read(path, Box(0, 0, 1, 1)), path)
        assert isinstance(error, tuple) and error == outcome(decode, path)
    for data in (b"junk" * 99, b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"\xff" * 999):
        assert outcome(lambda path: read(path, Box(0, 0, 1, 1)), write(data)) == outcome(
            decode, write(data)
        )


def test_a_disk_that_fails_for_a_moment_costs_no_region(write, monkeypatch):
    path, failures = write(encoded(PHOTO)), [OSError(errno.ESTALE, "stale")]

    def opened(*args, **more):
        if failures:
            raise failures.pop()
        return open(*args, **more)

    monkeypatch.setattr(regions, "open", opened, raising=False)
    pixels = with_retries(read, path, Box(0, 0, WIDTH, HEIGHT)).pixels
    assert np.array_equal(pixels, Image.open(path)) and not failures


@pytest.mark.parametrize("limits", [{"max_pixels": HEIGHT * WIDTH - 1}, {"max_aspect": 1.3}])
def test_a_jpeg_beyond_a_limit_is_refused_in_the_words_of_before(write, without_pillow, limits):
    path = write(encoded(PHOTO))
    line = error_line(partial(read, box=Box(0, 0, 1, 1), **limits), path)
    assert line == error_line(decode, path, DecodeOptions(**limits))
    more = {name: limit + 1 for name, limit in limits.items()}
    assert read(path, Box(0, 0, 1, 1), **more).pixels.shape == (1, 1, 3)


# Scale:
LARGE = photograph(400, 608)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize(
    ("box", "least", "scale"),
    [
        (Box(0, 0, 600, 400), (200, 300), 2), (Box(0, 0, 600, 400), (200, 300.5), 1),
        (Box(0, 0, 600, 400), (200.5, 300), 1), (Box(0, 0, 600, 400), (100, 150), 4),
        (Box(0, 0, 600, 400), (50, 75), 8), (Box(0, 0, 600, 400), (1, 1), 8),
        (Box(16, 32, 300, 200), (60, 60), 2), (Box(1, 3, 37, 41), (5, 5), 4),
        (Box(580, 393, 20, 7), (3, 1), 1), (Box(0, 0, 600, 400), None, 1),
    ],
)  # fmt: skip
def test_a_large_region_is_decoded_no_smaller_than_is_needed(
    write, without_pillow, box, least, scale, subsampling, orientation
):
    exif, turns = Image.Exif(), {1: None, 3: "ROTATE_180", 6: "ROTATE_90", 7: "TRANSVERSE"}
    exif[0x0112] = orientation
    turn = turns[orientation] and Image.Transpose[turns[orientation]]
    stored = LARGE if turn is None else LARGE.transpose(turn)  # upright it is LARGE again
    path = write(encoded(stored, exif=exif, quality=95, subsampling=subsampling))
    pixels, extent, _ = read(path, box, least, exif_rotate=True)
    assert extent == (box.height / scale, box.width / scale)
    # Each pixel is near the mean of scale x scale ones of the original.
    means = np.asarray(LARGE.reduce(scale)).astype(int)
    rows, columns = (
        math.ceil((box.top + box.height) / scale),
        math.ceil((box.left + box.width) / scale),
    )
    wanted = means[box.top // scale : rows, box.left // scale : columns]
    assert pixels.shape == wanted.shape and np.abs(pixels - wanted).mean() < 3
    beside = np.roll(means, 1, 1)[box.top // scale : rows, box.left // scale : columns]
    assert np.abs(pixels - beside).mean() > 4 or scale == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 9), (7, 7)])
def test_a_tiny_jpeg_is_not_reduced(write, without_pillow, size):
    data = encoded(photograph(*size))
    pixels = read(write(data), Box(0, 0, size[1], size[0]), (1, 1)).pixels
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))


def test_memory_is_used_again_unless_it_is_large(write, monkeypatch):
    def decoded(image: Image.Image) -> np.ndarray:
        return read(write(encoded(image)), Box(0, 0, *image.size)).pixels

    kept = [decoded(image) for image in (LARGE, PHOTO, LARGE)]
    assert np.shares_memory(*kept[:2]) and np.shares_memory(*kept[1:])
    monkeypatch.setattr(jpeg, "MAX_SCRATCH", 3 * 400 * 608 - 1)
    monkeypatch.setattr(jpeg, "_scratch", np.empty(0, np.uint8))
    large, small = decoded(LARGE), decoded(PHOTO)
    assert not np.shares_memory(large, small) and not np.shares_memory(large, decoded(LARGE))
    assert len(jpeg._scratch) < jpeg.MAX_SCRATCH
