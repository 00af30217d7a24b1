"""Write a network as an ONNX file, and read its weights back bit for bit.

An initialiser has the name of its parameter, and batch normalisation is not folded into
convolutions. The input is `images`, float32 (N, C, H, W), the output `logits`, (N, classes). The
metadata include `sha256` of the weights, since the format has no checksum.
"""

import contextlib
import copy
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


def require(*packages: str) -> None:
    """Raise RunError if an optional package is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            fix = "pip install -r requirements-tools.txt"
            raise RunError(f"tools.export needs {package} for ONNX files", fix)


def as_onnx(model: "torch.nn.Module", size: int, metadata: dict[str, str]) -> bytes:
    """Export a network in single precision, for any number of images of one size, as ONNX."""
    import torch

    from fileio.safetensors import PRODUCER, digest

    channels = next(model.parameters()).shape[1]  # of the first convolution's input
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            copy.deepcopy(model).float().cpu().eval(),
            (torch.zeros(2, channels, size, size),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # would fold batch normalisation into convolutions
            verbose=False,
        )
    proto, graph = program.model_proto, program.model_proto.graph
    # Remove the exporter's annotations, which double the file and hold local paths.
    parts = (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (proto, graph, *parts):
        del part.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
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
    metadata = {prop.key: prop.value for prop in proto.metadata_props}
    if proto.producer_name != PRODUCER or "sha256" not in metadata:
        return weights, {}
    if metadata["sha256"] != digest(weights):
        raise CheckpointError(f"{path} is damaged: its digest does not match", "use another file")
    return weights, metadata


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
