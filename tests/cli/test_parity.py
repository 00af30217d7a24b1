"""Test that each flag of the original exists, and that each learning rate changes in its epoch."""

import ast
import math
from fractions import Fraction

import pytest
import torch

import opts
from cli.rules import IGNORED_FLAGS
from distributed.rendezvous import source_files
from engine.schedule import LRSchedule, cosine_lr, multistep_lr
from helpers.run_main import ROOT
from models.registry import ARCHITECTURES

# opts.lua of the released code, in its order.
ORIGINAL = """
    data dataset manualSeed nGPU backend cudnn gen precision nThreads nEpochs epochNumber batchSize
    testOnly tenCrop save resume LR momentum weightDecay lrShape netType depth shortcutType retrain
    optimState shareGradInput optnet resetClassifier nClasses growthRate bottleneck reduction
    dropRate optMemory d1 d2 d3 d4
"""
ADDED = {
    "config": "a run is a file that can be reviewed",
    "printConfig": "shows what the defaults came to",
    "debug": "one-line errors hide the traceback that a bug report needs",
    "tf32": "Lua's single was true float32, so that TF32 has to be asked for",
    "augment": "the paper's tables have columns with and without +",
    "validSize": "the paper holds out 6,000 images of SVHN, the Lua code cannot",
    "imageSize": "folders of any images",
    "nChannels": "X-rays and scans are grey, which costs less, and so are weights for them",
    "inputRange": "weights of torchxrayvision expect pixels from -1024 to 1024",
    "bnEps": "Keras has another epsilon in every norm, and its weights compute with it",
    "adaptChannels": "a first convolution of other channels computes something else when adapted",
    "from": "names tell most libraries apart, not all",
    "paddleDropout": "Paddle scales by it in evaluation, which no name and no value shows",
    "nImages": "the size of the synthetic dataset",
    "onBadImage": "a damaged file must not decide whether a run ends",
    "exifRotate": "cameras turn photos by a tag, which Lua and torchvision do not read",
    "whiteLevel": "12 bits in 16 and float images do not say what is white",
    "resize": "Lua's errors were measured on Torch7's resize, which others do not have",
    "maxPixels": "photos of 108 megapixels and bombs differ in nothing but the user's intent",
    "maxAspect": "strips of spectra are narrower than any photo",
    "keep": "checkpoints fill disks",
    "saveEvery": "an ImageNet epoch is too long to lose",
    "override": "a run is continued with other settings only on purpose",
    "milestones": "schedules of other papers",
    "lrDecay": "Wide ResNets drop the rate to a fifth, others to a tenth",
    "warmupSteps": "ResNet-110 begins at a tenth of its rate, or does not converge",
    "nesterov": "the authors of NIN, All-CNN, DSN and FractalNet trained with plain momentum",
    "loss": "DSN trains an L2-SVM in place of a softmax",
    "auxWeight": "DSN's companions must weigh less than its own loss, by a choice of its authors",
    "preprocess": "networks without batch normalisation were trained on whitened images",
    "widen": "Wide ResNets of one depth differ in it, and tests need small networks",
    "stochasticDepth": "a row of the paper's Table 2 is ResNet-110 with dropped blocks",
    "dropPath": "FractalNet is in the paper's Table 2 with and without it",
    "columns": "FractalNet's deepest column can be trained and tested alone",
    "kernels": "the fused layers are one of two ways to compute the same, and one may be at fault",
    "cudaGraph": "some tools cannot look into a captured step, which is replayed as it was",
    "initChannels": "the paper's stem and the Lua code's differ",
    "syncBN": "batch normalisation over a small part of a batch is another network",
    "timeout": "a dead process must not be waited for half an hour",
}
# These three become optMemory in opts.py, or name the file that it reads.
READ_IN_OPTS_ONLY = {"config", "shareGradInput", "optnet"}
AS_TEXT = '(opt)["from"]'  # a keyword of Python


def test_the_flags_are_the_originals_and_the_additions():
    assert sorted(opts.FLAGS) == sorted([*ORIGINAL.split(), *ADDED])
    assert all(ADDED.values())


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_every_flag_of_the_original_is_taken_in_both_spellings(dashes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitting = {"depth": "100", "dropRate": "0", "shortcutType": "A"}
    for name in ORIGINAL.split():  # with its default where it has one, which conflicts with none
        value = opts.as_text(opts.FLAGS[name].default) or fitting.get(name, "1")
        opts.parse([f"{dashes}{name}", value])


def flags_read(source: str) -> set[str]:
    """Find the names NAME that appear as `opt.NAME`, other than to set them."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "opt"
        and isinstance(node.ctx, ast.Load)
    }


def test_every_flag_is_read_by_the_program():
    outside = [path for path in source_files(ROOT)
               if path.relative_to(ROOT).parts[0] not in ("opts.py", "tools")]  # fmt: skip
    read = set.union(*(flags_read(path.read_text()) for path in outside))
    read |= {name for network in ARCHITECTURES.values() for name in network.arguments.values()}
    read |= {"from" for path in outside if AS_TEXT in path.read_text()}
    assert set(opts.FLAGS) - read == {*IGNORED_FLAGS} | READ_IN_OPTS_ONLY
    # The Lua code's parser accepts three that nothing reads after it; so does this one.
    assert set(IGNORED_FLAGS) == {"backend", "gen", "optimState"}
    in_opts = flags_read((ROOT / "opts.py").read_text())
    assert READ_IN_OPTS_ONLY - {"config"} <= in_opts and not in_opts & set(IGNORED_FLAGS)
    assert flags_read('opt.gen = 1; print("opt.backend", other.depth, opt.LR)') == {"LR"}


# Schedules:
def learning_rates(num_epochs: int, imagenet: bool, net_type: str = "densenet") -> list[float]:
    """Return the learning rate of each epoch by the defaults of the program."""
    milestones = opts.default_milestones(num_epochs, imagenet, net_type)
    return [multistep_lr(0.1, milestones, epoch) for epoch in range(1, num_epochs + 1)]


@pytest.mark.parametrize(
    ("line", "epochs"),
    [
        # How many epochs the rate is 0.1, 0.01, 0.001 and 0.0001: docs/parity.md.
        ("", (149, 75, 76)),
        ("--dataset cifar100", (149, 75, 76)),
        ("--dataset svhn", (19, 10, 11)),
        ("--dataset imagenet", (30, 30, 30)),
        ("--dataset imagenet --depth 161", (30, 30, 30, 10)),
        # fb.resnet.torch: decay = epoch >= 122 and 2 or epoch >= 81 and 1 or 0.
        ("--netType resnet", (80, 41, 43)),
        ("--netType preresnet --dataset cifar100", (80, 41, 43)),
        ("--netType resnet --dataset svhn", (19, 10, 11)),
        ("--netType preresnet --dataset imagenet", (30, 30, 30)),
    ],
)
def test_the_default_rates_are_those_of_the_table(line, epochs):
    opt = opts.parse(line.split())
    schedule = LRSchedule(opt.lrShape, opt.LR, opt.nEpochs, opt.milestones)
    expected = [10.0 ** -(i + 1) for i, count in enumerate(epochs) for _ in range(count)]
    for step in (1, 7):  # the same throughout an epoch
        found = [schedule.lr(epoch, step, 7) for epoch in range(1, opt.nEpochs + 1)]
        assert found == pytest.approx(expected, rel=1e-12)


def drops_of_cifar(epoch: int, n: int) -> int:
    # train.lua: decay = epoch >= 0.75 n and 2 or epoch >= 0.5 n and 1 or 0.
    return 2 if epoch >= 0.75 * n else 1 if epoch >= 0.5 * n else 0


def drops_of_residual(epoch: int, n: int) -> int:
    return (epoch >= Fraction(81, 164) * n) + (epoch >= Fraction(122, 164) * n)


def drops_of_imagenet(epoch: int, n: int) -> int:
    return (epoch - 1) // 30


@pytest.mark.parametrize("n", [*range(1, 13), 30, 31, 39, 40, 41, 61, 90, 121, 163, 164, 165, 300])
@pytest.mark.parametrize(
    ("drops", "imagenet", "net_type"),
    [
        (drops_of_cifar, False, "densenet"),
        (drops_of_residual, False, "resnet"),
        (drops_of_residual, False, "preresnet"),
        (drops_of_imagenet, True, "densenet"),
    ],
)
def test_the_rate_drops_in_the_same_epochs_as_the_originals(drops, imagenet, net_type, n):
    expected = [0.1 / 10 ** drops(epoch, n) for epoch in range(1, n + 1)]
    assert learning_rates(n, imagenet, net_type) == pytest.approx(expected, rel=1e-12)


def test_a_factor_of_a_tenth_divides_the_rate_by_ten():
    pairs = [(lr, k) for lr in (0.1, 0.025, 0.05, 0.3) for k in range(5)]
    found = [multistep_lr(lr, [2] * k, 2) for lr, k in pairs]
    assert found == [lr / 10**k for lr, k in pairs] != [lr * 0.1**k for lr, k in pairs]


def stepped_after_each_epoch(milestones: list[int], num_epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    found = []
    for _ in range(num_epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_a_scheduler_stepped_after_each_epoch_is_one_late():
    found, late = learning_rates(300, imagenet=False), stepped_after_each_epoch([150, 225], 300)
    differ = [i + 1 for i in range(300) if not math.isclose(found[i], late[i], rel_tol=1e-9)]
    assert differ == [150, 225]
    assert found == pytest.approx(stepped_after_each_epoch([149, 224], 300), rel=1e-9)


def test_the_cosine_ends_at_zero_and_counts_steps_from_one():
    epochs, steps, base = 4, 5, 0.3
    schedule = LRSchedule("cosine", base, epochs, None)
    positions = [(epoch, step) for epoch in range(1, epochs + 1) for step in range(1, steps + 1)]
    found = [schedule.lr(*position, steps) for position in positions]
    # 0.5 (1 + cos 2x) is cos^2 x.
    total = epochs * steps
    expected = [base * math.cos(math.pi * t / total / 2) ** 2 for t in range(1, total + 1)]
    assert found == pytest.approx(expected, abs=1e-15)
    assert found[-1] == 0 and found == sorted(found, reverse=True)
    # Counted from 0, the run begins at the full rate and ends above zero.
    from_zero = [cosine_lr(base, epoch, step - 1, epochs, steps) for epoch, step in positions]
    assert from_zero[0] == base and from_zero[-1] > 0
    # Only the step within the run counts, not how the run is divided into epochs.
    fifths = LRSchedule("cosine", base, 5, None)
    assert found == [fifths.lr(epoch, step, 4) for epoch in range(1, 6) for step in range(1, 5)]
