"""Test that the figures show the published numbers and the logs, and Figure 5 its CSV."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

import opts
from fileio import tensor_files
from helpers.run_directories import record, write_run
from helpers.run_main import ROOT
from models.densenet import DenseNet
from tools.figures import __main__ as figures
from tools.figures import layer_usage, plots
from tools.results import configs, runs
from tools.results.runs import SeedGroup

BC = "c10plus/densenet-bc-L100-k12"


def run_of(**flags: object) -> runs.Run:
    """Return a run of four epochs."""
    plain = {"depth": 40, "growthRate": 12, "nEpochs": 4}
    opt = opts.parse([f"--{name}={value}" for name, value in (plain | flags).items()])
    records = [record(epoch, error) for epoch, error in enumerate([60.0, 30.0, 20.0, 15.0], 1)]
    return runs.Run(Path("runs/x-seed3"), opt, records, {}, {})


def group_of(config: str, *errors: float) -> SeedGroup:
    opt = configs.configs()[config].opt
    return SeedGroup([runs.Run(Path(), opt, [record(1, error)], {}, {}) for error in errors])


def drawn_points(axes) -> dict[str, tuple]:
    """Return label -> (x, y, whether the markers are filled)."""
    found = {}
    for container in axes.containers:
        line = container.lines[0]
        filled = line.get_markerfacecolor() == line.get_color()
        found[container.get_label()] = (list(line.get_xdata()), list(line.get_ydata()), filled)
    return found


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# The pictures:
@pytest.mark.parametrize(
    ("flags", "kind", "network"),
    [
        ("", "DenseNet-BC", "L=40 k=12"),
        ("--bottleneck false --reduction 1", "DenseNet", "L=40 k=12"),
        ("--reduction 1", "DenseNet-B", "L=40 k=12"),
        ("--bottleneck false", "DenseNet-C", "L=40 k=12"),
        ("--lrShape cosine", "DenseNet-BC, cosine rate", "L=40 k=12"),
        ("--netType resnet --depth 20", "ResNet", "20"),
        ("--netType preresnet --depth 164", "pre-activation ResNet", "164"),
    ],
)
def test_a_network_is_named_as_in_the_paper_and_has_its_own_look(flags, kind, network):
    flags = flags if "netType" in flags else f"--depth 40 --growthRate 12 {flags}"
    opt = opts.parse(flags.split())
    assert (plots.kind(opt), plots.network(opt)) == (kind, network)
    assert plots.KINDS[kind] not in [look for name, look in plots.KINDS.items() if name != kind]


def test_figures_3_and_4_show_the_published_errors_and_the_means_of_runs():
    groups = {BC: group_of(BC, 5.0, 6.0), "c10/densenet-L40-k12": group_of(BC, 9.0)}
    figure4, figure3 = (plots.efficiency(f"figure{n}", groups, "") for n in (4, 3))
    by_size, by_macs = (drawn_points(axes) for axes in figure4.axes[:2])
    assert by_size["DenseNet, published"][1:] == ([5.24, 4.10, 3.74], False)
    assert by_size["DenseNet-BC, published"][1:] == ([4.51, 3.62, 3.46], False)
    assert by_size["pre-activation ResNet, published"][1:] == ([5.46, 4.62], False)
    # Neither those of stochastic depth nor other networks of Table 2.
    assert by_size["ResNet, published"][1:] == ([6.61, 6.41], False) and len(by_size) == 5
    # 769,162 parameters and 287,929,692 multiply-adds: tests/tools/test_report.py
    assert by_size["DenseNet-BC, measured"] == ([0.769162], [5.5], True)
    assert by_macs["DenseNet-BC, measured"] == ([0.287929692], [5.5], True)
    (bar,) = figure4.axes[0].containers[-1].lines[2]
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([5.5 - 0.5**0.5, 5.5 + 0.5**0.5])
    assert [axes.get_xlabel() for axes in figure4.axes] == [
        "parameters, millions", "multiply-adds per image, billions", "epoch", "epoch"
    ]  # fmt: skip
    loss, error = (axes.lines[0] for axes in figure4.axes[2:])
    records = groups[BC].runs[0].records
    assert error.get_ydata().tolist() == [record["val_top1"] for record in records]
    assert loss.get_ydata().tolist() == [record["train_loss"] for record in records]
    assert figure4.axes[3].get_legend_handles_labels()[1] == ["DenseNet-BC L=100 k=12"]
    missing = figure4.axes[3].get_legend().get_title().get_text()
    assert missing == "not run: c10plus/preresnet-1001"
    names = [text.get_text() for text in figure4.axes[0].texts]
    assert len(names) == len(set(names)) + 1 == 9  # L=100 k=12, with and without BC
    assert sorted(legend_of(figure4)) == sorted(by_size)
    assert figure4.get_suptitle() == "CIFAR-10 with augmentation (C10+)"
    imagenet = {name: set(errors) for name, (_, errors, _) in drawn_points(figure3.axes[0]).items()}
    assert imagenet == {
        "ResNet, published": {26.73, 24.01, 22.44, 22.16},
        "DenseNet-BC, published": {25.0, 23.6, 22.5, 22.2, 22.1, 21.2},
        "DenseNet-BC, cosine rate, published": {21.6, 20.4},
    }
    assert "measured: not run" in figure3.get_suptitle()


def test_the_figure_of_own_runs_says_which_data_they_saw(tmp_path):
    flags = f"--config {ROOT}/configs/digits/densenet-bc-L22-k12.yaml"
    for seed in (0, 1):
        words = f"{flags} --manualSeed {seed}"
        write_run(tmp_path / f"{seed}", words, [50.0] * 19 + [10.0], data={"training_set": seed})
    found = runs.find([tmp_path])
    groups = {found[0].config: SeedGroup(found)}
    assert plots.efficiency("figure4-small", groups, "") is None
    figure = plots.efficiency("figure4-digits", groups, "of a folder")
    assert figure.get_suptitle() == (
        "Runs of configs/digits, not of the paper: digits, 20 epochs; not all on the same images"
    )
    assert drawn_points(figure.axes[0]) == {"DenseNet-BC, measured": ([0.071686], [10.0], True)}


def test_runs_share_a_picture_when_data_and_length_agree():
    folder = {"dataset": "folder", "imageSize": 32}
    found = [run_of(**folder, data="my/images"), run_of(), run_of(augment="false"),
             run_of(**folder, data="images"), run_of(nEpochs=9), run_of()]  # fmt: skip
    found[-1].records = []
    drawn = plots.curves(found, "a note")
    # The note is about images of one's own: CIFAR's need none.
    assert {name: figure.get_suptitle() for name, figure in drawn.items()} == {
        "curves-images-4-epochs": "images, 4 epochs\na note",
        "curves-cifar10-plus-4-epochs": "cifar10+, 4 epochs",
        "curves-cifar10-4-epochs": "cifar10, 4 epochs",
        "curves-cifar10-plus-9-epochs": "cifar10+, 9 epochs",
    }
    assert legend_of(drawn["curves-images-4-epochs"])[0] == "x (2 runs)"


def test_training_curves_are_those_of_the_logs():
    config = configs.configs()[BC].opt
    found = [run_of(), run_of(), run_of()]
    found[0].opt = found[1].opt = config  # of 300 epochs; the rate drops after 149 and 224
    found[0].records[1]["train_loss"] = None
    figure = plots.training(found, "a title")
    train_loss, test_loss, train_error, test_error = figure.axes
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 4
    for axes, value in ((train_loss, 1), (test_loss, 2), (train_error, 50), (test_error, 15)):
        lines, drops = axes.lines[:3], axes.lines[3:]
        assert [line.get_ydata()[-1] for line in lines] == [value] * 3
        assert {149, 224} <= {line.get_xdata()[0] for line in drops}
        assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert math.isnan(train_loss.lines[0].get_ydata()[1])
    names = ["DenseNet-BC L=100 k=12 (2 runs)", "x (1 run)", "learning rate drops"]
    assert legend_of(figure) == names
    assert (train_loss.get_title(), test_loss.get_title()) == ("training images", "test images")
    held_out = plots.training([run_of(validSize=6000)], "")
    assert held_out.axes[1].get_title() == "validation images"
    cosine = plots.training([run_of(lrShape="cosine")], "")
    assert legend_of(cosine) == ["x (1 run)"]


def test_the_heat_map_shows_the_scaled_cells_and_nothing_where_nothing_is_connected():
    blocks = [[[2.0], [1.0, 4.0], [3.0, 6.0, 1.5]], [[5.0], [5.0, 2.5]]]
    figure = plots.figure5("a net", blocks, "a note")
    first, second, bar = figure.axes
    (image,) = first.images
    nan = math.nan
    want = [[1.0, 0.25, nan, 0.5], [nan, 1.0, nan, 1.0], [nan, nan, nan, 0.25]]
    np.testing.assert_array_equal(image.get_array().filled(nan), want)
    assert image.get_clim() == (0, 1)
    # The cell of layer 1 and the input is in the upper left corner.
    assert image.get_extent() == [0.5, 4.5, 2.5, -0.5] and image.origin == "upper"
    labels = [axes.get_xlabel() for axes in (first, second)]
    assert labels == ["target layer | transition", "target layer | classifier"]
    assert figure.get_suptitle() == "a net: blocks of 2, 1 layers\na note"
    assert "largest of its target" in bar.get_ylabel()
    for scale, divisor in (("block", 6.0), ("none", 1.0)):
        image = plots.figure5("a net", blocks, "", scale).axes[0].images[0]
        assert image.get_array()[2, 3] == 1.5 / divisor


# The files:
def contents(figure: Path) -> tuple[list[str], np.ndarray]:
    """Return the texts in an SVG file of matplotlib, and the numbers of its paths."""
    text = figure.read_text()
    numbers = re.findall(r"-?\d+\.\d+", text)
    return re.findall(r"<!-- (.*?) -->", text), np.array(list(map(float, numbers)))


def test_the_committed_figures_are_those_of_the_committed_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    note = re.search('JPEG = "(.*)"', (ROOT / "Makefile").read_text())[1]
    asked = ["results/runs", "--weights", "results/figures/figure5.csv", "--note", note]
    asked += ["--only", "figure3,figure4,figure4-small,figure4-digits,figure5"]
    assert figures.main([*asked, "--output", str(tmp_path)]) == 0
    drawn = {path.name for path in tmp_path.iterdir()}
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == drawn
    assert len(drawn) == 2 * 5 + 1
    for figure in tmp_path.glob("*.svg"):
        words, numbers = contents(ROOT / "results/figures" / figure.name)
        today, now = contents(figure)
        assert words == today and len(numbers) == len(now)
        assert np.allclose(numbers, now, atol=0.01), "draw it again: make report"
    for figure in tmp_path.glob("*.png"):
        assert Image.open(figure).size[0] == 1120 and figure.stat().st_size < 300_000
    assert "measured: not run" in contents(tmp_path / "figure4.svg")[0]


@pytest.fixture
def weights(tmp_path) -> Path:
    """Write the weights of a small DenseNet as those of a run."""
    path = tmp_path / "net-seed0" / "model_last.pt"
    path.parent.mkdir()
    tensor_files.save_weights(path, DenseNet((2, 1), 2, 5, 4).state_dict())
    return path


def test_figure_5_has_the_same_bytes_from_weights_from_its_csv_and_with_any_settings(
    tmp_path, weights
):
    import matplotlib

    settings = {"font.size": 20, "savefig.bbox": "tight", "axes.grid": False}
    cases = [(weights, "a", {}), (tmp_path / "a/figure5.csv", "b", settings)]
    for source, out, changed in cases:
        argv = ["--weights", str(source), "--output", str(tmp_path / out), "--note", "a $ and $_^"]
        with matplotlib.rc_context(changed):
            assert figures.main(argv) == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab"]
    assert files[0].keys() == {"figure5.csv", "figure5.png", "figure5.svg"}
    assert files[0] == files[1] and b"\nnet-seed0,1,1,0," in files[0]["figure5.csv"]
    svg = files[0]["figure5.svg"]
    assert b"dc:date" not in svg and b"Matplotlib v" not in svg
    assert set(Image.open(io.BytesIO(files[0]["figure5.png"])).info) == {"dpi"}
    alone = weights.rename(tmp_path / "alone.pt")
    assert layer_usage.read(alone)[0] == "alone"


# The command line:
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, weights, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4)
    tensor_files.save_weights(tmp_path / "resnet.pt", resnet.state_dict())
    (tmp_path / "bad.csv").write_text("not,it\n")
    lua = ROOT / "tests" / "models" / "lua_networks" / "densenet-bc.t7"
    (tmp_path / "lua.t7").write_bytes(lua.read_bytes())
    monkeypatch.chdir(tmp_path)
    only = f"name some of {', '.join(figures.NAMES)}: figure5 needs --weights, the others a run"
    cases = [
        ("", 2, "no run directory"),
        ("empty --only figure6", 2, f"cannot draw 'figure6'; fix: {only}"),
        ("empty --only figure5", 2, f"cannot draw 'figure5'; fix: {only}"),
        ("--weights w.pt --only figure3,figure5", 2, f"cannot draw 'figure3'; fix: {only}"),
        ("empty --weights w.pt --only curves", 2, "weights are of figure5 alone"),
        ("empty", 3, "no run in"),
        ("absent", 3, "not a directory"),
        ("--weights empty", 4, "no checkpoint in"),
        ("--weights net-seed0", 4, f"fix: name {weights.relative_to(tmp_path)}"),
        ("--weights resnet.pt", 4, "resnet.pt is not of a DenseNet: it has no dense block"),
        ("--weights absent.pt", 4, "no such file or directory"),
        ("--weights bad.csv", 3, "bad.csv is not a complete table"),
        ("--weights absent.csv", 3, "cannot read"),
        ("--weights lua.t7", 4, "named as in Lua; fix: write them with python -m tools.export"),
        (f"--weights {weights} --output bad.csv/out", 6, "write elsewhere: --save, --output"),
    ]
    for argv, code, what in cases:
        output = () if "--output" in argv else ("--output", "out")
        assert figures.main([*argv.split(), *output]) == code
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and what in error
    assert not (tmp_path / "out").exists()


def test_by_default_every_possible_figure_is_drawn():
    asked = figures.parse(["a", "b", "--weights", "w.pt"])
    assert asked.runs == ["a", "b"] and asked.only == list(figures.NAMES)
    assert figures.parse(["a"]).only == list(figures.NAMES[:-1])
    assert figures.parse(["--weights", "w.pt"]).only == ["figure5"]


# Errors of each epoch on test images, and what stands at the bottom of the axis.
@pytest.mark.parametrize(("errors", "scale"), [
    ([0.0, 0.0, 0.0, 0.0], "linear"), ([0.0], "linear"), ([None] * 4, "linear"),
    ([50.0, 0.0, 0.5, 0.0], "symlog"), ([100.0] * 4, "log"), ([60.0, None, 30.0, 15.0], "log"),
])  # fmt: skip
def test_every_error_is_seen_and_draws_no_warning(tmp_path, capsys, recwarn, errors, scale):
    more = {"train_top1": errors[-1], "depth": None}
    run = f"--depth 40 --growthRate 12 --nEpochs {len(errors)}"
    (found,) = runs.find([write_run(tmp_path / "x", run, errors, **more)])
    figure = plots.training([found], "title")
    for axes in figure.axes[2:]:
        low, high = axes.get_ylim()
        drawn = [y for line in axes.lines if line.get_marker() == "." for y in line.get_ydata()]
        assert axes.get_yscale() == scale
        assert all(low <= y <= high for y in drawn if not math.isnan(y))
        assert [tick for tick in axes.get_yticks() if low <= tick <= high]
    argv = [str(tmp_path), "--only=curves,figure4", "--output", str(tmp_path / "out")]
    assert figures.main(argv) == 0 and len(list((tmp_path / "out").iterdir())) == 4
    assert capsys.readouterr().err == "" and list(recwarn) == []


def test_names_in_other_scripts_keep_their_pictures_apart_and_missing_letters_are_noted(
    tmp_path, capsys
):
    for number, data in enumerate("猫犬"):
        flags = f"--dataset folder --imageSize 32 --nEpochs 1 --data /x/{data}"
        path, flags = tmp_path / f"line\nbreak{number}", f"{flags} --depth 40 --growthRate 12"
        write_run(path, flags, [9.0], data={"training_set": data})
    code = figures.main([str(tmp_path), "--only=curves", "--output", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert code == 0 and names == {"curves-猫-1-epochs.png", "curves-犬-1-epochs.png"}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(
        re.match("note: curves-.-1-epochs: Glyph", line) for line in lines
    )
