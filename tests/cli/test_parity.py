"""The original's flags and schedules: none is lost, none is added in silence, none is one late."""

import ast
import math
from fractions import Fraction

import pytest
import torch

import opts
from distributed.rendezvous import source_files
from engine.schedule import LRSchedule, cosine_lr, multistep_lr
from helpers.run_main import ROOT

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
    "nImages": "the size of the synthetic dataset",
    "onBadImage": "a damaged file must not decide whether a run ends",
    "keep": "checkpoints fill disks",
    "saveEvery": "an ImageNet epoch is too long to lose",
    "override": "a run is continued with other settings only on purpose",
    "milestones": "schedules of other papers",
    "kernels": "the fused layers are one of two ways to compute the same, and one may be at fault",
    "cudaGraph": "a step captured once is replayed as it was, which some tools cannot look into",
    "initChannels": "the paper's stem and the Lua code's differ",
    "syncBN": "batch normalisation over a small share of a batch is another network",
    "timeout": "a dead process must not be waited for half an hour",
}
READ_BY_NOTHING = dict.fromkeys(
    ("backend", "gen", "optimState"), "read by the Lua code's parser and by nothing after it"
)
READ_IN_OPTS_ONLY = {
    "config": "names the file that opts.py itself reads",
    "shareGradInput": "becomes optMemory there",
    "optnet": "becomes optMemory there",
}


def test_the_flags_are_the_originals_and_the_additions():
    assert sorted(opts.FLAGS) == sorted([*ORIGINAL.split(), *ADDED])
    assert all(ADDED.values())


def test_every_flag_of_the_original_is_taken_in_both_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ORIGINAL.split():
        # Its default where it has one, so that no combination is at fault.
        fitting = {"depth": "100", "dropRate": "0", "shortcutType": "A"}
        value = opts.as_text(opts.FLAGS[name].default) or fitting.get(name, "1")
        for dashes in ("-", "--"):
            opts.parse([f"{dashes}{name}", value])


def flags_read(source: str) -> set[str]:
    """The names NAME that appear as `opt.NAME`, other than to set them."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "opt"
        and isinstance(node.ctx, ast.Load)
    }


def test_every_flag_is_read_by_the_program():
    files = source_files(ROOT)
    outside = [
        path for path in files if path.relative_to(ROOT).parts[0] not in ("opts.py", "tools")
    ]
    read = set.union(*(flags_read(path.read_text()) for path in outside))
    unread = set(opts.FLAGS) - read
    assert unread == READ_BY_NOTHING.keys() | READ_IN_OPTS_ONLY.keys()
    assert set(opts.IGNORED_FLAGS) == READ_BY_NOTHING.keys()
    in_opts = flags_read((ROOT / "opts.py").read_text())
    assert READ_IN_OPTS_ONLY.keys() - {"config"} <= in_opts
    assert not READ_BY_NOTHING.keys() & in_opts


def test_a_flag_that_is_only_set_or_named_would_be_found():
    assert flags_read('opt.gen = 1; print("opt.backend", other.depth, opt.LR)') == {"LR"}


# ------------------------------------------------------------------------------------- schedules


def rates(num_epochs: int, imagenet: bool, net_type: str = "densenet") -> list[float]:
    """The rate of each epoch by the defaults of the program."""
    milestones = opts.default_milestones(num_epochs, imagenet, net_type)
    return [multistep_lr(0.1, milestones, epoch) for epoch in range(1, num_epochs + 1)]


@pytest.mark.parametrize(
    ("line", "spans"),
    [
        ("", {0.1: 149, 0.01: 75, 0.001: 76}),
        ("--dataset cifar100", {0.1: 149, 0.01: 75, 0.001: 76}),
        ("--dataset svhn", {0.1: 19, 0.01: 10, 0.001: 11}),
        ("--dataset imagenet", {0.1: 30, 0.01: 30, 0.001: 30}),
        ("--dataset imagenet --depth 161", {0.1: 30, 0.01: 30, 0.001: 30, 0.0001: 10}),
        # fb.resnet.torch: decay = epoch >= 122 and 2 or epoch >= 81 and 1 or 0.
        ("--netType resnet", {0.1: 80, 0.01: 41, 0.001: 43}),
        ("--netType preresnet --dataset cifar100", {0.1: 80, 0.01: 41, 0.001: 43}),
        ("--netType resnet --dataset svhn", {0.1: 19, 0.01: 10, 0.001: 11}),
        ("--netType preresnet --dataset imagenet", {0.1: 30, 0.01: 30, 0.001: 30}),
    ],
)
def test_the_default_rates_are_those_of_the_table(line, spans):
    opt = opts.parse(line.split())
    schedule = LRSchedule(opt.lrShape, opt.LR, opt.nEpochs, opt.milestones)
    expected = [rate for rate, count in spans.items() for _ in range(count)]
    for step in (1, 7):  # the same all through an epoch
        found = [schedule.lr(epoch, step, 7) for epoch in range(1, opt.nEpochs + 1)]
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_epochs", [*range(1, 13), 39, 40, 41, 164, 299, 300, 301])
def test_cifar_drops_at_the_first_epochs_past_half_and_three_quarters(num_epochs):
    # train.lua: decay = epoch >= 0.75 n and 2 or epoch >= 0.5 n and 1 or 0.
    def lua(epoch: int) -> float:
        decay = 2 if epoch >= 0.75 * num_epochs else 1 if epoch >= 0.5 * num_epochs else 0
        return 0.1 * math.pow(0.1, decay)

    expected = [lua(epoch) for epoch in range(1, num_epochs + 1)]
    assert rates(num_epochs, imagenet=False) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_epochs", [*range(1, 13), 40, 163, 164, 165, 200, 500])
@pytest.mark.parametrize("net_type", ["resnet", "preresnet"])
def test_residual_networks_drop_at_81_and_122_of_164_in_proportion(net_type, num_epochs):
    drops = [(epoch >= Fraction(81, 164) * num_epochs) + (epoch >= Fraction(122, 164) * num_epochs)
             for epoch in range(1, num_epochs + 1)]  # fmt: skip
    expected = [0.1 / 10**drop for drop in drops]
    assert rates(num_epochs, False, net_type) == pytest.approx(expected, rel=1e-12)
    same = rates(num_epochs, False, net_type) == rates(num_epochs, False)
    assert same == (num_epochs < 13 or num_epochs == 40)  # where rounding hides the difference


@pytest.mark.parametrize("num_epochs", [1, 30, 31, 60, 61, 89, 90, 91, 100, 121])
def test_imagenet_drops_every_thirty_epochs(num_epochs):
    expected = [0.1 * 0.1 ** ((epoch - 1) // 30) for epoch in range(1, num_epochs + 1)]
    assert rates(num_epochs, imagenet=True) == pytest.approx(expected, rel=1e-12)


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
    mine = rates(300, imagenet=False)
    late = stepped_after_each_epoch([150, 225], 300)
    differ = [i + 1 for i in range(300) if not math.isclose(mine[i], late[i], rel_tol=1e-9)]
    assert differ == [150, 225]
    assert mine == pytest.approx(stepped_after_each_epoch([149, 224], 300), rel=1e-9)


def test_the_cosine_ends_at_zero_and_counts_steps_from_one():
    epochs, steps, base = 4, 5, 0.3
    schedule = LRSchedule("cosine", base, epochs, None)
    places = [(epoch, step) for epoch in range(1, epochs + 1) for step in range(1, steps + 1)]
    found = [schedule.lr(*place, steps) for place in places]
    # 0.5 (1 + cos 2x) is cos^2 x.
    total = epochs * steps
    expected = [base * math.cos(math.pi * t / total / 2) ** 2 for t in range(1, total + 1)]
    assert found == pytest.approx(expected, abs=1e-15)
    assert found[-1] == 0
    assert found == sorted(found, reverse=True)
    # The twin: counted from 0 the run begins at the full rate and never comes to rest.
    from_zero = [cosine_lr(base, epoch, step - 1, epochs, steps) for epoch, step in places]
    assert from_zero[0] == base
    assert from_zero[-1] > 0
    assert from_zero != pytest.approx(expected, abs=1e-4)


def test_the_cosine_does_not_depend_on_how_a_run_is_cut_into_epochs():
    halves = [LRSchedule("cosine", 1, 2, None).lr(epoch, step, 6)
              for epoch in (1, 2) for step in range(1, 7)]  # fmt: skip
    thirds = [LRSchedule("cosine", 1, 3, None).lr(epoch, step, 4)
              for epoch in (1, 2, 3) for step in range(1, 5)]  # fmt: skip
    assert halves == thirds
    assert halves != [LRSchedule("cosine", 1, 3, None).lr(1, step, 12) for step in range(1, 13)]
