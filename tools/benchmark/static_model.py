"""Model the time of a recorded training step on a GPU: a prediction, not a measurement.

ASSUMPTIONS holds all that is assumed and not counted, in one place; the legend prints it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kernels.tiling import Gpu
from kernels.triton_launches import Launch, Variant
from tools.benchmark import sass
from tools.benchmark.sass_walk import PARAMETERS_AT, Path, executed, walk
from tools.benchmark.static_code import Binary
from tools.benchmark.static_latency import Pace, lone_warp_cycles
from tools.benchmark.static_step import Step


@dataclass(frozen=True)
class Device:
    """Describe a GPU. Bandwidths are what a large copy reaches, 84 to 90 % of the data sheet's."""

    name: str
    multiprocessors: int
    clock_ghz: float
    l2_mb: float
    shared_kb: int  # of a multiprocessor
    warps: int  # of a multiprocessor, at most
    memory_tb_s: float
    l2_tb_s: float

    def as_gpu(self, architecture: int) -> Gpu:
        """Return what the choice of launches depends on."""
        return Gpu(divmod(architecture, 10), self.multiprocessors)


DEVICES = {
    80: Device("A100", 108, 1.41, 40, 164, 64, 1.7, 3.5),
    90: Device("H200", 132, 1.75, 50, 228, 64, 4.3, 6.0),
    100: Device("B200", 148, 1.85, 126, 228, 64, 6.9, 9.0),
    120: Device("RTX 5090", 170, 2.4, 96, 100, 48, 1.6, 5.0),
}


@dataclass(frozen=True)
class Assumptions:
    """Hold what the model assumes. No kernel has a number of its own."""

    gap_us: float = 1.3  # between two kernels of a CUDA graph
    hidden_gap_us: float = 0.8  # of it, before a programmatic dependent launch (9.0 and later)
    issue_share: float = 0.7  # of 4 instructions a cycle and multiprocessor
    # The next three were chosen with a review's times of five steps of commit cd80cb8 in view. It
    # has 700 cycles for loads of maps outside of L2; here all have the same.
    load_cycles: float = 450  # from a load, or the end of a group of copies, to its use
    cycles_per_instruction: float = 2.0  # of a warp that is alone
    barrier_cycles: float = 25
    other_launches: int = 135  # of a step, that are not Triton's
    other_launch_us: float = 1.3  # each, besides the gap and the bytes


ASSUMPTIONS = Assumptions()
STEP, OTHERS = "step", "other launches"  # rows beside those of kernels
# Of each function `finish_...`, which programs run that come last at a counter: their share of all.
FINISHING: dict[str, Callable[[Launch], float]] = {}
for _what in ("stats", "norm_grads", "weight_grad"):
    FINISHING[f"finish_{_what}"] = lambda launch: 1 / launch.arguments["num_splits"]
    FINISHING[f"finish_group_{_what}"] = lambda launch: (
        launch.arguments["num_groups"] / launch.arguments["num_splits"]
    )


def legend() -> str:
    """Say what the columns mean, and all that the model assumes."""
    given = ASSUMPTIONS
    devices = "\n".join(f"  {key / 10:.1f} {', '.join(f'{k} {v}' for k, v in vars(d).items())}"
                        for key, d in DEVICES.items())  # fmt: skip
    return f"""
A MODEL, NOT A MEASUREMENT: nothing of this has run on a GPU.
Counted          launches; bytes of all tensors that a launch reads or writes, each element once;
                 operations of products without padding; instructions that warps issue, in
                 millions, from machine code walked with the launch's arguments; registers of a
                 thread, bytes of shared memory and spilled bytes (the most of a kernel's variants);
                 programs that a multiprocessor holds (the fewest); matrix instructions
modelled_us      sum over launches of gap + the largest of bytes, issue and latency, + the programs
                 that come last at a counter; bytes_us, issue_us, latency_us: their sums
without_pdl      the same if programmatic dependent launches hid nothing: what lies between the two
                 rests on this assumption alone
images_per_s     of the step; what the loader must deliver: python -m tools.describe
                 --imagesPerSecond N says how many cores prepare them
Assumed          gap {given.gap_us} us, of which a dependent launch hides {given.hidden_gap_us};
                 issue at {given.issue_share:.0%} of 4 instructions a cycle and multiprocessor;
                 latency: {given.cycles_per_instruction} cycles an instruction of a lone warp,
                 {given.load_cycles} from a load to its use, {given.barrier_cycles} a barrier, times
                 rounds of programs; {given.other_launches} other launches of
                 {given.other_launch_us} us each, their gaps and bytes;
                 bytes at the bandwidth of memory, or of L2 where a block's X and G fit
GPUs assumed (bandwidths: the H200's are of a source, others from memory of data sheets):
{devices}"""


class LaunchCounts:
    """Count what a launch does: facts of its machine code and arguments."""

    def __init__(self, launch: Launch, binary: Binary, architecture: int):
        self.launch, self.binary, self.architecture = launch, binary, architecture

    @cached_property
    def paths(self) -> list[Path]:
        """Return the ways of all warps through the code."""
        launch = self.launch
        words = parameter_words(launch, PARAMETERS_AT[self.architecture])
        combines = "num_splits" in launch.arguments
        finishing = {name: share(launch) for name, share in FINISHING.items() if combines}
        return walk(self.binary.code, launch.grid, launch.variant.warps, words.get, finishing)

    @property
    def programs(self) -> int:
        """Return the number of programs."""
        return math.prod(self.launch.grid)

    @cached_property
    def instructions(self) -> float:
        """Return the instructions that all warps issue."""
        blocks, warps = self.binary.code.blocks, executed(self.paths)
        return sum(count * len(blocks[number].instructions) for number, count in warps.items())

    @cached_property
    def bytes(self) -> int:
        """Return the bytes of all tensors read, and of all written: each element once."""
        total = 0
        for names in (self.binary.loads, self.binary.stores):
            for name in names - {"counters"}:  # of which a launch uses few
                x = self.launch.arguments[name]
                total += x.numel() * x.element_size()
        return total

    @property
    def matrix_instructions(self) -> set[str]:
        """Return the kinds of matrix instructions in the code."""
        return {
            kind
            for kind, pattern in sass.MATRIX_INSTRUCTIONS.items()
            if any(re.fullmatch(pattern, each.name) for each in self._all_instructions)
        }

    @property
    def is_dependent(self) -> bool:
        """Return whether it may start before the kernel before it ends: its code waits for that."""
        return any(each.name == "ACQBULK" for each in self._all_instructions)

    @property
    def _all_instructions(self) -> Iterator[sass.Instruction]:
        return (each for block in self.binary.code.blocks for each in block.instructions)

    @cached_property
    def resident(self) -> int:
        """Return how many programs a multiprocessor holds at once."""
        device, warps = DEVICES[self.architecture], self.launch.variant.warps
        registers = math.ceil(self.binary.registers * 32 / 256) * 256 * warps
        shared = self.binary.shared_bytes + 1024  # and what the system keeps
        limits = (65536 // registers, device.shared_kb * 1024 // shared, device.warps // warps, 32)
        return max(1, min(limits))


def parameter_words(launch: Launch, start: int) -> dict[int, int]:
    """Return the 32-bit words of a launch's integer arguments by their offset in the bank."""
    words, offset = {}, start
    for parameter in launch.variant.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            continue
        size = 8 if isinstance(value, Tensor) else 4
        offset = -(-offset // size) * size
        if isinstance(value, int):
            words[offset] = value & 0xFFFFFFFF
        offset += size
    return words


def _as_row(kernel: str, times: Sequence["LaunchTime"]) -> dict[str, object]:
    """Sum up launches in a row of static.COLUMNS."""
    counts = [time.counts for time in times]
    kinds = set().union(*(each.matrix_instructions for each in counts))
    return {
        "kernel": kernel,
        "launches": len(times),
        "mbytes": sum(each.bytes for each in counts) / 1e6,
        "gflop": sum(flop(each.launch) for each in counts) / 1e9,
        "instructions_m": sum(each.instructions for each in counts) / 1e6,
        "registers": max(each.binary.registers for each in counts),
        "shared_bytes": max(each.binary.shared_bytes for each in counts),
        "spilled_bytes": max(each.binary.spilled_bytes for each in counts),
        "resident_programs": min(each.resident for each in counts),
        "matrix": "+".join(sorted(kinds)) or "none",
        "bytes_us": sum(time.bytes_us for time in times),
        "issue_us": sum(time.issue_us for time in times),
        "latency_us": sum(time.latency_us for time in times),
        "modelled_us": sum(time.us() for time in times),
        "modelled_us_without_pdl": sum(time.us(with_pdl=False) for time in times),
    }


def step_rows(
    step: Step, binaries: Mapping[tuple[Variant, int], Binary], architecture: int, batch_size: int
) -> list[dict[str, object]]:
    """Return a row for each kernel of a step, its other launches, and the whole.

    Raises:
        UnknownTripsError: the trips of a loop cannot be known.
    """
    counts = [LaunchCounts(launch, binaries[launch.variant, architecture], architecture)
              for launch in step.launches]  # fmt: skip
    times = model_launches(counts, architecture)
    groups: dict[str, list[LaunchTime]] = {}
    for time in times:
        groups.setdefault(time.counts.launch.name, []).append(time)
    rows = [_as_row(name, group) for name, group in groups.items()]
    rows.sort(key=lambda row: -row["modelled_us"])
    others = other_us(step.other_bytes, architecture)
    both = ("modelled_us", "modelled_us_without_pdl")
    rows.append({"kernel": OTHERS, "launches": ASSUMPTIONS.other_launches,
                 "mbytes": step.other_bytes / 1e6, **dict.fromkeys(both, others)})  # fmt: skip
    whole = _as_row(STEP, times)
    whole |= {name: whole[name] + others for name in both}
    rows = [*rows, {**whole, "images_per_s": batch_size / whole["modelled_us"] * 1e6}]
    return [row | {"gpu": DEVICES[architecture].name} for row in rows]


def flop(launch: Launch) -> int:
    """Return the operations of a launch's matrix products, without padding."""
    if "weight_f" not in launch.arguments:
        return 0
    given = launch.arguments
    products = 2 if launch.name == "conv1x1_backward" else 1
    outputs = given["out_channels"]
    part = min(given["OUT_CHANNELS"], outputs - given["first_out_channel"]) / outputs if (
        "first_out_channel" in given) else 1  # fmt: skip
    return int(2 * products * given["num_rows"] * given["weight"].numel() * part)


class LaunchTime:
    """Model the microseconds of a launch, from the end of the kernel before it to its own end."""

    def __init__(self, counts: LaunchCounts, fits_l2: bool):
        self.counts, self.fits_l2 = counts, fits_l2
        self.device = DEVICES[counts.architecture]

    @property
    def bytes_us(self) -> float:
        """Return what moving its bytes takes."""
        rate = self.device.l2_tb_s if self.fits_l2 else self.device.memory_tb_s
        return self.counts.bytes / rate / 1e6

    @property
    def issue_us(self) -> float:
        """Return what issuing its instructions takes, on all multiprocessors."""
        slots = 4 * self.device.multiprocessors * self.device.clock_ghz * 1e3
        return self.counts.instructions / (slots * ASSUMPTIONS.issue_share)

    @cached_property
    def _cycles(self) -> list[float]:
        given = ASSUMPTIONS
        pace = Pace(given.cycles_per_instruction, given.load_cycles, given.barrier_cycles)
        code = self.counts.binary.code
        return [lone_warp_cycles(code, path.trace, pace) for path in self.counts.paths]

    @property
    def latency_us(self) -> float:
        """Return what its rounds of programs take, each as long as the longest of its warps."""
        paths = zip(self.counts.paths, self._cycles, strict=True)
        longest = max(cycles for path, cycles in paths if not path.finishes)
        at_once = self.device.multiprocessors * self.counts.resident
        rounds = math.ceil(self.counts.programs / at_once)
        return rounds * longest / (self.device.clock_ghz * 1e3)

    @property
    def tail_us(self) -> float:
        """Return what the programs that come last take, after all others."""
        paths = list(zip(self.counts.paths, self._cycles, strict=True))
        usual = max(cycles for path, cycles in paths if not path.finishes)
        last = max((cycles for path, cycles in paths if path.finishes), default=usual)
        return max(0.0, last - usual) / (self.device.clock_ghz * 1e3)

    def us(self, with_pdl: bool = True) -> float:
        """Return the sum.

        Args:
            with_pdl: let programmatic dependent launches hide a part of the gap.
        """
        gap = ASSUMPTIONS.gap_us
        if with_pdl and self.counts.is_dependent:
            gap -= ASSUMPTIONS.hidden_gap_us
        return gap + max(self.bytes_us, self.issue_us, self.latency_us) + self.tail_us


def model_launches(counts: Sequence[LaunchCounts], architecture: int) -> list[LaunchTime]:
    """Model each launch of a step."""
    # X and G of a dense block: the largest maps among the launches with as many rows.
    largest: dict[int, int] = {}
    for each in counts:
        given = each.launch.arguments
        for name in ("value", "target", "grad"):
            if isinstance(given.get(name), Tensor):
                size = given[name].untyped_storage().nbytes()
                rows = given.get("num_rows")
                largest[rows] = max(largest.get(rows, 0), size)
    limit = DEVICES[architecture].l2_mb * 1e6
    return [LaunchTime(each, 2 * largest.get(each.launch.arguments.get("num_rows"), 0) <= limit)
            for each in counts]  # fmt: skip


def other_us(num_bytes: int, architecture: int) -> float:
    """Return the microseconds of the launches of a step that are not Triton's.

    Args:
        num_bytes: that they move.
    """
    each = ASSUMPTIONS.gap_us + ASSUMPTIONS.other_launch_us
    moved = num_bytes / DEVICES[architecture].memory_tb_s / 1e6
    return ASSUMPTIONS.other_launches * each + moved
