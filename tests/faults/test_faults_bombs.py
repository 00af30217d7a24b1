"""Test rows 27, 33, 42 and 46: small files that claim much are refused and cost little."""

from functools import partial

import pytest

import checkpoints
import opts
from cli.flag_reader import MAX_CONFIG_BYTES
from datasets.decode import DEFAULTS, decode
from datasets.download import unpack
from datasets.regions import Box, Region, decode_region
from errors import CheckpointError, DataError, UsageError
from faults import bombs, fuzz
from faults.bombs import check_cost
from faults.contract import command, refused, saved, tiny
from faults.sabotage import shorten
from faults.test_faults_data import FOLDER, SMALL, folder, unpacked
from helpers.run_main import run

QUICKLY = {"read a checkpoint": 0.2}  # of processor time, so that the test takes little as well


def parse(path) -> None:
    opts.parse(["--config", str(path)])


def read_region(path):
    """Decode the first pixels of an image, at full scale."""
    return decode_region(path, DEFAULTS, lambda *size: Region(Box(0, 0, 8, 8)))


def cut(make) -> bytes:
    return make()[:MAX_CONFIG_BYTES]


# Too long, and as much of it as is read.
CONFIGS = bombs.YAML | {f"{name}, cut": partial(cut, make) for name, make in bombs.YAML.items()}
ARCHIVES = bombs.archives(FOLDER)
# File name, contents, what reads it and refuses it by which error.
KINDS = {
    "checkpoint": ("weights.pt", bombs.CHECKPOINTS, checkpoints.load_weights, CheckpointError),
    "config": ("c.yaml", CONFIGS, parse, UsageError),
    "image": ("image.jpg", bombs.IMAGES, decode, Exception),
    "region": ("image.jpg", bombs.IMAGES, read_region, Exception),
    "archive": ("archive.tar.gz", ARCHIVES, partial(unpack, folder=FOLDER), DataError),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in KINDS[kind][1]]
)
def test_a_file_that_claims_much_is_refused(tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr("fileio.tensor_files.READ_S", QUICKLY["read a checkpoint"])
    file_name, makes, read, error = KINDS[kind]
    path = tmp_path / file_name
    path.write_bytes(makes[name]())
    check_cost(path, read, error)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(("name", "flag"), [("two gigabytes", "resume"), ("counting", "retrain")])
def test_a_checkpoint_that_claims_much_ends_the_program_with_4(tmp_path, name, flag):
    path = tmp_path / "weights.pt"
    path.write_bytes(bombs.CHECKPOINTS[name]())
    result = run(tiny(**{flag: path}, save=tmp_path / "run"), partial(shorten, QUICKLY))
    refused(result, 4, f"{path} takes more")
    assert not saved(tmp_path / "run")


def test_an_image_of_the_same_kind_that_claims_less_is_read(tmp_path):
    """Read a PNG of one colour, and JPEGs with a few more scans and without most pixels."""
    for data in (bombs.png(4000, 4000), bombs.scans(4000, 50), bombs.enlarged(4000)):
        (tmp_path / "image.jpg").write_bytes(data)
        assert decode(tmp_path / "image.jpg")[0].size == (4000, 4000)
        assert read_region(tmp_path / "image.jpg").pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["12,000 x 10,000", "scans"])
def test_an_image_that_claims_much_ends_the_program_with_3(root, name):
    path = min((root / "train" / "cat").iterdir())
    path.write_bytes(bombs.IMAGES[name]())
    refused(run(folder(root, SMALL)), 3, rf"cannot read image {path}: .*maxPixels|scans")


def test_an_archive_that_claims_much_ends_the_program_with_3(tmp_path):
    root, data = tmp_path / "data", ARCHIVES["many files"]()
    pattern = rf"cannot unpack {root}/.*: .* is too large, or one too many; fix: delete"
    refused(unpacked(root, data, data), 3, pattern)


def test_a_config_without_an_end_ends_the_program_with_2(tmp_path):
    result = run(command(config="/dev/zero", save=tmp_path / "run"))
    refused(result, 2, "cannot read config /dev/zero: more than 16384 bytes; fix: name a readable")
    assert not (tmp_path / "run").exists()


def test_a_thousand_damaged_files_of_other_programs_execute_nothing_and_are_one_line(tmp_path):
    """Damage files of nine formats; those without a checksum may read as other finite numbers."""
    found = fuzz.fuzz_apart("foreign_bytes", tmp_path, seed=1, count=1000)
    assert found["count"] == 1000 and found["refused"] > 500


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_input_is_refused_or_read(tmp_path, kind):
    found = fuzz.fuzz_apart(kind, tmp_path, seed=0, count=30)
    assert found["count"] == 30 and 0 < found["refused"] <= 30
