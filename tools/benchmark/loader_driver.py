"""Time one epoch of this project's loaders of image files, part by part, in this process.

`python loader_driver.py [main.py's flags]`, with another checkout of the project as the module
path, times that one's: it prints the names of its loaders, then for each line `[NAME, EPOCH]` that
it reads a line of seconds, all in JSON. It therefore uses only what every version of the project
has, and nothing of `tools`.
"""

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

import datasets.factory
import opts

# What reads a file and decodes it, by version: the first of these that is there.
DECODERS = (("datasets.pipelines", "decode_region"), ("datasets.file_loader", "decode"))
NO_CHOICE = "fixed"  # the resize of a version without --resize


class Stopwatch:
    """Sum up the (processor, wall) seconds that parts of a pass take, by their names."""

    def __init__(self):
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the enclosed block to a part."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        now, sums = (time.process_time(), time.perf_counter()), self.seconds.get(name, (0.0, 0.0))
        self.seconds[name] = (sums[0] + now[0] - cpu, sums[1] + now[1] - wall)


class _TimedWorkers:
    """Stand for a torch DataLoader, and time what its workers would do."""

    def __init__(self, loader: torch.utils.data.DataLoader, watch: Stopwatch):
        self._loader, self._watch = loader, watch

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def __iter__(self):
        batches = iter(self._loader)
        while True:
            with self._watch.part("workers"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


@contextlib.contextmanager
def _timed_workers(loader, watch: Stopwatch) -> Iterator[None]:
    workers = loader._loader
    loader._loader = _TimedWorkers(workers, watch)
    try:
        yield
    finally:
        loader._loader = workers


def time_epoch(loader, epoch: int) -> dict[str, tuple[float, float]]:
    """Return the (processor, wall) seconds of an epoch of a `FileLoader` without workers, by part.

    Parts: `decode`, file to pixels; `prepare`, file to what a worker hands over to this process,
    collated; `whole`, file to normalised float batch; `workers`, file to what a worker hands over
    where the training device is a GPU.
    """
    watch = Stopwatch()
    module, name = _find_decoder()
    decode = getattr(module, name)

    def timed_decode(*args, **kwargs):
        with watch.part("decode"):
            return decode(*args, **kwargs)

    patched = mock.patch.object(module, name, timed_decode)
    with patched, _timed_workers(loader, watch), watch.part("whole"):
        for _ in loader.batches(epoch):
            pass
    seconds = watch.seconds
    seconds["prepare"] = seconds["workers"]
    pipeline = getattr(loader, "pipeline", None)
    if getattr(pipeline, "resize", None) == "torch7":  # a GPU resizes
        seconds["workers"] = _time_workers_for_gpu(loader, epoch)
    return seconds


def _time_workers_for_gpu(loader, epoch: int) -> tuple[float, float]:
    watch, no_images = Stopwatch(), torch.empty(0, 3, 1, 1)
    changes = {"resizes_on_device": True, "finish": lambda chunks, device: no_images}
    with mock.patch.multiple(loader.pipeline, **changes), _timed_workers(loader, watch):
        for _ in loader.batches(epoch):
            pass
    return watch.seconds["workers"]


def _find_decoder() -> tuple[ModuleType, str]:
    for module, name in DECODERS:
        with contextlib.suppress(ImportError):
            found = importlib.import_module(module)
            if hasattr(found, name):
                return found, name
    raise RuntimeError("this version decodes elsewhere: add where to DECODERS")


def make_loaders(argv: list[str]) -> dict[str, partial]:
    """Make the loaders of each split and resize: {`training/antialias`: epoch -> seconds by part}.

    Raises:
        RunError: the flags or the data are wrong.
    """
    flag, given = opts.FLAGS.get("resize"), [w for w in argv if w.startswith("--resize=")]
    others = [word for word in argv if word not in given]
    resizes = [[]] if not flag else [given] if given else [[f"--resize={c}"] for c in flag.choices]
    loaders = {}
    for resize in resizes:
        opt = opts.parse([*others, *resize])
        data = datasets.factory.create(opt, torch.device("cpu"), lambda note: None)
        for split, loader in (("training", data.train), ("evaluation", data.val)):
            name = f"{split}/{getattr(opt, 'resize', NO_CHOICE)}"
            loaders[name] = partial(time_epoch, loader)
    return loaders


def serve(argv: list[str]) -> None:
    """Answer the requests of standard input on standard output."""
    if Path(opts.__file__).parent != Path.cwd():
        raise RuntimeError("there is no opts.py")
    torch.set_num_threads(1)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        loaders = make_loaders(argv)
        print(json.dumps(list(loaders)), file=answers, flush=True)
        for line in sys.stdin:
            name, epoch = json.loads(line)
            print(json.dumps(loaders[name](epoch)), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
