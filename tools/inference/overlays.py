"""Draw where in an image a network found what speaks for a class, and against it, as PNG."""

import io
import math
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datasets.factory import whole_picture
from errors import printable
from experiment.drawing import FONT
from fileio.atomic import atomic_write, make_directory
from tools.inference import class_maps
from tools.inference.network import LoadedModel

NARROWEST = 160  # pixels; a narrower image is enlarged, or its title would not fit
MOST_PIXELS = 2**27  # of all panels; a larger image is reduced
PAGE_ASPECT, MOST_COLUMNS = 2, 6  # width over height of all panels, roughly
# Of Okabe and Ito, told apart by the colour-blind: orange speaks for a class, blue against it.
FOR, AGAINST, OPACITY = np.float32([213, 94, 0]), np.float32([0, 114, 178]), 0.8


def save(
    net: LoadedModel, path: str, png: Path, maps: Tensor, percents: list[float], labels: list[int]
) -> None:
    """Draw an image, and over it the maps, (t, h, w), of the classes in `labels`."""
    picture, cut = whole_picture(net.opt, path)
    width, height = picture.size
    note, larger = f"{width} x {height}", -(-NARROWEST // width)
    smaller = math.ceil(math.sqrt((1 + len(maps)) * width * height / MOST_PIXELS))
    if smaller > 1:
        picture, note = picture.reduce(smaller), f"{note}, shown 1:{smaller}"
    elif larger > 1:
        picture = picture.resize((larger * width, larger * height), Image.Resampling.NEAREST)
        note += f", shown {larger}:1"

    limit, grey = maps.abs().max().item() or 1.0, np.asarray(picture.convert("L"), np.float32)
    panels = [(Path(path).name, note, picture)]
    for values, percent, label in zip(maps.cpu().numpy(), percents, labels, strict=True):
        values = class_maps.place(values, cut, net.opt.imageSize, *grey.shape)
        # Grey of less contrast than the colours; pale outside of what the network sees.
        below = np.where(np.isnan(values), 208 + grey / 6, 64 + grey / 2)
        pixels = _tint(below, np.nan_to_num(values) / limit)
        panels.append((net.classes[label], f"{percent:.3f} %", pixels))
    make_directory(png.parent)
    atomic_write(png, _compose(panels, limit))


def _tint(grey: np.ndarray, strength: np.ndarray) -> Image.Image:
    """Colour pixels (h, w) from 0 to 255 by -1 to 1, (h, w)."""
    opacity = OPACITY * np.abs(strength)[..., None]
    colour = np.where(strength[..., None] > 0, FOR, AGAINST)
    return Image.fromarray(np.uint8(grey[..., None] * (1 - opacity) + colour * opacity + 0.5))


def _compose(panels: list[tuple[str, str, Image.Image]], limit: float) -> bytes:
    """Return a PNG of panels (name, note, pixels), and a bar of the colours up to `limit`."""
    width, height = panels[0][2].size
    columns = round(math.sqrt(PAGE_ASPECT * len(panels) * height / width))
    columns = min(max(columns, 1), MOST_COLUMNS, len(panels))
    em = max(12, columns * width // 75)  # pixels; legible when all is as wide as a page
    right, title, bar = em + columns * (width + em), 3 * em, max(height, 9 * em)
    bottom = max(-(-len(panels) // columns) * (height + title), bar + title) + em
    sheet, font = Image.new("RGB", (right + 7 * em, bottom), "white"), ImageFont.truetype(FONT, em)
    write = partial(ImageDraw.Draw(sheet).text, fill="black", font=font, spacing=em // 3)
    for number, (name, note, pixels) in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = em + column * (width + em), row * (height + title)
        name = printable(name)
        while len(name) > 1 and font.getlength(name) > width:
            name = f"{name[:-2]}…"
        write((left, top + em / 3), f"{name}\n{note}")
        sheet.paste(pixels, (left, top + title))

    strengths = np.linspace(1, -1, bar, dtype=np.float32)[:, None].repeat(em, 1)
    sheet.paste(_tint(np.full_like(strengths, 128), strengths), (right, title))
    write((right, em / 3), "adds to\nthe logit")
    for value, anchor in ((1, "lt"), (0, "lm"), (-1, "lb")):
        place = right + 1.5 * em, title + (1 - value) / 2 * bar
        write(place, f"{limit * value:.3g}", anchor=anchor)
    sheet.save(file := io.BytesIO(), "PNG")
    return file.getvalue()
