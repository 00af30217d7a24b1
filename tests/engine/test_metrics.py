"""The sums behind every loss and error that is shown, against plain computations."""

import math

import pytest
import torch
import torch.nn.functional as F

from engine.metrics import Metrics

CPU = torch.device("cpu")


def batches(sizes: list[int], num_classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(size, num_classes), torch.randint(num_classes, (size,))) for size in sizes]


def metrics_of(
    drawn: list[tuple[torch.Tensor, torch.Tensor]], metrics: Metrics | None = None
) -> Metrics:
    metrics = metrics or Metrics(CPU)
    for logits, targets in drawn:
        metrics.add(F.cross_entropy(logits, targets), logits, targets)
    return metrics


def plain(drawn: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Image by image: its place among the sorted logits, and its loss."""
    losses, wrong1, wrong5 = [], [], []
    for logits, targets in drawn:
        for row, target in zip(logits.double(), targets.tolist(), strict=True):
            place = sorted(row.tolist(), reverse=True).index(row[target].item())
            losses.append(math.log(sum(math.exp(value - row[target]) for value in row.tolist())))
            wrong1.append(place >= 1)
            wrong5.append(place >= 5)
    count = len(losses)
    return {
        "loss": sum(losses) / count,
        "top1": 100 * sum(wrong1) / count,
        "top5": 100 * sum(wrong5) / count,
    }


@pytest.mark.parametrize("sizes", [[7], [5, 5], [8, 8, 3], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("num_classes", [2, 3, 5, 6, 100])
def test_means_equal_a_plain_computation_image_by_image(sizes, num_classes):
    drawn = batches(sizes, num_classes)
    computed, want = metrics_of(drawn).compute(), plain(drawn)
    assert computed == pytest.approx(want, abs=1e-5)
    assert (computed["top1"], computed["top5"]) == (want["top1"], want["top5"])  # counts: exact


def test_a_small_last_batch_weighs_what_it_holds():
    drawn = batches([16, 1], 10)
    one_by_one = [metrics_of([batch]).compute()["loss"] for batch in drawn]
    assert metrics_of(drawn).compute()["loss"] == pytest.approx(plain(drawn)["loss"], abs=1e-5)
    assert metrics_of(drawn).compute()["loss"] != pytest.approx(sum(one_by_one) / 2, abs=1e-2)


def test_every_class_is_among_the_top_5_of_fewer_classes():
    computed = metrics_of(batches([50], 4)).compute()
    assert computed["top5"] == 0
    assert computed["top1"] > 0


def test_one_class_has_no_error():
    assert metrics_of(batches([5], 1)).compute() == {"loss": 0, "top1": 0, "top5": 0}


def test_no_images_have_no_error_and_no_crash():
    assert Metrics(CPU).compute() == {"loss": 0, "top1": 0, "top5": 0}


def test_saved_sums_continue_exactly():
    drawn = batches([8, 8, 8, 3], 10)
    continued = Metrics(CPU)
    continued.load_state_dict(metrics_of(drawn[:2]).state_dict())
    metrics_of(drawn[2:], continued)
    assert continued.state_dict() == metrics_of(drawn).state_dict()
    assert continued.count == 27
    assert metrics_of(drawn[2:]).state_dict() != metrics_of(drawn).state_dict()


def test_saved_sums_are_plain_values_that_later_batches_leave_alone():
    metrics = metrics_of(batches([4], 10))
    state = metrics.state_dict()
    before = {"totals": list(state["totals"]), "count": state["count"]}
    metrics_of(batches([4], 10), metrics)
    assert state == before
    assert all(type(value) is float for value in state["totals"])


def test_sums_over_replicas_are_those_of_one_process_and_change_nothing():
    drawn = batches([8, 8, 8, 3], 10)
    parts = [metrics_of(drawn[:1]), metrics_of(drawn[1:3]), metrics_of(drawn[3:]), Metrics(CPU)]
    before = [part.state_dict() for part in parts]

    def all_reduce_(totals: torch.Tensor) -> None:
        totals.copy_(sum(part._totals for part in parts))

    for part in parts:
        together = part.all_reduced(all_reduce_)
        assert together.compute() == pytest.approx(plain(drawn), abs=1e-5)
        assert together.count == 27
        assert part.compute() != pytest.approx(plain(drawn), abs=1e-2)
    assert [part.state_dict() for part in parts] == before


def test_nan_logits_make_the_mean_loss_nan_and_still_count_each_image():
    drawn = batches([4, 4], 10)
    drawn[0][0][:] = math.nan
    metrics = metrics_of(drawn)
    assert math.isnan(metrics.compute()["loss"])
    assert metrics.count == 8
    assert all(0 <= metrics.compute()[name] <= 100 for name in ("top1", "top5"))


def test_the_sum_of_many_small_losses_keeps_every_digit():
    metrics = Metrics(CPU)
    logits, targets = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    metrics.add(torch.tensor(1e8), logits, targets)
    for _ in range(100):
        metrics.add(torch.tensor(1.0), logits, targets)
    assert metrics.state_dict()["totals"][0] == 1e8 + 100  # float32 would have lost all hundred
    assert torch.tensor(1e8) + 1 == torch.tensor(1e8)
