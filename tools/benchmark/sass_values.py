"""Compute integers of machine code (SASS): those that count loops and choose branches.

A value is an unsigned 32-bit number (an int, or an array with one for each warp), a predicate
(bool, or an array), or None where it is unknown: what memory held, and floating point.
"""

import re
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy

from tools.benchmark.sass import Instruction, masked_predicates, num_targets

Value = int | bool | numpy.ndarray | None
MASK = 0xFFFFFFFF


def signed(x: Value) -> Value:
    """Read 32 bits as a signed number."""
    return (x ^ 0x80000000) - 0x80000000


def evaluate(instruction: Instruction, values: dict[str, Value], constant: Callable) -> None:
    """Set what an instruction writes; to None where it cannot be known.

    Args:
        values: of registers and predicates by name; a missing one is unknown.
        constant: returns 32 bits of constant bank 0 at an offset in bytes, or None.
    """
    targets = instruction.writes
    results: tuple = ()
    with suppress(_UnknownError):
        results = _compute(instruction, _Operands(instruction, values, constant))
    results = (*results, *[None] * len(targets))[: len(targets)]
    if instruction.guard:
        holds = predicate(instruction.guard, values)
        results = tuple(_choose(holds, new, values.get(name))
                        for name, new in zip(targets, results, strict=True))  # fmt: skip
    values.update(zip(targets, results, strict=True))


def predicate(text: str, values: Mapping[str, Value]) -> Value:
    """Return the value of a predicate such as !P0; PT is true."""
    name = text.lstrip("!")
    value = True if name in ("PT", "UPT") else values.get(name)
    return _invert(value) if text.startswith("!") else value


def _invert(value: Value) -> Value:
    if value is None:
        return None
    return ~value if isinstance(value, numpy.ndarray) else not value


def _choose(condition: Value, first: Value, second: Value) -> Value:
    """Return first where the condition holds, else second."""
    if condition is None or isinstance(condition, bool | numpy.bool_):
        if condition is None:
            return first if _is_same(first, second) else None
        return first if condition else second
    if first is None or second is None:
        return None
    return numpy.where(condition, first, second)


def _is_same(first: Value, second: Value) -> bool:
    scalars = not isinstance(first, numpy.ndarray) and not isinstance(second, numpy.ndarray)
    return scalars and first is not None and first == second


class _UnknownError(Exception):
    """An operand is unknown, or the operation is not computed here."""


class _Operands:
    """Give the sources of an instruction as numbers; raise _UnknownError for an unknown one."""

    def __init__(self, instruction: Instruction, values: Mapping[str, Value], constant: Callable):
        self.values, self.constant = values, constant
        targets = num_targets(instruction)  # with those that are not kept (RZ, PT)
        self.targets, self.texts = instruction.operands[:targets], instruction.operands[targets:]

    def __len__(self) -> int:
        return len(self.texts)

    def number(self, index: int) -> Value:
        """Return source `index`, 32 bits."""
        return self._read(self.texts[index])

    def pair(self, index: int) -> Value:
        """Return 64 bits, as a signed number, from a register and the next."""
        text = self.texts[index]
        low, high = self._read(text), self._read(_next(text))
        return signed(high) * 4294967296 + low

    def predicate(self, index: int) -> Value:
        """Return source `index`, a predicate."""
        value = predicate(self.texts[index], self.values)
        if value is None:
            raise _UnknownError
        return value

    def _read(self, text: str) -> Value:
        sign, body = "", text
        while body[:1] in "-~|":
            sign += body[0]
            body = body[1:]
        body = body.rstrip("|")
        if body in ("RZ", "URZ", "SRZ"):
            value: Value = 0
        elif match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", body):
            value = self.constant(int(match[1], 16))
        elif re.fullmatch(r"0x[0-9a-f]+", body):
            value = int(body, 16) & MASK
        else:
            value = self.values.get(re.sub(r"\.(U32|64|H0|H1)$", "", body))
        if value is None or isinstance(value, bool) or "|" in sign:
            raise _UnknownError
        if "-" in sign:
            value = -value & MASK
        return ~value & MASK if "~" in sign else value


def _next(text: str) -> str:
    if match := re.fullmatch(r"([-~]?U?R)(\d+)(\.\w+)?", text):
        return f"{match[1]}{int(match[2]) + 1}"
    if match := re.fullmatch(r"(c\[0x0\]\[)(0x[0-9a-f]+)(\])", text):
        return f"{match[1]}{int(match[2], 16) + 4:#x}{match[3]}"
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return "0x0" if not text.startswith("-") else "-0x1"
    return text  # RZ


def _halves(value: Value) -> tuple[Value, Value]:
    return value & MASK, (value >> 32) & MASK


def _compute(instruction: Instruction, given: _Operands) -> tuple:
    """Return the values of what the instruction writes, in the order of `writes`."""
    compute = _OPERATIONS.get(instruction.name.removeprefix("U"))
    if compute is None:
        raise _UnknownError
    return compute(instruction.op.split("."), given)


def _move(op: list[str], x: _Operands) -> tuple:
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", x.texts[0]):  # one to four arguments
        return tuple(x.constant(int(match[1], 16) + offset) for offset in (0, 4, 8, 12))
    if "64" in op:
        return _halves(x.pair(0))
    return (x.number(0),)


def _special(op: list[str], x: _Operands) -> tuple:
    if x.texts[0] == "SRZ":
        return 0, 0
    value = x.values.get(x.texts[0])
    if value is None:
        raise _UnknownError
    return (value,)


def _half_constant(op: list[str], x: _Operands) -> tuple:
    """Compute -RZ * RZ + (high, low): a constant, written as two numbers of 16 bits."""
    if x.texts[0].lstrip("-") != "RZ" or x.texts[1].lstrip("-") != "RZ":
        raise _UnknownError
    try:
        high, low = (struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in x.texts[2:])
    except (ValueError, OverflowError):
        raise _UnknownError from None
    return (high << 16 | low,)


def _add(op: list[str], x: _Operands) -> tuple:
    """Add two or three numbers; .X: and carries, which are predicates at the end."""
    if "64" in op:
        return _halves(x.pair(0) + x.pair(1))
    texts = [text for text in x.texts if not re.fullmatch(r"!?U?P(\d|T)", text)]
    numbers = [x._read(text) for text in texts]
    total = sum(numbers)
    if "X" in op:
        for index in range(len(texts), len(x)):
            carry = x.predicate(index)
            total = total + (carry * 1 if isinstance(carry, numpy.ndarray) else int(carry))
    carries = [total >> 32 != 0 for text in x.targets[1:] if text not in ("PT", "UPT")]
    return (total & MASK, *carries)


def _multiply_add(op: list[str], x: _Operands) -> tuple:
    first, second = x.number(0), x.number(1)
    if "WIDE" in op or "HI" in op:
        if "U32" not in op:
            first, second = signed(first), signed(second)
        low, high = _halves(first * second + (x.pair(2) if x.texts[2] != "RZ" else 0))
        return (high,) if "HI" in op else (low, high)
    carry = 0
    if "X" in op and len(x) > 3:
        carry = x.predicate(3) * 1
    return ((first * second + x.number(2) + carry) & MASK,)


def _shift_add(op: list[str], x: _Operands) -> tuple:
    """Compute (a << n) + b, or of (c : a) << n the high half, plus b: LEA."""
    high_half = "HI" in op
    numbers = [text for text in x.texts if not re.fullmatch(r"!?U?P(\d|T)", text)]
    a, b, shift = x._read(numbers[0]), x._read(numbers[1]), x._read(numbers[-1])
    if high_half:
        c = (signed(a) >> 31) if "SX32" in op else x._read(numbers[2])
        a = ((c << shift) | (a >> (32 - shift))) & MASK if shift else c
    else:
        a = (a << shift) & MASK
    total = a + b
    if "X" in op:
        total = total + x.predicate(len(x) - 1) * 1
    carries = [total >> 32 != 0 for text in x.targets[1:] if text not in ("PT", "UPT")]
    return (total & MASK, *carries)


def _funnel(op: list[str], x: _Operands) -> tuple:
    low, shift, high = x.number(0), x.number(1) & 63, x.number(2)
    if not isinstance(shift, int):
        raise _UnknownError
    if "L" in op:
        value = (high << 32 | low) << shift >> 32 if "HI" in op else low << shift
    elif "HI" in op:
        value = (signed(high) if "S32" in op or "S64" in op else high) >> shift
    else:
        value = ((signed(high) if "S64" in op else high) * 4294967296 + low) >> shift
    return (value & MASK,)


def _logic(op: list[str], x: _Operands) -> tuple:
    a, b, c, table = (x.number(index) for index in range(4))
    value = 0
    for bits in range(8):
        if table >> bits & 1:
            value = value | (
                (a if bits & 4 else ~a) & (b if bits & 2 else ~b) & (c if bits & 1 else ~c)
            )
    value = value & MASK
    is_predicate = re.fullmatch(r"U?P\d", x.targets[0])
    return (value != 0, value) if is_predicate else (value,)


def _predicate_logic(op: list[str], x: _Operands) -> tuple:
    a, b, c = (x.predicate(index) for index in range(3))
    out = []
    for index, target in enumerate(x.targets):
        table = x.number(3 + index)
        value: Value = False
        for bits in range(8):
            if table >> bits & 1:
                term = [p if bits & mask else _invert(p) for p, mask in ((a, 4), (b, 2), (c, 1))]
                value = value | (term[0] & term[1] & term[2])
        if target not in ("PT", "UPT"):
            out.append(value)
    return tuple(out)


def _compare(op: list[str], x: _Operands) -> tuple:
    a, b = x.number(0), x.number(1)
    if "U32" not in op:
        a, b = signed(a), signed(b)
    holds = {"LT": lambda: a < b, "LE": lambda: a <= b, "GT": lambda: a > b, "GE": lambda: a >= b,
             "EQ": lambda: a == b, "NE": lambda: a != b}[op[1]]()  # fmt: skip
    if "EX" in op:  # the high halves of 64 bits: the low ones decide where these are equal
        low, equal = x.predicate(3), a == b
        if op[1] == "EQ":
            holds = equal & low
        elif op[1] == "NE":
            holds = (a != b) | low
        else:
            strict = a < b if op[1] in ("LT", "LE") else a > b
            holds = strict | (equal & low)
    other = x.predicate(2)
    join = {"AND": lambda p: p & other, "OR": lambda p: p | other, "XOR": lambda p: p ^ other}
    combine = next(join[each] for each in op if each in join)
    out = []
    for target, value in zip(x.targets, (holds, _invert(holds)), strict=False):
        if target not in ("PT", "UPT"):
            out.append(combine(value))
    return tuple(out)


def _select(op: list[str], x: _Operands) -> tuple:
    return (_choose(x.predicate(2), x.number(0), x.number(1)),)


def _extreme(op: list[str], x: _Operands) -> tuple:
    """Return the smaller number where the predicate at the end holds, else the larger."""
    a, b = x.number(0), x.number(1)
    if op[0].endswith("ADDMNMX"):
        a, b = (a + b) & MASK, x.number(2)
    smaller = a < b if "U32" in op else signed(a) < signed(b)
    return (_choose(x.predicate(len(x) - 1) == smaller, a, b),)


def _absolute(op: list[str], x: _Operands) -> tuple:
    value = signed(x.number(0))
    return (abs(value) & MASK,)


def _extend(op: list[str], x: _Operands) -> tuple:
    value, bits = x.number(0), x.number(1)
    value = value & ((1 << bits) - 1)
    if "U32" not in op:
        value = ((value ^ (1 << (bits - 1))) - (1 << (bits - 1))) & MASK
    return (value,)


def _pack_predicates(op: list[str], x: _Operands) -> tuple:
    """Write the predicates of a mask in the bits of a number: P2R, and .B1 in its second byte."""
    shift = 8 * int(op[1][1]) if len(op) > 1 else 0
    mask = int(x.texts[2], 16) << shift
    value = x.number(1) & ~mask
    for name in masked_predicates(x.texts[2]):
        bit = predicate(name, x.values)
        if bit is None:
            raise _UnknownError
        value = value | (bit * 1) << (int(name[1]) + shift)
    return (value,)


def _unpack_predicates(op: list[str], x: _Operands) -> tuple:
    """Set the predicates of a mask to bits of a number: R2P."""
    text, byte = re.fullmatch(r"(\w+)(?:\.B(\d))?", x.texts[0]).groups()
    value = x._read(text) >> 8 * int(byte or 0)
    return tuple((value >> int(name[1]) & 1) != 0 for name in masked_predicates(x.texts[1]))


def _vote(op: list[str], x: _Operands) -> tuple:
    """Take the first thread's vote for the warp's."""
    if not re.fullmatch(r"U?P\d", x.targets[0]):
        raise _UnknownError
    return (x.predicate(0),)


def _success(op: list[str], x: _Operands) -> tuple:
    """Let waiting, and the election of a thread, succeed at once."""
    if op[0] == "SYNCS" and "TRYWAIT" not in op:
        raise _UnknownError
    return (True,)


_OPERATIONS: dict[str, Callable[[list[str], _Operands], tuple]] = {
    "MOV": _move, "LDC": _move, "LDCU": _move, "R2UR": _move, "MOV32I": _move,
    "S2R": _special, "S2UR": _special, "CS2R": _special, "HFMA2": _half_constant,
    "IADD3": _add, "IADD": _add, "VIADD": _add, "IMAD": _multiply_add, "LEA": _shift_add,
    "SHF": _funnel, "LOP3": _logic, "PLOP3": _predicate_logic, "ISETP": _compare,
    "SEL": _select, "IMNMX": _extreme, "VIMNMX": _extreme, "VIADDMNMX": _extreme,
    "P2R": _pack_predicates, "R2P": _unpack_predicates, "IABS": _absolute, "SGXT": _extend,
    "VOTE": _vote, "VOTEU": _vote, "ELECT": _success, "SYNCS": _success, "TCATOMSWS": _success,
}  # fmt: skip
