"""Test the report from a GPU: its steps and their limits, and its table, without a GPU."""

import csv
import os
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

import opts
from engine.self_check import Difference
from helpers.run_main import is_alive, wait_until
from tools.benchmark import __main__ as benchmark
from tools.benchmark.cases import select_cases
from tools.benchmark.results import NOT_RUN, as_csv
from tools.gpu_report import __main__ as report
from tools.gpu_report import differences, model, replays, steps, table
from tools.gpu_report.steps import Outcome, Step

LONG_S = 300
DONE = Outcome(True, 30, "done in 30 s")


@pytest.fixture
def script(tmp_path):
    """Return a function that makes a step of a script's lines."""

    def step(name: str, *lines: str, limit_s: float = LONG_S) -> Step:
        (tmp_path / f"{name}.py").write_text("\n".join(["import os, sys", *lines]))
        return Step(name, limit_s, f"{tmp_path / name}.py {{path}}.csv")

    return step


def cells(path: Path) -> dict[str, dict[str, str]]:
    """Read a report's rows by what they say."""
    found = {row["what"]: row for row in csv.DictReader((path / "gpu-report.csv").open())}
    lines = (path / "gpu-report.md").read_text().split("\n")
    assert len(found) == sum(line.startswith("| ") for line in lines) - 1  # the header
    return found


MACHINE = [
    "with open(sys.argv[1], 'w') as file:",
    "    print('device,torch\\nH200,2.11.0', file=file)",
]
# Starts a process that would live on, says so, and waits for ever.
HANG = [
    "import signal, time",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "child = os.fork()",
    "if child:",
    "    print('its child is', child, flush=True)",
    "time.sleep(3600)",
]


def test_a_step_that_hangs_or_crashes_keeps_its_output_and_the_next_one_runs(
    script, tmp_path, monkeypatch
):
    out, log = tmp_path / "out", tmp_path / "out" / "gpu-report" / "hang.log"
    todo = [
        script("machine", *MACHINE),
        script("hang", *HANG, limit_s=7),
        script("crash", "print('nearly there', flush=True)", "os.abort()"),
        script("wrong", "raise ValueError('no such thing')"),
        script("eager-64", *MACHINE, "print('measured')"),
    ]
    wait = steps._wait

    def wait_for_output(process, limit_s: float) -> bool:
        if limit_s == 7:
            wait_until(lambda: "child" in log.read_text())
            limit_s = 0.01
        return wait(process, limit_s)

    monkeypatch.setattr(steps, "_wait", wait_for_output)
    outcomes = report.run_all(todo, out, LONG_S)
    texts = [outcome.text for outcome in outcomes.values()]
    assert texts[1] == "stopped at its limit of 7 s" and texts[2].startswith("exit code -6: nearly")
    assert texts[3] == "exit code 1: ValueError: no such thing" and outcomes["eager-64"].is_done
    wait_until(lambda: not is_alive(int(log.read_text().split()[-1])))
    assert (out / "gpu-report" / "eager-64.log").read_text() == "measured\n"
    assert {row["device"] for row in cells(out).values()} == {"H200"}


def test_a_limit_holds_and_what_is_left_of_all_time_too(script, tmp_path):
    forever = script("forever", "import time", "time.sleep(3600)", limit_s=0.2)
    assert steps.run_step(forever, tmp_path, LONG_S).text == "stopped at its limit of 0 s"
    assert steps.run_step(forever, tmp_path, 4) == Outcome(False, 0, "no time was left")
    seen = []
    steps_wait = SimpleNamespace(wait=lambda limit_s: seen.append(limit_s))
    assert steps._wait(steps_wait, 3) and seen == [3]


def test_the_report_is_written_after_each_step(script, tmp_path, monkeypatch):
    run_step, seen = report.run_step, []

    def watch(step: Step, *rest) -> Outcome:
        seen.append((tmp_path / "gpu-report.csv").exists())
        return run_step(step, *rest)

    monkeypatch.setattr(report, "run_step", watch)
    report.run_all([script("machine", *MACHINE), script("b"), script("c")], tmp_path, LONG_S)
    assert seen == [False, True, True]


def test_without_a_gpu_every_cell_says_not_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    patient = [replace(step, limit_s=LONG_S) for step in steps.steps() if step.needs_gpu]
    monkeypatch.setattr(report, "steps", lambda: patient)
    assert report.main(["--output", str(tmp_path / "new")]) == 0
    found = cells(tmp_path / "new")
    assert {row["measured"] for row in found.values()} == {NOT_RUN}
    goals = {row["goal"] for row in found.values()} - {""}
    assert {"at least 5", "at least 1.6", "at least 36", "at most 15"} <= goals
    assert {row["met"] for row in found.values()} == {"", NOT_RUN}
    assert "nothing (exit code 1: no CUDA device)" in (tmp_path / "new/gpu-report.md").read_text()
    assert report.main(["--output", str(tmp_path / "new")]) == 0  # nothing is lost


def test_an_earlier_report_is_replaced_only_where_it_holds_no_measurement(tmp_path, capsys):
    (tmp_path / "gpu-report.csv").write_text("what,measured\na,not run\nb,2\n")
    assert report.main(["--output", str(tmp_path)]) == 2
    assert "gpu-report.csv holds measurements; fix: move it away" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-report.csv"]
    (tmp_path / "file").write_text("")
    assert report.main(["--output", str(tmp_path / "file")]) == 6
    assert "cannot write in" in capsys.readouterr().err


def test_every_step_is_a_command_that_is_understood():
    selected = []
    for step in steps.steps():
        words = shlex.split(step.command)
        if words[:2] == ["-m", "tools.benchmark"]:
            options, opt, _ = benchmark.parse(words[2:])
            cases = select_cases(opt, options.only, options.compile, on_cuda=True)
            selected.append((step.name, {case.implementation for case in cases}))
            assert all(step.name.startswith(case.mode) for case in cases)
        elif words[0] == "main.py":
            opt = opts.parse(words[1:])
            assert (opt.nImages, opt.batchSize, opt.nEpochs) == (50_000, 64, 2)
        elif "replays" in step.name:
            opts.parse(["--dataset=synthetic", *words[3:]])
    assert selected and all(who == {"torchvision"} for _, who in selected)
    names = [step.name for step in steps.steps()]
    assert all(name.startswith("compiled") for name in names[-4:])  # the slowest come last
    assert sum(step.limit_s for step in steps.steps() if "compiled" not in step.name) <= 9 * 60


def write(path: Path, rows: list[dict]) -> None:
    path.write_bytes(as_csv(rows, tuple(dict.fromkeys(name for row in rows for name in row))))


@pytest.fixture
def measured(tmp_path):
    """Write what the steps of a whole run would; return the cells of its table."""
    write(
        tmp_path / "model.csv",
        [
            {"network": network, "what": what, "us": us}
            for network in ("64", "512")
            for what, us in {"conv1x1": 600.0, "pool": 9.0, "step": 3000.0}.items()
        ],
    )
    (tmp_path / "gpu-tests.log").write_text(
        "collected 4 items\n"
        "tests/test_gpu.py::test_learns[single] PASSED   [ 25%]\n"
        "[gw1] [ 50%] PASSED tests/test_gpu.py::test_resumes[BC, dropout] \n"
        "[gw0] [ 75%] FAILED tests/test_gpu.py::test_forgives[x y] \n"
        "tests/test_gpu.py::test_needs_two SKIPPED (one) [100%]\n"
        "E   assert tests/test_gpu.py::test_other FAILED\n"
        "==== 1 failed, 2 passed, 1 skipped in 12.31s ====\n"
    )
    check = {"settings": "k = 12, bf16", "explained": 0.0}
    names = {"output": 0.5, "gradient of x": 0.75, "running_mean": 0.25}
    write(
        tmp_path / "self-check.csv",
        [check | {"name": name, "size": size, "bound": 0.5} for name, size in names.items()],
    )
    speeds = {"images_per_s": 20_000.0, "bound_images_per_s": 100_000.0}
    write(
        tmp_path / "replays-64.csv",
        [
            {"what": "step", "us": 3200.0} | speeds,
            {"what": "conv1x1", "launches": 48.0, "us": 700.0},
            {"what": "other launches", "launches": 135.0, "us": 300.0},
        ],
    )
    for mode, found in {
        "eager": (3000.0, 4000.0),
        "compiled": (10_000.0,),
        "compiled-reduce-overhead": (16_000.0,),
    }.items():
        write(
            tmp_path / f"{mode}-64.csv",
            [{"images_per_s": speed, "note": "none"} for speed in found] + [{"note": "broken"}],
        )
    run = tmp_path / "epochs.run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"time_s": 4.0}\n{"time_s": 2.5}\n')
    for number, when in enumerate((100.0, 102.75)):
        path = run / f"checkpoint_{number}.pt"
        path.write_text("")
        os.utime(path, (when, when))

    def read() -> dict[str, dict[str, object]]:
        outcomes = {step.name: DONE for step in steps.steps()}
        return {row.what: row.cells(outcomes) for row in table.rows(tmp_path, outcomes)}

    return read


def test_the_table_has_what_the_steps_have_measured_beside_goal_and_model(measured):
    found = measured()
    wanted = {
        "GPU tests that pass": (2, ""),
        "GPU tests that fail": (1, "no"),
        "self-check, k = 12, bf16: largest difference": (1.5, "no"),
        "self-check, k = 12, half: largest difference": (NOT_RUN, NOT_RUN),
        "BC-100-12, batch 64: level 2, one CUDA graph": (20_000, ""),
        "BC-100-12, batch 64: of the copy bandwidth's bound": (20, ""),
        "BC-100-12, batch 64: torchvision, eager": (4000, ""),
        "BC-100-12, batch 64: to torchvision, eager": (5, "yes"),
        "BC-100-12, batch 64: to the faster of torchvision compiled": (1.25, "no"),
        "BC-100-12, batch 64: a step": (3200, ""),
        "BC-100-12, batch 64: conv1x1": (700, ""),
        "BC-100-12, batch 64: pool": (NOT_RUN, ""),
        "BC-100-12, batch 64: in no kernel": (2200, ""),
        "BC-100-12, batch 512: of the copy bandwidth's bound": (NOT_RUN, NOT_RUN),
        "BC-100-12, batch 64, 50,000 synthetic images: an epoch's training": (2.5, ""),
        "BC-100-12, batch 64, 50,000 synthetic images: 300 epochs, projected from two":
            (pytest.approx((30 + 298 * 2.75) / 60), "yes"),
    }  # fmt: skip
    assert {what: (found[what]["measured"], found[what]["met"]) for what in wanted} == wanted
    assert found["GPU tests that fail"]["note"] == "test_forgives"
    assert found["self-check, k = 12, bf16: largest difference"]["note"] == "gradient of x"
    assert found["BC-100-12, batch 64: conv1x1"]["modelled"] == 600
    assert found["BC-100-12, batch 512: level 2, one CUDA graph"]["modelled"] == 512e6 / 3000


def test_a_goal_is_not_called_met_by_a_part_of_what_it_is_about(measured, tmp_path):
    (tmp_path / "compiled-reduce-overhead-64.csv").unlink()
    log = tmp_path / "gpu-tests.log"  # as of a pytest that was stopped
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    found = measured()
    row = found["BC-100-12, batch 64: to the faster of torchvision compiled"]
    assert (row["measured"], row["met"], row["note"]) == (2, "not known", "compiled")
    assert found["GPU tests that fail"]["met"] == "not known"


def test_a_difference_that_is_no_number_is_the_worst(measured, tmp_path):
    row = {"settings": "k = 12, bf16", "size": 0.1, "bound": 1.0}
    worst = [row | {"name": "a"}, row | {"name": "b", "size": float("nan")}, row | {"name": "c"}]
    write(tmp_path / "self-check.csv", worst)
    row = measured()["self-check, k = 12, bf16: largest difference"]
    assert (row["note"], row["met"]) == ("b", "no")


def test_the_kernels_of_a_profile_are_summed_up_per_step():
    def event(key: str, count: int, us: float, device: DeviceType = DeviceType.CUDA):
        return SimpleNamespace(key=key, count=count, self_device_time_total=us, device_type=device)

    events = [
        event("conv1x1", 480, 5000.0),
        event("void at::native::add<float>", 10, 30.0),
        event("nvjet_tst_64x8", 20, 50.0),
        event("conv3x3", 480, 9000.0),
        event("cudaGraphLaunch", 10, 70.0, DeviceType.CPU),
    ]
    assert replays.kernel_rows(events, {"conv1x1", "conv3x3", "relu"}) == [
        {"what": "conv3x3", "launches": 48, "us": 900},
        {"what": "conv1x1", "launches": 48, "us": 500},
        {"what": "other launches", "launches": 3, "us": 8},
    ]
    assert {"conv1x1", "conv3x3"} <= replays.kernel_names()


def test_the_differences_before_an_error_are_kept(tmp_path, monkeypatch):
    seen = []

    def measure(opt, device, ops) -> list[Difference]:
        seen.append((opt.growthRate, opt.precision, opt.tf32, opt.bottleneck))
        if opt.precision == "half":
            raise RuntimeError("no such instruction")
        return [Difference("output", size=0.25, explained=0.1, unit=0.0125)]

    monkeypatch.setattr(differences.self_check, "measure_differences", measure)
    path = tmp_path / "self-check.csv"
    with pytest.raises(RuntimeError):
        differences.write(path)
    assert seen == [(12, "bf16", False, True), (12, "half", False, True)]
    (row,) = table.read(path)
    assert (row["settings"], row["size"], row["bound"]) == ("k = 12, bf16", "0.25", "0.5")


def test_the_model_is_of_the_same_networks_and_runs_without_a_gpu(tmp_path, monkeypatch):
    asked = []

    def kernel_us(opt, architecture: int) -> dict[str, float]:
        asked.append((opt.depth, opt.batchSize, opt.imageSize, opt.nClasses, opt.precision))
        assert architecture >= 80
        return {"conv1x1": 2.5, "step": 4.0}

    monkeypatch.setattr(model.static, "kernel_us", kernel_us)
    model.write(tmp_path / "model.csv")
    assert asked == [
        (100, 64, 32, 10, "bf16"), (100, 512, 32, 10, "bf16"), (121, 256, 224, 1000, "bf16"),
    ]  # fmt: skip
    assert {row.what: row.modelled for row in table.rows(tmp_path, {}) if row.modelled} == {
        f"{network.title}: {what}": value
        for network in steps.NETWORKS.values()
        for what, value in {
            "level 2, one CUDA graph": network.batch_size / 4e-6, "a step": 4, "conv1x1": 2.5,
        }.items()
    }  # fmt: skip
    assert [step.name for step in steps.steps() if not step.needs_gpu] == ["model"]
