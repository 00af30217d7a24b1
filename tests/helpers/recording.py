"""Write down, from inside each process of a run, what it computes in each step; hold it there."""

import json
import signal
import time
import zlib
from pathlib import Path

import torch

from faults.sabotage import replace

HOLD = "hold"  # a file with the last step that may begin
STOPPING, HELD = "stopping", "held"


def record_steps(directory: Path) -> None:
    """Write each training step of this process to a file of its own in `directory`.

    Before a step beyond that in the file HOLD, if there is one, all processes wait together, unless
    one was asked to stop.
    """
    now: dict = {}

    def cutting(make_batch):
        def make_batch_and_keep(self, plan):
            now["indices"] = plan.indices.tolist()
            return make_batch(self, plan)

        return make_batch_and_keep

    def counting(add):
        def add_and_keep(self, loss, logits, targets):
            now["loss"] = loss.item() * len(targets)
            add(self, loss, logits, targets)

        return add_and_keep

    def stepping(train_step):
        def step_and_write(self, images, targets):
            if "attempt" not in now:  # the same number in all processes that have met
                now["attempt"] = min(self.world.all_gather_json(time.time_ns()))
            while True:
                states = self.world.all_gather_json(_hold_state(directory, self.global_step))
                if STOPPING in states or HELD not in states:
                    break
                time.sleep(0.02)
            line = {"step": self.global_step, "rank": self.world.rank, "size": self.world.size}
            now["loss"] = 0.0
            train_step(self, images, targets)
            now["rng"] = zlib.crc32(torch.get_rng_state().numpy())
            with open(directory / f"steps_{now['attempt']}_{self.world.rank}.jsonl", "a") as file:
                file.write(json.dumps(line | now) + "\n")

        return step_and_write

    replace("take a batch from memory", cutting)
    replace("count a batch", counting)
    replace("train a batch", stepping)


def _hold_state(directory: Path, step: int) -> str:
    """Return whether this process was asked to stop, or the step is held back, or neither."""
    if signal.getsignal(signal.SIGTERM).__self__.signum:
        return STOPPING
    hold = directory / HOLD
    return HELD if hold.exists() and step > int(hold.read_text()) else ""


def steps(directory: Path) -> list[list[dict]]:
    """Read each process's record of each step, by rank; of a repeated step, the last one."""
    found: dict[tuple[int, int], list[dict]] = {}
    for path in directory.glob("steps_*.jsonl"):
        for line in path.read_text().splitlines():
            part = json.loads(line)
            found.setdefault((part["step"], part["attempt"]), []).append(part)
    last = {step: found[step, attempt] for step, attempt in sorted(found)}
    for parts in last.values():
        parts.sort(key=lambda part: part["rank"])
        assert [part["rank"] for part in parts] == list(range(parts[0]["size"]))
    assert list(last) == list(range(1, len(last) + 1))  # none is missing
    return list(last.values())


def losses(directory: Path) -> torch.Tensor:
    """Compute the mean loss of the global batch, step by step, float64."""
    return torch.tensor(
        [
            sum(part["loss"] for part in step) / sum(len(part["indices"]) for part in step)
            for step in steps(directory)
        ],
        dtype=torch.float64,
    )


def order(directory: Path) -> list[list[int]]:
    """List the images of the global batch in their order, step by step."""
    return [[image for part in step for image in part["indices"]] for step in steps(directory)]
