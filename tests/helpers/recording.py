"""What each process of a run computes in each step, written down from inside it.

As a program, `recording.py DIRECTORY ARGUMENTS...` is `main.py` with its steps recorded, for
launchers that want a program.
"""

import json
import sys
import time
from pathlib import Path

import torch

SLOW, SLOWER_S = "slow", 0.3  # a step takes so much longer while the directory has such a file


def record_steps(directory: Path) -> None:
    """Write each training step of this process to a file of its own in `directory`."""
    import train
    from datasets.memory_loader import MemoryLoader
    from engine import metrics

    add, make_batch, train_step = (
        metrics.Metrics.add,
        MemoryLoader.make_batch,
        train.Trainer._train_step,
    )
    now: dict = {}

    def make_batch_and_keep(self, plan):
        now["indices"] = plan.indices.tolist()
        return make_batch(self, plan)

    def add_and_keep(self, loss, logits, targets):
        now["loss"] = loss.item() * len(targets)
        add(self, loss, logits, targets)

    def step_and_write(self, images, targets):
        if "attempt" not in now:  # the same number in all processes that have met
            now["attempt"] = min(self.world.all_gather_json(time.time_ns()))
        line = {"step": self.global_step, "rank": self.world.rank, "size": self.world.size}
        now["loss"] = 0.0
        train_step(self, images, targets)
        with open(directory / f"steps_{now['attempt']}_{self.world.rank}.jsonl", "a") as file:
            file.write(json.dumps(line | now) + "\n")
        if (directory / SLOW).exists():
            time.sleep(SLOWER_S)

    MemoryLoader.make_batch, metrics.Metrics.add = make_batch_and_keep, add_and_keep
    train.Trainer._train_step = step_and_write


def steps(directory: Path) -> list[list[dict]]:
    """Of each step, what each process did, by rank; of a repeated step, the last time."""
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
    """The mean loss of the global batch, step by step, float64."""
    return torch.tensor(
        [
            sum(part["loss"] for part in step) / sum(len(part["indices"]) for part in step)
            for step in steps(directory)
        ],
        dtype=torch.float64,
    )


def order(directory: Path) -> list[list[int]]:
    """The images of the global batch in their order, step by step."""
    return [[image for part in step for image in part["indices"]] for step in steps(directory)]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import main

    record_steps(Path(sys.argv[1]))
    sys.exit(main.main(sys.argv[2:]))
