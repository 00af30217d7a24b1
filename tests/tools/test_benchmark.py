"""Test that the benchmark compares equal networks, counts memory and bounds, and fills all rows."""

import csv
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import models.factory
import train
from engine import cuda_graph
from helpers.run_main import ROOT
from tools.benchmark import __main__ as benchmark
from tools.benchmark import cases, measure, peers, results
from tools.benchmark.turns import take_turns

TINY = "--depth 10 --growthRate 4 --imageSize 8 --batchSize 4 --nGPU 0"
IMAGENET = "--imageSize 72 --d1 1 --d2 2 --d3 1 --d4 1 --growthRate 4 --batchSize 4"
QUICK = [*TINY.split(), "--compile", "false", "--turns", "2", "--warmUp", "0"]
CPU = torch.device("cpu")


def settings(flags: str):
    _, opt, _ = benchmark.parse(flags.split())
    return opt


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**16})


# Peers:
def loss_and_gradients(network, opt) -> dict[str, torch.Tensor]:
    """Compute the loss of one batch and its gradients by name, in double precision."""
    network = network.double().train()
    images = torch.randn(
        opt.batchSize, opt.nChannels, opt.imageSize, opt.imageSize, dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    loss = F.cross_entropy(network(images), torch.arange(opt.batchSize))
    loss.backward()
    named = {name: parameter.grad for name, parameter in network.named_parameters()}
    return named | {"loss": loss.detach()}


@pytest.mark.parametrize("changes", ["", " --nChannels 1 --bnEps 1e-3"])
@pytest.mark.parametrize("flags", [TINY, IMAGENET], ids=["cifar", "imagenet"])
@pytest.mark.parametrize("peer", cases.PEERS)
def test_a_peer_with_our_weights_computes_our_loss_and_gradients(peer, flags, changes):
    opt = settings(flags + changes)
    ours, reference = models.factory.create(opt, 10), peers.create(peer, opt)
    before = {name: value.clone() for name, value in reference.named_parameters()}
    reference.load_state_dict(ours.state_dict())
    assert any((before[name] != value).any() for name, value in reference.named_parameters())
    want, got = loss_and_gradients(ours, opt), loss_and_gradients(reference, opt)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "peer, flags, why",
    [
        ("torchvision", "--bottleneck false", "only DenseNet-BC"),
        ("timm", "--reduction 0.7", "only DenseNet-BC"),
        ("torchvision", "--dropRate 0.2", "dropout is at other positions"),
        ("timm", "--initChannels 16", "2k channels"),
        ("timm", None, "not installed"),
    ],
)
def test_a_peer_that_lacks_the_network_says_why(peer, flags, why, monkeypatch):
    if flags is None:
        monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    with pytest.raises(NotImplementedError, match=why):
        peers.create(peer, settings(f"--depth 10 --growthRate 4 {flags or ''}"))


# Cases:
def names(argv: str, on_cuda: bool = False) -> list[str]:
    options, opt, _ = benchmark.parse(argv.split())
    found = cases.select_cases(opt, options.only, options.compile, on_cuda)
    return [case.name for case in found]


@pytest.mark.parametrize(
    "on_cuda, precisions, backends, modes, compiled",
    [
        (False, ["fp32", "bf16"], ["torch"], ["eager"], ["compiled"]),
        (True, ["fp32", "tf32", "bf16"], ["torch", "triton"], ["eager", "graph"],
         ["compiled", "compiled-reduce-overhead"]),
    ],
)  # fmt: skip
def test_without_flags_all_that_the_device_can_do_is_a_case(
    on_cuda, precisions, backends, modes, compiled
):
    levels = ["level-0", "level-1"]
    levels += [f"level-{level}-{ops}" for level in (2, 3, 4) for ops in backends]
    pairs = [f"{level}/{{}}/{mode}" for level in levels for mode in modes]
    pairs += ["torchvision-memory-efficient/{}/eager", "timm/{}/eager", "torchvision/{}/eager"]
    pairs += [f"torchvision/{{}}/{mode}" for mode in compiled]
    found = names("", on_cuda)
    assert sorted(found) == sorted(
        pair.format(f"{precision}/{memory_format}")
        for pair in pairs
        for precision in precisions
        for memory_format in ("contiguous", "channels-last")
    )


@pytest.mark.parametrize(
    "flags, on_cuda, wanted",
    [
        ("--only level-3*/bf16/channels", False, ["level-3-torch/bf16/channels-last/eager"]),
        ("--precision bf16 --only level-1", False,
         ["level-1/bf16/contiguous/eager", "level-1/bf16/channels-last/eager"]),
        ("--only level-4-triton/tf32/channels*graph", True,
         ["level-4-triton/tf32/channels-last/graph"]),
        ("--only fp32*compiled,timm/fp32 --compile false", False,
         ["timm/fp32/contiguous/eager", "timm/fp32/channels-last/eager"]),
        ("--tf32 true --optMemory 3 --kernels triton --cudaGraph true --only level*/channels", True,
         ["level-3-triton/tf32/channels-last/graph"]),
    ],
)  # fmt: skip
def test_flags_select_the_cases(flags, on_cuda, wanted):
    assert names(flags, on_cuda) == wanted


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--tf32 true", "tf32 has no effect on the CPU; fix: leave it out"),
        ("--cudaGraph true", "cudaGraph: there is no CUDA device; fix: use --cudaGraph auto"),
        ("--kernels triton", "kernels triton: there is no CUDA device; fix: use --kernels auto"),
        ("--precision half", "precision: half is not measured; fix: use single or bf16"),
        ("--only nothing", "only: nothing matches no case of these flags; fix: names are as "
         "level-0/fp32/contiguous/eager"),
        ("--csv README.md", "csv: README.md exists; fix: move it away, or name another with --csv "
         "FILE"),
        ("--csv nowhere/x.csv", "csv: cannot write in nowhere; fix: name another with --csv FILE"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_answered_in_one_line(flags, line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert benchmark.main(["--nGPU=0", *flags.split()]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_file_is_named_after_network_device_and_torch():
    path = benchmark.csv_path(None, "bench_x", "NVIDIA(R) H200 (MIG)", "2.11.0+cu128")
    name = r"bench_x_nvidia-h200-mig_torch2\.11_\d{6}\.csv"
    assert re.fullmatch(name, path.name)


# Measuring:
def kept_by_views(x):
    kept = x.exp()  # 40 bytes, kept as the output of exp and by the two views below
    return (x * kept).sum() + (kept[:5] * kept[5:]).sum()


def kept_by_hooks(x):
    halves = x.exp(), x.sin()  # sin keeps x, exp its result; the hook alone keeps the sine
    with torch.autograd.graph.saved_tensors_hooks(lambda _: halves, torch.cat):
        return torch.cat(halves).square().sum()


def kept_as_a_copy(x):
    kept = x.exp()
    return (kept[:5] * kept[5:].clone()).sum()


@pytest.mark.parametrize(
    "forward, held", [(kept_by_views, 40), (kept_by_hooks, 80), (kept_as_a_copy, 60)]
)
def test_each_storage_held_for_backward_counts_once_and_the_input_does_not(forward, held):
    x = torch.ones(10, requires_grad=True)
    assert measure.held_bytes(lambda: forward(x), [x]) == held


def runner(who: str, flags: str = TINY) -> measure.Runner:
    case = cases.Case(who, "fp32", "channels-last", "eager")
    return measure.Runner(case, settings(flags), CPU)


def test_each_level_holds_less_than_the_one_before():
    held = []
    for level in ("level-0", "level-1", "level-2-torch", "level-3-torch", "level-4-torch"):
        each = runner(level, TINY.replace("--depth 10", "--depth 22"))
        each.first_steps(None)
        held.append(each.row["held_mb_per_image"])
    assert held == sorted(held, reverse=True) and len(set(held)) == len(held)


def test_all_cases_take_the_same_first_steps():
    losses = {}
    for who in ("level-0", "level-3-torch", "torchvision", "timm"):
        step = runner(who).build().step
        losses[who] = torch.stack([step(), step(), step()])
        torch.testing.assert_close(losses[who], losses["level-0"], rtol=1e-4, atol=1e-5, msg=who)
    assert losses["level-0"].unique().numel() == 3  # the optimizer moves the weights


def test_cases_take_turns_in_random_order_and_one_that_fails_drops_out():
    calls: list[str] = []

    def fake(name: str) -> SimpleNamespace:
        def run() -> None:
            if name == "b" and calls.count("b") == 3:
                raise RuntimeError("out of memory\nand more lines")
            calls.append(name)

        return SimpleNamespace(take_turn=run, turns=[], row={"who": name, "mode": "x"})

    rounds = []
    for _ in range(2):
        calls.clear()
        runners = [fake(name) for name in "abcd"]
        take_turns(runners, 1, 6)
        rounds.append("".join(calls))
        assert [each.row.get("note") for each in runners] == [None, "out of memory", None, None]
        assert [len(each.turns) for each in runners] == [6, 2, 6, 6]
    assert rounds[0] == rounds[1]  # the same every time
    turns = [rounds[0][i : i + 4] for i in (0, 4, 8)] + [rounds[0][i : i + 3] for i in (12, 15)]
    assert [sorted(turn) for turn in turns] == [list("abcd")] * 3 + [list("acd")] * 2
    assert len(set(turns)) > 2


def test_the_trainer_takes_turns_with_the_bare_step_on_the_same_network(monkeypatch):
    # The clock ticks once when it is read, ten times in a bare step, and 100 in one of the trainer.
    now, calls = 0, []

    def tick(ticks: int, name: str = "") -> int:
        nonlocal now
        now += ticks
        calls.extend([name] * bool(name))
        return now

    def create(opt, network, *rest):
        for name, weight in network.named_parameters():
            torch.testing.assert_close(weight, start[name], rtol=0, atol=0)
        network.register_forward_pre_hook(lambda *_: tick(100, "trainer") and None)
        return make(opt, network, *rest)

    bare, make = runner("level-1").build(), train.Trainer
    start = {name: weight.clone() for name, weight in bare.network.named_parameters()}
    bare.run = lambda: tick(10, "bare")
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: tick(1)))
    monkeypatch.setattr(train, "Trainer", create)
    monkeypatch.setitem(measure.BURST, "cpu", 2)
    columns = measure.time_beside_trainer(bare, 1, 3)
    assert columns["images_per_s"] == columns["images_per_s_q3"] == 4 / 100.5
    assert columns["turns"] == 3 and columns["note"].startswith("0.104 of the speed of level-1 in")
    assert calls == ["trainer", "trainer", "bare", "bare"] * 4


# Results:
def test_the_traffic_that_bounds_training_by_hand():
    opt = SimpleNamespace(imagenetShape=False, imageSize=8, initChannels=16, growthRate=4,
                          stages=(2,), bottleneck=False, reduction=1.0)  # fmt: skip
    assert results.block_traffic(opt) == 64 * (4 * 16 + 4 * 20 + 2 * 6 * 4)
    opt.bottleneck = True
    assert results.block_traffic(opt) == 64 * (4 * 16 + 4 * 20 + 2 * 6 * 4 + 2 * 6 * 16)


def row(who: str, speed: float | None, **more: object) -> dict:
    fixed = {"who": who, "precision": "fp32", "memory_format": "contiguous", "mode": "eager"}
    return fixed | ({} if speed is None else {"images_per_s": speed}) | more


def test_speeds_are_divided_by_the_faster_format_in_the_same_precision():
    rows = [
        row("level-0", 20.0),
        row("level-2-torch", 60.0),
        row("torchvision", 30.0),
        row("torchvision", 40.0, memory_format="channels-last"),
        row("torchvision", 80.0, mode="compiled"),
        row("timm", None, note="not installed"),
    ]
    results.add_ratios(rows)
    ours = rows[1]
    assert (ours["ratio_level_0"], ours["ratio_torchvision"]) == (3, 1.5)
    assert (ours["ratio_torchvision_compiled"], ours["ratio_fastest_eager_peer"]) == (0.75, 1.5)
    assert "ratio_timm" not in ours and "ratio_level_0" not in rows[-1]


def test_the_median_and_the_quartiles_of_the_speeds():
    times = [0.5, 2.0, 1.0, 2 / 3, 0.4]  # 4, 1, 2, 3 and 5 images/s in a batch of two
    found = measure.speed_columns(2, times)
    assert list(found.values()) == pytest.approx([3, 2, 4, 5])


def test_every_cell_of_the_file_is_filled_and_read_back():
    rows = [row("level-0", 1234.5678, first_loss=2.3), row("timm", None, note="no timm,\nno row")]
    lines = list(csv.DictReader(results.as_csv(rows).decode().splitlines(keepends=True)))
    assert [tuple(line) for line in lines] == [results.COLUMNS] * 2
    assert lines[0]["images_per_s"] == "1234.6"
    assert lines[0]["peak_mb"] == lines[1]["images_per_s"] == "not run"
    assert lines[1]["note"] == "no timm,\nno row"


# The whole command:
def test_a_run_prints_and_writes_a_row_for_every_case_and_trainer(tmp_path, capsys):
    path = tmp_path / "bench.csv"
    flags = ["--only", "level-4,timm/*/channels", "--trainer", "--csv", str(path), *QUICK]
    assert benchmark.main(flags) == 0
    lines = list(csv.DictReader(path.open()))
    found = [(line["who"], line["precision"], line["memory_format"]) for line in lines]
    assert found == [
        (who, precision, memory_format)
        for precision in ("fp32", "bf16")
        for who, memory_format in (("level-4-torch", "contiguous"),
                                   ("level-4-torch", "channels-last"),
                                   ("timm", "channels-last"), ("trainer-4-torch", "channels-last"))
    ]  # fmt: skip
    for line in lines:
        assert line["turns"] == "2" and float(line["fraction_of_bound"]) > 0
        assert float(line["images_per_s"]) > 0 and float(line["ratio_timm"]) > 0
        assert line["peak_mb"] == line["ratio_torchvision"] == "not run"
        if line["who"].startswith("trainer"):
            ratio, rest = line["note"].split(" ", 1)
            level = line["who"].replace("trainer", "level")
            assert float(ratio) > 0 and rest.startswith(f"of the speed of {level} in turns")
            continue
        assert line["note"] == "none" and float(line["held_mb_per_image"]) > 0
        rel = 1e-4 if line["precision"] == "fp32" else 2e-2
        assert float(line["first_loss"]) == pytest.approx(float(lines[0]["first_loss"]), rel=rel)
    printed = capsys.readouterr().out
    assert "densenet-BC-L10-k4, batch 4\n" in printed and str(path) in printed
    assert printed.count("\nlevel-4-torch ") == 4

    assert benchmark.main(flags) == 2  # an existing file is not replaced
    assert list(csv.DictReader(path.open())) == lines


def test_a_case_that_cannot_run_is_reported_with_the_reason(tmp_path, monkeypatch, capsys):
    path = tmp_path / "failed.csv"
    monkeypatch.setattr(train, "Trainer", lambda *_: 1 / 0)
    flags = ["--only", "level-2*fp32/channels,torchvision/fp32/channels", "--reduction", "0.7"]
    assert benchmark.main([*flags, "--trainer", "--csv", str(path), *QUICK]) == 0
    ours, peer, trainer = csv.DictReader(path.open())
    assert ours["note"] == "none" and float(ours["images_per_s"]) > 0
    assert peer["note"] == "it has only DenseNet-BC with reduction 0.5"
    assert trainer["note"] == "division by zero"
    assert peer["images_per_s"] == trainer["images_per_s"] == "not run"
    assert "DenseNet-BC with reduction 0.5" in capsys.readouterr().out


# CUDA:
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("implementation", ["level-0", "level-2-torch", "level-3-triton"])
def test_a_captured_step_trains_as_the_eager_one(implementation):
    device = torch.device("cuda", 0)
    opt = settings(TINY.replace("--nGPU 0", "--LR 0.01"))
    runners = {}
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for mode, steps in (("eager", cuda_graph.WARMUP_STEPS + 2), ("graph", 2)):
            case = cases.Case(implementation, "fp32", "channels-last", mode)
            runners[mode] = measure.Runner(case, opt, device).build()
            if mode == "graph":
                runners[mode].capture(torch.cuda.graph_pool_handle())
            for _ in range(steps):
                runners[mode].run()
    captured = dict(runners["graph"].network.named_parameters())
    for name, want in runners["eager"].network.named_parameters():
        torch.testing.assert_close(captured[name], want, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_every_mode_is_measured_with_its_memory(tmp_path):
    path, flags = tmp_path / "gpu.csv", TINY.replace("--nGPU 0", "--precision bf16 --warmUp 1")
    only = ["--turns", "2", "--only", "level-2,torchvision/bf16*compiled"]
    assert benchmark.main([*flags.split(), *only, "--csv", str(path)]) == 0
    for line in csv.DictReader(path.open()):
        assert line["note"] == "none", line
        assert float(line["reserved_mb"]) >= float(line["peak_mb"]) > 0, line
