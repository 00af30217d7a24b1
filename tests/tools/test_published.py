"""The published numbers are those of the paper and of the READMEs, and the configs claim them."""

from dataclasses import replace

import pytest

from tools.results import published
from tools.results.configs import Config, configs

# Typed once more from the paper, Table 2: method, L, parameters, C10, C10+, C100, C100+, SVHN.
# Two spaces or more part the method from the numbers; * marks what the authors ran themselves.
TABLE_2 = """
Network in Network [22]                    -    -     10.41  8.81 35.68  -     2.35
All-CNN [31]                               -    -     9.08   7.25 -      33.71 -
Deeply Supervised Net [20]                 -    -     9.69   7.97 -      34.57 1.92
Highway Network [33]                       -    -     -      7.72 -      32.39 -
FractalNet [17]                            21   38.6M 10.18  5.22 35.34  23.30 2.01
FractalNet [17] with Dropout/Drop-path     21   38.6M 7.33   4.60 28.20  23.73 1.87
ResNet [11]                                110  1.7M  -      6.61 -      -     -
ResNet (reported by [13])                  110  1.7M  13.63  6.41 44.74  27.22 2.01
ResNet with Stochastic Depth [13]          110  1.7M  11.66  5.23 37.80  24.58 1.75
ResNet with Stochastic Depth [13]          1202 10.2M -      4.91 -      -     -
Wide ResNet [41]                           16   11.0M -      4.81 -      22.07 -
Wide ResNet [41]                           28   36.5M -      4.17 -      20.50 -
Wide ResNet [41] with Dropout              16   2.7M  -      -    -      -     1.64
ResNet (pre-activation) [12]               164  1.7M  11.26* 5.46 35.58* 24.33 -
ResNet (pre-activation) [12]               1001 10.2M 10.56* 4.62 33.47* 22.71 -
DenseNet (k = 12)                          40   1.0M  7.00   5.24 27.55  24.42 1.79
DenseNet (k = 12)                          100  7.0M  5.77   4.10 23.79  20.20 1.67
DenseNet (k = 24)                          100  27.2M 5.83   3.74 23.42  19.25 1.59
DenseNet-BC (k = 12)                       100  0.8M  5.92   4.51 24.15  22.27 1.76
DenseNet-BC (k = 24)                       250  15.3M 5.19   3.62 19.64  17.60 1.74
DenseNet-BC (k = 40)                       190  25.6M -      3.46 -      17.18 -
"""
# The README of the authors: parameters, C10+, C100+, seconds, MB.
WIDE = {
    ("DenseNet-BC (k = 12)", 100): "0.8M 4.51 22.27 0.156 5452",
    ("Wide-DenseNet-BC (k = 36)", 40): "1.5M 4.58 22.30 0.130 4008",
    ("Wide-DenseNet-BC (k = 48)", 40): "2.7M 3.99 20.29 0.165 5245",
    ("Wide-DenseNet-BC (k = 60)", 40): "4.3M 4.01 19.99 0.223 6508",
}
# The same, and of fb.resnet.torch: top-1 error of one crop.
IMAGENET = """ResNet-18 30.43, ResNet-34 26.73, ResNet-50 24.01, ResNet-101 22.44, ResNet-152 22.16,
ResNet-200 21.66, DenseNet-121 (k = 32) 25.0, DenseNet-169 (k = 32) 23.6, DenseNet-201 (k = 32)
22.5, DenseNet-161 (k = 48) 22.2, DenseNet-264 (k = 32) 22.1, DenseNet-232 (k = 48) 21.2,
DenseNet-cosine-264 (k = 32) 21.6, DenseNet-cosine-264 (k = 48) 20.4"""
# What a config calls the table of its claim, and the folders of the columns of Table 2.
CLAIMED_TABLES = {"2": "table2", "wide": "wide", "imagenet": "imagenet"}
FOLDERS = {"C10": "c10", "C10+": "c10plus", "C100": "c100", "C100+": "c100plus", "SVHN": "svhn"}


def test_table_2_is_that_of_the_paper():
    table = published.tables()["table2"]
    found = []
    for row in table.rows:
        errors = [
            row.printed.get(column, "-") + "*" * (column in row.own) for column in table.columns
        ]
        found.append([row.method, str(row.depth or "-"), row.params or "-", *errors])
        assert all(f"{row.errors[name]:.2f}" == text for name, text in row.printed.items())
        assert row.source == "paper"
    expected = []
    for line in TABLE_2.strip().splitlines():
        method, _, numbers = line.partition("  ")
        expected.append([method, *numbers.split()])
    assert table.columns == ("C10", "C10+", "C100", "C100+", "SVHN")
    assert found == expected
    assert sum(len(row.printed) for row in table.rows) == 4 + 3 + 4 + 2 + 10 + 1 + 10 + 6 + 8 + 27


def test_the_wide_densenets_are_those_of_the_readme():
    rows = published.tables()["wide"].rows
    found = {
        (row.method, row.depth): " ".join([row.params, *row.printed.values(), *row.costs.values()])
        for row in rows
    }
    assert found == WIDE
    assert all([*row.printed] == ["C10+", "C100+"] for row in rows)
    assert all([*row.costs] == ["seconds_per_iteration", "memory_mb"] for row in rows)


def test_the_imagenet_models_are_those_of_the_readmes():
    rows = published.tables()["imagenet"].rows
    found = ", ".join(f"{row.method} {row.printed['top-1']}" for row in rows)
    assert found.split() == IMAGENET.split()
    for row in rows:
        assert f"-{row.depth}" in row.method and row.params is None
        assert (row.source == "fb.resnet.torch") == row.method.startswith("ResNet")


def test_every_row_names_its_source_and_every_source_is_named():
    rows = [row for table in published.tables().values() for row in table.rows]
    assert {row.source for row in rows} == set(published.sources())


def test_cited_rows_are_those_that_nothing_here_reproduces():
    rows = published.tables()["table2"].rows
    cited = {row.method for row in rows if row.is_cited}
    assert not any("DenseNet" in method or "pre-activation" in method for method in cited)
    assert {"ResNet [11]", "FractalNet [17]"} <= cited and len(rows) - 12 == 9
    assert sum(row.is_cited for row in rows) == 12


def published_claims() -> dict[str, set[tuple]]:
    """Config -> the (table, column, error, parameters) that published rows name it for."""
    found: dict[str, set[tuple]] = {}
    for table in published.tables().values():
        for row in table.rows:
            for column, name in row.configs.items():
                place = (table.key, column, row.errors[column], row.params)
                found.setdefault(name, set()).add(place)
    return found


def disagreements(known: dict[str, Config]) -> list[str]:
    """Configs whose claim is not a published number, and published numbers without their config."""
    expected = published_claims()
    wrong = [f"{name} is not there" for name in expected.keys() - known.keys()]
    for name, config in known.items():
        if not config.claim:
            wrong += [f"{name} claims nothing"] if name in expected else []
            continue
        claim = config.claim
        table = CLAIMED_TABLES[claim["table"]]
        # The ImageNet sources give no parameters: tests/cli/test_configs.py counts those claimed.
        size = None if table == "imagenet" else claim["params"]
        if (table, claim["column"], claim["error"], size) not in expected.get(name, set()):
            wrong.append(f"{name} claims {claim}")
    return wrong


def test_what_configs_claim_was_published_and_what_was_published_has_its_config():
    assert disagreements(configs()) == []


def test_a_row_names_the_configs_of_its_own_columns():
    for row in published.tables()["table2"].rows:
        assert row.is_cited or row.configs.keys() == row.errors.keys()
        assert len({name.partition("/")[2] for name in row.configs.values()}) <= 1
        for column, name in row.configs.items():
            assert name.startswith(f"{FOLDERS[column]}/") and name.endswith(_ending(row))


def _ending(row: published.Row) -> str:
    """L40-k12 of a DenseNet, the depth of a ResNet."""
    k = row.method.partition("k = ")[2].rstrip(")")
    return f"L{row.depth}-k{k}" if k else f"-{row.depth}"


@pytest.mark.parametrize(
    "name, change",
    [
        ("c10plus/densenet-bc-L100-k12", {"error": 4.5}),
        ("c10plus/densenet-bc-L100-k12", {"column": "C10"}),
        ("svhn/densenet-L40-k12", {"params": "1.1M"}),
        ("wide/c100plus-L40-k48", {"table": "2"}),
        ("imagenet/densenet-121-k32", {"error": 25.1}),
    ],
)
def test_a_claim_that_was_not_published_is_noticed(name, change):
    config = configs()[name]
    changed = replace(config, claim=config.claim | change)
    assert disagreements({name: config}) != disagreements({name: changed})
    assert any(name in line for line in disagreements(configs() | {name: changed}))


def test_a_published_number_without_its_config_is_noticed():
    others = {name: c for name, c in configs().items() if name != "c10/densenet-L40-k12"}
    assert "c10/densenet-L40-k12 is not there" in disagreements(others)


def test_yaml_is_read_as_it_is_written():
    text = "a: {b: 7.00, c: [1e-4, yes]}\nd: !!python/name:os.system x\n"
    assert published.plain(text) == {"a": {"b": "7.00", "c": ["1e-4", "yes"]}, "d": "x"}
    assert published.plain("# nothing\n") == {}
