"""Test what `python -m tools.benchmark --static` counts and models."""

import csv
import inspect
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import opts
from tools.benchmark import __main__ as benchmark

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the kernels of this process are interpreted", allow_module_level=True)
import triton.language as tl  # noqa: E402

from kernels import triton_launches  # noqa: E402
from kernels.tiling import Gpu, Tile  # noqa: E402
from kernels.triton_common import kernel  # noqa: E402
from tools import describe  # noqa: E402
from tools.benchmark import sass, static, static_code, static_model, static_step  # noqa: E402
from tools.benchmark.sass_walk import UnknownTripsError, executed, walk  # noqa: E402
from tools.benchmark.static_latency import Pace, lone_warp_cycles  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
        yield


# Kernels with one load of global memory in each trip, by one warp. `partial` keeps them alive.
@kernel
def nested(value, partial, n, m, BLOCK: tl.constexpr):
    lane, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for i in range(n):
        for j in range(0, m, 3):
            total = total * 0.5 + tl.load(value + (i * m + j) * 64 + lane)
    tl.store(partial + tl.program_id(0) * BLOCK + lane, total)


@kernel
def unrolled(value, partial, n, m, BLOCK: tl.constexpr):
    lane, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, n, loop_unroll_factor=4):
        total = total * 0.5 + tl.load(value + i * 64 + lane)
    for j in tl.static_range(5):
        total = total * 0.5 + tl.load(value + (m + j) * 64 + lane)
    tl.store(partial + tl.program_id(0) * BLOCK + lane, total)


@kernel
def pipelined(value, partial, n, m, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in tl.range(0, n, num_stages=3):
        x = tl.load(value + (i * BLOCK + row) * BLOCK + column).to(tl.float16)
        total = tl.dot(x, x, total)
    tl.store(partial + (tl.program_id(0) + row) * BLOCK + column + m, total)


@kernel
def guarded(value, partial, n, m, BLOCK: tl.constexpr):
    lane, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    if tl.program_id(0) < m:
        for i in range(n):
            total = total * 0.5 + tl.load(value + i * 64 + lane)
    tl.store(partial + tl.program_id(0) * BLOCK + lane, total)


@kernel
def split(value, partial, n, m, BLOCK: tl.constexpr):
    lane, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * m
    for i in range(first, tl.minimum(first + m, n)):
        total = total * 0.5 + tl.load(value + i * 64 + lane)
    tl.store(partial + tl.program_id(0) * BLOCK + lane, total)


@triton.jit
def finish_sum(value, partial, n, lane, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(n):
        total = total * 0.5 + tl.load(value + i * 64 + lane)
    tl.store(partial + lane, total)


@kernel
def finishing(value, partial, n, m, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(partial + (1 + tl.program_id(0)) * BLOCK + lane, tl.load(value + lane))
    last = tl.atomic_add(partial + m, 1.0) == tl.num_programs(0) - 1
    if last:
        finish_sum(value, partial, n, lane, BLOCK)


@kernel
def finishing_groups(value, partial, n, m, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(partial + (1 + tl.program_id(0)) * BLOCK + lane, tl.load(value + lane))
    if tl.atomic_add(partial + tl.program_id(0) // 4, 1.0) == 3:
        finish_sum(value, partial, n, lane, BLOCK)
        if tl.atomic_add(partial + m, 1.0) == 1:
            finish_all(value, partial, m, lane, BLOCK)


@triton.jit
def finish_all(value, partial, n, lane, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(n):
        total = total * 0.25 + tl.load(value + i * 64 + lane)
    tl.store(partial + lane, total)


@kernel
def unknown(value, partial, n, m, BLOCK: tl.constexpr):
    lane, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for i in range(n, tl.load(value + m).to(tl.int32)):
        total = total * 0.5 + tl.load(value + i * 64 + lane)
    tl.store(partial + tl.program_id(0) * BLOCK + lane, total)


def launch(function, programs: int, n: int, m: int, block: int = 32) -> triton_launches.Launch:
    arguments = {"value": torch.empty(1, device="meta"), "partial": torch.empty(1, device="meta")}
    tile = Tile({"BLOCK": block}, warps=1)
    return triton_launches.as_launch(function, (programs,), tile, **arguments, n=n, m=m)


def count(name: str, given: triton_launches.Launch, architecture: int, shares=None) -> int:
    """Count the warps that execute an instruction without a guard, in all programs together.

    A guarded one that has no effect takes its turn as well, where a loop is entered unrolled.
    """
    text, *_ = static_code.describe(given.variant.compiled(architecture))
    code = sass.parse(text, given.name)
    words = static_model.parameter_words(given, static_model.PARAMETERS_AT[architecture])
    times = executed(walk(code, given.grid, given.variant.warps, words.get, shares))
    found = Counter()
    for number, warps in times.items():
        for instruction in code.blocks[number].instructions:
            found[instruction.name] += 0 if instruction.guard else warps
    return found[name]


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize(
    ("function", "n", "m", "loads"),
    [
        (nested, 5, 7, 7 * 5 * 3),  # 7 programs; ceil(7 / 3) trips of the inner loop
        (nested, 5, 0, 0),
        (unrolled, 10, 3, 7 * (10 + 5)),
        (guarded, 9, 4, 4 * 9),  # 4 of the 7 programs
        (split, 50, 8, 50),  # the last program has 2 of the 50 rows, the others 8
        (split, 3, 8, 3),
    ],
)
def test_every_trip_of_a_loop_is_counted_once(function, n, m, loads, architecture):
    assert count("LDG", launch(function, 7, n, m), architecture) == loads


@pytest.mark.parametrize("trips", [0, 1, 2, 3, 9])
def test_a_pipelined_loop_multiplies_once_a_trip(trips):
    each = count("HMMA", launch(pipelined, 1, 1, 0), 80)
    assert each > 0
    assert count("HMMA", launch(pipelined, 3, trips, 0), 80) == 3 * trips * each


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_work_of_the_last_program_is_counted_for_it_alone(architecture):
    given = launch(finishing, 8, 20, 0)
    assert count("LDG", given, architecture, {"finish_sum": 1 / 8}) == 8 + 20
    with pytest.raises(UnknownTripsError, match=r"finishing.*the programs that run finish_sum"):
        count("LDG", given, architecture)


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_the_work_of_the_last_programs_of_groups_is_counted_for_them_alone(architecture):
    shares = {"finish_sum": 2 / 8, "finish_all": 1 / 8}  # 8 programs, in 2 groups
    given = launch(finishing_groups, 8, 20, 9)
    assert count("LDG", given, architecture, shares) == 8 + 2 * 20 + 9


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_a_loop_of_unknown_length_is_an_error_with_kernel_and_line(architecture):
    first = inspect.getsourcelines(unknown.fn)[1]
    with pytest.raises(UnknownTripsError, match="cannot be known") as error:
        count("LDG", launch(unknown, 7, 0, 3), architecture)
    assert f"unknown, {__file__} line " in str(error.value)
    assert first < int(str(error.value).split("line ")[1].split(":")[0]) < first + 8


def test_a_launch_reads_and_writes_what_its_kernel_does():
    *_, loads, stores = static_code.describe(launch(finishing, 8, 20, 0).variant.compiled(90))
    assert (loads, stores) == ({"value", "partial"}, {"partial"})
    *_, loads, stores = static_code.describe(launch(nested, 8, 20, 0).variant.compiled(90))
    assert (loads, stores) == ({"value"}, {"partial"})


CODE = """.text.by_hand:
        /*0000*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0010*/                   LDG.E R3, desc[UR4][R4.64] ;
        /*0020*/                   IADD3 R6, R2, 0x1, RZ ;
        /*0030*/                   IADD3 R7, R3, 0x1, RZ ;
        /*0040*/                   BAR.SYNC 0x0 ;
        /*0050*/                   EXIT ;
"""


def test_a_lone_warp_waits_for_what_it_loads():
    code = sass.parse(CODE, "by_hand")
    # 2 and 4 cycles to the first use; it waits for the load at 0 until 100, the second for that
    # at 2 until 102, which is when it would be its turn; a barrier of 10; two more instructions.
    assert lone_warp_cycles(code, [0], Pace(2.0, 100.0, 10.0)) == 102 + 2 + 10 + 4


def test_the_time_of_a_launch_by_hand(monkeypatch):
    code = sass.parse(CODE, "by_hand")
    paths = walk(code, (1000,), 4, {}.get)
    variant = SimpleNamespace(warps=4)
    counts = SimpleNamespace(
        architecture=90, bytes=43_000_000, instructions=1000 * 4 * 6, programs=1000, resident=2,
        is_dependent=True, paths=paths, binary=SimpleNamespace(code=code),
        launch=SimpleNamespace(variant=variant),
    )  # fmt: skip
    time = static_model.LaunchTime(counts, fits_l2=False)
    assert time.bytes_us == pytest.approx(10)  # 43 MB at 4.3 TB/s
    assert time.issue_us == pytest.approx(24000 / (0.7 * 4 * 132 * 1750))
    assert time.latency_us == pytest.approx(4 * (450 + 4 + 25 + 4) / 1750)  # 1000 / 264: 4 rounds
    assert time.us() == pytest.approx(0.5 + 10)
    assert time.us(with_pdl=False) == pytest.approx(1.3 + 10)
    assert static_model.LaunchTime(counts, fits_l2=True).bytes_us == pytest.approx(43 / 6)
    assert sum(path.warps for path in paths) == 4000


def test_the_programs_that_a_multiprocessor_holds_by_hand():
    def resident(registers: int, shared: int, warps: int, architecture: int = 90) -> int:
        given = SimpleNamespace(variant=SimpleNamespace(warps=warps))
        binary = SimpleNamespace(registers=registers, shared_bytes=shared)
        return static_model.LaunchCounts(given, binary, architecture).resident

    assert resident(126, 16384, 8) == 2  # of 65,536 registers, 128 x 32 x 8 a program
    assert resident(171, 28 * 1024, 8) == 1
    assert resident(32, 49 * 1024, 4) == 4  # of 228 KB, 50 a program
    assert resident(32, 0, 4) == 16  # of 64 warps
    assert resident(32, 0, 4, architecture=120) == 12  # of 48


def test_the_products_of_the_forward_pass_are_those_of_the_layers():
    opt = opts.parse(["--dataset=synthetic", "--depth=16", "--batchSize=8", "--precision=bf16"])
    opt = opt.replace(nClasses=10)
    step = static_step.record_step(opt, Gpu((9, 0), 132))
    forward = [each for each in step.launches if "backward" not in each.name]
    layers = describe.list_layers(describe.build(opt), opt.imageSize)
    macs = sum(layer.macs for layer in layers if "denselayer" in layer.name)
    assert macs > 0
    assert sum(map(static_model.flop, forward)) == 2 * 8 * macs


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--turns 3", "turns: no effect with static"),
        ("--loader .", "loader: no effect with static"),
        ("--compile false", "compile: no effect with static"),
        ("--LR 0.2", "LR: no effect on what a step of level 2 launches"),
        ("--optMemory 3", "optMemory: no effect on what"),
        ("--netType resnet --depth 20", "netType: resnet has no kernels of its own"),
        ("--precision double", "precision: the kernels have no double"),
    ],
)
def test_a_flag_without_effect_on_the_model_is_refused(flags, line, capsys):
    assert benchmark.main(["--static", *flags.split()]) == 2
    assert f"error: {line}" in capsys.readouterr().err


def test_without_a_network_those_of_the_table_are_modelled():
    options, networks, _ = benchmark.parse(["--static"])
    assert options.static
    shapes = [(o.depth, o.batchSize, static.precision(o), o.imageSize) for o in networks]
    assert shapes == [(100, 64, "bf16", 32), (100, 512, "bf16", 32), (100, 64, "tf32", 32),
                      (100, 64, "single", 32), (121, 256, "bf16", 224)]  # fmt: skip


def test_a_run_prints_and_writes_every_kernel_and_calls_it_a_model(tmp_path, monkeypatch, capsys):
    # A few launches, for one architecture, are compiled in a moment.
    record, whole = static_step.record_step, []

    def record_some(opt, gpu) -> static_step.Step:
        whole.append(record(opt, gpu))
        return static_step.Step(whole[0].launches[:5], whole[0].other_bytes)

    monkeypatch.setattr(static_step, "record_step", record_some)
    monkeypatch.setattr(static, "ARCHITECTURES_MODELLED", (90,))
    path = tmp_path / "rows.csv"
    flags = f"--depth 10 --growthRate 12 --batchSize 4 --precision bf16 --csv {path}"
    assert benchmark.main(["--static", *flags.split()]) == 0
    out = capsys.readouterr().out
    assert "A MODEL, NOT A MEASUREMENT" in out
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert tuple(rows[0]) == static.COLUMNS
    *kernels, others, step = rows
    assert (others["kernel"], step["kernel"]) == (static_model.OTHERS, static_model.STEP)
    assert int(step["launches"]) == sum(int(row["launches"]) for row in kernels)
    for column in ("modelled_us", "modelled_us_without_pdl"):
        parts = sum(float(row[column]) for row in [*kernels, others])
        assert float(step[column]) == pytest.approx(parts, rel=1e-3)
    assert float(step["images_per_s"]) == pytest.approx(4e6 / float(step["modelled_us"]), rel=1e-3)
    assert {row["kernel"] for row in kernels} == {each.name for each in whole[0].launches[:5]}
    assert "wgmma" in {row["matrix"] for row in kernels}
