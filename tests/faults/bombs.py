"""Measure what a call costs in time and memory; make small files that claim to be large."""

import gc
import gzip
import io
import pickle
import re
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

MB = 2**20
ALLOWED = 256 * MB  # beyond three times the size of the file


def cost(call: Callable[[], object]) -> tuple[float, int]:
    """Return the processor seconds that a call takes, and the bytes that it adds to memory."""

    def peak() -> int:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    before, since = peak(), time.process_time()
    call()
    return time.process_time() - since, peak() - before


def check_cost(path: Path, read: Callable, error: type[Exception] | tuple) -> tuple[float, int]:
    """Assert that a file is refused for little memory; processor seconds and bytes of memory.

    The bytes are those beyond three times the size of the file.
    """

    def refuse() -> None:
        with pytest.raises(error):
            read(path)

    seconds, memory = cost(refuse)
    memory -= 3 * path.stat().st_size
    assert memory <= ALLOWED
    return seconds, memory


def archive(pickled: bytes) -> bytes:
    """Make a file as torch.save writes it, with right checksums, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        entries.writestr("archive/data.pkl", pickled)
        entries.writestr("archive/version", b"3\n")
    return file.getvalue()


def old_format(pickled: bytes) -> bytes:
    """Make a file as torch.save wrote it before version 1.6, around any pickle."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    start = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, system)
    return b"".join(pickle.dumps(part, 2) for part in start) + pickled


def number(value: int) -> bytes:
    """Pickle a whole number."""
    data = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data


def list_of(item: bytes, count: int) -> bytes:
    """Pickle a list of as many new objects, a byte each."""
    return b"\x80\x02](" + item * count + b"e."


BYTES = b"\x80\x02cbuiltins\nbytearray\n" + number(2 * 10**9) + b"\x85R."  # two gigabytes in all
# A list of 100,000 zeros, counted 30,000 times: 1 is the list, 2 the counter.
COUNTING = (
    b"\x80\x02]q\x01(" + b"K\x00" * 100_000 + b"eccollections\nCounter\nq\x02"
    + b"h\x02h\x01\x85R" * 30_000 + b"."
)  # fmt: skip


UNKNOWN = b"\x80\x02cargparse\nNamespace\n)\x81"  # an object that torch.load refuses
# A list of 100,000 pairs, made a dict 3,000 times: 1 is the list, 2 the class.
PAIRS = b"".join(b"K\x00M" + struct.pack("<H", i % 2**16) + b"\x86" for i in range(100_000))
PAIRS = UNKNOWN + b"]q\x01(" + PAIRS + b"eccollections\nOrderedDict\nq\x02"
PAIRS += b"h\x02h\x01\x85R" * 3_000 + b"."


def many_entries(count: int) -> bytes:
    """Make a zip archive with as many entries of no bytes."""
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, *[0] * 9)
    name = b"a%07d"
    central = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, *[0] * 7, 8, *[0] * 6) + name % i
        for i in range(count)
    )
    shown = min(count, 0xFFFF)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, shown, shown, len(central), len(local), 0)
    return local + central + end


CHECKPOINTS = {
    "two gigabytes": lambda: archive(BYTES),
    "sets": lambda: archive(list_of(b"\x8f", 4 * MB)),
    "lists": lambda: archive(list_of(b"]", 4 * MB)),
    "marks": lambda: archive(b"\x80\x02" + b"(" * 4 * MB),
    "counting": lambda: archive(COUNTING),
    "entries": lambda: many_entries(200_000),
    "unknown class, lists": lambda: archive(UNKNOWN + list_of(b"]", 4 * MB)[2:]),
    "unknown class, marks": lambda: archive(UNKNOWN + b"(" * 4 * MB),
    "unknown class, dicts": lambda: archive(PAIRS),
    "old, zeros": lambda: old_format(BYTES),
    "old, dicts": lambda: old_format(list_of(b"}", 4 * MB)),
    "old, counting": lambda: old_format(COUNTING),
    "old, unknown class": lambda: old_format(UNKNOWN + list_of(b"}", 4 * MB)[2:]),
}


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: int = 0) -> bytes:
    """Make a PNG of one colour in very few bytes; only the first `rows` rows of it if not 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    bits = depth * {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    packer, row = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def scans(size: int, count: int) -> bytes:
    """Make a progressive JPEG whose last scan over all its pixels is repeated."""
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def enlarged(size: int, progressive: bool = False) -> bytes:
    """Make a JPEG of a few pixels whose header claims more."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", progressive=progressive)
    data = file.getvalue()
    return data.replace(struct.pack(">HH", 16, 16), struct.pack(">HH", size, size), 1)


IMAGES = {
    "50,000 x 50,000": lambda: png(50_000, 50_000, 1, 0, 100),
    "12,000 x 10,000": lambda: png(12_000, 10_000, 1, 0, 100),
    "8,192 x 8,192, cut": lambda: png(8192, 8192, 8, 2, 4000)[:-1000],
    "8,192 x 8,192 RGBA, cut": lambda: png(8192, 8192, 8, 6, 4000)[:-1000],
    "scans": lambda: scans(4000, 20_000),
    "JPEG, 60,000 x 60,000": lambda: enlarged(60_000),
    "progressive JPEG, 60,000 x 60,000": lambda: enlarged(60_000, progressive=True),
}


def tar_gz(*parts: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Pack an archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for header, data in parts:
            tar.addfile(header, io.BytesIO(data))
    return gzip.compress(file.getvalue(), 1, mtime=0)


def entry(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    """Make the header of a file in an archive."""
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    return made


def _packed(start: bytes, filler: bytes, count: int, end: bytes) -> bytes:
    """Compress `start`, `filler` so many times, and `end`, without having them in memory."""
    packer = zlib.compressobj(1, wbits=31)
    parts = [packer.compress(start), *(packer.compress(filler) for _ in range(count))]
    return b"".join([*parts, packer.compress(end)]) + packer.flush()


def archives(folder: str) -> dict[str, Callable[[], bytes]]:
    """Make bombs in the form of a dataset's archive."""
    long_file = entry(f"{folder}/data_batch_1", 300 * MB).tobuf()
    long_name = entry("././@LongLink", 600 * MB, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    return {
        "a long file": partial(_packed, long_file, bytes(MB), 300, bytes(1024)),
        "a long name": partial(
            _packed, long_name, b"a" * MB, 600, entry(folder).tobuf() + bytes(1024)
        ),
        "many files": lambda: tar_gz(*[(entry(f"{folder}/{i}"), b"") for i in range(5000)]),
    }


def _twice(i: int) -> bytes:
    return b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1)


YAML = {
    "[": lambda: b"[" * 10**6,
    "{": lambda: b"depth: " + b"{a: " * 10**6,
    "-": lambda: b"- " * 10**6,
    "steps": lambda: b"a:\n" + b"".join(b" " * i + b"a:\n" for i in range(1, 1400)),
    "keys": lambda: b"".join(b"depth%d: 1\n" % i for i in range(1400)),
    "many keys": lambda: b"depth: 1\n" * 10**6,
    "aliases": lambda: b"a0: &a0 [x, x]\n" + b"".join(map(_twice, range(1, 300))),
    "quotes": lambda: b'"' * 10**6,
}
