"""Test main.py from its command line to its exit code, on synthetic data and the digits."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
from faults.contract import command, digests, outcome, records, refused, saved, status, tiny
from faults.sabotage import at_batch, kill, on_files, send
from helpers.run_main import ROOT, run

FLAGS = {"nEpochs": 3, "dropRate": 0.2, "keep": 9}
RESULT = r"top1: +(\d+\.\d{3})  top5: +(\d+\.\d{3})"


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """Run with a validation set; the best epoch is not the last."""
    for seed in range(20):
        directory = tmp_path_factory.mktemp(f"seed{seed}")
        assert run(tiny(**FLAGS, validSize=8, manualSeed=seed, save=directory)).code == 0
        if status(directory)["best_epoch"] < 3:
            return directory
    raise AssertionError("no seed has such a run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Run without a validation set: --testOnly measures what is logged."""
    directory = tmp_path_factory.mktemp("plain")
    assert run(tiny(**FLAGS, save=directory)).code == 0
    return directory


def numbers(line: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair)) for pair in re.findall(RESULT, line)]


def errors(record: dict, split: str = "val") -> tuple[float, float]:
    return round(record[f"{split}_top1"], 3), round(record[f"{split}_top5"], 3)


# The files of a run:
def test_a_run_directory_holds_the_run_its_last_and_its_best_model(complete):
    steps = {1: 3, 2: 6, 3: 9}
    names = {epoch: f"checkpoint_{step:09d}.pt" for epoch, step in steps.items()}
    assert {path.name for path in complete.iterdir()} == {
        ".lock", "config.yaml", "data.json", "status.json", "log.jsonl", "tensorboard",
        "model_last.pt", "model_best.pt", *names.values(),
    }  # fmt: skip
    metadata = json.loads((complete / "data.json").read_text())
    assert metadata["classes"] == ["pattern 0", "pattern 1", "pattern 2"]
    assert (metadata["train"], metadata["val"], metadata["test"]) == (24, 8, 6)
    log, verdict = records(complete), status(complete)
    best = min(log, key=lambda record: (record["val_top1"], record["epoch"]))["epoch"]
    assert (verdict["state"], verdict["code"], verdict["epoch"]) == ("done", 0, 3)
    assert verdict["checkpoint"] == names[3] and verdict["best_epoch"] == best
    assert verdict["last_top1"] == log[-1]["val_top1"]
    assert verdict["best_top1"] == log[best - 1]["val_top1"]
    for name, epoch in (("model_last.pt", 3), ("model_best.pt", best)):
        weights = digests(torch.load(complete / name, weights_only=True))
        for other, checkpoint in names.items():
            state = checkpoints.load(complete / checkpoint)
            assert (weights == digests(state["model"])) == (other == epoch)


def test_the_config_of_a_run_reruns_it_and_the_best_model_is_tested_once(complete, tmp_path):
    config = complete / "config.yaml"
    lines = run(command(config=config, save=tmp_path / "again")).out.splitlines()
    assert outcome(tmp_path / "again") == outcome(complete)
    assert (tmp_path / "again" / "config.yaml").read_text() == config.read_text()
    other = command(config=config, save=tmp_path / "other", LR=0.2)  # the command line wins
    assert run(other).code == 0
    assert outcome(tmp_path / "other")["weights"] != outcome(complete)["weights"]

    log, verdict = records(complete), status(complete)
    best, (test,) = verdict["best_epoch"], (line for line in lines if line.startswith(" * Test "))
    assert [test] == lines[-2:-1] and test.endswith(f"(best model, epoch {best})")
    assert numbers(test) == [errors(verdict, "test")]
    assert re.fullmatch(rf" \* Finished {RESULT}  \(last: epoch 3\)   {RESULT}  "
                        rf"\(best: epoch {best}\)", lines[-1])  # fmt: skip
    assert numbers(lines[-1]) == [errors(log[-1]), errors(log[best - 1])]


def test_the_digits_are_learnt(tmp_path):
    network = {"dataset": "digits", "depth": 10, "growthRate": 6, "dropRate": 0}
    assert run(command(**network, nEpochs=2, milestones=2, save=tmp_path)).code == 0
    first, last = records(tmp_path)
    assert last["val_top1"] < 50 and last["train_loss"] < first["train_loss"]
    assert json.loads((tmp_path / "data.json").read_text())["train"] == 1437


# Test only:
def test_only_testing_gives_the_errors_of_the_weights_and_writes_nothing(plain, complete, tmp_path):
    before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}
    log, best = records(plain), status(plain)["best_epoch"]
    tested = checkpoints.list_checkpoints(complete)[3 - status(complete)["best_epoch"]]
    save = tmp_path / "run"
    for argv, want in (
        (command(resume=plain), errors(log[2])),
        (command(resume=plain / "checkpoint_000000004.pt"), errors(log[0])),
        (tiny(save=save, retrain=plain / "model_last.pt"), errors(log[2])),
        (tiny(save=save, retrain=plain / "model_best.pt"), errors(log[best - 1])),
        (command(resume=tested), errors(status(complete), "test")),  # it has a test set
    ):
        result = run([*argv, "--testOnly=true"])
        assert result.code == 0, result
        line = result.out.splitlines()[-1]
        assert re.fullmatch(rf" \* Results {RESULT}", line)
        assert numbers(line) == [want]
    assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before
    assert not save.exists()


def test_only_testing_a_run_in_progress_is_not_upset_by_its_retention(plain, tmp_path):
    directory = shutil.copytree(plain, tmp_path / "run")
    gone = partial(os.unlink, directory / "checkpoint_000000012.pt")
    retention = partial(on_files, gone, directory, operation="open", name="checkpoint")
    result = run(command(resume=directory, testOnly=True), retention)
    assert result.code == 0, result
    assert numbers(result.out) == [errors(records(plain)[1])]


# Resuming:
def test_the_fix_that_a_stopped_run_names_is_one(complete, tmp_path):
    """Follow it, without the command line and the flags that began the run."""
    directory = tmp_path / "my run's\nname"
    argv = command(config=complete / "config.yaml", save=directory)
    for _ in range(2):
        result = run(argv, partial(at_batch, partial(send, 15), 2))
        assert result.code == 75 and status(directory)["state"] == "preempted"
        words = re.search(r"to go on: python main.py (.*)", result.err)[1]
        argv = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {words}"], text=True)
        argv = argv.split("\0")[:-1]
        assert argv == ["--resume", str(directory)]
    assert run(argv).code == 0
    assert outcome(directory) == outcome(complete)


@pytest.mark.parametrize("number", [1, 3])
def test_a_checkpoint_continues_elsewhere_and_leaves_its_own_run_alone(complete, tmp_path, number):
    before = saved(complete)
    source = complete / f"checkpoint_{3 * number:09d}.pt"
    result = run(command(resume=source, save=tmp_path))
    assert result.code == 0, result
    there, here = outcome(complete), outcome(tmp_path)
    for part in ("weights", "results", "best"):  # also when the best was before the checkpoint
        assert here[part] == there[part]
    assert here["log"] == there["log"][number:]
    assert saved(complete) == before


def test_a_run_killed_while_the_test_set_is_measured_measures_it_again(complete, tmp_path):
    argv = command(config=complete / "config.yaml", save=tmp_path)
    killed = run(argv, partial(at_batch, kill, 4, "val"))  # one batch of validation an epoch
    assert killed.code < 0 and len(records(tmp_path)) == 3
    result = run([*argv, "--resume=auto"])
    assert result.code == 0 and result.out.count(" * Test ") == 1
    assert outcome(tmp_path) == outcome(complete)
    assert status(tmp_path)["test_top1"] == status(complete)["test_top1"]


# Retraining:
STILL = {"LR": 1e-30, "momentum": 0, "weightDecay": 0, "nEpochs": 1}


def parameters(path: Path) -> dict[str, str]:
    """Compute digests of the weights without BN's running statistics, which always change."""
    found = digests(checkpoints.load_weights(path))
    return {name: digest for name, digest in found.items() if "running" not in name
            and "num_batches" not in name}  # fmt: skip


def test_retraining_begins_with_the_weights_at_the_first_epoch(plain, tmp_path):
    for source in (plain / "model_last.pt", plain / "checkpoint_000000012.pt", "none"):
        directory = tmp_path / Path(source).stem
        assert run(tiny(**STILL, manualSeed=99, retrain=source, save=directory)).code == 0
        same = parameters(directory / "model_last.pt") == parameters(plain / "model_last.pt")
        assert same == (source != "none")
        assert [record["epoch"] for record in records(directory)] == [1]


def test_a_fine_tuned_run_has_a_new_classifier_and_is_resumed_and_tested(plain, tmp_path):
    source = tmp_path / "weights.pt"
    source.write_bytes((plain / "model_last.pt").read_bytes())
    argv = tiny(**STILL, nClasses=5, retrain=source, resetClassifier=True, save=tmp_path / "run")
    assert run(argv, partial(at_batch, partial(send, 15), 2)).code == 75
    source.unlink()  # what it began with is needed no more
    assert run(command(resume=tmp_path / "run")).code == 0
    assert run(command(resume=tmp_path / "run", testOnly=True)).code == 0
    old, new = parameters(plain / "model_last.pt"), parameters(tmp_path / "run" / "model_last.pt")
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"classifier.weight", "classifier.bias"}


# The command line:
ANSWERS = {
    "--help": 0, "--printConfig": 0, "-depth 41": 2, "--nGPU 3": 2, "--resume nowhere": 4,
    "--dataset folder --data nowhere": 3, "--save main.py/run": 6,
}  # fmt: skip


def test_errors_that_need_no_torch_are_reported_without_it():
    """Run it in a process of its own, as a person starts it."""
    program = """if True:
        import sys, main
        codes = []
        for line in sys.argv[1:]:
            try:
                codes.append(main.main(line.split()))
            except SystemExit as ended:
                codes.append(ended.code)
        print(codes, {"torch", "torchvision", "numpy", "PIL"} & sys.modules.keys())"""
    argv = [sys.executable, "-c", program, *ANSWERS]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == f"{list(ANSWERS.values())} set()", ended.stderr


@pytest.mark.parametrize(
    ("torch", "line"),
    [
        ("raise ModuleNotFoundError(name='torch')", "PyTorch is not installed"),
        ("__version__ = '2.9.1+cu128'", "PyTorch 2.9.1+cu128 is older than 2.11"),
        ("__version__ = '1.13.0'", "PyTorch 1.13.0 is older than 2.11"),
        ("__version__ = '2.11.0a0+nv26.01'", None),
        ("__version__ = '3.0'", None),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--nGPU=2"]])
def test_a_missing_or_old_pytorch_is_answered_with_what_installs_one(torch, line, flags, tmp_path):
    use = "def __getattr__(name):\n    raise SystemExit('it is used')\n"
    (tmp_path / "torch.py").write_text(f"{torch}\n{use}")
    argv = [sys.executable, "main.py", *tiny(save=tmp_path / "run"), *flags]
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    want = f"error: {line}; fix: pip install -r requirements.txt" if line else "it is used"
    assert (done.returncode, done.stderr) == (2 if line else 1, want + "\n")


def old_driver() -> None:
    """Let two GPUs be found whose driver refuses this PyTorch."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver is too old.\nUpdate it")

    torch.cuda.device_count, torch.cuda.init = lambda: 2, init


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_a_gpu_that_cannot_be_used_ends_the_run_before_it_starts(num_gpus, tmp_path):
    result = run(tiny(nGPU=num_gpus, save=tmp_path / "run"), old_driver)
    refused(result, 2, r"the GPU cannot be used: .* too old; fix: install .*, or use --nGPU 0")
    assert not (tmp_path / "run").exists()


def bug() -> None:
    import datasets.factory

    datasets.factory.create = None


def test_a_traceback_is_shown_for_a_bug_and_on_request(tmp_path):
    result = run(tiny(save=tmp_path / "bug"), bug)
    assert result.code == 1 and "Traceback" in result.err and "TypeError" in result.err
    argv = tiny(nGPU=99, batchSize=99, save=tmp_path / "run")
    quiet, loud = run(argv), run([*argv, "--debug=true"])
    refused(quiet, 2, "nGPU=99 but ")
    assert loud.code == 2 and "Traceback" in loud.err and loud.err.endswith(quiet.err)


def test_unusable_kernels_are_refused_and_notes_are_printed(tmp_path):
    pattern = r"kernels triton: there is no CUDA device; fix: use --kernels auto"
    refused(run(tiny(kernels="triton", save=tmp_path / "no")), 2, pattern)
    result = run([*tiny(nEpochs=1, save=tmp_path / "yes"), "-backend", "cudnn"])
    assert result.code == 0 and result.err.startswith("note: backend has no effect here")
