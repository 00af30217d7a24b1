"""Mutate inputs of every kind that the program reads, which it must read or refuse.

Each kind is a function of (random numbers, scratch directory) that makes one input and returns a
call that reads it, and what the call may raise. They run in a process of their own, which shows
when a library crashes.
"""

import contextlib
import gc
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoints
import fileio.archive
import main
import opts
from datasets.download import unpack
from datasets.file_loader import ImageFileDataset, Unreadable
from datasets.pipelines import LargeImages
from errors import CheckpointError, DataError, RunError, UsageError
from faults import bombs
from faults.contract import TINY, command, tiny
from faults.sabotage import no_fsync
from fileio import tensor_files
from helpers import foreign_files
from helpers.hostile_files import Call, repack
from tools.inference import sources

Case = tuple[Callable[[], object], type[Exception] | tuple]
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Change one to eight things."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        size = len(changed)
        offset, other = draw.randrange(size + 1), draw.randrange(size + 1)
        length = min(draw.choice((1, 4, 64, 4096)), size - offset)
        action = draw.randrange(7)
        if action == 0 and offset < size:
            changed[offset] ^= 1 << draw.randrange(8)
        elif action == 1:
            changed[offset : offset + length] = draw.randbytes(length)
        elif action == 2:
            changed[offset : offset + length] = bytes(length)
        elif action == 3:
            del changed[offset : offset + length]
        elif action == 4:
            changed[offset:offset] = changed[other : other + length]
        elif action == 5:
            number = draw.choice(NUMBERS).to_bytes(4, draw.choice(("little", "big")))
            changed[offset : offset + 4] = number
        elif action == 6 and draw.random() < 0.2:
            del changed[offset:]
    return bytes(changed)


@cache
def checkpoint_of(root: Path) -> Path:
    """Make a checkpoint, once."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(tiny(nEpochs=1, save=root / "run")) == 0
    return max((root / "run").glob("checkpoint_*.pt"))


def reading(path: Path, draw: random.Random) -> Case:
    return partial(draw.choice((checkpoints.load, checkpoints.load_weights)), path), CheckpointError


def checkpoint_bytes(draw: random.Random, root: Path) -> Case:
    """Mutate the file as a whole, with its digest or, as others write it, without."""
    data = checkpoint_of(root).read_bytes()
    path = root / "bytes.pt"
    if draw.random() < 0.7:
        length = len(fileio.archive.DIGEST_PREFIX) + 64
        data = data[: -length - 2] + bytes(2)
    path.write_bytes(mutated(data, draw))
    return reading(path, draw)


def checkpoint_pickle(draw: random.Random, root: Path) -> Case:
    """Mutate only the pickle in it, with right checksums around, or in the old format."""
    path = Path(shutil.copy(checkpoint_of(root), root / "pickle.pt"))
    with zipfile.ZipFile(path) as old:
        (name,) = [name for name in old.namelist() if name.endswith("data.pkl")]
        changed = mutated(old.read(name), draw)
    if draw.random() < 0.2:
        path.write_bytes(bombs.old_format(changed))
    else:
        repack(path, changed)
    return reading(path, draw)


@cache
def foreign_file(suffix: str, root: Path) -> bytes:
    """Make a file of another program, in a pickle with a call that would leave a mark."""
    call = {"call": Call(os.system, f"touch {root / 'executed'}")}
    write = foreign_files.FORMATS[suffix]
    return write(foreign_files.KERAS, **call if "p" in suffix else {})


def foreign_bytes(draw: random.Random, root: Path) -> Case:
    """Mutate weights in each format of another program; with checksums, what is inside of them."""
    # HDF5 is read in a process of its own, so it takes long.
    slow = (".h5", ".weights.h5", ".keras")
    suffix = draw.choice([s for s in foreign_files.FORMATS for _ in range(1 if s in slow else 3)])
    data, path = foreign_file(suffix, root), root / f"foreign{suffix}"
    inside = draw.random() < 0.7
    path.write_bytes(data if inside else mutated(data, draw))
    if suffix == ".pt" and inside:
        with zipfile.ZipFile(path) as old:
            (name,) = [name for name in old.namelist() if name.endswith("data.pkl")]
            changed = mutated(old.read(name), draw)
        repack(path, changed)
    elif suffix == ".keras" and inside:
        content = foreign_file(".weights.h5", root)
        path.write_bytes(foreign_files.keras_archive(mutated(content, draw)))
    elif inside:
        path.write_bytes(mutated(data, draw))
    return partial(read_foreign, path, root / "executed"), CheckpointError


def read_foreign(path: Path, marker: Path) -> None:
    """Read finite weights, or refuse a file in one line, and execute nothing."""
    try:
        weights = sources.read(path).weights
    except CheckpointError as error:
        assert re.fullmatch("error: [^\n]+; fix: [^\n]+", error.report()), error.report()
        raise
    finally:
        assert not marker.exists()
    assert all(tensor.isfinite().all() for tensor in weights.values())


VALUES = (None, True, -1, 0, 1, 2**31, 10**400, 0.5, float("nan"), float("inf"), "", "text", "1,2",
          "\udcff\n", b"bytes", [], [None], [[1.0] * 3] * 3, (), {}, {"a": {}}, {1: 2}, set(),
          complex(1, 1))  # fmt: skip


def odd_value(draw: random.Random, old: object) -> object:
    """Draw another value, sometimes of the same type."""
    if draw.random() < 0.3:
        shape = draw.choice(((), (1,), (3,), (0,), (5056,)))
        dtype = draw.choice((torch.uint8, torch.float32, torch.int64, torch.complex64, torch.bool))
        return torch.zeros(shape, dtype=dtype)
    if isinstance(old, int | float) and not isinstance(old, bool) and draw.random() < 0.5:
        return draw.choice((old + 1, -old, old * 10**6, type(old)(0)))
    return draw.choice(VALUES)


def checkpoint_contents(draw: random.Random, root: Path) -> Case:
    """Put other values in a sound file, down to the first step of a run that goes on with it."""
    state = checkpoints.load(checkpoint_of(root))
    for _ in range(draw.choice((1, 1, 2))):
        parent, key = state, draw.choice(list(state))
        while isinstance(parent[key], dict) and parent[key] and draw.random() < 0.8:
            parent, key = parent[key], draw.choice(list(parent[key]))
        if draw.random() < 0.2:
            del parent[key]
        elif draw.random() < 0.1:
            parent[draw.choice(("a", 1, "\udcff", "x" * 10**5))] = parent.pop(key)
        else:
            parent[key] = odd_value(draw, parent[key])
        if not state:
            break
    path = root / "contents.pt"
    path.write_bytes(tensor_files.to_bytes(state))
    flag = draw.choice(("resume", "retrain"))
    flags = TINY | {"nEpochs": 1, flag: path, "save": root / "other", "override": True}
    if flag == "resume" and draw.random() < 0.5:
        flags["testOnly"] = True
    return partial(program, command(**flags), root / "other"), Refused


class Refused(RunError):
    """Report that the program has ended with an error."""


def program(argv: list[str], save: Path) -> None:
    """Run the program here to its end, or raise Refused if it ends with an error line."""
    shutil.rmtree(save, ignore_errors=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(argv)
    errors = [line for line in err.getvalue().splitlines() if not line.startswith("note: ")]
    assert code in (0, 2, 3, 4), (code, err.getvalue())
    assert bool(errors) == bool(code), err.getvalue()
    assert all(line.startswith("error: ") and "; fix: " in line for line in errors), errors
    if code:
        raise Refused(errors[0], "")


MARKS = "\n\n  :-,[]{}&*!'\"#?\t|>%@`<\\\x07\u2028"


def config(draw: random.Random, root: Path) -> Case:
    """Mutate a config, or draw characters that mean something to YAML."""
    path = root / "c.yaml"
    words = [*opts.FLAGS, "paper", "<<", "!!python/object/apply:os.system", "&a", "*a", "0x1", "~"]
    if draw.random() < 0.5:
        lines = "".join(f"{name}: {draw.choice(VALUES[1:13])}\n" for name in draw.sample(words, 5))
        content = mutated(lines.encode("utf-8", "surrogateescape"), draw)
    else:
        parts = draw.choices([*MARKS, *words], k=draw.choice((5, 50, 2000)))
        content = "".join(parts).encode()
    path.write_bytes(content)
    return partial(opts.parse, ["--config", str(path)]), UsageError


@cache
def pictures() -> list[bytes]:
    """Make an image of each kind that Pillow writes."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    kinds = [
        (image, "JPEG", {"progressive": True}), (image.convert("CMYK"), "JPEG", {}),
        (image, "PNG", {}), (image.convert("P"), "PNG", {"transparency": 0}),
        (image.convert("1"), "PNG", {}), (image.convert("RGBA"), "PNG", {}),
        (image, "PNG", {"save_all": True, "append_images": [image] * 2}),
        (image, "GIF", {"save_all": True, "append_images": [image] * 2}), (image, "PPM", {}),
        (image, "WEBP", {}), (image.convert("P"), "BMP", {}), (image.convert("F"), "TIFF", {}),
        *((image, "TIFF", {"compression": f"tiff_{way}"}) for way in ("lzw", "deflate")),
    ]  # fmt: skip
    written = []
    for picture, kind, settings in kinds:
        file = io.BytesIO()
        picture.save(file, kind, **settings)
        written.append(file.getvalue())
    return written


def image(draw: random.Random, root: Path) -> Case:
    """Mutate an image; a reason why it cannot be read counts as a refusal."""
    path = root / "image"
    path.write_bytes(mutated(draw.choice(pictures()), draw))
    return partial(_read_image, path), DataError


def _read_image(path: Path) -> None:
    statistics = (0.0,) * 3, (1.0,) * 3
    pipeline = LargeImages(8, "antialias", statistics, torch.device("cpu"))
    sample = ImageFileDataset([(str(path), 0)], pipeline)[1, 0]
    if isinstance(sample, Unreadable):
        raise DataError(*sample)
    assert sample[0][0].shape == (1, 8, 8, 3)


def archive(draw: random.Random, root: Path) -> Case:
    """Mutate a packed archive, or the plain one in it, so that its headers are well packed."""
    folder = root / "archives"
    folder.mkdir(exist_ok=True)
    entries = [(bombs.entry(f"data/{i}", 2000), draw.randbytes(2000)) for i in range(4)]
    entries += [(bombs.entry("data/" + "long" * 50, 5), b"12345")]
    data = bombs.tar_gz(*entries)
    if draw.random() < 0.7:
        data = gzip.compress(mutated(gzip.decompress(data), draw), 1)
    else:
        data = mutated(data, draw)
    path = folder / "archive.tar.gz"
    path.write_bytes(data)
    return partial(_unpack, path), DataError


def _unpack(path: Path) -> None:
    before, folder = set(path.parent.parent.iterdir()), path.parent / "data"
    try:
        unpack(path, folder.name)
        for item in folder.rglob("*"):
            assert not item.is_symlink() and (item.is_file() or item.is_dir()), item
    finally:
        assert set(path.parent.parent.iterdir()) == before
        assert {item.name for item in path.parent.iterdir()} <= {folder.name, path.name}
        shutil.rmtree(folder, ignore_errors=True)


KINDS = {
    kind.__name__: kind
    for kind in (
        *(checkpoint_bytes, checkpoint_pickle, checkpoint_contents, foreign_bytes),
        *(config, image, archive),
    )
}


def fuzz(kind: str, root: Path, seed: int, count: int, seconds: float, report: Path) -> None:
    """Try inputs until there were `count` or `seconds` have gone; write down what they cost.

    The report is rewritten before each input, with its number, so that a crash can be repeated.
    """
    torch.set_num_threads(1)
    gc.freeze()  # what is there already need not be looked at each time
    if kind == "checkpoint_contents":  # a whole program, which would wait for the disk
        no_fsync()
    end, said = time.monotonic() + seconds, {"count": 0, "refused": 0, "slowest_s": 0.0, "mb": 0.0}
    while said["count"] < count and time.monotonic() < end:
        draw = random.Random(f"{kind} {seed} {said['count']}")
        call, allowed = KINDS[kind](draw, root)
        refused = []

        def attempt(call=call, allowed=allowed, refused=refused) -> None:
            try:
                call()
            except allowed as error:
                refused.append(error.report())

        report.write_text(json.dumps(said))
        took_s, size = bombs.cost(attempt)
        said["count"] += 1
        said["slowest_s"] = max(said["slowest_s"], took_s)
        if refused:
            said["refused"] += 1
            said["mb"] = max(said["mb"], size / bombs.MB)
    report.write_text(json.dumps(said | {"done": True}))


def fuzz_apart(kind: str, root: Path, seed: int, count: int = 10**9, seconds: float = 600) -> dict:
    """Run `fuzz` in a process of its own, which must not crash; return its report."""
    report = root / "report.json"
    arguments = (kind, root, seed, count, seconds, report)
    process = multiprocessing.get_context("forkserver").Process(target=fuzz, args=arguments)
    process.start()
    process.join(seconds + 120)
    if process.exitcode is None:
        process.kill()
    said = json.loads(report.read_text())
    where = f"input {said['count']} of {kind}, seed {seed}"
    assert process.exitcode == 0 and said["done"], f"{where}: {process.exitcode}"
    return said
