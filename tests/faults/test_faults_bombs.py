"""Rows 27, 33, 42 and 46: small files that claim much are refused and cost little."""

import hashlib
from functools import partial

import pytest

import checkpoints
import opts
from datasets.decode import decode
from datasets.download import unpack
from errors import CheckpointError, DataError, UsageError
from faults import costs, fuzz
from faults.contract import command, refused, saved, tiny
from faults.test_faults_data import CIFAR, SMALL, folder, photographs, published_as
from fileio import tensor_files
from helpers.run_main import run


def check_cheap(size: int, call, error: type[Exception] | tuple = Exception) -> None:
    """Assert that a call is refused, and that its memory is bounded by the size of its file."""

    def refuse() -> None:
        with pytest.raises(error):
            call()

    _, memory = costs.cost(refuse)
    assert memory <= costs.ALLOWED + 3 * size


def be_quick() -> None:
    """Give a checkpoint little time, so that the test takes little as well."""
    from fileio import tensor_files

    tensor_files.READ_S = 0.2


@pytest.mark.parametrize("name", costs.CHECKPOINTS)
def test_a_checkpoint_that_claims_much_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tensor_files, "READ_S", 0.2)
    path = tmp_path / "weights.pt"
    path.write_bytes(costs.CHECKPOINTS[name]())
    load = partial(checkpoints.load_weights, path)
    check_cheap(path.stat().st_size, load, CheckpointError)


@pytest.mark.parametrize("flag", ["resume", "retrain"])
@pytest.mark.parametrize("name", ["two gigabytes of zeros", "counting"])
def test_a_checkpoint_that_claims_much_ends_the_program_with_4(tmp_path, name, flag):
    path = tmp_path / "weights.pt"
    path.write_bytes(costs.CHECKPOINTS[name]())
    refused(run(tiny(**{flag: path}, save=tmp_path / "run"), be_quick), 4, f"{path} takes more")
    assert not saved(tmp_path / "run")


@pytest.mark.parametrize("name", costs.YAML)
def test_a_config_that_claims_much_is_refused(tmp_path, name):
    path = tmp_path / "c.yaml"
    path.write_bytes(costs.YAML[name]())
    for content in (path.read_bytes(), path.read_bytes()[:16_000]):  # too long, and as much of it
        path.write_bytes(content)
        check_cheap(len(content), lambda: opts.parse(["--config", str(path)]), UsageError)


@pytest.mark.parametrize("name", costs.IMAGES)
def test_an_image_that_claims_much_is_refused(tmp_path, name):
    path = tmp_path / "image.jpg"
    path.write_bytes(costs.IMAGES[name]())
    check_cheap(path.stat().st_size, partial(decode, path))


def test_an_image_of_the_same_kind_that_claims_less_is_read(tmp_path):
    """The twin: neither a PNG of one colour nor a JPEG with a few more scans is refused as such."""
    for data in (costs.png(4000, 4000), costs.scans(4000, 50)):
        (tmp_path / "image.jpg").write_bytes(data)
        assert decode(tmp_path / "image.jpg").size == (4000, 4000)


@pytest.mark.parametrize("name", ["12,000 x 10,000", "scans"])
def test_an_image_that_claims_much_ends_the_program_with_3(tmp_path, name):
    root = photographs(tmp_path / "data")
    path = root / "train" / "cat" / "1.png"
    path.write_bytes(costs.IMAGES[name]())
    refused(run(folder(root, **SMALL)), 3, rf"cannot read image {path}: .*too many|scans")


BOMBS = costs.archives("cifar-10-batches-py")


@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_claims_much_is_refused(tmp_path, name):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(BOMBS[name]())
    check_cheap(path.stat().st_size, partial(unpack, path, "cifar-10-batches-py"), DataError)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_an_archive_that_claims_much_ends_the_program_with_3(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    path = root / "cifar-10-python.tar.gz"
    path.write_bytes(BOMBS["many files"]())
    published = partial(published_as, hashlib.md5(path.read_bytes()).hexdigest())
    result = run(tiny(**CIFAR, data=root, save=tmp_path / "run"), published)
    refused(result, 3, rf"cannot unpack {path}: .* is too large, or one too many; fix: delete")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_input_is_refused_or_read(tmp_path, kind):
    said = fuzz.fuzz_apart(kind, tmp_path, seed=0, count=30)
    assert said["count"] == 30 and 0 < said["refused"] <= 30


def test_an_input_that_is_neither_refused_nor_read_would_be_noticed(tmp_path, monkeypatch):
    def case(draw, root):
        return partial(int, "x"), UsageError

    monkeypatch.setitem(fuzz.KINDS, "number", case)
    with pytest.raises(ValueError, match="invalid literal"):
        fuzz.fuzz("number", tmp_path, 0, 1, 60, tmp_path / "report.json")


def test_a_config_without_an_end_ends_the_program_with_2(tmp_path):
    result = run(command(config="/dev/zero", save=tmp_path / "run"))
    refused(result, 2, "cannot read config /dev/zero: more than 16384 bytes; fix: name a readable")
    assert not (tmp_path / "run").exists()
