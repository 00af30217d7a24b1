"""Build a FractalNet (arXiv:1605.07648): columns of different depths that meet in joins.

With C columns a block is f_C, where f_1(x) = conv(x) and f_(C+1)(x) is the mean of f_C(f_C(x)) and
conv(x) (section 2). Column c, counted from 1, has 2^(c-1) units in each block. A join averages the
paths that are left; joins right behind each other are one.

Drop-path (section 3.1) removes paths of a whole batch: for half of the batches all columns but one
(global), else each input of a join with a probability, though never all of them (local). What is
removed is neither computed nor kept, nor do its batch norms see the batch.
"""

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dense_block import Dropout
from models.layers import GlobalMeanPool, make_conv, reset_parameters
from models.sync_batchnorm import BatchNorm

CHANNELS = (64, 128, 256, 512, 512)  # of each block
GLOBAL_SHARE = 0.5  # of the batches, with drop-path
# The columns that a join averages, by the number of units of the deepest column before it.
Joins = dict[int, list[int]]


class FractalNet(nn.Module):
    """Compute a FractalNet of five blocks, each followed by 2x2 max pooling.

    Parameters are named by column, block and unit: `column3.0.1.conv.weight`. A network of the
    deepest columns alone has the names of those columns.

    Args:
        stages: units of the deepest column in each block, 2^(C-1).
        num_classes: number of outputs.
        in_channels: of the images.
        columns: how many columns there are, the deepest ones; None: all C.
        drop_rate: dropout of the last block; it grows evenly from 0 in the first.
        drop_path: probability with which local drop-path removes an input of a join.
        widen: multiplies the channels.

    Input (N, in_channels, H, W) of at least 32 pixels, output logits (N, num_classes).
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        num_classes: int,
        *,
        in_channels: int = 3,
        columns: int | None = None,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        widen: float = 1.0,
    ):
        super().__init__()
        self.length, self.drop_path = stages[0], drop_path
        deepest = self.length.bit_length()
        self.columns = range(deepest + 1 - (columns or deepest), deepest + 1)
        widths = [round(widen * width) for width in CHANNELS]
        rates = [drop_rate * i / (len(stages) - 1) for i in range(len(stages))]
        for column in self.columns:
            blocks = nn.ModuleList()
            for before, width, rate in zip([in_channels, *widths], widths, rates, strict=False):
                sizes = [before] + [width] * (self.length // self._span(column))
                units = [Unit(*pair, rate) for pair in itertools.pairwise(sizes)]
                blocks.append(nn.ModuleList(units))
            self.add_module(f"column{column}", blocks)
        self.num_blocks = len(stages)
        self.global_pool = GlobalMeanPool()
        self.classifier = nn.Linear(widths[-1], num_classes)
        reset_parameters(self)

    def _span(self, column: int) -> int:
        """Return over how many units of the deepest column one unit of a column reaches."""
        return self.length >> (column - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, num_classes), of images, (N, in_channels, H, W)."""
        x = images
        for block, joins in enumerate(self.draw_paths() if self.training else self.all_paths()):
            x = F.max_pool2d(self._join(block, self.length, joins, {0: x}), 2)
        return self.classifier(self.global_pool(x))

    def _join(self, block: int, end: int, joins: Joins, known: dict[int, Tensor]) -> Tensor:
        """Compute the maps at a position of a block, and no more than they need.

        Args:
            known: the maps so far by position, the block's input at 0; the result is added.
        """
        if end not in known:
            paths = []
            for column in joins[end]:
                span = self._span(column)
                unit = self.get_submodule(f"column{column}")[block][end // span - 1]
                paths.append(unit(self._join(block, end - span, joins, known)))
            known[end] = sum(paths[1:], paths[0]) / len(paths) if paths[1:] else paths[0]
        return known[end]

    def all_paths(self) -> list[Joins]:
        """Return the columns that end at each position, for each block."""
        ends = {
            position: [column for column in self.columns if position % self._span(column) == 0]
            for position in range(1, self.length + 1)
        }
        return [ends] * self.num_blocks

    def draw_paths(self) -> list[Joins]:
        """Draw which columns a training step keeps at each position, for each block.

        Drawn on the host, which decides what is computed, from the generator that a checkpoint
        holds and whose state all processes share.
        """
        paths = self.all_paths()
        if self.drop_path == 0:
            return paths
        if torch.rand(()).item() < GLOBAL_SHARE:
            column = self.columns[torch.randint(len(self.columns), ()).item()]
            return [{end: [column] for end, own in joins.items() if column in own}
                    for joins in paths]  # fmt: skip
        return [{end: self._draw_join(own) for end, own in joins.items()} for joins in paths]

    def _draw_join(self, columns: list[int]) -> list[int]:
        if len(columns) == 1:
            return columns
        kept = (torch.rand(len(columns)) >= self.drop_path).tolist()
        if not any(kept):
            kept[torch.randint(len(columns), ()).item()] = True
        return [column for column, is_kept in zip(columns, kept, strict=True) if is_kept]


class Unit(nn.Sequential):
    """Run a 3x3 convolution, dropout, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, drop_rate: float):
        drop = {"drop": Dropout(drop_rate)} if drop_rate > 0 else {}
        super().__init__(
            OrderedDict(
                conv=make_conv(in_channels, out_channels, 3),
                **drop,
                norm=BatchNorm(out_channels),
                relu=nn.ReLU(),
            )
        )
