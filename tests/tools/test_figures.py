"""The figures show exactly the published numbers and the logs; Figure 5 follows from its CSV."""

import io
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import opts
from errors import RunError, UsageError
from fileio import tensor_files
from helpers import torch7_writer
from helpers.run_main import ROOT
from helpers.sample_runs import cell, logged, record
from models.densenet import DenseNet
from tools.figures import __main__ as figures
from tools.figures import layer_usage, plots, series
from tools.figures.series import Point, Series, curve_name
from tools.results import configs, match

# ------------------------------------------------------------------------------------ the pictures

PUBLISHED = Series(
    "DenseNet-BC",
    False,
    (
        Point("L=100 k=12", 800_000, 300_000_000, 4.5),
        Point("L=250 k=24", 15_000_000, 5_000_000_000, 3.6),
    ),
)
MEASURED = Series("DenseNet-BC", True, (Point("L=100 k=12", 800_000, 300_000_000, 4.7, 0.2),))
RESNET = Series("pre-activation ResNet", False, (Point("164", 1_700_000, 250_000_000, 5.5),))


def drawn_points(axes) -> dict[str, tuple]:
    """label -> (x, y, face colour is the edge colour) of everything with error bars or points."""
    found = {}
    for container in axes.containers:
        line = container.lines[0]
        filled = line.get_markerfacecolor() == line.get_color()
        found[container.get_label()] = (list(line.get_xdata()), list(line.get_ydata()), filled)
    return found


def legend_of(owner) -> list[str]:
    legend = owner.get_legend() if hasattr(owner, "get_legend") else owner.legends[0]
    return [text.get_text() for text in legend.get_texts()]


def test_published_points_are_hollow_and_measured_ones_filled_with_bars():
    figure = plots.results([PUBLISHED, MEASURED], "top-1 error, %")
    left, right = figure.axes
    assert drawn_points(left) == {
        "DenseNet-BC, published": ([0.8, 15.0], [4.5, 3.6], False),
        "DenseNet-BC, measured": ([0.8], [4.7], True),
    }
    assert drawn_points(right)["DenseNet-BC, published"][0] == [0.3, 5.0]
    bars = {container.get_label(): container.has_yerr for container in left.containers}
    assert bars == {"DenseNet-BC, published": False, "DenseNet-BC, measured": True}
    (bar,) = left.containers[1].lines[2]
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([4.5, 4.9])
    assert (left.get_xlabel(), right.get_xlabel(), left.get_ylabel()) == (
        "parameters, millions", "multiply-adds per image, billions", "top-1 error, %"
    )  # fmt: skip


def test_what_was_not_measured_is_said_and_not_drawn():
    legend = legend_of(plots.results([PUBLISHED], "e"))
    assert legend == ["DenseNet-BC", "published", "measured: not run"]
    legend = legend_of(plots.results([PUBLISHED, MEASURED], "e"))
    assert legend == ["DenseNet-BC", "published", "measured (bar: ± std of seeds)"]


def test_figure_4_shows_curves_where_there_are_logs():
    curve = series.curve(logged())
    panels = [("one", "parameters", [PUBLISHED, RESNET]), ("two", "macs", [])]
    figure = plots.efficiency(panels, [curve], ["ResNet-1001"], "a title")
    one, two, error, loss = figure.axes
    assert legend_of(one)[:2] == ["DenseNet-BC", "pre-activation ResNet"]
    assert [text.get_text() for text in two.texts] == ["not run"]
    (line, *drops) = error.lines
    assert list(line.get_ydata()) == [60, 30, 20, 15] and len(drops) == 2
    assert list(loss.lines[0].get_ydata()) == [1, 1, 1, 1] and loss.get_yscale() == "log"
    assert legend_of(error) == ["DenseNet-BC L=100 k=12", "ResNet-1001: not run"]
    assert figure.get_suptitle() == "a title"


def test_figure_4_without_logs_says_not_run():
    *_, last = plots.efficiency([("one", "parameters", [PUBLISHED])], [], ["A", "B"]).axes
    assert [text.get_text() for text in last.texts] == ["not run"] and not last.lines
    assert legend_of(last) == ["A: not run", "B: not run"]


def crowded() -> list[Series]:
    sizes = [(10, 20.0), (11, 20.03), (12, 19.97), (30, 21.0), (31, 20.97), (70, 19.5)]
    many = [Point(f"L={p} k=12", p * 10**6, p * 10**8, error) for p, error in sizes]
    return [Series("DenseNet", False, tuple(many))]


def overlaps(axes) -> int:
    boxes = [text.get_window_extent() for text in axes.texts]
    return sum(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_names_of_points_stand_apart_and_inside():
    for axes in plots.results(crowded(), "e").axes:
        assert len(axes.texts) == 6 and overlaps(axes) == 0
        boxes = [text.get_window_extent() for text in axes.texts]
        assert all(axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 for box in boxes)
        for text in axes.texts:  # all on one side they would not
            text.set(ha="left", va="bottom")
            text.xyann = (5, 3)
        assert overlaps(axes) > 0


def test_training_curves_are_those_of_the_logs():
    curves = [series.curve(run) for run in (logged(), logged(), logged(None))]
    figure = plots.training(curves, "data, 4 epochs")
    train_loss, test_loss, train_error, test_error = figure.axes
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 4
    for axes, value in ((train_loss, 1), (test_loss, 2), (train_error, 12.5), (test_error, 15)):
        lines, drops = axes.lines[:3], axes.lines[3:]
        assert [line.get_ydata()[-1] for line in lines] == [value] * 3
        assert [line.get_xdata()[0] for line in drops] == [2, 3]
        assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert legend_of(figure) == [
        "DenseNet-BC L=100 k=12 (2 runs)", "x (1 run)", "learning rate drops"
    ]  # fmt: skip
    assert (train_loss.get_title(), test_loss.get_title()) == ("training images", "test images")
    held_out = plots.training([series.curve(logged(validSize=6000))], "")
    assert held_out.axes[1].get_title() == "validation images"
    assert test_error.get_xlabel() == "epoch" and train_error.get_ylabel() == "top-1 error, %"


def test_the_heat_map_shows_the_scaled_cells_and_nothing_where_nothing_is_connected():
    blocks = [
        layer_usage.Block("transition", ((2.0,), (1.0, 4.0), (3.0, 6.0, 1.5))),
        layer_usage.Block("classifier", ((5.0,), (5.0, 2.5))),
    ]
    figure = plots.heat_maps("a net", blocks, "column", "a $ and a $_^")
    first, second, bar = figure.axes
    layers, exit_column = first.collections
    want = [[1.0, 0.25], [math.nan, 1.0], [math.nan, math.nan]]
    np.testing.assert_array_equal(layers.get_array().filled(math.nan), want)
    assert exit_column.get_array().ravel().tolist() == [0.5, 1.0, 0.25]
    assert layers.get_clim() == exit_column.get_clim() == (0, 1)
    assert [text.get_text() for axes in (first, second) for text in axes.texts] == [
        "transition", "classifier"
    ]  # fmt: skip
    assert first.get_ylim()[0] > first.get_ylim()[1]  # source 0 on top
    assert figure.get_suptitle() == "a net: blocks of 2, 1 layers\na $ and a $_^"
    assert "largest of its target" in bar.get_ylabel()
    assert plots.files(figure)  # the note is no formula
    raw = plots.heat_maps("a net", blocks, "none").axes
    assert raw[0].collections[0].get_clim() == (0, 6) and "not normalised" in raw[-1].get_ylabel()


def test_five_blocks_have_a_panel_each():
    blocks = [layer_usage.Block("transition", ((1.0,), (1.0, 1.0)))] * 4
    figure = plots.heat_maps(
        "n", [*blocks, layer_usage.Block("classifier", ((1.0,), (1, 1)))], "block"
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"dense block {number}" for number in range(1, 6)] + [""]


def test_the_same_figure_is_the_same_bytes_without_a_date_or_a_version():
    block = [layer_usage.Block("classifier", ((1.0,), (0.5, 0.25)))]
    first, again = (plots.files(plots.heat_maps("a", block, "none")) for _ in range(2))
    other = plots.files(plots.heat_maps("b", block, "none"))
    assert first == again
    assert first["svg"] != other["svg"] and first["png"] != other["png"]
    assert b"dc:date" not in first["svg"] and b"Matplotlib v" not in first["svg"]
    assert set(Image.open(io.BytesIO(first["png"])).info) == {"dpi"}


def test_a_persons_own_settings_of_matplotlib_do_not_matter():
    import matplotlib

    block = [layer_usage.Block("classifier", ((1.0,), (0.5, 0.25)))]
    plain = plots.files(plots.heat_maps("a", block, "none"))
    with matplotlib.rc_context({"font.size": 20, "savefig.bbox": "tight", "axes.grid": False}):
        assert plots.files(plots.heat_maps("a", block, "none")) == plain


# -------------------------------------------------------------------------------- the command line


def write_run(root: Path, seed: int, error: float, name: str = "digits/densenet-bc-L22-k12"):
    """A complete run directory without weights."""
    settings = opts.parse(["--config", f"{ROOT}/configs/{name}.yaml", "--manualSeed", str(seed)])
    directory = root / f"{Path(name).name}-seed{seed}"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(opts.as_yaml(settings, opts.NOT_SAVED))
    epochs = range(1, settings.nEpochs + 1)
    drops = [sum(epoch >= first for first in settings.milestones) for epoch in epochs]
    records = [record(epoch, 0.1 / 10**drop) for epoch, drop in zip(epochs, drops, strict=True)]
    records[-1]["val_top1"] = error
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (directory / "status.json").write_text('{"state": "done", "code": 0}')
    return directory


def test_runs_become_figures(tmp_path, capsys):
    for seed, error in ((0, 10.0), (1, 12.0)):
        write_run(tmp_path / "runs", seed, error)
    argv = [str(tmp_path / "runs"), "--only", "figure4-digits,curves,figure4-small"]
    assert figures.main([*argv, "--output", str(tmp_path / "out")]) == 0
    names = ["figure4-digits", "curves-digits-20-epochs"]
    want = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == want
    assert "figure4-small: not run: there is no complete run" in capsys.readouterr().out
    for path in (tmp_path / "out").glob("*.png"):
        assert Image.open(path).size[0] == 1120 and path.stat().st_size < 150_000
    for path in (tmp_path / "out").glob("*.svg"):
        assert path.stat().st_size < 300_000
    assert "measured (bar: ± std of seeds)" in (tmp_path / "out/figure4-digits.svg").read_text()


def test_the_aside_figure_shows_the_mean_of_the_runs_and_says_what_they_are(tmp_path):
    found = match.find([write_run(tmp_path, seed, error).parent for seed, error in ((0, 10.0),)])
    assert figures.figure4_aside(plots, match.group_runs(found).groups, "small") is None
    figure = figures.figure4_aside(plots, match.group_runs(found).groups, "digits", "of a folder")
    assert figure.get_suptitle() == (
        "Runs of configs/digits, no cell of the paper: digits, 20 epochs"
    )
    (x, y, filled) = drawn_points(figure.axes[0])["DenseNet-BC, measured"]
    assert y == [10.0] and filled and x == [found[0].parameters / 1e6]


def test_curves_have_a_file_for_each_data_and_length():
    cifar = {"dataset": "cifar10", "data": "data"}
    found = [logged(**cifar, augment=augment) for augment in (True, True, False)]
    found.append(logged(dataset="folder", data="my/cats", augment=True))
    drawn = []
    fake = SimpleNamespace(training=lambda *given: drawn.append((len(given[0]), given[1])))
    names = figures.training_curves(fake, found, "a note").keys()
    assert list(names) == [
        "curves-cifar10-plus-4-epochs", "curves-cifar10-4-epochs", "curves-cats-4-epochs"
    ]  # fmt: skip
    # The note is about images of one's own: CIFAR's need none.
    assert drawn == [
        (2, "cifar10+, 4 epochs"), (1, "cifar10, 4 epochs"), (1, "cats, 4 epochs\na note")
    ]  # fmt: skip


@pytest.fixture
def uncounted(monkeypatch):
    """The configs with made-up counts: counting them all takes seconds."""
    found = {
        name: SimpleNamespace(opt=config.opt, parameters=number, macs=number)
        for number, (name, config) in enumerate(configs.configs().items())
    }
    monkeypatch.setattr(figures.configs, "configs", lambda: found)


def test_figure_4_takes_its_numbers_from_table_2(uncounted):
    asked = []
    fake = SimpleNamespace(efficiency=lambda *arguments: asked.append(arguments))
    name = "c10plus/densenet-bc-L100-k12"
    figures.figure4(fake, {}, [])
    figures.figure4(fake, {name: cell("t/small", 4.7)}, [logged(name), logged("c10/other")])
    (panels, curves, absent, title), (with_run, one_curve, one_absent, _) = asked
    assert "C10+" in title
    errors = [
        {(one.kind, one.is_measured): {point.error for point in one.points} for one in shown}
        for _, _, shown in (*panels, *with_run)
    ]
    basic = {("DenseNet", False): {5.24, 4.10, 3.74}}
    bc = {("DenseNet-BC", False): {4.51, 3.62, 3.46}}
    resnet = {("pre-activation ResNet", False): {5.46, 4.62}}
    found = {("DenseNet-BC", True): {4.7}}
    assert errors == [basic | bc, bc | resnet, basic | bc | found, bc | resnet | found]
    assert curves == [] and absent == list(figures.PAPER_CURVES.values())
    assert [curve.name for curve in one_curve] == ["DenseNet-BC L=100 k=12"]
    assert one_absent == ["pre-activation ResNet-1001"]


def test_figure_3_takes_its_numbers_from_the_imagenet_table(uncounted):
    asked = []
    figures.figure3(SimpleNamespace(results=lambda shown, _: asked.extend(shown)), {})
    errors = {one.kind: {point.error for point in one.points} for one in asked}
    assert errors["ResNet"] == {26.73, 24.01, 22.44, 22.16}
    assert errors["DenseNet-BC"] == {25.0, 23.6, 22.5, 22.2, 22.1, 21.2}
    assert errors["DenseNet-BC, cosine rate"] == {21.6, 20.4}


def test_what_figure_4_calls_missing_curves_is_what_it_calls_those_it_has():
    for name, title in figures.PAPER_CURVES.items():
        run = SimpleNamespace(config=name, opt=configs.configs()[name].opt)
        assert curve_name(run) == title


def tiny() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet((2, 1), 2, 5, 4)


def save(model: torch.nn.Module, path: Path) -> Path:
    tensor_files.save_weights(path, model.state_dict())
    return path


def test_figure_5_is_a_function_of_its_csv(tmp_path):
    run = tmp_path / "net-seed0"
    run.mkdir()
    save(tiny(), run / "model_last.pt")
    for source, out in ((run / "model_last.pt", "a"), (tmp_path / "a/figure5.csv", "b")):
        assert figures.main(["--weights", str(source), "--output", str(tmp_path / out)]) == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab"]
    assert files[0].keys() == {"figure5.csv", "figure5.png", "figure5.svg"}
    assert files[0] == files[1]


def test_weights_are_named_after_their_run_or_else_their_file(tmp_path):
    run = tmp_path / "net-seed0"
    run.mkdir()
    last = save(tiny(), run / "model_last.pt")
    alone = save(tiny(), tmp_path / "alone.pt")
    names = [figures.cells_of(path)[0] for path in (last, alone)]
    assert names == ["net-seed0", "alone"]


def test_a_run_directory_without_a_checkpoint_names_its_model(tmp_path, capsys):
    last = save(tiny(), tmp_path / "model_last.pt")
    assert figures.main(["--weights", str(tmp_path), "--output", str(tmp_path / "out")]) == 4
    assert f"fix: name {last}" in capsys.readouterr().err


def test_weights_with_the_names_of_lua_are_called_so(tmp_path, capsys):
    path = tmp_path / "network.t7"
    path.write_bytes(torch7_writer.dumps(torch7_writer.Lua(tiny().state_dict()).densenet()))
    assert figures.main(["--weights", str(path), "--output", str(tmp_path / "out")]) == 4
    assert "are named as in Lua; fix: write them with python -m tools.export" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no run directory"),
        (["runs", "--only", "figure6"], "use figure"),
        (["runs", "--only", "figure5"], "name --weights CHECKPOINT"),
        (["--weights", "w.pt", "--only", "figure3"], "name a run directory"),
        (["runs", "--weights", "w.pt", "--only", "curves"], "weights and scale are of figure5"),
        (["runs", "--scale", "block"], "weights and scale are of figure5"),
        (["runs", "--weights", "w.pt", "--only", "figure5"], "no run is shown in figure5"),
        (["runs", "--scale", "row", "--weights", "w.pt"], "scale: 'row' is not one of column"),
        (["runs", "--width", "3"], "unknown flag width"),
    ],
)
def test_a_wrong_command_line_is_told(argv, message):
    with pytest.raises(UsageError) as error:
        figures.parse(argv)
    assert message in error.value.report()


def test_what_can_be_drawn_is_drawn_by_default():
    asked = figures.parse(["a", "b", "--weights", "w.pt"])
    assert asked.runs == ["a", "b"] and asked.only == list(figures.NAMES)
    assert figures.parse(["a"]).only == list(figures.NAMES[:-1])
    assert figures.parse(["--weights", "w.pt"]).only == ["figure5"]


def reported(argv: list[str], capsys) -> tuple[int, str]:
    code = figures.main(argv)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return code, error


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    resnet = save(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4),
                  tmp_path / "resnet.pt")  # fmt: skip
    (tmp_path / "bad.csv").write_text("not,it\n")
    cases = [
        ([str(tmp_path / "empty")], 3, "no run in"),
        ([str(tmp_path / "absent")], 3, "no such directory"),
        (["--weights", str(tmp_path / "empty")], 4, "no checkpoint in"),
        (["--weights", str(resnet)], 4, "resnet.pt is not of a DenseNet: it has no dense block"),
        (["--weights", str(tmp_path / "absent.pt")], 4, "no such file or directory"),
        (["--weights", str(tmp_path / "bad.csv")], 3, "does not have the columns"),
        (["--weights", str(tmp_path / "absent.csv")], 3, "cannot read"),
    ]
    for argv, code, what in cases:
        got, error = reported([*argv, *out], capsys)
        assert got == code and what in error
    assert not (tmp_path / "out").exists()


def test_bad_input_says_what_it_is(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    save(tiny(), tmp_path / "w.pt")
    out = str(tmp_path / "file" / "out")
    code, error = reported(["--weights", str(tmp_path / "w.pt"), "--output", out], capsys)
    assert code == 6 and "--output" in error and out in error


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tools.figures.plots")
    monkeypatch.delattr("tools.figures.plots")
    code, error = reported(["--weights", "w.pt"], capsys)
    assert code == RunError.code
    assert error == (
        "error: tools.figures needs matplotlib; fix: pip install -r requirements-tools.txt\n"
    )


def contents(figure: Path) -> tuple[list[str], np.ndarray]:
    """What is written in an SVG file of matplotlib, and the numbers of its paths."""
    text = figure.read_text()
    numbers = re.findall(r"-?\d+\.\d+", text)
    return re.findall(r"<!-- (.*?) -->", text), np.array(list(map(float, numbers)))


def test_the_committed_figures_are_those_of_the_committed_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    note = re.search('JPEG = "(.*)"', (ROOT / "Makefile").read_text())[1]
    asked = ["results/runs", "--only", "figure3,figure4,figure4-small,figure4-digits,figure5"]
    asked += ["--weights", "results/figures/figure5.csv", "--note", note, "--output", str(tmp_path)]
    assert figures.main(asked) == 0
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 5
    for figure in drawn:
        words, numbers = contents(ROOT / "results/figures" / figure.name)
        today, now = contents(figure)
        assert words == today and len(numbers) == len(now)
        assert np.allclose(numbers, now, atol=0.01)
        assert not np.allclose(numbers + 0.02, now, atol=0.01)
    assert "not run" in contents(tmp_path / "figure4.svg")[0]


def test_help_names_every_flag(capsys):
    assert figures.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in figures.FLAGS)
