"""Test Metrics: every loss and error that is shown, against plain computations."""

import math

import pytest
import torch
import torch.nn.functional as F

from engine.metrics import MAX_CLASSES, Metrics, Results

CPU = torch.device("cpu")
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def draw(sizes: list[int], num_classes: int = 10) -> Batches:
    return [(torch.randn(size, num_classes), torch.randint(num_classes, (size,))) for size in sizes]


def metrics_of(batches: Batches, metrics: Metrics | None = None) -> Metrics:
    metrics = metrics or Metrics(CPU)
    for logits, targets in batches:
        metrics.add(F.cross_entropy(logits, targets), logits, targets)
    return metrics


def image_by_image(batches: Batches) -> dict[str, float]:
    """Compute the mean loss, and the errors by the rank of the target among the sorted logits."""
    losses, ranks = [], []
    for logits, targets in batches:
        for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
            losses.append(math.log(sum(math.exp(value - row[target]) for value in row)))
            ranks.append(sorted(row, reverse=True).index(row[target]))
    count = len(losses)
    errors = {f"top{k}": 100 * sum(rank >= k for rank in ranks) / count for k in (1, 5)}
    return {"loss": sum(losses) / count, **errors}


@pytest.mark.parametrize("sizes", [[7], [8, 8, 3], [16, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 5, 6, 100])
def test_means_equal_a_plain_computation_image_by_image(sizes, num_classes):
    batches = draw(sizes, num_classes)
    computed, want = metrics_of(batches).compute(), image_by_image(batches)
    assert computed == pytest.approx(want, abs=1e-5)
    assert (computed["top1"], computed["top5"]) == (want["top1"], want["top5"])  # counts: exact


def test_without_images_there_is_no_error():
    assert Metrics(CPU).compute() == {"loss": 0, "top1": 0, "top5": 0}


def test_saved_sums_are_plain_values_and_continue_exactly():
    batches = draw([8, 8, 8, 3])
    first = metrics_of(batches[:2])
    state = first.state_dict()
    metrics_of(batches[2:], first)
    continued = Metrics(CPU)
    continued.load_state_dict(state)  # as it was before the last batches
    assert continued.count == 16
    metrics_of(batches[2:], continued)
    assert continued.state_dict() == first.state_dict() == metrics_of(batches).state_dict()
    assert all(type(value) is float for value in state["totals"]) and type(state["count"]) is int


def test_sums_over_processes_are_those_of_one_process_and_change_nothing():
    batches = draw([8, 8, 8, 3])
    parts = [metrics_of(batches[:1]), metrics_of(batches[1:]), Metrics(CPU)]
    before = [part.state_dict() for part in parts]
    total = sum(part._totals for part in parts)
    for part in parts:
        together = part.all_reduced(lambda totals: totals.copy_(total))
        assert together.compute() == pytest.approx(image_by_image(batches), abs=1e-5)
        assert together.count == 27
    assert [part.state_dict() for part in parts] == before


def test_confusions_are_counted_image_by_image_over_all_processes():
    batches = draw([8, 3, 1], num_classes=6)
    parts = [metrics_of(batches[:1], Metrics(CPU, 6)), metrics_of(batches[1:], Metrics(CPU, 6))]
    total = sum(part._sums for part in parts)
    counts = parts[0].all_reduced(lambda sums: sums.copy_(total)).confusion()
    wanted = torch.zeros(6, 6, dtype=torch.int64)
    for logits, targets in batches:
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
            wanted[target, row.index(max(row))] += 1
    assert torch.equal(counts, wanted) and not torch.equal(counts, wanted.T)
    parts[0].reset()
    assert parts[0].confusion().sum() == 0 and parts[1].confusion().sum() == 4
    # They change nothing else, and of very many classes there are none.
    assert parts[1].state_dict() == metrics_of(batches[1:]).state_dict()
    assert metrics_of(batches).confusion() is Metrics(CPU, MAX_CLASSES + 1).confusion() is None
    error = 100 - 100 * counts.diagonal().sum().item() / 12
    assert error == pytest.approx(metrics_of(batches).compute()["top1"])


def test_counting_confusions_does_not_read_the_device():
    meta = torch.device("meta")  # holds no values: reading one raises
    metrics = Metrics(meta, 10)
    with meta:
        metrics.add(torch.zeros(()), torch.zeros(8, 10), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(NotImplementedError):
        metrics.confusion()


def test_nan_logits_make_the_mean_loss_nan_and_still_count_each_image():
    batches = draw([4, 4])
    batches[0][0][:] = math.nan
    metrics = metrics_of(batches)
    assert math.isnan(metrics.compute()["loss"])
    assert metrics.count == 8
    assert all(0 <= metrics.compute()[name] <= 100 for name in ("top1", "top5"))


def test_the_sum_of_many_small_losses_keeps_every_digit():
    metrics = Metrics(CPU)
    for loss in (1e8, *[1.0] * 100):
        metrics.add(torch.tensor(loss), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    assert metrics.state_dict()["totals"][0] == 1e8 + 100  # float32 would have lost all hundred


def test_best_is_the_first_epoch_with_the_lowest_error_and_a_finite_loss():
    results, best = Results(), []
    steps = [(0.0, math.nan), (30.0, 1.0), (20.0, 1.0), (25.0, 1.0), (20.0, 1.0), (10.0, math.inf)]
    for number, (top1, loss) in enumerate(steps, start=1):
        results.add({"epoch": number, "val_loss": loss, "val_top1": top1, "val_top5": top1 / 2})
        best.append((results.best and results.best["epoch"], results.is_best))
    assert best == [(None, False), (2, True), (3, True), (3, False), (3, False), (3, False)]
    want = {"last_epoch": 6, "last_loss": math.inf, "last_top1": 10.0, "last_top5": 5.0}
    want |= {"best_epoch": 3, "best_loss": 1.0, "best_top1": 20.0, "best_top5": 10.0}
    assert results.flat() == want
