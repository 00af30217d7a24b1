"""What a trained network sees in images: `python -m tools.classify CHECKPOINT IMAGE...`.

The images go through the pipeline of --testOnly, so that errors counted from the output are those
that it reports.
"""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from cli.flag_types import AT_LEAST_1, Flag, integer, text
from errors import printable
from tools import cli
from tools.inference import network, sources
from tools.inference.images import OVERWRITE, Unreadable, check_new, find_images

FLAGS = {
    flag.name: flag
    for flag in (
        Flag("top", integer, 5, "classes to name for each image", range=AT_LEAST_1),
        Flag("csv", text, None, "CSV file to write instead of printing; - prints it", "none"),
        sources.CLASSES,
        OVERWRITE,
    )
}
USAGE = f"""usage: python -m tools.classify CHECKPOINT IMAGE... [options] [main.py's flags]

Names the classes that a trained network finds most probable for each image, with their
probabilities in per cent. An IMAGE may be a directory, with all images below it.
{sources.SOURCES}
With --tenCrop true ten crops of each image are averaged. An image that cannot be read is an error
line, the others are classified, and the exit code is 3."""
COLUMNS = ("image", "rank", "class", "percent")

Guess = tuple[str, float]  # class name, probability in per cent


def parse(argv: list[str]) -> cli.Command:
    """The command line; the first operand is the checkpoint.

    Raises:
        UsageError: a flag is wrong, or something is not named.
    """
    return network.parse(argv, FLAGS)


def classify(
    net: network.LoadedModel, paths: list[str], bad: Unreadable, top: int
) -> Iterator[tuple[str, list[Guess]]]:
    """Each image that can be read with its most probable classes, the most probable first."""
    for images, places in net.batches(paths, bad):
        probable = net.logits(images).double().softmax(dim=1).topk(min(top, len(net.classes)))
        rows = zip(probable.values.tolist(), probable.indices.tolist(), strict=True)
        for place, (shares, classes) in zip(places, rows, strict=True):
            found = zip(classes, shares, strict=True)
            yield paths[place], [(net.classes[number], 100 * share) for number, share in found]


def as_text(path: str, guesses: list[Guess]) -> str:
    """The lines of one image."""
    lines = [f"  {percent:7.3f} %  {name}" for name, percent in guesses]
    return "\n".join([printable(path), *lines])


def as_rows(path: str, guesses: list[Guess]) -> list[tuple]:
    """The CSV rows of one image."""
    ranked = enumerate(guesses, start=1)
    return [(path, rank, name, f"{percent:.6g}") for rank, (name, percent) in ranked]


def csv_lines(rows: list[tuple]) -> str:
    """Rows as CSV text."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def run(argv: list[str]) -> int:
    """Classify what the command line names; the exit code."""
    asked = parse(argv)
    checkpoint, *arguments = asked.arguments
    output = Path(asked.options.csv) if asked.options.csv not in (None, "-") else None
    if output:
        check_new(output, asked.options.overwrite)
    sources.check_there(Path(checkpoint))
    paths = find_images(arguments)

    from datasets.file_loader import translate_worker_errors
    from experiment import console
    from fileio import atomic

    classes = asked.options.classes and Path(asked.options.classes)
    net, bad = network.load(Path(checkpoint), asked.main_flags, classes), Unreadable()
    written = [csv_lines([COLUMNS])] if output else []
    if asked.options.csv == "-":
        console.info(csv_lines([COLUMNS]).rstrip("\n"))
    with translate_worker_errors():
        for path, guesses in classify(net, paths, bad, asked.options.top):
            if output:
                written.append(csv_lines(as_rows(path, guesses)))
            elif asked.options.csv:
                console.info(csv_lines(as_rows(path, guesses)).rstrip("\n"))
            else:
                console.info(as_text(path, guesses))
    if output:
        atomic.atomic_write(output, "".join(written).encode("utf-8", "surrogateescape"))
    return bad.code


def main(argv: list[str]) -> int:
    """Print or write the classes of images."""
    return cli.run(argv, USAGE, FLAGS, run, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
