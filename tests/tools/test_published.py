"""Test that the published numbers are those of the paper, the READMEs and the configs."""

from tools.results import published
from tools.results.configs import configs

# Typed a second time from the paper, Table 2: method, L, parameters, C10, C10+, C100, C100+, SVHN.
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
    ("DenseNet-BC (k = 12)", "100"): "0.8M 4.51 22.27 0.156 5452",
    ("Wide-DenseNet-BC (k = 36)", "40"): "1.5M 4.58 22.30 0.130 4008",
    ("Wide-DenseNet-BC (k = 48)", "40"): "2.7M 3.99 20.29 0.165 5245",
    ("Wide-DenseNet-BC (k = 60)", "40"): "4.3M 4.01 19.99 0.223 6508",
}
# The same, and of fb.resnet.torch: top-1 error of one crop.
IMAGENET = """ResNet-18 30.43, ResNet-34 26.73, ResNet-50 24.01, ResNet-101 22.44, ResNet-152 22.16,
ResNet-200 21.66, DenseNet-121 (k = 32) 25.0, DenseNet-169 (k = 32) 23.6, DenseNet-201 (k = 32)
22.5, DenseNet-161 (k = 48) 22.2, DenseNet-264 (k = 32) 22.1, DenseNet-232 (k = 48) 21.2,
DenseNet-cosine-264 (k = 32) 21.6, DenseNet-cosine-264 (k = 48) 20.4"""
# The table of a claim, as a config names it.
CLAIMED_TABLES = {"table2": "2", "wide": "wide", "imagenet": "imagenet"}


def test_table_2_is_that_of_the_paper():
    table = published.tables()["table2"]
    assert table.columns == ["C10", "C10+", "C100", "C100+", "SVHN"]
    lines = TABLE_2.strip().splitlines()
    for row, line in zip(table.rows, lines, strict=True):
        method, _, numbers = line.partition("  ")
        found = [row.method, row.depth or "-", row.params or "-"]
        found += [row.errors.get(name, "-") + "*" * (name in row.own) for name in table.columns]
        assert found == [method, *numbers.split()] and row.source == "paper"
        assert row.configs.keys() == row.errors.keys()  # each printed number has a config
    assert sum(len(row.configs) for row in table.rows) == 75


def test_the_wide_densenets_are_those_of_the_readme():
    found = {}
    for row in published.tables()["wide"].rows:
        assert list(row.errors) == ["C10+", "C100+"]
        assert list(row.costs) == ["seconds_per_iteration", "memory_mb"]
        numbers = [row.params, *row.errors.values(), *row.costs.values()]
        found[row.method, row.depth] = " ".join(numbers)
    assert found == WIDE


def test_the_imagenet_models_are_those_of_the_readmes():
    rows = published.tables()["imagenet"].rows
    found = ", ".join(f"{row.method} {row.errors['top-1']}" for row in rows)
    assert found.split() == IMAGENET.split()
    for row in rows:
        assert f"-{row.depth}" in row.method and row.params is None
        assert (row.source == "fb.resnet.torch") == row.method.startswith("ResNet")


def test_configs_and_published_results_name_each_other():
    rows = [(key, row) for key, table in published.tables().items() for row in table.rows]
    assert {row.source for _, row in rows} == set(published.sources())
    claims: dict[str, list[dict]] = {}
    for key, row in rows:
        for column, name in row.configs.items():
            claim = {"table": CLAIMED_TABLES[key], "column": column, "params": row.params}
            claims.setdefault(name, []).append(claim | {"error": float(row.errors[column])})
    for name, config in configs().items():
        # Where the source gives no parameters, tests/cli/test_configs.py counts those claimed.
        found = [claim | {"params": claim["params"] or config.claim.get("params")}
                 for claim in claims.get(name, [])]  # fmt: skip
        assert (config.claim in found) if config.claim else not found
    assert claims.keys() <= configs().keys()


def test_yaml_is_read_as_it_is_written():
    text = "a: {b: 7.00, c: [1e-4, yes]}\nd: !!python/name:os.system x\n"
    assert published.load_yaml(text) == {"a": {"b": "7.00", "c": ["1e-4", "yes"]}, "d": "x"}
    assert published.load_yaml("# nothing\n") == {}
