"""Recognise files that hold no weights of PyTorch, so that an error says what they are."""

import re
import shlex
from pathlib import Path

from fileio import archive, torch7

RESAVE = "load it where it was made, and save a state dict with torch.save or safetensors"
SAVE = "where it was made, save the weights: torch.save(model.state_dict(), FILE)"
# What a file begins with at a position, what it is, and what helps.
BEGINNINGS = (
    (0, rb"version https://git-lfs", "a Git LFS pointer, not the file it points to",
     "fetch the file: git lfs pull"),
    (0, rb"(?i)\s*<(!doctype|html|\?xml)", "a web page, not a checkpoint",
     "download the file itself"),
    (0, rb"MATLAB ", "a file of MATLAB", RESAVE),
    (0, rb"\x93NUMPY", "a NumPy array", RESAVE),
    (0, rb"GGUF", "a GGUF file", RESAVE),
    (4, rb"TFL3", "a TensorFlow Lite file", RESAVE),
    (0, rb"\x08\x01\x12", "a SavedModel of TensorFlow", RESAVE),
    (0, rb"[\x81-\x8f\xde][\xa1-\xbf].?[a-z]", "a MessagePack file, as Flax writes", RESAVE),
    (0, rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "compressed", "unpack it"),
    (257, rb"ustar", "a tar archive, not a checkpoint", "unpack it, or " + RESAVE),
)  # fmt: skip
ONNX = re.compile(rb"\x08[\x03-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]")
TABLE_END = bytes.fromhex("57fb808b247547db")  # of the index of a TensorFlow checkpoint
# Names of entries of a zip archive.
ENTRIES = (
    (r"(.*/)?(constants\.pkl|code/.*)", "a TorchScript archive", SAVE),
    (r"(.*/)?(archive_format|serialized_exported_program\.json)", "a torch.export archive", SAVE),
    (r"(.*/)?\.data/extern_modules", "a torch.package archive", RESAVE),
    (r".*\.npy", "a NumPy archive (.npz)", RESAVE),
)  # fmt: skip


class OtherKindError(Exception):
    """Report that a file is of another kind.

    Args:
        what, fix: as of errors.RunError, `what` without the path.
    """

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def check(path: Path, data: bytes) -> None:
    """Raise OtherKindError if a file is of a known kind that holds no weights of PyTorch."""
    if not data:
        raise OtherKindError("empty", "use another file")
    for start, pattern, what, fix in BEGINNINGS:
        if re.match(pattern, data[start : start + 100]):
            raise OtherKindError(what, fix)
    if ONNX.match(data) or path.suffix == ".onnx":
        # Not --to weights, which lose the settings and the names of the classes.
        export = f"tools.export {shlex.quote(str(path))} --to safetensors"
        fix = f"use the file of: python -m {export} --output weights.safetensors"
        raise OtherKindError("an ONNX file", fix)
    if data.endswith(TABLE_END) or re.search(r"\.data-\d+-of-", path.name):
        raise OtherKindError("a part of a TensorFlow checkpoint", RESAVE)
    if archive.is_zip(data):
        names = archive.entries(data)
        for pattern, what, fix in ENTRIES:
            if any(re.fullmatch(pattern, name) for name in names):
                raise OtherKindError(what, fix)
        if not any(re.fullmatch(r"(.*/)?data\.pkl", name) for name in names):
            fix = f"unpack it, or {RESAVE}"
            raise OtherKindError("a zip archive without a state dict", fix)
    elif _is_text(data[:200]) and not torch7.is_torch7(data):
        raise OtherKindError("text, not a checkpoint", "use another file")


def _is_text(head: bytes) -> bool:
    # Protocol 0 of pickle is text as well.
    return head.isascii() and b"\x00" not in head and head[:1] not in (b"\x80", b"(")
