"""experiment/log.py: the log of a run on the console, in log.jsonl and in TensorBoard."""

import json
import math
import multiprocessing
import os
import re
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine.device
from engine.metrics import Metrics
from experiment import console
from experiment.log import EpochRecord, RunLog, read_log
from faults import sabotage
from faults.contract import tiny
from helpers.run_main import run
from helpers.terminal import on_a_terminal

REQUIRED = {"epoch", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1",
            "val_top5", "images_per_s", "time_s", "val_time_s", "replicas"}  # fmt: skip


def record(epoch: int, **more) -> EpochRecord:
    return EpochRecord(
        **{
            "epoch": epoch, "lr": 0.1, "train_loss": 2.0 / epoch, "train_top1": 50.0,
            "train_top5": 5.0, "images_per_s": 100.0, "data_wait": 0.01, "time_s": 3.0,
            "val_loss": 2.5 / epoch, "val_top1": 60.0 / epoch, "val_top5": 6.0, "val_time_s": 0.5,
            "memory_mb": 300.0, "device": "CPU", "replicas": 1, "torch": "2.11", **more,
        }
    )  # fmt: skip


def line(epoch: int, **more) -> dict:
    """The same as it is read back."""
    return asdict(record(epoch, **more))


@pytest.fixture
def log(tmp_path) -> RunLog:
    log = RunLog(tmp_path)
    log.open(next_epoch=1)
    return log


def board(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"images": 0})
    return events.Reload()


# -------------------------------------------------------------------------------------- log.jsonl


def test_an_epoch_is_one_json_object_on_a_line(log, tmp_path):
    log.epoch(record(1), is_best=True)
    log.epoch(record(2), is_best=False)
    first, second = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(first) == line(1) and json.loads(second) == line(2)
    assert read_log(tmp_path) == [line(1), line(2)]


def test_a_run_logs_every_key_of_every_epoch(tmp_path):
    assert run(tiny(nEpochs=2, save=tmp_path)).code == 0
    first, second = read_log(tmp_path)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    for line in (first, second):
        assert line.keys() >= REQUIRED
        words = {key: line.pop(key) for key in ("device", "torch")}
        device = engine.device.describe(torch.device("cpu"))
        assert words == {"device": device, "torch": torch.__version__}
        assert all(isinstance(value, int | float) for value in line.values())
        assert 0 <= line["train_top5"] <= line["train_top1"] <= 100
        assert line["images_per_s"] > 0 and line["time_s"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(log, tmp_path, value):
    log.epoch(record(1, val_loss=value), is_best=False)
    text = (tmp_path / "log.jsonl").read_text()
    assert not re.search("nan|inf", text, re.IGNORECASE)
    assert json.loads(text)["val_loss"] is None


def test_a_resumed_run_cuts_the_log_back_to_where_it_goes_on(log, tmp_path):
    for epoch in (1, 2, 3):
        log.epoch(record(epoch), is_best=False)
    RunLog(tmp_path).open(next_epoch=2)
    assert read_log(tmp_path) == [line(1)]


def test_a_fresh_run_starts_an_empty_log(log, tmp_path):
    assert (tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.parametrize("rest", ['{"epoch": 3, "lr', "{", '{"epoch": 3}garbage', "\0\0\0"])
def test_a_last_line_that_a_crash_cut_off_is_dropped(log, tmp_path, rest):
    log.epoch(record(1), is_best=False)
    log.epoch(record(2), is_best=False)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(rest)
    assert [line["epoch"] for line in read_log(tmp_path)] == [1, 2]
    again = RunLog(tmp_path)
    again.open(next_epoch=3)
    again.epoch(record(3), is_best=False)
    assert read_log(tmp_path) == [line(1), line(2), line(3)]


def test_a_whole_last_line_without_its_end_is_kept(log, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(line(1)))
    again = RunLog(tmp_path)
    again.open(next_epoch=2)
    again.epoch(record(2), is_best=False)
    assert read_log(tmp_path) == [line(1), line(2)]


def test_a_missing_log_has_no_records(tmp_path):
    assert read_log(tmp_path) == []


def test_a_full_disk_for_the_log_alone_is_said_once_and_stops_nothing(log, tmp_path, capsys):
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    for epoch in (1, 2, 3):
        log.epoch(record(epoch), is_best=False)
    printed = capsys.readouterr()
    assert printed.err.count("note: cannot write") == 1
    assert "No space left on device" in printed.err
    assert printed.out.count("Finished epoch") == 3


def test_a_line_that_a_full_disk_cut_off_spoils_no_later_one(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")  # it would meet the limit as well
    log = RunLog(tmp_path)
    log.open(next_epoch=1)
    log.epoch(record(1), is_best=False)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "log.jsonl").stat().st_size + 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        log.epoch(record(2), is_best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.epoch(record(3), is_best=False)
    assert read_log(tmp_path) == [line(1), line(3)]


# ------------------------------------------------------------------------------------ TensorBoard


def test_tensorboard_gets_every_number_of_an_epoch(log, tmp_path):
    log.epoch(record(1), is_best=True)
    log.epoch(record(2, val_loss=math.nan), is_best=False)
    log.close({"depth": 10}, {"last_top1": 30.0})
    scalars = {
        name: [(event.step, event.value) for event in board(tmp_path).Scalars(name)]
        for name in board(tmp_path).Tags()["scalars"]
    }
    assert scalars["loss/train"] == [(1, 2.0), (2, 1.0)]
    assert scalars["loss/val"][0] == (1, 2.5) and math.isnan(scalars["loss/val"][1][1])
    assert scalars["error_top1/val"] == [(1, 60.0), (2, 30.0)]
    assert scalars["error_top5/train"] == [(1, 5.0), (2, 5.0)]
    assert scalars["run/lr"] == [(1, pytest.approx(0.1)), (2, pytest.approx(0.1))]
    for name in ("images_per_s", "data_wait", "memory_mb", "time_s"):
        assert len(scalars[f"run/{name}"]) == 2


def test_tensorboard_gets_images_texts_and_settings_with_the_final_errors(log, tmp_path):
    log.add_text(config="depth: 10\n", device="CPU")
    log.add_images(torch.rand(70, 3, 8, 8))
    log.close({"depth": 10, "milestones": [1, 2], "data": "x"}, {"last_top1": 30.0, "best_top1": 2})
    events = board(tmp_path)
    (image,) = events.Images("augmented training images")
    assert (image.width, image.height) == (8 * (8 + 2) + 2,) * 2  # 64 of them, 2 pixels between
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "depth: 10" in text
    plugins = events.summary_metadata
    assert "_hparams_/session_start_info" in plugins
    assert b"milestones" in plugins["_hparams_/session_start_info"].plugin_data.content
    assert events.Scalars("final/last_top1")[0].value == 30.0
    assert events.Scalars("final/best_top1")[0].value == 2.0


def test_a_run_shows_its_images_and_its_config(tmp_path):
    assert run(tiny(nEpochs=1, save=tmp_path)).code == 0
    events = board(tmp_path)
    assert len(events.Images("augmented training images")) == 1
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert (tmp_path / "config.yaml").read_text() in text
    assert {"loss/train", "error_top1/val", "run/lr", "final/last_top1"} <= set(
        events.Tags()["scalars"]
    )


def test_tensorboard_shows_a_resumed_epoch_once(log, tmp_path):
    for epoch in (1, 2, 3):
        log.epoch(record(epoch, train_loss=9.0), is_best=False)
    again = RunLog(tmp_path)
    again.open(next_epoch=2)
    for epoch in (2, 3):
        again.epoch(record(epoch, train_loss=float(epoch)), is_best=False)
    again.close({}, {})
    seen = [(event.step, event.value) for event in board(tmp_path).Scalars("loss/train")]
    assert seen == [(1, 9.0), (2, 2.0), (3, 3.0)]


def test_a_tensorboard_that_cannot_be_made_stops_nothing(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    log = RunLog(tmp_path)
    log.open(next_epoch=1)
    log.add_text(config="depth: 10")
    log.add_images(torch.rand(2, 3, 8, 8))
    log.epoch(record(1), is_best=False)
    log.close({}, {})
    assert capsys.readouterr().err.count("note: no TensorBoard") == 1
    assert read_log(tmp_path) == [line(1)]


def fill_up(directory: Path) -> None:
    """A log whose disk is full after its first records."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (else files with the limit)
    log = RunLog(directory)
    log.open(next_epoch=1)
    log.epoch(record(1), is_best=False)
    sabotage.limit_file_size((directory / "log.jsonl").stat().st_size)
    for epoch in range(2, 6):
        log.epoch(record(epoch), is_best=False)
    log.add_text(config="x")
    log.add_images(torch.rand(2, 3, 8, 8))
    log.close({"depth": 10}, {"last_top1": 1.0})
    os._exit(5)  # reached


def test_a_full_disk_for_tensorboard_stops_nothing(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=fill_up, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 5


# ---------------------------------------------------------------------------------------- console


def progress(steps: int, capsys, name: str = "train", lr: float | None = 0.1) -> str:
    metrics = Metrics(torch.device("cpu"))
    with RunLog(None).progress(name, 7, steps, 0, metrics) as shown:
        for _ in range(steps):
            metrics.add(
                torch.tensor(0.5), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])
            )
            shown.update(2, 0.0, lr)
        shown.finish(metrics, lr)
    return capsys.readouterr().out


def test_outside_a_terminal_an_epoch_has_a_title_and_its_last_line(capsys):
    title, line = progress(5, capsys).splitlines()
    assert title == "=> Training epoch # 7"
    pattern = (
        r" \| Epoch: \[7\]\[5/5\]    Time \d+\.\d{3}  Data \d+\.\d{3}  Err 0\.5000"
        r"  top1  50\.000  top5   0\.000  LR 0\.1"
    )
    assert re.fullmatch(pattern, line)


def test_a_validation_has_a_line_of_its_own(capsys):
    (line,) = progress(3, capsys, "val", None).splitlines()
    assert line.startswith(" | Test: [7][3/3]    Time ") and "LR" not in line


def test_a_line_is_printed_when_it_is_due(capsys, monkeypatch):
    monkeypatch.setitem(console.SHOW_EVERY_S, False, 0.0)
    lines = progress(5, capsys).splitlines()
    assert [re.search(r"\[7\]\[(\d)/5\]", line)[1] for line in lines[1:]] == list("12345")


def test_the_last_line_of_a_pass_is_of_all_replicas(capsys):
    own, of_all = Metrics(torch.device("cpu")), Metrics(torch.device("cpu"))
    logits, targets = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])
    own.add(torch.tensor(0.5), logits, targets)
    of_all.add(torch.tensor(0.25), logits[:1], targets[:1])
    with RunLog(None).progress("val", 7, 1, 0, own) as shown:
        shown.update(2, 0.0)
        shown.finish(of_all)
    (line,) = capsys.readouterr().out.splitlines()
    assert "Err 0.2500  top1   0.000" in line


def test_a_process_that_is_not_the_first_prints_nothing(capsys, monkeypatch):
    monkeypatch.setattr(console, "_silenced", False)  # put back after the test
    monkeypatch.setitem(console.SHOW_EVERY_S, False, 0.0)
    for is_silenced in (False, True):
        if is_silenced:
            console.silence()
        console.warn("the sea is wet")
        console.info("it is")
        RunLog(None).warn_once("it was")
        printed = progress(5, capsys)
        assert (printed == "") == is_silenced
    assert capsys.readouterr() == ("", "")


def test_outside_a_terminal_there_are_no_control_codes(tmp_path):
    result = run(tiny(nEpochs=2, save=tmp_path))
    assert result.err == ""
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
    result = run(tiny(nEpochs=2, save=tmp_path), sabotage.close_pipes)
    assert result.code == 0
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


def test_a_remark_goes_to_standard_error(capsys):
    console.warn("the sea is wet")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "note: the sea is wet\n")
