"""Classify images with a trained network: `python -m tools.classify CHECKPOINT IMAGE...`.

The images go through the pipeline of --testOnly, so that an error counted from the output equals
the error that --testOnly reports.
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
from tools.inference.images import OVERWRITE, Unreadable

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
    """Read the command line; the first argument is the checkpoint.

    Raises:
        UsageError: a flag is wrong, or an argument is missing.
    """
    return cli.read(argv, FLAGS, arguments="image after the checkpoint", least=2, main_flags=True)


def classify(
    net: network.LoadedModel, paths: list[str], unreadable: Unreadable, top: int
) -> Iterator[tuple[str, list[Guess]]]:
    """Yield each readable image with its most probable classes, the most probable first."""
    for images, indices in net.batches(paths, unreadable):
        best = net.logits(images).double().softmax(dim=1).topk(min(top, len(net.classes)))
        rows = zip(indices, best.values.tolist(), best.indices.tolist(), strict=True)
        for index, probabilities, classes in rows:
            found = zip(classes, probabilities, strict=True)
            yield paths[index], [(net.classes[label], 100 * p) for label, p in found]


def as_text(path: str, guesses: list[Guess]) -> str:
    """Format the guesses for one image as lines."""
    lines = [f"  {percent:7.3f} %  {name}" for name, percent in guesses]
    return "\n".join([printable(path), *lines])


def as_csv(path: str, guesses: list[Guess]) -> str:
    """Format the guesses for one image as CSV rows."""
    ranked = enumerate(guesses, start=1)
    return csv_text([(path, rank, name, f"{percent:.6g}") for rank, (name, percent) in ranked])


def csv_text(rows: list[tuple]) -> str:
    """Format rows as CSV, without the last line's end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().removesuffix("\n")


def run(argv: list[str]) -> int:
    """Classify the images that the command line names; return the exit code."""
    command = parse(argv)
    csv_file = command.options.csv
    output = Path(csv_file) if csv_file not in (None, "-") else None
    net, paths = network.load_model_and_images(command, output, command.arguments[1:])

    from datasets.file_loader import translate_worker_errors
    from experiment import console
    from fileio import atomic

    unreadable, lines = Unreadable(), []
    write = lines.append if output else console.info  # print results as they come
    form = as_csv if csv_file else as_text
    if csv_file:
        write(csv_text([COLUMNS]))
    with translate_worker_errors():
        for path, guesses in classify(net, paths, unreadable, command.options.top):
            write(form(path, guesses))
    if output:
        content = "".join(f"{line}\n" for line in lines)
        atomic.atomic_write(output, content.encode("utf-8", "surrogateescape"))
    return unreadable.code


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    return cli.run(argv, USAGE, FLAGS, run, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
