"""Write a network for a program that runs networks, once that program has computed its logits.

A file is made in a directory beside its place, opened there by its own runtime and compared with
PyTorch.
"""

import contextlib
import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from datasets.file_loader import translate_worker_errors
from datasets.memory_loader import normalise_pixels
from errors import RunError, UsageError
from experiment import console
from fileio import atomic
from tools.export import quantise
from tools.export.proof import compare, random_images
from tools.export.runtimes import Job, Runtime
from tools.inference import data
from tools.inference.network import LoadedModel

LIMIT = 1e-4  # of the largest logit, between a runtime and PyTorch, both in single precision
LIMIT_HALF = 1e-2  # with weights, or weights and activations, in half precision


class Deployed(nn.Module):
    """Compute logits (N, classes) in float32 from images as the users of a runtime have them.

    Pixels from 0 to 255 in the layout "NHWC" or "NCHW" are normalised first; with "" images
    (N, C, H, W) are normalised already.
    """

    def __init__(self, net: LoadedModel, layout: str):
        super().__init__()
        # ExecuTorch cannot lower weights that are channels-last in memory.
        contiguous = {"memory_format": torch.contiguous_format}
        self.network = copy.deepcopy(net.model).to("cpu", **contiguous)
        self.layout = layout
        if layout:
            for name, values in (("pixel_mean", net.mean), ("pixel_std", net.std)):
                self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.eval().in_half(False)

    def in_half(self, half: bool) -> "Deployed":
        """Let the network itself compute in half precision, if asked to."""
        self.dtype = torch.float16 if half else torch.float32
        self.network.to(self.dtype)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map images in the layout to logits."""
        if self.layout == "NHWC":
            images = images.permute(0, 3, 1, 2)
        if self.layout:
            images = (images.float() - self.pixel_mean) / self.pixel_std
        return self.network(images.to(self.dtype)).float()


def write(
    net: LoadedModel, runtime: Runtime, output: Path, options: SimpleNamespace, paths: list[str],
    metadata: dict[str, str],
) -> None:  # fmt: skip
    """Write a network for a runtime; say how far its logits are off, and what the files take.

    Args:
        options: half, int8, withPreprocessing and check.
        paths: of images to compare on besides noise.
        metadata: as in runtimes.Job.

    Raises:
        RunError: it cannot be converted or run, or computes something else: nothing was written.
        UsageError: preprocessing that no file can hold.
    """
    opt, layout = net.opt, runtime.layout if options.withPreprocessing else ""
    if layout and opt.preprocess != "normalise":
        what = f"preprocess {opt.preprocess} cannot be put into a file"
        raise UsageError(what, "leave out --withPreprocessing")
    example = torch.zeros(1, opt.nChannels, opt.imageSize, opt.imageSize)
    example = example.permute(0, 2, 3, 1).contiguous().byte() if layout == "NHWC" else example
    calibration = None
    if options.int8:
        found = data.calibration_batches(net, quantise.CALIBRATED)
        images = [_as_given(net, bool(layout), batch).contiguous().numpy() for batch in found]
        calibration = quantise.Calibration(images, options.int8 == "channel")
    # Beside the output: what was checked is what is moved, and a full disk shows at once.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as directory:
        path = Path(directory, output.name)
        with _as_one_line(f"cannot write this network for {runtime.title}", output):
            job = Job(Deployed(net, layout), example, options.half, metadata, calibration)
            runtime.write(job, path)
        checked = options.check and _check(net, runtime, path, options, paths)
        size = sum(part.stat().st_size for part in Path(directory).rglob("*") if part.is_file())
        atomic.move_together(runtime.files(path), runtime.files(output))
    numbers = sum(tensor.numel() for tensor in net.model.state_dict().values())
    cost = f" (in single precision {numbers * 4 / 1e6:.1f} MB of weights)"
    cost *= bool(options.half or options.int8)
    kind = f"{example.dtype}".removeprefix("torch.") if layout != "NCHW" else "a picture as"
    shape = ", ".join([runtime.batch, *map(str, example.shape[1:])])
    shape += ") from 0 to 255" if layout else ")"
    names = " and ".join(map(str, runtime.files(output)))
    console.info(f"{names}: {size / 1e6:.1f} MB{cost}; images: {kind} ({shape}")
    if not checked:
        console.warn(f"not checked: {runtime.title} has not run it")


def _as_given(net: LoadedModel, as_pixels: bool, images: Tensor) -> Tensor:
    """Turn normalised images (N, C, H, W) into what a file takes, perhaps pixels (N, H, W, C)."""
    images = images.float().cpu()
    if not as_pixels:
        return images
    mean, std = torch.tensor(net.mean), torch.tensor(net.std)
    return (images.permute(0, 2, 3, 1) * std + mean).round().clamp(0, 255).to(torch.uint8)


def _check(
    net: LoadedModel, runtime: Runtime, path: Path, options: SimpleNamespace, paths: list[str]
) -> bool:
    """Compare the runtime with PyTorch on noise and on files; False if it does not run here."""
    with _as_one_line(f"{runtime.title} cannot open its file", path):
        logits = runtime.open(path)
    if not logits:
        return False
    model = copy.deepcopy(net.model).float().cpu()
    mean, std = torch.tensor(net.mean), torch.tensor(net.std)

    def ours(images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = normalise_pixels(images, mean, std).permute(0, 3, 1, 2)
        return model(images)

    def theirs(images: Tensor) -> Tensor:
        batches = [images] if runtime.batch == "N" else images.split(1)
        with _as_one_line(f"{runtime.title} cannot run its file", path):
            return torch.from_numpy(
                np.concatenate([np.array(logits(x.contiguous())) for x in batches])
            )

    given = partial(_as_given, net, options.withPreprocessing)
    if options.int8:
        quantise.check(net, given, ours, theirs)
        return True
    name = runtime.title + " in half precision" * options.half
    limit = LIMIT_HALF if options.half else LIMIT
    compare(f"{name} on noise", ours, theirs, map(given, random_images(net.opt)), limit)
    with translate_worker_errors():
        of_files = (given(images) for images, _ in net.batches(paths))
        compare(f"{name} on files", ours, theirs, of_files, limit)
    return True


@contextlib.contextmanager
def _as_one_line(what: str, output: Path) -> Iterator[None]:
    """Keep what a library prints off the terminal, and turn its error into one line."""
    sys.stdout.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]  # which C++ and processes write to
    try:
        with open(os.devnull, "w") as nowhere:
            for number, _ in kept:
                os.dup2(nowhere.fileno(), number)
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in atomic.NO_SPACE:
            raise atomic.storage_error(error, output) from error
        lines = (str(error).strip() or type(error).__name__).splitlines()
        own = [line for line in lines if not line.startswith(("Exception from", "Check "))]
        line = (own or lines)[0][:200]
        raise RunError(f"{what}: {line}", "nothing was written; use another --to") from error
    finally:
        sys.stdout.flush()
        for number, copied in kept:
            os.dup2(copied, number)
            os.close(copied)
