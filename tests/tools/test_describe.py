"""Test that tools.describe counts as the paper does, and as a plain sum over the architecture."""

import re
from dataclasses import replace

import pytest
import torch

import datasets.factory
import opts
from engine.memory import MemoryEstimate
from kernels.backend import REFERENCE
from tools import describe
from tools.results import published

# Parameters, multiply-adds and outputs of convolutions and classifier, worked out by hand.
PUBLISHED = [
    ("--depth 40 --bottleneck false --reduction 1", 1_019_722, 264_812_928, 0.45),
    ("--depth 100 --bottleneck false --reduction 1", 6_979_642, 1_769_516_448, 1.14),
    ("--bottleneck false --reduction 1 --growthRate 24", 27_249_082, 6_889_347_744, 2.25),
    ("--depth 100 --growthRate 12", 769_162, 287_929_692, 1.46),
    ("--depth 250 --growthRate 24", 15_324_406, 5_418_785_724, 7.38),
    ("--depth 190 --growthRate 40", 25_624_430, 9_301_945_740, 9.33),
    ("--depth 40 --growthRate 60", 4_261_690, 1_795_836_360, 2.86),
    ("--dataset imagenet --depth 121", 7_978_856, 2_834_161_664, 6.90),
    ("--dataset imagenet --depth 169", 14_149_480, 3_359_843_328, 7.30),
    ("--dataset imagenet --depth 161", 28_681_000, 7_727_907_072, 11.06),
    ("--dataset imagenet --depth 264", 33_337_704, 5_751_653_376, 8.53),
    ("--dataset imagenet --depth 232", 55_570_984, 10_119_129_600, 11.97),
    ("--dataset imagenet --depth 264 --growthRate 48", 72_686_632, 12_850_693_632, 12.80),
    # Two channels of 3x3 in 24 maps of 32x32, and of 7x7 in 64 maps of 112x112, are less.
    ("--depth 100 --nChannels 1", 768_730, 287_487_324, 1.46),
    ("--dataset imagenet --nChannels 1", 7_972_584, 2_755_485_696, 6.90),
]
TINY = "--dataset digits --depth 10 --growthRate 4 --nGPU 0"


def described(flags: str, capsys) -> list[int]:
    """Return parameters, multiply-adds and activations that are printed for a command line."""
    assert describe.main(flags.split()) == 0
    printed = capsys.readouterr().out
    pattern = r"^(?:parameters|multiply-adds|activations) +([\d,]+)"
    return [int(found.replace(",", "")) for found in re.findall(pattern, printed, re.MULTILINE)]


@pytest.mark.parametrize("flags, parameters, macs, activations", PUBLISHED)
def test_the_published_networks_count_exactly(flags, parameters, macs, activations, capsys):
    found = described(flags, capsys)
    assert found[:2] == [parameters, macs]
    assert round(found[2] / 1e6, 2) == activations


def test_a_plain_sum_over_the_layers_gives_the_same_multiply_adds(capsys):
    size, channels, macs = 32, 24, 32 * 32 * 24 * 27
    for block in range(3):
        for _ in range(16):
            macs += size * size * (channels * 48 + 48 * 12 * 9)
            channels += 12
        if block < 2:
            macs += size * size * channels * (channels // 2)
            channels, size = channels // 2, size // 2
    assert described("--depth 100", capsys)[1] == macs + channels * 10


def test_describe_prints_each_layer_and_no_memory_without_a_batch(capsys):
    assert describe.main(["--depth", "22", "--optMemory", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "3, 3, 3 layers per block" in printed and "71,686" in printed
    assert "features.denseblock3.denselayer3.conv2" in printed and "48 -> 12" in printed
    assert "memory" not in printed
    assert describe.main(["--dataset", "folder", "--imageSize", "32"]) == 2
    assert "fix: add --nClasses N" in capsys.readouterr().err


def test_describe_predicts_memory_per_level_and_precision_for_a_batch(capsys, monkeypatch):
    assert set(describe.PRECISIONS) == set(opts.FLAGS["precision"].choices)
    monkeypatch.setattr(describe, "PRECISIONS", ("single", "double"))  # a fraction of the time
    monkeypatch.setattr(opts, "MEMORY_LEVELS", (0, 2))
    assert describe.main([*TINY.split(), "--batchSize", "200"]) == 0
    printed = capsys.readouterr().out
    lines = printed.partition("memory of a training step at batch 200 on CPU")[2].splitlines()
    rows = [line.split() for line in lines[2:4]]
    assert lines[1].split() == ["optMemory", "single", "double"]
    assert [row[0] for row in rows] == ["0", "2"]
    for level, column, precision in ((0, 1, "single"), (2, 2, "double")):
        opt = opts.parse(f"{TINY} --batchSize 200 --precision {precision}".split())
        estimate = MemoryEstimate(opt, 10, torch.device("cpu"), REFERENCE)
        assert rows[level // 2][column] == f"{estimate.peak_bytes(level) / 1e6:.1f}"
    assert len({rows[0][1], rows[1][1], rows[1][2]}) == 3
    assert lines[-1].startswith("optMemory auto: 2, the fastest")


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--dataset digits", "as loaded"),
        ("--dataset synthetic --nImages 99", "as loaded"),
        ("--dataset synthetic --nImages 99 --nChannels 4", "as loaded"),
        ("--dataset digits --nChannels 1", "as loaded"),
        ("--dataset imagenet", 0),
        ("--dataset folder --imageSize 32", None),
        ("--dataset cifar10", 60_000 * (32 * 32 * 3 + 8)),
    ],
)
def test_describe_counts_the_data_that_stays_on_the_device(flags, wanted):
    opt = opts.parse(flags.split())
    if wanted == "as loaded":
        data = datasets.factory.create(opt, torch.device("cpu"), print)
        splits = (data.train, data.val)
        wanted = sum(t.nbytes for split in splits for t in vars(split.images).values())
    assert describe.resident_bytes(opt) == wanted


def test_a_gpu_that_cannot_be_used_is_one_line(monkeypatch, capsys):
    def init() -> None:
        raise RuntimeError("The NVIDIA driver is too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert describe.main([*TINY.split()[:-2], "--batchSize", "8"]) == 2
    assert capsys.readouterr().err.startswith("error: the GPU cannot be used: The NVIDIA driver")


def test_table_2_has_a_line_for_each_of_its_networks(capsys, monkeypatch):
    rows = published.tables()["table2"].rows
    kept = [row for row in rows if row.depth in ("40", "16") or "All-CNN" in row.method]
    table = replace(published.tables()["table2"], rows=kept)
    monkeypatch.setattr(published, "tables", lambda: {"table2": table})
    assert describe.main(["--table2", "true", "--nGPU", "0"]) == 0
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    found = {method: numbers for method, *numbers in lines[1:]}
    assert list(found) == [row.method for row in kept] and len(found) == 4
    # Parameters, multiply-adds and activations of All-CNN by hand; the memory as --batchSize shows.
    assert found["All-CNN [31]"][:5] == ["-", "1,369,738", "270,798,336", "345,960", "128"]
    assert found["DenseNet (k = 12)"][:5] == ["40", "1,019,722", "264,812,928", "451,594", "64"]
    opt = opts.parse(["--dataset", "cifar10", "--netType", "allcnn", "--batchSize", "128"])
    peak = MemoryEstimate(opt, 10, torch.device("cpu"), REFERENCE).peak_bytes()
    assert found["All-CNN [31]"][5] == f"{round(peak / 1e6):,}"
    assert describe.main(["--table2", "true", "--depth", "40"]) == 2
    assert "depth has no effect on the networks of Table 2; fix: " in capsys.readouterr().err
