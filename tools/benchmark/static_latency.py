"""Follow one warp through machine code and say how long it takes where it is alone."""

import re
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from typing import NamedTuple

from tools.benchmark.sass import Code, Instruction

REPEATS = 4  # of a block in a row that are followed; the others take as long as the last


class Pace(NamedTuple):
    """Hold cycles that are assumed: see static_model.Assumptions."""

    instruction: float
    load: float  # from a load of global memory to its use
    barrier: float


class _Event(NamedTuple):
    """Describe an instruction that waits, or that others wait for."""

    index: int  # in its block
    reads: tuple[str, ...]  # of what loads write
    writes: tuple[str, ...]
    instruction: Instruction


def lone_warp_cycles(code: Code, trace: Iterable[int], pace: Pace) -> float:
    """Return the cycles from the first to the last instruction of a way through the code."""
    warp = _Warp(code, pace)
    for number, blocks in groupby(trace):
        count = sum(1 for _ in blocks)
        followed = min(count, REPEATS)
        before = warp.time
        for _ in range(followed):
            before = warp.time
            warp.execute(number)
        warp.skip((count - followed) * (warp.time - before))
    return warp.time


class _Warp:
    """Hold the time of a warp, and when what it has loaded will be there."""

    def __init__(self, code: Code, pace: Pace):
        self.code, self.pace, self.time = code, pace, 0.0
        self.ready: dict[str, float] = {}  # by register
        self.copies, self.groups = 0.0, []  # asynchronous copies: those open, and groups of them

    def skip(self, cycles: float) -> None:
        """Let time pass in which all goes on as before."""
        self.time += cycles
        self.ready = {name: time + cycles for name, time in self.ready.items()}
        self.groups = [time + cycles for time in self.groups]

    def execute(self, number: int) -> None:
        """Execute a block."""
        start, pace = self.time, self.pace
        size = len(self.code.blocks[number].instructions)
        done = 0
        for event in _events(self.code)[number]:
            self.time += (event.index - done) * pace.instruction
            done = event.index
            self._wait(event)
        self.time += (size - done) * pace.instruction
        assert self.time >= start

    def _wait(self, event: _Event) -> None:
        name = event.instruction.name
        for register in event.reads:
            self.time = max(self.time, self.ready.pop(register, 0.0))
        for register in event.writes:
            self.ready.pop(register, None)
        if name == "LDG":
            self.ready |= dict.fromkeys(event.writes, self.time + self.pace.load)
        elif name == "LDGSTS":
            self.copies = self.time + self.pace.load
        elif name == "LDGDEPBAR":
            self.groups.append(self.copies)
            self.copies = 0.0
        elif name == "DEPBAR":
            left = int(event.instruction.operands[1], 16)
            while len(self.groups) > left:
                self.time = max(self.time, self.groups.pop(0))
        elif name == "BAR":
            self.time += self.pace.barrier


@cache
def _events(code: Code) -> list[list[_Event]]:
    """Return the instructions of each block that wait or are waited for."""
    loaded = {name for block in code.blocks for instruction in block.instructions
              if instruction.name == "LDG" for name in instruction.writes}  # fmt: skip
    found = []
    for block in code.blocks:
        events = []
        for index, instruction in enumerate(block.instructions):
            reads = tuple(name for name in instruction.reads if name in loaded)
            writes = tuple(name for name in instruction.writes if name in loaded)
            waits = instruction.op.startswith("DEPBAR.LE") and "SB0" in instruction.operands
            if reads or writes or waits or re.match(r"LDG|BAR\b", instruction.name):
                events.append(_Event(index, reads, writes, instruction))
        found.append(events)
    return found
