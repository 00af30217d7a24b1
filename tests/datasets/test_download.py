"""CIFAR and SVHN from their official files, and what is done with damaged or hostile ones."""

import re
import shutil
import socket
import tarfile
import threading
import urllib.error
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, SVHN

import opts
from datasets import download
from datasets.download import fetch, unpack
from datasets.factory import DataSplits
from errors import DataError, StorageError
from helpers import run_main
from helpers.sample_data import (
    CIFAR_KINDS,
    cifar_files,
    create_data,
    md5,
    noise,
    publish_cifar,
    tar_gz,
    write_cifar,
    write_svhn,
)

CPU = torch.device("cpu")
TRAIN = (noise(20, seed=1), [3, 0, 9, 7, 1] * 4)
EXTRA = (noise(6, seed=2), [5, 0, 0, 8, 2, 4])
TEST = (noise(5, seed=3), [0, 9, 4, 4, 6])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that forgets to say where its files are must not fetch the real ones."""
    for kind in CIFAR_KINDS.values():
        monkeypatch.setattr(kind, "url", "http://127.0.0.1:1/archive")
    nowhere = {split: ["http://127.0.0.1:1/x", *rest] for split, (_, *rest) in PARTS.items()}
    monkeypatch.setattr(SVHN, "split_list", nowhere)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


PARTS = dict(SVHN.split_list)


def create(root: Path, name: str, *flags: str) -> DataSplits:
    opt = opts.parse(["--dataset", name, "--data", str(root), "--precision", "double", *flags])
    return create_data(opt)


def svhn(root: Path, *flags: str) -> DataSplits:
    return create(root, "svhn", "--validSize", "2", *flags)


def refused(call, *args, of: type = DataError) -> str:
    """The one line that a person reads."""
    with pytest.raises(of) as error:
        call(*args)
    line = error.value.report()
    assert re.fullmatch("error: [^\n]+; fix: [^\n]+", line)
    return line


def only(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def whole(batches) -> tuple[torch.Tensor, list[int]]:
    images, targets = zip(*batches.batches(1), strict=True)
    return torch.cat(images), torch.cat(targets).tolist()


def normalised(pixels: np.ndarray, data: DataSplits) -> torch.Tensor:
    mean, std = (torch.tensor(data.metadata[key], dtype=torch.float64) for key in ("mean", "std"))
    return ((torch.from_numpy(pixels).double() - mean) / std).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------- the official formats


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_archive_to_the_last_pixel(tmp_path, monkeypatch, name):
    shift = 0 if name == "cifar10" else 90  # CIFAR-100 has the fine labels 0 to 99
    train, test = (
        (pixels, [label + shift for label in labels]) for pixels, labels in (TRAIN, TEST)
    )
    archive = write_cifar(tmp_path, monkeypatch, name, train, test)
    data = create(tmp_path, name, "--augment", "false", "--batchSize", "3")

    pixels, targets = whole(data.val)
    assert torch.equal(pixels, normalised(test[0], data)) and targets == test[1]
    wrong = test[0].transpose(0, 2, 1, 3)  # the twin: rows and columns mistaken
    assert not torch.equal(pixels, normalised(wrong, data))
    held = data.train.images
    assert np.array_equal(held.pixels.numpy(), train[0]) and held.labels.tolist() == train[1]
    assert sorted(whole(data.train)[1]) == sorted(train[1])
    assert data.classes == [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    assert data.test is None and data.metadata["train"] == 20 and data.metadata["val"] == 5

    archive.unlink()  # unpacked once, it is needed no more
    assert torch.equal(whole(create(tmp_path, name).val)[0], pixels)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        ("cifar100", (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    ],
)
def test_cifar_is_normalised_as_in_the_original(tmp_path, monkeypatch, name, mean, std):
    write_cifar(tmp_path, monkeypatch, name, TRAIN, TEST)
    metadata = create(tmp_path, name).metadata
    assert (tuple(metadata["mean"]), tuple(metadata["std"])) == (mean, std)


def test_svhn_is_read_from_its_files_to_the_last_pixel(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch, {"train": TRAIN, "extra": EXTRA, "test": TEST})
    data = svhn(tmp_path)
    pixels, digits = whole(data.test)
    assert digits == TEST[1]  # the label 10 of the files is the digit 0
    assert torch.equal(pixels, torch.from_numpy(TEST[0]).double().permute(0, 3, 1, 2) / 255)
    held = data.train.images
    assert held.labels.tolist() == [*TRAIN[1], *EXTRA[1]]
    assert np.array_equal(held.pixels.numpy(), np.concatenate([TRAIN[0], EXTRA[0]]))
    assert data.classes == [str(digit) for digit in range(10)]
    metadata = data.metadata
    assert [metadata[part] for part in ("train", "val", "test")] == [24, 2, 5]
    assert (metadata["mean"], metadata["std"]) == ([0, 0, 0], [255, 255, 255])


def test_svhn_holds_out_its_validation_set_and_does_not_augment(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch, {"train": TRAIN, "extra": EXTRA, "test": TEST})
    data = svhn(tmp_path)
    everything = np.concatenate([TRAIN[0], EXTRA[0]])
    held_out = data.metadata["held_out"]
    kept = sorted(set(range(26)) - set(held_out))
    seen = {image.numpy().tobytes() for image in whole(data.train)[0]}
    assert seen == {image.numpy().tobytes() for image in normalised(everything[kept], data)}
    assert torch.equal(whole(data.val)[0], normalised(everything[held_out], data))


def test_svhn_is_never_mirrored(tmp_path, monkeypatch):
    left = np.zeros((40, 32, 32, 3), dtype=np.uint8)
    left[:, :, :8] = 255  # still left of the middle after a shift by 4
    write_svhn(tmp_path, monkeypatch, dict.fromkeys(PARTS, (left, [1] * 40)))

    write_cifar(tmp_path, monkeypatch, "cifar10", (left, [1] * 40), TEST)

    def any_is_mirrored(data):
        images, _ = whole(data.train)
        return (images[..., 16:].sum(dim=(1, 2, 3)) > images[..., :16].sum(dim=(1, 2, 3))).any()

    assert not any_is_mirrored(svhn(tmp_path, "--augment", "true"))
    assert any_is_mirrored(create(tmp_path, "cifar10"))  # where a mirrored cat is a cat


@pytest.mark.parametrize("label", [10, -1, -100])
def test_a_label_that_is_no_class_is_refused(tmp_path, monkeypatch, label):
    write_cifar(tmp_path, monkeypatch, "cifar10", (TRAIN[0], [label, *TRAIN[1][1:]]), TEST)
    line = refused(create, tmp_path, "cifar10")
    assert f"training label {label} is not a class from 0 to 9" in line


# --------------------------------------------------------------------------------- damaged archives


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "a web page": lambda data: b"<html>Please log in to this network</html>",
    "another": lambda data: tar_gz({"cifar-10-batches-py/data_batch_1": b"x"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_damaged_archive_is_refused_with_both_sums(tmp_path, monkeypatch, name, damage):
    path = write_cifar(tmp_path, monkeypatch, name, TRAIN, TEST)
    expected = md5(path.read_bytes())
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    line = refused(create, tmp_path, name)
    assert f"{path} has md5 {md5(path.read_bytes())}, expected {expected}" in line
    assert f"fix: delete {path} and run again" in line
    assert only(tmp_path) == [path.name], "something was unpacked"


def test_a_directory_in_the_place_of_the_archive_is_refused(tmp_path):
    (tmp_path / CIFAR10.filename).mkdir()
    assert str(tmp_path / CIFAR10.filename) in refused(create, tmp_path, "cifar10")


@pytest.mark.parametrize("split", PARTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_svhn_is_refused_with_both_sums(tmp_path, monkeypatch, split, damage):
    write_svhn(tmp_path, monkeypatch, {"train": TRAIN, "extra": EXTRA, "test": TEST})
    path = tmp_path / SVHN.split_list[split][1]
    expected = md5(path.read_bytes())
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    line = refused(svhn, tmp_path)
    assert f"{path} has md5 {md5(path.read_bytes())}, expected {expected}" in line


def test_a_file_of_svhn_that_is_no_matlab_file_is_refused(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch, {"train": TRAIN, "extra": EXTRA, "test": TEST})
    url, filename, _ = SVHN.split_list["extra"]
    (tmp_path / filename).write_bytes(b"not what it should be")
    sums = SVHN.split_list | {"extra": [url, filename, md5(b"not what it should be")]}
    monkeypatch.setattr(SVHN, "split_list", sums)
    assert f"cannot read {tmp_path / filename}" in refused(svhn, tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_damaged_files_of_an_unpacked_archive_are_refused(tmp_path, monkeypatch, name, damage):
    write_cifar(tmp_path, monkeypatch, "cifar10", TRAIN, TEST)
    create(tmp_path, "cifar10")
    folder = tmp_path / CIFAR10.base_folder
    damage(folder / name)
    line = refused(create, tmp_path, "cifar10")
    assert f"damaged files in {folder}; fix: delete {folder} and run again" in line
    shutil.rmtree(folder)  # what the message says helps
    create(tmp_path, "cifar10")


def test_the_program_ends_with_3_and_one_line(tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(b"half an archive")
    result = run_main.run(f"--dataset cifar10 --data {tmp_path} --save {tmp_path / 'run'}")
    assert result.code == 3
    assert re.fullmatch(r"error: .* has md5 \w{32}, expected \w{32}; fix: delete .*\n", result.err)


# --------------------------------------------------------------------------------- hostile archives


def link(name: str, target: str, kind=tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    return entry


def hostile(base: str, outside: Path) -> dict[str, tuple[dict, list]]:
    """Files and entries that an archive might bring beside the right ones."""
    return {
        "parent": ({"../evil": b"x"}, []),
        "deep parent": ({f"{base}/../../evil": b"x"}, []),
        "absolute": ({str(outside / "evil"): b"x"}, []),
        "symlink up": ({}, [link(f"{base}/evil", "../../evil")]),
        "symlink away": ({}, [link(f"{base}/evil", str(outside / "evil"))]),
        "hard link": ({}, [link(f"{base}/evil", "../secret", tarfile.LNKTYPE)]),
        "device": ({}, [special(f"{base}/evil", tarfile.CHRTYPE)]),
        "fifo": ({}, [special(f"{base}/evil", tarfile.FIFOTYPE)]),
    }


@pytest.mark.parametrize("attack", [*hostile("", Path("/"))])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_an_archive_that_reaches_outside_itself_is_refused(tmp_path, monkeypatch, name, attack):
    root, outside = tmp_path / "data", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (tmp_path / "secret").write_text("private")
    kind, files = CIFAR_KINDS[name], cifar_files(name, TRAIN, TEST)
    more, entries = hostile(kind.base_folder, outside)[attack]
    archive = tar_gz(files | more, entries)
    publish_cifar(monkeypatch, name, files, archive)  # as if the publisher were the attacker
    (root / kind.filename).write_bytes(archive)
    before = only(tmp_path)
    line = refused(create, root, name)
    assert f"cannot unpack {root / kind.filename}" in line
    assert only(tmp_path) == before, "something was written or left behind"


@pytest.mark.parametrize("damage", ["truncated", "one bit", "a web page", "another"])
def test_unpacking_is_all_or_nothing(tmp_path, damage):
    path = tmp_path / "a.tar.gz"
    good = tar_gz({"folder/one": b"abc" * 9000, "folder/two": noise(1).tobytes()})
    path.write_bytes(DAMAGES[damage](good))
    assert f"cannot unpack {path}" in refused(unpack, path, "folder")
    assert only(tmp_path) == [path.name]
    path.write_bytes(good)
    unpack(path, "folder")
    assert only(tmp_path) == [path.name, "folder", "folder/one", "folder/two"]


# -------------------------------------------------------------------------------------- downloading


@contextmanager
def server(respond):
    """A web server on this machine; yields the address of its one file."""

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


def send(handler, content: bytes, promised: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(promised or len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def send_all(handler) -> None:
    send(handler, CONTENT)


def send_half(handler) -> None:
    send(handler, CONTENT[: len(CONTENT) // 2], promised=len(CONTENT))


def send_half_in_chunks(handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n" % len(CONTENT) + CONTENT[:1000])


def send_page(handler) -> None:
    send(handler, b"<html>Please log in to this network</html>")


def send_nothing(handler) -> None:
    handler.close_connection = True


def send_nonsense(handler) -> None:
    handler.wfile.write(b"220 this is a mail server\r\n")


def send_not_found(handler) -> None:
    handler.send_error(404)


@pytest.fixture
def impatient(monkeypatch):
    """Try again at once."""
    monkeypatch.setattr(download, "RETRY_DELAY_S", 0)


def test_an_absent_archive_is_downloaded_and_checked(tmp_path):
    path = tmp_path / "new" / "archive.bin"
    with server(send_all) as url:
        assert fetch(url, path, md5(CONTENT)) == path
    assert path.read_bytes() == CONTENT and only(tmp_path / "new") == [path.name]
    assert fetch(url, path, md5(CONTENT)) == path  # the server is gone: nothing is fetched again


@pytest.mark.parametrize(
    "respond",
    [send_half, send_half_in_chunks, send_page, send_nothing, send_nonsense, send_not_found],
)
def test_a_download_that_fails_leaves_nothing_behind(tmp_path, respond, impatient):
    path = tmp_path / "archive.bin"
    with server(respond) as url:
        line = refused(fetch, url, path, md5(CONTENT))
    assert url in line or str(path) in line
    if respond is send_page:
        assert md5(CONTENT) in line
    assert only(tmp_path) == []
    with server(send_all) as url:  # so that the same command works once the network does
        fetch(url, path, md5(CONTENT))


def test_a_download_that_is_interrupted_is_not_taken_for_the_archive(tmp_path, monkeypatch):
    def die_midway(url, path):
        path.write_bytes(CONTENT[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_download_rest", die_midway)
    with pytest.raises(KeyboardInterrupt):
        fetch("http://127.0.0.1:1/x", tmp_path / "archive.bin", md5(CONTENT))
    assert only(tmp_path) == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_offline_and_absent_names_the_path_where_the_file_belongs(
    tmp_path, monkeypatch, name, impatient
):
    def no_route(url, path):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(download, "_download_rest", no_route)
    monkeypatch.chdir(tmp_path)
    filename = PARTS["train"][1] if name == "svhn" else CIFAR_KINDS[name].filename
    line = refused(create, Path("data"), name)
    assert "no route to host" in line
    assert line.endswith(f"fix: put the file at {tmp_path / 'data' / filename}")


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch, impatient):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/archive.tar.gz"
        monkeypatch.setattr(CIFAR10, "url", url)  # nobody listens there
        line = refused(create, tmp_path, "cifar10")
    assert f"cannot download {url}" in line
    assert str(tmp_path / CIFAR10.filename) in line


def test_a_data_directory_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused(create, tmp_path / "file" / "data", "cifar10", of=StorageError)
    assert f"cannot write {tmp_path / 'file' / 'data'}" in line and StorageError.code == 6
