"""Test CIFAR and SVHN from their official files, and from damaged or hostile ones."""

import builtins
import errno
import os
import re
import shutil
import tarfile
import threading
import urllib.error
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, SVHN

import opts
from datasets import download
from datasets.download import fetch, unpack
from datasets.factory import DataSplits
from errors import StorageError
from faults import sabotage
from fileio.atomic import NO_LOCKS
from helpers.run_main import LONG_S, wait_until
from helpers.sample_data import (
    CIFAR_KINDS,
    cifar_files,
    create_data,
    error_line,
    md5,
    noise,
    publish_cifar,
    read_all,
    tar_gz,
    write_cifar,
    write_svhn,
)

TRAIN = (noise(20, seed=1), [3, 0, 9, 7, 1] * 4)
EXTRA = (noise(6, seed=2), [5, 0, 0, 8, 2, 4])
TEST = (noise(5, seed=3), [0, 9, 4, 4, 6])
SVHN_FILES = {split: filename for split, (_, filename, _) in SVHN.split_list.items()}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Stop a test that writes no files from fetching the real ones, or waiting for a retry."""
    for kind in CIFAR_KINDS.values():
        monkeypatch.setattr(kind, "url", "http://127.0.0.1:1/archive")
    nowhere = {
        split: ["http://127.0.0.1:1/x", *rest] for split, (_, *rest) in SVHN.split_list.items()
    }
    monkeypatch.setattr(SVHN, "split_list", nowhere)
    monkeypatch.setattr(download, "RETRY_DELAY_S", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def create(root: Path, name: str, *flags: str) -> DataSplits:
    fixed = ["--dataset", name, "--data", str(root), "--precision", "double"]
    fixed += ["--validSize", "2" if name == "svhn" else "0"]
    return create_data(opts.parse([*fixed, *flags]))


def write(root: Path, monkeypatch, name: str) -> None:
    if name == "svhn":
        write_svhn(root, monkeypatch, {"train": TRAIN, "extra": EXTRA, "test": TEST})
    else:
        write_cifar(root, monkeypatch, name, TRAIN, TEST)


def content(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# The official formats:
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_archive_to_the_last_pixel(tmp_path, monkeypatch, name):
    shift = 0 if name == "cifar10" else 90  # CIFAR-100 has the fine labels 0 to 99
    train, test = (
        (pixels, [label + shift for label in labels]) for pixels, labels in (TRAIN, TEST)
    )
    archive = write_cifar(tmp_path, monkeypatch, name, train, test)
    data = create(tmp_path, name)
    for images, (pixels, labels) in ((data.train.images, train), (data.val.images, test)):
        assert np.array_equal(images.pixels.numpy(), pixels) and images.labels.tolist() == labels
    assert data.classes == [f"class {i}" for i in range(10 if name == "cifar10" else 100)]

    mean, std = (torch.tensor(data.metadata[key]).double() for key in ("mean", "std"))
    normalised = ((torch.from_numpy(test[0]) - mean) / std).permute(0, 3, 1, 2)
    images, targets = read_all(data.val)
    assert torch.allclose(images, normalised, atol=1e-6) and targets == test[1]

    archive.unlink()  # unpacked once, it is needed no more
    assert torch.equal(read_all(create(tmp_path, name).val)[0], images)


def test_svhn_is_read_from_its_files_to_the_last_pixel(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, "svhn")
    data = create(tmp_path, "svhn")
    pixels, digits = read_all(data.test)
    assert digits == TEST[1]  # the label 10 of the files is the digit 0
    assert torch.equal(pixels, torch.from_numpy(TEST[0]).double().permute(0, 3, 1, 2) / 255)
    held = data.train.images
    assert held.labels.tolist() == [*TRAIN[1], *EXTRA[1]]
    assert np.array_equal(held.pixels.numpy(), np.concatenate([TRAIN[0], EXTRA[0]]))
    assert data.classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_outside_the_classes_is_refused(tmp_path, monkeypatch, label):
    write_cifar(tmp_path, monkeypatch, "cifar10", (TRAIN[0], [label, *TRAIN[1][1:]]), TEST)
    line = error_line(create, tmp_path, "cifar10")
    assert f"training label {label} is not a class from 0 to 9" in line


# Damaged archives:
DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "a web page": lambda data: b"<html>Please log in to this network</html>",
    "another": lambda data: tar_gz({"cifar-10-batches-py/data_batch_1": b"x"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("name", "filename"),
    [(name, kind.filename) for name, kind in CIFAR_KINDS.items()]
    + [("svhn", filename) for filename in SVHN_FILES.values()],
)
def test_a_damaged_archive_is_refused_with_both_sums(tmp_path, monkeypatch, name, filename, damage):
    write(tmp_path, monkeypatch, name)
    before, path = content(tmp_path), tmp_path / filename
    expected = md5(path.read_bytes())
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    line = error_line(create, tmp_path, name)
    assert f"{path} has md5 {md5(path.read_bytes())}, expected {expected}" in line
    assert f"fix: delete {path} and run again" in line
    assert content(tmp_path) == before, "something was unpacked"


def test_files_that_cannot_be_read_or_written_are_named(tmp_path, monkeypatch):
    (tmp_path / CIFAR10.filename).mkdir()
    assert str(tmp_path / CIFAR10.filename) in error_line(create, tmp_path, "cifar10")

    (tmp_path / "file").write_text("in the way")
    line = error_line(create, tmp_path / "file" / "data", "cifar10", of=StorageError)
    assert f"cannot write {tmp_path / 'file' / 'data'}" in line and StorageError.code == 6

    write(tmp_path, monkeypatch, "svhn")
    path = tmp_path / SVHN_FILES["extra"]
    path.write_bytes(b"no Matlab file")
    published = ["http://127.0.0.1:1/x", path.name, md5(b"no Matlab file")]
    monkeypatch.setattr(SVHN, "split_list", SVHN.split_list | {"extra": published})
    assert f"cannot read {path}" in error_line(create, tmp_path, "svhn")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_files_of_an_unpacked_archive_are_refused(tmp_path, monkeypatch, name):
    write(tmp_path, monkeypatch, "cifar10")
    folder = tmp_path / CIFAR10.base_folder
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink):
        create(tmp_path, "cifar10")
        damage(folder / name)
        line = error_line(create, tmp_path, "cifar10")
        assert f"damaged files in {folder}; fix: delete {folder} and run again" in line
        shutil.rmtree(folder)  # the fix works


# Hostile archives:
def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def hostile(base: str, outside: Path) -> dict[str, tuple[dict, list]]:
    """Return files and entries that an archive might contain beside the right ones."""
    return {
        "parent": ({"../evil": b"x"}, []),
        "deep parent": ({f"{base}/../../evil": b"x"}, []),
        "absolute": ({str(outside / "evil"): b"x"}, []),
        "symlink up": ({}, [entry(f"{base}/evil", tarfile.SYMTYPE, "../../evil")]),
        "symlink away": ({}, [entry(f"{base}/evil", tarfile.SYMTYPE, str(outside / "evil"))]),
        "hard link": ({}, [entry(f"{base}/evil", tarfile.LNKTYPE, "../secret")]),
        "device": ({}, [entry(f"{base}/evil", tarfile.CHRTYPE)]),
        "fifo": ({}, [entry(f"{base}/evil", tarfile.FIFOTYPE)]),
    }


@pytest.mark.parametrize("attack", [*hostile("", Path("/"))])
def test_an_archive_that_reaches_outside_itself_is_refused(tmp_path, monkeypatch, attack):
    root, outside = tmp_path / "data", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (tmp_path / "secret").write_text("private")
    files = cifar_files("cifar10", TRAIN, TEST)
    more, entries = hostile(CIFAR10.base_folder, outside)[attack]
    archive = tar_gz(files | more, entries)
    publish_cifar(monkeypatch, "cifar10", files, archive)  # as if the publisher were the attacker
    (root / CIFAR10.filename).write_bytes(archive)
    before = content(tmp_path)
    line = error_line(create, root, "cifar10")
    assert f"cannot unpack {root / CIFAR10.filename}" in line
    assert content(tmp_path) == before, "something was written or left behind"


@pytest.mark.parametrize("damage", ["truncated", "one bit", "a web page", "another"])
def test_unpacking_is_all_or_nothing(tmp_path, damage):
    path = tmp_path / "a.tar.gz"
    good = tar_gz({"folder/one": b"abc" * 9000, "folder/two": noise(1).tobytes()})
    path.write_bytes(DAMAGES[damage](good))
    assert f"cannot unpack {path}" in error_line(unpack, path, "folder")
    assert content(tmp_path) == [path.name]
    path.write_bytes(good)
    unpack(path, "folder")
    assert content(tmp_path) == [path.name, "folder", "folder/one", "folder/two"]


# Downloading:
@contextmanager
def server(respond):
    """Start a web server on this machine; yield the address of its one file."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            respond(self)

        def log_message(self, *args):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/archive.bin"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


CONTENT = noise(10).tobytes()


def send(handler, body: bytes, header: tuple[str, str] | None = None) -> None:
    handler.send_response(200)
    handler.send_header(*(header or ("Content-Length", str(len(body)))))
    handler.end_headers()
    handler.wfile.write(body)


FAILURES = {
    "half": lambda handler: send(handler, CONTENT[:9000], ("Content-Length", str(len(CONTENT)))),
    "half in chunks": lambda handler: send(
        handler, b"%x\r\n" % len(CONTENT) + CONTENT[:1000], ("Transfer-Encoding", "chunked")
    ),
    "a web page": lambda handler: send(handler, b"<html>Please log in to this network</html>"),
    "not found": lambda handler: handler.send_error(404),
}


def test_an_absent_archive_is_downloaded_and_checked(tmp_path):
    path = tmp_path / "new" / "archive.bin"
    with server(lambda handler: send(handler, CONTENT)) as url:
        assert fetch(url, path, md5(CONTENT)) == path
    assert path.read_bytes() == CONTENT and content(tmp_path / "new") == [path.name]
    assert fetch(url, path, md5(CONTENT)) == path  # the server is gone: nothing is fetched again


@pytest.mark.parametrize("failure", FAILURES)
def test_a_download_that_fails_leaves_only_what_can_be_continued(tmp_path, failure):
    path = tmp_path / "archive.bin"
    with server(FAILURES[failure]) as url:
        line = error_line(fetch, url, path, md5(CONTENT))
        assert f"cannot download {url} in 3 tries" in line
        assert failure != "a web page" or md5(CONTENT) in line
        assert content(tmp_path) == [".archive.bin.part"] * (failure == "half")
        assert ("fix: run again to continue at 0.0 MB, or put" in line) == (failure == "half")
    with server(lambda handler: send(handler, CONTENT)) as url:
        assert fetch(url, path, md5(CONTENT)).read_bytes() == CONTENT
    assert content(tmp_path) == [path.name]


def send_rest(asked: list, handler) -> None:
    """Answer as a server that continues downloads."""
    asked.append(handler.headers["Range"])
    start = int(asked[-1].removeprefix("bytes=").removesuffix("-")) if asked[-1] else 0
    if start >= len(CONTENT):
        return handler.send_error(416)
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(CONTENT) - start))
    handler.end_headers()
    return handler.wfile.write(CONTENT[start:])


# What a killed process left, and what is asked of the server: the rest; if the file was another
# one, all of it.
@pytest.mark.parametrize(("left", "ranges"), [
    (CONTENT[:1000], ["bytes=1000-"]), (b"", [None]), (CONTENT, [f"bytes={len(CONTENT)}-"]),
    (b"another"[:7], ["bytes=7-", None]), (CONTENT + b"x", [f"bytes={len(CONTENT) + 1}-", None]),
])  # fmt: skip
def test_a_killed_download_is_continued_and_leaves_nothing(tmp_path, left, ranges):
    path, asked = tmp_path / "archive.bin", []
    with server(partial(send_rest, asked)) as url:
        (tmp_path / ".archive.bin.part").write_bytes(left)
        (tmp_path / ".download-abc").mkdir()  # of an earlier version
        (tmp_path / ".download-abc" / path.name).write_bytes(left)
        assert fetch(url, path, md5(CONTENT)).read_bytes() == CONTENT
    assert asked == ranges and content(tmp_path) == [path.name]


def test_a_download_that_is_interrupted_is_not_taken_for_the_archive(tmp_path, monkeypatch):
    def die_midway(url, path):
        path.write_bytes(CONTENT[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_download_rest", die_midway)
    with pytest.raises(KeyboardInterrupt):
        fetch("http://127.0.0.1:1/x", tmp_path / "archive.bin", md5(CONTENT))
    assert content(tmp_path) == [".archive.bin.part"]


def test_two_processes_download_and_unpack_an_archive_once(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LOCK_DELAY_S", 0.01)
    data, asked, context = tar_gz({"folder/one": b"abc" * 9000}), [], get_context("fork")
    path, both = tmp_path / "a.tar.gz", threading.Event()

    def wait_for_the_second(handler):
        asked.append(handler.path)
        both.wait()
        send(handler, data)

    def fetch_and_unpack(url):
        unpack(fetch(url, path, md5(data)), "folder")

    with server(wait_for_the_second) as url:
        processes = [context.Process(target=fetch_and_unpack, args=(url,)) for _ in range(2)]
        for process in processes:
            process.start()
        wait_until(lambda: asked)
        both.set()
        for process in processes:
            process.join(LONG_S)
    assert [process.exitcode for process in processes] == [0, 0] and len(asked) == 1
    assert content(tmp_path) == ["a.tar.gz", "folder", "folder/one"]


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_disk_without_locks_takes_a_download(tmp_path, monkeypatch, number):
    monkeypatch.setattr(download.fcntl, "flock", lambda *_: sabotage.refuse(number))
    data = tar_gz({"folder/one": b"abc"})
    with server(lambda handler: send(handler, data)) as url:
        unpack(fetch(url, tmp_path / "a.tar.gz", md5(data)), "folder")
    assert content(tmp_path) == ["a.tar.gz", "folder", "folder/one"]


# Disks:
def test_a_directory_that_cannot_be_written_does_not_blame_the_archive(tmp_path, monkeypatch):
    archive = write_cifar(tmp_path, monkeypatch, "cifar10", TRAIN, TEST)
    for name, code, line in [
        ("open", errno.EROFS, "sound: cannot write .*Read-only.*; fix: make it writable, or name"),
        ("os.mkdir", errno.EACCES, "sound: Permission denied; fix: .* name another --data"),
        ("os.mkdir", errno.EIO, "sound: Input/output error; fix: .* name another --data"),
    ]:
        with monkeypatch.context() as patch:
            refuse_to_write(patch, name, code)
            assert re.search(line, error_line(create, tmp_path, "cifar10", of=StorageError))
        assert content(tmp_path) == [archive.name]
    create(tmp_path, "cifar10")


def refuse_to_write(patch, name: str, code: int) -> None:
    """Let a function fail as the operating system does, unless it opens a file to read."""
    module, name = (os, "mkdir") if name == "os.mkdir" else (builtins, name)
    real = getattr(module, name)

    def refusing(path, *args, **kwargs):
        if name == "open" and "a" not in [*args, "r"][0]:
            return real(path, *args, **kwargs)
        raise OSError(code, os.strerror(code), str(path))

    patch.setattr(module, name, refusing)


def test_files_without_the_right_to_read_are_named_and_not_to_be_deleted(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, "cifar10")
    create(tmp_path, "cifar10")
    real, batch = open, tmp_path / CIFAR10.base_folder / "data_batch_2"

    def refusing(path, *args, **kwargs):
        if str(path) in refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refusing)
    for path in (batch, tmp_path / CIFAR10.filename):
        refused = [str(path)]
        line = error_line(create, tmp_path, "cifar10")
        assert f"cannot read {path}: Permission denied; fix: make it" in line
        shutil.rmtree(batch.parent, ignore_errors=True)


def test_offline_and_absent_names_the_path_where_the_file_belongs(tmp_path, monkeypatch):
    def no_route(url, path):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(download, "_download_rest", no_route)
    monkeypatch.chdir(tmp_path)
    line = error_line(create, Path("data"), "cifar10")
    assert "no route to host" in line
    assert line.endswith(f"fix: put the file at {tmp_path / 'data' / CIFAR10.filename}")
