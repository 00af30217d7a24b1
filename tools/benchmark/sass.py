"""Read the machine code (SASS) that NVIDIA's disassembler prints, and find its structure.

Code is cut into basic blocks: a block is entered at its first instruction and left after its last.
"""

import ast
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

_LINE = re.compile(r'//## File "(?P<file>.*?)", line (?P<line>\d+)')
_LABEL = re.compile(r"(\.L_x_\d+):")
# Such as `/*0090*/ @!P0 IADD3 R1, R2, 0x1, RZ &wr=0x1 ;`: what follows & and ? is about timing.
_TEXT = re.compile(
    r"/\*[0-9a-f]+\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<op>[A-Z][\w.]*)\s*(?P<rest>.*?)\s*(?:[&?]\w+.*)?;"
)
_NO_TARGET = re.compile(
    r"U?(ST|RED|BAR|BRA|EXIT|DEPBAR|LDGSTS|LDGDEPBAR|BSSY|BSYNC|NOP|WARP|MEMBAR|FENCE|CALL|RET|CCTL"
    r"|ERRBAR|NANOSLEEP|BREAK|TCBAR|TCHMMA|TCCP|BPT|TMA|BLK)"
)
_REGISTER = re.compile(r"\bU?R\d+\b|\bU?P\d\b")
MATRIX_INSTRUCTIONS = {"mma": r"[HIDQ]MMA", "wgmma": r"[HIQ]GMMA", "tcgen05": r"UTC\w*MMA"}
WAITS = ("SYNCS.PHASECHK", "UTCATOMSWS", "NANOSLEEP")  # loops around them end at once, in a model


@dataclass(frozen=True, eq=False)
class Instruction:
    """Hold an instruction, such as `@!P0 IADD3.X R1, R2, c[0x0][0x210], RZ, P0`."""

    op: str  # with its modifiers: IADD3.X
    operands: tuple[str, ...]
    guard: str | None  # predicate without which it has no effect: !P0
    file: str
    line: int  # of the source file; 0 where unknown

    @property
    def name(self) -> str:
        """Return the operation without modifiers."""
        return self.op.partition(".")[0]

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Return the registers and predicates that it sets."""
        return tuple(_writes(self))

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Return the registers and predicates that it may use; of a vector the first."""
        sources = self.operands[num_targets(self) :]
        found = _REGISTER.findall(" ".join(sources))
        if self.name == "P2R":
            found += masked_predicates(self.operands[-1])
        return (*found, self.guard.lstrip("!")) if self.guard else tuple(found)


def num_targets(instruction: Instruction) -> int:
    """Count the operands that are written: they come first."""
    name, operands = instruction.name, instruction.operands
    if _NO_TARGET.match(name):
        return 0
    count = 0
    for operand in operands:
        if count and not re.fullmatch(r"U?P(\d|T)", operand):
            break
        if not re.fullmatch(r"U?R(\d+|Z)|U?P(\d|T)|PR", operand):
            break
        count += 1
    if re.search(r"SETP|PLOP3", name):
        return min(count, 2)
    if re.match(r"VOTE", name):
        return 1
    # SHFL, LOP3, atomic operations: a predicate may come before the target.
    is_pair = len(operands) > 1 and re.fullmatch(r"U?P(\d|T)", operands[0])
    if is_pair and count == 1 and re.fullmatch(r"U?R(\d+|Z)", operands[1]):
        return 2 if re.match(r"SHFL|U?LOP3|ATOM|R2UR|LDG", name) else 1
    return count


def masked_predicates(mask: str) -> list[str]:
    """List the predicates that a mask such as 0x7f selects."""
    return [f"P{index}" for index in range(7) if int(mask, 16) >> index & 1]


def _writes(instruction: Instruction) -> list[str]:
    op, operands = instruction.op, instruction.operands
    if instruction.name == "R2P":
        return masked_predicates(operands[-1])
    found: list[str] = []
    for operand in operands[: num_targets(instruction)]:
        match = re.fullmatch(r"(U?R)(\d+)", operand)
        if match:
            start = int(match[2])
            found += [f"{match[1]}{start + i}" for i in range(_width(instruction.name, op))]
        elif re.fullmatch(r"U?P\d", operand):
            found.append(operand)
    return found


def _width(name: str, op: str) -> int:
    """Return how many registers of 32 bits a target has."""
    if match := re.search(r"64x(\d+)x", op):  # wgmma: 64 rows in 128 threads, in float32
        return int(match[1]) // 2
    if name in ("HMMA", "IMMA", "DMMA"):
        return 4
    if name in ("LDSM", "LDTM"):
        scale = {"LDSM": 1, "LDTM": 4}[name]
        return scale * int((re.search(r"\.x?(\d+)$", op) or [0, "1"])[1])
    if ".128" in op:
        return 4
    wide = ".64" in op or ".WIDE" in op or name in ("FFMA2", "FADD2", "FMUL2") or op == "CS2R"
    return 2 if wide or re.search(r"\bDADD|\bDMUL|\bDFMA|F64", op) else 1


@dataclass(eq=False)
class Block:
    """Hold a basic block: its instructions, and where control goes from its end."""

    number: int
    instructions: list[Instruction] = field(default_factory=list)
    label: str | None = None
    target: int | None = None  # of the branch at its end
    following: int | None = None  # where control goes without that branch; both None: the end

    @property
    def successors(self) -> list[int]:
        """Return the numbers of the blocks that may come next."""
        return [number for number in (self.target, self.following) if number is not None]


@dataclass(eq=False)
class Code:
    """Hold the blocks of a kernel, the first its entry, and what is known of its control flow."""

    name: str
    blocks: list[Block]

    @cached_property
    def predecessors(self) -> list[list[int]]:
        """Return the blocks that lead to each block."""
        found: list[list[int]] = [[] for _ in self.blocks]
        for block in self.blocks:
            for number in block.successors:
                found[number].append(block.number)
        return found

    @cached_property
    def back_edges(self) -> set[tuple[int, int]]:
        """Return the edges (from, to) that lead back to a block on the way from the entry."""
        found, state, stack = set(), {0: 1}, [(0, iter(self.blocks[0].successors))]
        while stack:
            number, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                state[number] = 2
                stack.pop()
            elif state.get(following) == 1:
                found.add((number, following))
            elif following not in state:
                state[following] = 1
                stack.append((following, iter(self.blocks[following].successors)))
        return found

    @cached_property
    def loops(self) -> list[set[int]]:
        """Return the blocks of each natural loop, inner loops before outer ones."""
        bodies: dict[int, set[int]] = {}
        for source, head in self.back_edges:
            body, stack = bodies.setdefault(head, {head}), [source]
            while stack:
                number = stack.pop()
                if number not in body:
                    body.add(number)
                    stack += self.predecessors[number]
        return sorted(bodies.values(), key=len)

    @cache  # noqa: B019
    def reachable(self, start: int | None) -> frozenset[int]:
        """Return the blocks that may come from `start` on, without going back."""
        found, stack = set(), [] if start is None else [start]
        while stack:
            number = stack.pop()
            if number not in found:
                found.add(number)
                for following in self.blocks[number].successors:
                    if (number, following) not in self.back_edges:
                        stack.append(following)
        return frozenset(found)

    @cached_property
    def control(self) -> list[list[int]]:
        """Return for each block the instructions, by index, whose values decide branches."""
        wanted: list[set[int]] = [set() for _ in self.blocks]
        seen: set[tuple[int, str]] = set()
        stack: list[tuple[int, int, str]] = []
        for block in self.blocks:
            if block.target is not None or (block.instructions and block.instructions[-1].guard):
                last = len(block.instructions) - 1
                stack += [(block.number, last, name) for name in block.instructions[-1].reads]
        while stack:
            number, end, name = stack.pop()
            instructions = self.blocks[number].instructions
            for index in range(end - 1, -1, -1):
                instruction = instructions[index]
                if name in instruction.writes:
                    if index not in wanted[number]:
                        wanted[number].add(index)
                        stack += [(number, index, each) for each in sources(instruction)]
                    if not instruction.guard:
                        break
            else:
                for before in self.predecessors[number]:
                    if (before, name) not in seen:
                        seen.add((before, name))
                        stack.append((before, len(self.blocks[before].instructions), name))
        return [sorted(indices) for indices in wanted]


def sources(instruction: Instruction) -> list[str]:
    """Return what an instruction of 32 or 64 bits reads, with the second halves of pairs."""
    names = list(instruction.reads)
    if ".WIDE" in instruction.op or ".64" in instruction.op:
        names += [
            f"{match[1]}{int(match[2]) + 1}"
            for match in (re.fullmatch(r"(U?R)(\d+)", name) for name in instruction.reads)
            if match
        ]
    return names


def parse(text: str, kernel: str) -> Code:
    """Read what `nvdisasm -c -g` prints of a cubin with one kernel."""
    body = text.partition(f".text.{kernel}:\n")[2]
    body = body.partition("//---------------------")[0]
    blocks, labels, file, line = [Block(0)], {}, "", 0
    for row in body.splitlines():
        if match := _LINE.search(row):
            file, line = match["file"], int(match["line"])
        elif match := _LABEL.match(row):
            if blocks[-1].instructions:
                blocks.append(Block(len(blocks)))
            labels[match[1]] = blocks[-1].number
        elif match := _TEXT.search(row):
            operands = tuple(_operands(match["rest"]))
            # On 8.0 a loop may be left by a call that never returns.
            is_jump = match["op"].startswith("CALL") and ".L_x_" in match["rest"]
            op = "BRA" if is_jump else match["op"]
            instruction = Instruction(op, operands, match["guard"], file, line)
            blocks[-1].instructions.append(instruction)
            if instruction.name in ("BRA", "EXIT", "RET", "BRX", "JMP"):
                blocks.append(Block(len(blocks)))
    if not blocks[-1].instructions:
        blocks.pop()
    for block in blocks:
        last = block.instructions[-1]
        ends = last.name in ("BRA", "EXIT", "RET")
        if last.name == "BRA":
            label = re.search(r"\.L_x_\d+", last.operands[-1])
            block.target = labels[label[0]]
        conditional = last.guard or predicates(last)
        if (not ends or conditional or ".DIV" in last.op) and block.number + 1 < len(blocks):
            block.following = block.number + 1
    return Code(kernel, blocks)


def predicates(branch: Instruction) -> list[str]:
    """Return the predicates under which a branch is taken, other than its guard."""
    return [operand for operand in branch.operands if re.fullmatch(r"!?U?P\d", operand)]


def _operands(text: str) -> list[str]:
    """Split at commas outside of brackets, and drop hints for the register cache."""
    parts = re.split(r",\s*(?![^\[]*\])", text) if text else []
    return [part.replace(".reuse", "").strip() for part in parts]


@cache
def functions(file: str) -> list[tuple[int, int, str]]:
    """Return (first line, last line, name) of each function of a source file."""
    if not Path(file).is_file():
        return []
    nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    return [(node.lineno, node.end_lineno, node.name)
            for node in nodes if isinstance(node, ast.FunctionDef)]  # fmt: skip


def function_of(instruction: Instruction) -> str:
    """Return the name of the source function of an instruction; empty where unknown."""
    names = [name for first, last, name in functions(instruction.file)
             if first <= instruction.line <= last]  # fmt: skip
    return names[-1] if names else ""
