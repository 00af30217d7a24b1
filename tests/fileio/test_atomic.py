"""Test that files that belong together, and directories, appear whole or not at all."""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from errors import StorageError
from fileio import atomic


@pytest.fixture
def made(tmp_path):
    """Write two files that belong together, to be moved to places that are taken."""
    files = [tmp_path / "made" / name for name in ("net.xml", "net.bin")]
    files[0].parent.mkdir()
    places = [tmp_path / file.name for file in files]
    for file, place in zip(files, places, strict=True):
        file.write_text("new")
        place.write_text("old")
    return files, places


def test_files_that_belong_together_are_named_by_one_that_appears_last(made, monkeypatch):
    replace, seen, (files, places) = os.replace, [], made

    def fail(source, target):
        seen.append((Path(target).name, places[0].exists()))
        if len(seen) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError):
        atomic.move_together(files, places)
    assert seen == [("net.bin", False), ("net.xml", False)]
    assert not places[0].exists() and places[1].read_text() == "new"
    monkeypatch.undo()
    files[1].write_text("new")
    atomic.move_together(files, places)
    assert [place.read_text() for place in places] == ["new", "new"]


def test_a_full_disk_replaces_neither_of_two_files(made, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(StorageError, match="no space"):
        atomic.move_together(*made)
    assert [place.read_text() for place in made[1]] == ["old", "old"]


def test_a_directory_is_moved_with_all_that_is_in_it(tmp_path, monkeypatch):
    source, place = tmp_path / "made", tmp_path / "net.mlpackage"
    (source / "Data").mkdir(parents=True)
    (source / "Data" / "weights").write_bytes(b"it")
    synced, sync = [], atomic.sync_directory
    monkeypatch.setattr(atomic, "sync_directory", lambda path: (synced.append(path), sync(path)))
    atomic.move_together([source], [place])
    assert (place / "Data" / "weights").read_bytes() == b"it" and not source.exists()
    assert {source / "Data" / "weights", source / "Data", source, tmp_path} == set(synced)
