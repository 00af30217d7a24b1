"""Test which files of a folder count as images, and that the list of them costs workers nothing."""

import gc
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets import file_loader
from datasets.batch_sampler import BatchSampler
from datasets.decode import decode
from datasets.file_list import FileList, find_image_files, is_hidden, unread_note
from datasets.pipelines import SmallImages
from datasets.registry import DATASETS
from helpers.sample_data import noise

LIMIT_MB = 30
IMAGENET = DATASETS["imagenet"].num_images[0]


def made_up(count: int):
    """Yield paths as long as ImageNet's, 1300 of each class; there are no such files."""
    for i in range(count):
        name = f"n{i // 1300:08}"
        yield f"/data/imagenet/train/{name}/{name}_{i % 1300}.JPEG", i // 1300


def test_a_list_of_files_holds_what_a_list_of_tuples_holds():
    files = [*made_up(1400), ("", 3), ("/Ölkännchen/\udcff\n.png", 0)]
    found = FileList(iter(files))
    assert list(found) == files and len(found) == len(files) and found[-1] == files[-1]
    assert list(pickle.loads(pickle.dumps(found))) == files
    assert not FileList([])
    with pytest.raises(IndexError):
        found[len(files)]


HIDDEN = [
    ".ipynb_checkpoints", ".thumbnails", ".DS_Store", "._001.png", ".hidden.jpg", "@eaDir",
    "@EADIR", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle",
    "@Recycle", "Thumbs.db", "desktop.ini", "Desktop.ini", "RECYCLER", "FOUND.000", "found.017",
    "@__thumb", "@SynoResource", "ehthumbs_vista.db", "TheVolumeSettingsFolder", "__pycache__",
    "~$x.png",
]  # fmt: skip
VISIBLE = [
    "n01440764", "a.b", "_001.png", "recycle", "@home", "001.png", "Macosx", "lost", "~", "found",
    "found.1", "~x.png", "$x.png",
]  # fmt: skip


@pytest.mark.parametrize("name", [*HIDDEN, *VISIBLE])
def test_what_is_hidden_or_of_a_system_is_known_by_its_name(name):
    assert is_hidden(name) == (name in HIDDEN)


# By the manuals of the formats.
SUFFIXES = "jpg jpeg jpe jfif mpo png apng gif bmp tif tiff webp ppm pgm pbm pnm"


@pytest.mark.parametrize("suffix", [f".{name}" for name in SUFFIXES.split()])
def test_every_suffix_of_a_format_that_can_be_decoded_is_taken(suffix, tmp_path):
    pixels = noise(1, 8)[0] // 128 * 255
    for name in (f"a{suffix}", f"b{suffix.upper()}"):
        picture = Image.fromarray(pixels)
        picture = picture.convert("1") if suffix == ".pbm" else picture
        more = {"save_all": True, "append_images": [picture]} if suffix == ".mpo" else {}
        picture.save(tmp_path / name, **more)
        assert decode(tmp_path / name)[0].size == (8, 8)
    unread = Counter()
    assert [Path(path).name for path in find_image_files(tmp_path, unread)] == [
        f"a{suffix}", f"b{suffix.upper()}"
    ]  # fmt: skip
    assert not unread


def test_files_that_are_not_read_are_counted_by_suffix_and_hidden_ones_are_not(tmp_path):
    (tmp_path / "more" / "@eaDir").mkdir(parents=True)
    (tmp_path / ".thumbnails").mkdir()
    for name in ("a.heic", "B.HEIC", "more/c.heic", "notes.txt", "Makefile", "Thumbs.db", "._a.png",
                 "more/@eaDir/a.png", ".thumbnails/b.png", "more/1.png", "0.png"):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    unread = Counter()
    found = find_image_files(tmp_path, unread)
    assert found == [str(tmp_path / "0.png"), str(tmp_path / "more" / "1.png")]
    assert unread_note(unread) == "5 files are not read: 3 .heic, 1 .txt, 1 without suffix"
    assert unread_note(Counter({".txt": 1})) == "1 file is not read: 1 .txt"
    many = Counter({f".{i}": 9 - i for i in range(9)})
    assert unread_note(many).endswith(": 9 .0, 8 .1, 7 .2, 6 .3, 5 .4, ...")


def private_mb(pid: int) -> float:
    """Read the memory in MB of a process that no other process shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_\w+: +(\d+) kB", text, re.M)) / 1000


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux counts pages")
@pytest.mark.parametrize(
    ("count", "every"),
    # Every tenth path lies on the same pages of memory as all of them.
    [(IMAGENET // 4, 10), pytest.param(IMAGENET, 1, marks=pytest.mark.soak)],
)
@pytest.mark.parametrize("kind", [list, FileList])
def test_the_list_of_files_costs_a_loader_process_nothing(
    kind, count, every, monkeypatch, measured
):
    pixels, collected = torch.zeros(1, 1, 1, 3), []

    def prepare(*_: object) -> tuple[torch.Tensor]:
        if not collected:  # once in each process, as Python itself does at some time
            collected.append(gc.collect())
        return (pixels,)

    monkeypatch.setattr(SmallImages, "read", lambda *_: (None, []))
    monkeypatch.setattr(SmallImages, "prepare", prepare)
    loader = file_loader.FileLoader(
        kind(made_up(count)),
        SmallImages(1),
        BatchSampler(torch.arange(0, count, every), 256, seed=0),
        num_workers=2,  # what only this process and one other share would count as the other's
        unreadable=file_loader.UnreadableImages("error", count, pytest.fail),
        device=torch.device("cpu"),
    )
    loader.start()
    pids = [worker.pid for worker in loader._loader._iterator._workers]
    before = [private_mb(pid) for pid in pids]
    try:
        assert sum(len(targets) for _, targets in loader.batches(1)) == -(-count // every)
        grown = max(private_mb(pid) - mb for pid, mb in zip(pids, before, strict=True))
    finally:
        loader._loader._iterator._shutdown_workers()
    what = f"growth of a loader process in an epoch of {count} paths in a {kind.__name__}, MB"
    limit = f"< {LIMIT_MB}" if kind is FileList else ""
    measured("G21", what, grown, limit)
    assert (grown < LIMIT_MB) == (kind is FileList)
