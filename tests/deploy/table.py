"""Export a DenseNet-121 for every program that runs networks, and tabulate what it takes there.

usage: python -m tests.deploy.table --output FILE.csv [--only TO,...] [--python PYTHON]
       python -m tests.deploy.table --table FILE.csv     prints the table of docs/deploy.md

Each program has an environment of its own, which is removed before the next is made. There the
network, of random weights and statistics, is exported by tools.export, which compares its logits
with PyTorch's, and takes turns with PyTorch on one image, both with as many threads as there are
processors. `--python` takes an environment that has the packages, and installs nothing. Rows of
FILE.csv for other programs are kept.
"""

import argparse
import csv
import datetime
import io
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fileio.atomic import atomic_write
from tests.helpers.inference import write_model
from tools.benchmark.machine import columns
from tools.export.runtimes import RUNTIMES
from tools.inference.network import load

ROOT = Path(__file__).parents[2]
COLUMNS = ("to", "version", "torch", "precision", "input", "size_mb", "difference", "images_s",
           "torch_images_s", "cpu_ms", "torch_cpu_ms", "machine", "date", "command")  # fmt: skip
PINNED = "torch==2.11.0 torchvision==0.26.0"
NEWER = "torch==2.14.1 torchvision==0.29.1"  # which LiteRT and ExecuTorch were tested with
TORCH = {"litert": NEWER, "executorch": NEWER}
WAYS = {
    ("single", "normalised"): [],
    ("half", "normalised"): ["--half"],
    ("single", "pixels"): ["--withPreprocessing"],
}
NETWORK = "--dataset imagenet --depth 121 --nGPU 0"
TURNS = 25


def run(python: str, *words: str) -> str:
    """Run a module in an environment; return what it printed, or raise with its last line."""
    done = subprocess.run([python, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:300])
    return done.stdout


def measure(to: str, path: Path, weights: Path) -> None:
    """Print the medians of turns of a program and of PyTorch, as JSON: seconds for one image."""
    net, program = load(weights, ["--nGPU=0"]), RUNTIMES[to].open(path)
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    image = torch.randn(1, 3, net.opt.imageSize, net.opt.imageSize)
    found: dict[str, list] = {}
    with torch.inference_mode():
        for turn in range(TURNS):
            for name, logits in (("theirs", program), ("torch", net.model)):
                start = time.perf_counter(), time.process_time()
                logits(image)
                spent = time.perf_counter() - start[0], time.process_time() - start[1]
                if turn >= 5:  # warm
                    found.setdefault(name, []).append(spent)
    medians = {n: [*map(statistics.median, zip(*each, strict=True))] for n, each in found.items()}
    print(json.dumps(medians | {"version": torch.__version__.partition("+")[0]}))


def rows_of(to: str, python: str, directory: Path) -> list[dict]:
    """Export and measure in an environment; return a row for each way."""
    runtime, weights = RUNTIMES[to], directory / "model_last.pt"
    of_tools = (ROOT / "requirements-tools.txt").read_text().splitlines()
    pinned = (*runtime.packages, *of_tools) if to == "onnx" else runtime.packages
    names = [each for each in pinned if "==" in each and each.split("==")[0] not in PINNED]
    names = [each for each in names if to != "onnx" or each.split("==")[0] in runtime.packages]
    rows = []
    for (precision, kind), flags in WAYS.items():
        output = directory / f"densenet121{runtime.suffixes[0]}"
        words = ["tools.export", str(weights), "--to", to, "--output", str(output), *flags]
        row = {"to": to, "version": " ".join(names), "precision": precision, "input": kind}
        command = shlex.join(["python", "-m", *words]).replace(f"{directory}/", "")
        row |= {
            "machine": columns(torch.device("cpu"))["device"],
            "date": f"{datetime.date.today()}",
        }
        row["command"] = command.replace("model_last.pt", "RUN")
        try:
            said = run(python, *words)
            (row["size_mb"],) = re.findall(r": (\S+) MB", said)
            row["difference"] = "".join(re.findall(r"off, (\S+) of the", said)) or "not checked"
            if kind == "normalised" and row["difference"] != "not checked":
                words = ["tests.deploy.table", "--measure", to, str(output), str(weights)]
                found = json.loads(run(python, *words).splitlines()[-1])
                for prefix, name in (("", "theirs"), ("torch_", "torch")):
                    wall, processor = found[name]
                    row |= {f"{prefix}images_s": f"{1 / wall:.1f}"}
                    row |= {f"{prefix}cpu_ms": f"{processor * 1000:.0f}"}
                row["torch"] = found["version"]
        except RuntimeError as error:
            row["difference"] = f"refused: {error}"
        for path in runtime.files(output):
            if path.is_file():
                path.unlink()
            elif path.exists():
                path.rename(directory / f"{precision}-{kind}-{path.name}")
        print(", ".join(map(str, row.values())), flush=True)
        rows.append(row)
    return rows


def visit(to: str, python: str | None, directory: Path) -> list[dict]:
    """Make the environment of a program, measure in it, and remove it."""
    if python:
        return rows_of(to, python, directory)
    packages = [each for each in RUNTIMES[to].packages if "==" in each]
    with tempfile.TemporaryDirectory(dir=directory) as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [f"{place}/bin/pip", "install", "--quiet", "--disable-pip-version-check"]
        wanted = [*TORCH.get(to, PINNED).split(), "-r", str(ROOT / "requirements-tools.txt")]
        subprocess.run([*pip, *dict.fromkeys([*wanted, *packages])], check=True)
        return rows_of(to, f"{place}/bin/python", directory)


def table(rows: list[dict]) -> str:
    """Format the rows as Markdown."""
    titles = ("`--to`", "version", "precision", "images are", "MB", "difference", "images/s",
              "PyTorch's", "processor ms", "PyTorch's", "command")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        version = ", ".join(each.replace("==", " ") for each in row["version"].split())
        cells = (row["to"], version, row["precision"], row["input"], row["size_mb"],
                 row["difference"], row["images_s"], row["torch_images_s"], row["cpu_ms"],
                 row["torch_cpu_ms"], f"`{row['command']}`")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--measure", nargs=3)
    parser.add_argument("--only", default=",".join(RUNTIMES))
    parser.add_argument("--python")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], *map(Path, options.measure[1:]))
        return
    if options.table:
        print(table([*csv.DictReader(options.table.read_text().splitlines())]), end="")
        return
    output, rows = options.output, []
    if output.exists():
        rows = [*csv.DictReader(output.read_text().splitlines())]
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        write_model(Path(directory), NETWORK.split(), [f"class {i}" for i in range(1000)])
        for to in options.only.split(","):
            found = visit(to, options.python, Path(directory))
            rows = [row for row in rows if row["to"] != to] + found
            rows.sort(key=lambda row: [*RUNTIMES].index(row["to"]))
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            atomic_write(output, text.getvalue().encode())


if __name__ == "__main__":
    main()
