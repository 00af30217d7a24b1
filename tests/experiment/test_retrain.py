"""Test --retrain from the command line with weights as other programs save them."""

import argparse
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cli.path_checks import split_key
from faults.contract import TINY_FILES, command, refused, write_files
from helpers.run_main import run

FLAGS = {**TINY_FILES, "nThreads": 0, "nGPU": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train an epoch; return the run, beside whose directory its images lie in `data`."""
    root = tmp_path_factory.mktemp("trained")
    write_files(root / "data")
    result = run(command(**FLAGS, data=root / "data", save=root / "run", nEpochs=1))
    assert result.code == 0, result.err
    return root / "run"


def weights(trained: Path) -> dict[str, torch.Tensor]:
    return torch.load(trained / "model_last.pt", weights_only=True)


def evaluated(trained: Path, source: object, **flags: object):
    return run(
        command(**FLAGS | flags, data=trained.parent / "data", testOnly=True, retrain=source)
    )


def loss(result) -> str:
    return re.search(r"Err (\S+)", result.out)[1]


SAVED = {
    "dp.pt": lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
    "msd.pt": lambda w: {"model_state_dict": w},
    "ns.pt": lambda w: {"state_dict": w, "args": argparse.Namespace(lr=1)},
    "compiled.pt": lambda w: {"net": {f"_orig_mod.{name}": tensor for name, tensor in w.items()}},
    "lightning.ckpt": lambda w: {"state_dict": {f"model.{name}": item for name, item in w.items()}},
    "timm.safetensors": dict,
}


def save(path: Path, state: dict) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path, {"format": "pt"})
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", SAVED)
def test_weights_as_other_programs_save_them_are_evaluated(trained, tmp_path, name):
    wanted = run(command(resume=trained, testOnly=True))
    result = evaluated(trained, save(tmp_path / name, SAVED[name](weights(trained))))
    assert result.code == 0 and not result.err, result.err
    assert loss(result) == loss(wanted)


def test_the_moving_average_is_evaluated_and_noted_once_and_a_key_names_the_other(
    trained, tmp_path
):
    plain = weights(trained)
    average = plain | {"classifier.bias": torch.tensor([9.0, 0.0])}
    path = save(tmp_path / "a:b.pth", {"state_dict": plain, "state_dict_ema": average})
    first, other = evaluated(trained, path), evaluated(trained, f"{path}:state_dict")
    (note,) = first.err.splitlines()
    assert note.endswith("state_dict_ema, the moving average; name the other as FILE:state_dict")
    assert not other.err and loss(other) != loss(first)
    assert loss(other) == loss(evaluated(trained, trained / "model_last.pt"))
    wrong = evaluated(trained, f"{path}:model")
    refused(wrong, 4, "holds no model; fix: name FILE:state_dict or FILE:state_dict_ema")


def test_a_file_and_a_key_are_split_at_the_last_colon_of_no_file(tmp_path):
    (tmp_path / "a:b").touch()
    names = {"a:b": None, "a:b:ema": "ema", "a:b:x:y": "x:y", "c:ema": None, "a": None}
    for name, key in names.items():
        path = tmp_path / (name if key is None else "a:b")
        assert split_key(str(tmp_path / name)) == (path, key)


def test_weights_without_this_classifier_get_one_piece_of_advice_that_works(trained, tmp_path):
    body = {name: t for name, t in weights(trained).items() if not name.startswith("classifier.")}
    seven = {"classifier.weight": torch.ones(7, 12), "classifier.bias": torch.ones(7)}
    for state in (body, body | seven):
        path = save(tmp_path / "nohead.pt", state)
        advice = "use weights with a classifier of 2 classes, or train one: leave out --testOnly"
        refused(evaluated(trained, path), 4, f"{advice} and add --resetClassifier true$")
        both = evaluated(trained, path, resetClassifier=True)
        refused(both, 2, "would test a random classifier")
        flags = {"data": trained.parent / "data", "save": tmp_path / str(len(state)), "nEpochs": 1}
        line = command(**FLAGS, **flags, retrain=path)
        refused(run(line), 4, "; fix: add --resetClassifier true$")
        result = run([*line, "--resetClassifier=true"])
        assert result.code == 0, result.err
