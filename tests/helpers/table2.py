"""Restate the other networks of the paper's Table 2 by function, with the weights of a model.

Each function follows a paper or its authors' files, and no code of models/. What a step draws is
given: masks of dropout, dropped blocks, paths kept. `slip` is a mistake made on purpose.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.losses import LOSSES, mean_loss
from helpers.networks import scramble
from models.dense_block import Dropout

Results = dict[str, Tensor | None]
Joins = list[dict[int, list[int]]]
Path = tuple[int, Callable[[], Tensor]]  # a column, and what computes its value before a join


class Restatement:
    """Hold weights and buffers; each function named as a netType computes logits of images.

    Args:
        rate: of the dropout of wideresnet, and of the last block of fractalnet.
        dropped: blocks of resnet, counted from 1, that the step leaves out.
        joins: columns of fractalnet that the step keeps, by block and position; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        slip: str = "",
        rate: float = 0.0,
        dropped: Iterable[int] = (),
        joins: Joins | None = None,
    ):
        self.weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        self.buffers = {n: b.clone() for n, b in model.named_buffers()}
        self.slip, self.rate, self.dropped, self.joins = slip, rate, dropped, joins
        self.training, self.masks, self.heads = True, {}, []

    def unless(self, slip: str, right, wrong):
        return wrong if self.slip == slip else right

    # Layers:
    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[2] // 2 if padding is None else 0)

    def linear(self, name: str, x: Tensor, scale: float = 1) -> Tensor:
        return scale * (x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"])

    def bn(self, name: str, x: Tensor) -> Tensor:
        mean, variance = (self.buffers[f"{name}.running_{kind}"] for kind in ("mean", "var"))
        if self.training:
            running, count = (mean, variance), x.numel() / x.shape[1]
            mean = x.mean((0, 2, 3))
            variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
            for old, new in zip(running, (mean, variance * count / (count - 1)), strict=True):
                old.copy_(0.9 * old + 0.1 * new.detach())
            self.buffers[f"{name}.num_batches_tracked"] += 1
        scale = self.weights[f"{name}.weight"] / (variance + 1e-5).sqrt()
        shift = self.weights[f"{name}.bias"] - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def bn_relu(self, name: str, x: Tensor) -> Tensor:
        return self.bn(name, x).relu()

    def drop(self, name: str, x: Tensor, rate: float) -> Tensor:
        if not self.training or rate == 0:
            return x
        mask = self.masks.pop(name).reshape(x.shape)
        assert ((mask == 0) | ((mask - 1 / (1 - rate)).abs() < 1e-9)).all()
        return x * mask

    def pooled(self, x: Tensor, size: int) -> Tensor:
        pool = self.unless("average pooling", F.max_pool2d, F.avg_pool2d)
        return pool(x, size, 2, ceil_mode=size == 3)

    # Networks without batch norm:
    def pixel_scores(self, x: Tensor, rectified: bool = True) -> Tensor:
        weight, bias = self.weights["classifier.weight"], self.weights["classifier.bias"]
        scores = F.conv2d(x, weight[:, :, None, None], bias)
        if self.slip == "mean score rectified":
            return scores.mean((2, 3)).relu()
        rectified = self.unless("scores rectified or not", rectified, not rectified)
        return (scores.relu() if rectified else scores).mean((2, 3))

    def nin(self, x: Tensor, rectified: bool = True, companions: bool = False) -> Tensor:
        for i, (at, count) in enumerate(((0, 3), (8, 3), (16, 2))):
            x = self.drop(f"features.{at - 1}", self.pooled(x, 3), 0.5) if i else x
            for j in range(count):
                x = self.conv(f"features.{at + 2 * j}", x)
                if companions and j == 0:
                    flat = self.unless("companion after the ReLU", x, x.relu()).flatten(1)
                    scale = self.unless("companion not scaled", 1e-3**0.5, 1)
                    self.heads.append(self.linear(f"companions.{i}", flat, scale))
                x = x.relu()
        return self.pixel_scores(x, rectified)

    def dsn(self, x: Tensor) -> Tensor:
        return self.nin(x, rectified=False, companions=self.training)

    def allcnn(self, x: Tensor) -> Tensor:
        x = self.drop("features.0", x, 0.2)
        for at in (1, 8):
            for j, stride in enumerate((1, 1, 2)):
                x = self.conv(f"features.{at + 2 * j}", x, stride).relu()
            x = self.drop(f"features.{at + 6}", x, 0.5)
        x = self.conv("features.15", x, 1, self.unless("last 3x3 padded", 0, None)).relu()
        return self.pixel_scores(self.conv("features.17", x).relu())

    def highway(self, x: Tensor) -> Tensor:
        for first, end in ((1, 7), (9, 16), (18, 25)):
            x = self.drop(f"features.{first - 1}", self.pooled(x, 2) if first > 1 else x, 0.2)
            x = self.conv(f"features.{first}", x).relu()
            for i in range(first + 2, end):
                h = self.conv(f"features.{i}.conv", x).relu()
                reads = self.unless("gate reads the transform", x, h)
                t = self.conv(f"features.{i}.gate", reads).sigmoid()
                t = self.unless("gates swapped", t, 1 - t)
                x = h * t + x * (1 - t)
        x = self.conv("features.25", x)
        x = self.unless("1x1 not rectified", x.relu(), x)
        return self.linear("classifier", self.drop("drop", x.mean((2, 3)), 0.2))

    # Residual networks with two blocks a stage and shortcuts B:
    def shortcut(self, name: str, x: Tensor, stride: int) -> Tensor:
        if f"{name}.0.weight" in self.weights:
            return self.bn(f"{name}.1", self.conv(f"{name}.0", x, stride))
        return self.conv(name, x, stride) if f"{name}.weight" in self.weights else x

    def resnet(self, x: Tensor) -> Tensor:
        """Compute stochastic depth with P_L = 0.5: six blocks survive by 1 - l / 6 (1 - P_L)."""
        x = self.bn_relu("bn1", self.conv("conv1", x))
        for block in range(1, 7):
            i, j = divmod(block - 1, 2)
            at, stride = f"layer{i + 1}.{j}", 2 if i > 0 and j == 0 else 1
            short = self.shortcut(f"{at}.downsample", x, stride)
            if self.training and block in self.dropped:
                x = self.unless("shortcut not rectified", short.relu(), short)
                continue
            y = self.bn_relu(f"{at}.bn1", self.conv(f"{at}.conv1", x, stride))
            y = self.bn(f"{at}.bn2", self.conv(f"{at}.conv2", y))
            survival = self.unless("survival does not fall", 1 - block / 6 * 0.5, 0.5)
            scales = self.unless("branch scaled in training", (1, survival), (1 / survival, 1))
            x = (y * scales[0 if self.training else 1] + short).relu()
        return self.linear("fc", x.mean((2, 3)))

    def wideresnet(self, x: Tensor) -> Tensor:
        x = self.conv("stem", x)
        for i, j in ((i, j) for i in range(3) for j in range(2)):
            at, stride = f"stages.{i}.{j}", 2 if i > 0 and j == 0 else 1
            drop = partial(self.drop, f"{at}.drop", rate=self.rate)
            y = self.bn_relu(f"{at}.bn1", x)
            reads = y if j == 0 and self.slip != "raw shortcut" else x
            short = self.shortcut(f"{at}.downsample", reads, stride)
            y = self.bn_relu(f"{at}.bn2", self.conv(f"{at}.conv1", y, stride))
            if self.slip == "dropout after the second convolution":
                y = drop(self.conv(f"{at}.conv2", y))
            else:
                y = self.conv(f"{at}.conv2", drop(y))
            x = y + short
        return self.linear("fc", self.bn_relu("bn", x).mean((2, 3)))

    # FractalNet with C = 3, by the recursion of its section 2:
    def fractalnet(self, x: Tensor) -> Tensor:
        for block in range(5):
            paths = self.paths(block, 1, 0, lambda x=x: x)
            x = self.pooled(self.join(block, 4, paths), 2)
        return self.linear("classifier", x.mean((2, 3)))

    def paths(self, block: int, column: int, unit: int, x: Callable[[], Tensor]) -> list[Path]:
        """List what the join after f_(4 - column)(x) averages; `unit`: which f of the block."""
        name = f"column{column}.{block}.{unit}"
        has_it = f"{name}.conv.weight" in self.weights
        own = [(column, lambda: self.unit(name, x(), self.rate * block / 4))] if has_it else []
        if column == 3:
            return own
        first, middle = (
            self.paths(block, column + 1, 2 * unit, x),
            (2 * unit + 1) * 2 ** (2 - column),
        )
        joined = cache(lambda: self.join(block, middle, first))
        return own + self.paths(block, column + 1, 2 * unit + 1, joined)

    def join(self, block: int, position: int, paths: list[Path]) -> Tensor:
        kept = {1, 2, 3} if self.joins is None or not self.training else self.joins[block][position]
        values = [compute() for column, compute in paths if column in kept]
        by_all = self.unless("join divides by all paths", len(values), len(paths))
        return sum(values) / self.unless("join sums", by_all, 1)

    def unit(self, name: str, x: Tensor, rate: float) -> Tensor:
        x, drop = self.conv(f"{name}.conv", x), partial(self.drop, f"{name}.drop", rate=rate)
        if self.slip == "dropout after batch norm":
            return drop(self.bn(f"{name}.norm", x)).relu()
        return self.bn_relu(f"{name}.norm", drop(x))

    # Losses and results:
    def squared_hinge(self, logits: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=logits.dtype)
        for row, target in zip(logits, targets.tolist(), strict=True):
            for k, score in enumerate(row):
                margin = 1 - (score if k == target else -score)
                if margin > 0:
                    total = total + self.unless("hinge not squared", margin**2, margin)
        return total / self.unless("mean over classes", len(logits), logits.numel())

    def results(self, name: str, images: Tensor, targets: Tensor) -> Results:
        """Return what `results_of` does."""
        logits = getattr(self, name)(images)
        loss = F.cross_entropy(logits, targets)
        if name == "dsn":  # weights alpha * 0.1 (1 - t / N) of the paper's section 2
            progress = self.buffers["progress"].item()
            weight = self.unless("companions' weight does not fall", 0.1 * (1 - progress), 0.1)
            losses = [self.squared_hinge(head, targets) for head in self.heads]
            loss = self.squared_hinge(logits, targets) + weight * sum(losses)
        loss.backward()
        assert not self.masks
        self.training = False
        with torch.no_grad():
            evaluated = getattr(self, name)(images)
        gradients = {name: tensor.grad for name, tensor in self.weights.items()}
        return gathered(loss, [logits, *self.heads], evaluated, gradients) | self.buffers


def gathered(loss: Tensor, logits: list[Tensor], evaluated: Tensor, gradients: Results) -> Results:
    found = {f"logits of classifier {i}": each.detach() for i, each in enumerate(logits)}
    found |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    return found | {"loss": loss.detach(), "evaluated": evaluated}


def results_of(
    model: nn.Module, images: Tensor, targets: Tensor, loss: str
) -> tuple[Results, dict[str, Tensor]]:
    """Return the results of a training step and the evaluation after it; the masks it drew."""
    masks, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, Dropout) and module.rate > 0:

            def record(module: Dropout, inputs: tuple[Tensor], name: str = name) -> None:
                state = torch.get_rng_state()
                masks[name] = module.forward(torch.ones_like(inputs[0]))
                torch.set_rng_state(state)

            handles.append(module.register_forward_pre_hook(record))
    outputs = model.train()(images)
    for handle in handles:
        handle.remove()
    value = mean_loss(LOSSES[loss], outputs, targets)
    value.backward()
    with torch.no_grad():
        evaluated = model.eval()(images)
    logits = [outputs] if isinstance(outputs, Tensor) else [each for each, _ in outputs]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gathered(value, logits, evaluated, gradients) | dict(model.named_buffers()), masks


def difference(
    model: nn.Module, name: str, images: Tensor, targets: Tensor, seed: int = 0, **options: object
) -> float:
    """Return the largest relative difference of any result from the restatement's.

    Args:
        seed: of the step's draws.
        options: of Restatement.
    """
    restated = Restatement(model, **options)
    torch.manual_seed(seed)
    loss = "squaredHinge" if name == "dsn" else "crossEntropy"
    got, restated.masks = results_of(model, images, targets, loss)
    want = restated.results(name, images, targets)
    assert got.keys() == want.keys()
    assert all((got[n] is None) == (want[n] is None) for n in want)
    assert want["evaluated"].abs().max() > 0.01
    errors = [(got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1e-6)
              for n in want if want[n] is not None]  # fmt: skip
    return torch.stack(errors).max().item()  # NaN if any is


def randomised(model: nn.Module) -> nn.Module:
    """Put batch norms and biases where a mistake with them shows, in double precision."""
    with torch.no_grad():
        for module in scramble(model).modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias += 0.2 * torch.randn_like(module.bias)
    return model.double()
