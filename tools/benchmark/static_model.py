"""Model the time of a recorded training step on a GPU: a prediction, not a measurement.

ASSUMPTIONS holds all that is assumed and not counted, in one place; the legend prints it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kernels.triton_launches import Launch
from tools.benchmark import sass
from tools.benchmark.sass_walk import PARAMETERS_AT, Path, executed, walk
from tools.benchmark.static_code import Binary
from tools.benchmark.static_latency import Pace, lone_warp_cycles


@dataclass(frozen=True)
class Device:
    """Describe a GPU: the first four from data sheets, bandwidths of a large copy."""

    name: str
    multiprocessors: int
    clock_ghz: float
    l2_mb: float
    shared_kb: int  # of a multiprocessor
    warps: int  # of a multiprocessor, at most
    memory_tb_s: float  # that a large copy reaches
    l2_tb_s: float  # the same, in L2


DEVICES = {
    80: Device("A100", 108, 1.41, 40, 164, 64, 1.7, 3.5),
    90: Device("H200", 132, 1.75, 50, 228, 64, 4.3, 6.0),
    100: Device("B200", 148, 1.85, 126, 228, 64, 6.9, 9.0),
    120: Device("RTX 5090", 170, 2.4, 96, 100, 48, 1.6, 5.0),
}


@dataclass(frozen=True)
class Assumptions:
    """Hold what the model assumes."""

    gap_us: float = 1.3  # between two kernels of a CUDA graph
    hidden_gap_us: float = 0.8  # of it, by a programmatic dependent launch
    issue_share: float = 0.7  # of 4 instructions a cycle and multiprocessor
    load_cycles: float = 700  # a load that nothing hides
    cached_load_cycles: float = 450  # the same, where X and G fit in L2
    cycles_per_instruction: float = 2.0  # of a lone warp
    barrier_cycles: float = 25
    other_launches: int = 135  # of a step, that are not Triton's
    other_launch_us: float = 1.3  # each, besides the gap and the bytes


ASSUMPTIONS = Assumptions()


class LaunchCounts:
    """Count what a launch does: facts of its machine code and arguments."""

    def __init__(self, launch: Launch, binary: Binary, architecture: int):
        self.launch, self.binary, self.architecture = launch, binary, architecture

    @cached_property
    def paths(self) -> list[Path]:
        """Return the ways of all warps through the code."""
        constants = parameter_words(self.launch, PARAMETERS_AT[self.architecture])
        return walk(self.binary.code, self.launch.grid, self.launch.variant.warps, constants.get)

    @property
    def programs(self) -> int:
        """Return the number of programs."""
        return math.prod(self.launch.grid)

    @cached_property
    def instructions(self) -> float:
        """Return the instructions that all warps issue."""
        blocks = self.binary.code.blocks
        return sum(n * len(blocks[number].instructions) for number, n in executed(self.paths).items())

    @cached_property
    def bytes(self) -> int:
        """Return the bytes of all tensors read, and of all written: each element once."""
        total = 0
        for names in (self.binary.loads, self.binary.stores):
            for name in names:
                x = self.launch.arguments[name]
                total += x.numel() * x.element_size()
        return total

    @property
    def matrix_instructions(self) -> set[str]:
        """Return the kinds of matrix instructions in the code."""
        return {
            kind
            for kind, pattern in sass.MATRIX_INSTRUCTIONS.items()
            for block in self.binary.code.blocks
            for instruction in block.instructions
            if sass.re.fullmatch(pattern, instruction.name)
        }

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
        load = ASSUMPTIONS.cached_load_cycles if self.fits_l2 else ASSUMPTIONS.load_cycles
        pace = Pace(ASSUMPTIONS.cycles_per_instruction, load, ASSUMPTIONS.barrier_cycles)
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

    @property
    def is_dependent(self) -> bool:
        """Return whether it may start before the kernel before it ends."""
        return self.counts.launch.variant.dependent and self.counts.architecture >= 90

    def us(self, with_pdl: bool = True) -> float:
        """Return the sum.

        Args:
            with_pdl: let programmatic dependent launches hide a part of the gap.
        """
        gap = ASSUMPTIONS.gap_us
        if with_pdl and self.is_dependent:
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
    return [LaunchTime(each, 2 * largest[each.launch.arguments["num_rows"]] <= limit)
            for each in counts]  # fmt: skip


def other_us(num_bytes: int, architecture: int) -> float:
    """Return the microseconds of the launches of a step that are not Triton's.

    Args:
        num_bytes: that they move.
    """
    each = ASSUMPTIONS.gap_us + ASSUMPTIONS.other_launch_us
    moved = num_bytes / DEVICES[architecture].memory_tb_s / 1e6
    return ASSUMPTIONS.other_launches * each + moved
