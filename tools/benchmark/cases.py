"""List the cases that `python -m tools.benchmark` can measure, and select those asked for."""

import dataclasses
import fnmatch
from dataclasses import dataclass

from cli.flag_types import Settings
from errors import UsageError

PRECISIONS = {"single": "fp32", "bf16": "bf16"}  # of main.py's --precision, those measured
FORMATS = ("contiguous", "channels-last")
COMPILED = {"compiled": "default", "compiled-reduce-overhead": "reduce-overhead"}
PEERS = ("torchvision", "torchvision-memory-efficient", "timm")


@dataclass(frozen=True)
class Case:
    """An implementation of the network, and how it trains.

    Args:
        implementation: level-0, level-1, level-N-BACKEND, or a member of `PEERS`.
        precision: fp32, tf32 or bf16 (autocast).
        memory_format: of images and weights, a member of `FORMATS`.
        mode: eager, graph (the whole step in one CUDA graph) or a key of `COMPILED`.
    """

    implementation: str
    precision: str
    memory_format: str
    mode: str

    @property
    def name(self) -> str:
        """Return the name that `--only` is matched with."""
        return "/".join(dataclasses.astuple(self))

    @property
    def columns(self) -> dict[str, str]:
        """Return the CSV columns that identify the case; `who` is the file format's word."""
        names = ("who", "precision", "memory_format", "mode")
        return dict(zip(names, dataclasses.astuple(self), strict=True))

    @property
    def main_precision(self) -> str:
        """Return the value of `--precision`; TensorFloat-32 is a setting of the process."""
        return "bf16" if self.precision == "bf16" else "single"

    @property
    def is_peer(self) -> bool:
        """Whether another project implements it."""
        return self.implementation in PEERS

    @property
    def trains_as_main(self) -> bool:
        """Whether main.py's trainer can take the same steps with this network."""
        return (self.memory_format, self.mode) == ("channels-last", "eager") and not self.is_peer


def all_cases(precision: str, on_cuda: bool, backends: list[str]) -> list[Case]:
    """List the cases of one precision.

    Args:
        backends: of levels 2 to 4: torch, triton.
    """
    ours = ["level-0", "level-1"]
    ours += [f"level-{level}-{backend}" for level in (2, 3, 4) for backend in backends]
    modes = ["eager", "graph"] if on_cuda else ["eager"]
    pairs = [(implementation, mode) for implementation in ours for mode in modes]
    pairs += [(peer, "eager") for peer in PEERS]
    pairs += [("torchvision", mode) for mode in (COMPILED if on_cuda else ["compiled"])]
    return [
        Case(implementation, precision, memory_format, mode)
        for implementation, mode in pairs
        for memory_format in FORMATS
    ]


def select_cases(opt: Settings, only: str | None, compiled: bool, on_cuda: bool) -> list[Case]:
    """List the cases that the flags select, precision by precision.

    Args:
        only: patterns with commas between, found anywhere in a case's name; None: every case.
        compiled: include torch.compile.

    Raises:
        UsageError: the flags select no case.
    """
    backends = ["torch", "triton"] if on_cuda else ["torch"]
    if opt.kernels != "auto":
        backends = [opt.kernels]
    precisions = ["fp32", "tf32", "bf16"] if on_cuda else ["fp32", "bf16"]
    if opt.tf32:
        precisions = ["tf32"]
    elif "precision" in opt.given:
        precisions = [PRECISIONS[opt.precision]]
    patterns = [f"*{pattern.strip()}*" for pattern in (only or "").split(",")]
    candidates = [case for name in precisions for case in all_cases(name, on_cuda, backends)]
    selected = [
        case
        for case in candidates
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
        and (compiled or case.mode not in COMPILED)
        and (case.is_peer or _matches_flags(case, opt))
    ]
    if not selected:
        what = f"only: {only} matches no case of these flags"
        raise UsageError(what, f"names are as {candidates[0].name}")
    return selected


def _matches_flags(case: Case, opt: Settings) -> bool:
    """Whether optMemory and cudaGraph, where they are given, select a case of this project."""
    if opt.cudaGraph != "auto" and (case.mode == "graph") != (opt.cudaGraph == "true"):
        return False
    level = case.implementation.split("-")[1]
    return "optMemory" not in opt.given or str(opt.optMemory) in ("auto", level)
