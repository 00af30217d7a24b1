"""Cut photographs out of scikit-image's pictures, to measure loaders of image files with.

usage: python -m tools.benchmark.photographs DIR [--flag value ...]

The files lie in DIR/train/CLASS and DIR/val/CLASS, a class for each picture, so that a network can
train on them: one in five is for validation. The same flags give the same pixels.
"""

import io
import itertools
import random
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cli.flag_types import NON_NEGATIVE, Flag, FlagType, Range, integer
from errors import DataError, UsageError
from fileio import atomic
from tools import cli

# Pictures that come with the package, by their functions in `skimage.data`.
PICTURES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina",
            "rocket", "stereo_motorcycle")  # fmt: skip
# Width and height in pixels, as many of ImageNet's photographs have them.
SIZES = ((500, 375), (375, 500), (500, 333), (640, 480), (480, 360), (500, 500))
QUALITIES = (75, 95)  # of JPEG, lowest and highest
VALIDATION = 5  # of so many rounds over the pictures, one is for validation


def _parse_size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9][0-9]{1,3}x[1-9][0-9]{1,3}", text):
        raise ValueError
    width, height = map(int, text.split("x"))
    return width, height


FLAGS = (
    Flag("count", integer, 300, "photographs, of both splits together",
         range=Range(VALIDATION * len(PICTURES), 10**6)),
    Flag("size", FlagType("a width and height in pixels as 4000x3000", _parse_size), None,
         "of each in place of those of ImageNet", "500x375, 640x480 and four others at random"),
    Flag("seed", integer, 0, "of where, how large and at what quality they are cut",
         range=NON_NEGATIVE),
)  # fmt: skip
TOOL = cli.Tool(__doc__, FLAGS, arguments="directory")
parse = TOOL.parse


def cut(count: int, size: tuple[int, int] | None, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (path below the directory, JPEG file) of each photograph.

    Args:
        size: width and height of all of them in pixels; None: drawn from `SIZES`.

    Raises:
        DataError: scikit-image is not installed.
    """
    try:
        import skimage.data
    except ImportError as error:
        fix = "install requirements-dev.txt"
        raise DataError("scikit-image, which has the pictures, is not installed", fix) from error
    from PIL import Image

    arrays = {name: getattr(skimage.data, name)() for name in PICTURES}
    arrays["stereo_motorcycle"] = arrays["stereo_motorcycle"][0]  # of the left camera
    pictures = {name: Image.fromarray(array).convert("RGB") for name, array in arrays.items()}
    draws = random.Random(seed)
    for number, name in zip(range(count), itertools.cycle(PICTURES)):
        picture, (width, height) = pictures[name], size or draws.choice(SIZES)
        # From 70 to 100 % of the largest part of this shape; a small picture is enlarged.
        scale = draws.uniform(0.7, 1) * min(picture.width / width, picture.height / height)
        left = draws.uniform(0, picture.width - scale * width)
        top = draws.uniform(0, picture.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        file = io.BytesIO()
        cropped = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
        cropped.save(file, "JPEG", quality=draws.randint(*QUALITIES))
        is_validation = number // len(PICTURES) % VALIDATION == VALIDATION - 1
        split = "val" if is_validation else "train"
        yield f"{split}/{name}/{number:06}.jpg", file.getvalue()


def run(argv: list[str]) -> None:
    """Write the photographs."""
    command = parse(argv)
    if len(command.arguments) > 1:
        raise UsageError(f"directory: {len(command.arguments)} are named", "name one")
    root, options = Path(command.arguments[0]).expanduser(), command.options
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise UsageError(f"directory: {root} is not empty", "name a new one, or empty it")
    except OSError as error:
        what = f"directory: cannot write in {root}: {error.strerror}"
        raise UsageError(what, "name another") from error
    for path, data in cut(options.count, options.size, options.seed):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write(root / path, data)
    print(f"written: {options.count} photographs in {root}")


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
