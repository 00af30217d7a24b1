"""Count how often a launch executes each instruction: walk its machine code with its arguments.

All warps start at the entry, and those that branch alike are walked together. Values that decide
branches (program indices, arguments and what is computed of them) are known; where one is not

- waiting for another part of the chip ends at once;
- code of a function `finish_...` is for the programs that come last, as `finishing` says;
- code that divides or takes roots of denormal numbers, or reports a fault, is not entered;
- of the two sides of another branch the longer one is taken, if no loop depends on it;
- an unknown number of trips through a loop is an error.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy

from tools.benchmark.sass import WAITS, Block, Code, function_of, predicates
from tools.benchmark.sass_values import Value, evaluate, predicate

MAX_STEPS = 200_000
END = -1
# Where parameters begin in constant bank 0.
PARAMETERS_AT = {80: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}


class UnknownTripsError(Exception):
    """The trips of a loop, or who enters a branch with one, cannot be known."""


@dataclass
class Path:
    """Hold warps that have gone the same way."""

    values: dict[str, Value]
    warps: float  # how many
    share: float = 1.0  # of the programs, by what `finishing` says of the branches behind it
    finishes: bool = False  # for other programs
    block: int = 0
    trace: list[int] = field(default_factory=list)  # numbers of the blocks executed


def walk(
    code: Code,
    grid: tuple[int, ...],
    warps: int,
    constant: Callable[[int], int | None],
    finishing: Mapping[str, float] | None = None,
) -> list[Path]:
    """Return the ways through the code, each with the number of warps that took it.

    Args:
        constant: returns 32 bits of constant bank 0 at an offset in bytes, or None.
        finishing: by function name, the share of the programs that run it.

    Raises:
        UnknownTripsError: names the kernel, the file and the line.
    """
    shape = (*grid, 1, 1)[:3]
    programs = shape[0] * shape[1] * shape[2]
    index = numpy.repeat(numpy.arange(programs, dtype=numpy.int64), warps)
    values: dict[str, Value] = {
        "SR_TID.X": numpy.tile(numpy.arange(warps, dtype=numpy.int64) * 32, programs),
        "SR_CTAID.X": index % shape[0],
        "SR_CTAID.Y": index // shape[0] % shape[1],
        "SR_CTAID.Z": index // (shape[0] * shape[1]),
    }
    for name in ("SR_TID.Y", "SR_TID.Z"):
        values[name] = 0
    for axis, name in enumerate(("SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z")):
        if shape[axis] == 1:
            values[name] = 0
    if warps == 1:
        values["SR_TID.X"] = 0
    done, open_paths = [], [Path(values, programs * warps)]
    while open_paths:
        path = open_paths.pop()
        for _ in range(MAX_STEPS):
            if path.block == END:
                done.append(path)
                break
            following = _step(code, path, constant, finishing or {})
            path, others = following[0], following[1:]
            open_paths += others
        else:
            raise UnknownTripsError(f"{code.name}: more than {MAX_STEPS} blocks on one way")
    return done


def executed(paths: list[Path]) -> Counter:
    """Return how many warps, all together, execute each block."""
    found: Counter = Counter()
    for path in paths:
        for block, count in Counter(path.trace).items():
            found[block] += path.warps * count
    return found


def _step(code: Code, path: Path, constant: Callable, finishing: Mapping) -> list[Path]:
    """Execute a block; return the path, and others that part from it at the block's end."""
    block = code.blocks[path.block]
    path.trace.append(block.number)
    for index in code.control[block.number]:
        evaluate(block.instructions[index], path.values, constant)
    last = block.instructions[-1]
    if last.name not in ("BRA", "EXIT", "RET") or block.following is None:
        path.block = END if last.name in ("EXIT", "RET") else _number(block)
        return [path]
    if ".DIV" in last.op:  # for threads that have parted, which these have not
        path.block = block.following
        return [path]
    taken: Value = True if last.guard is None else predicate(last.guard, path.values)
    for text in predicates(last):
        other = predicate(text, path.values)
        taken = None if taken is None or other is None else taken & other
    away = END if block.target is None else block.target
    if taken is None:
        return _unknown(code, path, block, away, finishing)
    if isinstance(taken, numpy.ndarray):
        count = int(taken.sum())
        if 0 < count < len(taken):
            return [_part(path, taken, away), _part(path, ~taken, block.following)]
        taken = count > 0
    path.block = away if taken else block.following
    return [path]


def _number(block: Block) -> int:
    following = block.target if block.target is not None else block.following
    return END if following is None else following


def _part(path: Path, chosen: numpy.ndarray, block: int) -> Path:
    """Return the warps of a path that are chosen, at their next block."""
    values = {
        name: value[chosen] if isinstance(value, numpy.ndarray) else value
        for name, value in path.values.items()
    }
    warps = path.warps * float(chosen.sum()) / len(chosen)
    return Path(values, warps, path.share, path.finishes, block, [*path.trace])


def _unknown(code: Code, path: Path, block: Block, away: int, finishing: Mapping) -> list[Path]:
    """Choose where to go at a branch whose condition is unknown."""
    sides = [away, block.following]
    # Leave a loop that waits.
    for loop in code.loops:
        if block.number in loop and sum(side in loop for side in sides) == 1:
            waits = any(i.op.startswith(WAITS) for n in loop for i in code.blocks[n].instructions)
            if not waits:
                raise UnknownTripsError(_where(code, block, "trips through the loop"))
            path.block = next(side for side in sides if side not in loop)
            return [path]
    reach = [code.reachable(None if side == END else side) for side in sides]
    only = [reach[0] - reach[1], reach[1] - reach[0]]
    names = [{function_of(i) for n in side for i in code.blocks[n].instructions} for side in only]
    for side in (0, 1):
        shares = [finishing[name] for name in names[side] if name in finishing]
        unknown = [n for n in names[side] if n.startswith("finish_") and n not in finishing]
        if unknown:
            raise UnknownTripsError(_where(code, block, f"the programs that run {unknown[0]}"))
        if shares:
            share = max(shares)
            each = path.warps / path.share
            some = Path(dict(path.values), each * share, share, True, sides[side], [*path.trace])
            path.block, path.warps = sides[1 - side], path.warps - some.warps
            path.share -= share
            return [path, some] if path.warps > 0 else [some]
    path.block = sides[_longer(code, block, only)]
    return [path]


def _longer(code: Code, block: Block, only: list[frozenset[int]]) -> int:
    """Return the side (0 or 1) with more instructions that is no fault and no slow path."""
    sizes = []
    for side in only:
        found = [i for n in side for i in code.blocks[n].instructions]
        rare = any(i.name in ("CALL", "BPT") for i in found)
        sizes.append(-1 if rare else len(found))
    has_loop = any(loop <= side for loop in code.loops for side in only)
    if has_loop and (block.target is None or min(sizes) >= 0):
        raise UnknownTripsError(_where(code, block, "whether a loop is entered"))
    return sizes.index(max(sizes))


def _where(code: Code, block: Block, what: str) -> str:
    last = block.instructions[-1]
    return f"{code.name}, {last.file} line {last.line}: {what} cannot be known"
