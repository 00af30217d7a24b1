"""Name the classes that a trained network finds most probable for images, in per cent.

usage: python -m tools.classify CHECKPOINT IMAGE... [options] [main.py's flags]

An IMAGE may be a directory, with all images below it. Images go through the pipeline of --testOnly,
so that an error counted from the output equals the one that --testOnly reports. With --tenCrop true
ten crops of each image are averaged. Outputs of torchxrayvision's weights are independent of each
other and calibrated: 50 per cent is the threshold, and the order need not be that of the logits,
which --testOnly counts. An unreadable image is reported in one error line, the others are
classified, and the exit code is 3.

--cam DIR draws class activation maps, a PNG for each image, in folders as the images are below the
folder that all share: the image and, for each of its --top classes, how much each place adds to the
logit (orange) or takes off (blue). The mean of a map, plus the bias of the class (nin, allcnn, dsn:
which is in the map), is the logit. What the network does not see, since the pipeline takes the
centre, is pale.
"""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from cli.flag_types import AT_LEAST_1, Flag, integer, pathname
from errors import UsageError
from tools import cli
from tools.inference import network, sources

FLAGS = (
    Flag("top", integer, 5, "classes to name for each image", range=AT_LEAST_1),
    Flag("csv", pathname, None, "CSV file to write instead of printing; - prints it", "none"),
    Flag("cam", pathname, None, "directory for pictures of class activation maps", "none"),
    sources.CLASSES,
    network.OVERWRITE,
)
COLUMNS = ("image", "rank", "class", "percent")
TOOL = cli.Tool(
    (__doc__ or "") + sources.SOURCES, FLAGS, "image after the checkpoint", least=2, main_flags=True
)
parse = TOOL.parse


def lines(
    net: network.LoadedModel, paths: list[str], top: int, as_csv: bool, pngs: Sequence[Path] = ()
) -> Iterator[str]:
    """Yield lines about each readable image: its most probable classes, the most probable first.

    With `pngs`, of all paths, draws the maps of these classes.
    """
    if pngs:
        from tools.inference import class_maps, overlays
    if as_csv:
        yield csv_line(COLUMNS)
    count = min(top, len(net.classes))
    for images, indices in net.batches(paths):
        if pngs:
            best, maps = class_maps.top_classes(net, images, count)
        else:
            best, maps = net.scores(images).topk(count), indices
        guesses = (100 * best.values).tolist(), best.indices.tolist()
        for index, own, percents, labels in zip(indices, maps, *guesses, strict=True):
            if pngs:
                overlays.save(net, paths[index], pngs[index], own, percents, labels)
            if not as_csv:
                yield paths[index]
            for rank, (percent, label) in enumerate(zip(percents, labels, strict=True), start=1):
                name = net.classes[label]
                row = (paths[index], rank, name, f"{percent:.6g}")
                yield csv_line(row) if as_csv else f"  {percent:7.3f} %  {name}"


def csv_line(values: tuple) -> str:
    """Format a row of CSV without the end of the line."""
    buffer = io.StringIO()
    csv.writer(buffer).writerow(values)  # its "\r\n" lets it quote both characters in a name
    return buffer.getvalue().removesuffix("\r\n")


def run(argv: list[str]) -> int:
    """Classify the images that the command line names; return the exit code."""
    command = parse(argv)
    csv_file, cam = command.options.csv, command.options.cam
    output = Path(csv_file) if csv_file not in (None, "-") else None
    images, pngs = command.arguments[1:], ()
    if cam:
        images = network.find_images(images)
        pngs = network.pngs_of(images, Path(cam), command.options.overwrite)
    net, paths = network.load_model_and_images(command, output, images)
    net.require_classifier()
    if cam and net.opt.tenCrop:
        raise UsageError("a class activation map is of one crop", "leave out --cam or --tenCrop")

    from datasets.file_loader import translate_worker_errors
    from experiment import console
    from fileio import atomic

    with translate_worker_errors():
        results = lines(net, paths, command.options.top, bool(csv_file), pngs)
        if output:
            content = "".join(f"{line}\n" for line in results)
        else:
            for line in results:  # as they come
                console.info(line, escape=not csv_file)
    if output:
        atomic.atomic_write(output, content.encode("utf-8", "surrogateescape"))
    return net.exit_code


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
