"""Compile the launches of `python -m tools.benchmark --static`, in two processes, without a GPU."""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from kernels.triton_launches import Variant
from tools.benchmark import sass

WORKERS = 2
_ATOMIC = r"tt.atomic_\w+ [^%]*"


@dataclass(frozen=True)
class Binary:
    """Hold what a variant is compiled to."""

    code: sass.Code
    registers: int  # of a thread
    shared_bytes: int  # of a program
    spilled_bytes: int  # of a thread's stack and local memory
    loads: frozenset[str]  # parameters that are read
    stores: frozenset[str]  # parameters that are written


def compile_all(wanted: Sequence[tuple[Variant, int]], report) -> dict[tuple[Variant, int], Binary]:
    """Compile variants for architectures (80: compute capability 8.0); call `report`."""
    found = {}
    # A new process, since a fork of one that has threads may hang.
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(_compile, _portable(variant), architecture): (variant, architecture)
                for variant, architecture in wanted}  # fmt: skip
        for job in as_completed(jobs):
            variant, architecture = jobs[job]
            text, *rest = job.result()
            name = variant.kernel.__name__
            found[variant, architecture] = Binary(sass.parse(text, name), *rest)
            report(f"compiled {len(found)} of {len(wanted)}: {name} for {architecture / 10}")
    return found


def _portable(variant: Variant) -> tuple:
    """Name the kernel instead of holding it, so that another process can find it."""
    kernel = variant.kernel
    return (kernel.__module__, kernel.__name__, variant.signature, variant.constants,
            variant.warps, variant.stages)  # fmt: skip


def _compile(portable: tuple, architecture: int) -> tuple:
    module, name, *rest = portable
    variant = Variant(getattr(importlib.import_module(module), name), *rest)
    return describe(variant.compiled(architecture))


def describe(compiled) -> tuple[str, int, int, int, frozenset[str], frozenset[str]]:
    """Return machine code as text, registers, shared and spilled bytes, loads and stores."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", path)))
        text = _tool("nvdisasm", "-c", "-g", path)
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    registers = int(usage["REG"])
    return text, registers, compiled.metadata.shared, spilled, *_accesses(compiled.asm["ttir"])


def _tool(name: str, *arguments: object) -> str:
    """Run one of the programs for machine code that Triton brings."""
    import triton  # noqa: TID251

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.check_output([path, *arguments], text=True)


def _accesses(ttir: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the parameters through which a kernel reads, and those through which it writes."""
    header = next(line for line in ttir.splitlines() if "tt.func public" in line)
    # The parameter that each value comes from: its operation's first operand, or what a loop starts
    # with. Regions that follow one another may use a name anew, so go line by line.
    origins = {name: name for name in re.findall(r"%(\w+): !tt.ptr", header)}
    loads, stores = set(), set()
    for line in ttir.splitlines():
        for accesses, operation in (
            (loads, "tt.load "),
            (stores, "tt.store "),
            (loads, _ATOMIC),
            (stores, _ATOMIC),
        ):
            accesses.update(
                origins.get(name) for name in re.findall(rf"{operation}%([\w#]+)", line)
            )
        for carried in re.findall(r"iter_args\((.*?)\) ->", line):
            for name, start in re.findall(r"%(\w+) = %([\w#]+)", carried):
                origins[name] = origins.get(start)
        if found := re.match(r"\s*%([\w#]+)(?::\d+)? = [\w.]+ (?:\w+, )*%([\w#]+)", line):
            origins[found[1]] = origins.get(found[2])
    if None in loads | stores:
        raise ValueError(f"an access of unknown origin: {header.strip()}")
    return frozenset(loads), frozenset(stores)
