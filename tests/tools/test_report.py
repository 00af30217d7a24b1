"""Test tools.report: the document holds the published and the measured results, side by side."""

import re
import shlex

import pytest

from errors import UsageError
from helpers.run_directories import write_run
from helpers.run_main import ROOT
from tools.report import __main__ as report
from tools.results import published

SMALL = "--config configs/small/densenet-L22-k12.yaml --data images"
BC = "--config configs/c10plus/densenet-bc-L100-k12.yaml"
K48 = "--config configs/wide/c10plus-L40-k48.yaml"
SVHN = "--config configs/svhn/densenet-L40-k12.yaml"
CURVE = [50.0] * 299
FIVE = [9.0, 8.0, 7.0, 6.0, 41.25]
NEEDS = ("hardware", "hours", "s/step", "MB")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """Return the tables of a document, each as its rows by title."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        titles, _, *body = [
            [cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()
        ]
        found.append([dict(zip(titles, row, strict=True)) for row in body])
    return found


def by_config(markdown: str) -> dict[str, dict[str, str]]:
    """Return the lines of the tables that have a column `measured`, by config."""
    rows = [row for table in tables(markdown) for row in table if "measured" in row]
    return {row["config"].strip("`"): row for row in rows if "config" in row}


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> str:
    """Report no runs at all."""
    return report.create([str(tmp_path_factory.mktemp("empty"))])


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> str:
    """Report runs of four configs, one of them with three seeds, and runs that do not count."""
    path = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for seed, error in ((0, 4.6), (1, 4.4), (2, 4.8)):
            write_run(path / f"bc-{seed}", f"{BC} --manualSeed {seed}", [*CURVE, error])
        write_run(path / "k48", K48, [*CURVE, 3.9], images_per_s=320.0, memory_mb=2345.6)
        write_run(path / "svhn", SVHN, [2.5] * 40, status={"test_top1": 1.8}, val_time_s=None)
        images = SMALL.replace("images", "x/cifar10-jpeg")
        metadata = {"train": 10_000, "val": 2_000}
        write_run(path / "small", images, FIVE, data=metadata, time_s=1.0, val_time_s=1.0)
        write_run(path / "half", f"{BC} --precision half", [*CURVE, 4.9], device=None)
        write_run(path / "going", f"{BC} --manualSeed 3", CURVE[:17], "running")
        write_run(path / "bc-0-again", BC, [*CURVE, 1.0])
        return report.create([str(path)])


def test_every_cell_that_was_not_measured_says_so(empty):
    lines = by_config(empty)
    assert len(lines) >= 48 + 27 + 6 + 12
    for name, row in lines.items():
        assert {row[title] for title in ("measured", *NEEDS)} == {"not run"}
        assert row.get("difference", "-") == "-"
        is_held_out = name.startswith("svhn/") or "/resnet-110" in name or "-1202-" in name
        is_held_out &= name != "svhn/wideresnet-16-4"
        assert row["chosen by"] == ("best validation" if is_held_out else "last epoch")
    overviews = [rows for rows in tables(empty) if "method" in rows[0]]
    for rows, size, num_cited in zip(overviews, (21, 4, 14), (0, 0, 2), strict=True):
        cited = [row for row in rows if "(cited)" in row["method"]]
        assert (len(rows), len(cited)) == (size, num_cited)
        for row in rows:
            cells = [cell for title, cell in row.items() if title.endswith(": paper / measured")]
            assert all(c == "-" or c.endswith(" / not run") != (row in cited) for c in cells)
    texts = [*published.sources().values(), *(t.note for t in published.tables().values())]
    assert all(" ".join(text.split()) in " ".join(empty.split()) for text in texts)


def test_exact_counts_round_to_the_published_ones(empty):
    lines, rows = by_config(empty), [row for t in published.tables().values() for row in t.rows]
    for row in (row for row in rows if row.params):
        for name in row.configs.values():
            exact = lines[name]["parameters"]
            rounded = f"{int(exact.replace(',', '')) / 1e6:.1f}M"
            # Of the first, batch normalisation is left out; for the others see docs/parity.md.
            others = {"10,327,706": "10.2M", "33,724,618": "38.6M", "19,421,274": "10.2M"}
            assert others.get(exact, rounded) == row.params
    for name, parameters, macs in (
        # For ten classes; with a hundred the classifier has 90 x 343 numbers more.
        ("c100plus/densenet-bc-L100-k12", "769,162", "287,929,692"),
        ("c100plus/densenet-bc-L190-k40", "25,624,430", "9,301,945,740"),
        ("imagenet/densenet-121-k32", "7,978,856", "2,834,161,664"),
        ("wide/c10plus-L40-k60", "4,261,690", "1,795,836,360"),
    ):
        assert (lines[name]["parameters"], lines[name]["multiply-adds"]) == (parameters, macs)


def test_published_and_measured_errors_stand_side_by_side(filled, empty):
    lines, titles = by_config(filled), ("paper", "measured", "difference", *NEEDS)
    for name, *expected in (
        # 4.4, 4.6, 4.8: mean 4.6, squared deviations 0.04 + 0 + 0.04, over two degrees of freedom;
        # 300 epochs of 2160 seconds; batches of 64 at 640 images per second.
        ("c10plus/densenet-bc-L100-k12",
         "4.51", "4.60 +- 0.20 (n = 3)", "+0.09", "NVIDIA H200", "180.00", "0.100", "1,000"),
        ("wide/c10plus-L40-k48",
         "3.99", "3.90 (n = 1)", "-0.09", "NVIDIA H200", "180.00", "0.200", "2,346"),
        # the best validation model, and an older log
        ("svhn/densenet-L40-k12",
         "1.79", "1.80 (n = 1)", "+0.01", "NVIDIA H200", "-", "0.100", "1,000"),
    ):  # fmt: skip
        assert [lines[name][title] for title in titles] == expected
    rows = {(row["method"], row["L"]): row for row in tables(filled)[0]}
    for method, depth, column, cell in (
        ("DenseNet-BC (k = 12)", "100", "C10+", "4.51 / 4.60 +- 0.20 (n = 3)"),
        ("DenseNet-BC (k = 12)", "100", "C10", "5.92 / not run"),
        ("ResNet (pre-activation) [12]", "164", "C10", "11.26\\* / not run"),
        ("Wide ResNet [41]", "28", "C10+", "4.17 / not run"),
    ):
        assert rows[method, depth][f"{column}: paper / measured"] == cell
    (wide,) = (table for table in tables(empty) if "s/step, paper" in table[0])
    costs = [(row["s/step, paper"], row["MB, paper"]) for row in wide]
    assert costs[:2] == [("0.156", "5452"), ("0.130", "4008")]


def test_runs_without_a_published_error_are_listed_apart(filled):
    row = by_config(filled)["small/densenet-L22-k12"]
    assert "paper" not in row and "difference" not in row
    assert row["measured"] == "41.25 (n = 1)" and row["hours"] == "0.0028"  # 10 seconds
    assert row["images"] == "cifar10-jpeg, 10,000 + 2,000"
    (other,) = next(table for table in tables(filled) if "network" in table[0])
    assert other["runs"].endswith("/half`") and other["measured"] == "4.90 (n = 1)"
    assert (other["network"], other["epochs"]) == ("densenet-BC-L100-k12", "300")
    assert other["hardware"] == "-"
    (going,) = next(table for table in tables(filled) if "state" in table[0])
    assert going["run"].endswith("/going`") and going["config"] == f"`{BC[17:-5]}`"
    assert (going["seed"], going["epoch"], going["state"]) == ("3", "17 of 300", "running")


def test_pictures_beside_the_runs_are_shown(tmp_path, monkeypatch, empty):
    for name in ("results/runs", "results/figures", "docs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("figure 3.png", "curves.png", "curves.svg"):
        (tmp_path / "results" / "figures" / name).touch()
    monkeypatch.chdir(tmp_path)
    assert re.findall(r"^!.*$", report.create(["results/runs"]), re.MULTILINE) == [
        "![curves](results/figures/curves.png)",
        "![figure 3](results/figures/figure%203.png)",
    ]
    text = report.create(["results/runs", "--output", "docs/R.md"])
    assert "![curves](../results/figures/curves.png)" in text
    assert "Figures" not in empty


# Command line:
def test_results_md_is_what_its_command_writes():
    written = (ROOT / "RESULTS.md").read_text()
    command = re.search(r"^Written by `(.*)`$", written, re.MULTILINE)[1]
    assert command == "python -m tools.report results/runs --output RESULTS.md"
    assert report.create(shlex.split(command)[3:]) == written, "write it again: make report"


def test_a_report_is_replaced_and_another_file_is_not(tmp_path, monkeypatch, capsys):
    flags = SMALL.replace("configs", f"{ROOT}/configs")
    write_run(tmp_path / "runs" / "a", flags, FIVE)
    write_run(tmp_path / "runs" / "b", flags, FIVE)
    (tmp_path / "README.md").write_text("# Mine\n")
    monkeypatch.chdir(tmp_path)
    assert [report.main(["runs", "--output", "R.md"]) for _ in "ab"] == [0, 0]
    text = (tmp_path / "R.md").read_text()
    assert str(tmp_path) not in text and "41.25 (n = 1)" in text
    out, err = capsys.readouterr()
    note = "note: runs/b is left out: runs/a has the same settings and seed\n"
    assert (out, err) == ("", 2 * note)
    assert report.main(["runs"]) == 0
    assert text.partition("from the runs")[2] in capsys.readouterr().out
    assert report.main(["runs", "--output", "README.md"]) == UsageError.code
    assert "was not written by this tool; fix: " in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
