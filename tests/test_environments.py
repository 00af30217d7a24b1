"""Test which PyTorch the Makefile and the files of requirements install, and where."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.run_main import ROOT

OTHER = ["TORCH=2.14.1", "TORCHVISION=0.29.1"]


@pytest.fixture
def make(tmp_path):
    """Return a function that asks make what it would run on a machine with nothing installed."""
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)

    def lines(*words: str) -> list[str]:
        run = ["make", "-n", "--no-print-directory", *words]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return lines


def requirements(words: list[str]) -> Iterator[str]:
    """Yield what the words of a pip command, and the files that they name, ask for."""
    for before, word in zip(["", *words], words, strict=False):
        if before == "-r":
            lines = (ROOT / word).read_text().split("\n")
            yield from requirements([part for line in lines for part in line.split()])
        elif word != "-r":
            yield word


def installed(lines: list[str]) -> dict[str, str]:
    """Return the version of each package that the lines of make install."""
    (line,) = (line for line in lines if " pip install " in line)
    found = set(requirements(line.split(" -q ")[1].split()))
    versions = dict(each.split("==") for each in found)  # each is pinned
    assert len(versions) == len(found)  # to one version
    return versions


@pytest.mark.parametrize("target", ["quickstart", "test", "gpu", "soak"])
def test_pytorch_is_installed_in_the_tested_version(make, target):
    versions = installed(make(target))
    assert (versions["torch"], versions["torchvision"]) == ("2.11.0", "0.26.0")
    assert ("pytest" in versions) == (target != "quickstart")


@pytest.mark.parametrize("target", ["quickstart", "test", "gpu"])
@pytest.mark.parametrize("also", [[], ["VENV=.venv"]])
def test_another_pytorch_has_an_environment_of_its_own(make, target, also):
    lines = make(target, *OTHER, *also)
    versions, pinned = installed(lines), installed(make(target))
    assert versions == pinned | {"torch": "2.14.1", "torchvision": "0.29.1"}
    names = {Path(word).parts[0] for line in lines for word in line.split() if ".venv" in word}
    assert names == {".venv-torch2.14.1"}
    assert ".venv-*/" in (ROOT / ".gitignore").read_text().splitlines()


def test_another_torchvision_alone_is_refused(make, tmp_path):
    run = ["make", "-n", "--no-print-directory", "test", "TORCHVISION=0.29.1"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "TORCHVISION without TORCH; fix: add TORCH=VERSION" in done.stderr


@pytest.mark.parametrize("target", ["quickstart", "test", "gpu", "soak"])
def test_an_active_environment_is_taken_as_it_is(make, target):
    (line,) = make(target, "RUN=python")
    assert "python" in line and "install" not in line and ".venv" not in line


@pytest.mark.parametrize("name", ["base", "tools", "dev"])
def test_what_an_environment_with_a_pytorch_lacks_can_be_installed_without_another(name):
    names = {each.split("==")[0] for each in requirements(["-r", f"requirements-{name}.txt"])}
    assert "safetensors" in names and not names & {"torch", "torchvision"}
    assert f"pip install -r requirements-{name}.txt" in "".join(
        path.read_text() for path in ROOT.glob("*.md")
    )
