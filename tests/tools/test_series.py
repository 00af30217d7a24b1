"""Points and curves are the published rows, the cells of runs and their logs, number by number."""

import pytest

from helpers.sample_runs import BASIC, CONFIGS, cell, logged, opt
from tools.figures import plots, series
from tools.results.published import Row


def published_row(name: str | None, error: float | None) -> Row:
    errors, names = ({} if error is None else {"A": error}), ({"A": name} if name else {})
    return Row("any", None, None, errors, names, "paper")


def test_published_points_are_the_rows_that_have_a_config():
    rows = [
        published_row("t/big", 3.5), published_row("t/basic", 6.0), published_row("t/small", 4.5),
        published_row(None, 1.0), published_row("t/unknown", 2.0), published_row("t/small", None),
    ]  # fmt: skip
    basic, bc = series.published_series(rows, "A", CONFIGS)
    assert (basic.kind, basic.is_measured) == ("DenseNet", False)
    assert basic.points == (series.Point("L=100 k=12", 15, 300, 6.0),)
    assert bc.points == (
        series.Point("L=100 k=12", 10, 100, 4.5),
        series.Point("L=250 k=12", 20, 200, 3.5),
    )
    assert series.published_series(rows, "B", CONFIGS) == []


def test_measured_points_are_means_over_seeds_of_one_folder():
    found = {"t/small": cell("t/small", 5.0, 6.0), "t/basic": cell("t/basic", 7.0)}
    basic, bc = series.measured_series(found | {"u/other": cell("u/other", 9.0)}, "t")
    assert basic.is_measured and basic.points[0].spread is None
    assert bc.points == (series.Point("L=100 k=12", 10, 100, 5.5, pytest.approx(0.5**0.5)),)
    assert series.measured_series(found, "u") == []


@pytest.mark.parametrize(
    ("settings", "kind", "network"),
    [
        ({}, "DenseNet-BC", "L=100 k=12"),
        (BASIC, "DenseNet", "L=100 k=12"),
        ({"reduction": 1.0}, "DenseNet-B", "L=100 k=12"),
        ({"bottleneck": False}, "DenseNet-C", "L=100 k=12"),
        ({"lrShape": "cosine"}, "DenseNet-BC, cosine rate", "L=100 k=12"),
        ({"netType": "resnet", "depth": 50}, "ResNet", "50"),
        ({"netType": "preresnet", "depth": 164}, "pre-activation ResNet", "164"),
    ],
)
def test_a_network_is_called_as_in_the_paper_and_has_its_own_look(settings, kind, network):
    assert (series.kind(opt(**settings)), series.network(opt(**settings))) == (kind, network)
    looks = [look for name, look in plots.KINDS.items() if name != kind]
    assert plots.KINDS[kind] not in looks


def test_a_curve_is_the_log_with_the_epochs_before_which_the_rate_fell():
    run = logged()
    run.records[1]["train_loss"] = None
    curve = series.curve(run)
    assert (curve.name, curve.kind) == ("DenseNet-BC L=100 k=12", "DenseNet-BC")
    assert curve.epochs == (1, 2, 3, 4) and curve.num_epochs == 4
    assert curve.values["train_loss"] == (1.0, None, 1.0, 1.0)
    assert curve.values["val_top1"] == (60.0, 30.0, 20.0, 15.0)
    assert curve.drops == (2, 3)
    assert series.curve(logged(lrShape="cosine")).drops == ()


def test_a_run_of_no_config_is_called_by_its_directory():
    assert series.curve_name(logged(None)) == "x"
    assert series.curve_name(logged(netType="preresnet")) == "pre-activation ResNet-100"


def test_runs_share_a_picture_when_data_and_length_agree():
    folder = {"dataset": "folder", "data": "data/my images+", "augment": True}
    cifar = {"dataset": "cifar10", "data": "data"}
    found = [logged(**folder), logged(**cifar, augment=True), logged(**cifar, augment=False),
             logged(**folder), logged(**folder, nEpochs=9), logged(**folder)]  # fmt: skip
    found[-1].records = []
    sizes = {title: len(group) for title, group in series.alike(found).items()}
    assert sizes == {"my-images-, 4 epochs": 2, "cifar10+, 4 epochs": 1, "cifar10, 4 epochs": 1,
                     "my-images-, 9 epochs": 1}  # fmt: skip


def test_all_seeds_of_the_largest_network_of_each_kind_are_chosen():
    found = [*cell("t/small", 1, 2).runs, *cell("t/basic", 3).runs, *cell("t/big", 4, 5).runs]
    assert [run.error for run in series.largest_of_each_kind(found)] == [4, 5, 3]
