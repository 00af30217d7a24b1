"""Run a network on a split once: the class of each image, its rank, and how sure the network is."""

from typing import NamedTuple

import numpy as np
import torch

from datasets.factory import Loader
from engine.losses import LOSSES
from engine.metrics import TOP_K, Metrics
from errors import CheckpointError, DataError
from tools.inference import data
from tools.inference.network import LoadedModel

MISTAKES = 30  # kept to be shown


class Predictions(NamedTuple):
    """Hold what one pass over n images finds, as arrays (n,)."""

    numbers: np.ndarray  # of the images in their split, ascending
    targets: np.ndarray  # their classes
    taken: np.ndarray  # the classes of the largest logits, as the errors count them
    ranks: np.ndarray  # of their classes by logits, from 1
    sure: np.ndarray  # probability of the class taken
    own: np.ndarray  # probability of their classes


def predict(
    net: LoadedModel, split: Loader, metrics: Metrics
) -> tuple[Predictions, list[tuple[float, int, torch.Tensor]]]:
    """Run a network on a split, and add the results to `metrics`.

    Returns:
        What is found, and the MISTAKES of the highest probability: minus it, the place among the
        images that can be read, and the image (C, H, W) as the network sees it.

    Raises:
        CheckpointError, DataError: a logit is not finite; no image can be read.
    """
    labels, found, worst, count = data.labels(split).to(net.device), [], [], 0
    for images, numbers in data.read(net, split):
        logits, targets = net.logits(images), labels[numbers]
        if not logits.isfinite().all():
            raise CheckpointError("a logit is not finite", "use the weights of an earlier epoch")
        metrics.add(LOSSES[net.opt.loss](logits, targets), logits, targets)
        # The first few as Metrics finds them; behind, the target is the last of equal logits.
        best = logits.topk(min(TOP_K, logits.shape[1])).indices
        hits, own = best == targets[:, None], logits.gather(1, targets[:, None])
        behind = (logits >= own).sum(dim=1).clamp(min=best.shape[1] + 1)
        ranks = torch.where(hits.any(dim=1), hits.int().argmax(dim=1) + 1, behind)
        classes = torch.stack([best[:, 0], targets], dim=1)
        sure, own = net.probabilities(logits).gather(1, classes).T.cpu()
        columns = (torch.tensor(numbers), targets, best[:, 0], ranks, sure, own)
        found.append([column.cpu().numpy() for column in columns])
        views = images.unflatten(0, (len(targets), -1))[:, -1]  # of ten crops, a centre
        wrong = (ranks > 1).nonzero().flatten().tolist()
        worst += [(-sure[i].item(), count + i, views[i]) for i in wrong]
        worst, count = sorted(worst, key=lambda each: each[:2])[:MISTAKES], count + len(targets)
        # Copies, or the whole batch would stay.
        worst = [(*key, view.to("cpu", torch.float32, copy=True)) for *key, view in worst]
    if not found:
        raise DataError("no image can be read", "name a --data with others")
    return Predictions(*map(np.concatenate, zip(*found, strict=True))), worst


def calibration(sure: np.ndarray, right: np.ndarray, bins: int = 15) -> tuple:
    """Compare (n,) probabilities with whether they are of the right class.

    Returns:
        Of bins of equal width, with their upper limits, the images, the fraction that is right and
        the mean probability, (bins,) each; and the expected calibration error, the mean over images
        of their difference.
    """
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], sure)
    images = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, weights=values, minlength=bins) for values in (right, sure))
    accuracy, mean = (each / images.clip(1) for each in sums)
    return images, accuracy, mean, float((images * abs(accuracy - mean)).sum() / len(sure))
