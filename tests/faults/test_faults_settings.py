"""Test rows 29 to 37, 39, 53 and 54: settings that cannot be run make no run directory.

Each kind of mistake once, by the program itself; tests/cli has all of them.
"""

from functools import partial

import pytest

from faults.contract import refused, tiny
from faults.sabotage import environment, replace
from helpers.run_main import run


def refused_before_it_begins(argv, tmp_path, pattern, sabotage=None) -> None:
    directory = tmp_path / "run"
    refused(run([*argv, f"--save={directory}"], sabotage), 2, pattern)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("LR: 0.1\nmomentum: 0\nLR: 0.2\n", r"LR is given twice \(.*line 1; .*line 3\)"),  # row 31
        ("data: caf\udce9\n", r"not YAML: .*c.yaml"),  # row 33: Latin-1
        ("nEpochs: 12:30\n", r"nEpochs: '12:30' is not a whole number"),  # rows 30 and 34
    ],
)
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text, pattern):
    config = tmp_path / "c.yaml"
    config.write_text(text, errors="surrogateescape")
    refused_before_it_begins([f"--config={config}"], tmp_path, pattern)


@pytest.mark.parametrize(
    ("content", "flags", "printed"),
    [
        (b"LR: 1e-2\nweightDecay: 1.e-4\n", [], ["LR: 0.01", "weightDecay: 0.0001"]),  # YAML: text
        (b"\xef\xbb\xbfmanualSeed: 010\n", [], ["manualSeed: 10"]),  # YAML: eight
        (b"LR: 0.3\nmomentum: 0.5\n", ["--LR=0.2"], ["LR: 0.2", "momentum: 0.5"]),
    ],
    ids=["row 30", "rows 33 and 34", "row 39"],
)
def test_a_config_means_what_the_command_line_means_which_wins(tmp_path, content, flags, printed):
    config = tmp_path / "c.yaml"
    config.write_bytes(content)
    result = run(["--printConfig", f"--config={config}", *flags])
    assert result.code == 0 and set(printed) <= set(result.out.splitlines()), result


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({"depth": 41}, r"depth: 41 is not 6n \+ 4 .*; fix: use 40 or 46"),
        ({"dropRate": 1}, "dropRate: '1' is out of range .*; fix: use .*"),
        ({"LR": "nan"}, "LR: 'nan' is out of range .*; fix: use .*"),
        ({"optnet": True, "optMemory": 3}, "optMemory and optnet exclude each other; fix: keep"),
        ({"nosuch": 1}, r"unknown flag nosuch \(command line\)"),
    ],
    ids=["row 35", "row 36", "row 37", "row 39, a contradiction", "row 39, unknown"],
)
def test_settings_that_cannot_be_run_are_refused(tmp_path, flags, pattern):
    refused_before_it_begins(tiny(**flags), tmp_path, pattern)


def with_gpus(count: int) -> None:
    environment(CUDA_VISIBLE_DEVICES="")
    if count:
        replace("count the GPUs", lambda _: lambda: count)


@pytest.mark.parametrize(
    ("asked", "there", "pattern"),
    [
        (1, 0, r"nGPU=1 but no CUDA device; fix: --nGPU 0"),
        (2, 1, r"nGPU=2 but 1 CUDA device; fix: --nGPU 1"),
        (9, 8, r"nGPU=9 but 8 CUDA devices; fix: --nGPU \d"),
    ],
)
def test_gpus_that_are_not_there_are_refused(tmp_path, asked, there, pattern):
    argv = tiny(nGPU=asked, batchSize=8 * asked)
    refused_before_it_begins(argv, tmp_path, pattern, partial(with_gpus, there))


def test_all_problems_are_reported_at_once(tmp_path):
    result = run(tiny(depth=11, LR=0, nepochs=3, save=tmp_path / "run"))
    lines = result.err.splitlines()
    assert result.code == 2 and len(lines) == 3
    assert all(line.startswith("error: ") and "; fix: " in line for line in lines)
    assert not (tmp_path / "run").exists()
