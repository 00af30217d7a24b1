"""On a CUDA device: every precision trains, data is resident, resuming works (`make gpu`)."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import datasets
import opts

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SMALL = (
    "--dataset synthetic --imageSize 16 --depth 10 --growthRate 8 --batchSize 64 --LR 0.05 --nGPU 1"
)


def run(flags: str) -> subprocess.CompletedProcess:
    """Run main.py in a process of its own."""
    command = [sys.executable, "main.py", *flags.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def log(directory: Path) -> list[dict]:
    """The records of log.jsonl without what differs from run to run."""
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    volatile = ("time_s", "images_per_s", "data_wait", "memory_mb")
    return [{key: line[key] for key in line if key not in volatile} for line in lines]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The last weights of a run."""
    return torch.load(directory / "model_last.pt", weights_only=True)


@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_every_precision_learns(precision, tmp_path):
    plain = f"{SMALL} --nImages 512 --augment false --dropRate 0 --milestones 4 --nEpochs 4"
    done = run(f"{plain} --precision {precision} --save {tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    records = log(tmp_path / "run")
    assert records[-1]["val_top1"] < 20 < records[0]["train_top1"]


def test_the_data_and_its_batches_are_on_the_device():
    device = torch.device("cuda", 0)
    data = datasets.create(opts.parse(SMALL.split()), device, print)
    images, targets = next(iter(data.train.batches(epoch=1)))
    assert data.train.images.pixels.is_cuda and images.is_cuda and targets.is_cuda
    assert images.is_contiguous(memory_format=torch.channels_last)


def stopped(flags: str, directory: Path) -> int:
    """Run until a checkpoint within an epoch is there, then ask to stop; the exit code."""
    command = [sys.executable, "main.py", *flags.split(), "--saveEvery", "1e-9"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(directory.glob("checkpoint_*.pt")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=60)


@pytest.mark.parametrize("seed, same", [(0, True), (1, False)])
def test_a_deterministic_run_resumes_mid_epoch_to_the_same_weights(seed, same, tmp_path):
    exact = f"{SMALL} --cudnn deterministic --dropRate 0.2 --nEpochs 3 --nImages 4096"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(f"{exact} --save {whole}").returncode == 0
    other = f"{exact} --manualSeed {seed} --save {parts}"
    assert stopped(other, parts) == 75
    resumed = run(f"{other} --resume auto")
    assert resumed.returncode == 0, resumed.stderr
    pairs = zip(weights(whole).values(), weights(parts).values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs) == same
    assert (log(whole) == log(parts)) == same


def test_a_checkpoint_of_the_gpu_is_evaluated_on_the_cpu(tmp_path):
    trained = run(f"{SMALL} --nImages 512 --nEpochs 2 --save {tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    on_cpu = run(f"--testOnly true --nGPU 0 --resume {tmp_path / 'run'}")
    assert on_cpu.returncode == 0, on_cpu.stderr
    error = float(on_cpu.stdout.split("top1:")[-1].split()[0])
    assert error == pytest.approx(log(tmp_path / "run")[-1]["val_top1"], abs=1.0)
