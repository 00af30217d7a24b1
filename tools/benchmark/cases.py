"""List the cases that `python -m tools.benchmark` can measure, and select those asked for."""

import fnmatch
import itertools
from typing import NamedTuple

from cli.flag_types import Settings
from errors import UsageError

PRECISIONS = {"single": "fp32", "bf16": "bf16"}  # of main.py's --precision, those measured
FORMATS = ("contiguous", "channels-last")
COMPILED = {"compiled": "default", "compiled-reduce-overhead": "reduce-overhead"}
PEERS = ("torchvision", "torchvision-memory-efficient", "timm")


class Case(NamedTuple):
    """Name an implementation and how it trains."""

    implementation: str  # level-0, level-1, level-N-BACKEND, or one of PEERS
    precision: str  # fp32, tf32 or bf16 (autocast)
    memory_format: str  # of images and weights, one of FORMATS
    mode: str  # eager, graph (the whole step in one CUDA graph) or one of COMPILED

    @property
    def name(self) -> str:
        """Return the name that messages show."""
        return "/".join(self)

    def as_row(self) -> dict[str, object]:
        """Return the CSV columns that identify a row."""
        return dict(zip(("who", *self._fields[1:]), self, strict=True))

    @property
    def main_precision(self) -> str:
        """Return the value of `--precision`; TensorFloat-32 is a setting of the process."""
        return "bf16" if self.precision == "bf16" else "single"

    @property
    def trains_as_main(self) -> bool:
        """Return whether main.py's trainer can take the same steps with this network."""
        return self[2:] == ("channels-last", "eager") and self.implementation not in PEERS


def select_cases(opt: Settings, only: str | None, compiled: bool, on_cuda: bool) -> list[Case]:
    """List the cases that the flags select, precision by precision.

    Args:
        only: patterns with commas between, found anywhere in a case's name; None: every case.
        compiled: include torch.compile.

    Raises:
        UsageError: the flags select no case.
    """
    modes, backends = ("eager", "graph"), ("torch", "triton")
    precisions, compiled_modes = ["fp32", "tf32", "bf16"], list(COMPILED)
    if not on_cuda:
        modes, backends = modes[:1], backends[:1]
        precisions, compiled_modes = ["fp32", "bf16"], ["compiled"]
    # Flags of main.py that are given select one precision, backend, mode or level.
    if opt.tf32 or "precision" in opt.given:
        precisions = ["tf32" if opt.tf32 else PRECISIONS[opt.precision]]
    if opt.kernels != "auto":
        backends = (opt.kernels,)
    if opt.cudaGraph != "auto":
        modes = ("graph",) if opt.cudaGraph == "true" else ("eager",)
    levels = ["level-0", "level-1"]
    levels += [f"level-{level}-{backend}" for level in (2, 3, 4) for backend in backends]
    if "optMemory" in opt.given and opt.optMemory != "auto":
        levels = [level for level in levels if level.split("-")[1] == str(opt.optMemory)]
    pairs = [(level, mode) for level in levels for mode in modes]
    pairs += [(peer, "eager") for peer in PEERS]
    pairs += [("torchvision", mode) for mode in compiled_modes if compiled]
    cases = [
        Case(name, precision, memory_format, mode)
        for precision, (name, mode), memory_format in itertools.product(precisions, pairs, FORMATS)
    ]
    selected = [case for case in cases if matches(case.name, only)]
    if not selected:
        raise no_match(only, cases[0].name)
    return selected


def matches(name: str, only: str | None) -> bool:
    """Return whether one of the patterns of `--only` is found in /NAME/, of a case."""
    patterns = [f"*{pattern.strip()}*" for pattern in (only or "").split(",")]
    return any(fnmatch.fnmatchcase(f"/{name}/", pattern) for pattern in patterns)


def no_match(only: str, name: str) -> UsageError:
    """Return the error that no case has such a name, but `name` is one."""
    return UsageError(f"only: {only} matches no case of these flags", f"names are as {name}")
