"""Write tensors and plain values to bytes, verify and read them back; never unpickle code."""

import errno
import io
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import CheckpointError, DamagedError
from fileio import file_kinds, hdf5, inert_pickle, limits, lua_network, safetensors, torch7
from fileio.archive import append_digest, is_zip, verify_archive
from fileio.atomic import atomic_write

# The tensors that a checkpoint may hold: no subclasses, no complex or quantised numbers.
TENSOR_CLASSES = (Tensor, nn.Parameter)
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
# Limits on reading, several times what a valid checkpoint of the same size takes.
READ_S, READ_RATE = 2, 2**25  # CPU seconds, plus one second per so many bytes
# The files of other programs that hold no checkpoint.
FOREIGN = (
    (torch7.is_torch7, "a file of Lua Torch"),
    (safetensors.is_safetensors, "a safetensors file"),
    (hdf5.is_hdf5, "a file of Keras"),
)
OLD_FORMAT = b"\x80\x02"  # a pickle, with which torch.save began before version 1.6
MAY_BE_NAN = ("op_threshs",)  # torchxrayvision's, for an output without a threshold
READ_BYTES = 2**27  # memory, plus twice the size of the file


class InvalidTensorError(ValueError):
    """Report a tensor that cannot be used as it is."""


def is_valid(path: Path) -> bool:
    """Tell whether a file's digest and CRCs match, without deserialising it."""
    try:
        data = _read_bytes(path)
        with limits.time_limit(READ_S + len(data) / READ_RATE):
            verify_archive(data)
    except Exception:  # damaged bytes can raise anything in a parser
        return False
    return True


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a plain state dict; by a suffix .h5 or .pdparams, the file of Keras or Paddle."""
    if path.suffix == ".h5":
        suffix = ".weights.h5" if path.name.endswith(".weights.h5") else ".h5"
        content = hdf5.to_bytes(weights, suffix)
    elif path.suffix == ".pdparams":
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in weights.items()}
        content = pickle.dumps(arrays, protocol=4)
    else:
        content = to_bytes(weights)
    atomic_write(path, content)


def to_bytes(state: object) -> bytes:
    """Serialise plain values and tensors to a zip archive that ends with its digest."""
    # In memory: on a full disk torch.save hides the reason and leaves a partial file.
    buffer = io.BytesIO()
    torch.save(on_cpu(state), buffer)  # noqa: TID251
    append_digest(buffer)
    return buffer.getvalue()


def on_cpu(value: object) -> object:
    """Copy a structure with every tensor contiguous on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return value


def from_bytes(data: bytes) -> object:
    """Deserialise what `to_bytes` of another rank returned, with every tensor on the CPU."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # noqa: TID251


def read(
    path: Path,
    with_checksums: bool = False,
    select: Callable[[object], object] = lambda state: state,
) -> object:
    """Verify and deserialise a file.

    `torch.load` verifies no CRC: of 200 files with one flipped bit it loaded 199. This function
    verifies those that torch.save writes. Files from before PyTorch 1.6 have none.

    Args:
        with_checksums: refuse files without CRCs, and those that torch.save did not write.
        select: takes the wanted part of what the file holds, which alone is checked and returned.

    Raises:
        DamagedError: the bytes differ from what was written.
        CheckpointError: the file is missing, of another kind, or costs too much to read.
    """
    data = _read_bytes(path)
    try:
        with limits.time_limit(READ_S + len(data) / READ_RATE):
            with limits.memory_limit(READ_BYTES + 2 * len(data)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # check_tensors refuses what torch warns about
                state = select(_parse(path, data, with_checksums))
            # Outside the memory limit: torch may start threads, which reserve address space.
            check_tensors(state, 2 * len(data))
    except Exception as error:  # a parser may raise anything on damaged bytes
        raise _read_error(path, data, with_checksums, error) from error
    return state


def _parse(path: Path, data: bytes, with_checksums: bool) -> object:
    if safetensors.is_safetensors(data) and not with_checksums:
        return safetensors.from_bytes(data)
    if hdf5.is_hdf5(data) and not with_checksums:
        return hdf5.from_bytes(data)
    file_kinds.check(path, data)
    if is_zip(data):
        verify_archive(data, with_checksums)
    elif with_checksums:
        raise ValueError("not a zip archive")
    elif path.suffix == safetensors.SUFFIX and not data.startswith(OLD_FORMAT):
        return safetensors.from_bytes(data)
    elif torch7.is_torch7(data):
        return lua_network.weights(torch7.load(data))
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError:
        if with_checksums:
            raise
        return inert_pickle.load(data)


def _read_error(path: Path, data: bytes, with_checksums: bool, error: Exception) -> CheckpointError:
    """Turn an error raised while reading into one that names the file and the fix."""
    kind = next((kind for is_kind, kind in FOREIGN if is_kind(data)), None)
    if with_checksums and kind:
        return DamagedError(f"{path} is {kind}, for --retrain only", "use another checkpoint")
    if isinstance(error, file_kinds.OtherKindError):
        return DamagedError(f"{path} is {error.what}", error.fix)
    if isinstance(error, CheckpointError):
        what, fix = error.problems[0]
        return CheckpointError(f"{path}: {what}", fix)
    # Exceeding a limit does not prove damage: no DamagedError, so the file stays in place.
    if isinstance(error, TimeoutError):
        return CheckpointError(f"{path} {error}", "use another checkpoint")
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        fix = "use another checkpoint, or a machine with more memory"
        return CheckpointError(f"{path} takes more memory than there is", fix)
    if isinstance(error, InvalidTensorError):
        return DamagedError(f"{path} holds {error}", "use another checkpoint")
    if is_zip(data) or kind or path.suffix == safetensors.SUFFIX:
        return DamagedError(f"{path} is damaged ({_first_line(error)})", "use another checkpoint")
    return DamagedError(f"{path} is not a checkpoint", "use another checkpoint")


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would never end
            raise OSError(errno.EINVAL, "not a regular file")
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", "it is larger than memory")
        raise CheckpointError(f"cannot read {path}: {reason}", "name a file") from error


def check_tensors(state: object, max_bytes: float = math.inf) -> None:
    """Refuse tensors that claim more data than the file holds, and values that are not finite.

    Args:
        max_bytes: limit on all tensors together; views may share data.

    Raises:
        InvalidTensorError: what is wrong with the first such tensor.
    """
    stack, seen = [("", state)], set()
    while stack:
        name, value = stack.pop()
        if id(value) in seen:  # nested lists that repeat one list would take exponential time
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            size = value.numel() * value.element_size()
            max_bytes -= size
            if type(value) not in TENSOR_CLASSES or value.dtype not in DTYPES:
                kind = str(value.dtype).removeprefix("torch.")
                raise InvalidTensorError(f"a tensor that is not a weight: {name} is {kind}")
            strided = value.layout == torch.strided
            if not strided or size > value.untyped_storage().nbytes() or max_bytes < 0:
                raise InvalidTensorError("a tensor larger than its data")
            if value.is_floating_point() and name not in MAY_BE_NAN and not _is_finite(value):
                raise InvalidTensorError(f"a weight that is not finite: {name}")
        elif isinstance(value, dict):
            stack.extend(value.items())
        elif isinstance(value, list | tuple):
            stack.extend((name, item) for item in value)


def _is_finite(tensor: Tensor) -> bool:
    # One pass, several times as fast as isfinite(); NaN becomes both the minimum and the maximum.
    return not tensor.numel() or all(map(math.isfinite, torch.aminmax(tensor.detach())))


def _first_line(error: Exception) -> str:
    if str(error).startswith("Weights only load failed"):
        return "it holds more than weights and plain values"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
