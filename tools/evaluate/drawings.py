"""Draw how sure a network is when it is right and wrong, and the mistakes that it is surest of."""

import numpy as np
from torch import Tensor

from experiment.drawing import RIGHT, WIDTH, WRONG, Figure, shorten, styled
from tools.evaluate.predictions import Predictions
from tools.inference.network import LoadedModel

COLUMNS, LETTERS = 5, 26  # of the contact sheet; in a line above a picture


@styled
def curves(bins: list[np.ndarray], ece: float, ranks: np.ndarray, num_classes: int) -> Figure:
    """Draw the bins and the error of `calibration`, and the error in the top k."""
    images, accuracy, mean = bins
    figure, is_short = Figure(figsize=(WIDTH, 2.9)), num_classes <= 20
    reliability, histogram, topk = figure.subplots(1, 3)
    middle = (np.arange(len(images)) + 0.5) / len(images)
    for axes, heights, label in (
        (reliability, accuracy, "right, % (dots: if calibrated)"),
        (histogram, images / len(ranks), "images, %"),
    ):
        axes.bar(middle, 100 * heights, 0.9 / len(images), color=RIGHT)
        axes.set(xlabel="probability of the class named", ylabel=label, xlim=(0, 1))
    reliability.plot(mean[images > 0], 100 * mean[images > 0], ".--", color=WRONG)
    reliability.set(title=f"expected calibration error {100 * ece:.2f} %", ylim=(0, 100))
    histogram.set(title="images of each bar")
    errors = 100 - 100 * np.bincount(ranks, minlength=num_classes + 1)[1:].cumsum() / len(ranks)
    topk.plot(range(1, num_classes + 1), errors, ".-" if is_short else "-", color=RIGHT)
    topk.set(title=f"top-1 error {errors[0]:.2f} %", xlabel="k", ylabel="class not in the top k, %")
    topk.set(xscale="linear" if is_short else "log", ylim=(0, None))
    topk.xaxis.get_major_locator().set_params(**{"integer": True} if is_short else {})
    topk.xaxis.set(major_formatter="{x:g}", minor_formatter="")
    return figure


@styled
def mistakes(
    net: LoadedModel, found: Predictions, worst: list[tuple], names: list[str], classes: list[str]
) -> Figure:
    """Draw the mistakes that `predict` returns, with the `names` of the split's images."""
    rows = max(1, -(-len(worst) // COLUMNS))
    figure = Figure(figsize=(WIDTH, 0.4 + 2.1 * rows))
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, (_, place, image) in zip(panels, worst, strict=False):
        axes.imshow(as_pixels(image, net))
        taken = f"{100 * found.sure[place]:.1f} % {classes[found.taken[place]]}"
        name, target = names[found.numbers[place]], classes[found.targets[place]]
        below = name[name.rfind(f"/{target}/") + 1 :][::-1]  # of a path the end tells the most
        lines = (shorten(line, LETTERS) for line in (below, f"is {target}", taken))
        axes.set_title("\n".join([next(lines)[::-1], *lines]), size=7)
    figure.suptitle(f"{len(worst) or 'no'} mistakes, those of the highest probability")
    return figure


def as_pixels(image: Tensor, net: LoadedModel) -> np.ndarray:
    """Undo the normalisation of an image (C, H, W): (H, W, 3) uint8, grey unless C is 3."""
    pixels = image.permute(1, 2, 0).numpy()
    if net.opt.preprocess == "normalise":
        pixels = pixels * net.std + net.mean
    else:
        pixels = 255 * (pixels - pixels.min()) / max(np.ptp(pixels), 1e-6)
    if pixels.shape[2] != 3:
        pixels = pixels.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return pixels.round().clip(0, 255).astype(np.uint8)
