"""Write a network as an ONNX file, and read its weights back bit for bit.

An initialiser has the name of its parameter, and batch normalisation is not folded into
convolutions. The input is `images`, float32 (N, C, H, W), the output `logits`, (N, classes). The
metadata include `sha256` of the weights, since the format has no checksum.
"""

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from errors import CheckpointError, RunError

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 18  # what torch's exporter writes without a conversion


def require(*packages: str, of: str = "ONNX") -> None:
    """Raise RunError if an optional package, NAME or NAME==VERSION, is not installed."""
    for package in packages:
        name = package.partition("==")[0]
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            pinned = " ".join(each for each in packages if "==" in each)
            own = ", in an environment of its own" if "torchvision" in pinned else ""
            fix = f"pip install {pinned}{own}"
            fix = fix if "==" in package else "pip install -r requirements-tools.txt"
            raise RunError(f"tools.export needs {name} for {of} files", fix)


def as_onnx(
    model: "torch.nn.Module",
    example: "torch.Tensor",
    metadata: dict[str, str],
    prefix: str = "",
    fold: bool = False,
) -> bytes:
    """Export a network for any number of images like the example (1, ...) as ONNX.

    Args:
        prefix: of the names of its parameters, left out in the file.
        fold: batch normalisation into the convolution before it; no CHECKPOINT then.
    """
    import torch

    from fileio.safetensors import PRODUCER, digest

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            model,
            (torch.cat([example, example]),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            optimize=fold,
            verbose=False,
        )
    proto = program.model_proto  # a new one at each call
    graph = proto.graph
    # Remove the exporter's annotations, which double the file and hold local paths.
    parts = (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (proto, graph, *parts):
        del part.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        node.input[:] = [name.removeprefix(prefix) for name in node.input]
    for initializer in graph.initializer:
        initializer.name = initializer.name.removeprefix(prefix)
    proto.producer_name, proto.producer_version = PRODUCER, ""
    for key, value in (metadata | {"sha256": digest(_tensors(graph))}).items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def read(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    """Read the initialisers of an ONNX file by name, and its metadata: {} unless this wrote it.

    Raises:
        CheckpointError: missing or damaged.
        RunError: onnx is not installed.
    """
    require("onnx")

    import onnx

    from fileio.safetensors import PRODUCER, digest

    try:
        proto = onnx.load_model_from_string(path.read_bytes())
        weights = _tensors(proto.graph)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "name a file") from error
    except Exception as error:  # damaged bytes can raise anything in a parser
        raise CheckpointError(f"{path} is damaged, or not ONNX", "use another file") from error
    if not weights:
        raise CheckpointError(f"{path} holds no weights", "use another file")
    if any(node.op_type == "DequantizeLinear" for node in proto.graph.node):
        what = f"{path} is quantised: its weights are rounded to 8 bits"
        raise CheckpointError(what, "name the run or the file that it was made from")
    metadata = {prop.key: prop.value for prop in proto.metadata_props}
    if proto.producer_name != PRODUCER or "sha256" not in metadata:
        return weights, {}
    if metadata["sha256"] != digest(weights):
        raise CheckpointError(f"{path} is damaged: its digest does not match", "use another file")
    # One with preprocessing has statistics as well, which are in the metadata too.
    return {name: weights[name] for name in weights if "pixel_" not in name}, metadata


def _tensors(graph: "onnx.GraphProto") -> dict[str, "torch.Tensor"]:
    """Convert the initialisers; raise ValueError if one is not finite or outside of the file."""
    import onnx
    import torch

    tensors = {}
    for initializer in graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:  # it could name any file
            raise ValueError("data outside of the file")
        values = torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())
        if not torch.isfinite(values).all():
            raise ValueError("a weight that is not finite")
        tensors[initializer.name] = values
    return tensors
