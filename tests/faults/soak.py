"""Drive the soak tests: finish runs, however they are disturbed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from faults.contract import (
    FLAGS,
    TINY,
    TINY_FILES,
    call,
    codes,
    command,
    losses,
    newest_step,
    outcome,
    write_files,
)
from faults.sabotage import both, record_losses, shorten
from helpers.run_main import Result

Sabotages = dict[int, Callable[[], None]]  # by rank
EVERY_STEP = 1e-9  # minutes between checkpoints


@dataclass
class Soak:
    """Disturb runs of these settings; write down every loss that a process sees.

    Args:
        root: directory of the undisturbed run.
        flags: of the runs.
        size: number of processes.
    """

    root: Path
    flags: dict[str, object]
    size: int = 1

    def attempt(self, directory: Path, sabotages: Sabotages | None = None, **more) -> list[Result]:
        """Start a run or resume it."""
        argv = command(**{"nThreads": 0, **self.flags, "save": directory, "resume": "auto", **more})
        records = {rank: partial(record_losses, self._report(directory, rank))
                   for rank in range(self.size)}  # fmt: skip
        hit, wait = sabotages or {}, partial(shorten, {"rendezvous": 60})  # for one killed before
        return call(argv, self.size, {
            rank: partial(both, wait, records[rank], hit.get(rank, int)) for rank in records
        })  # fmt: skip

    def finish(self, directory: Path, sabotages: Sabotages | None = None, **more) -> dict:
        """Run to the end; return the outcome, and every loss that it computed."""
        results = self.attempt(directory, sabotages, **more)
        assert set(codes(results)) == {0}, results
        reports = [self._report(directory, rank) for rank in range(self.size)]
        return outcome(directory) | {"losses": list(map(losses, reports))}

    @cached_property
    def undisturbed(self) -> dict:
        """Return the outcome of an undisturbed run."""
        return self.finish(self.root)

    def steps_lost(self, directory: Path) -> int:
        """Count the steps that were done and are not in the newest checkpoint."""
        report = self._report(directory, 0)
        done = max(map(int, losses(report)), default=0) if report.exists() else 0
        return done - (newest_step(directory) or 0)

    @staticmethod
    def _report(directory: Path, rank: int) -> Path:
        return directory.with_name(f"{directory.name}.losses{rank}")


def soaks(root: Path) -> dict[str, Soak]:
    """Make runs over images in memory, over files with loader processes, in two processes."""
    files = write_files(root / "photographs")
    return {
        "memory": Soak(root / "memory", TINY | FLAGS),
        "files": Soak(root / "files", TINY_FILES | FLAGS | {"data": files}),
        "pair": Soak(root / "pair", TINY | FLAGS | {"nImages": 64}, 2),
    }
