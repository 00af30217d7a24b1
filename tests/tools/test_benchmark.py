"""The benchmark compares equal networks, counts bytes and bounds rightly, and reports every row."""

import csv
import datetime
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import engine.device
import models.factory
import opts
import train
from engine import cuda_graph
from errors import UsageError
from helpers.run_main import ROOT
from tools.benchmark import __main__ as benchmark
from tools.benchmark import measure, peers, results

TINY = "--depth 10 --growthRate 4 --imageSize 8 --batchSize 4 --nGPU 0"
SHAPES = {
    "cifar": TINY,
    "imagenet": "--imageSize 72 --d1 1 --d2 2 --d3 1 --d4 1 --growthRate 4 --batchSize 4",
}
QUICK = [*TINY.split(), "--compile", "false", "--rss", "false", "--turns", "2", "--warmUp", "0"]


def settings(flags: str):
    return opts.parse(["--dataset", "synthetic", *flags.split()])


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**16})


# ------------------------------------------------------------------------------------------ peers


def loss_and_gradients(network, opt) -> dict[str, torch.Tensor]:
    """Of one batch, in double precision."""
    network = network.double().train()
    images = torch.randn(
        opt.batchSize, 3, opt.imageSize, opt.imageSize, dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    loss = F.cross_entropy(network(images), torch.arange(opt.batchSize))
    loss.backward()
    named = {name: parameter.grad for name, parameter in network.named_parameters()}
    return named | {"loss": loss.detach()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("who", peers.PEERS)
def test_a_peer_with_our_weights_computes_our_loss_and_gradients(who, shape):
    opt = settings(SHAPES[shape])
    ours, theirs = models.factory.create(opt, 10), peers.create(who, opt, 10)
    weights = {name: value.clone() for name, value in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    want, got = loss_and_gradients(ours, opt), loss_and_gradients(theirs, opt)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-11)


def test_a_peer_with_its_own_weights_computes_another_loss():
    opt = settings(TINY)
    ours, theirs = models.factory.create(opt, 10), peers.create("torchvision", opt, 10)
    want, got = loss_and_gradients(ours, opt), loss_and_gradients(theirs, opt)
    assert abs(got["loss"] - want["loss"]) > 1e-3


def test_the_peers_have_as_many_parameters_as_the_papers_network():
    opt = settings("--depth 100 --growthRate 12")
    for who in peers.PEERS:
        count = sum(parameter.numel() for parameter in peers.create(who, opt, 10).parameters())
        assert count == 769_162


@pytest.mark.parametrize(
    "who, flags, why",
    [
        ("torchvision", "--bottleneck false", "only DenseNet-BC"),
        ("timm", "--reduction 0.7", "only DenseNet-BC"),
        ("torchvision", "--dropRate 0.2", "dropout sits in other places"),
        ("timm", "--initChannels 16", "2k maps"),
    ],
)
def test_a_peer_that_lacks_the_network_says_why(who, flags, why):
    with pytest.raises(peers.Unsupported, match=why):
        peers.create(who, settings(f"--depth 10 --growthRate 4 {flags}"), 10)


def test_timm_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    with pytest.raises(peers.Unsupported, match="not installed"):
        peers.create("timm", settings(TINY), 10)


# ------------------------------------------------------------------------------------------ cases


def test_on_a_gpu_every_level_backend_and_mode_takes_part():
    found = measure.all_cases("bf16", True, ["torch", "triton"])
    pairs = {(entry.implementation, entry.mode) for entry in found}
    ours = {f"level-{level}-{ops}" for level in (2, 3, 4) for ops in ("torch", "triton")}
    ours |= {"level-0", "level-1"}
    theirs = {("torchvision-memory-efficient", "eager"), ("timm", "eager")}
    theirs |= {("torchvision", mode)
               for mode in ("eager", "compiled", "compiled-reduce-overhead")}  # fmt: skip
    assert pairs == theirs | {(who, mode) for who in ours for mode in ("eager", "graph")}
    assert len(found) == 2 * len(pairs)  # contiguous and channels last


def names(argv: str, on_cuda: bool = False) -> list[str]:
    request = benchmark.parse(argv.split())
    found = benchmark.select_cases(request, request.networks[0], on_cuda)
    return [case.name for case in found]


def test_without_flags_both_precisions_of_a_cpu_are_measured():
    found = names("")
    assert len(found) == len(set(found)) == 2 * 2 * (5 + 4)
    assert {name.split("/")[1] for name in found} == {"fp32", "bf16"}
    assert {name.split("/")[1] for name in names("", on_cuda=True)} == {"fp32", "tf32", "bf16"}


@pytest.mark.parametrize(
    "flags, on_cuda, wanted",
    [
        ("--only level-3*/bf16/channels", False, ["level-3-torch/bf16/channels-last/eager"]),
        ("--precision bf16 --optMemory 1 --only level", False,
         ["level-1/bf16/contiguous/eager", "level-1/bf16/channels-last/eager"]),
        ("--tf32 true --kernels triton --cudaGraph true --only level-4*/channels", True,
         ["level-4-triton/tf32/channels-last/graph"]),
        ("--only fp32*compiled,timm/fp32 --compile false", False,
         ["timm/fp32/contiguous/eager", "timm/fp32/channels-last/eager"]),
        ("--depths 40,100 --only fp32 --optMemory 2 --cudaGraph false", True,
         ["level-2-torch/fp32/channels-last/eager", "level-2-triton/fp32/channels-last/eager",
          "torchvision/fp32/channels-last/eager",
          "torchvision-memory-efficient/fp32/channels-last/eager",
          "timm/fp32/channels-last/eager"]),
    ],
)  # fmt: skip
def test_flags_choose_who_takes_part(flags, on_cuda, wanted):
    assert names(flags, on_cuda) == wanted


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--turn 3", "unknown flag turn (command line); fix: did you mean turns?"),
        ("--turns 1", "turns: '1' is out of range (command line); fix: use a whole number of at "
         "least 2"),
        ("--depths 40,41", "depth: 41 is not 6n + 4 (with bottleneck); fix: use 40 or 46"),
        ("--depth 40 --depths 40,100", "depth and depths exclude each other; fix: keep one"),
        ("--precision half", "precision: half is not measured; fix: use single or bf16"),
        ("--only nobody", "only: nobody leaves nobody to measure; fix: names are as "
         "level-0/fp32/contiguous/eager"),
        ("--nGPU 0 --tf32 true", "tf32 has no effect on the CPU; fix: leave it out"),
        ("--csv README.md", "csv: README.md exists; fix: move it away, or name another with --csv "
         "FILE"),
        ("--csv nowhere/x.csv", "csv: cannot write in nowhere; fix: name another with --csv FILE"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_answered_in_one_line(flags, line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert benchmark.main(["--nGPU=0", *flags.removeprefix("--nGPU 0 ").split()]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_every_problem_of_both_kinds_of_flags_is_told_at_once():
    with pytest.raises(UsageError) as raised:
        benchmark.parse(["--turns", "x", "--depth", "41", "--rss", "maybe"])
    assert len(raised.value.problems) == 3


# -------------------------------------------------------------------------------------- measuring


def test_a_storage_that_is_kept_twice_counts_once_and_the_input_not_at_all():
    x = torch.ones(10, requires_grad=True)

    def forward() -> torch.Tensor:
        kept = x.exp()  # 40 bytes, kept as the output of exp and by the two views below
        return (x * kept).sum() + (kept[:5] * kept[5:]).sum()

    assert measure.held_bytes(forward, [x]) == measure.packed_bytes(forward, [x]) == 40
    assert measure.packed_bytes(forward, []) == 80


def test_what_a_network_packs_up_in_its_own_way_counts():
    x = torch.ones(10, requires_grad=True)

    def forward() -> torch.Tensor:
        halves = x.exp(), x.sin()
        with torch.autograd.graph.saved_tensors_hooks(lambda _: halves, torch.cat):
            return torch.cat(halves).square().sum()

    # sin keeps x, exp its result; the sine is kept by the hook alone.
    assert measure.held_bytes(forward, [x]) == 80
    assert measure.packed_bytes(forward, [x]) == 40


def test_a_copy_counts_as_well_as_its_original():
    x = torch.ones(10, requires_grad=True)

    def forward() -> torch.Tensor:
        kept = x.exp()
        return (kept[:5] * kept[5:].clone()).sum()

    assert measure.held_bytes(forward, [x]) == 40 + 20


def runner(who: str, flags: str = TINY) -> measure.Runner:
    entry = measure.Case(who, "fp32", "channels-last", "eager")
    return measure.Runner(entry, settings(flags), 10, torch.device("cpu"))


def test_each_level_holds_less_than_the_one_before():
    levels = ("level-0", "level-1", "level-2-torch", "level-3-torch", "level-4-torch")
    flags = TINY.replace("--depth 10", "--depth 22")
    held = [runner(who, flags).held_bytes() for who in levels]
    assert held == sorted(held, reverse=True) and len(set(held)) == len(held)


def test_all_contestants_take_the_same_first_steps():
    losses = {}
    for who in ("level-0", "level-3-torch", "torchvision", "timm"):
        step = runner(who).step
        losses[who] = torch.stack([step(), step(), step()])
    for who, found in losses.items():
        torch.testing.assert_close(found, losses["level-0"], rtol=1e-4, atol=1e-5, msg=who)
    assert losses["level-0"].unique().numel() == 3  # the optimizer moves the weights


def fake(name: str, calls: list[str], breaks_after: float = float("inf")) -> SimpleNamespace:
    def run() -> None:
        if calls.count(name) >= breaks_after:
            raise RuntimeError("out of memory\nand more lines")
        calls.append(name)

    return SimpleNamespace(case=name, device=torch.device("cpu"), run=run)


def turns(calls: list[str], count: int) -> list[tuple[str, ...]]:
    return [tuple(calls[i : i + count]) for i in range(0, len(calls), count)]


def test_contestants_take_turns_in_an_order_that_is_random_but_the_same_every_time():
    rounds = []
    for _ in range(2):
        calls: list[str] = []
        times, failures = measure.time_interleaved([fake(name, calls) for name in "abcd"], 2, 6)
        rounds.append(turns(calls, 4))
        assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abcd", 6)
        assert failures == {}
    assert rounds[0] == rounds[1] and len(rounds[0]) == 8
    assert all(sorted(turn) == list("abcd") for turn in rounds[0])
    assert len(set(rounds[0])) > 1


def test_the_trainer_and_the_bare_step_take_turns_on_the_same_network(monkeypatch):
    calls = []
    create, bare = train.create_trainer, runner("level-1")
    step = bare.run

    def watched(*args):
        trainer = create(*args)
        for name, weight in trainer.model.named_parameters():
            torch.testing.assert_close(weight, start[name], rtol=0, atol=0)
        trainer.model.register_forward_hook(lambda *_: calls.append("trainer"))
        return trainer

    start = {name: weight.clone() for name, weight in bare.network.named_parameters()}
    bare.run = lambda: (calls.append("bare"), step())
    monkeypatch.setattr(train, "create_trainer", watched)
    times = measure.beside_the_trainer(bare, settings(TINY), 10, 1, 3)
    assert calls == ["trainer", "bare"] * 4
    assert len(times) == 3 and all(alone > 0 and trained > 0 for alone, trained in times)


def test_the_time_of_a_turn_is_of_its_own_steps(monkeypatch):
    # The clock ticks once when it is read, ten times in a bare step, and 100 in one of the trainer.
    now = 0

    def tick(ticks: int) -> int:
        nonlocal now
        now += ticks
        return now

    clock = SimpleNamespace(perf_counter=lambda: tick(1))
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setitem(measure.BURST, "cpu", 2)
    bare = runner("level-0")
    bare.run = lambda: tick(10)

    class Trainer:
        def train(self, loader, after_step):
            for _ in range(len(loader.sampler)):
                tick(100)
                after_step()

    monkeypatch.setattr(train, "create_trainer", lambda *_: Trainer())
    assert measure.beside_the_trainer(bare, settings(TINY), 10, 1, 3) == [(10.5, 100.5)] * 3


def test_a_contestant_that_breaks_drops_out_and_the_others_go_on():
    calls: list[str] = []
    runners = [fake("a", calls), fake("b", calls, breaks_after=2), fake("c", calls)]
    times, failures = measure.time_interleaved(runners, 1, 4)
    assert failures == {"b": "out of memory"}
    assert len(times["a"]) == len(times["c"]) == 4


def test_the_peak_of_a_process_of_its_own_is_not_that_of_this_one():
    ballast = torch.ones(2**30, dtype=torch.uint8)
    entry = measure.Case("level-4-torch", "fp32", "channels-last", "eager")
    found = measure.peak_rss_mb(entry, settings(TINY), 10)
    assert 100 < found < engine.device.peak_memory_mb(torch.device("cpu")) - ballast.numel() / 2e6


def test_compilers_find_empty_caches_and_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with benchmark.empty_caches():
        inside = os.environ["TRITON_CACHE_DIR"], os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert "mine" not in inside and len(set(inside)) == 2
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


# ------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "flags, megabytes",  # in bf16, as docs/memory.md has them
    [
        ("--depth 100 --growthRate 12", 38.9),
        ("--depth 250 --growthRate 24", 366),
        ("--depth 190 --growthRate 40", 377),
        ("--imageSize 224 --depth 121", 137),
        ("--imageSize 224 --depth 201", 213),
        ("--imageSize 224 --depth 264", 290),
    ],
)
def test_the_traffic_that_bounds_training_is_that_of_the_design(flags, megabytes):
    found = results.block_traffic(settings(flags)) * 2 / 1e6
    assert float(f"{found:.3g}") == megabytes


def test_the_traffic_of_two_basic_layers_by_hand():
    opt = SimpleNamespace(imagenetShape=False, imageSize=8, initChannels=16, growthRate=4,
                          stages=(2,), bottleneck=False, reduction=1.0)  # fmt: skip
    assert results.block_traffic(opt) == 64 * (4 * 16 + 4 * 20 + 2 * 6 * 4)
    opt.bottleneck = True
    assert results.block_traffic(opt) == 64 * (4 * 16 + 4 * 20 + 2 * 6 * 4 + 2 * 6 * 16)


@pytest.mark.parametrize("power", [1.0, 1.137, 2.0])
def test_a_power_law_is_fitted_exactly(power):
    points = [(depth, 3 * depth**power) for depth in (40, 100, 190, 250)]
    assert results.exponent(points) == pytest.approx(power)
    assert results.exponent([*points, (400, 1.0)]) != pytest.approx(power)


def row(who: str, speed: float | None, **more: object) -> dict:
    fixed = {"who": who, "precision": "fp32", "memory_format": "contiguous", "mode": "eager",
             "depth": 40, "network": "bc-L40-k12", "batch_size": 4}  # fmt: skip
    return fixed | ({} if speed is None else {"images_per_s": speed}) | more


def test_speeds_are_divided_by_the_faster_format_in_the_same_precision():
    rows = [
        row("level-0", 20.0),
        row("level-2-torch", 60.0),
        row("torchvision", 30.0),
        row("torchvision", 40.0, memory_format="channels-last"),
        row("torchvision", 80.0, mode="compiled"),
        row("torchvision", 400.0, precision="bf16"),
        row("timm", None, note="not installed"),
    ]
    results.add_ratios(rows)
    ours = rows[1]
    assert (ours["ratio_level_0"], ours["ratio_torchvision"]) == (3, 1.5)
    assert (ours["ratio_torchvision_compiled"], ours["ratio_fastest_eager_peer"]) == (0.75, 1.5)
    assert "ratio_timm" not in ours and "ratio_level_0" not in rows[-1]


def test_the_median_and_the_quartiles_of_the_speeds():
    assert results.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "images_per_s": 3.0, "images_per_s_q1": 2.0, "images_per_s_q3": 4.0,
    }  # fmt: skip


def test_growth_is_fitted_for_each_contestant_over_the_depths():
    rows = [
        row(who, 1000 / depth**power, depth=depth, held_mb_per_image=depth**power)
        for who, power in (("level-0", 2), ("level-2-torch", 1))
        for depth in (40, 100, 190)
    ]
    results.add_growth(rows)
    assert rows[0]["held_exponent"] == pytest.approx(2)
    assert rows[-1]["time_exponent"] == pytest.approx(1)
    printed = results.growth_table(rows).splitlines()
    assert "bytes held by 4.00" in printed[-2] and "bytes held by 2.00" in printed[-1]


# ---------------------------------------------------------------------------------------- results


def test_the_file_is_named_after_what_which_device_which_torch_and_which_month():
    day = datetime.date(2026, 11, 3)
    opt = settings("--depth 100 --growthRate 12")
    name = results.file_name(results.network_name(opt), 64, "cpu-2core", "2.11.0+cu128", day)
    assert name == "bench_bc-L100-k12-b64_cpu-2core_torch2.11_202611.csv"
    large = results.network_name(settings("--imageSize 224 --nClasses 1000"))
    name = results.file_name(large, 256, "NVIDIA H200 (SXM/80GB)", "2.11.0", day)
    assert name == "bench_bc-L121-k32-224px-b256_nvidia-h200-sxm-80gb_torch2.11_202611.csv"


def test_every_cell_of_the_file_is_filled_and_read_back():
    rows = [row("level-0", 1234.5678, first_loss=2.3), row("timm", None, note="no timm,\nno row")]
    lines = list(csv.DictReader(results.as_csv(rows).decode().splitlines(keepends=True)))
    assert [tuple(line) for line in lines] == [results.COLUMNS] * 2
    assert (lines[0]["images_per_s"], lines[0]["note"]) == ("1234.6", "none")
    assert lines[0]["peak_mb"] == lines[1]["images_per_s"] == "not run"
    assert lines[1]["note"] == "no timm,\nno row"


def test_a_column_that_is_not_declared_is_an_error():
    with pytest.raises(ValueError, match="velocity"):
        results.as_csv([row("level-0", 1.0, velocity=2)])


def test_a_run_prints_and_writes_a_row_for_every_contestant(tmp_path, capsys):
    path = tmp_path / "bench.csv"
    flags = ["--only", "level-0/,level-4,timm", "--csv", str(path), *QUICK]
    assert benchmark.main(flags) == 0
    lines = list(csv.DictReader(path.open()))
    found = [(line["who"], line["precision"], line["memory_format"]) for line in lines]
    assert found == [
        (who, precision, memory_format)
        for precision in ("fp32", "bf16")
        for who in ("level-0", "level-4-torch", "timm")
        for memory_format in ("contiguous", "channels-last")
    ]
    for line in lines:
        assert line["turns"] == "2" and line["note"] == "none"
        for column in ("images_per_s", "ratio_timm", "held_mb_per_image", "fraction_of_bound"):
            assert float(line[column]) > 0
        rel = 1e-4 if line["precision"] == "fp32" else 2e-2
        assert float(line["first_loss"]) == pytest.approx(float(lines[0]["first_loss"]), rel=rel)
        assert {line[column] for column in ("peak_mb", "peak_rss_mb", "ratio_torchvision")} == {
            "not run"
        }
    printed = capsys.readouterr().out
    assert "bc-L10-k4-8px, batch 4, fp32" in printed and str(path) in printed
    assert printed.count("level-4-torch ") == 4
    assert benchmark.main(flags) == 2  # and does not touch what is there
    assert list(csv.DictReader(path.open())) == lines


def test_who_cannot_take_part_is_reported_with_the_reason(capsys):
    flags = ["--only", "level-2*fp32,torchvision/fp32", "--reduction", "0.7", "--csv", "none"]
    assert benchmark.main([*flags, *QUICK]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "channels-last" in line]
    theirs = next(line for line in table if line.startswith("torchvision"))
    ours = next(line for line in table if line.startswith("level-2"))
    assert "DenseNet-BC with reduction 0.5" in theirs and theirs.count("not run") == 14
    assert ours.split()[3] != "not"


def test_the_trainer_has_a_row_beside_each_contestant_that_steps_as_it_does(tmp_path):
    path = tmp_path / "trainer.csv"
    flags = ["--only", "level-0/,level-2,timm", "--precision", "single", "--csv", str(path)]
    assert benchmark.main(["--trainer", *flags, *QUICK]) == 0
    *bare, first, second = csv.DictReader(path.open())
    assert len(bare) == 6 and not any("trainer" in line["who"] for line in bare)
    for line, who in ((first, "0"), (second, "2-torch")):
        assert (line["who"], line["memory_format"]) == (f"trainer-{who}", "channels-last")
        assert float(line["images_per_s"]) > 0 and line["turns"] == "2"
        ratio, rest = line["note"].split(" ", 1)
        assert float(ratio) > 0 and rest.startswith(f"of the speed of level-{who} in turns")


def test_a_trainer_that_breaks_says_why(tmp_path, monkeypatch):
    path = tmp_path / "trainer.csv"
    monkeypatch.setattr(train, "create_trainer", lambda *_: 1 / 0)
    flags = ["--only", "level-0/fp32/channels", "--precision", "single", "--csv", str(path)]
    assert benchmark.main(["--trainer", *flags, *QUICK]) == 0
    bare, trained = csv.DictReader(path.open())
    assert (bare["note"], trained["note"]) == ("none", "division by zero")
    assert trained["images_per_s"] == "not run"


def test_depths_are_measured_one_by_one_and_the_growth_is_fitted(tmp_path, capsys):
    path = tmp_path / "depths.csv"
    flags = [flag for flag in QUICK if flag not in ("--depth", "10")]
    flags += ["--only", "level-0/fp32,level-3", "--precision", "single", "--csv", str(path)]
    assert benchmark.main([*flags, "--depths", "10,22,34"]) == 0
    lines = list(csv.DictReader(path.open()))
    assert [line["depth"] for line in lines] == ["10", "10", "22", "22", "34", "34"]
    exponents = {line["who"]: float(line["held_exponent"]) for line in lines}
    assert exponents["level-3-torch"] < 1.2 < exponents["level-0"]
    assert "doubling the depth multiplies" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("who", ["level-0", "level-2-torch", "level-3-triton"])
def test_a_captured_step_trains_as_the_eager_one(who):
    device = torch.device("cuda", 0)
    opt = settings(TINY.replace("--nGPU 0", "--LR 0.01"))
    weights = {}
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for mode in ("eager", "graph"):
            entry = measure.Case(who, "fp32", "channels-last", mode)
            trained = measure.Runner(entry, opt, 10, device)
            if mode == "graph":
                trained.capture(torch.cuda.graph_pool_handle())
            else:
                for _ in range(cuda_graph.WARMUP_STEPS):
                    trained.run()
            for _ in range(2):
                trained.run()
            weights[mode] = {
                name: value.clone() for name, value in trained.network.named_parameters()
            }
    for name, want in weights["eager"].items():
        torch.testing.assert_close(weights["graph"][name], want, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_every_mode_is_measured_with_its_memory(tmp_path):
    path = tmp_path / "gpu.csv"
    flags = "--depth 10 --growthRate 4 --imageSize 8 --batchSize 4 --precision bf16 --warmUp 1"
    only = ["--turns", "2", "--only", "level-2,torchvision/bf16*compiled"]
    assert benchmark.main([*flags.split(), *only, "--csv", str(path)]) == 0
    for line in csv.DictReader(path.open()):
        assert line["note"] == "none" and float(line["peak_mb"]) > 0, line
