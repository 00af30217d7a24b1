"""Test that a test set needs no more than `val`, and that the classes of a run are checked."""

import json
import re
import shutil
from pathlib import Path

import pytest

import checkpoints
from errors import CheckpointError
from experiment import run_data
from faults.contract import TINY_FILES, command, refused, tiny
from helpers.inference import logits
from helpers.run_main import run
from helpers.sample_data import error_line, write_folder
from tools.inference import network

COUNTS = {"train": {"ant": 6, "bee": 6, "cat": 6}, "val": {"ant": 5, "bee": 3, "cat": 2}}
SMALL = tiny(dataset="folder", nImages=None, nClasses=None, nEpochs=1)
LARGE = command(**TINY_FILES, nThreads=0, nEpochs=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Train on small and on large images, which lie beside each run in `data`."""
    made = {}
    for name, flags, size in (("small", SMALL, 8), ("large", LARGE, 80)):
        root = tmp_path_factory.mktemp(name)
        write_folder(root / "data", COUNTS, size)
        made[name] = root / "run"
        result = run([*flags, f"--data={root / 'data'}", f"--save={made[name]}"])
        assert result.code == 0, result.err
    return made


@pytest.fixture(params=["small", "large"])
def trained(request, runs) -> Path:
    return runs[request.param]


def data_of(directory: Path, root: Path, *splits: str) -> Path:
    """Copy some splits of a run's images."""
    for split in splits:
        shutil.copytree(directory.parent / "data" / split, root / split)
    return root


def sources(directory: Path) -> list[list[str]]:
    """List the flags that name the weights of a run together with what is known of its classes."""
    checkpoint = checkpoints.list_checkpoints(directory)[0]
    config = f"--config={directory / 'config.yaml'}"
    weights = (directory / "model_last.pt", checkpoint)
    return [[f"--resume={directory}"], *([config, f"--retrain={path}"] for path in weights)]


def evaluate(flags: list[str], data: Path, **more):
    return run([*flags, *command(testOnly=True, data=data, **more)])


def error_of(result) -> float:
    assert result.code == 0, result.err
    return float(re.search(r"Results top1: *(\S+)", result.out)[1])


def test_a_part_of_a_test_set_is_evaluated_without_training_images(trained, tmp_path):
    data = data_of(trained, tmp_path / "data", "val")
    paths = network.find_images([str(data / "val" / "bee")])
    for name in ("ant", "cat"):
        shutil.rmtree(data / "val" / name)
    (data / "train" / ".ipynb_checkpoints").mkdir(parents=True)  # as good as empty
    wrong = logits(network.load(trained), paths).argmax(dim=1) != 1  # the number of bee in the run
    for flags in sources(trained):
        result = evaluate(flags, data)
        assert error_of(result) == pytest.approx(100 * wrong.double().mean().item(), abs=1e-3)
        note = f"note: {data / 'val'} has no images of 2 of the run's 3 classes: ant, cat\n"
        assert result.err == note
        shutil.rmtree(data / "train", ignore_errors=True)


def test_a_test_set_with_a_class_that_the_run_does_not_know_is_refused(runs, tmp_path):
    data = data_of(runs["small"], tmp_path / "data", "val")
    (data / "val" / "bee").rename(data / "val" / "zebra")
    for flags in sources(runs["small"]):
        shown = f"not the run's: {data}/val has zebra; fix: .*ant, bee, cat"
        refused(evaluate(flags, data), 4, shown)


def test_weights_of_another_dataset_are_not_tested_although_their_number_of_classes_fits(tmp_path):
    argv = tiny(nEpochs=1)
    assert run([*argv, f"--save={tmp_path}"]).code == 0
    data = json.loads((tmp_path / "data.json").read_text())
    data["classes"].reverse()
    (tmp_path / "data.json").write_text(json.dumps(data))
    shown = "class 0 is pattern 0, the run's is pattern 2; class 2 is pattern 2, the run's is patt"
    retrain = f"--retrain={tmp_path / 'model_best.pt'}"
    refused(run([*argv, "--testOnly=true", retrain]), 4, f"the classes are not the run's: {shown}")


@pytest.mark.parametrize("kind", ["copied", "linked from elsewhere", "link of another name"])
def test_a_model_file_of_any_name_in_a_run_is_checked_against_its_classes(runs, tmp_path, kind):
    directory = shutil.copytree(runs["small"], tmp_path / "run")
    data = data_of(runs["small"], tmp_path / "data", "val")
    (data / "val" / "bee").rename(data / "val" / "zebra")
    model = directory / "model_best.pt"
    weights = {
        "copied": directory / "model_epoch4.pt",
        "linked from elsewhere": tmp_path / "model_best.pt",
        "link of another name": tmp_path / "best.pth",
    }[kind]
    shutil.copy(model, weights) if kind == "copied" else weights.symlink_to(model)
    flags = [f"--config={directory / 'config.yaml'}", f"--retrain={weights}"]
    refused(evaluate(flags, data), 4, f"the classes are not the run's: {data}/val has zebra")
    assert network.load(weights).classes == ["ant", "bee", "cat"]  # by the tools as well


@pytest.mark.parametrize("content", ["{}", "{"])
def test_an_invalid_data_json_is_an_error_in_a_test_and_a_note_in_training(runs, tmp_path, content):
    directory = shutil.copytree(runs["small"], tmp_path / "run")
    (directory / "data.json").write_text(content)
    flags = [f"--config={directory / 'config.yaml'}", f"--retrain={directory / 'model_best.pt'}"]
    data = runs["small"].parent / "data"
    shown = f"{directory / 'data.json'} .*; fix: restore it, or move it away"
    refused(evaluate(flags, data), 2, shown)
    result = run([*flags, f"--data={data}", f"--save={tmp_path / 'retrained'}"])
    assert result.code == 0
    assert f"the classes of the weights are not known: {directory / 'data.json'}" in result.err
    (directory / "data.json").rename(tmp_path / "data.json")
    assert error_of(evaluate(flags, data)) == error_of(evaluate(sources(runs["small"])[1], data))


def test_weights_on_their_own_take_the_classes_of_the_test_set(runs, tmp_path):
    for name, code, shown in (
        ("small", 3, "mean and deviation .* not known, and .* has no training images"),
        ("large", 4, "do not fit the network: classifier"),
    ):
        data = data_of(runs[name], tmp_path / name, "val")
        alone = shutil.copy(runs[name] / "model_last.pt", tmp_path / f"{name}.pt")
        flags = [f"--config={runs[name] / 'config.yaml'}", f"--retrain={alone}"]
        if name == "large":
            assert error_of(evaluate(flags, data)) == error_of(
                evaluate(sources(runs[name])[0], data)
            )
        shutil.rmtree(data / "val" / "bee")
        refused(evaluate(flags, data), code, shown)


def test_going_on_from_the_classifier_of_other_classes_is_noted(runs, tmp_path):
    data = data_of(runs["small"], tmp_path / "data", "train", "val")
    of_model, of_checkpoint = sources(runs["small"])[1:]

    def notes(flags: list[str], save: str) -> str:
        result = run([*flags, f"--data={data}", f"--save={tmp_path / save}"])
        assert result.code == 0, result.err
        return "".join(line for line in result.err.splitlines() if "classifier" in line)

    assert notes(of_model, "same classes") == ""
    for split in ("train", "val"):
        (data / split / "bee").rename(data / split / "zebra")
    note = (
        "note: the classifier was trained on other classes: class 1 is cat, the weights' is bee; "
    )
    for flags in (of_model, of_checkpoint):
        assert notes(flags, flags[1][-9:]).startswith(note)
    assert notes([*of_model, "--resetClassifier=true"], "reset") == ""


def test_names_that_look_alike_are_refused_with_what_differs():
    line = error_line(
        run_data.check_classes, ["e\u0301cu", "zebra"], ["zebra", "\xe9cu"], of=CheckpointError
    )
    assert "two Unicode forms" in line
    swapped = error_line(run_data.check_classes, ["b", "a"], ["a", "b"], of=CheckpointError)
    assert "class 0 is b, the run's is a" in swapped and "--retrain FILE" in swapped
