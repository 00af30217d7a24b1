"""tools.report: the document and the CSV hold what was published and what was measured, apart."""

import csv
import io
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

from errors import DataError, UsageError
from helpers.run_directories import write_run
from helpers.run_main import ROOT
from tools.report import __main__ as report
from tools.results import configs, published

SMALL = "--config configs/small/densenet-L22-k12.yaml --data images"
BC = "--config configs/c10plus/densenet-bc-L100-k12.yaml"
K48 = "--config configs/wide/c10plus-L40-k48.yaml"
SVHN = "--config configs/svhn/densenet-L40-k12.yaml"
CURVE = [50.0] * 299
IDLE = {"hardware", "hours", "device hours"}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """The tables of a document, each as its rows by title."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        titles, _, *body = [
            [cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()
        ]
        assert all(len(row) == len(titles) for row in body)
        found.append([dict(zip(titles, row, strict=True)) for row in body])
    return found


def details(markdown: str) -> dict[str, dict[str, str]]:
    """The lines of the long tables of published cells, by config."""
    rows = [row for table in tables(markdown) if "paper" in table[0] for row in table]
    return {row["config"].strip("`"): row for row in rows}


def csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> report.Report:
    """The report of no runs at all."""
    return report.create([str(tmp_path_factory.mktemp("empty"))])


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> report.Report:
    """The report, with a price, of runs of four cells, one of them with three seeds."""
    path = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    for seed, error in ((0, 4.6), (1, 4.4), (2, 4.8)):
        write_run(path / f"bc-{seed}", f"{BC} --manualSeed {seed}", [*CURVE, error])
    write_run(path / "k48", K48, [*CURVE, 3.9], images_per_s=320.0, memory_mb=2345.6, replicas=2)
    write_run(path / "svhn", SVHN, [2.5] * 40, status={"test_top1": 1.8}, val_time_s=None)
    data = {"train": 10_000, "val": 2_000}
    write_run(
        path / "small",
        SMALL.replace("images", "x/cifar10-jpeg"),
        [9.0, 8.0, 7.0, 6.0, 41.25],
        data=data,
    )
    write_run(path / "half", f"{BC} --precision half", [*CURVE, 4.9])
    write_run(path / "going", f"{BC} --manualSeed 3", CURVE[:17], "running")
    write_run(path / "bc-0-again", BC, [*CURVE, 1.0])
    (write_run(path / "bad", BC, CURVE) / "config.yaml").write_text("depth: 41\n")
    found = report.create([str(path), "--price", "2.5"])
    patch.undo()
    return found


# --------------------------------------------------------------------------------- nothing measured


def test_every_cell_that_was_not_measured_says_so(empty):
    lines = details(empty.markdown)
    assert len(lines) >= 13 + 27 + 6 + 12
    for row in lines.values():
        assert row["measured"] == "not run" and row["difference"] == "-"
        assert {row[title] for title in IDLE} == {"not run"}
    overview = tables(empty.markdown)[0]
    for row in overview:
        for title in list(row)[3:]:
            cited = "(cited)" in row["method"]
            assert row[title] == "-" or row[title].endswith(" / not run") != cited
    assert sum("(cited)" in row["method"] for row in overview) == 12 and len(overview) == 21


def test_no_number_stands_in_a_measured_column_of_the_csv_without_runs(empty):
    measured = (
        "measured_error std seeds difference images_per_s memory_mb device hours device_hours"
    )
    for row in csv_rows(empty.csv):
        assert row["n"] == "0" and "" not in row.values()
        assert {row[name] for name in [*measured.split(), "usd", "runs"]} == {"not run"}


def test_every_config_is_in_the_csv_once_with_its_counts(empty):
    rows = csv_rows(empty.csv)
    assert sorted(row["config"] for row in rows) == sorted(configs.configs())
    by_name = {row["config"]: row for row in rows}
    for name, parameters, macs in (
        ("c100plus/densenet-bc-L190-k40", 25_624_430, 9_301_945_740),
        ("imagenet/densenet-121-k32", 7_978_856, 2_834_161_664),
        ("wide/c10plus-L40-k60", 4_261_690, 1_795_836_360),
    ):
        row = by_name[name]
        assert (int(row["parameters"]), int(row["multiply_adds"])) == (parameters, macs)
    assert by_name["c10plus/densenet-bc-L100-k12"]["published_s_per_step"] == "0.156"
    assert by_name["c10/densenet-bc-L100-k12"]["published_s_per_step"] == "-"


def test_exact_counts_round_to_the_published_ones(empty):
    sizes = {
        name: (row["parameters"], row["parameters, paper"])
        for name, row in details(empty.markdown).items()
        if row["parameters, paper"] != "-"
    }
    assert len(sizes) == 13 + 27 + 6
    for name, (exact, paper) in sizes.items():
        if "1001" in name:  # published without batch normalisation: 149,216 parameters
            assert exact == "10,327,706" and f"{(10_327_706 - 149_216) / 1e6:.1f}M" == paper
            continue
        assert f"{int(exact.replace(',', '')) / 1e6:.1f}M" == paper


def test_the_split_that_chooses_a_number_is_named(empty):
    for name, row in details(empty.markdown).items():
        is_held_out = name.startswith("svhn/") or name.endswith("/resnet-110")
        assert row["chosen by"] == ("best validation" if is_held_out else "last epoch")


# ------------------------------------------------------------------------------------- measured


def test_mean_deviation_and_difference_are_those_worked_out_by_hand(filled):
    row = details(filled.markdown)["c10plus/densenet-bc-L100-k12"]
    # 4.4, 4.6, 4.8: mean 4.6, squared deviations 0.04 + 0 + 0.04, over two degrees of freedom.
    assert row["paper"] == "4.51" and row["measured"] == "4.60 +- 0.20 (n = 3)"
    assert row["difference"] == "+0.09"
    # 300 epochs of 2160 seconds.
    assert (row["hours"], row["device hours"], row["USD"]) == ("180.00", "180.00", "450.00")
    (line,) = (r for r in csv_rows(filled.csv) if r["config"] == "c10plus/densenet-bc-L100-k12")
    assert math.isclose(float(line["measured_error"]), 4.6)
    assert math.isclose(float(line["std"]), 0.2) and line["seeds"] == "0 1 2"
    assert line["published_error"] == "4.51" and math.isclose(float(line["usd"]), 450)


def test_a_single_run_has_no_deviation_and_its_devices_are_counted(filled):
    row = details(filled.markdown)["wide/c10plus-L40-k48"]
    assert (row["measured"], row["difference"]) == ("3.90 (n = 1)", "-0.09")
    assert (row["hardware"], row["device hours"]) == ("2 x NVIDIA H200", "360.00")
    (line,) = (r for r in csv_rows(filled.csv) if r["config"] == "wide/c10plus-L40-k48")
    assert (line["n"], line["std"]) == ("1", "-")


def test_on_svhn_the_number_is_that_of_the_best_validation_model(filled):
    row = details(filled.markdown)["svhn/densenet-L40-k12"]
    assert (row["paper"], row["measured"], row["difference"]) == ("1.79", "1.80 (n = 1)", "+0.01")
    assert (row["hours"], row["hardware"]) == ("-", "NVIDIA H200")  # an older log


def test_the_overview_shows_both_numbers_side_by_side(filled):
    rows = {(row["method"], row["L"]): row for row in tables(filled.markdown)[0]}
    bc = rows["DenseNet-BC (k = 12)", "100"]
    assert bc["C10+: paper / measured"] == "4.51 / 4.60 +- 0.20 (n = 3)"
    assert bc["C10: paper / measured"] == "5.92 / not run"
    assert rows["ResNet (pre-activation) [12]", "164"]["C10: paper / measured"].startswith(
        "11.26\\*"
    )
    assert rows["Wide ResNet [41] (cited)", "28"]["C10+: paper / measured"] == "4.17"


def test_time_and_memory_of_the_wide_densenets_are_compared(filled):
    (table,) = (table for table in tables(filled.markdown) if "s/step, paper" in table[0])
    rows = {row["method"]: list(row.values())[1:] for row in table}
    measured = ["0.100 (NVIDIA H200)", "1,000 (NVIDIA H200)"]
    assert rows["DenseNet-BC (k = 12), L = 100"] == ["0.156", measured[0], "5452", measured[1]]
    measured = ["0.200 (2 x NVIDIA H200)", "2,346 (2 x NVIDIA H200)"]
    assert rows["Wide-DenseNet-BC (k = 48), L = 40"] == ["0.165", measured[0], "5245", measured[1]]
    assert rows["Wide-DenseNet-BC (k = 36), L = 40"] == ["0.130", "not run", "4008", "not run"]


def test_configs_without_a_claim_have_a_table_without_the_paper(filled):
    (row,) = (
        row
        for table in tables(filled.markdown)
        for row in table
        if row.get("config") == "`small/densenet-L22-k12`"
    )
    assert "paper" not in row and "difference" not in row
    assert row["measured"] == "41.25 (n = 1)"
    assert row["images"] == "cifar10-jpeg, 10,000 + 2,000"


def test_other_runs_are_shown_with_the_nearest_config_and_what_differs(filled):
    (table,) = (table for table in tables(filled.markdown) if "nearest config" in table[0])
    (row,) = table
    assert row["runs"].endswith("/half`") and row["measured"] == "4.90 (n = 1)"
    assert row["nearest config"] == "`c10plus/densenet-bc-L100-k12`"
    assert row["differences"] == "precision half, not single"
    (line,) = (row for row in csv_rows(filled.csv) if row["table"] == "other")
    assert line["config"] == "nearest: c10plus/densenet-bc-L100-k12" and line["n"] == "1"


def test_runs_that_are_not_complete_are_listed_with_their_state(filled):
    (table,) = (table for table in tables(filled.markdown) if "state" in table[0])
    (row,) = table
    assert row["run"].endswith("/going`") and row["config"] == "`c10plus/densenet-bc-L100-k12`"
    assert (row["seed"], row["epoch"], row["state"]) == ("3", "17 of 300", "running")


def test_what_is_left_out_is_said(filled):
    text = filled.markdown.partition("## Left out\n")[2].partition("\n## ")[0]
    assert re.search(r"again \(1\.00\) has the same settings and seed as \S+bc-0, which is", text)
    assert re.search(r"bad is left out: depth: 41 is not 6n \+ 4", text)


def test_without_a_price_there_is_no_money(empty, filled):
    assert "USD" in filled.markdown and "USD" not in empty.markdown
    assert {row["usd"] for row in csv_rows(empty.csv)} == {"not run"}


def test_the_cited_rows_are_the_same_whatever_was_measured(empty, filled):
    def cited(found: report.Report) -> list:
        return [row for row in tables(found.markdown)[0] if "(cited)" in row["method"]]

    assert cited(empty) == cited(filled)
    assert tables(empty.markdown)[0] != tables(filled.markdown)[0]


# --------------------------------------------------------------------------------- the whole text


def test_the_text_depends_on_the_runs_alone(tmp_path, monkeypatch):
    texts = []
    for place in ("here", "there"):
        write_run(tmp_path / place / "runs" / "a", SMALL, [9.0, 8.0, 7.0, 6.0, 5.0])
        monkeypatch.chdir(tmp_path / place)
        texts.append(report.create(["runs"]))
        monkeypatch.chdir(ROOT)
    assert texts[0] == texts[1]
    assert str(tmp_path) not in texts[0].markdown
    assert not re.search(r"\b20[2-9]\d-\d\d", texts[0].markdown)


def test_pictures_beside_the_runs_are_shown(tmp_path, monkeypatch, empty):
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (tmp_path / "results" / "figures").mkdir()
    for name in ("figure 3.png", "curves.png", "curves.svg"):
        (tmp_path / "results" / "figures" / name).touch()
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    text = report.create(["results/runs"]).markdown
    assert re.findall(r"^!.*$", text, re.MULTILINE) == [
        "![curves](results/figures/curves.png)",
        "![figure 3](results/figures/figure%203.png)",
    ]
    text = report.create(["results/runs", "--output", "docs/R.md"]).markdown
    assert "![curves](../results/figures/curves.png)" in text
    assert "Figures" not in empty.markdown


def test_every_source_is_named(empty):
    words = " ".join(empty.markdown.split())  # however the lines are broken
    for source in published.sources().values():
        assert source in words


# ------------------------------------------------------------------------------------ RESULTS.md


def stale(root: Path, monkeypatch) -> bool:
    """Whether RESULTS.md is not what its own command gives now."""
    monkeypatch.chdir(root)
    written = (root / "RESULTS.md").read_text()
    command = shlex.split(re.search(r"^Written by `(.*)`$", written, re.MULTILINE)[1])
    assert command[:3] == ["python", "-m", "tools.report"]
    return report.create(command[3:]).markdown != written


def test_results_md_is_what_its_command_writes(monkeypatch):
    assert not stale(ROOT, monkeypatch), "write it anew: make report"
    assert "`python -m tools.report results/runs --output RESULTS.md`" in (
        (ROOT / "RESULTS.md").read_text()
    )


def test_a_stale_results_md_is_noticed(tmp_path, monkeypatch):
    write_run(tmp_path / "results" / "runs" / "a", SMALL, [9.0, 8.0, 7.0, 6.0, 5.0])
    monkeypatch.chdir(tmp_path)
    assert report.main(["results/runs", "--output", "RESULTS.md"]) == 0
    assert not stale(tmp_path, monkeypatch)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "5.00 (n = 1)" in text
    (tmp_path / "RESULTS.md").write_text(text.replace("5.00 (n = 1)", "4.00 (n = 1)"))
    assert stale(tmp_path, monkeypatch)
    assert report.main(["results/runs", "--output", "RESULTS.md"]) == 0
    assert not stale(tmp_path, monkeypatch)
    log = tmp_path / "results" / "runs" / "a" / "log.jsonl"
    log.write_text(log.read_text().replace('"val_top1": 5.0', '"val_top1": 4.9'))
    assert stale(tmp_path, monkeypatch)
    shutil.rmtree(log.parent)
    assert stale(tmp_path, monkeypatch)


# ---------------------------------------------------------------------------------- command line


def test_both_files_are_written_and_replaced(tmp_path, capsys, empty):
    argv = [str(tmp_path), "--output", str(tmp_path / "r.md"), "--csv", str(tmp_path / "r.csv")]
    for _ in range(2):
        assert report.main(argv) == 0
        assert (tmp_path / "r.csv").read_text() == empty.csv
        body = (tmp_path / "r.md").read_text().partition("from the runs")[2]
        assert body == empty.markdown.partition("from the runs")[2]
    assert capsys.readouterr().out == ""
    assert report.main([str(tmp_path)]) == 0
    assert body in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["output", "csv"])
def test_a_file_that_the_tool_has_not_written_is_kept(tmp_path, capsys, flag):
    mine = tmp_path / "README.md"
    mine.write_text("# Mine\n")
    assert report.main([str(tmp_path), f"--{flag}", str(mine)]) == UsageError.code
    assert "was not written by this tool; fix: " in capsys.readouterr().err
    assert mine.read_text() == "# Mine\n"
    assert report.main([str(tmp_path), f"--{flag}", str(tmp_path)]) == UsageError.code
    assert report.main([str(tmp_path), f"--{flag}", str(tmp_path / "no" / "r")]) == UsageError.code


@pytest.mark.parametrize(
    "argv, code, words",
    [
        ("", 2, "no directory of runs"),
        ("runs --prize 3", 2, "did you mean price?"),
        ("runs --csv a --output a", 2, "output and csv are one file: a"),
        ("runs --price 0", 2, "price: '0' is out of range"),
        ("none", 3, "no such directory: none; fix: name a directory of runs"),
        ("README.md", 3, "not a directory: README.md"),
    ],
)
def test_mistakes_are_answered_in_one_line(capsys, argv, code, words):
    assert report.main(argv.split()) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_help_names_every_flag(capsys):
    assert report.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in report.FLAGS) and "RUNS" in printed


def test_what_cannot_be_read_is_said_on_standard_error_too(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("")
    assert report.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == f"note: {tmp_path} is left out: it has a log.jsonl but no config.yaml\n"
    assert err.removeprefix("note: ") in out


def test_parsing_reads_nothing():
    asked = report.parse(["a", "b", "--price=3", "--csv", "x.csv"])
    assert asked.arguments == ["a", "b"]
    assert (asked.options.price, asked.options.csv, asked.options.output) == (3.0, "x.csv", None)
    with pytest.raises(DataError):
        report.create(["a"])
