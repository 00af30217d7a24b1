"""Test rows 17 to 46 at length: flipped bits by the thousand, hostile files, mutated inputs."""

import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
from errors import CheckpointError
from faults import bombs, fuzz
from faults.contract import command
from faults.test_faults_bombs import KINDS
from helpers.hostile_files import BOMBS, equal
from helpers.run_main import run

pytestmark = pytest.mark.soak
FLIPS, CUTS, BLOCKS = 10_000, 1_000, 200
FUZZ_S = float(os.environ.get("FUZZ_S", 60))  # seconds for all kinds of input together
REAL = {"dataset": "synthetic", "imageSize": 32, "nImages": 16, "depth": 40, "growthRate": 12,
        "batchSize": 16, "nEpochs": 1}  # fmt: skip


# G6: corruption:
@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Save the checkpoint of a DenseNet-BC of 40 layers, as in the paper."""
    directory = tmp_path_factory.mktemp("real")
    assert run(command(**REAL, save=directory)).code == 0
    return max(directory.glob("checkpoint_*.pt"))


class Damage:
    """Damage and read a copy of a file, again and again."""

    def __init__(self, path: Path, copy: Path):
        self.data, self.path = path.read_bytes(), copy / path.name
        self.path.write_bytes(self.data)
        self.state = checkpoints.load(self.path)
        self.refused = self.wrong = 0

    def replace(self, start: int, new: bytes) -> None:
        """Read the file with other bytes from `start` on, then put the right ones back."""
        old = self.data[start : start + len(new)]
        with open(self.path, "r+b", buffering=0) as file:
            for content in (new, old):
                file.seek(start)
                file.write(content)
                if content is new:
                    self.read()

    def cut(self, size: int) -> None:
        """Read the first `size` bytes."""
        self.path.write_bytes(self.data[:size])
        self.read()

    def read(self) -> None:
        try:
            found = checkpoints.load(self.path)
        except CheckpointError:
            self.refused += 1
        else:
            self.wrong += not equal(found, self.state)


def test_no_damage_to_a_real_checkpoint_is_read_as_something_else(real, tmp_path, measured):
    draw, size = random.Random(0), real.stat().st_size
    assert size > 2**20
    counts = {}
    for what, count in (("flipped bits", FLIPS), ("truncations", CUTS), ("zeroed blocks", BLOCKS)):
        damage = Damage(real, tmp_path)
        for _ in range(count):
            start = draw.randrange(size)
            if what == "flipped bits":
                damage.replace(start, bytes([damage.data[start] ^ 1 << draw.randrange(8)]))
            elif what == "truncations":
                damage.cut(start)
            else:
                damage.replace(start // 4096 * 4096, bytes(min(4096, size - start // 4096 * 4096)))
        measured("G6", f"read silently wrong, of {count} {what}", damage.wrong, "0")
        measured("G6", f"refused, of {count} {what}", damage.refused, "")
        counts[what] = (damage.wrong, damage.refused)
    assert [wrong for wrong, _ in counts.values()] == [0, 0, 0]
    assert counts["flipped bits"][1] > 0.99 * FLIPS and counts["truncations"][1] == CUTS


@pytest.mark.parametrize("size_mb", [1, 230], ids=["small", "DenseNet-161"])
def test_the_checkpoint_before_a_damaged_one_is_found_soon(real, tmp_path, measured, size_mb):
    state = checkpoints.load(real)
    tensors = {f"w{i}": torch.randn(2**18 // 4 * size_mb // 10 + 1) for i in range(40)}
    state["model"], state["momentum"] = state["model"] | tensors, {}
    paths = [checkpoints.save(tmp_path, state | {"global_step": step}, keep=2) for step in (7, 8)]
    data = bytearray(paths[1].read_bytes())
    data[len(data) // 2] ^= 1
    paths[1].write_bytes(data)
    since = time.perf_counter()
    found = checkpoints.load_latest(tmp_path, lambda line: None)
    took_s = time.perf_counter() - since
    what = f"seconds to fall back to the checkpoint before, {paths[0].stat().st_size >> 20} MiB"
    measured("G6", what, took_s, "<= 5")
    assert found["global_step"] == 7


# G8: bounded cost:
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "read"),
    [("checkpoint", checkpoints.load), *((kind, KINDS[kind][2]) for kind in KINDS)],
)
def test_hostile_files_cost_little(real, tmp_path, measured, kind, read):
    name, makes, _, error = KINDS[kind]
    writers = [partial(writing, make) for make in makes.values()]
    if kind == "checkpoint":
        kind = f"checkpoint for {read.__name__}"
        # The numbers are not in the weights, and one that warns when made is another test's.
        left_out = ("entries of one name", *["10^"] * (read is not checkpoints.load))
        writers += [partial(injecting, inject, real) for bomb, inject in BOMBS.items()
                   if not bomb.startswith(left_out)]  # fmt: skip
    costs = []
    for inject in writers:
        inject(tmp_path / name)
        costs.append(bombs.check_cost(tmp_path / name, read, error))
    slowest, largest = (max(worst) for worst in zip(*costs, strict=True))
    measured("G8", f"seconds until a hostile {kind} is refused, of {len(writers)}", slowest, "<= 5")
    what = f"MiB beyond three times the size of a hostile {kind}, of {len(writers)}"
    measured("G8", what, largest / bombs.MB, "<= 256")
    assert slowest <= 5  # of the processor


def writing(make, path: Path) -> None:
    path.write_bytes(make())


def injecting(inject, source: Path, path: Path) -> None:
    path.write_bytes(source.read_bytes())
    inject(path)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_input_is_refused_or_read(tmp_path, measured, kind):
    seed = random.SystemRandom().randrange(2**32)
    said = fuzz.fuzz_apart(kind, tmp_path, seed, seconds=FUZZ_S / len(fuzz.KINDS))
    measured("G8", f"mutated inputs, {kind}", said["count"], "")
    measured("G8", f"of these refused, {kind}", said["refused"], "")
    measured("G8", f"that ended otherwise than with 2, 3 or 4, {kind}", 0, "0")
    measured("G8", f"seconds for the slowest, {kind}", said["slowest_s"], "<= 5")
    measured("G8", f"MiB for the largest refused, {kind}", said["mb"], "<= 256")
    assert said["count"] > 20 and 0 < said["refused"] <= said["count"]
    assert said["slowest_s"] <= 5 and said["mb"] <= 256 + 3
