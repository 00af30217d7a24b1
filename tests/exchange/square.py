"""Send a trained DenseNet through every library and back, and tabulate what changes.

usage: python -m tests.exchange.square --output FILE.csv [--only LIBRARY,...] [--python PYTHON]
       python -m tests.exchange.square --table FILE.csv     prints the tables of docs/exchange.md

A DenseNet-121 and a narrow network are trained here for a moment. Each library then has an
environment of its own, which is removed before the next is made. Three kinds of rows:

  this to this, by way of LIBRARY   it loads what tools.export writes, and saves it by its own
                                    functions; read back here. Logits: LIBRARY's against ours
  LIBRARY to LIBRARY                a file of LIBRARY's own is read here and written for it again.
                                    Logits: LIBRARY's from one file against those from the other
  LIBRARY to another                what a library has saved is written for another: the same
                                    file as is written from our checkpoint

`--python` takes the libraries from one environment that has them, and installs nothing.
"""

import argparse
import csv
import datetime
import io
import shlex
import subprocess
import sys
import tempfile
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import opts
from fileio import tensor_files
from fileio.atomic import atomic_write
from models.factory import create
from models.layers import set_eps

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests/exchange/libraries.py"
COLUMNS = ("from", "by way of", "to", "version", "network", "size", "weights", "logits")
COLUMNS += ("command", "date")
CLASSES = 5
NETWORKS = {
    "narrow": "--imageSize 72 --d1 2 --d2 2 --d3 2 --d4 2 --growthRate 8 --initChannels 16",
    "densenet121": "--imageSize 224 --depth 121",
}
TRAIN = "--dataset synthetic --nImages 16 --batchSize 8 --nEpochs 2 --nGPU 0"
OF_TORCH = "torch==2.14.1 numpy==2.4.6"


class Peer(NamedTuple):
    """Say how one library takes part."""

    library: str  # of libraries.py, and of --to
    requirements: str  # the first is the version that rows name
    suffix: str = ".pt"
    sizes: tuple[int, ...] = (224,)
    driver: str = ""  # options of libraries.py
    flags: str = ""  # of tools.export
    own: str = ""  # options of libraries.py for a file of its own: of X-rays, say
    own_flags: str = ""
    dtype: str = "double"
    also: tuple[str, ...] = ()  # other files that it saves, which are read as well

    @property
    def read(self) -> list[str]:
        """Return the flags that name the library of a file; safetensors are of no library."""
        return [] if self.library == "safetensors" else ["--from", self.library]

    @property
    def name(self) -> str:
        """Return the name of the rows."""
        return f"{self.library}, dropout {self.driver.split()[1]}" if self.driver else self.library


PEERS = (
    Peer("torchvision", f"torchvision==0.29.1 {OF_TORCH}"),
    Peer("timm", f"timm==1.0.31 torchvision==0.29.1 {OF_TORCH}"),
    Peer("monai", f"monai==1.6.1 {OF_TORCH}"),
    Peer("torchxrayvision", f"torchxrayvision==1.5.7 torchvision==0.29.1 {OF_TORCH}",
         own="--classes 18 --channels 1 --calibrated",
         own_flags="--nClasses 18 --nChannels 1 --inputRange=-1024,1024"),
    Peer("segmentation-models",
         f"segmentation-models-pytorch==0.6.0 timm==1.0.31 torchvision==0.29.1 {OF_TORCH}"),
    Peer("safetensors", f"safetensors==0.8.0 torchvision==0.29.1 {OF_TORCH}", ".safetensors"),
    Peer("keras", "keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 h5py==3.16.0 numpy==2.4.6",
         ".weights.h5", (223, 224, 225), dtype="single", also=(".h5", ".keras")),
    Peer("paddle", "paddlepaddle==3.3.1 numpy==2.4.6", ".pdparams"),
    Peer("paddle", "paddlepaddle==3.3.1 numpy==2.4.6", ".pdparams", (224,), "--dropout 0.2",
         "--paddleDropout 0.2"),
)  # fmt: skip
EPS = {"keras": 1.001e-5}  # of libraries whose norms have another than ours


class Failure(Exception):
    """Hold the last line that a command printed before it failed."""


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Failure((done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:200])
    return done.stdout


def convert(source: Path, to: str, output: Path, *flags: str) -> str:
    """Run tools.export; return the command as a reader would type it."""
    words = ["-m", "tools.export", str(source), "--to", to, "--output", str(output), *flags]
    run([sys.executable, *words, "--overwrite", "true"])
    return shlex.join(["python", *words]).replace(f"{output.parent}/", "")


def our_logits(weights: Path, flags: str, images: np.ndarray, eps: float) -> np.ndarray:
    """Compute what our network makes of images (N, C, H, W), in double precision."""
    opt = opts.parse(shlex.split(f"{TRAIN} --nClasses {CLASSES} {flags}"))
    model = create(opt, CLASSES).eval().double()
    model.load_state_dict(torch.load(weights, weights_only=True))
    set_eps(model, eps)
    with torch.no_grad():
        return model(torch.from_numpy(images).double()).numpy()


def compare_weights(ours: Path, theirs: Path) -> str:
    """Say how many tensors came back, and how far the furthest number is off, in ulps."""
    wanted, found = map(tensor_files.read, (ours, theirs))
    # A counter is no weight, and some libraries have none; an encoder has no classifier.
    names = [name for name in wanted if name in found and wanted[name].is_floating_point()]
    ulps = 0
    for name in names:
        whole = [tensor.contiguous().view(torch.int32).long() for tensor in
                 (wanted[name], found[name])]  # fmt: skip
        ulps = max(ulps, (whole[0] - whole[1]).abs().max().item())
    count = sum(tensor.is_floating_point() for tensor in wanted.values())
    return f"{len(names)} of {count} equal bit for bit" if not ulps else f"within {ulps} ulp"


def ratio(wanted: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference over the largest logit."""
    return float(np.abs(wanted - found).max() / np.abs(wanted).max())


class Square:
    """Fill the table."""

    def __init__(self, directory: Path, output: Path, python: str | None):
        self.directory, self.output, self.python = directory, output, python
        self.rows: list[dict] = []
        self.driver_python = python or ""

    def add(self, *values) -> None:
        """Add a row, and write the file: an interrupted run keeps what it has."""
        row = dict(zip(COLUMNS, (*values, f"{datetime.date.today()}"), strict=True))
        self.rows.append(row)
        print(", ".join(f"{value}" for value in row.values() if value), flush=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self.output, text.getvalue().encode())

    def train(self, network: str) -> None:
        """Train a network, and write its weights by this program's names."""
        save = self.directory / network
        flags = f"{TRAIN} --nClasses {CLASSES} {NETWORKS[network]}"
        run([sys.executable, "main.py", *shlex.split(flags), "--save", str(save)])
        convert(save, "weights", self.ours(network))

    def flags(self, network: str, *more: str) -> list[str]:
        """List the flags that describe a network whose weights alone are known."""
        statistics = ["--classes", str(self.directory / network / "data.json")]
        words = f"{TRAIN} --nClasses {CLASSES} {NETWORKS[network]} {' '.join(more)}"
        return shlex.split(words) + statistics

    def ours(self, network: str) -> Path:
        return self.directory / f"{network}.pt"

    def file(self, peer: Peer, network: str, kind: str) -> Path:
        stem = peer.name.replace(", dropout ", "-dropout")
        return self.directory / f"{stem}-{network}-{kind}{peer.suffix}"

    def images(self, size: int, channels: int = 3) -> Path:
        path = self.directory / f"images{channels}x{size}.npy"
        if not path.exists():
            draws = np.random.default_rng(size).normal(size=(2, channels, size, size))
            np.save(path, draws.astype(np.float32))
        return path

    def drive(self, peer: Peer, task: str, network: str, *files: Path, options: str = "") -> None:
        words = [self.driver_python, str(DRIVER), peer.library, task, network, *map(str, files)]
        env = {"KERAS_BACKEND": "jax", "KERAS_HOME": str(self.directory), "PATH": "/usr/bin:/bin",
               "HOME": str(self.directory)}  # fmt: skip
        run(words + shlex.split(f"{peer.driver} {options}"), env)

    def logits(
        self, peer: Peer, network: str, file: Path, size: int, options: str = ""
    ) -> np.ndarray:
        channels = 1 if "--channels 1" in options else 3
        output = self.directory / "logits.npy"
        # torchxrayvision's calibration and Keras's norms have single precision only.
        double = peer.dtype == "double" and "--calibrated" not in options
        options += " --double" * double
        self.drive(
            peer, "logits", network, file, self.images(size, channels), output, options=options
        )
        return np.load(output)

    def there_and_back(self, peer: Peer, network: str) -> None:
        """Write for a library, which loads it and saves it; read that."""
        version = peer.requirements.split()[0]
        sent, kept = self.file(peer, network, "sent"), self.file(peer, network, "kept")
        back = self.directory / "back.pt"
        try:
            command = convert(self.directory / network, peer.library, sent,
                              *shlex.split(peer.flags))  # fmt: skip
            self.drive(peer, "copy", network, sent, kept, options=f"--classes {CLASSES}")
            flags = self.flags(network, peer.flags)
            command += " && " + convert(kept, "weights", back, *peer.read, *flags)
            weights = compare_weights(self.ours(network), back)
            for suffix in peer.also:
                other = kept.with_name(f"{network}{suffix}")
                self.drive(peer, "copy", network, kept, other, options=f"--classes {CLASSES}")
                said = convert(other, "weights", back, *peer.read, *flags)
                same = compare_weights(self.ours(network), back)
                self.add(
                    "this", f"{peer.name} {suffix}", "this", version, network, "", same, "", said
                )
        except Failure as error:
            self.add("this", peer.name, "this", version, network, "", "refused", f"{error}", "")
            return
        for size in peer.sizes:
            found = self.logits(peer, network, kept, size)
            images, eps = np.load(self.images(size)), EPS.get(peer.library, 1e-5)
            wanted = our_logits(self.ours(network), NETWORKS[network], images, eps)
            if found.shape[1] != wanted.shape[1]:  # an encoder's features
                state = torch.load(self.ours(network), weights_only=True)
                head = (state[f"classifier.{name}"].double().numpy() for name in ("weight", "bias"))
                weight, bias = head
                found = found @ weight.T + bias
            off = f"{ratio(wanted, found):.1e}"
            self.add("this", peer.name, "this", version, network, size, weights, off, command)

    def here_and_back(self, peer: Peer, network: str) -> None:
        """Read a file of a library's own, and write it for the library again."""
        version, own = peer.requirements.split()[0], peer.own or f"--classes {CLASSES}"
        new, again = self.file(peer, network, "new"), self.file(peer, network, "again")
        try:
            self.drive(peer, "new", network, new, options=own)
            flags = self.flags(network, peer.flags)
            if peer.own_flags:
                flags = shlex.split(f"{TRAIN} {NETWORKS[network]} {peer.flags} {peer.own_flags}")
            command = convert(new, peer.library, again, *peer.read, *flags)
            first, second = (self.logits(peer, network, file, 224, own) for file in (new, again))
        except Failure as error:
            self.add(peer.name, "this", peer.name, version, network, "", "refused", f"{error}", "")
            return
        off = ratio(first, second)
        said = "equal bit for bit" if np.array_equal(first, second) else f"{off:.1e}"
        self.add(peer.name, "this", peer.name, version, network, 224, "", said, command)

    def between(self, source: Peer, target: Peer, network: str) -> None:
        """Write what one library has saved for another."""
        kept, sent = self.file(source, network, "kept"), self.file(target, network, "sent")
        if not kept.exists() or not sent.exists():
            return
        output = self.directory / f"between{target.suffix}"
        flags = self.flags(network, source.flags, target.flags)
        try:
            command = convert(kept, target.library, output, *source.read, *flags)
            equal = output.read_bytes() == sent.read_bytes()
            if not equal and target.suffix in (".pt", ".safetensors"):
                equal = compare_weights(sent, output)
            said = "the same file" if equal is True else equal or "another file"
        except Failure as error:
            said, command = f"refused: {error}", ""
        version = f"{source.requirements.split()[0]}, {target.requirements.split()[0]}"
        self.add(source.name, "this", target.name, version, network, "", said, "", command)


def tables(rows: list[dict]) -> str:
    """Format the rows as Markdown: ways through a library, then files from one for another."""
    lines = [
        "| network | way | version | pixels | weights | logits | date | command |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        if row["by way of"] != "this" or row["from"] == row["to"]:
            way = f"{row['from']} -> {row['by way of']} -> {row['to']}"
            command = "`, then `".join(row["command"].split(" && "))
            cells = (row["network"], way, row["version"], row["size"], row["weights"],
                     row["logits"], row["date"], f"`{command}`")  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    between = [row for row in rows if row["by way of"] == "this" and row["from"] != row["to"]]
    names = list(dict.fromkeys(row["from"] for row in between))
    for network in dict.fromkeys(row["network"] for row in between):
        said = {(r["from"], r["to"]): r["weights"] for r in between if r["network"] == network}
        lines += [
            "",
            f"| {network}: from, to | {' | '.join(names)} |",
            "|" + "---|" * (len(names) + 1),
        ]
        for source in names:
            cells = (said.get((source, target), "") for target in names)
            lines.append(f"| {source} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def visit(square: Square, peer: Peer, networks: list[str]) -> None:
    """Install a library, send every network through it, and remove the library."""
    with tempfile.TemporaryDirectory(dir=square.directory) as directory:
        if not square.python:
            run([sys.executable, "-m", "venv", directory])
            pip = [f"{directory}/bin/pip", "install", "--quiet", "--disable-pip-version-check"]
            run(pip + peer.requirements.split())
            square.driver_python = f"{directory}/bin/python"
        for network in networks:
            square.there_and_back(peer, network)
            square.here_and_back(peer, network)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--python")
    options = parser.parse_args()
    if options.table:
        print(tables([*csv.DictReader(options.table.read_text().splitlines())]), end="")
        return
    only = options.only.split(",") if options.only else [peer.library for peer in PEERS]
    chosen, networks = [peer for peer in PEERS if peer.library in only], options.networks.split(",")
    with tempfile.TemporaryDirectory() as directory:
        square = Square(Path(directory), options.output.absolute(), options.python)
        for network in networks:
            square.train(network)
        for peer in chosen:
            visit(square, peer, networks)
        for network in networks:
            for source, target in permutations(chosen, 2):
                if source.library != target.library:  # one network has one dropout rate
                    square.between(source, target, network)


if __name__ == "__main__":
    main()
