"""tools.results: which directories are runs, which config each reproduces, and what it measured."""

import json
import math
import os
from dataclasses import replace

import pytest

import opts
from errors import DataError
from helpers.run_directories import record, write_run
from helpers.run_main import ROOT
from tools import describe
from tools.results import match, runs
from tools.results.configs import Config, configs

SMALL = "--config configs/small/densenet-L22-k12.yaml --data images"
SVHN = "--config configs/svhn/densenet-L40-k12.yaml"
OWN = "--dataset digits --depth 10 --growthRate 4 --nEpochs 2"
FIVE = [60.0, 50.0, 40.0, 30.0, 20.0]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def only(path) -> runs.Run:
    (run,) = match.find([path])
    return run


# ------------------------------------------------------------------------------------ recognising


def test_a_run_is_recognised_by_its_settings_never_by_its_name(tmp_path):
    write_run(tmp_path / "c10/densenet-L40-k12-seed0", f"{SMALL} --manualSeed 7", FIVE)
    run = only(tmp_path)
    assert (run.config, run.seed, run.epoch, run.is_done) == ("small/densenet-L22-k12", 7, 5, True)
    assert match.nearest(run) == ("small/densenet-L22-k12", [])


@pytest.mark.parametrize(
    "flags, difference",
    [
        ("--LR 0.2", "LR 0.2, not 0.1"),
        ("--precision bf16", "precision bf16, not single"),
        ("--dropRate 0.1", "dropRate 0.1, not 0.0"),
        ("--retrain weights.pt", "retrain weights.pt, not none"),
        ("--epochNumber 2", "epochNumber 2, not 1"),
    ],
)
def test_a_run_with_another_setting_is_none_of_the_config(tmp_path, flags, difference):
    write_run(tmp_path / "run", f"{SMALL} {flags}", FIVE)
    run = only(tmp_path)
    assert run.config is None
    assert match.nearest(run) == ("small/densenet-L22-k12", [difference])


@pytest.mark.parametrize("flags", ["--nGPU 0", "--nThreads 7", "--keep 5", "--optMemory 4"])
def test_how_a_run_was_carried_out_is_no_matter(tmp_path, flags):
    write_run(tmp_path / "run", f"{SMALL} {flags}", FIVE)
    assert only(tmp_path).config == "small/densenet-L22-k12"


def test_ten_crops_are_not_the_one_crop_that_was_published(tmp_path):
    flags = "--config configs/imagenet/densenet-121-k32.yaml"
    write_run(tmp_path / "one", flags, [30.0] * 90, data={"train": 1_281_167})
    write_run(tmp_path / "ten", f"{flags} --tenCrop true", [30.0] * 90, data={"train": 1_281_167})
    one, ten = match.find([tmp_path])
    assert (one.config, ten.config) == ("imagenet/densenet-121-k32", None)


def test_a_part_of_imagenet_is_not_imagenet(tmp_path):
    flags = "--config configs/imagenet/densenet-121-k32.yaml"
    write_run(tmp_path / "part", flags, [30.0] * 90, data={"train": 10_000})
    write_run(tmp_path / "whole", flags, [30.0] * 90, data={"train": 1_281_100})  # bad ones skipped
    part, whole = match.find([tmp_path])
    assert whole.config == "imagenet/densenet-121-k32" and part.config is None
    assert match.nearest(part)[1] == ["10,000 training images, not 1,281,167"]


def test_a_run_whose_settings_were_changed_on_the_way_is_none_of_the_config(tmp_path):
    changed = {"overrides": ["epoch 3: LR 0.1, was 0.2"]}
    write_run(tmp_path / "run", SMALL, FIVE, status=changed)
    write_run(tmp_path / "same", SMALL, FIVE, status={"overrides": []})
    run, same = match.find([tmp_path])
    assert (run.config, same.config) == (None, "small/densenet-L22-k12")
    assert match.nearest(run)[1] == ["settings changed on the way by --override"]


def test_a_run_that_was_made_longer_on_the_way_is_none_of_the_config(tmp_path):
    path = write_run(tmp_path / "run", SMALL, FIVE)
    assert only(tmp_path).config == "small/densenet-L22-k12"
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [round(line["lr"], 6) for line in lines] == [0.1, 0.1, 0.01, 0.001, 0.001]
    lines[1]["lr"] = 0.01  # as of a run of three epochs
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert match.nearest(only(tmp_path))[1] == ["rate 0.01 in epoch 2, not 0.1"]


def test_the_rate_of_an_epoch_on_a_cosine_is_that_of_its_last_step(tmp_path):
    path = write_run(tmp_path / "run", f"{OWN} --lrShape cosine --milestones []", [9.0, 8.0])
    for second, changes in ((0.0, []), (0.01, ["rate 0.01 in epoch 2, not 0"])):
        rates = [0.05, second]  # half of the cosine, and its end
        lines = [record(epoch, 9.0, rate) for epoch, rate in enumerate(rates, start=1)]
        (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert only(tmp_path).changes == changes


def test_every_config_is_told_from_every_other():
    known = configs()
    assert {"c10plus/densenet-bc-L100-k12", "imagenet/resnet-50"} <= known.keys()
    settings = {tuple(config.comparable_settings.items()) for config in known.values()}
    assert len(settings) == len(known)


# ---------------------------------------------------------------------------------------- finding


def test_runs_are_found_below_directories_each_once(tmp_path):
    for name in ("b/deep/er", "a"):
        write_run(tmp_path / "runs" / name, OWN, [9.0, 8.0])
    os.symlink(tmp_path / "runs" / "b", tmp_path / "runs" / "link")
    os.symlink(tmp_path / "runs", tmp_path / "runs" / "b" / "loop")
    found = match.find([tmp_path / "runs", str(tmp_path / "runs" / "a"), tmp_path])
    assert [str(run.path.relative_to(tmp_path)) for run in found] == ["runs/a", "runs/b/deep/er"]


def test_a_run_directory_itself_and_an_empty_one_can_be_given(tmp_path):
    assert match.find([tmp_path]) == []
    write_run(tmp_path / "run", OWN, [9.0, 8.0])
    assert [run.path for run in match.find([tmp_path / "run"])] == [tmp_path / "run"]


def test_what_is_no_directory_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"no such directory: .*none"):
        match.find([tmp_path / "none"])
    with pytest.raises(DataError, match=r"not a directory: .*file"):
        match.find([tmp_path, tmp_path / "file"])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.yaml", b"depth: [", "not YAML"),
        ("config.yaml", b"\xff\xfe\x00", "not YAML"),
        ("config.yaml", b"", "holds no settings"),
        ("config.yaml", b"newFlag: 3\n", "unknown flag newFlag"),
        ("config.yaml", b"depth: 41\n", "depth: 41 is not 6n + 4"),
        ("config.yaml", None, "has a log.jsonl but no config.yaml"),
    ],
)
def test_a_run_that_cannot_be_read_is_left_out_with_a_note(tmp_path, name, content, words):
    write_run(tmp_path / "bad", OWN, [9.0, 8.0])
    write_run(tmp_path / "good", OWN, [9.0, 8.0])
    (tmp_path / "bad" / name).unlink()
    if content is not None:
        (tmp_path / "bad" / name).write_bytes(content)
    notes = []
    assert [run.path.name for run in match.find([tmp_path], notes.append)] == ["good"]
    (note,) = notes
    assert f"{tmp_path / 'bad'} is left out: " in note and words in note


def test_a_note_goes_to_standard_error_as_one_line(tmp_path, capsys):
    write_run(tmp_path / "a\nb", OWN, [9.0, 8.0])
    (tmp_path / "a\nb" / "config.yaml").unlink()
    assert match.find([tmp_path]) == []
    out, err = capsys.readouterr()
    assert not out and err.startswith("note: ") and err.count("\n") == 1 and "a\\nb" in err


@pytest.mark.parametrize("name", ["status.json", "data.json", "log.jsonl"])
@pytest.mark.parametrize("content", [b"\x80{[", b"[1, 2]\n", b"{}", b"", b"[" * 99_999])
def test_damaged_files_make_a_run_incomplete_or_of_unknown_data(tmp_path, name, content):
    path = write_run(tmp_path / "run", SMALL, FIVE)
    (path / name).write_bytes(content)
    run = only(tmp_path)
    assert run.config == "small/densenet-L22-k12"
    assert run.is_done == (name == "data.json")
    assert (run.images == (None, None)) == (name == "data.json")
    assert run.hours is None or run.hours == 3.0


# -------------------------------------------------------------------------------------- measuring


def test_the_result_is_the_last_epochs_error_and_not_the_best(tmp_path):
    write_run(tmp_path / "run", SMALL, [60.0, 50.0, 40.0, 20.0, 30.0])
    run = only(tmp_path)
    assert (run.error, run.split) == (30.0, "last epoch")


def test_with_validation_images_the_result_is_the_test_of_the_best_model(tmp_path):
    tested = {"test_top1": 1.75, "val_top1": 2.5, "best_top1": 1.5}
    write_run(tmp_path / "run", SVHN, [3.0] * 40, status=tested)
    write_run(tmp_path / "untested", SVHN, [3.0] * 40)
    run, untested = match.find([tmp_path])
    assert (run.error, run.split) == (1.75, "best validation")
    assert run.is_done and run.config == "svhn/densenet-L40-k12"
    assert untested.error is None and not untested.is_done


@pytest.mark.parametrize(
    "errors, state",
    [
        (FIVE[:4], "done"),
        (FIVE, "running"),
        (FIVE, "failed"),
        (FIVE, "preempted"),
        (FIVE, "finished"),
        ([*FIVE[:4], None], "done"),
        ([], "done"),
    ],
)
def test_a_run_is_done_when_it_says_so_and_its_log_is_whole(tmp_path, errors, state):
    write_run(tmp_path / "run", SMALL, errors, state)
    run = only(tmp_path)
    assert not run.is_done and run.epoch == len(errors)
    assert run.state == ("unknown" if state == "finished" else state)


def test_a_log_without_an_epoch_in_the_middle_is_not_whole(tmp_path):
    path = write_run(tmp_path / "run", SMALL, FIVE)
    lines = (path / "log.jsonl").read_text().splitlines()
    assert only(tmp_path).is_done
    (path / "log.jsonl").write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    assert only(tmp_path).epoch == 5 and not only(tmp_path).is_done


def test_hours_are_those_of_training_and_validation_of_all_devices(tmp_path):
    path = write_run(tmp_path / "run", OWN, [9.0, 8.0])
    epochs = [record(1, 9.0, replicas=4, images_per_s=100.0), record(2, 8.0, memory_mb=1200.0)]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    run = only(tmp_path)
    # 1800 + 360 seconds are 0.6 hours; the first epoch was on four devices.
    assert math.isclose(run.hours, 1.2) and math.isclose(run.device_hours, 0.6 * 4 + 0.6)
    assert run.device == "4 x NVIDIA H200; NVIDIA H200"
    assert (run.images_per_s, run.memory_mb) == (370.0, 1200.0)


@pytest.mark.parametrize(
    "missing, unknown",
    [
        ("val_time_s", {"hours", "device_hours"}),
        ("replicas", {"device_hours", "device"}),
        ("device", {"device"}),
        ("images_per_s", {"images_per_s"}),
        ("memory_mb", {"memory_mb"}),
    ],
)
def test_what_an_older_log_lacks_is_not_known(tmp_path, missing, unknown):
    write_run(tmp_path / "run", OWN, [9.0, 8.0], **{missing: None})
    run = only(tmp_path)
    names = ("hours", "device_hours", "device", "images_per_s", "memory_mb")
    assert {name for name in names if getattr(run, name) is None} == unknown
    cell = match.SeedGroup([run])
    assert {name for name in names if name != "device" and cell.average(name) is None} == (
        unknown - {"device"}
    )


@pytest.mark.parametrize("value", ["fast", True, None, [1], math.nan, math.inf])
def test_what_is_no_number_is_none(value):
    assert runs.number({"a": value}, "a") is None
    assert runs.number({}, "a") is None
    assert runs.number({"a": 0}, "a") == 0


def test_networks_are_counted_as_the_paper_counts(tmp_path):
    write_run(tmp_path / "run", "--config configs/c100plus/densenet-bc-L100-k12.yaml", [50.0])
    config = configs()["c100plus/densenet-bc-L100-k12"]
    run = only(tmp_path)
    # For ten classes; with a hundred the classifier has 90 x 343 numbers more.
    assert config.parameters == run.parameters == 769_162 == 800_032 - 90 * 343
    assert config.macs == run.macs == 287_929_692
    wide = configs()["wide/c100plus-L40-k36"]
    assert (wide.parameters, wide.macs) == (1_542_682, 647_298_936)


def test_a_network_is_counted_once(monkeypatch):
    built = []
    build = describe.build
    monkeypatch.setattr(describe, "build", lambda opt: built.append(opt) or build(opt))
    monkeypatch.setattr("tools.results.configs._counted", {})
    config = configs()["small/densenet-L22-k12"]
    other = replace(config, opt=opts.parse(f"{SMALL} --LR 1 --dropRate 0.5".split()))
    assert (config.macs, config.parameters) == (other.macs, other.parameters)
    assert len(built) == 1
    assert configs()["small/densenet-bc-L22-k12"].macs != config.macs
    assert len(built) == 2


# --------------------------------------------------------------------------------------- arranging


def test_of_configs_equally_near_one_of_the_same_dataset_is_named(tmp_path, monkeypatch):
    write_run(tmp_path / "run", OWN, [9.0, 8.0])
    flags = {
        "a": f"{OWN} --imageSize 8 --augment false".replace("digits", "synthetic"),
        "b": f"{OWN} --LR 0.2",
        "c": f"{OWN} --LR 0.2 --momentum 0.5",
    }
    made = {
        name: Config(name, tmp_path, opts.parse(line.split()), {}) for name, line in flags.items()
    }
    monkeypatch.setattr(match, "configs", lambda: made)
    assert match.nearest(only(tmp_path)) == ("b", ["LR 0.1, not 0.2"])
    del made["b"]
    assert match.nearest(only(tmp_path)) == ("a", ["dataset digits, not synthetic"])


def test_repetitions_are_one_cell_with_mean_and_sample_deviation(tmp_path):
    for seed, error in ((0, 20.0), (1, 21.0), (2, 25.0)):
        write_run(
            tmp_path / f"{seed}",
            f"{SMALL} --manualSeed {seed}",
            [*FIVE[:4], error],
            replicas=seed + 1,
        )
    found = match.group_runs(reversed(match.find([tmp_path])))
    cell = found.groups["small/densenet-L22-k12"]
    assert cell.seeds == [0, 1, 2] and cell.errors == [20.0, 21.0, 25.0]
    # Squared deviations from 22: 4 + 1 + 9 = 14, over two degrees of freedom.
    assert cell.mean == 22.0 and math.isclose(cell.std, math.sqrt(7))
    assert math.isclose(cell.average("device_hours"), 3.0 * 2)
    assert cell.device == "NVIDIA H200; 2 x NVIDIA H200; 3 x NVIDIA H200"
    assert (found.others, found.unfinished, found.unused) == ([], [], [])
    assert match.SeedGroup(cell.runs[:1]).std is None


def test_a_seed_is_never_averaged_with_itself(tmp_path):
    write_run(tmp_path / "a", SMALL, FIVE)
    write_run(tmp_path / "b", SMALL, [*FIVE[:4], 10.0])
    write_run(tmp_path / "c", f"{SMALL} --manualSeed 1", [*FIVE[:4], 22.0])
    found = match.group_runs(match.find([tmp_path]))
    assert found.groups["small/densenet-L22-k12"].errors == [20.0, 22.0]
    ((unused, reason),) = found.unused
    assert unused.path.name == "b" and f"seed as {tmp_path / 'a'}, which is used" in reason


def test_a_complete_run_counts_where_another_of_its_seed_was_stopped(tmp_path):
    write_run(tmp_path / "a", SMALL, FIVE[:2], "failed")
    write_run(tmp_path / "b", SMALL, FIVE)
    found = match.group_runs(match.find([tmp_path]))
    assert [run.path.name for run in found.groups["small/densenet-L22-k12"].runs] == ["b"]
    assert [run.path.name for run in found.unfinished] == ["a"] and not found.unused


@pytest.mark.parametrize("first", [True, False])
def test_runs_on_other_images_are_no_repetitions(tmp_path, first):
    others = {"training_set": "of other pictures"}
    write_run(tmp_path / ("a" if first else "z"), f"{SMALL} --manualSeed 9", FIVE, data=others)
    for seed in (0, 1):
        write_run(tmp_path / f"m{seed}", f"{SMALL} --manualSeed {seed}", FIVE)
    found = match.group_runs(match.find([tmp_path]))
    assert found.groups["small/densenet-L22-k12"].seeds == [0, 1]
    assert [cell.seeds for cell in found.others] == [[9]]


def test_other_runs_are_grouped_by_their_settings(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", f"{OWN} --manualSeed {seed}", [9.0, 8.0])
    write_run(tmp_path / "b", f"{OWN} --LR 0.2", [9.0, 8.0])
    found = match.group_runs(match.find([tmp_path]))
    assert found.groups == {} and [cell.seeds for cell in found.others] == [[0, 1], [0]]
