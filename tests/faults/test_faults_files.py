"""Rows 38, 43, 45, 50, 51 and 52: downloads, odd images and odd trees of files."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import checkpoints
from datasets.decode import decode
from faults.contract import outcome, records, refused, saved, tiny, write_files
from faults.sabotage import at_batch, environment, kill, shorten
from faults.test_faults_data import CIFAR, LARGE, SIZES, SMALL, WHOLE, folder, md5
from helpers.run_main import ROOT, run
from helpers.sample_data import noise

# Row 38.


def test_a_set_smaller_than_a_batch_is_one_step_of_all_its_images(tmp_path):
    for name, size in (("larger", 8), ("equal", 5)):
        argv = tiny(nImages=5, batchSize=size, nEpochs=2, save=tmp_path / name)
        assert run(argv).code == 0
    larger, equal = (outcome(tmp_path / name) for name in ("larger", "equal"))
    assert larger["checkpoint"] == "checkpoint_000000002.pt"  # two steps in two epochs
    assert larger["weights"] == equal["weights"] and larger["log"] == equal["log"]


# Row 43.


class Server:
    """A server that answers the n-th request in the n-th way, and later ones in the last."""

    def __init__(self, *answers: Callable[[BaseHTTPRequestHandler, "Server"], None]):
        self.asked, self.over = 0, threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                answers[min(server.asked, len(answers)) - 1](self, server)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/cifar-10-python.tar.gz"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


def send(data: bytes, handler: BaseHTTPRequestHandler, server: Server) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(WHOLE)))
    handler.end_headers()
    handler.wfile.write(data)


def stall(handler: BaseHTTPRequestHandler, server: Server) -> None:
    send(WHOLE[:100], handler, server)
    handler.wfile.flush()
    server.over.wait()


def fail(handler: BaseHTTPRequestHandler, server: Server) -> None:
    handler.send_error(503)


whole, half = partial(send, WHOLE), partial(send, WHOLE[:100])


def download_from(url: str, stalled_s: float) -> None:
    """Take a server of the test for the official one, and be impatient with it."""
    from torchvision.datasets import CIFAR10

    CIFAR10.url, CIFAR10.tgz_md5 = url, md5(WHOLE)
    shorten({"wait for a server": stalled_s, "pause between downloads": 0.01})


def download(root: Path, server: Server, stalled_s: float = 60):
    argv = tiny(**CIFAR, data=root, save=root.parent / "run")
    return run(argv, partial(download_from, server.url, stalled_s))


@pytest.mark.parametrize(
    ("answer", "stalled_s"),
    [(half, 60), (stall, 0.3), (fail, 60)],
    ids=["drops", "stalls", "fails"],
)
def test_a_download_is_tried_three_times_and_never_taken_for_whole(tmp_path, answer, stalled_s):
    root = tmp_path / "data"
    with Server(answer) as server:
        result = download(root, server, stalled_s)
    pattern = rf"cannot download {server.url} in 3 tries: .*; fix: put the file at {root}/cifar-10"
    refused(result, 3, pattern)
    assert server.asked == 3
    assert list(root.iterdir()) == []


def test_a_download_that_succeeds_the_third_time_is_used(tmp_path):
    with Server(half, fail, whole) as server:
        result = download(tmp_path / "data", server)
    # It was unpacked; it is not all of CIFAR.
    refused(result, 3, "damaged files in .*; fix: delete")
    assert (tmp_path / "data" / "cifar-10-python.tar.gz").read_bytes() == WHOLE


def test_no_server_is_one_line(tmp_path):
    with Server(whole) as server:
        pass
    result = download(tmp_path / "data", server)
    refused(result, 3, rf"cannot download {server.url} in 3 tries: .*refused.*; fix: put the file")
    assert list((tmp_path / "data").iterdir()) == []


# Row 45.

PHOTO = noise(1, 90)[0, :80]  # (80, 90, 3)


def save(image: Image.Image, path: Path, **settings: object) -> None:
    image.save(path, **settings)


def deep(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def animated(image: Image.Image, path: Path, **settings: object) -> None:
    image.save(path, save_all=True, append_images=[Image.new("RGB", image.size)], **settings)


def rotated(image: Image.Image, path: Path) -> None:
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    image.save(path, exif=exif)


STORED = {
    "animated.webp": partial(animated, lossless=True),
    "animated.png": animated,
    "rotated.png": rotated,
}  # as they are; the others lose something
KINDS = STORED | {
    "cmyk.jpg": lambda image, path: save(image.convert("CMYK"), path),
    "grey.png": lambda image, path: save(image.convert("L"), path),
    "transparent.png": lambda image, path: save(image.convert("RGBA"), path),
    "deep.png": deep,
    "misnamed.JPEG": partial(save, format="PNG"),
}


@SIZES
def test_images_of_every_kind_train_alike_each_time(root, tmp_path, size):
    for split in ("train", "val"):
        for name, write in KINDS.items():
            write(Image.fromarray(PHOTO), root / split / "dog" / name)
    outcomes = []
    for workers in (0, 1):
        directory = tmp_path / str(workers)
        result = run(folder(root, size, nThreads=workers, nEpochs=1, save=directory))
        assert result.code == 0, result
        outcomes.append(outcome(directory))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", STORED)
def test_of_an_animation_the_first_picture_counts_and_rotation_is_not_applied(tmp_path, name):
    """Parity: Lua's image.load and torchvision read the pixels as they are stored."""
    path = tmp_path / name
    STORED[name](Image.fromarray(PHOTO), path)
    for _ in range(2):
        assert np.array_equal(np.asarray(decode(path)), PHOTO)


def test_a_picture_that_is_a_program_is_not_run(root, tmp_path):
    """Pillow hands PostScript, whatever the file is called, to Ghostscript."""
    marker, tools = tmp_path / "executed", tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tools / "gs").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    picture = root / "train" / "cat" / "0001.png"
    picture.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n%%EndComments\n%%EOF\n"
    )
    refused(run(folder(root, SMALL), partial(environment, PATH=path)), 3, f"image {picture}")
    assert not marker.exists()


# Row 50.


def link(name: str, target: str, root: Path) -> None:
    (root / "train" / "cat" / name).symlink_to(target)


def two_loops(root: Path) -> None:
    """Double the number of ways into each by the other: 2^40 of them up to the system's limit."""
    link("a", ".", root)
    link("b", ".", root)


def pipe(root: Path) -> None:
    os.mkfifo(root / "train" / "cat" / "pipe.png")


TREES = {
    "loop": (partial(link, "a", "."), "cat/a is a link to a directory listed before; fix: remove"),
    "loops": (two_loops, "cat/[ab] is a link to a directory listed before"),
    "loop above": (partial(link, "up", "../.."), "is a link to a directory listed before"),
    "dangling": (partial(link, "a.png", "gone.png"), "cannot read image .*a.png: .*No such file"),
    "itself": (partial(link, "a.png", "a.png"), "cannot read image .*a.png: .*Too many levels"),
    "pipe": (pipe, "cannot read image .*pipe.png: not a regular file"),
    "device": (partial(link, "a.png", "/dev/zero"), "image .*a.png: not a regular file"),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_with_what_is_no_image_is_refused(root, name):
    spoil, pattern = TREES[name]
    spoil(root=root)
    refused(run(folder(root)), 3, pattern)
    assert not list((root.parent / "run").glob("*.pt"))


def test_links_that_lead_somewhere_are_followed(root, tmp_path):
    assert run(folder(root, SMALL, save=tmp_path / "plain")).code == 0
    for path in (root / "train" / "cat", min((root / "val" / "dog").iterdir())):
        path.symlink_to(shutil.move(path, tmp_path / path.name))
    assert run(folder(root, SMALL, save=tmp_path / "linked")).code == 0
    assert outcome(tmp_path / "linked") == outcome(tmp_path / "plain")


# Row 51.


def blank(name: str, root: Path) -> None:
    """Write an image, new or in place of another."""
    Image.new("RGB", (80, 80)).save(root / name)


def rename(old: str, new: str, root: Path) -> None:
    (root / old).rename(root / new)


CHANGES = [
    (SMALL, partial(blank, "train/dog/0005.png"), "mean .*, was .*, training_set", True),
    (SMALL, partial(blank, "val/dog/0003.png"), "test_set", True),
    (SMALL, partial(blank, "train/dog/new.png"), "train 9, was 8", False),
    (LARGE, partial(blank, "train/dog/0005.png"), "training_set", True),
    (LARGE, partial(rename, "train/dog/0005.png", "train/dog/9.png"), "training_set", True),
    (LARGE, partial(blank, "train/dog/new.png"), "train 9, was 8", False),
]


@pytest.mark.parametrize(("size", "change", "pattern", "may"), CHANGES)
def test_a_dataset_that_has_changed_is_refused_unless_it_is_overridden(
    root, size, change, pattern, may
):
    directory = root.parent / "run"
    argv = folder(root, size, nEpochs=3)
    assert run(argv, partial(at_batch, kill, 6)).code < 0  # in the second epoch
    before = saved(directory)
    change(root)
    fix = "restore the data, or start another run.*" + "--override true" * may
    pattern = f"data is not the checkpoint's: .*{pattern}"
    refused(run([*argv, "--resume=auto"]), 4, f"{pattern}.*; fix: {fix}$")
    assert saved(directory) == before
    result = run([*argv, "--resume=auto", "--override=true"])
    if not may:
        refused(result, 4, pattern)
        return
    assert result.code == 0 and "note: override: " in result.err
    overrides = checkpoints.load_latest(directory, pytest.fail)["overrides"]
    assert overrides and all(change.startswith("epoch 2 step 0: data ") for change in overrides)
    assert run([*argv, "--resume=auto"]).code == 0  # now it is the run's own


def test_a_dataset_that_has_only_moved_is_the_same(root, tmp_path):
    assert run(folder(root), partial(at_batch, kill, 6)).code < 0
    root.rename(tmp_path / "moved")
    assert run(folder(tmp_path / "moved", resume="auto")).code == 0


# Row 52.

NAMES = ["with space", "line\nbreak", "Ölkännchen", "x" * 255, "\udcff\udc80", "\x1b[31m", "%s"]


@SIZES
def test_any_name_works_and_none_breaks_a_line(tmp_path, size):
    root = write_files(tmp_path / "data", 4, classes="a b c d e f g")
    for split in ("train", "val"):
        for old, new in zip("abcdefg", NAMES, strict=True):
            path = root / split / old
            first = min(path.iterdir())
            first.rename(path / f"{new[:200]}.png")
            path.rename(path.with_name(new))
    odd = root.rename(tmp_path / "\udcff é\n")
    directory = tmp_path / "run \udcff\n"
    for more in ({"nEpochs": 1}, {"resume": "auto"}, {"resume": "auto"}):
        result = run(folder(odd, size, save=directory, **more))
        assert result.code == 0, result
    assert len(records(directory)) == 2
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["data"] == str(odd)
    bad = max((odd / "train" / NAMES[1]).glob("0*.png"))
    bad.write_bytes(b"")
    result = run(folder(odd, size, save=tmp_path / "other"))
    refused(result, 3, rf"cannot read image .*\\udcff.*line\\nbreak/{bad.name}")


def test_a_terminal_of_another_language_makes_no_difference(tmp_path):
    """LC_ALL=C, where Python would read and print ASCII, in a process of its own."""
    root = write_files(tmp_path / "é", 4, classes="a Ö")
    flags = {"nEpochs": 1}
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "main.py", *folder(root, SMALL, save=tmp_path / "run é", **flags)],
        cwd=ROOT, capture_output=True, env=os.environ | plain,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert run(folder(root, SMALL, save=tmp_path / "here", **flags)).code == 0
    assert outcome(tmp_path / "run é")["weights"] == outcome(tmp_path / "here")["weights"]
