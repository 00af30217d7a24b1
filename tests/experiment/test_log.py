"""Test experiment/log.py: the log of a run on the console, in log.jsonl and in TensorBoard."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine.device
import experiment
from engine.metrics import Metrics
from errors import printable, quoted
from experiment import console
from experiment.log import EpochRecord, RunLog, read_log
from faults import sabotage
from faults.contract import tiny
from helpers.run_main import Ranks, run
from helpers.terminal import on_a_terminal


def record(epoch: int, **more) -> EpochRecord:
    return EpochRecord(
        **{
            "epoch": epoch, "lr": 0.1, "train_loss": 2.0 / epoch, "train_top1": 50.0,
            "train_top5": 5.0, "images_per_s": 100.0, "data_wait": 0.01, "time_s": 3.0,
            "val_loss": 2.5 / epoch, "val_top1": 60.0 / epoch, "val_top5": 6.0, "val_time_s": 0.5,
            "memory_mb": 300.0, "device": "CPU", "replicas": 1, "torch": "2.11", **more,
        }
    )  # fmt: skip


def written(directory: Path, *epochs: int, next_epoch: int = 1, **more) -> RunLog:
    """Write a log with the records of some epochs."""
    log = RunLog(directory)
    log.open(next_epoch)
    for epoch in epochs:
        log.epoch(record(epoch, **more), is_best=False)
    return log


def board(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"images": 0})
    return events.Reload()


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Return the directory and the output of a run of two epochs."""
    directory = tmp_path_factory.mktemp("logged")
    return directory, run(tiny(nEpochs=2, milestones=2, save=directory))


# Log.jsonl:
def test_a_run_logs_every_column_of_every_epoch_its_images_and_its_config(logged):
    directory, _ = logged
    first, second = read_log(directory)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    for line in (first, second):
        assert list(line) == [field.name for field in fields(EpochRecord)]
        device = engine.device.describe(torch.device("cpu"))
        assert (line.pop("device"), line.pop("torch")) == (device, torch.__version__)
        assert all(isinstance(value, int | float) for value in line.values())
        assert 0 <= line["train_top5"] <= line["train_top1"] <= 100
        assert line["images_per_s"] > 0 and line["time_s"] > 0
    events = board(directory)
    assert {"loss/train", "run/lr", "final/last_top1"} <= set(events.Tags()["scalars"])
    assert len(events.Images("augmented training images")) == 1
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert (directory / "config.yaml").read_text() in text


def test_a_number_that_is_not_finite_is_null(tmp_path):
    written(tmp_path, 1, train_loss=math.nan, val_loss=math.inf, val_top1=-math.inf)
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line == asdict(record(1)) | dict.fromkeys(["train_loss", "val_loss", "val_top1"])


CUT_OFF = [b'{"epoch": 3, "lr', b"{", b'{"epoch": 3}garbage', b"\0\0\0", b"\xff\xfe", b"{}"]


@pytest.mark.parametrize("rest", CUT_OFF)
def test_a_torn_last_line_is_cut_where_a_run_resumes(tmp_path, rest):
    assert read_log(tmp_path) == []
    written(tmp_path, 1, 2)
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    for content in (whole + rest, whole[:-1]):  # the last line may lack its end and be whole
        path.write_bytes(content)
        assert [line["epoch"] for line in read_log(tmp_path)] == [1, 2]
        written(tmp_path, 3, next_epoch=3)
        assert read_log(tmp_path) == [asdict(record(epoch)) for epoch in (1, 2, 3)]
    written(tmp_path, next_epoch=2)
    assert read_log(tmp_path) == [asdict(record(1))]


# What a disk, an editor or a person may do to a line; how many records are read where it stood;
# whether a note says so.
DAMAGE = {
    "blank": (lambda line: b"", 0, False),
    "a blank line before it": (lambda line: b"\n" + line, 1, False),
    "end of lines of Windows": (lambda line: line + b"\r", 1, False),
    "zeros of a power cut": (lambda line: bytes(64), 0, True),
    "zeros before it": (lambda line: bytes(64) + line, 1, False),
    "cut": (lambda line: line[:-9], 0, True),
    "two records in one line": (lambda line: line + line, 0, True),
    "no UTF-8": (lambda line: line.replace(b"CPU", b"CP\xff"), 1, False),
    "a list": (lambda line: b"[1]", 0, True),
    "an epoch in words": (lambda line: line.replace(b": 2,", b': "two",', 1), 0, True),
    "true for its epoch": (lambda line: line.replace(b": 2,", b": true,", 1), 0, True),
    "a damaged epoch": (lambda line: line.replace(b": 2,", b": 7,", 1), 1, False),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("is_last", [False, True])
def test_a_damaged_line_of_the_log_is_kept_with_all_others(tmp_path, capsys, damage, is_last):
    """Resume at epoch 5 or 3, of which the log has a record already, after damage to epoch 2's."""
    change, num_read, is_noted = DAMAGE[damage]
    epochs = (1, 2) if is_last else (1, 2, 3, 4)
    written(tmp_path, *epochs)
    path = tmp_path / "log.jsonl"
    first, second, *rest = path.read_bytes().splitlines()
    kept = b"\n".join([first, change(second), *rest, b""])
    resumed = epochs[-1] + 1
    ahead = json.dumps(asdict(record(resumed))).encode() + b"\n"
    contents = [kept, kept + ahead[:-9]]
    if not (is_last and damage == "a damaged epoch"):  # or nothing tells which is ahead
        contents.append(kept + ahead)
    for content in contents:
        path.write_bytes(content)
        capsys.readouterr()
        written(tmp_path, next_epoch=resumed)
        assert path.read_bytes() == kept
        number = 3 if damage == "a blank line before it" else 2
        note = f"note: {path}: cannot read line {number}; kept as it is\n"
        assert capsys.readouterr().err == (note if is_noted else "")
    assert len(read_log(tmp_path)) == len(epochs) - 1 + num_read


def test_a_log_that_stays_is_not_written_again(tmp_path):
    written(tmp_path, 1, 2)
    before = (tmp_path / "log.jsonl").stat()
    written(tmp_path, next_epoch=3)
    assert (tmp_path / "log.jsonl").stat().st_ino == before.st_ino  # no other file in its place


def test_a_full_disk_for_the_log_alone_is_reported_once_and_stops_nothing(tmp_path, capsys):
    log = written(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    for epoch in (1, 2, 3):
        log.epoch(record(epoch), is_best=epoch == 2)
    printed = capsys.readouterr()
    assert printed.err.count("note: cannot write") == 1
    assert "No space left on device" in printed.err
    assert printed.out.count("Finished epoch") == 3 and printed.out.count("best so far") == 1


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk; capsys must hold the outputs."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def test_a_line_cut_by_a_full_disk_leaves_later_ones_whole(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")  # it would meet the limit as well
    log = written(tmp_path, 1)
    with limited_file_size((tmp_path / "log.jsonl").stat().st_size + 20):
        log.epoch(record(2), is_best=False)
    log.epoch(record(3), is_best=False)
    assert read_log(tmp_path) == [asdict(record(1)), asdict(record(3))]


# TensorBoard:
def test_tensorboard_gets_a_run_with_each_epoch_once(tmp_path):
    written(tmp_path, 1, 2, 3, train_loss=9.0)
    log = written(tmp_path, 2, 3, next_epoch=2)  # resumed in the second
    log.add_text(config="depth: 10\n", device="CPU")
    log.add_images(torch.rand(70, 3, 8, 8))
    log.add_images(torch.rand(0, 3, 8, 8))  # every image of the batch was skipped
    log.close({"depth": 10, "milestones": [1, 2]}, {"last_top1": 30.0, "last_epoch": 3})
    events = board(tmp_path)
    wanted = {"loss/train": [9.0, 1.0, 2 / 3], "error_top1/val": [60.0, 30.0, 20.0],
              "error_top5/train": [5.0, 5.0, 5.0], "run/lr": [0.1, 0.1, 0.1]}  # fmt: skip
    for name, values in wanted.items():
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(epoch, pytest.approx(value)) for epoch, value in enumerate(values, 1)]
    assert events.Scalars("final/last_top1")[0].value == 30.0
    assert "final/last_epoch" not in events.Tags()["scalars"]
    (image,) = events.Images("augmented training images")
    assert (image.width, image.height) == (8 * (8 + 2) + 2,) * 2  # 64 of them, 2 pixels between
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"milestones" in hparams and b"1,2" in hparams


def matrix(directory: Path, phase: str = "val") -> tuple[list[int], int, str]:
    """Return the errors of each class in TensorBoard's table, the epoch, and the class of most."""
    events = board(directory)
    (picture,) = events.Images(f"confusion matrix/{phase}")
    assert picture.width == 1120  # 8 inches
    (table,) = events.Tensors(f"errors by class/{phase}/text_summary")
    lines = table.tensor_proto.string_val[0].decode().splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert picture.step == table.step
    return [int(cell[2]) for cell in cells], table.step, cells[0][0]


def test_tensorboard_gets_the_confusions_of_the_evaluation_that_ends_a_run(logged, tmp_path):
    directory, _ = logged
    errors, epoch, _ = matrix(directory)
    assert errors == sorted(errors, reverse=True) and len(errors) == 3 and epoch == 2
    images = json.loads((directory / "data.json").read_text())["val"]
    assert 100 * sum(errors) / images == pytest.approx(read_log(directory)[-1]["val_top1"])
    # The test set, if it was kept for the end, of the model that is tested; over two processes.
    (result, _) = Ranks(tiny(nEpochs=1, validSize=8, save=tmp_path), 2).wait()
    assert result.code == 0, result.err
    errors, epoch, _ = matrix(tmp_path, "test")
    (tested,) = re.findall(r"Test top1: +(\S+)", result.out)
    images = json.loads((tmp_path / "data.json").read_text())["test"]
    assert f"{100 * sum(errors) / images:.3f}" == tested and epoch == 1


def test_a_run_whose_end_was_lost_has_its_confusions_when_it_is_resumed(logged, tmp_path):
    directory, _ = logged
    copy = Path(shutil.copytree(directory, tmp_path / "run"))
    shutil.rmtree(copy / "tensorboard")
    (copy / "status.json").unlink()
    ended = run(tiny(nEpochs=2, milestones=2, save=copy, resume=copy))
    assert ended.code == 0 and re.findall(r"Test: \[(\d+)\]", ended.out) == ["2"]
    assert matrix(copy) == matrix(directory)


def test_a_matplotlib_that_is_broken_stops_nothing(tmp_path, monkeypatch, capsys):
    log, metrics = written(tmp_path), Metrics(torch.device("cpu"), 2)
    metrics.add(torch.tensor(0.5), LOGITS, TARGETS)
    monkeypatch.delattr(experiment, "drawing", raising=False)
    monkeypatch.setitem(sys.modules, "experiment.drawing", None)
    log.confusion(metrics, ["a", "b"], "val", 1)
    log.confusion(Metrics(torch.device("cpu")), ["a", "b"], "val", 1)  # too many classes to count
    log.close({"depth": 10}, {"last_top1": 1.0})
    assert capsys.readouterr().err.count("note: no confusion matrix in TensorBoard") == 1
    tags = board(tmp_path).Tags()
    assert "final/last_top1" in tags["scalars"] and not tags["images"]
    assert "errors by class/val/text_summary" in tags["tensors"]


def test_a_tensorboard_that_cannot_be_made_stops_nothing(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    log = written(tmp_path, 1)
    log.add_text(config="depth: 10")
    log.add_images(torch.rand(2, 3, 8, 8))
    log.close({}, {})
    assert capsys.readouterr().err.count("note: no TensorBoard") == 1
    assert read_log(tmp_path) == [asdict(record(1))]


def test_a_full_disk_for_tensorboard_stops_nothing(tmp_path, capsys):
    log = written(tmp_path, 1)
    with limited_file_size((tmp_path / "log.jsonl").stat().st_size):
        for epoch in range(2, 6):
            log.epoch(record(epoch), is_best=False)
        log.add_text(config="x")
        log.add_images(torch.rand(2, 3, 8, 8))
        log.close({"depth": 10}, {"last_top1": 1.0})
    printed = capsys.readouterr()
    assert printed.err.count("note: no TensorBoard from here on") == 1
    assert printed.out.count("Finished epoch") == 5


# Console:
LOGITS, TARGETS = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])


def progress(steps: int, name: str = "train", lr: float | None = 0.1, of_all=None) -> None:
    """Show a pass in which every second image is wrong; `of_all`: the metrics of all replicas."""
    metrics = Metrics(torch.device("cpu"))
    with RunLog(None).progress(name, 7, steps, 0, metrics) as shown:
        for _ in range(steps):
            metrics.add(torch.tensor(0.5), LOGITS, TARGETS)
            shown.update(2, 0.0, lr)
        shown.finish(of_all or metrics, lr)


def test_outside_a_terminal_a_pass_is_its_last_line_or_a_line_when_it_is_due(capsys, monkeypatch):
    progress(5)
    title, line = capsys.readouterr().out.splitlines()
    assert title == "=> Training epoch # 7"
    pattern = (
        r" \| Epoch: \[7\]\[5/5\]    Time \d+\.\d{3}  Data \d+\.\d{3}  Err 0\.5000"
        r"  top1  50\.000  top5   0\.000  LR 0\.1"
    )
    assert re.fullmatch(pattern, line)
    progress(3, "val", None)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(" | Test: [7][3/3]    Time ") and "LR" not in line

    monkeypatch.setitem(console.SHOW_EVERY_S, False, 0.0)
    progress(5)
    _, *lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"\[7\]\[(\d)/5\]", line)[1] for line in lines] == list("12345")


def test_the_last_line_of_a_pass_is_of_all_replicas(capsys):
    of_all = Metrics(torch.device("cpu"))
    of_all.add(torch.tensor(0.25), LOGITS[:1], TARGETS[:1])
    progress(1, "val", None, of_all)
    assert "Err 0.2500  top1   0.000" in capsys.readouterr().out


def test_a_process_that_is_not_the_first_prints_nothing(capsys, monkeypatch):
    monkeypatch.setattr(console, "_silenced", False)  # put back after the test
    monkeypatch.setitem(console.SHOW_EVERY_S, False, 0.0)
    notes = "note: the sea is wet\\n\nnote: it was; training goes on\n"
    for want in (notes, ""):
        console.warn("the sea is wet\n")
        console.info("it is")
        RunLog(None).warn_once("it was")
        progress(5)
        printed = capsys.readouterr()
        assert printed.err == want and bool(printed.out) == bool(want)
        console.silence()


def test_outside_a_terminal_there_are_no_control_codes(logged):
    _, result = logged
    assert (result.code, result.err) == (0, "")
    assert all(c.isprintable() or c == "\n" for c in result.out)
    assert max(map(len, result.out.splitlines())) < 140


def test_on_a_terminal_there_is_a_bar_with_loss_error_speed_and_time_left(tmp_path):
    shown = run(tiny(nImages=400, nEpochs=2, save=tmp_path), on_a_terminal).out
    assert "epoch 1 train" in shown and "epoch 1 val" in shown
    assert re.search(
        r"epoch 1 train: .*\d+/50 \[\d\d:\d\d<\S+, .*loss=\d\.\d+, error=[\d.]+%", shown
    )
    assert re.search(r"images/s=\d+", shown)
    assert "=> Training epoch" not in shown and "| Epoch:" not in shown
    assert shown.count(" * Finished epoch #") == 2


def test_a_closed_output_does_not_end_a_run(tmp_path):
    assert run(tiny(nEpochs=2, save=tmp_path), sabotage.close_pipes).code == 0
    assert len(read_log(tmp_path)) == 2


def test_the_results_are_labelled():
    last = {"epoch": 3, "val_top1": 30.0, "val_top5": 3.0}
    best = {"epoch": 2, "val_top1": 29.0, "val_top5": 4.0}
    assert console.format_final(last, best) == (
        " * Finished top1: 30.000  top5:  3.000  (last: epoch 3)"
        "   top1: 29.000  top5:  4.000  (best: epoch 2)"
    )
    assert "(best: none)" in console.format_final(last, None)
    tested = console.format_test({"test_top1": 1.5, "test_top5": 0.5}, "best model, epoch 2")
    assert tested == " * Test top1:  1.500  top5:  0.500  (best model, epoch 2)"


@pytest.mark.parametrize("name", [
    "plain", "my run", "it's $HOME & more", "line\nbreak", "\x1b[31m'\\ \n", "\udcff\n", "é\tx", "",
])  # fmt: skip
def test_a_shell_reads_a_quoted_path_as_it_is(name):
    printed = subprocess.run(["bash", "-c", f"printf %s {quoted(name)}"], capture_output=True)
    assert printed.stdout == os.fsencode(name)
    assert printable(quoted(name)) == quoted(name)  # so that it is one line
