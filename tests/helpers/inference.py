"""Write the model file of a run that was never trained, and compute logits of image files."""

from pathlib import Path

import torch

import models.factory
import opts
from experiment.directory import RunDirectory
from fileio import tensor_files
from tools.inference.network import LoadedModel


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Give every channel a scale, a shift and running statistics of its own."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            tensor.normal_(0.5, 0.2)
    return model.eval()


def write_model(directory: Path, flags: list[str], classes: list[str]) -> Path:
    """Write random weights, the settings and the classes of a run; return the weights' path."""
    opt = opts.parse(flags)
    directory.mkdir(exist_ok=True)
    model = scramble(models.factory.create(opt, len(classes)))
    tensor_files.save_weights(directory / "model_last.pt", model.state_dict())
    (directory / "config.yaml").write_text(opts.as_yaml(opt))
    metadata = {"classes": classes, "mean": [128.0] * 3, "std": [64.0] * 3}
    RunDirectory(directory).write_json("data.json", metadata)
    return directory / "model_last.pt"


def logits(net: LoadedModel, paths: list[str]) -> torch.Tensor:
    """Compute the logits of image files."""
    return torch.cat([net.logits(images) for images, _ in net.batches(paths)])
