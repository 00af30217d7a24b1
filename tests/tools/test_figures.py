"""The figures show exactly the published numbers and the logs; Figure 5 follows from its CSV."""

import io
import itertools
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from PIL import Image

import opts
from errors import RunError, UsageError
from fileio import tensor_files
from helpers.run_directories import record, write_run
from helpers.run_main import ROOT
from models.densenet import DenseNet
from tools.figures import __main__ as figures
from tools.figures import layer_usage, plots, series
from tools.figures.series import Point
from tools.results import configs, runs
from tools.results.groups import Runs, SeedGroup, group_runs
from tools.results.published import Row

BASIC = "--bottleneck false --reduction 1"


def run_of(config: str | None = None, **flags: object) -> runs.Run:
    """Return a run of four epochs, the rate of which drops after the second and the third."""
    plain = {"depth": 40, "growthRate": 12, "nEpochs": 4}
    opt = opts.parse([f"--{name}={value}" for name, value in (plain | flags).items()])
    errors = [60.0, 30.0, 20.0, 15.0]
    rates = [0.1, 0.1, 0.01, 0.001]
    records = [
        record(epoch, error, rate)
        for epoch, (error, rate) in enumerate(zip(errors, rates, strict=True), start=1)
    ]
    return runs.Run(Path("runs/x-seed3"), opt, records, {}, {}, config)


def group_of(config: str, *errors: float) -> SeedGroup:
    opt = configs.configs()[config].opt
    return SeedGroup(
        [runs.Run(Path(), opt, [record(1, error)], {}, {}, config) for error in errors]
    )


@pytest.fixture
def uncounted(monkeypatch):
    """Replace the counts of networks: counting them all takes seconds."""
    counts = {config.opt.depth: config.opt.growthRate or 0 for config in configs.configs().values()}
    monkeypatch.setattr(series, "count", lambda opt: configs.Counts(opt.depth, counts[opt.depth]))


# ---------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    ("flags", "kind", "network"),
    [
        ("", "DenseNet-BC", "L=40 k=12"),
        (BASIC, "DenseNet", "L=40 k=12"),
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
    assert (series.kind(opt), series.network(opt)) == (kind, network)
    assert plots.KINDS[kind] not in [look for name, look in plots.KINDS.items() if name != kind]


def test_points_are_the_published_rows_with_a_config_and_the_means_of_one_folder(uncounted):
    def row(name: str | None, error: str) -> Row:
        return Row("any", None, None, {"A": error}, {"A": name} if name else {}, "paper", (), {})

    bc = "c10plus/densenet-bc-L100-k12"
    rows = [row(bc, "4.50"), row(None, "1.00")]
    assert series.published_points(rows, "A") == [Point("DenseNet-BC", "L=100 k=12", 100, 12, 4.5)]
    assert series.published_points(rows, "B") == []
    groups = {bc: group_of(bc, 5.0, 6.0)}
    groups["c10/densenet-L40-k12"] = group_of("c10/densenet-L40-k12", 9.0)
    (point,) = series.measured_points(groups, "c10plus")
    assert (point.kind, point.error, point.is_measured) == ("DenseNet-BC", 5.5, True)
    assert point.std == pytest.approx(0.5**0.5)
    assert series.measured_points(groups, "c10")[0].std is None


def test_rate_drops_are_the_steps_of_a_multistep_schedule():
    assert series.rate_drops(run_of()) == [2, 3]
    assert series.rate_drops(run_of(lrShape="cosine")) == []


def test_a_run_of_no_config_is_named_by_its_directory():
    assert series.curve_name(run_of()) == "x"
    assert series.curve_name(run_of(config="any")) == "DenseNet-BC L=40 k=12"
    for name, title in figures.PAPER_CURVES.items():
        assert series.curve_name(group_of(name, 1.0).runs[0]) == title


def test_runs_share_a_picture_when_data_and_length_agree():
    folder = {"dataset": "folder", "imageSize": 32}
    found = [run_of(**folder, data="my/images+"), run_of(), run_of(augment="false"),
             run_of(**folder, data="images+"), run_of(nEpochs=9), run_of()]  # fmt: skip
    found[-1].records = []
    drawn = []
    fake = SimpleNamespace(training=lambda group, title: drawn.append((len(group), title)))
    assert list(figures.training_curves(fake, found, "a note")) == [
        "curves-images-4-epochs", "curves-cifar10-plus-4-epochs", "curves-cifar10-4-epochs",
        "curves-cifar10-plus-9-epochs",
    ]  # fmt: skip
    # The note is about images of one's own: CIFAR's need none.
    assert drawn == [(2, "images-, 4 epochs\na note"), (1, "cifar10+, 4 epochs"),
                     (1, "cifar10, 4 epochs"), (1, "cifar10+, 9 epochs")]  # fmt: skip


def test_all_seeds_of_the_largest_network_of_each_kind_are_chosen(uncounted):
    names = ("c10plus/densenet-bc-L100-k12", "c10plus/densenet-L40-k12")
    groups = [group_of(names[0], 1, 2), group_of(names[1], 3)]
    groups.append(group_of("c10plus/densenet-bc-L250-k24", 4, 5))
    found = series.largest_of_each_kind(run for group in groups for run in group.runs)
    assert [run.error for run in found] == [4, 5, 3]


# ------------------------------------------------------------------------------------ the pictures

PUBLISHED = [
    Point("DenseNet-BC", "L=100 k=12", 800_000, 300_000_000, 4.5),
    Point("DenseNet-BC", "L=250 k=24", 15_000_000, 5_000_000_000, 3.6),
]
MEASURED = [Point("DenseNet-BC", "L=100 k=12", 800_000, 300_000_000, 4.7, True, 0.2)]
RESNET = [Point("pre-activation ResNet", "164", 1_700_000, 250_000_000, 5.5)]


def drawn_points(axes) -> dict[str, tuple]:
    """Return label -> (x, y, whether the markers are filled)."""
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
    points = PUBLISHED + MEASURED
    panels = [("one", "parameters", points), ("two", "macs", PUBLISHED), ("three", "macs", [])]
    figure = plots.efficiency(panels, "a title")
    left, right, none = figure.axes
    assert drawn_points(left) == {
        "DenseNet-BC, published": ([0.8, 15.0], [4.5, 3.6], False),
        "DenseNet-BC, measured": ([0.8], [4.7], True),
    }
    assert drawn_points(right) == {"DenseNet-BC, published": ([0.3, 5.0], [4.5, 3.6], False)}
    assert [container.has_yerr for container in left.containers] == [False, True]
    (bar,) = left.containers[1].lines[2]
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([4.5, 4.9])
    assert (left.get_xlabel(), right.get_xlabel(), left.get_ylabel()) == (
        "parameters, millions", "multiply-adds per image, billions", "test error, %"
    )  # fmt: skip
    assert legend_of(left) == ["DenseNet-BC", "published", "measured (bar: ± std of seeds)"]
    assert legend_of(right) == ["DenseNet-BC", "published", "measured: not run"]
    assert [text.get_text() for text in none.texts] == ["not run"]


def test_figure_4_shows_curves_where_there_are_logs():
    panels = [("one", "parameters", PUBLISHED + RESNET)]
    runs_of_bc = [run_of(config="any")]
    one, error, loss = plots.efficiency(panels, "", runs_of_bc, ("ResNet-1001",)).axes
    assert legend_of(one)[:2] == ["DenseNet-BC", "pre-activation ResNet"]
    line, *drops = error.lines
    assert list(line.get_ydata()) == [60, 30, 20, 15] and len(drops) == 2
    assert list(loss.lines[0].get_ydata()) == [1, 1, 1, 1] and loss.get_yscale() == "log"
    assert legend_of(error) == ["DenseNet-BC L=40 k=12", "ResNet-1001: not run"]
    *_, last = plots.efficiency(panels, "", [], ("A", "B")).axes
    assert [text.get_text() for text in last.texts] == ["not run"] and not last.lines
    assert legend_of(last) == ["A: not run", "B: not run"]


def test_names_of_points_stand_apart_and_inside():
    sizes = [(10, 20.0), (11, 20.03), (12, 19.97), (30, 21.0), (31, 20.97), (70, 19.5)]
    points = [Point("DenseNet", f"L={p} k=12", p * 10**6, p * 10**8, e) for p, e in sizes]
    panels = [("", "parameters", points), ("", "macs", points)]
    for axes in plots.efficiency(panels, "").axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 6
        assert all(axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_training_curves_are_those_of_the_logs():
    found = [run_of(config="any"), run_of(config="any"), run_of()]
    found[0].records[1]["train_loss"] = None
    figure = plots.training(found, "data, 4 epochs")
    train_loss, test_loss, train_error, test_error = figure.axes
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 4
    for axes, value in ((train_loss, 1), (test_loss, 2), (train_error, 50), (test_error, 15)):
        lines, drops = axes.lines[:3], axes.lines[3:]
        assert [line.get_ydata()[-1] for line in lines] == [value] * 3
        assert [line.get_xdata()[0] for line in drops] == [2, 3]
        assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert math.isnan(train_loss.lines[0].get_ydata()[1])
    names = ["DenseNet-BC L=40 k=12 (2 runs)", "x (1 run)", "learning rate drops"]
    assert legend_of(figure) == names
    assert (train_loss.get_title(), test_loss.get_title()) == ("training images", "test images")
    held_out = plots.training([run_of(validSize=6000)], "")
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
    texts = [text.get_text() for axes in (first, second) for text in axes.texts]
    assert texts == ["transition", "classifier"]
    assert first.get_ylim()[0] > first.get_ylim()[1]  # source 0 on top
    assert figure.get_suptitle() == "a net: blocks of 2, 1 layers\na $ and a $_^"
    assert "largest of its target" in bar.get_ylabel()
    figure.savefig(io.BytesIO())  # the note is not a formula
    raw = plots.heat_maps("a net", blocks, "none").axes
    assert raw[0].collections[0].get_clim() == (0, 6) and "not normalised" in raw[-1].get_ylabel()
    five = plots.heat_maps("n", [blocks[0]] * 4 + blocks[1:], "block")
    titles = [axes.get_title() for axes in five.axes]
    assert titles == [f"dense block {number}" for number in range(1, 6)] + [""]


def test_a_figure_has_the_same_bytes_on_any_day_and_with_any_settings(tmp_path):
    import matplotlib

    def saved(settings: dict) -> list[bytes]:
        block = layer_usage.Block("classifier", ((1.0,), (1.0, 0.0)))
        with matplotlib.rc_context(settings):
            figure = plots.heat_maps("a", [block], "none")
            return [path.read_bytes() for path in plots.save(figure, tmp_path, "figure")]

    png, svg = saved({})
    assert saved({"font.size": 20, "savefig.bbox": "tight", "axes.grid": False}) == [png, svg]
    assert b"dc:date" not in svg and b"Matplotlib v" not in svg
    assert set(Image.open(io.BytesIO(png)).info) == {"dpi"}


# -------------------------------------------------------------------------- figures of the project


def test_figures_3_and_4_take_their_numbers_from_the_published_tables(uncounted):
    asked = []
    fake = SimpleNamespace(efficiency=lambda *arguments: asked.append(arguments))
    bc = "c10plus/densenet-bc-L100-k12"
    found = Runs({bc: group_of(bc, 4.7)}, [], [], [])
    figures.figure3(fake, found)
    figures.figure4(fake, found, [run_of(config=bc), run_of(config="c10/other")])
    errors = [
        {(kind, is_measured): {point.error for point in points}
         for kind, is_measured, points in plots._series(points)}
        for panels, *_ in asked for _, _, points in panels
    ]  # fmt: skip
    imagenet = {
        ("ResNet", False): {26.73, 24.01, 22.44, 22.16},
        ("DenseNet-BC", False): {25.0, 23.6, 22.5, 22.2, 22.1, 21.2},
        ("DenseNet-BC, cosine rate", False): {21.6, 20.4},
    }
    basic = {("DenseNet", False): {5.24, 4.10, 3.74}}
    bc = {("DenseNet-BC", False): {4.51, 3.62, 3.46}, ("DenseNet-BC", True): {4.7}}
    resnet = {("pre-activation ResNet", False): {5.46, 4.62}}
    assert errors == [imagenet, imagenet, basic | bc, bc | resnet]
    _, title, drawn, absent = asked[1]
    assert "C10+" in title and len(drawn) == 1 and absent == ("pre-activation ResNet-1001",)


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
        assert figure.stat().st_size < 300_000
    for figure in tmp_path.glob("*.png"):
        assert Image.open(figure).size[0] == 1120 and figure.stat().st_size < 150_000
    assert "not run" in contents(tmp_path / "figure4.svg")[0]


def test_the_figure_of_own_runs_says_which_data_they_saw(tmp_path):
    flags = f"--config {ROOT}/configs/digits/densenet-bc-L22-k12.yaml"
    write_run(tmp_path / "run", flags, [50.0] * 19 + [10.0])
    found = group_runs(runs.find([tmp_path]))
    assert figures.own_figure4(plots, found, "small", "") is None
    figure = figures.own_figure4(plots, found, "digits", "of a folder")
    assert figure.get_suptitle() == "Runs of configs/digits, not of the paper: digits, 20 epochs"
    assert drawn_points(figure.axes[0])["DenseNet-BC, measured"] == ([0.071686], [10.0], True)


# --------------------------------------------------------------------------------------- Figure 5


@pytest.fixture
def weights(tmp_path) -> Path:
    """Write the weights of a small DenseNet as those of a run."""
    path = tmp_path / "net-seed0" / "model_last.pt"
    path.parent.mkdir()
    tensor_files.save_weights(path, DenseNet((2, 1), 2, 5, 4).state_dict())
    return path


def test_figure_5_is_a_function_of_its_csv(tmp_path, weights):
    for source, out in ((weights, "a"), (tmp_path / "a/figure5.csv", "b")):
        assert figures.main(["--weights", str(source), "--output", str(tmp_path / out)]) == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab"]
    assert files[0].keys() == {"figure5.csv", "figure5.png", "figure5.svg"}
    assert files[0] == files[1] and b"\nnet-seed0,1,1,0," in files[0]["figure5.csv"]
    alone = weights.rename(tmp_path / "alone.pt")
    assert figures.read_layer_usage(alone)[0] == "alone"


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, weights, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4)
    tensor_files.save_weights(tmp_path / "resnet.pt", resnet.state_dict())
    (tmp_path / "bad.csv").write_text("not,it\n")
    lua = ROOT / "tests" / "models" / "lua_networks" / "densenet-bc.t7"
    (tmp_path / "lua.t7").write_bytes(lua.read_bytes())
    monkeypatch.chdir(tmp_path)
    cases = [
        ("empty", 3, "no run in"),
        ("absent", 3, "not a directory"),
        ("--weights empty", 4, "no checkpoint in"),
        ("--weights net-seed0", 4, f"fix: name {weights.relative_to(tmp_path)}"),
        ("--weights resnet.pt", 4, "resnet.pt is not of a DenseNet: it has no dense block"),
        ("--weights absent.pt", 4, "no such file or directory"),
        ("--weights bad.csv", 3, "bad.csv is not a complete table"),
        ("--weights absent.csv", 3, "cannot read"),
        ("--weights lua.t7", 4, "named as in Lua; fix: write them with python -m tools.export"),
        (f"--weights {weights} --output bad.csv/out", 6, "name another directory with --output"),
    ]
    for argv, code, what in cases:
        output = () if "--output" in argv else ("--output", "out")
        assert figures.main([*argv.split(), *output]) == code
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and what in error
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "no run directory"),
        ("runs --only figure6", "use figure"),
        ("runs --only figure5", "name --weights CHECKPOINT"),
        ("--weights w.pt --only figure3", "name a run directory"),
        ("runs --weights w.pt --only curves", "weights and scale are of figure5"),
        ("runs --scale block", "weights and scale are of figure5"),
        ("runs --weights w.pt --only figure5", "figure5 shows no run"),
        ("runs --scale row --weights w.pt", "scale: 'row' is not one of column"),
        ("runs --width 3", "unknown flag width"),
    ],
)
def test_a_wrong_command_line_is_refused(argv, message):
    with pytest.raises(UsageError) as error:
        figures.parse(argv.split())
    assert message in error.value.report()


def test_by_default_every_possible_figure_is_drawn():
    asked = figures.parse(["a", "b", "--weights", "w.pt"])
    assert asked.runs == ["a", "b"] and asked.only == list(figures.NAMES)
    assert figures.parse(["a"]).only == list(figures.NAMES[:-1])
    assert figures.parse(["--weights", "w.pt"]).only == ["figure5"]


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tools.figures.plots")
    monkeypatch.delattr("tools.figures.plots")
    assert figures.main(["--weights", "w.pt"]) == RunError.code
    fix = "pip install -r requirements-tools.txt"
    assert capsys.readouterr().err == f"error: tools.figures needs matplotlib; fix: {fix}\n"
