"""Rows 38, 43, 45, 50, 51 and 52: downloads, odd images and odd trees of files."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import checkpoints
from datasets.decode import decode
from faults.contract import outcome, records, refused, saved, tiny
from faults.sabotage import at_batch, environment, kill
from faults.test_faults_data import CIFAR, FOLDER, LARGE, SMALL, archive, entry, folder, photographs
from helpers.run_main import ROOT, run


@pytest.fixture
def root(tmp_path) -> Path:
    return photographs(tmp_path / "data")


# Row 38.


def test_a_set_smaller_than_a_batch_is_one_step_of_all_its_images(tmp_path):
    for name, size in (("larger", 8), ("equal", 5)):
        argv = tiny(nImages=5, batchSize=size, nEpochs=2, save=tmp_path / name)
        assert run(argv).code == 0
    larger, equal = (outcome(tmp_path / name) for name in ("larger", "equal"))
    assert larger["checkpoint"] == "checkpoint_000000002.pt"  # two steps in two epochs
    assert larger["weights"] == equal["weights"] and larger["log"] == equal["log"]


# Row 43.

DATA = archive(entry(f"{FOLDER}/data_batch_1", size=10_000))


class Server:
    """A server that answers the n-th request in the n-th way, and later ones in the last."""

    def __init__(self, *answers: Callable[[BaseHTTPRequestHandler], None]):
        self.answers, self.asked, self.over = list(answers), 0, threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = server.answers[min(server.asked, len(server.answers) - 1)]
                server.asked += 1
                answer(self, server)

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
    handler.send_header("Content-Length", str(len(DATA)))
    handler.end_headers()
    handler.wfile.write(data)


def stall(handler: BaseHTTPRequestHandler, server: Server) -> None:
    send(DATA[:100], handler, server)
    handler.wfile.flush()
    server.over.wait()


def fail(handler: BaseHTTPRequestHandler, server: Server) -> None:
    handler.send_error(503)


MD5 = hashlib.md5(DATA).hexdigest()
whole, half = partial(send, DATA), partial(send, DATA[:100])


def download_from(url: str, md5: str) -> None:
    """Take a server of the test for the official one, and be impatient with it."""
    from torchvision.datasets import CIFAR10

    from datasets import download

    CIFAR10.url, CIFAR10.tgz_md5 = url, md5
    download.TIMEOUT_S, download.RETRY_DELAY_S = 0.3, 0.01


@pytest.mark.parametrize("answer", [half, stall, fail], ids=["drops", "stalls", "fails"])
def test_a_download_is_tried_three_times_and_never_taken_for_whole(tmp_path, answer):
    root = tmp_path / "data"
    argv = tiny(**CIFAR, data=root, save=tmp_path / "run")
    with Server(answer) as server:
        result = run(argv, partial(download_from, server.url, MD5))
    pattern = rf"cannot download {server.url} in 3 tries: .*; fix: put the file at {root}/cifar-10"
    refused(result, 3, pattern)
    assert server.asked == 3
    assert list(root.iterdir()) == []


def test_a_download_that_succeeds_the_third_time_is_used(tmp_path):
    argv = tiny(**CIFAR, data=tmp_path / "data", save=tmp_path / "run")
    with Server(half, stall, whole) as server:
        result = run(argv, partial(download_from, server.url, MD5))
    refused(
        result, 3, "damaged files in .*; fix: delete"
    )  # it was unpacked; it is not all of CIFAR
    assert (tmp_path / "data" / "cifar-10-python.tar.gz").read_bytes() == DATA


def test_no_server_is_one_line(tmp_path):
    with Server(whole) as server:
        pass
    argv = tiny(**CIFAR, data=tmp_path / "data", save=tmp_path / "run")
    result = run(argv, partial(download_from, server.url, MD5))
    refused(result, 3, rf"cannot download {server.url} in 3 tries: .*refused.*; fix: put the file")
    assert list((tmp_path / "data").iterdir()) == []


# Row 45.

PHOTO = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)


def cmyk(image: Image.Image, path: Path) -> None:
    image.convert("CMYK").save(path.with_suffix(".jpg"))


def grey(image: Image.Image, path: Path) -> None:
    image.convert("L").save(path)


def transparent(image: Image.Image, path: Path) -> None:
    image.convert("RGBA").save(path)


def deep(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def animated(image: Image.Image, path: Path) -> None:
    still = Image.new("RGB", image.size)
    image.save(path.with_suffix(".webp"), save_all=True, append_images=[still], lossless=True)


def animated_png(image: Image.Image, path: Path) -> None:
    image.save(path, save_all=True, append_images=[Image.new("RGB", image.size)])


def rotated(image: Image.Image, path: Path) -> None:
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    image.save(path, exif=exif)


def misnamed(image: Image.Image, path: Path) -> None:
    image.save(path.with_suffix(".JPEG"), format="PNG")


WRITERS = [cmyk, grey, transparent, deep, animated, animated_png, rotated, misnamed]


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_images_of_every_kind_train_alike_each_time(tmp_path, size):
    root = photographs(tmp_path / "data")
    for split in ("train", "val"):
        for i, write in enumerate(WRITERS):
            write(Image.fromarray(PHOTO), root / split / "dog" / f"odd{i}.png")
    outcomes = []
    for name, workers in (("one", 0), ("two", 1)):
        argv = folder(root, **size | {"nThreads": workers, "nEpochs": 1}, save=tmp_path / name)
        result = run(argv)
        assert result.code == 0, result
        outcomes.append(outcome(tmp_path / name))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("write", [animated, animated_png, rotated])
def test_of_an_animation_the_first_picture_counts_and_rotation_is_not_applied(tmp_path, write):
    """Parity: Lua's image.load and torchvision read the pixels as they are stored."""
    write(Image.fromarray(PHOTO), tmp_path / "image.png")
    (path,) = tmp_path.iterdir()
    image = decode(path)
    assert image.size == (90, 80)
    assert np.array_equal(np.asarray(image), PHOTO)
    assert np.array_equal(np.asarray(decode(path)), np.asarray(image))


def test_a_picture_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """Pillow hands PostScript, whatever the file is called, to Ghostscript."""
    marker, tools = tmp_path / "executed", tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tools / "gs").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    root = photographs(tmp_path / "data")
    picture = root / "train" / "cat" / "1.png"
    picture.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n%%EndComments\n%%EOF\n"
    )
    refused(run(folder(root, **SMALL), partial(environment, PATH=path)), 3, f"image {picture}")
    assert not marker.exists()
    code = f"from PIL import Image; Image.open({str(picture)!r}).load()"
    harm = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PATH": path},
                          stderr=subprocess.DEVNULL)  # fmt: skip
    assert harm.returncode and marker.exists()


# Row 50.


def link(name: str, target: str, root: Path) -> None:
    (root / "train" / "cat" / name).symlink_to(target)


def two_loops(root: Path) -> None:
    """Each doubles the number of ways into the other: 2^40 of them up to the system's limit."""
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
    refused(run(folder(root, **LARGE), timeout_s=60), 3, pattern)
    assert not list((root.parent / "run").glob("*.pt"))


def test_links_that_lead_somewhere_are_followed(root, tmp_path):
    plain = folder(root, **SMALL, save=tmp_path / "plain")
    assert run(plain).code == 0
    shutil.move(root / "train" / "cat", tmp_path / "cat")
    (root / "train" / "cat").symlink_to(tmp_path / "cat")
    picture = root / "val" / "dog" / "0.png"
    shutil.move(picture, tmp_path / "picture")
    picture.symlink_to(tmp_path / "picture")
    assert run(folder(root, **SMALL, save=tmp_path / "linked")).code == 0
    assert outcome(tmp_path / "linked") == outcome(tmp_path / "plain")


# Row 51.


def edit_an_image(root: Path) -> None:
    Image.new("RGB", (80, 80)).save(root / "train" / "dog" / "2.png")


def rename_an_image(root: Path) -> None:
    (root / "train" / "dog" / "2.png").rename(root / "train" / "dog" / "9.png")


def edit_a_test_image(root: Path) -> None:
    Image.new("RGB", (80, 80)).save(root / "val" / "dog" / "1.png")


def add_an_image(root: Path) -> None:
    Image.new("RGB", (80, 80)).save(root / "train" / "dog" / "new.png")


CHANGES = [
    (SMALL, edit_an_image, "mean .*, was .*, training_set", True),
    (SMALL, edit_a_test_image, "test_set", True),
    (SMALL, add_an_image, "train 9, was 8", False),
    (LARGE, edit_an_image, "training_set", True),
    (LARGE, rename_an_image, "training_set", True),
    (LARGE, add_an_image, "train 9, was 8", False),
]


@pytest.mark.parametrize(("size", "change", "pattern", "may"), CHANGES)
def test_a_dataset_that_has_changed_is_refused_unless_it_is_overridden(
    root, size, change, pattern, may
):
    directory = root.parent / "run"
    argv = folder(root, **size | {"nEpochs": 3})
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
    flags = LARGE | {"nEpochs": 2, "save": tmp_path / "run"}
    assert run(folder(root, **flags), partial(at_batch, kill, 6)).code < 0
    root.rename(tmp_path / "moved")
    assert run(folder(tmp_path / "moved", **flags, resume="auto")).code == 0


# Row 52.

NAMES = ["with space", "line\nbreak", "Ölkännchen", "x" * 255, "\udcff\udc80", "\x1b[31m", "%s"]


def rename_classes(root: Path) -> Iterator[tuple[Path, str]]:
    for split in ("train", "val"):
        for name, new in zip("abcdefg", NAMES, strict=True):
            yield root / split / name, new


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_any_name_works_and_none_breaks_a_line(tmp_path, size):
    root = photographs(tmp_path / "data", "a b c d e f g")
    for path, new in rename_classes(root):
        (path / "0.png").rename(path / f"{new[:200]}.png")
        path.rename(path.with_name(new))
    odd = root.rename(tmp_path / "\udcff é\n")
    directory = tmp_path / "run \udcff\n"
    again = {"nEpochs": 2, "resume": "auto"}
    for more in ({"nEpochs": 1}, again, again):
        result = run(folder(odd, **size | more, save=directory))
        assert result.code == 0, result
    assert len(records(directory)) == 2
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["data"] == str(odd)
    bad = odd / "train" / NAMES[1] / "3.png"
    bad.write_bytes(b"")
    result = run(folder(odd, **size, save=tmp_path / "other"))
    refused(result, 3, r"cannot read image .*\\udcff.*line\\nbreak/3.png")


def test_a_terminal_of_another_language_makes_no_difference(tmp_path):
    """LC_ALL=C, where Python would read and print ASCII, in a process of its own."""
    root = photographs(tmp_path / "é", "a Ö")
    argv = folder(root, **SMALL | {"nEpochs": 1}, save=tmp_path / "run é")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([sys.executable, "main.py", *argv], cwd=ROOT, capture_output=True,
                            env=os.environ | plain, timeout=120)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert run(folder(root, **SMALL | {"nEpochs": 1}, save=tmp_path / "here")).code == 0
    assert outcome(tmp_path / "run é")["weights"] == outcome(tmp_path / "here")["weights"]
