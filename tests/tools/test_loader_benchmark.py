"""Test that loaders of image files are measured part by part, and that the cores are counted."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets.factory
import opts
from helpers.run_main import ROOT
from tools import describe
from tools.benchmark import __main__ as benchmark
from tools.benchmark import loader_driver, loader_peers, loader_results, photographs

SMALL = ["--imageSize", "72", "--batchSize", "4", "--turns", "2", "--warmUp", "0"]
PARTS = ["workers", "whole"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write ten JPEG files at two depths, as no trainer would take them."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (root / "deep" / "er").mkdir(parents=True)
    for number in range(10):
        pixels = rng.integers(0, 256, (90 + number, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / ("deep/er" if number % 2 else "") / f"{number}.jpg")
    return root


def measure(folder: Path, capsys, *flags: str) -> tuple[list[dict], str]:
    """Run the tool, and return its rows and what it has printed."""
    path = folder.parent / "loader.csv"
    path.unlink(missing_ok=True)
    assert benchmark.main(["--loader", str(folder), "--csv", str(path), *SMALL, *flags]) == 0
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines)), capsys.readouterr().out


# The whole command:
def test_every_loader_is_measured_beside_another_checkout_and_all_libraries(folder, capsys):
    threads = torch.get_num_threads()
    rows, printed = measure(folder, capsys, "--against", str(ROOT), "--imagesPerSecond", "7000")
    assert torch.get_num_threads() == threads
    found = [tuple(row[c] for c in ("who", "split", "resize", "part")) for row in rows]
    own = [(split, resize, part) for resize in opts.FLAGS["resize"].choices
           for split in ("training", "evaluation") for part in PARTS]  # fmt: skip
    assert sorted(found[:16]) == sorted((who, *each) for who in ("this", "against") for each in own)
    peers = ["torchvision-pil", "torchvision-tensor", "timm", "dali"]
    assert [who for who, *_ in found[16:]] and {who for who, *_ in found[16:]} == {*peers}
    for row in rows:
        assert tuple(row) == loader_results.COLUMNS
        if row["who"] == "dali" and row["note"] != "none":
            assert row["images_per_cpu_s"] == row["part"] == "not run"  # not installed
            continue
        assert row["note"] == "none" and row["version"] != "none"
        for column in loader_results.SPEEDS:
            q1, median, q3 = (float(row[f"{column}{end}"]) for end in ("_q1", "", "_q3"))
            assert 0 < q1 <= median <= q3
        is_alone = (row["resize"], row["part"]) == ("torch7", "workers")  # a GPU resizes
        assert float(row["ratio_against"]) > 0 or is_alone
        assert row["ratio_timm"] == "not run" if is_alone else float(row["ratio_timm"]) > 0
        assert row["source"] == "images0, median 120 x 94"
        assert (row["images"], row["threads"], row["turns"]) == ("10", "1", "2")
        if row["who"] in ("this", "against") and row["part"] == "whole":
            shares = [float(row[name]) for name in loader_results.SHARES]
            assert all(0 < share < 1 for share in shares) and sum(shares) == pytest.approx(1, 0.02)
        else:
            assert row["decode_share"] == "not run"
    assert "10 images of" in printed and "workers prepare 7000 training images/s: " in printed


def test_only_what_is_asked_for_is_measured_on_the_number_of_images_given(folder, capsys):
    only = ["--only", "this/eval*torch7,torchvision-tensor/training", "--images", "5"]
    rows, printed = measure(folder, capsys, *only)
    assert [(row["who"], row["split"], row["part"], row["images"]) for row in rows] == [
        ("this", "evaluation", "workers", "5"), ("this", "evaluation", "whole", "5"),
        ("torchvision-tensor", "training", "workers", "5"),
        ("torchvision-tensor", "training", "whole", "5"),
    ]  # fmt: skip
    assert "ratio_dali" not in printed and "workers prepare" not in printed


def test_a_resize_that_is_given_is_the_only_one_of_this_project(folder, capsys):
    rows, _ = measure(folder, capsys, "--only", "this", "--resize", "torch7")
    assert {row["resize"] for row in rows} == {"torch7"}


def test_a_library_that_is_not_installed_leaves_a_note(folder, capsys, monkeypatch):
    peer = loader_peers.Peer("other", "cubic", "no_such_library", loader_peers.dali)
    monkeypatch.setattr(loader_peers, "PEERS", (peer,))
    rows, printed = measure(folder, capsys, "--only", "other")
    assert [row["note"] for row in rows] == ["No module named 'no_such_library'"] * 2
    assert all(row["images_per_cpu_s"] == "not run" for row in rows)
    assert "no_such_library" in printed


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--against DIR", "against is about image files, and training steps read none; fix: add "
         "--loader DIR"),
        ("--images 3", "images is about image files, and training steps read none; fix: add "
         "--loader DIR"),
        ("--loader IMAGES --LR 1 --nGPU 0", "LR, nGPU: no effect on how image files are "
         "prepared; fix: leave it out; of main.py's flags batchSize, exifRotate, imageSize, "
         "manualSeed, maxAspect, maxPixels, resize, whiteLevel count"),
        ("--loader IMAGES --imageSize 32", "imageSize 32: up to 64 pixels images are prepared once "
         "and stay in memory; fix: use 224, or another above 64"),
        ("--loader IMAGES --trainer", "trainer and compile are about training steps; fix: leave "
         "them out, or leave out loader"),
        ("--loader IMAGES --compile false", "trainer and compile are about training steps; fix: "
         "leave them out, or leave out loader"),
        ("--loader nowhere", "nowhere: No such file or directory; fix: check the directory"),
        ("--loader EMPTY", "loader: EMPTY has 0 image files; fix: name a directory with at least "
         "two, at any depth"),
        ("--loader IMAGES --against EMPTY", "against: EMPTY: RuntimeError: there is no opts.py; "
         "fix: name a checkout of this project whose main.py runs here"),
        ("--loader IMAGES --against nowhere", "against: nowhere is no directory; fix: "
         "name a checkout of this project whose main.py runs here"),
        ("--loader IMAGES --only level-2", "only: level-2 matches no case of these flags; fix: "
         "names are as this/training/antialias"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_together_are_answered_in_one_line(
    flags, line, folder, tmp_path, monkeypatch, capsys
):
    places = {"IMAGES": str(folder), "EMPTY": str(tmp_path)}
    words = [places.get(word, word) for word in flags.split()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this checkout must not stand for the other
    assert benchmark.main([*words, "--csv", "none"]) in (2, 3)
    err = capsys.readouterr().err.replace(str(tmp_path / "nowhere"), "nowhere")
    assert err.replace(str(tmp_path), "EMPTY") == f"error: {line}\n"


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_written(tmp_path, capsys):
    for name in "abc":
        Image.new("RGB", (80, 90)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "b.jpg").write_text("hello")
    assert benchmark.main(["--loader", str(tmp_path), "--csv", str(tmp_path / "rows.csv")]) == 3
    line = f"error: cannot read image {tmp_path / 'b.jpg'}: "
    assert capsys.readouterr().err.startswith(line) and not (tmp_path / "rows.csv").exists()


def test_a_file_of_results_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "old.csv").write_text("kept")
    flags = ["--loader", str(folder), "--csv", str(tmp_path / "old.csv")]
    assert benchmark.main(flags) == 2
    assert "exists; fix: move it away" in capsys.readouterr().err
    assert (tmp_path / "old.csv").read_text() == "kept"


# Measuring:
def test_the_timed_epoch_prepares_the_batches_of_the_loader_and_leaves_it_as_it_was(
    folder, monkeypatch
):
    from tools.benchmark.loaders import linked_folder

    paths = sorted(map(str, folder.rglob("*.jpg")))
    with linked_folder(paths) as root:
        flags = ["--dataset=folder", f"--data={root}", "--nThreads=0", "--imageSize=72"]
        for resize in opts.FLAGS["resize"].choices:
            opt = opts.parse([*flags, f"--resize={resize}", "--batchSize=4"])
            loader = datasets.factory.create(opt, torch.device("cpu"), lambda note: None).train
            assert sorted(path for path, _ in loader._loader.dataset.samples) == sorted(
                str(path) for path in Path(root, "train").rglob("*.jpg")
            )
            before = list(loader.batches(3))
            prepared, finished = [], []
            prepare, finish = type(loader.pipeline).prepare, type(loader.pipeline).finish

            def recorded(pipeline, picture, prepare=prepare, prepared=prepared):
                prepared.append(pipeline.resizes_on_device)
                return prepare(pipeline, picture)

            def counted(pipeline, chunks, device, finish=finish, finished=finished):
                finished.append(finish(pipeline, chunks, device))
                return finished[-1]

            with monkeypatch.context() as patch:
                patch.setattr(type(loader.pipeline), "prepare", recorded)
                patch.setattr(type(loader.pipeline), "finish", counted)
                seconds = loader_driver.time_epoch(loader, 3)
            # Torch7's resize is left to a GPU in a second pass.
            assert prepared == [False] * 10 + [True] * 10 * (resize == "torch7")
            pairs = zip(finished, before, strict=True)
            assert all(torch.equal(images, wanted) for images, (wanted, _) in pairs)
            assert seconds.keys() == {"decode", "prepare", "workers", "whole"}
            for clock in (0, 1):
                decode, prepare, whole = (
                    seconds[part][clock] for part in ("decode", "prepare", "whole")
                )
                assert 0 < decode < prepare < whole and seconds["workers"][clock] > 0
            for (images, _), (again, _) in zip(before, loader.batches(3), strict=True):
                assert torch.equal(images, again)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [loader_peers.torchvision_pil, loader_peers.torchvision_tensor,
                                  loader_peers.timm])  # fmt: skip
def test_a_library_prepares_normalised_images_of_the_size(make, training, folder, monkeypatch):
    def take(paths, batch_size, to_bytes, to_floats):
        return to_bytes, to_floats

    monkeypatch.setattr(loader_peers, "_prepare_all", take)
    paths = sorted(map(str, folder.rglob("*.jpg")))
    to_bytes, to_floats = make(paths, 4, training, 72)
    images = torch.stack([to_bytes(path) for path in paths])
    assert images.shape == (10, 3, 72, 72) and images.dtype == torch.uint8
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    torch.testing.assert_close(to_floats(images), (images / 255 - mean) / std, rtol=0, atol=1e-5)


# Results:
def turn(decode: float, prepare: float, workers: float, whole: float) -> dict:
    parts = {"decode": decode, "prepare": prepare, "workers": workers, "whole": whole}
    return {part: (cpu, 2 * cpu) for part, cpu in parts.items()}


def test_speeds_and_shares_are_medians_over_the_turns():
    turns = [turn(1, 2, 1.6, 5), turn(2, 3, 2, 4), turn(4, 5, 4, 8)]
    workers, whole = loader_results.as_rows({"who": "this"}, turns, 8)
    assert (workers["part"], whole["part"], whole["turns"]) == ("workers", "whole", 3)
    speeds = [workers[f"images_per_cpu_s{end}"] for end in ("_q1", "", "_q3")]
    assert speeds == [3, 4, 4.5] and workers["images_per_s"] == 2
    assert whole["images_per_cpu_s"] == pytest.approx(1.6) and "decode_share" not in workers
    shares = [whole[name] for name in ("decode_share", "resize_share", "device_share")]
    assert shares == pytest.approx([0.5, 0.2, 0.375])


def test_a_speed_is_divided_by_that_of_the_same_split_part_and_if_there_is_one_resize():
    def row(who: str, resize: str, speed: float, split: str = "training") -> dict:
        fixed = {"who": who, "split": split, "resize": resize, "part": "workers"}
        return fixed | {"images_per_cpu_s": speed}

    rows = [row("this", "antialias", 60.0), row("this", "torch7", 40.0),
            row("against", "antialias", 30.0), row("against", "torch7", 10.0),
            row("dali", "cubic", 20.0), row("dali", "cubic", 1.0, "evaluation"),
            {"who": "timm", "split": "training", "note": "not there"}]  # fmt: skip
    loader_results.add_ratios(rows)
    assert [each.get("ratio_against") for each in rows[:5]] == [2, 4, 1, 1, pytest.approx(2 / 3)]
    assert [each.get("ratio_dali") for each in rows[:2]] == [3, None]  # a GPU resizes for torch7
    assert rows[5]["ratio_dali"] == 1 and "ratio_against" not in rows[5]
    assert not any("ratio_timm" in each for each in rows)


@pytest.mark.parametrize("rate, speed, cores", [(1000, 500.0, 2), (1001, 500.0, 3), (1, 500.0, 1)])
def test_cores_are_rounded_up(rate, speed, cores):
    assert loader_results.num_cores(rate, speed) == cores


# tools.describe:
def results_csv(path: Path, date: str, *rows: tuple) -> None:
    """Write a file as the benchmark does."""
    names = ("who", "split", "resize", "part", "image_size", "images_per_cpu_s")
    fixed = {"device": "Some CPU, 2 cores", "date": date, "source": "photographs"}
    columns = loader_results.COLUMNS
    with path.open("w") as file:
        writer = csv.DictWriter(file, columns, restval="not run")
        writer.writeheader()
        writer.writerows(dict(zip(names, row, strict=True)) | fixed for row in rows)


def test_describe_counts_the_cores_by_the_newest_measurement(tmp_path, monkeypatch, capsys):
    def described(*flags: str) -> str:
        assert describe.main(["--dataset", "imagenet", "--imagesPerSecond", "2000", *flags]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    monkeypatch.setattr(describe.cli, "ROOT", tmp_path)
    unmeasured = "cores          antialias to 224 pixels is not measured yet; on your images: "
    assert described() == unmeasured + "python -m tools.benchmark --loader DIR"
    (tmp_path / "results").mkdir()
    (tmp_path / "results/loader_damaged.csv").write_bytes(b"who,\xff\nthis,training")
    assert described().startswith(unmeasured)

    training = ("this", "training", "antialias", "workers", 224)
    results_csv(tmp_path / "results/loader_b.csv", "2026-12-02", (*training, 400))
    results_csv(tmp_path / "results/loader_c.csv", "2026-12-01", (*training, 100))
    results_csv(tmp_path / "results/loader_a.csv", "2026-12-03",
                ("timm", *training[1:], 50), ("against", *training[1:], 50),
                ("this", "evaluation", *training[2:], 50), (*training[:3], "whole", 224, 50),
                (*training[:4], 96, 50), ("this", "training", "torch7", "workers", 224, 300),
                )  # fmt: skip
    wanted = "{} for 2,000 images/s, {} to 224 pixels: {} per second and core on Some CPU, 2 cores"
    wanted += ", from photographs"
    cores = "cores          " + wanted
    assert described() == cores.format(5, "antialias", 400) + " (loader_b.csv)"
    assert described("--resize", "torch7") == cores.format(7, "torch7", 300) + " (loader_a.csv)"
    assert described("--imageSize", "448").endswith("--loader DIR --imageSize 448")


def test_describe_refuses_to_count_cores_for_data_that_stays_in_memory(capsys):
    assert describe.main(["--imagesPerSecond", "2000"]) == 2
    line = "error: imagesPerSecond: cifar10 at 32 pixels stays in memory; fix: leave it out\n"
    assert capsys.readouterr().err == line


# Photographs:
def digests(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.md5(path.read_bytes()).hexdigest()
            for path in files}  # fmt: skip


def test_photographs_are_the_same_each_time_and_a_dataset_to_train_on(tmp_path, capsys):
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", "1"))):
        assert photographs.main([str(tmp_path / name), "--count", "40", *more]) == 0
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again and len(first) == 40
    assert first.keys() == other.keys() and not set(first.values()) & set(other.values())

    sizes = {Image.open(tmp_path / "a" / path).size for path in first}
    assert sizes <= {*photographs.SIZES} and len(sizes) > 3
    opt = opts.parse(["--dataset=folder", f"--data={tmp_path / 'a'}", "--nThreads=0"])
    data = datasets.factory.create(opt, torch.device("cpu"), pytest.fail)
    assert data.classes == sorted(photographs.PICTURES)
    assert (data.metadata["train"], data.metadata["val"]) == (32, 8)

    assert photographs.main([str(tmp_path / "a")]) == 2
    assert "is not empty; fix: name a new one" in capsys.readouterr().err


def test_photographs_can_be_as_large_as_a_cameras(tmp_path):
    (first, *_) = photographs.cut(1, (4000, 3000), 0)
    (tmp_path / "one.jpg").write_bytes(first[1])
    assert Image.open(tmp_path / "one.jpg").size == (4000, 3000)


def test_photographs_without_their_package_name_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    assert photographs.main([str(tmp_path / "a")]) == 3
    assert capsys.readouterr().err == (
        "error: scikit-image, which has the pictures, is not installed; fix: install "
        "requirements-dev.txt\n"
    )
