"""Test that any image file comes out as the picture that a viewer shows, or is refused."""

import io
import re
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from datasets.decode import ROTATED, TRANSPARENT, DecodeOptions, decode
from faults import bombs
from helpers.image_files import jpeg_segment, png, png_chunk, pnm, tiff
from helpers.sample_data import error_line, noise

COLOURS = noise(1, 16)[0]
COLOURS[0, 0], COLOURS[0, 1] = 0, 255  # the range of every type is used
FEW, GREY = COLOURS // 64 * 64, COLOURS[..., :1]  # 64 colours fit a palette


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def read(tmp_path, data: bytes, **options) -> tuple[np.ndarray, list[str]]:
    """Decode a file to (H, W, 3), as whole numbers, and remarks."""
    path = tmp_path / "image.jpg"  # the content counts, not the name
    path.write_bytes(data)
    image, remarks = decode(path, DecodeOptions(**options))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int), remarks


def transparent() -> Image.Image:
    image = Image.fromarray(FEW).convert("RGBA")
    image.putalpha(Image.fromarray(GREY[..., 0]))
    return image


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: Image.fromarray(COLOURS), COLOURS),
        (transparent, FEW),
        (lambda: Image.fromarray(FEW).quantize(64), FEW),
        (lambda: Image.fromarray(GREY[..., 0]), GREY),
        (lambda: Image.fromarray(GREY[..., 0]).convert("LA"), GREY),
        (lambda: Image.fromarray(GREY[..., 0] // 128 * 255).convert("1"), GREY // 128 * 255),
    ],
    ids=["RGB", "RGBA", "palette", "grey", "LA", "1 bit"],
)
def test_colours_are_kept_whatever_the_format(tmp_path, make, wanted):
    for _ in range(2):
        pixels, remarks = read(tmp_path, encoded(make(), "PNG"))
        assert np.array_equal(pixels, np.broadcast_to(wanted, pixels.shape))
        assert remarks == ([TRANSPARENT] if wanted is FEW and make is transparent else [])


# Copies of one picture:
def scaled(picture: np.ndarray, low: float, high: float, dtype: str) -> np.ndarray:
    """Store 0 as `low` and 255 as `high`."""
    values = low + picture.astype(np.float64) * ((high - low) / 255)
    return (values if dtype[0] == "f" else np.rint(values)).astype(dtype)


def with_alpha(picture: np.ndarray) -> np.ndarray:
    opaque = np.full_like(picture[..., :1], np.iinfo(picture.dtype).max)
    return np.concatenate([picture, opaque], axis=2)


WIDE, WIDE_GREY = scaled(COLOURS, 0, 65535, "u2"), scaled(GREY, 0, 65535, "u2")
INTEGERS = {
    "uint16": (0, 2**16 - 1, "u2"), "int8": (-(2**7), 2**7 - 1, "i1"),
    "int16": (-(2**15), 2**15 - 1, "i2"), "int32": (-(2**31), 2**31 - 1, "i4"),
}  # fmt: skip
COPIES = {
    "PNG 8": png(COLOURS), "PNG 16": png(WIDE), "PNG 16 grey": png(WIDE_GREY),
    "PNG 16 alpha": png(with_alpha(WIDE)), "PNG 16 grey, alpha": png(with_alpha(WIDE_GREY)),
    "BMP": encoded(Image.fromarray(COLOURS), "BMP"),
    "GIF": encoded(Image.fromarray(GREY[..., 0]), "GIF"),
    "WebP": encoded(Image.fromarray(COLOURS), "WEBP", lossless=True),
    **{
        f"{magic} of {maxval}": pnm(magic, scaled(picture, 0, maxval, "i8"), maxval)
        for magic, picture in (("P2", GREY), ("P5", GREY), ("P3", COLOURS), ("P6", COLOURS))
        for maxval in (255, 256, 1000, 4095, 65535)
    },
    **{
        f"TIFF {name} {order}{' packed' * packed}": tiff(scaled(GREY, *how), order, packed=packed)
        for name, how in INTEGERS.items() for order in "<>" for packed in (False, True)
    },
    **{
        f"TIFF RGB 16 {order}{' packed' * packed}{' planes' * planes}":
            tiff(WIDE, order, packed=packed, planes=planes)
        for order in "<>" for packed in (False, True) for planes in (False, True)
    },
    **{
        f"TIFF float of a declared range {order}{' packed' * packed}":
            tiff(scaled(GREY, -3, 5, "f4"), order, packed=packed,
                 tags=((340, 11, [-3.0]), (341, 11, [5.0])))
        for order in "<>" for packed in (False, True)
    },
    "TIFF RGBA 16": tiff(with_alpha(WIDE)),
    "TIFF uint32": tiff(scaled(GREY, 0, 2**32 - 1, "u4")),  # Pillow wraps these
    "TIFF of 12 bits": tiff(scaled(GREY, 0, 4095, "u2"), bits=12),
    "TIFF of 10 bits in 16": tiff(scaled(GREY, 0, 1023, "u2"), tags=((281, 3, [1023]),)),
    "TIFF, white is zero, 8": tiff(255 - GREY, photometric=0),
    "TIFF, white is zero, 16": tiff(65535 - WIDE_GREY, photometric=0),
    "TIFF of planes": tiff(COLOURS, planes=True),
    "TIFF palette": tiff(GREY, photometric=3, tags=((320, 3, [*range(0, 65536, 257)] * 3),)),
    "TIFF palette of 8 bits": tiff(GREY, photometric=3, tags=((320, 3, [*range(256)] * 3),)),
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_one_picture_have_the_same_channel_means(tmp_path, name):
    pixels, remarks = read(tmp_path, COPIES[name])
    is_grey = (pixels == pixels[..., :1]).all()
    wanted = np.broadcast_to(GREY if is_grey else COLOURS, pixels.shape).astype(int)
    assert np.abs(pixels.mean((0, 1)) - wanted.mean((0, 1))).max() < 0.5
    assert np.abs(pixels - wanted).max() <= 1
    assert remarks == []  # the file declares the scale


def test_a_jpeg_copy_of_a_picture_has_its_channel_means(tmp_path):
    smooth = np.asarray(Image.fromarray(COLOURS).resize((160, 160), Image.Resampling.BICUBIC))
    pixels, _ = read(tmp_path, encoded(Image.fromarray(smooth), "JPEG", quality=95))
    assert np.abs(pixels.mean((0, 1)) - smooth.mean((0, 1))).max() < 1


# Files that say how values are stored and not what white is: (file, its white).
UNDECLARED = {
    "PNG": (png(scaled(GREY, 0, 4095, "u2")), 4095),
    "PNG, colours": (png(scaled(COLOURS, 0, 4095, "u2")), 4095),
    "PNG, alpha":
        (png(np.concatenate([scaled(COLOURS, 0, 4095, "u2"), WIDE_GREY | 65535], 2)), 4095),
    "PNG, grey and alpha": (png(np.concatenate([GREY.astype("u2"), WIDE_GREY | 65535], 2)), 255),
    **{
        f"TIFF {order} {how}": (tiff(scaled(COLOURS, 0, 4095, "u2"), order, **{how: True}), 4095)
        for order in "<>" for how in ("packed", "planes")
    },
    **{
        f"TIFF {dtype} of {high}": (tiff(scaled(GREY, 0, high, dtype)), high)
        for dtype in ("u2", "i2", "u4", "i4", "f4") for high in (255, 4095, 30000)
    },
    "TIFF float, white is zero": (tiff(scaled(255 - GREY, 0, 9, "f4"), photometric=0), 9),
    "PFM": (b"Pf\n16 16\n-1.0\n" + scaled(GREY, 0, 8, "f4")[::-1].tobytes(), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDECLARED)
def test_a_white_level_reads_values_without_a_declared_scale(tmp_path, name):
    data, high = UNDECLARED[name]
    pixels, remarks = read(tmp_path, data, white_level=high)
    wanted = COLOURS if (pixels != pixels[..., :1]).any() else GREY
    assert np.abs(pixels - wanted).max() <= 1 and remarks == []
    if "white is zero" not in name:
        brighter, _ = read(tmp_path, data, white_level=high / 2)  # the brighter half is white
        assert np.abs(brighter - np.minimum(2 * wanted.astype(int), 255)).max() <= 2


@pytest.mark.parametrize("name", [name for name in COPIES if "packed planes" not in name])
def test_a_white_level_changes_no_picture_of_a_declared_scale(tmp_path, name):
    declares_16_bits = any(kind in name for kind in ("PNG 16", "int16", "int32", "RGB", "int8",
                                                     "zero, 16"))  # fmt: skip
    changed = not np.array_equal(*(read(tmp_path, COPIES[name], white_level=level)[0]
                                   for level in (None, 99.0)))  # fmt: skip
    assert changed == declares_16_bits


@pytest.mark.parametrize(
    ("data", "noted"),
    [
        *((UNDECLARED[name][0], "so nearly black.*--whiteLevel 4095 reads 12 bits")
          for name in ("PNG", "PNG, colours", "PNG, grey and alpha", "TIFF u2 of 4095")),
        (UNDECLARED["TIFF i2 of 30000"][0], "signed images are read as 0 to 32767, because"),
        (tiff(scaled(GREY, -9, 3000, "i2")), "signed images are read as -32768 to 32767, because"),
        (tiff(scaled(GREY, 0, 1, "f4")), "float images are read as 0 to 1, because"),
        (tiff(scaled(GREY, -0.003, 1.003, "f4")), "float images are read as 0 to 1, because"),
    ],
)  # fmt: skip
def test_a_scale_that_a_file_does_not_declare_is_noted(tmp_path, data, noted):
    _, (remark,) = read(tmp_path, data)
    assert re.search(noted, remark) and "--whiteLevel" in remark


@pytest.mark.parametrize("dtype", ["u2", "u4", "i4", "f4"])
def test_a_black_picture_needs_no_scale(tmp_path, dtype):
    pixels, remarks = read(tmp_path, tiff(np.zeros((4, 6, 1), dtype)))
    assert pixels.max() == 0 and remarks == []


@pytest.mark.parametrize("kind", ["PNG 16", "PNG 16 grey", "PNG 16 alpha", "TIFF 16", "PGM", "P6"])
def test_a_night_shot_stays_dark_beside_pictures_of_the_day(tmp_path, kind):
    night = COLOURS // 16  # at most 15 of 255, so that 12 bits hold it
    wide, grey = scaled(night, 0, 65535, "u2"), scaled(night[..., :1], 0, 65535, "u2")
    data = {
        "PNG 16": png(wide), "PNG 16 grey": png(grey), "PNG 16 alpha": png(with_alpha(wide)),
        "TIFF 16": tiff(grey), "PGM": pnm("P5", grey, 65535), "P6": pnm("P6", wide, 65535),
    }[kind]  # fmt: skip
    assert np.abs(read(tmp_path, data)[0].mean((0, 1)) - night.mean((0, 1))).max() < 8


@pytest.mark.parametrize(
    ("low", "high", "dtype", "reason"),
    [
        (-1, 1, "f4", "float values from -1 to 1"), (-2, 90, "f4", "float values from -2 to 90"),
        (0, 255, "f4", "float values from 0 to 255"), (0, 1e6, "f4", "float values from 0 to 1e+"),
        (0, 65536, "u4", "unsigned values from 0 to 65536"),
        (-1, 3000, "i4", "signed values from -1 to 3000"),
        (0, np.inf, "f4", "not all values are finite"), (np.nan, 1, "f4", "not all values are fin"),
    ],
)  # fmt: skip
def test_values_of_no_known_range_are_refused_with_a_white_level(
    tmp_path, low, high, dtype, reason
):
    values = np.ones((16, 16, 1), dtype)
    values[0, 0], values[0, 1] = low, high
    line = error_line(read, tmp_path, tiff(values))
    assert line.startswith(f"error: {reason}")
    if level := re.search(r"--whiteLevel (\d+)", line):
        pixels, _ = read(tmp_path, tiff(values), white_level=float(level[1]))
        assert pixels.max() == round(255 * high / float(level[1]))


def test_an_unsupported_kind_of_tiff_is_refused_with_the_formats(tmp_path):
    with pytest.raises(ValueError, match=r"not a form of JPEG, PNG, .*TIFF.* that Pillow reads"):
        read(tmp_path, tiff(scaled(GREY, 0, 1, "f8"), tags=()))


# Orientation:
TURNED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}  # fmt: skip
TALL = np.kron(noise(1, 4)[0, :3], np.ones((16, 16, 1), np.uint8))


def oriented(kind: str, orientation: object, **settings) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(TALL), kind, exif=exif, **settings)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("JPEG", {"quality": 100, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True})],
)
def test_a_turned_photo_stands_upright_with_exif_rotate(tmp_path, kind, settings, orientation):
    data = oriented(kind, orientation, **settings)
    pixels, remarks = read(tmp_path, data, exif_rotate=True)
    wanted = TURNED[orientation](TALL)
    assert pixels.shape == wanted.shape and np.abs(pixels - wanted).max() <= 8
    assert remarks == []
    pixels, remarks = read(tmp_path, data)  # as torchvision does
    assert pixels.shape == TALL.shape and np.abs(pixels - TALL).max() <= 8
    assert remarks == ([ROTATED] if orientation > 1 else [])


def test_a_tiff_is_always_turned_since_its_orientation_is_a_part_of_the_format(tmp_path):
    for rotate in (False, True):
        pixels, remarks = read(tmp_path, tiff(TALL, tags=((274, 3, [6]),)), exif_rotate=rotate)
        assert np.array_equal(pixels, TURNED[6](TALL)) and remarks == []


@pytest.mark.parametrize("exif", [b"", b"junk" * 9, b"II*\0\x08\0\0\0\xff\xff", b"II*\0\xff\xff"])
def test_damaged_exif_is_no_reason_to_refuse_or_turn_a_picture(tmp_path, exif):
    segment = jpeg_segment(0xE1, b"Exif\0\0" + exif)
    jpeg = encoded(Image.fromarray(TALL), "JPEG")
    for data in (jpeg[:2] + segment + jpeg[2:], png(TALL, png_chunk(b"eXIf", exif))):
        pixels, remarks = read(tmp_path, data, exif_rotate=True)
        assert pixels.shape == TALL.shape and remarks == []


# Limits:
@pytest.mark.parametrize(
    ("size", "limits", "flag", "needed"),
    [
        ((9000, 8000), {}, "maxPixels", 72_000_000),
        ((20_000, 18_000), {}, "maxPixels", 360_000_000),  # Pillow has a limit below it
        ((300, 200), {"max_pixels": 59_999}, "maxPixels", 60_000),
        ((101, 1), {}, "maxAspect", 101),
        ((3, 1000), {"max_aspect": 333.0}, "maxAspect", 334),
    ],
)
def test_a_limit_is_named_and_can_be_raised_as_the_error_says(tmp_path, size, limits, flag, needed):
    option = {"maxPixels": "max_pixels", "maxAspect": "max_aspect"}[flag]
    limit = limits.get(option, {"maxPixels": 67_108_864, "maxAspect": 100}[flag])
    data = bombs.png(*size, depth=1, colour=0)
    line = error_line(partial(read, **limits), tmp_path, data)
    assert line.startswith(f"error: {size[0]} x {size[1]} pixels are ")
    assert f" than --{flag} {limit:.0f}" in line
    assert line.endswith(f"; fix: remove the file, or --{flag} {needed}")
    if needed < 100_000:
        assert read(tmp_path, data, **{option: needed})[0].shape[:2] == size[::-1]


# Texts and colour profiles:
LONG = zlib.compress(bytes(3_000_000))
CHUNKS = {
    "a long profile": png_chunk(b"iCCP", b"name\0\0" + LONG),
    "a long text": png_chunk(b"zTXt", b"name\0\0" + LONG),
    "a long international text": png_chunk(b"iTXt", b"name\0\1\0\0\0" + LONG),
    "many texts": png_chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(1_000_000))) * 70,
    "an empty profile": png_chunk(b"iCCP", b""),
    "a profile packed in another way": png_chunk(b"iCCP", b"name\0\1" + LONG),
    "a text with a wrong checksum": png_chunk(b"tEXt", b"name\0text", checksum=1),
    "a short resolution": png_chunk(b"pHYs", b"a"),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_a_text_or_profile_is_no_reason_to_refuse_a_png(tmp_path, name):
    whole = png(COLOURS, CHUNKS[name])
    assert np.array_equal(read(tmp_path, whole)[0], COLOURS)
    last = png(COLOURS)[:-12] + CHUNKS[name] + png_chunk(b"IEND", b"")  # after the pixels
    assert np.array_equal(read(tmp_path, last)[0], COLOURS)
    with pytest.raises(Exception, match="truncated"):  # damaged pixels are refused as before
        read(tmp_path, whole[:-300])


@pytest.mark.parametrize(
    "segment",
    [
        jpeg_segment(0xE2, b"ICC_PROFILE\0"), jpeg_segment(0xEE, b"Adobe"),
        jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\4\4"), jpeg_segment(0xE0, b"JFIF\0"),
    ],
    ids=["profile", "Adobe", "Photoshop", "JFIF"],
)  # fmt: skip
def test_a_damaged_profile_is_no_reason_to_refuse_a_jpeg(tmp_path, segment):
    jpeg = oriented("JPEG", 6)
    wanted, _ = read(tmp_path, jpeg, exif_rotate=True)
    pixels, remarks = read(tmp_path, jpeg[:2] + segment + jpeg[2:], exif_rotate=True)
    assert np.array_equal(pixels, wanted) and remarks == []


def test_a_damaged_description_is_no_reason_to_refuse_a_tiff(tmp_path):
    pixels, _ = read(tmp_path, tiff(COLOURS, tags=((700, 4, [1, 2]),)))
    assert np.array_equal(pixels, COLOURS)


def test_a_text_that_unpacks_to_256_megabytes_costs_little(tmp_path):
    packer, filler = zlib.compressobj(1), bytes(2**24)
    packed = b"".join(packer.compress(filler) for _ in range(16)) + packer.flush()
    data = png(COLOURS, png_chunk(b"zTXt", b"name\0\0" + packed))
    _, memory = bombs.cost(lambda: read(tmp_path, data))
    assert memory < 64 * bombs.MB


# Transparency:
@pytest.mark.parametrize(
    "data",
    [
        encoded(transparent(), "PNG"), encoded(transparent(), "WEBP", lossless=True),
        encoded(Image.fromarray(FEW).quantize(64), "PNG", transparency=3),
        encoded(Image.fromarray(GREY[..., 0]), "GIF", transparency=int(GREY[3, 3, 0])),
        png(COLOURS, png_chunk(b"tRNS", struct.pack(">3H", *COLOURS[2, 2]))),
        png(WIDE_GREY, png_chunk(b"tRNS", struct.pack(">H", WIDE_GREY[2, 2, 0]))),
    ],
)  # fmt: skip
def test_pixels_that_are_transparent_are_noted(tmp_path, data):
    assert read(tmp_path, data)[1] == [TRANSPARENT]
