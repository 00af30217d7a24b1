"""Show where a trained network errs on its test set, in one pass: by class, by image, how surely.

usage: python -m tools.evaluate CHECKPOINT [--data DIR] [options] [main.py's flags]

The errors printed are those of --testOnly, on the data of the run where it still is, or on --data.
Written into --output are

  per_class.csv   the errors of each class, the highest first
  confusion.csv   up to 2,000 classes: the images of each (row) by the class they are taken for
  confusion.png   the same as a picture; of many classes with the most frequent confusions
  mistakes.png    the 30 mistakes of the highest probability, with the names of their files
  curves.png      the reliability diagram with the expected calibration error (Guo et al., 2017:
                  15 bins of the largest probability), and the error in the top k for every k
  predictions.csv with --predictions: the class of each image, the class that it is taken for and
                  the percent of that one, the rank and the percent of its own

and --overwrite deletes those of an earlier call that are not written. Percents are probabilities.
Classes are ranked by logits. Outputs of torchxrayvision's weights are independent: their
probabilities are those that tools.classify prints, and calibration is of the largest logit's.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.flag_types import Flag, boolean, pathname
from errors import UsageError
from experiment import console
from tools import cli
from tools.classify import csv_line
from tools.inference import network, sources

if TYPE_CHECKING:
    from tools.evaluate.predictions import Predictions

FLAGS = (
    Flag("output", pathname, "evaluation", "directory to write into"),
    Flag("predictions", boolean, False, "also write predictions.csv, a line for each image"),
    sources.CLASSES,
    network.OVERWRITE,
)
TOOL = cli.Tool((__doc__ or "") + sources.SOURCES, FLAGS, "checkpoint", main_flags=True)
parse = TOOL.parse
FILES = ("per_class.csv", "confusion.csv", "confusion.png", "mistakes.png", "curves.png",
         "predictions.csv")  # fmt: skip
LINES = 10  # printed of each list: the classes with the most errors and the least, confusions


def table(rows: Iterable[Sequence]) -> bytes:
    """Write rows as CSV, fractions with six digits."""
    texts = ((f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row) for row in rows)
    return "".join(f"{csv_line(row)}\n" for row in texts).encode("utf-8", "surrogateescape")


def lines_of(found: "Predictions", names: list[str], classes: list[str]) -> Iterator[tuple]:
    """Yield the rows of predictions.csv."""
    yield ("image", "class", "taken_for", "percent", "rank_of_class", "percent_of_class")
    for number, target, taken, rank, sure, own in zip(*found, strict=True):
        yield (names[number], classes[target], classes[taken], 100 * sure, rank, 100 * own)


def run(argv: list[str]) -> int:
    """Evaluate the network that the command line names; write and print where it errs."""
    command = parse(argv)
    asked, (checkpoint, *others) = command.options, map(Path, command.arguments)
    if others:
        raise UsageError(f"{others[0]} is one checkpoint too many", "name one")
    directory = Path(asked.output)
    if directory.is_file():
        raise UsageError(f"{directory} is not a directory", "name another --output")
    for path in [directory / name for name in FILES] if directory.is_dir() else [directory]:
        network.check_new(path, asked.overwrite)
    sources.check_there(checkpoint)
    net = network.load(checkpoint, command.main_flags, asked.classes and Path(asked.classes))
    net.require_classifier()

    from datasets.file_loader import translate_worker_errors
    from engine.metrics import Metrics
    from experiment import confusion, drawing
    from fileio.atomic import atomic_write, make_directory
    from tools.evaluate import drawings, predictions
    from tools.inference import data

    with translate_worker_errors():
        opened = data.open_data(net)
        split, classes = opened.test or opened.val, opened.classes
        metrics = Metrics(net.device, len(classes))
        found, worst = predictions.predict(net, split, metrics)
    names = data.names(split, "test" if opened.test else "val")
    counts, means = metrics.confusion(), metrics.compute()
    *bins, ece = predictions.calibration(found.sure, found.ranks == 1)
    lines = [f" * Results top1: {means['top1']:6.3f}  top5: {means['top5']:6.3f}"]
    lines += [f"   expected calibration error: {100 * ece:.3f} %, of {metrics.count} images"]
    figures = {"curves.png": drawings.curves(bins, ece, found.ranks, len(classes))}
    figures["mistakes.png"] = drawings.mistakes(net, found, worst, names, classes)
    files = {"predictions.csv": table(lines_of(found, names, classes))} if asked.predictions else {}
    pairs = Counter(sorted(zip(found.targets, found.taken, strict=True)))
    by_class = confusion.by_class(pairs, classes)
    files["per_class.csv"] = table([confusion.COLUMNS, *by_class])
    rows = [row for row in by_class if row[1]]
    shown = confusion.as_markdown(rows[:LINES] + rows[LINES:][-LINES:])
    shown[LINES + 2 : LINES + 2] = ["| ..."] * (len(rows) > 2 * LINES)
    frequent = confusion.most_frequent(pairs, classes, LINES)
    frequent = (f"{count:8} of {name} taken for {other}" for count, name, other in frequent)
    lines += ["", *shown, "", *frequent]
    if counts is None:
        console.warn(f"no confusion.csv and confusion.png of {len(classes)} classes")
    else:
        rows = ([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
        files["confusion.csv"] = table([("class", *classes), *rows])
        figures["confusion.png"] = drawing.confusion(counts.numpy(), classes)
    for name, figure in figures.items():
        files[name] = drawing.render(figure, "png", name, console.warn)
    make_directory(directory)
    for name, content in files.items():
        atomic_write(directory / name, content)
    for name in {*FILES} - files.keys():  # of an earlier call
        (directory / name).unlink(missing_ok=True)
    for line in [*lines, "", f"{directory}: {', '.join(sorted(files))}"]:
        console.info(line)
    return 0


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
