"""Test that files for and from other libraries are compared with the library before one is written.

tests/models/test_weight_formats.py holds the rules against what the libraries computed themselves.
"""

import csv
import dataclasses
import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision.models.densenet
from PIL import Image

import checkpoints
import fileio.safetensors
import models.factory
import opts
from faults.contract import command, write_files
from fileio import tensor_files
from helpers.inference import scramble
from helpers.run_main import run
from models.weight_formats import FORMATS, import_weights
from tools import classify, extract_features
from tools.export import __main__ as export

FILES = Path(__file__).parents[1] / "models/library_files"
TINY = {
    "dataset": "imagenet", "imageSize": 72, "growthRate": 4, "initChannels": 8,
    "d1": 1, "d2": 2, "d3": 1, "d4": 1, "nThreads": 0, "nGPU": 0,
}  # fmt: skip
SUFFIXES = {"keras": ".weights.h5", "paddle": ".pdparams"}


@pytest.fixture
def source(tmp_path) -> list[str]:
    """Write weights of a small DenseNet; return the arguments that name and describe them."""
    model = scramble(models.factory.create(opts.parse(command(**TINY)), num_classes=5))
    tensor_files.save_weights(tmp_path / "plain.pt", model.state_dict())
    return [str(tmp_path / "plain.pt"), *command(**TINY)]


def exported(source: list[str], to: str, output: Path, *flags: str, code: int = 0) -> Path:
    assert export.main([*source, f"--to={to}", f"--output={output}", *flags]) == code
    assert output.exists() == (code == 0)
    return output


def same(found: dict, wanted: dict) -> bool:
    names = {name for name in wanted if not name.endswith("num_batches_tracked")}
    return names <= found.keys() and all(torch.equal(found[n], wanted[n]) for n in names)


@pytest.mark.parametrize("to", ["monai", "torchxrayvision", "keras", "paddle"])
def test_weights_go_to_a_library_and_back_bit_for_bit(source, tmp_path, capsys, to):
    wanted = checkpoints.load_weights(Path(source[0]))
    there = exported(source, to, tmp_path / f"there{SUFFIXES.get(to, '.pt')}")
    flags = [*source[1:], f"--from={to}", "--inputRange=0,1", "--nChannels=3"]
    back = exported([str(there), *flags], "weights", tmp_path / "back.pt")
    assert same(checkpoints.load_weights(back), wanted)
    told = capsys.readouterr().out
    rules = f"a restatement of {FORMATS[to].title}'s rules in double precision, 4 images: logits"
    assert told.count(rules) == 2
    offs = re.findall(r"rules .* (\S+) of the largest", told)
    assert all(float(off) < 1e-12 for off in offs)
    # Keras's network has another epsilon; what that changes is told, both ways.
    assert ("epsilon 1e-05 of this network instead of Keras's 1.001e-05" in told) == (to == "keras")


def test_paddles_dropout_goes_there_and_back_within_rounding(source, tmp_path, capsys):
    flags = ["--paddleDropout=0.2"]
    there = exported([*source, *flags], "paddle", tmp_path / "it.pdparams")
    back = exported([str(there), *source[1:], *flags], "weights", tmp_path / "back.pt")
    found, wanted = checkpoints.load_weights(back), checkpoints.load_weights(Path(source[0]))
    assert all(torch.allclose(found[n], wanted[n], rtol=2**-23, atol=0) for n in wanted
               if not n.endswith("tracked"))  # fmt: skip
    offs = re.findall(r"Paddle's rules .* (\S+) of the largest", capsys.readouterr().out)
    assert len(offs) == 2 and all(float(off) < 1e-6 for off in offs)
    # The twin: by renaming alone the network computes something else.
    renamed = import_weights(checkpoints.load_weights(there), None, [].append)
    assert not same(renamed.weights, wanted)


def encoder_module(eps: float) -> types.ModuleType:
    """Make a module as segmentation-models-pytorch has it, with another epsilon in one norm."""

    class DenseNetEncoder(torchvision.models.densenet.DenseNet):
        def __init__(self, out_channels: list[int], **flags: object):
            super().__init__(**flags)
            del self.classifier
            self.features.norm5.eps = eps

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [images, self.features(images)]

    module = types.ModuleType("segmentation_models_pytorch.encoders.densenet")
    module.DenseNetEncoder = DenseNetEncoder
    return module


@pytest.mark.parametrize(("eps", "code"), [(1e-5, 0), (1e-3, 2)])
def test_the_library_itself_is_run_where_it_is_installed(
    source, tmp_path, monkeypatch, capsys, eps, code
):
    module = encoder_module(eps)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = exported(source, "segmentation-models", tmp_path / "encoder.pt", code=code)
    told = capsys.readouterr()
    assert "segmentation-models-pytorch in double precision, 4 images: logits" in told.out
    assert ("beyond rounding" in told.err) == (code == 2)
    if code == 0:
        weights = checkpoints.load_weights(path)
        assert len(weights) == len(checkpoints.load_weights(Path(source[0]))) - 2
        assert not any("classifier" in name for name in weights)


def test_an_encoder_goes_there_and_back_and_has_features_but_no_classes(source, tmp_path, capsys):
    there = exported(source, "segmentation-models", tmp_path / "encoder.pt")
    classes = tmp_path / "data.json"
    classes.write_text(json.dumps({"classes": ["a", "b"], "mean": [0] * 3, "std": [1] * 3}))
    line = [str(there), *source[1:], f"--classes={classes}"]
    back = exported(line, "weights", tmp_path / "back.pt")
    found, wanted = checkpoints.load_weights(back), checkpoints.load_weights(Path(source[0]))
    assert wanted.keys() - found.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    again = exported(line, "segmentation-models", tmp_path / "again.pt")
    assert same(checkpoints.load_weights(again), checkpoints.load_weights(there))
    Image.new("RGB", (90, 80)).save(tmp_path / "it.png")
    for tool in (classify, extract_features):
        output = [f"--output={tmp_path / 'f.npz'}"] * (tool is extract_features)
        assert tool.main([*line, str(tmp_path / "it.png"), *output]) == (0 if output else 4)
    exported(line, "timm", tmp_path / "timm.pt", code=4)
    assert capsys.readouterr().err.count("error: these weights have no classifier") == 2


@pytest.mark.parametrize(
    ("to", "output", "line"),
    [
        ("kera", "it.h5", "error: to: 'kera' is not one of .*; fix: use keras"),
        ("keras", "it.pt", "error: Keras reads .weights.h5 or .h5, not it.pt; fix: --output .*h5"),
        ("keras", "it.keras", "error: Keras reads .weights.h5 or .h5, not it.keras; fix: .*"),
        ("paddle", "it.pt", "error: Paddle reads .pdparams, not it.pt; fix: --output .*pdparams"),
        ("weights", "it.h5", "error: it.h5 is no name for --to weights; fix: --output .*it.pt"),
        ("timm", "it.pdparams", "error: it.pdparams is no name for --to timm; fix: .*it.pt"),
    ],
)
def test_a_target_or_file_name_that_is_wrong_is_refused(source, tmp_path, capsys, to, output, line):
    exported(source, to, tmp_path / output, code=2)
    assert re.match(line, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ({"netType": "resnet", "depth": 18}, "monai has no resnet"),
        ({"reduction": 0.4}, "its blocks have other widths"),
        ({"bottleneck": False}, "its blocks have other widths"),
        (
            {"dataset": "cifar10", "imageSize": 32, "depth": 10},
            "monai has no densenet for images of 32 pixels",
        ),
    ],
)
def test_a_network_that_the_library_does_not_have_is_refused(tmp_path, capsys, flags, shown):
    own = {name: None for name in ("d1", "d2", "d3", "d4") if "depth" in flags}
    if flags.get("netType"):
        own |= {"growthRate": None, "initChannels": None}
    line = command(**TINY | own | flags)
    model = scramble(models.factory.create(opts.parse(line), num_classes=5))
    tensor_files.save_weights(tmp_path / "other.pt", model.state_dict())
    exported([str(tmp_path / "other.pt"), *line], "monai", tmp_path / "it.pt", code=2)
    assert re.search(f"error: .*{shown}.*; fix: use --to onnx", capsys.readouterr().err)


def test_a_library_that_is_broken_is_restated(source, tmp_path, monkeypatch, capsys):
    class Broken:
        def find_spec(self, name, *_):
            if name == "monai":
                raise AttributeError("module 'numpy' has no attribute 'bool8'")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    exported(source, "monai", tmp_path / "it.pt")
    assert "a restatement of MONAI's rules" in capsys.readouterr().out


def test_weights_of_another_epsilon_than_the_library_has_are_not_written(source, tmp_path, capsys):
    exported(source, "torchvision", tmp_path / "it.pt", "--bnEps=1e-3", code=2)
    assert "epsilon 0.001 of this network instead of torchvision's 1e-05: logits differ by" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["features.norm5.bias", "classifier.weight"])
def test_logits_that_depend_on_no_image_prove_nothing(source, tmp_path, capsys, name):
    weights = checkpoints.load_weights(Path(source[0]))
    weights[name] = torch.zeros_like(weights[name]) - (1000 if "norm5" in name else 0)
    tensor_files.save_weights(Path(source[0]), weights)
    exported(source, "monai", tmp_path / "it.pt", code=4)
    assert "logits are the same for all images" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "value"), [("conv_axes", (3, 2, 1, 0)), ("eps", 1e-3)])
def test_a_wrong_rule_in_the_table_is_found_by_the_restatement(
    source, tmp_path, monkeypatch, capsys, field, value
):
    wrong = dataclasses.replace(FORMATS["keras"], **{field: value})
    monkeypatch.setitem(FORMATS, "keras", wrong)
    exported(source, "keras", tmp_path / "it.h5", code=2)
    assert "beyond rounding" in capsys.readouterr().err


def test_a_file_of_other_names_than_the_library_named_is_refused(source, tmp_path, capsys):
    for library in ("monai", "keras", "paddle"):
        exported([*source, f"--from={library}"], "weights", tmp_path / "it.pt", code=4)
        assert re.fullmatch("error: these weights have no .*; fix: .*\n", capsys.readouterr().err)


# torchxrayvision: one channel, another range, independent outputs with thresholds.
def test_scores_of_torchxrayvision_are_independent_and_calibrated(tmp_path, capsys):
    pixels = torch.randint(0, 256, (82, 82), dtype=torch.uint8)  # 72 of 82 are the centre's
    Image.fromarray(pixels.numpy()).save(tmp_path / "chest.png")
    file = FILES / "torchxrayvision.pt"
    line = [str(file), str(tmp_path / "chest.png"), *command(**TINY), "--top=18", "--csv=-"]
    assert classify.main(line) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    found = {int(row["class"]): float(row["percent"]) / 100 for row in rows}

    weights = torch.load(file)
    flags = command(**TINY, nChannels=1)
    model = models.factory.create(opts.parse(flags), num_classes=18).double().eval()
    thresholds = weights.pop("op_threshs").tolist()
    model.load_state_dict(weights)
    centre = pixels[5:77, 5:77].double()[None, None]
    with torch.no_grad():
        logits = model((2 * centre / 255 - 1) * 1024)[0].sigmoid().tolist()
    for number, (score, t) in enumerate(zip(logits, thresholds, strict=True)):
        wanted = score / t / 2 if score < t else 1 - (1 - score) / (1 - t) / 2
        assert found[number] == pytest.approx(0.5 if t != t else wanted, abs=1e-5)
    assert sum(found.values()) != pytest.approx(1, abs=0.1)  # the twin: a softmax


def test_torchxrayviews_weights_are_fine_tuned_resumed_and_exported_with_their_key(
    tmp_path, capsys
):
    data = write_files(tmp_path / "data")
    flags = command(**TINY | {"dataset": "folder", "batchSize": 4, "data": data})
    start = [*flags, f"--retrain={FILES / 'torchxrayvision.pt'}", "--resetClassifier=true"]
    save = f"--save={tmp_path / 'run'}"
    assert run([*start, "--nEpochs=1", save]).code == 0
    # The same command goes on, though the weights had changed its settings.
    result = run([*start, "--nEpochs=2", save, "--resume=auto", "--override=true"])
    assert result.code == 0, result.err
    config = (tmp_path / "run/config.yaml").read_text()
    assert "inputRange: [-1024.0, 1024.0]" in config and "nChannels: 1" in config
    assert json.loads((tmp_path / "run/data.json").read_text())["mean"] == [127.5]

    path = exported([str(tmp_path / "run")], "torchxrayvision", tmp_path / "back.pt")
    weights = torch.load(path)
    assert weights["op_threshs"].tolist() == [0.5, 0.5]
    assert weights["features.conv0.weight"].shape[1] == 1
    trained = torch.load(tmp_path / "run/model_last.pt")
    assert same(weights, trained)


def test_thresholds_stay_with_a_file_and_end_with_training(tmp_path, capsys):
    file = FILES / "torchxrayvision.pt"
    wanted = torch.load(file)["op_threshs"]
    held = exported([str(file), *command(**TINY)], "safetensors", tmp_path / "it.safetensors")
    back = exported([str(held)], "torchxrayvision", tmp_path / "back.pt")
    assert torch.equal(torch.load(back)["op_threshs"].nan_to_num(2), wanted.nan_to_num(2))

    data = write_files(tmp_path / "data", train=1, val=1, classes=" ".join("abcdefghijklmnopqr"))
    flags = command(**TINY | {"dataset": "folder", "batchSize": 9, "data": data})
    save = f"--save={tmp_path / 'run'}"
    assert run([*flags, f"--retrain={file}", "--nEpochs=1", save]).code == 0
    assert run([f"--resume={tmp_path / 'run'}", "--nEpochs=2"]).code == 0
    assert json.loads((tmp_path / "run/data.json").read_text())["thresholds"] == []
    path = exported([str(tmp_path / "run")], "torchxrayvision", tmp_path / "run.pt")
    assert torch.load(path)["op_threshs"].tolist() == [0.5] * 18
    image = next((data / "val").rglob("*.png"))
    assert classify.main([str(tmp_path / "run"), str(image), "--top=18", "--csv=-"]) == 0
    printed = capsys.readouterr().out
    rows = [*csv.DictReader(io.StringIO(printed[printed.index("image,") :]))]
    assert sum(float(row["percent"]) for row in rows) == pytest.approx(100)


def test_the_metadata_of_a_file_win_over_what_its_names_tell(source, tmp_path):
    data = write_files(tmp_path / "data")
    flags = command(**TINY | {"dataset": "folder", "batchSize": 4, "data": data, "nEpochs": 1})
    there = exported(source, "monai", tmp_path / "it.safetensors")
    named = ["--from=monai", "--resetClassifier=true", f"--retrain={there}"]
    assert run([*flags, *named, f"--save={tmp_path / 'run'}"]).code == 0
    # As of torchxrayvision, whose pixels have another range than this network was trained with.
    there = exported(source, "torchxrayvision", tmp_path / "x.safetensors")
    named = ["--from=torchxrayvision", "--resetClassifier=true", f"--retrain={there}"]
    assert run([*flags, *named, f"--save={tmp_path / 'other'}"]).code == 0
    assert "inputRange" not in (tmp_path / "other/config.yaml").read_text().partition("defaults")[0]

    content = safetensors.torch.load(there.read_bytes())
    known = json.dumps({"classes": ["a"], "mean": [0], "std": [1]})
    for settings in ("{", "bnEps: [", "bnEps: abc"):
        metadata = {"settings": settings, "data": known}
        there.write_bytes(fileio.safetensors.to_bytes(content, metadata))
        refused = run([*flags, f"--retrain={there}", "--testOnly=true"])
        assert refused.code == 2 and "has invalid metadata; fix: use another" in refused.err


def test_a_network_of_torchxrayvision_without_thresholds_has_independent_scores(tmp_path, capsys):
    weights = torch.load(FILES / "torchxrayvision.pt")
    del weights["op_threshs"]
    torch.save(weights, tmp_path / "plain.pt")
    Image.new("L", (82, 82), 90).save(tmp_path / "chest.png")
    line = [str(tmp_path / "plain.pt"), *command(**TINY), "--from=torchxrayvision"]
    assert classify.main([*line, str(tmp_path / "chest.png"), "--top=18", "--csv=-"]) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert sum(float(row["percent"]) for row in rows) != pytest.approx(100, abs=1)
    back = exported(line, "torchxrayvision", tmp_path / "back.pt")
    assert torch.load(back).keys() == weights.keys()


def test_a_config_repeats_a_run_from_weights_of_paddle(tmp_path):
    data = write_files(tmp_path / "data")
    flags = command(**TINY | {"dataset": "folder", "batchSize": 4, "data": data})
    file, first = FILES / "paddle.pdparams", tmp_path / "first"
    line = [*flags, f"--retrain={file}", "--paddleDropout=0.2", "--resetClassifier=true"]
    assert run([*line, "--nEpochs=1", f"--save={first}"]).code == 0
    again = run([f"--config={first / 'config.yaml'}", f"--save={tmp_path / 'again'}"])
    assert again.code == 0, again.err
    one, other = (torch.load(path / "model_last.pt") for path in (first, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    none = run([*flags, "--paddleDropout=0.2", "--nEpochs=1", f"--save={tmp_path / 'x'}"])
    assert none.code == 2 and "paddleDropout without weights to retrain" in none.err


def test_a_run_keeps_the_epsilon_of_keras_weights(tmp_path, capsys):
    data = write_files(tmp_path / "data")
    flags = command(**TINY | {"dataset": "folder", "batchSize": 4, "data": data})
    start = [*flags, f"--retrain={FILES / 'keras.h5'}", "--resetClassifier=true"]
    save = f"--save={tmp_path / 'run'}"
    result = run([*start, "--nEpochs=1", save])
    assert result.code == 0 and "bnEps 1.001e-05" in result.err, result.err
    assert "bnEps: 1.001e-05" in (tmp_path / "run/config.yaml").read_text()
    assert run([f"--resume={tmp_path / 'run'}", "--nEpochs=2"]).code == 0
    # So does a run that starts from its weights, and a file for another library.
    again = run([*flags, f"--retrain={tmp_path / 'run/model_last.pt'}", "--nEpochs=1",
                 f"--save={tmp_path / 'next'}"])  # fmt: skip
    assert again.code == 0, again.err
    assert "bnEps: 1.001e-05" in (tmp_path / "next/config.yaml").read_text()
    exported([str(tmp_path / "next")], "torchvision", tmp_path / "it.pt")
    told = capsys.readouterr().out
    assert "epsilon 1.001e-05 of this network instead of torchvision's 1e-05" in told
