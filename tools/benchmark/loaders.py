"""Measure how fast image files are prepared: `python -m tools.benchmark --loader DIR`.

This project's loader, another checkout's and other libraries' prepare the same files in turns, on
one thread. Images per processor second are what a core can prepare.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from cli.flag_types import Settings
from datasets.decode import DecodeOptions
from datasets.file_list import find_image_files
from datasets.file_loader import Unreadable, read_or_explain
from datasets.regions import Box, Region, decode_region
from errors import DataError, UsageError
from tools import cli
from tools.benchmark import loader_driver, loader_peers, loader_results, machine
from tools.benchmark.cases import matches, no_match
from tools.benchmark.turns import error_as_note, report, take_turns

TURNS, WARM_UP, IMAGES = 5, 1, 256
FIX = "name a checkout of this project whose main.py runs here"
SPLITS = ("training", "evaluation")


class Runner:
    """Prepare all images in one way: a turn is an epoch, with draws of its own."""

    def __init__(self, who: str, version: str, name: str, run: loader_peers.Pass | None = None):
        split, resize = name.split("/")
        self.row = {"who": who, "version": version, "split": split, "resize": resize}
        self.run, self.turns, self._epoch = run, [], 0

    @property
    def name(self) -> str:
        """Return the name that `--only` is matched with."""
        return "/".join(self.row[column] for column in ("who", "split", "resize"))

    def take_turn(self) -> dict[str, tuple[float, float]]:
        """Prepare all images; return the (processor, wall) seconds by part."""
        self._epoch += 1
        return self.run(self._epoch)


class Checkout:
    """Time the loader of another checkout in a process of its own, which works only when asked.

    Raises:
        UsageError: there is no such directory.
    """

    def __init__(self, root: Path, argv: list[str]):
        self.root = root
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        if not root.is_dir():
            raise UsageError(f"against: {root} is no directory", FIX)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", loader_driver.__file__, *argv],  # -P: not this file's folder
            cwd=root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def names(self) -> list[str]:
        """Wait for the loaders, and return their names; raise UsageError if there are none."""
        try:
            return self._read()
        except RuntimeError as error:
            raise UsageError(f"against: {self.root}: {error}", FIX) from error

    def run(self, name: str, epoch: int) -> dict[str, tuple[float, float]]:
        """Time an epoch of a loader, as `loader_driver.time_epoch` does."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it printed says why
            print(json.dumps([name, epoch]), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self):
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._errors.seek(0)
        raise RuntimeError((self._errors.read().strip() or "it ended").splitlines()[-1])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def find_images(directory: Path, count: int) -> list[str]:
    """List up to `count` image files at any depth, evenly spread; raise DataError without two."""
    paths = find_image_files(directory, Counter())
    if len(paths) < 2:
        what = f"loader: {directory} has {len(paths)} image files"
        raise DataError(what, "name a directory with at least two, at any depth")
    count = min(count, len(paths))
    return [os.path.abspath(paths[number * len(paths) // count]) for number in range(count)]


def describe_images(directory: Path, paths: list[str], opt: Settings) -> str:
    """Name the images and their median size; raise DataError for one that cannot be read."""
    options = DecodeOptions(opt.exifRotate, opt.maxPixels, opt.maxAspect, opt.whiteLevel)
    sizes = []

    def whole(width: int, height: int) -> Region:
        sizes.append((width, height))
        return Region(Box(0, 0, width, height))

    for path in paths:
        found = read_or_explain(decode_region, path, options, whole)
        if isinstance(found, Unreadable):
            raise DataError(f"cannot read image {found.reason}", found.fix)
    width, height = (statistics.median_low(sides) for sides in zip(*sizes, strict=True))
    return f"{directory.resolve().name}, median {width} x {height}"


@contextlib.contextmanager
def linked_folder(paths: list[str]) -> Iterator[str]:
    """Make a dataset of two classes, in which both splits hold links to all the files."""
    with tempfile.TemporaryDirectory() as root:
        for number, path in enumerate(paths):
            for split in ("train", "val"):
                folder = Path(root, split, "ab"[number % 2])
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:06}{Path(path).suffix}").symlink_to(path)
        yield root


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_runners(
    options: SimpleNamespace,
    opt: Settings,
    argv: list[str],
    paths: list[str],
    other: Checkout | None,
) -> list[Runner]:
    """Make what `--only` selects; a library that is missing leaves a note in its row.

    Args:
        argv: main.py's flags, for this project's loader.
        other: another checkout, if there is one.

    Raises:
        UsageError: nothing is selected, or the other checkout does not work.
    """
    ours, commit = loader_driver.make_loaders(argv), machine.commit(cli.ROOT)
    runners = [Runner(loader_results.OURS, commit, name, run) for name, run in ours.items()]
    if other:
        who, commit = loader_results.AGAINST, machine.commit(other.root)
        names = other.names()
        runners += [Runner(who, commit, name, partial(other.run, name)) for name in names]
    peers = {}
    for split, peer in itertools.product(SPLITS, loader_peers.PEERS):
        peers[Runner(peer.who, "none", f"{split}/{peer.resize}")] = peer
    selected = [each for each in [*runners, *peers] if matches(each.name, options.only)]
    if not selected:
        raise no_match(options.only, runners[0].name)
    for runner in selected:
        if peer := peers.get(runner):
            with error_as_note(runner.row):
                runner.row["version"] = peer.version
                training = runner.row["split"] == "training"
                runner.run = peer.make(paths, opt.batchSize, training, opt.imageSize)
    return selected


def measure(options: SimpleNamespace, opt: Settings, main_flags: list[str]) -> list[dict]:
    """Measure what `--only` selects, and return its rows; call it within `one_thread`.

    Raises:
        RunError: the images, the flags or the other checkout are not usable.
    """
    paths = find_images(Path(options.loader), options.images or IMAGES)
    source = describe_images(Path(options.loader), paths, opt)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(linked_folder(paths))
        argv = ["--dataset=folder", f"--data={folder}", "--nThreads=0", *main_flags]
        other = None
        if options.against:
            other = Checkout(Path(options.against).resolve(), argv)
            stack.callback(other.close)
        runners = make_runners(options, opt, argv, paths, other)
        turns = options.turns or TURNS
        warm_up = WARM_UP if options.warmUp is None else options.warmUp
        report(f"{len(runners)} loaders prepare {len(paths)} images in {warm_up} + {turns} turns")
        take_turns(runners, warm_up, turns)
    rows = []
    for runner in runners:
        rows += loader_results.as_rows(runner.row, runner.turns, len(paths))
    loader_results.add_ratios(rows)
    return [row | {"images": len(paths), "source": source} for row in rows]
