"""Test what stochastic depth and drop-path leave out of a step, and how often."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn

from helpers.networks import network, photographs
from helpers.table2 import Joins, difference, randomised
from models.layers import BlockSizes
from models.resnet import Block

SURVIVALS = [1 - block / 6 * 0.5 for block in range(1, 7)]  # arXiv:1603.09382, equation 4
DEPTH = "--netType resnet --depth 14 --stochasticDepth 0.5 --imageSize 9"
PATHS = "--netType fractalnet --widen 0.06 --dropPath 0.4"
DRAWS = 10_000


def small(line: str) -> nn.Module:
    return network(f"--dataset synthetic {line}", 5)


def sigmas(count: int, draws: int, probability: float) -> float:
    """Return by how many standard errors a count differs from what is expected."""
    error = math.sqrt(draws * probability * (1 - probability))
    return abs(count - draws * probability) / error


# For a fixed draw:
def dropped_blocks(seed: int) -> list[int]:
    """Return the blocks that a step with that seed drops: one draw of each, in order."""
    torch.manual_seed(seed)
    return [block for block, survival in enumerate(SURVIVALS, 1) if torch.rand(()) >= survival]


def difference_of_depth(seed: int, slip: str = "") -> float:
    torch.manual_seed(1)
    model = randomised(small(f"{DEPTH} --shortcutType B"))
    images, targets = photographs(3, 9, 5)
    dropped = dropped_blocks(seed)
    return difference(model, "resnet", images, targets, seed, slip=slip, dropped=dropped)


@pytest.mark.parametrize(("seed", "dropped"), [(4, []), (8, [2, 3, 6]), (14, [3, 4, 5, 6])])
def test_a_step_of_stochastic_depth_equals_the_restatement_without_what_is_dropped(seed, dropped):
    assert dropped_blocks(seed) == dropped
    assert difference_of_depth(seed) < 1e-9


@pytest.mark.parametrize(
    "slip", ["branch scaled in training", "survival does not fall", "shortcut not rectified"]
)
def test_a_slip_in_stochastic_depth_would_be_noticed(slip):
    assert difference_of_depth(8, slip) > 1e-3


def difference_of_paths(seed: int, columns: int = 3, slip: str = "") -> float:
    torch.manual_seed(1)
    model = randomised(small(f"{PATHS} --columns {columns}"))
    images, targets = photographs(3, 32, 5)
    torch.manual_seed(seed)
    joins = model.draw_paths()
    return difference(model, "fractalnet", images, targets, seed, slip=slip, joins=joins)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_a_step_of_drop_path_equals_the_restatement_without_what_is_dropped(seed, columns):
    assert difference_of_paths(seed, columns) < 1e-9


def test_seeds_above_draw_both_kinds_and_a_slip_in_drop_path_would_be_noticed():
    model, kinds = small(PATHS), {}
    for seed in range(6):
        torch.manual_seed(seed)
        kinds[seed] = only_column(model.draw_paths())
    assert len(set(kinds.values())) > 2 and None in kinds.values()
    local = next(seed for seed in kinds if kinds[seed] is None)
    for slip in ("join divides by all paths", "join sums"):
        assert difference_of_paths(local, slip=slip) > 1e-3


def only_column(joins: Joins) -> int | None:
    """Return the column that a global draw keeps; None for a local one."""
    kept = {column for block in joins for own in block.values() for column in own}
    return kept.pop() if len(kept) == 1 else None


# Over many draws:
class Counted(nn.Identity):
    runs = 0

    def forward(self, x):
        self.runs += 1
        return x


def test_blocks_survive_as_often_as_their_probability_says():
    blocks = [module for module in small(DEPTH).modules() if isinstance(module, Block)]
    for block in blocks:
        block.conv1 = Counted()
        block.bn1 = block.conv2 = block.bn2 = block.downsample = nn.Identity()
    x = torch.zeros(1)
    for _ in range(DRAWS):
        for block in blocks:
            block(x)
    runs = [block.conv1.runs for block in blocks]
    assert max(sigmas(*pair) for pair in zip(runs, [DRAWS] * 6, SURVIVALS, strict=True)) < 4
    for wrong in ([0.5] * 6, [1 - block / 6 * 0.45 for block in range(1, 7)]):
        assert max(sigmas(*pair) for pair in zip(runs, [DRAWS] * 6, wrong, strict=True)) > 8


def subsets(columns: tuple[int, ...], rate: float, rescue: float) -> dict[tuple[int, ...], float]:
    """Return how probable each set of kept columns is; `rescue`: of one if all are dropped."""
    found = {}
    for bits in range(1, 2 ** len(columns)):
        kept = tuple(column for i, column in enumerate(columns) if bits >> i & 1)
        found[kept] = (1 - rate) ** len(kept) * rate ** (len(columns) - len(kept))
        if len(kept) == 1:
            found[kept] += rescue * rate ** len(columns) / len(columns)
    return found


def test_local_drop_path_keeps_each_set_of_paths_as_often_as_its_rate_says():
    model = small(PATHS)
    drawn = [model.draw_paths() for _ in range(DRAWS)]
    kinds = Counter(only_column(joins) for joins in drawn)
    assert sigmas(kinds[None], DRAWS, 0.5) < 4  # half of the batches
    assert all(sigmas(kinds[c], DRAWS - kinds[None], 1 / 3) < 4 for c in (1, 2, 3))
    local = [joins for joins in drawn if only_column(joins) is None]
    ends = {2: (2, 3), 4: (1, 2, 3)}  # columns that meet, by position
    worst = Counter()
    for block in range(5):
        assert all(joins[block][1] == joins[block][3] == [3] for joins in local)
        for end, columns in ends.items():
            found = Counter(tuple(joins[block][end]) for joins in local)
            assert () not in found
            for rate, rescue in ((0.4, 1), (0.35, 1), (0.4, 0)):
                wanted = subsets(columns, rate, rescue)
                assert found.keys() == wanted.keys()
                values = [sigmas(found[kept], len(local), wanted[kept]) for kept in wanted]
                worst[rate, rescue] = max(worst[rate, rescue], *values)
    assert worst[0.4, 1] < 4
    assert worst[0.35, 1] > 8 and worst[0.4, 0] > 8
    alike = sum(joins[0][4] == joins[1][4] for joins in local)  # blocks draw for themselves
    assert sigmas(alike, len(local), sum(p**2 for p in subsets(ends[4], 0.4, 1).values())) < 4


def test_the_mean_output_of_steps_is_that_of_evaluation():
    # With fixed statistics, and an input so large that the ReLU after the sum does nothing.
    sizes = BlockSizes(4, 4, 4, 1)
    block = Block(sizes, shortcut="A", bottleneck=False, strides_late=False).double().eval()
    block.survival, x = 0.6, 50 + torch.randn(2, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        evaluated = block(x)
        block.training = True  # its batch norms stay as they are
        torch.manual_seed(0)
        outputs = torch.stack([block(x) for _ in range(DRAWS)])
    branch = (outputs - x).abs().amax(0)
    assert (outputs > 0).all() and branch.min() > 1e-3
    error = branch * math.sqrt(0.6 * 0.4 / DRAWS)
    mean = outputs.mean(0)
    assert ((mean - evaluated).abs() < 4 * error).all()
    scaled = x + (mean - x) / 0.6  # as if steps scaled the branch, too
    unscaled = x + (evaluated - x) / 0.6  # as if evaluation did not
    assert ((scaled - evaluated).abs() > 8 * error).all()
    assert ((mean - unscaled).abs() > 8 * error).all()


# What is left out is neither computed nor kept:
def runs_and_bytes(model: nn.Module, images: torch.Tensor) -> tuple[set[str], int]:
    """Return the convolutions that a step runs, and the bytes of maps that it keeps."""
    ran, storages = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(images).sum().backward()
    assert len(ran) == len(set(ran))
    return set(ran), sum(each.nbytes() for at, each in storages.items() if at not in own)


def counted_norms(model: nn.Module) -> set[str]:
    """Return the batch norms that have seen a batch."""
    state = model.state_dict().items()
    return {name.rpartition(".")[0] for name, value in state
            if name.endswith("num_batches_tracked") and value > 0}  # fmt: skip


def test_a_dropped_block_runs_no_convolution_and_keeps_nothing(monkeypatch):
    model, images = small(DEPTH), photographs(3, 9)[0].float()
    draws = [0.0] * 6
    monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(draws.pop(0)))
    all_runs, whole = runs_and_bytes(copy.deepcopy(model), images)
    draws += [0.0, 0.99, 0.0, 0.99, 0.0, 0.99]
    ran, rest = runs_and_bytes(model, images)
    left_out = {f"layer{i}.1.conv{j}" for i in (1, 2, 3) for j in (1, 2)}
    assert len(all_runs) == 13 and ran == all_runs - left_out
    assert counted_norms(model) == {name.replace("conv", "bn") for name in ran}
    # A block keeps what its convolutions and its ReLUs compute, four maps, and means and
    # deviations of two batch norms, in four bytes a number.
    sizes = ((16, 9), (32, 5), (64, 3))
    assert whole - rest == sum(4 * (4 * 3 * c * side**2 + 4 * c) for c, side in sizes)


@pytest.mark.parametrize("column", [1, 2, 3])
def test_a_dropped_column_runs_no_convolution_and_keeps_nothing(column, monkeypatch):
    model, images = small(PATHS), photographs(3, 32)[0].float()
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(0.1))  # global
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(column - 1))
    ran, kept = runs_and_bytes(model, images)
    units = {f"column{column}.{block}.{unit}"
             for block in range(5) for unit in range(2 ** (column - 1))}  # fmt: skip
    assert ran == {f"{unit}.conv" for unit in units}
    assert counted_norms(model) == {f"{unit}.norm" for unit in units}
    # Images and the classifier's input; of a unit what convolution and ReLU compute, mean and
    # deviation; of a pooling where the largest were, in eight bytes each, and what a unit reads.
    numbers, widths = images.numel() + 3 * 31, (4, 8, 15, 31, 31)
    for c, side in zip(widths, (32, 16, 8, 4, 2), strict=True):
        numbers += 2 ** (column - 1) * (2 * 3 * c * side**2 + 2 * c)
        numbers += 3 * c * (side // 2) ** 2 * (3 if side > 2 else 2)
    assert kept == 4 * numbers
