"""main.py: the program from its command line to its exit code, on synthetic data and the digits."""

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
import yaml

import checkpoints
from faults.contract import command, digests, outcome, records, refused, saved, status, tiny
from faults.sabotage import at_batch, kill, on_files, send
from helpers.run_main import ROOT, run

FLAGS = {"nEpochs": 3, "dropRate": 0.2, "keep": 9}
RESULT = r"top1: +(\d+\.\d{3})  top5: +(\d+\.\d{3})"


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A run with a validation set, whose best epoch is not its last."""
    return with_a_best_epoch(tmp_path_factory, validSize=8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The same without one: what is measured is what is logged."""
    return with_a_best_epoch(tmp_path_factory)


def with_a_best_epoch(tmp_path_factory, **flags) -> Path:
    for seed in range(20):
        directory = tmp_path_factory.mktemp(f"seed{seed}")
        assert run(tiny(**FLAGS, **flags, manualSeed=seed, save=directory)).code == 0
        verdict = status(directory)
        if verdict["best_top1"] < verdict["last_top1"]:
            return directory
    raise AssertionError("no seed has such a run")


def numbers(line: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair)) for pair in re.findall(RESULT, line)]


def errors(record: dict) -> tuple[float, float]:
    return round(record["val_top1"], 3), round(record["val_top5"], 3)


# -------------------------------------------------------------------------------- what a run leaves


def test_a_run_directory_holds_the_run(tmp_path):
    assert run(tiny(**FLAGS | {"keep": 2}, save=tmp_path)).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock", "config.yaml", "data.json", "status.json", "log.jsonl", "tensorboard",
        "model_last.pt", "model_best.pt", "checkpoint_000000008.pt", "checkpoint_000000012.pt",
    }  # fmt: skip
    facts = json.loads((tmp_path / "data.json").read_text())
    assert facts["classes"] == ["pattern 0", "pattern 1", "pattern 2"]
    assert (facts["train"], facts["val"], facts["test"]) == (32, 6, None)


def test_the_last_line_has_the_errors_of_the_last_epoch_and_the_best(complete):
    argv = [f"--config={complete}/config.yaml", f"--save={complete}2"]
    line = run(argv).out.splitlines()[-1]
    log = records(complete)
    best = min(log, key=lambda record: (record["val_top1"], record["epoch"]))
    assert re.fullmatch(rf" \* Finished {RESULT}  \(last: epoch 3\)   {RESULT}  "
                        rf"\(best: epoch {best['epoch']}\)", line)  # fmt: skip
    assert numbers(line) == [errors(log[-1]), errors(best)]
    assert numbers(line)[0] != numbers(line)[1]


def test_the_models_are_those_of_the_last_epoch_and_the_best(complete):
    best = status(complete)["best_epoch"]
    for name, epoch in (("model_last.pt", 3), ("model_best.pt", best)):
        weights = torch.load(complete / name, weights_only=True)
        state = checkpoints.load(complete / f"checkpoint_{3 * epoch:09d}.pt")
        assert digests(weights) == digests(state["model"])
        other = checkpoints.load(complete / f"checkpoint_{3 * (epoch % 3 + 1):09d}.pt")
        assert digests(weights) != digests(other["model"])


def test_the_status_says_that_the_run_is_done_and_how(complete):
    verdict, log = status(complete), records(complete)
    assert (verdict["state"], verdict["code"], verdict["epoch"]) == ("done", 0, 3)
    assert verdict["checkpoint"] == "checkpoint_000000009.pt"
    assert verdict["last_top1"] == log[-1]["val_top1"]
    assert verdict["best_top1"] == min(record["val_top1"] for record in log)


def test_the_config_of_a_run_reruns_it(complete, tmp_path):
    config = complete / "config.yaml"
    assert run(command(config=config, save=tmp_path / "again")).code == 0
    assert outcome(tmp_path / "again") == outcome(complete)
    assert (tmp_path / "again" / "config.yaml").read_text() == config.read_text()
    other = command(config=config, save=tmp_path / "other", LR=0.2)  # the command line wins
    assert run(other).code == 0
    assert outcome(tmp_path / "other")["weights"] != outcome(complete)["weights"]


def test_the_test_set_is_measured_once_with_the_best_model(complete, tmp_path):
    lines = run(command(config=complete / "config.yaml", save=tmp_path)).out.splitlines()
    tested = [line for line in lines if line.startswith(" * Test ")]
    assert len(tested) == 1 and lines.index(tested[0]) == len(lines) - 2
    best = status(complete)["best_epoch"]
    assert tested[0].endswith(f"(best model, epoch {best})")
    verdict = status(tmp_path)
    assert numbers(tested[0]) == [(round(verdict["test_top1"], 3), round(verdict["test_top5"], 3))]


def test_without_a_validation_set_there_is_no_line_of_a_test_set(tmp_path):
    result = run(tiny(nEpochs=1, save=tmp_path))
    assert " * Test " not in result.out and "test_top1" not in status(tmp_path)


def test_the_digits_are_learnt(tmp_path):
    network = {"dataset": "digits", "depth": 10, "growthRate": 6, "dropRate": 0}
    assert run(command(**network, nEpochs=2, milestones=2, save=tmp_path)).code == 0
    first, last = records(tmp_path)
    assert last["val_top1"] < 50 and last["train_loss"] < first["train_loss"]
    assert json.loads((tmp_path / "data.json").read_text())["train"] == 1437


def test_the_default_directory_is_named_after_the_run(tmp_path):
    assert run(tiny(nEpochs=1, manualSeed=7), partial(os.chdir, tmp_path)).code == 0
    (made,) = (tmp_path / "checkpoints").iterdir()
    assert made.name == "synthetic-densenet-BC-L10-k2-seed7"


# -------------------------------------------------------------------------------------- test only


def test_only_testing_gives_the_errors_of_the_weights_and_writes_nothing(plain, tmp_path):
    before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}
    log = {record["epoch"]: record for record in records(plain)}
    best = status(plain)["best_epoch"]
    settings = tiny(manualSeed=yaml.safe_load((plain / "config.yaml").read_text())["manualSeed"])
    save = f"--save={tmp_path / 'run'}"
    for argv, epoch in (
        (command(resume=plain), 3),
        (command(resume=plain / f"checkpoint_{4 * best:09d}.pt"), best),
        ([*settings, save, f"--retrain={plain / 'model_last.pt'}"], 3),
        ([*settings, save, f"--retrain={plain / 'model_best.pt'}"], best),
    ):
        result = run([*argv, "--testOnly=true"])
        assert result.code == 0, result
        line = result.out.splitlines()[-1]
        assert re.fullmatch(rf" \* Results {RESULT}", line)
        assert numbers(line) == [errors(log[epoch])]
    assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "run").exists()


def test_only_testing_uses_the_test_set_where_there_is_one(complete, tmp_path):
    verdict = status(complete)
    argv = command(
        resume=complete / f"checkpoint_{3 * verdict['best_epoch']:09d}.pt", testOnly=True
    )
    (found,) = numbers(run(argv).out.splitlines()[-1])
    assert found == (round(verdict["test_top1"], 3), round(verdict["test_top5"], 3))


def test_only_testing_a_run_in_progress_is_not_upset_by_its_retention(plain, tmp_path):
    directory = shutil.copytree(plain, tmp_path / "run")
    gone = partial(os.unlink, directory / "checkpoint_000000012.pt")
    retention = partial(on_files, gone, directory, operation="open", name="checkpoint")
    result = run(command(resume=directory, testOnly=True), retention)
    assert result.code == 0, result
    assert numbers(result.out) == [errors(records(plain)[1])]


@pytest.mark.parametrize(
    ("flags", "code", "pattern"),
    [
        ({}, 2, r"testOnly without weights.*; fix: add --resume DIR or --retrain FILE"),
        ({"resume": "auto"}, 4, r"no checkpoint in .*run; fix: "),
        ({"retrain": "nothing.pt"}, 4, r"no such file: nothing.pt; fix: "),
    ],
)
def test_only_testing_needs_weights(tmp_path, flags, code, pattern):
    refused(run(tiny(testOnly=True, save=tmp_path / "run", **flags)), code, pattern)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------- resuming


def test_a_directory_alone_continues_with_the_settings_of_its_run(complete, tmp_path):
    directory = tmp_path / "run"
    argv = command(config=complete / "config.yaml", save=directory)
    assert run(argv, partial(at_batch, partial(send, 15), 4)).code == 75
    assert status(directory)["state"] == "preempted"
    assert run(command(resume=directory)).code == 0
    assert outcome(directory) == outcome(complete)


def test_the_remedy_that_a_stopped_run_names_is_one(complete, tmp_path):
    """The command line that began the run may not be at hand, nor have been all flags."""
    directory = tmp_path / "run"
    argv = command(config=complete / "config.yaml", save=directory)
    for _ in range(2):
        result = run(argv, partial(at_batch, partial(send, 15), 2))
        assert result.code == 75
        argv = re.search(r"to go on: .*(--resume \S+)", result.err)[1].split()
        assert argv == ["--resume", str(directory)]
    assert run(argv).code == 0
    assert outcome(directory) == outcome(complete)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_checkpoint_continues_elsewhere_and_leaves_its_own_run_alone(complete, tmp_path, number):
    before = saved(complete)
    source = complete / f"checkpoint_{3 * number:09d}.pt"
    result = run(command(resume=source, save=tmp_path))
    assert result.code == 0, result
    there, here = outcome(complete), outcome(tmp_path)
    assert here["weights"] == there["weights"] and here["results"] == there["results"]
    assert here["best"] == there["best"]  # also when the best epoch is before the checkpoint
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


# ------------------------------------------------------------------------------------- retraining


STILL = {"LR": 1e-30, "momentum": 0, "weightDecay": 0, "nEpochs": 1}


def parameters(path: Path) -> dict[str, str]:
    """Digests of the weights without BN's running statistics, which move at any learning rate."""
    found = digests(checkpoints.load_weights(path))
    return {name: digest for name, digest in found.items() if "running" not in name
            and "num_batches" not in name}  # fmt: skip


def test_retraining_begins_with_the_weights_at_the_first_epoch(plain, tmp_path):
    for source in (plain / "model_last.pt", plain / "checkpoint_000000012.pt"):
        directory = tmp_path / source.stem
        assert run(tiny(**STILL, manualSeed=99, retrain=source, save=directory)).code == 0
        assert parameters(directory / "model_last.pt") == parameters(plain / "model_last.pt")
        assert [record["epoch"] for record in records(directory)] == [1]
    assert run(tiny(**STILL, manualSeed=99, save=tmp_path / "fresh")).code == 0
    assert parameters(tmp_path / "fresh" / "model_last.pt") != parameters(plain / "model_last.pt")


def test_a_fine_tuned_run_has_a_new_classifier_and_can_be_resumed(plain, tmp_path):
    source = tmp_path / "weights.pt"
    source.write_bytes((plain / "model_last.pt").read_bytes())
    flags = {**STILL, "nClasses": 5, "retrain": source}
    refused(
        run(tiny(**flags, save=tmp_path / "no")), 4, r"classifier.*; fix: add --resetClassifier"
    )
    argv = tiny(**flags, resetClassifier=True, save=tmp_path / "run")
    assert run(argv, partial(at_batch, partial(send, 15), 2)).code == 75
    source.unlink()  # what it began with is needed no more
    assert run(command(resume=tmp_path / "run")).code == 0
    old, new = parameters(plain / "model_last.pt"), parameters(tmp_path / "run" / "model_last.pt")
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_weights_of_another_network_are_named(plain, tmp_path):
    result = run(tiny(depth=16, nEpochs=1, retrain=plain / "model_last.pt", save=tmp_path))
    pattern = r"weights do not fit the network: .* is missing; .*\d+ in all; fix: give the flags"
    refused(result, 4, pattern)


# ------------------------------------------------------------------------------- the command line


def test_the_resolved_settings_are_printed_as_a_config(tmp_path):
    here = partial(os.chdir, tmp_path)
    text = run("-depth 40 -bottleneck false -printConfig", here).out
    settings = yaml.safe_load(text)
    assert (settings["depth"], settings["bottleneck"]) == (40, False)
    assert (settings["initChannels"], settings["milestones"]) == (16, [150, 225])
    (tmp_path / "c.yaml").write_text(text)
    assert run("--config c.yaml --printConfig true", here).out == text
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_help_is_an_answer():
    result = run("--help")
    assert (result.code, result.err) == (0, "") and "--growthRate" in result.out


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--printConfig"], 0),
        (["--depth", "11"], 2),
        (["--nGPU", "3"], 2),
        (["--resume", "nowhere"], 4),
        (["--dataset", "folder", "--data", "nowhere"], 3),
        (["--save", "main.py/run"], 6),
    ],
)
def test_what_needs_no_torch_is_answered_without_it(argv, code):
    """In a process of its own, as a person starts it."""
    lines = (
        "import sys, main",
        "try: code = main.main(sys.argv[1:])",
        "except SystemExit as ended: code = ended.code",
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL'} & sys.modules.keys()",
        "sys.exit(f'imported {heavy}' if heavy else code)",
    )
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr


def test_the_program_starts_as_the_readme_says():
    ended = subprocess.run(
        [sys.executable, "main.py", "-depth", "41"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: depth: 41 is not 6n + 4 (with bottleneck); fix: use 40 or 46\n"


def test_debug_shows_where_an_error_comes_from(tmp_path):
    argv = tiny(nGPU=99, batchSize=99, save=tmp_path / "run")
    quiet, loud = run(argv), run([*argv, "--debug=true"])
    refused(quiet, 2, "nGPU=99 but ")
    assert loud.code == 2 and "Traceback" in loud.err and loud.err.endswith(quiet.err)


def bug() -> None:
    import datasets.factory

    datasets.factory.create = None


def test_a_bug_keeps_its_traceback(tmp_path):
    result = run(tiny(save=tmp_path), bug)
    assert result.code == 1 and "TypeError" in result.err


def test_remarks_are_no_errors(tmp_path):
    argv = [*tiny(nEpochs=1, save=tmp_path), "-backend", "cudnn", "-shareGradInput", "true"]
    result = run(argv)
    assert result.code == 0
    assert all(line.startswith("note: ") for line in result.err.splitlines())
    assert "note: backend has no effect here" in result.err
    assert "note: shareGradInput is optMemory 2 here" in result.err


def test_kernels_that_cannot_run_are_refused_and_plain_ones_remarked_on_only_on_a_gpu(tmp_path):
    pattern = r"kernels triton: there is no CUDA device; fix: use --kernels auto"
    refused(run(tiny(kernels="triton", save=tmp_path / "no")), 2, pattern)
    outcomes = []
    for wish in ("auto", "torch"):
        result = run(tiny(nEpochs=1, kernels=wish, save=tmp_path / wish))
        assert (result.code, result.err) == (0, "")
        outcomes.append(outcome(tmp_path / wish))
    assert outcomes[0] == outcomes[1]
