"""tools.report: the document holds what was published and what was measured, side by side."""

import re
import shlex

import pytest

from errors import DataError, UsageError
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
    return report.create([str(tmp_path_factory.mktemp("empty"))])[0]


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> str:
    """Report runs of four configs, one of them with three seeds, and runs that do not count."""
    path = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    for seed, error in ((0, 4.6), (1, 4.4), (2, 4.8)):
        write_run(path / f"bc-{seed}", f"{BC} --manualSeed {seed}", [*CURVE, error])
    write_run(path / "k48", K48, [*CURVE, 3.9], images_per_s=320.0, memory_mb=2345.6, replicas=2)
    write_run(path / "svhn", SVHN, [2.5] * 40, status={"test_top1": 1.8}, val_time_s=None)
    images = SMALL.replace("images", "x/cifar10-jpeg")
    facts = {"train": 10_000, "val": 2_000}
    write_run(path / "small", images, FIVE, data=facts, time_s=1.0, val_time_s=1.0)
    write_run(path / "half", f"{BC} --precision half", [*CURVE, 4.9])
    write_run(path / "going", f"{BC} --manualSeed 3", CURVE[:17], "running")
    write_run(path / "bc-0-again", BC, [*CURVE, 1.0])
    (write_run(path / "bad", BC, CURVE) / "config.yaml").write_text("depth: 41\n")
    markdown, _ = report.create([str(path)])
    patch.undo()
    return markdown


# --------------------------------------------------------------------------------- nothing measured


def test_every_cell_that_was_not_measured_says_so(empty):
    lines = by_config(empty)
    assert len(lines) >= 13 + 27 + 6 + 12
    for row in lines.values():
        assert {row[title] for title in ("measured", *NEEDS)} == {"not run"}
        assert row.get("difference", "-") == "-"
    overview = tables(empty)[0]
    for row in overview:
        is_cited = "(cited)" in row["method"]
        for title in list(row)[3:]:
            assert row[title] == "-" or row[title].endswith(" / not run") != is_cited
    assert sum("(cited)" in row["method"] for row in overview) == 12 and len(overview) == 21


def test_exact_counts_round_to_the_published_ones(empty):
    lines, rows = by_config(empty), [row for t in published.tables().values() for row in t.rows]
    for row in (row for row in rows if row.params):
        for name in row.configs.values():
            exact = int(lines[name]["parameters"].replace(",", ""))
            if "1001" in name:  # published without batch normalisation
                assert exact == 10_327_706
                exact -= 149_216
            assert f"{exact / 1e6:.1f}M" == row.params
    for name, parameters, macs in (
        ("c100plus/densenet-bc-L190-k40", "25,624,430", "9,301,945,740"),
        ("imagenet/densenet-121-k32", "7,978,856", "2,834,161,664"),
        ("wide/c10plus-L40-k60", "4,261,690", "1,795,836,360"),
    ):
        assert (lines[name]["parameters"], lines[name]["multiply-adds"]) == (parameters, macs)


def test_the_epoch_that_a_number_is_of_is_named(empty):
    for name, row in by_config(empty).items():
        is_held_out = name.startswith("svhn/") or name.endswith("/resnet-110")
        assert row["chosen by"] == ("best validation" if is_held_out else "last epoch")


def test_every_source_is_named(empty):
    words = " ".join(empty.split())  # however the lines are broken
    assert all(source in words for source in published.sources().values())


# ----------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 4.4, 4.6, 4.8: mean 4.6, squared deviations 0.04 + 0 + 0.04, over two degrees of freedom;
        # 300 epochs of 2160 seconds; batches of 64 at 640 images per second.
        ("c10plus/densenet-bc-L100-k12",
         ["4.51", "4.60 +- 0.20 (n = 3)", "+0.09", "NVIDIA H200", "180.00", "0.100", "1,000"]),
        ("wide/c10plus-L40-k48",
         ["3.99", "3.90 (n = 1)", "-0.09", "2 x NVIDIA H200", "180.00", "0.200", "2,346"]),
        # the best validation model, and an older log
        ("svhn/densenet-L40-k12",
         ["1.79", "1.80 (n = 1)", "+0.01", "NVIDIA H200", "-", "0.100", "1,000"]),
    ],
)  # fmt: skip
def test_a_line_shows_what_was_published_and_measured(filled, name, expected):
    row = by_config(filled)[name]
    assert [row[title] for title in ("paper", "measured", "difference", *NEEDS)] == expected


def test_the_overview_shows_both_numbers_side_by_side(filled, empty):
    rows = {(row["method"], row["L"]): row for row in tables(filled)[0]}
    bc = rows["DenseNet-BC (k = 12)", "100"]
    assert bc["C10+: paper / measured"] == "4.51 / 4.60 +- 0.20 (n = 3)"
    assert bc["C10: paper / measured"] == "5.92 / not run"
    preresnet = rows["ResNet (pre-activation) [12]", "164"]
    assert preresnet["C10: paper / measured"].startswith("11.26\\*")
    assert rows["Wide ResNet [41] (cited)", "28"]["C10+: paper / measured"] == "4.17"
    (wide,) = (table for table in tables(empty) if "s/step, paper" in table[0])
    assert [(row["s/step, paper"], row["MB, paper"]) for row in wide] == [
        ("0.156", "5452"), ("0.130", "4008"), ("0.165", "5245"), ("0.223", "6508")
    ]  # fmt: skip


def test_configs_without_a_claim_have_a_table_without_the_paper(filled):
    row = by_config(filled)["small/densenet-L22-k12"]
    assert "paper" not in row and "difference" not in row
    assert row["measured"] == "41.25 (n = 1)" and row["hours"] == "0.0028"  # 10 seconds
    assert row["images"] == "cifar10-jpeg, 10,000 + 2,000"


def test_runs_of_no_config_or_not_complete_are_listed(filled):
    (other,) = next(table for table in tables(filled) if "network" in table[0])
    assert other["runs"].endswith("/half`") and other["measured"] == "4.90 (n = 1)"
    assert (other["network"], other["epochs"]) == ("densenet-BC-L100-k12", "300")
    (going,) = next(table for table in tables(filled) if "state" in table[0])
    assert going["run"].endswith("/going`") and going["config"] == f"`{BC[17:-5]}`"
    assert (going["seed"], going["epoch"], going["state"]) == ("3", "17 of 300", "running")
    text = filled.partition("## Left out\n")[2].partition("\n## ")[0]
    assert re.search(r"again \(1\.00\) has the same settings and seed as \S+bc-0, which is", text)
    assert re.search(r"bad is left out: depth: 41 is not 6n \+ 4", text)


def test_pictures_beside_the_runs_are_shown(tmp_path, monkeypatch, empty):
    for name in ("results/runs", "results/figures", "docs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("figure 3.png", "curves.png", "curves.svg"):
        (tmp_path / "results" / "figures" / name).touch()
    monkeypatch.chdir(tmp_path)
    text, _ = report.create(["results/runs"])
    assert re.findall(r"^!.*$", text, re.MULTILINE) == [
        "![curves](results/figures/curves.png)",
        "![figure 3](results/figures/figure%203.png)",
    ]
    text, _ = report.create(["results/runs", "--output", "docs/R.md"])
    assert "![curves](../results/figures/curves.png)" in text
    assert "Figures" not in empty


# ------------------------------------------------------------------------------------ command line


def test_results_md_is_what_its_command_writes():
    written = (ROOT / "RESULTS.md").read_text()
    command = re.search(r"^Written by `(.*)`$", written, re.MULTILINE)[1]
    assert command == "python -m tools.report results/runs --output RESULTS.md"
    current, _ = report.create(shlex.split(command)[3:])
    assert current == written, "write it again: make report"


def test_a_report_is_replaced_and_depends_on_the_runs_alone(tmp_path, monkeypatch, capsys):
    texts, argv = [], ["runs", "--output", "R.md"]
    flags = SMALL.replace("configs", f"{ROOT}/configs")
    for place in ("here", "there"):
        write_run(tmp_path / place / "runs" / "a", flags, FIVE)
        monkeypatch.chdir(tmp_path / place)
        assert [report.main(argv), report.main(argv)] == [0, 0]
        texts.append((tmp_path / place / "R.md").read_text())
    assert texts[0] == texts[1] and str(tmp_path) not in texts[0] and "41.25 (n = 1)" in texts[0]
    assert capsys.readouterr() == ("", "")
    assert report.main(["runs"]) == 0
    assert texts[0].partition("from the runs")[2] in capsys.readouterr().out


def test_another_file_is_not_overwritten(tmp_path, capsys):
    other = tmp_path / "README.md"
    other.write_text("# Mine\n")
    assert report.main([str(tmp_path), "--output", str(other)]) == UsageError.code
    assert "was not written by this tool; fix: " in capsys.readouterr().err
    assert other.read_text() == "# Mine\n"


@pytest.mark.parametrize(
    "argv, code, words",
    [
        ("", 2, "no directory of runs"),
        ("runs --outptu 3", 2, "did you mean output?"),
        ("none", 3, "not a directory: none; fix: name a directory of runs"),
        ("README.md", 3, "not a directory: README.md"),
    ],
)
def test_mistakes_are_answered_in_one_line(capsys, argv, code, words):
    assert report.main(argv.split()) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_parsing_reads_nothing_and_unreadable_runs_are_named_on_standard_error(tmp_path, capsys):
    assert report.parse(["a", "b"]).arguments == ["a", "b"]
    with pytest.raises(DataError):
        report.create(["a"])
    (tmp_path / "log.jsonl").write_text("")
    assert report.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"note: {tmp_path} is left out: ") and err.removeprefix("note: ") in out
