"""Read and write weights in the safetensors format, as timm publishes them.

The format has no checksum: a number changed inside of a tensor is found only if it is not finite.
Files of `to_bytes` carry a digest of weights and metadata, which `from_bytes` verifies.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

SUFFIX = ".safetensors"
MAX_HEADER = 2**22  # bytes, ten times that of a DenseNet-264
PRODUCER = "densenet tools.export"


def is_safetensors(data: bytes) -> bool:
    """Tell whether bytes begin as a safetensors file does: a length, then a JSON object."""
    return data[8:9] == b"{" and data[5:8] == b"\0\0\0"


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """Read weights by name, bit for bit as they were written.

    Raises:
        ValueError: cut short, longer than its header says, or with an invalid header or digest.
    """
    import safetensors.torch

    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length} bytes")
    try:
        weights = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error).removeprefix("Error while deserializing header: ")) from error
    except KeyError as error:  # a dtype that PyTorch lacks
        raise ValueError(f"it holds {error.args[0]} numbers") from error
    metadata = _metadata(data)
    if metadata and metadata.pop("sha256", None) != digest(weights, metadata):
        raise ValueError("its digest does not match")
    return weights


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file that `to_bytes` wrote and `from_bytes` reads; {} of another."""
    with open(path, "rb") as file:
        return _metadata(file.read(8 + MAX_HEADER))


def _metadata(data: bytes) -> dict[str, str]:
    if not is_safetensors(data):
        return {}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}  # the package accepts null
    return metadata if metadata.get("producer") == PRODUCER else {}


def to_bytes(weights: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Write contiguous weights and metadata; raise ValueError if they do not read back equal."""
    import safetensors.torch

    metadata = metadata | {"format": "pt", "producer": PRODUCER}
    metadata["sha256"] = digest(weights, metadata)
    data = safetensors.torch.save(weights, metadata)
    from_bytes(data)  # compares the digest
    return data


def digest(weights: dict[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> str:
    """Compute SHA-256 of names and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    for item in sorted(metadata.items()):
        found.update(repr(item).encode())
    return found.hexdigest()
