"""Load a trained network from any source of weights, and run it on image files as --testOnly does.

classify, extract_features and export share it; sources.py reads weights and what describes them.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.flag_types import Flag, Settings, boolean
from datasets.file_list import describe_unread, find_image_files, unread_note
from errors import CheckpointError, DataError, StorageError, UsageError
from experiment import console, run_data
from tools import cli
from tools.inference import sources

if TYPE_CHECKING:
    import torch

    from datasets.file_loader import UnreadableImages
    from datasets.memory_loader import ImageTensors
    from models.weight_formats import Imported

WHOLE = "use the weights of a whole network, with its classifier"
OVERWRITE = Flag("overwrite", boolean, False, "replace an output file that exists", const="true")


@dataclass(frozen=True)
class LoadedModel:
    """Hold a network in evaluation mode on its device, and read images for it."""

    model: "torch.nn.Module"
    opt: Settings
    classes: list[str]  # names in the order of its outputs; an encoder has none
    mean: list[float]  # of its training images, per channel, of pixels from 0 to 255
    std: list[float]
    device: "torch.device"
    unreadable: "UnreadableImages"  # those so far; each was reported in one line
    imported: "Imported"  # the weights, and what their file says
    thresholds: list[float | None] | None  # of independent outputs; None: one class is right
    has_names: bool = True  # False: nothing names the classes, which are numbers

    @property
    def exit_code(self) -> int:
        """Return the exit code of a tool that went on without the unreadable images."""
        return DataError.code if self.unreadable.seen else 0

    def batches(
        self, images: "list[str] | ImageTensors", numbers: "torch.Tensor | None" = None
    ) -> Iterator[tuple["torch.Tensor", list[int]]]:
        """Read paths, or tensors labelled by place, through the pipeline of --testOnly, in order.

        Args:
            numbers: (n,) of those to read; None: all.

        Yields:
            images: (n * crops, C, H, W), normalised, on the device.
            indices: of the n images; those that cannot be read are left out.
        """
        import datasets.factory
        from datasets.file_list import FileList

        opt, dtype = self.opt, self.model.classifier.weight.dtype
        if len(images if numbers is None else numbers) <= opt.batchSize:
            opt = opt.replace(nThreads=0)  # starting workers would take longer than reading
        if isinstance(images, list):
            images = FileList((path, index) for index, path in enumerate(images))
        about = (self.mean, self.std), self.unreadable, dtype, numbers
        loader = datasets.factory.evaluation_loader(opt, images, self.device, *about)
        for images, indices in loader.batches(epoch=0):
            if len(indices):
                yield images, indices.tolist()

    def logits(self, images: "torch.Tensor") -> "torch.Tensor":
        """Map (n * crops, C, H, W) to (n, classes), in the precision of the settings."""
        import torch

        from engine import precision

        with torch.no_grad(), precision.autocast(self.device, self.opt.precision):
            return self.mean_over_crops(self.model(images).to(self.model.classifier.weight.dtype))

    def require_classifier(self) -> None:
        """Raise CheckpointError if the network is an encoder."""
        if not self.classes:
            raise CheckpointError("these weights have no classifier", WHOLE)

    def scores(self, images: "torch.Tensor") -> "torch.Tensor":
        """Map (n * crops, C, H, W) to (n, classes) in float64, from 0 to 1.

        Probabilities that sum to 1; or those of independent outputs, calibrated as torchxrayvision
        does: the threshold of an output becomes 0.5, and one without a threshold is always 0.5.
        """
        return self.probabilities(self.logits(images))

    def probabilities(self, logits: "torch.Tensor") -> "torch.Tensor":
        """Map logits (n, classes) to the `scores` of their images."""
        import torch

        logits = logits.double()
        if not self.thresholds:
            return logits.softmax(dim=1)
        found = logits.sigmoid()
        nan = float("nan")
        limits = found.new_tensor([nan if each is None else each for each in self.thresholds])
        above = 1 - (1 - found) / (2 * (1 - limits))
        return torch.where(found < limits, found / (2 * limits), above).nan_to_num(nan=0.5)

    def mean_over_crops(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Average (n * crops, C) over the crops of each image: (n, C)."""
        import train

        return train.mean_over_crops(rows, 10 if self.opt.tenCrop else 1)


def load(
    path: Path, main_flags: list[str] | tuple = (), classes: Path | None = None
) -> LoadedModel:
    """Load the network of a run, a checkpoint, an exported file or plain weights.

    Args:
        main_flags: win over the settings in `path`.
        classes: a file of names, or the data.json of a run, in place of the classes in `path`.

    Raises:
        CheckpointError: missing, damaged, or weights of another network.
        UsageError: settings, classes or channel statistics are wrong or not known.
    """
    import datasets.factory
    from cli.network_settings import adopt
    from datasets.file_loader import UnreadableImages
    from experiment import console
    from models.weight_formats import import_weights

    weights, settings, data = sources.read(path)
    if not settings and not main_flags:
        fix = "add main.py's flags for their network, such as --dataset imagenet --depth 121"
        raise UsageError(f"{path} holds weights but does not describe their network", fix)
    # As main.py reads it: of Lua, without settings, it is evaluated with Torch7's resize.
    main_flags = [f"--retrain={path}", *main_flags]
    opt = sources.merge_settings(settings, main_flags)
    imported = import_weights(weights, vars(opt)["from"], console.warn, opt.paddleDropout)
    weights = imported.weights
    if not settings:  # else the file tells more
        opt = adopt(opt, imported.settings, console.warn)
    thresholds = data.get("thresholds", imported.thresholds)
    is_encoder = imported.format and not imported.format.has_classifier
    num_classes = 0 if is_encoder else _count_classes(weights, opt.nClasses)
    if classes:
        data = _rename_classes(data, classes, path)
    names = data.get("classes") or [str(number) for number in range(num_classes)]
    names = [] if is_encoder else names
    if len(names) != num_classes:
        what = f"{classes or path} has {len(names)} classes, the weights have {num_classes}"
        raise UsageError(what, "name the classes of these weights")
    known = (data["mean"], data["std"]) if "mean" in data else None
    statistics = datasets.factory.expected_statistics(opt, known)
    statistics = statistics or datasets.factory.published_statistics(opt)
    if statistics is None:
        what = f"mean and deviation of the images that {opt.dataset} weights expect are not known"
        fix = "add --classes RUN/data.json, of the run that they are from, or --inputRange"
        raise UsageError(what, fix)
    model, device = _build(opt, num_classes, weights)
    # Any number is skipped.
    unreadable = UnreadableImages("skip", math.inf, console.warn, report=_report_unreadable)
    about = imported, thresholds, bool(data.get("classes"))
    return LoadedModel(model, opt, names, *map(list, statistics), device, unreadable, *about)


def _rename_classes(data: dict, classes: Path, path: Path) -> dict:
    """Return what `classes` tells, below the channel statistics that `path` has.

    Raises:
        UsageError: a known class has another number.
    """
    given, known = run_data.read_classes(classes), data.get("classes", [])
    names = given["classes"]
    differing = run_data.class_differences(names, known, f"that of {path}") if known else ""
    if any(name in names and names[i : i + 1] != [name] for i, name in enumerate(known)):
        raise UsageError(f"{classes} has another order: {differing}", "leave out --classes")
    if differing and len(names) == len(known):  # perhaps a translation
        console.warn(f"{classes} renames classes: {differing}")
    return given | data | {"classes": names}


def _count_classes(weights: dict, wanted: int | None) -> int:
    """Count the outputs of the classifier, in Lua's weights the last matrix."""
    found = {name: tensor for name, tensor in weights.items() if tensor.dim() == 2}
    named = [found[name] for name in ("classifier.weight", "fc.weight") if name in found]
    matrices = named or [*found.values()]
    if not matrices:
        raise CheckpointError("these weights have no classifier", WHOLE)
    found = len(matrices[-1])
    if wanted not in (None, found):
        what = f"the weights have {found} classes, nClasses is {wanted}"
        raise CheckpointError(what, "leave out --nClasses")
    return found


def _build(opt: Settings, num_classes: int, weights: dict) -> tuple:
    """Build the network as main.py does; return it and its device."""
    import torch

    import engine.device
    import models.factory
    import models.state_dicts
    from engine.backend_choice import select_backend
    from engine.precision import PRECISIONS
    from experiment import console

    device = engine.device.select(opt.nGPU)
    engine.device.configure(opt.cudnn, opt.tf32)
    ops, _ = select_backend(opt, device)
    model = models.factory.create(opt, num_classes or 1, ops).eval()
    dtype = PRECISIONS[opt.precision].dtype
    model = model.to(device, dtype, memory_format=torch.channels_last)
    models.state_dicts.load_weights(
        model,
        weights,
        reset_classifier=not num_classes,
        classifier_fix=WHOLE,
        adapt_channels=opt.adaptChannels,
        warn=console.warn,
    )
    return model, device


def _report_unreadable(what: str, fix: str) -> None:
    print(DataError(what, fix).report(), file=sys.stderr)


def load_model_and_images(
    command: cli.Command, output: Path | None, images: list[str]
) -> tuple[LoadedModel, list[str]]:
    """Load the network that a command line names first, and list its image files.

    The paths, also of an output file, are checked before anything heavy is loaded.
    """
    checkpoint, classes = Path(command.arguments[0]), command.options.classes
    if output:
        check_new(output, command.options.overwrite)
    sources.check_there(checkpoint)
    paths = find_images(images)
    net = load(checkpoint, command.main_flags, classes and Path(classes))
    if paths and net.opt.preprocess != "normalise":
        what = f"this network expects images after preprocess {net.opt.preprocess}, not as they are"
        raise UsageError(what, "evaluate it with main.py --testOnly true")
    return net, paths


def find_images(arguments: list[str]) -> list[str]:
    """List the named files and the images below the named directories, or raise DataError."""
    for argument in arguments:
        if not os.path.exists(argument):
            raise DataError(f"no such file or directory: {argument}", "name images or directories")

    paths, unread = [], Counter()
    for argument in arguments:
        others: Counter[str] = Counter()
        is_folder = os.path.isdir(argument)
        found = find_image_files(Path(argument), others) if is_folder else [argument]
        if not found:
            only = f", only {describe_unread(others)}" if others else ""
            raise DataError(f"no images in {argument}{only}", "name images or directories of them")
        paths += found
        unread.update(others)
    if unread:
        console.warn(unread_note(unread))
    return paths


def check_new(path: Path, overwrite: bool) -> None:
    """Check that an output file can be written, without writing it.

    Raises:
        UsageError: it exists and must not be replaced.
        StorageError: its directory is missing or read-only.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a file", "remove it, or name another")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists", "name another, or add --overwrite true")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        what = "cannot write in" if path.parent.is_dir() else "no directory"
        raise StorageError(f"{what} {path.parent}", "make that directory, or name another")


def pngs_of(paths: list[str], directory: Path, overwrite: bool) -> list[Path]:
    """Name a PNG for each image, by its path below the folder that all share.

    Raises UsageError and StorageError as `check_new` does.
    """
    places = [os.path.abspath(path) for path in paths]
    shared = os.path.commonpath(map(os.path.dirname, places))
    found = [directory / f"{os.path.relpath(place, shared)}.png" for place in places]
    for png in found:
        folder = next(each for each in png.parents if each.exists())  # the others are made
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise StorageError(f"cannot write in {folder}", "name another directory")
        if png.exists():
            check_new(png, overwrite)
    return found
