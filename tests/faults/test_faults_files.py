"""Test rows 38, 43, 45, 50, 51 and 52: downloads, odd images and odd trees of files."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import checkpoints
from datasets.decode import DEFAULTS, decode
from datasets.regions import Box, Region, decode_region
from faults.contract import outcome, records, refused, saved, tiny, write_files
from faults.sabotage import at_batch, environment, kill, send, shorten
from faults.test_faults_data import CIFAR, LARGE, SMALL, WHOLE, folder, md5, rename
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

OK = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(WHOLE)


def download(tmp_path: Path, listener: socket.socket, stalled_s: float = 60):
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/cifar-10-python.tar.gz"
    argv = tiny(**CIFAR, data=tmp_path / "data", save=tmp_path / "run")
    return url, run(argv, partial(download_from, url, stalled_s))


def download_from(url: str, stalled_s: float) -> None:
    """Use a server of the test as the official one, with short time limits."""
    from torchvision.datasets import CIFAR10

    CIFAR10.url, CIFAR10.tgz_md5 = url, md5(WHOLE)
    shorten({"wait for a server": stalled_s, "pause between downloads": 0.01})


def answer_each(listener: socket.socket, answers: list[bytes]) -> None:
    for answer in answers:
        connection, _ = listener.accept()
        with connection:
            connection.recv(2**16)
            connection.sendall(answer)


def test_a_download_that_fails_twice_is_tried_again(tmp_path):
    answers = [OK + WHOLE[:100], b"HTTP/1.0 503 Busy\r\n\r\n", OK + WHOLE]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_each, args=(listener, answers), daemon=True).start()
        _, result = download(tmp_path, listener)
    # It was unpacked; it is not all of CIFAR.
    refused(result, 3, "damaged files in .*; fix: delete")
    assert (tmp_path / "data" / "cifar-10-python.tar.gz").read_bytes() == WHOLE


def test_a_server_that_says_nothing_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url, result = download(tmp_path, listener, 0.3)
    file = tmp_path / "data" / "cifar-10-python.tar.gz"
    refused(
        result, 3, f"cannot download {url} in 3 tries: .*timed out.*; fix: put the file at {file}"
    )
    assert list(file.parent.iterdir()) == []


# Row 45.


def animated(image: Image.Image, path: Path, **settings: object) -> None:
    image.save(path, save_all=True, append_images=[Image.new("RGB", image.size)], **settings)


def rotated(image: Image.Image, path: Path) -> None:
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    image.save(path, exif=exif)


@pytest.mark.parametrize(
    ("name", "write", "mode"),
    [
        ("animated.webp", partial(animated, lossless=True), "RGB"),
        ("animated.png", animated, "RGB"),
        ("rotated.png", rotated, "RGB"),
        ("cmyk.tiff", Image.Image.save, "CMYK"),
    ],
)
def test_images_of_every_kind_are_read_as_they_are_stored(tmp_path, name, write, mode):
    """Read the first picture of an animation; apply no rotation, as in Lua and torchvision."""
    pixels, path = noise(1, 90)[0, :80], tmp_path / name
    write(Image.fromarray(pixels).convert(mode), path)
    for _ in range(2):
        assert np.array_equal(np.asarray(decode(path)[0]), pixels)
        region = decode_region(path, DEFAULTS, lambda *size: Region(Box(0, 0, *size)))
        assert np.array_equal(region.pixels, pixels)


def test_a_picture_that_is_a_program_is_not_run(root, tmp_path):
    """Check that decode() hands no PostScript to Ghostscript, as Pillow does for any file name."""
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


CHANGES = [
    (SMALL, partial(blank, "val/dog/0003.png"), "other test images", True),
    (LARGE, partial(rename, "train/dog/0005.png", "train/dog/9.png"), "other training im", True),
    (LARGE, partial(blank, "train/dog/new.png"), "9 training images, was 8", True),
    (SMALL, partial(blank, "train/dog/new.png"), "9 training images, was 8", True),
    (LARGE, partial(rename, "train/dog", "train/cow"), "different classes", False),
]


@pytest.mark.parametrize(("size", "change", "pattern", "may"), CHANGES)
def test_a_dataset_that_has_changed_is_refused_unless_it_is_overridden(
    root, size, change, pattern, may
):
    directory = root.parent / "run"
    argv = folder(root, size, nEpochs=3, milestones=3)
    assert run(argv, partial(at_batch, kill, 6)).code < 0  # in the second epoch
    before = saved(directory)
    change(root)
    if not may:
        for flags in ([], ["--override=true"]):
            refused(run([*argv, "--resume=auto", *flags]), 3, pattern)
        assert saved(directory) == before
        return
    fix = "restore the data, or add --override true to go on with these images"
    pattern = f"data is not the checkpoint's: [^;]*{pattern}[^;]*; fix: {fix}$"
    result = run([*argv, "--resume=auto"])
    refused(result, 4, pattern)
    assert saved(directory) == before and not re.search("[0-9a-f]{20}", result.err)
    result = run([*argv, "--resume=auto", "--override=true"])
    assert result.code == 0 and "note: override: " in result.err
    overrides = checkpoints.load_latest(directory, pytest.fail)["overrides"]
    assert overrides and all(change.startswith("epoch 2 step 0: data ") for change in overrides)
    assert run([*argv, "--resume=auto"]).code == 0  # now it is the run's own


# What the error about an unreadable image advises.
REMEDIES = {
    "remove it": (Path.unlink, []),
    "replace it": (lambda path: Image.new("RGB", (80, 80)).save(path), []),
    "skip it": (lambda path: None, ["--onBadImage=skip"]),
}


@pytest.mark.parametrize("remedy", REMEDIES)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_a_run_goes_on_after_the_fix_that_an_unreadable_image_names(root, size, remedy):
    """Damage an image of a run that was stopped in its first epoch, at its third of eight steps."""
    directory, bad = root.parent / "run", root / "train" / "cat" / "0002.png"
    argv = folder(root, size, batchSize=1, milestones=2)
    assert run(argv, partial(at_batch, partial(send, signal.SIGTERM), 3)).code == 75
    bad.write_bytes(bad.read_bytes()[:200])
    resumed = ["--resume", str(directory), "--override=true"]
    result = run(resumed)
    refused(result, 3, f"cannot read image {bad}: .*; fix: replace or remove the file, or ")
    assert "--onBadImage skip; to resume with other images, add --override true" in result.err
    mend, flags = REMEDIES[remedy]
    mend(bad)
    result = run([*resumed, *flags])
    assert result.code == 0 and "epoch 1 starts again: its batches have changed" in result.err
    state = checkpoints.load_latest(directory, pytest.fail)
    # The step counter goes on; a skipped file leaves its step without an image.
    has_all = remedy == "replace it" or (remedy, size) == ("skip it", LARGE)
    assert state["global_step"] == 3 + 2 * (8 if has_all else 7)
    change = "7 training images, was 8" if not has_all else "other training images"
    assert state["overrides"] == [f"epoch 1 step 3: data {change}"]
    assert [record["epoch"] for record in records(directory)] == [1, 2]


def test_a_class_without_its_last_image_is_named_on_resume(root):
    argv = folder(root)
    assert run(argv, partial(at_batch, kill, 6)).code < 0
    for path in (root / "train" / "dog").iterdir():
        path.unlink()
    result = run([*argv, "--resume=auto", "--override=true"])
    refused(result, 3, "train: no images in class dog; fix: put at least one image in each class")


def test_a_dataset_that_has_only_moved_is_the_same(root, tmp_path):
    assert run(folder(root), partial(at_batch, kill, 6)).code < 0
    root.rename(tmp_path / "moved")
    assert run(folder(tmp_path / "moved", resume="auto")).code == 0


# Row 52.

NAMES = ["with space", "line\nbreak", "Ölkännchen", "x" * 255, "\udcff\udc80", "\x1b[31m", "%s"]


def test_any_name_works_and_none_breaks_a_line(tmp_path):
    root = write_files(tmp_path / "data", 4, classes="a b c d e f g")
    for split in ("train", "val"):
        for old, new in zip("abcdefg", NAMES, strict=True):
            path = root / split / old
            first = min(path.iterdir())
            first.rename(path / f"{new[:200]}.png")
            path.rename(path.with_name(new))
    odd = root.rename(tmp_path / "\udcff é\n")
    directory = tmp_path / "run \udcff\n"
    for more in ({"nEpochs": 1}, {"resume": "auto"}):
        result = run(folder(odd, save=directory, **more))
        assert result.code == 0, result
    assert len(records(directory)) == 2
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["data"] == str(odd)
    bad = max((odd / "train" / NAMES[1]).glob("0*.png"))
    bad.write_bytes(b"")
    result = run(folder(odd, save=tmp_path / "other"))
    refused(result, 3, rf"cannot read image .*\\udcff.*line\\nbreak/{bad.name}")


def test_a_terminal_of_another_language_makes_no_difference(tmp_path):
    """Set LC_ALL=C, where Python would read and print ASCII, in a process of its own."""
    root, save = write_files(tmp_path / "é", 4, classes="a Ö"), tmp_path / "run é"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "main.py", *folder(root, SMALL, save=save, nEpochs=1)],
        cwd=ROOT, capture_output=True, env=os.environ | plain,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    data = yaml.safe_load((save / "config.yaml").read_text())["data"]
    assert os.fsencode(data) == os.fsencode(root)
    assert len(records(save)) == 1 and checkpoints.load_weights(save / "model_last.pt")
