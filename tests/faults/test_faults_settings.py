"""Rows 29 to 37, 39, 53 and 54: settings that cannot be run make no run directory."""

from functools import partial

import pytest

from faults.contract import refused, tiny
from faults.sabotage import environment
from helpers.run_main import run

SMALL_BC = {"dataset": "cifar10", "imageSize": None, "nImages": None, "nClasses": None}


def refused_before_it_begins(argv, tmp_path, pattern, sabotage=None) -> None:
    directory = tmp_path / "run"
    refused(run([*argv, f"--save={directory}"], sabotage), 2, pattern)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        # Row 29
        ("depth: 10\ngrowthrate: 2\n", r"unknown flag growthrate \(.*c.yaml, line 2\); fix: did .*"
         r"growthRate"),
        # Row 30
        ("nEpochs: many\n", r"nEpochs: 'many' is not a whole number \(.*line 1\)"),
        ("LR: fast\n", r"LR: 'fast' is not a number"),
        ("bottleneck: yes\n", r"bottleneck: 'yes' is not true or false"),
        ("nEpochs: 1.5\n", r"nEpochs: '1.5' is not a whole number"),
        # Row 31
        ("LR: 0.1\nmomentum: 0\nLR: 0.2\n", r"LR is given twice \(.*line 1; .*line 3\)"),
        # Row 32
        ("data: !!python/object/apply:os.system ['touch {marker}']\n", r"data .*line 1"),
        ("data: !!python/name:os.system\n", r"data .*line 1"),
        ("!!python/object/apply:os.system ['touch {marker}']\n", r"c.yaml"),
        # Row 33
        ("", r"config .*c.yaml holds no settings"),
        ("- depth\n", r"config .*c.yaml holds no settings"),
        ("depth\n", r"config .*c.yaml holds no settings"),
        ("depth: 10\n---\ndepth: 10\n", r"not YAML: but found another document \(.*line 2\)"),
        ("depth:\t[10\n", r"not YAML: .*c.yaml"),
        ("\tdepth: 10\n", r"not YAML: .*line 1\)"),
        ("data: caf\udce9\n", r"not YAML: .*c.yaml"),  # Latin-1
        # Row 34
        ("yes: 1\n", r"unknown flag yes \(.*line 1\)"),
        ("nEpochs: 12:30\n", r"nEpochs: '12:30' is not a whole number"),
        ("nEpochs: 0x10\n", r"nEpochs: '0x10' is not a whole number"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text, pattern):
    marker, config = tmp_path / "marker", tmp_path / "c.yaml"
    config.write_text(text.replace("{marker}", str(marker)), errors="surrogateescape")
    refused_before_it_begins([f"--config={config}"], tmp_path, pattern)
    assert not marker.exists()


def test_a_number_in_any_notation_is_accepted(tmp_path):
    """Row 30: to YAML, `1e-2` is text."""
    config = tmp_path / "c.yaml"
    config.write_text("LR: 1e-2\nweightDecay: 1.e-4\n")
    result = run(tiny(nEpochs=1, config=config, save=tmp_path / "run"))
    assert result.code == 0
    assert "LR: 0.01" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        # Row 35
        ({"depth": 41, "bottleneck": False}, r"depth: 41 .*; fix: use 40 or 43"),
        ({"depth": 41}, r"depth: 41 is not 6n \+ 4 .*; fix: use 40 or 46"),
        ({"imageSize": 224, "depth": 120}, r"depth: 120 .*; fix: use 121"),
        # Row 36
        *(({name: value}, rf"{name}: '{value}' is out of range .*; fix: use .*")
          for name, value in [("growthRate", 0), ("growthRate", -1), ("reduction", 0),
                              ("reduction", 1.5), ("dropRate", 1), ("dropRate", -0.1),
                              ("nClasses", 0), ("nEpochs", 0), ("nEpochs", -1), ("batchSize", 0)]),
        # Row 37
        *(({name: value}, rf"{name}: '{value}' is out of range .*; fix: use .*")
          for name, value in [("LR", -0.1), ("LR", 0), ("LR", "nan"), ("LR", "inf"),
                              ("momentum", "nan"), ("momentum", 1), ("weightDecay", -1)]),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(tmp_path, flags, pattern):
    refused_before_it_begins(tiny(**flags), tmp_path, pattern)


def without_gpus() -> None:
    environment(CUDA_VISIBLE_DEVICES="")


def with_gpus(count: int) -> None:
    import torch

    torch.cuda.device_count = lambda: count


@pytest.mark.parametrize(
    ("asked", "sabotage", "pattern"),
    [
        (1, without_gpus, r"nGPU=1 but no CUDA device; fix: --nGPU 0"),
        (2, partial(with_gpus, 1), r"nGPU=2 but 1 CUDA device; fix: --nGPU 1"),
        (9, partial(with_gpus, 8), r"nGPU=9 but 8 CUDA devices; fix: --nGPU \d"),
    ],
)
def test_gpus_that_are_not_there_are_refused(tmp_path, asked, sabotage, pattern):
    argv = tiny(nGPU=asked, batchSize=8 * asked)
    refused_before_it_begins(argv, tmp_path, pattern, sabotage)


def test_all_problems_are_said_at_once(tmp_path):
    argv = tiny(depth=11, LR=0, nepochs=3, save=tmp_path / "run")
    result = run(argv)
    lines = result.err.splitlines()
    assert result.code == 2 and len(lines) == 3
    assert all(line.startswith("error: ") and "; fix: " in line for line in lines)
    assert not (tmp_path / "run").exists()


# Rows 33 and 34: what is no fault.


def test_a_byte_order_mark_and_leading_zeros_mean_nothing(tmp_path):
    """To YAML, 010 is eight."""
    config = tmp_path / "c.yaml"
    config.write_bytes(b"\xef\xbb\xbfmanualSeed: 010\n")
    result = run(["--printConfig", f"--config={config}"])
    assert result.code == 0 and "manualSeed: 10\n" in result.out


# Row 39.


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["--LR=1", "--LR=1"], r"LR is given twice \(command line; command line\); fix: keep one"),
        (["--optnet=true", "--optMemory=3"], r"optMemory and optnet exclude each other; fix: keep"),
        (["--nosuch=1"], r"unknown flag nosuch \(command line\)"),
        (["depth"], r"'depth' is no flag \(command line\); fix: write --flag VALUE"),
        (
            ["--testOnly=true"],
            r"testOnly without weights would test random ones; fix: add",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, argv, pattern):
    refused_before_it_begins(argv, tmp_path, pattern)


def test_the_command_line_wins_over_the_config(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("LR: 0.3\nmomentum: 0.5\n")
    result = run([f"--config={config}", "--LR=0.2", "--printConfig"])
    assert result.code == 0 and "LR: 0.2\n" in result.out and "momentum: 0.5\n" in result.out
