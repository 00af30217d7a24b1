"""Test tools.results: which directories are runs, the config and the measurement of each."""

import json
import math
import os

import pytest

from errors import DataError
from helpers.run_directories import record, write_run
from helpers.run_main import ROOT
from tools.results import runs
from tools.results.configs import comparable_settings, configs
from tools.results.runs import SeedGroup, group_runs

SMALL = "--config configs/small/densenet-L22-k12.yaml --data images"
SVHN = "--config configs/svhn/densenet-L40-k12.yaml"
IMAGENET = "--config configs/imagenet/densenet-121-k32.yaml"
OWN = "--dataset digits --depth 10 --growthRate 4 --nEpochs 2"
FIVE = [60.0, 50.0, 40.0, 30.0, 20.0]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def only(path) -> runs.Run:
    (run,) = runs.find([path])
    return run


# Its config:
@pytest.mark.parametrize(
    "flags, data, status, config",
    [
        (f"{SMALL} --manualSeed 7", {}, {}, "small/densenet-L22-k12"),
        # how a run is carried out does not matter
        (f"{SMALL} --nGPU 0", {}, {}, "small/densenet-L22-k12"),
        (f"{SMALL} --nThreads 7 --keep 5 --optMemory 4", {}, {}, "small/densenet-L22-k12"),
        (SMALL, {}, {"overrides": []}, "small/densenet-L22-k12"),
        (SMALL, {}, {"overrides": ["epoch 3: LR 0.1, was 0.2"]}, None),
        (f"{SMALL} --LR 0.2", {}, {}, None),
        (f"{SMALL} --precision bf16", {}, {}, None),
        (f"{SMALL} --dropRate 0.1", {}, {}, None),
        (f"{SMALL} --retrain weights.pt", {}, {}, None),
        (f"{SMALL} --epochNumber 2", {}, {}, None),
        # a few skipped images, a part of ImageNet, ten crops
        (IMAGENET, {"train": 1_281_100}, {}, "imagenet/densenet-121-k32"),
        (IMAGENET, {"train": 10_000}, {}, None),
        (f"{IMAGENET} --tenCrop true", {"train": 1_281_167}, {}, None),
    ],
)
def test_a_run_belongs_to_the_config_whose_settings_it_has(tmp_path, flags, data, status, config):
    write_run(tmp_path / "c10/densenet-L40-k12-seed0", flags, FIVE, data=data, status=status)
    assert only(tmp_path).config == config


def test_no_two_configs_have_the_same_settings():
    known = configs()
    assert {"c10plus/densenet-bc-L100-k12", "imagenet/resnet-50"} <= known.keys()
    assert len({comparable_settings(config.opt) for config in known.values()}) == len(known)


# Finding:
def test_runs_are_found_below_directories_each_once(tmp_path):
    for name in ("b/deep/er", "a"):
        write_run(tmp_path / "runs" / name, OWN, [9.0, 8.0])
    os.symlink(tmp_path / "runs" / "b", tmp_path / "runs" / "link")
    os.symlink(tmp_path / "runs", tmp_path / "runs" / "b" / "loop")
    found = runs.find([tmp_path / "runs", str(tmp_path / "runs" / "a"), tmp_path])
    assert [str(run.path.relative_to(tmp_path)) for run in found] == ["runs/a", "runs/b/deep/er"]
    (tmp_path / "empty").mkdir()
    assert runs.find([tmp_path / "empty"]) == []
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(DataError, match=rf"not a directory: .*{name}"):
            runs.find([tmp_path, tmp_path / name])


@pytest.mark.parametrize(
    "content, words",
    [
        (b"depth: [", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"newFlag: 3\n", "unknown flag newFlag"),
        (b"depth: 41\n", "depth: 41 is not 6n + 4"),
        (None, "config.yaml"),
    ],
)
def test_a_run_that_cannot_be_read_is_left_out_with_a_note(tmp_path, content, words, capsys):
    bad = write_run(tmp_path / "b\nad", OWN, [9.0, 8.0])
    write_run(tmp_path / "good", OWN, [9.0, 8.0])
    (bad / "config.yaml").unlink()
    if content is not None:
        (bad / "config.yaml").write_bytes(content)
    assert [run.path.name for run in runs.find([tmp_path])] == ["good"]
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: {tmp_path}/b\\nad is left out: ") and words in note


@pytest.mark.parametrize("name", ["status.json", "data.json", "log.jsonl"])
@pytest.mark.parametrize("content", [b"\x80{[", b"[1, 2]\n", b"{}", b"", b"[" * 99_999])
def test_a_run_with_a_damaged_file_is_incomplete_or_of_unknown_data(tmp_path, name, content):
    path = write_run(tmp_path / "run", SMALL, FIVE)
    (path / name).write_bytes(content)
    run = only(tmp_path)
    assert run.config == "small/densenet-L22-k12"
    assert run.is_done == (name == "data.json")
    assert (run.images == (None, None)) == (name == "data.json")


# Measuring:
def test_the_result_is_the_last_epochs_error_or_the_test_of_the_best_model(tmp_path):
    write_run(tmp_path / "run", SMALL, [60.0, 50.0, 40.0, 20.0, 30.0])
    tested = {"test_top1": 1.75, "val_top1": 2.5, "best_top1": 1.5}
    write_run(tmp_path / "svhn", SVHN, [3.0] * 40, status=tested)
    write_run(tmp_path / "untested", SVHN, [3.0] * 40)
    last, best, untested = runs.find([tmp_path])
    assert (last.error, runs.selection(last.opt)) == (30.0, "last epoch")
    assert (best.error, runs.selection(best.opt), best.is_done) == (1.75, "best validation", True)
    assert (untested.error, untested.is_done) == (None, False)


@pytest.mark.parametrize(
    "errors, state, is_done",
    [
        (FIVE, "done", True),
        (FIVE[:4], "done", False),
        (FIVE, "running", False),
        (FIVE, "finished", False),
        ([*FIVE[:4], None], "done", False),
        ([], "done", False),
    ],
)
def test_a_run_is_done_when_its_status_says_so_and_its_log_is_whole(
    tmp_path, errors, state, is_done
):
    path = write_run(tmp_path / "run", SMALL, errors, state)
    run = only(tmp_path)
    assert run.is_done == is_done and run.epoch == len(errors)
    assert run.state == ("unknown" if state == "finished" else state)
    lines = (path / "log.jsonl").read_text().splitlines()
    (path / "log.jsonl").write_text("\n".join(lines[:2] + lines[3:]) + "\n")  # without epoch 3
    assert not only(tmp_path).is_done


def test_time_memory_and_hardware_are_those_of_all_epochs(tmp_path):
    path = write_run(tmp_path / "run", OWN, [9.0, 8.0])
    epochs = [record(1, 9.0, replicas=4, images_per_s=100.0), record(2, 8.0, memory_mb=1200.0)]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    run = only(tmp_path)
    assert math.isclose(run.hours, 2 * 2160 / 3600)
    assert run.device == "4 x NVIDIA H200; NVIDIA H200"
    assert (run.seconds_per_step, run.memory_mb) == (run.opt.batchSize / 370, 1200.0)
    unknown = {"val_time_s": "hours", "replicas": "device", "device": "device",
               "images_per_s": "seconds_per_step", "memory_mb": "memory_mb"}  # fmt: skip
    for missing, name in unknown.items():  # as in an older log
        run = only(write_run(tmp_path / missing, OWN, [9.0, 8.0], **{missing: None}))
        assert [n for n in dict.fromkeys(unknown.values()) if getattr(run, n) is None] == [name]
    assert SeedGroup([run]).average("memory_mb") is None


@pytest.mark.parametrize("value", ["fast", True, None, [1], math.nan, math.inf])
def test_other_values_than_finite_numbers_are_none(value):
    assert runs.number({"a": value}, "a") is None
    assert (runs.number({}, "a"), runs.number({"a": 0}, "a")) == (None, 0)


# Grouping:
def test_complete_runs_are_grouped_by_seed_and_the_first_of_a_seed_counts(tmp_path):
    write_run(tmp_path / "a", SMALL, FIVE[:2], "failed")
    for name, seed, error in (("b", 2, 25.0), ("c", 0, 20.0), ("d", 1, 21.0), ("e", 2, 10.0)):
        write_run(tmp_path / name, f"{SMALL} --manualSeed {seed}", [*FIVE[:4], error])
    found = group_runs(runs.find([tmp_path]))
    group = found.groups["small/densenet-L22-k12"]
    assert [run.path.name for run in group.runs] == ["c", "d", "b"]
    # Squared deviations from 22: 4 + 1 + 9 = 14, over two degrees of freedom.
    assert group.mean == 22.0 and math.isclose(group.std, math.sqrt(7))
    assert SeedGroup(group.runs[:1]).std is None and group.average("memory_mb") == 1000.0
    assert [run.path.name for run in found.unfinished] == ["a"] and found.others == []
    assert [[run.path.name for run in pair] for pair in found.repeated] == [["e", "b"]]


@pytest.mark.parametrize("name", ["a", "z"])
def test_runs_on_other_images_are_not_repetitions(tmp_path, name):
    write_run(tmp_path / name, f"{SMALL} --manualSeed 9", FIVE, data={"training_set": "other"})
    for seed in (0, 1):
        write_run(tmp_path / f"m{seed}", f"{SMALL} --manualSeed {seed}", FIVE)
        write_run(tmp_path / f"own{seed}", f"{OWN} --manualSeed {seed}", [9.0, 8.0])
    found = group_runs(runs.find([tmp_path]))
    (group,) = found.groups.values()
    assert [run.opt.manualSeed for run in group.runs] == [0, 1]
    # Runs of no config are grouped by their settings.
    others = {tuple(run.opt.manualSeed for run in group.runs) for group in found.others}
    assert others == {(9,), (0, 1)}
