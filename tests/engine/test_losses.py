"""Test the losses: against plain restatements, for one classifier and for several."""

import math

import pytest
import torch
import torch.nn.functional as F

import models.factory
import opts
from engine.losses import LOSSES, mean_loss, network_logits, squared_hinge
from engine.precision import autocast
from experiment.log import RunLog
from train import Trainer


def restated_hinge(logits: list[list[float]], targets: list[int]) -> float:
    losses = [
        sum(max(0.0, 1 - (z if c == target else -z)) ** 2 for c, z in enumerate(row))
        for row, target in zip(logits, targets, strict=True)
    ]
    return sum(losses) / len(losses)


def test_the_squared_hinge_and_its_gradient_are_the_restated_ones():
    logits = (2 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([0, 4, 2, 2])
    loss = squared_hinge(logits, targets)
    rows = logits.tolist()
    assert loss.item() == pytest.approx(restated_hinge(rows, targets.tolist()), rel=1e-14)
    assert abs(loss.item() - restated_hinge(rows, [1, 4, 2, 2])) > 1e-3
    assert squared_hinge(2 * F.one_hot(targets, 5) - 1.0, targets) == 0  # at the margin
    loss.backward()
    for row, k in ((0, 0), (1, 3), (3, 2)):
        move = torch.zeros(4, 5, dtype=torch.float64)
        move[row, k] = 1e-6
        ends = [restated_hinge((logits + m).tolist(), targets.tolist()) for m in (move, -move)]
        assert logits.grad[row, k].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_several_classifiers_is_the_weighted_sum(name):
    heads = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    targets, loss = torch.tensor([3, 0, 1]), LOSSES[name]
    outputs = [(heads[0], 1), (heads[1], 0.3), (heads[2], torch.tensor(0.3).double())]
    own = [loss(head, targets).item() for head in heads]
    want = own[0] + 0.3 * (own[1] + own[2])
    assert mean_loss(loss, outputs, targets).item() == pytest.approx(want, rel=1e-7)
    assert network_logits(outputs) is network_logits(heads[0]) is heads[0]
    assert abs(want - sum(own)) > 0.1


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("precision", "low"), [("half", torch.float16), ("bf16", torch.bfloat16)])
def test_losses_of_low_precision_are_computed_in_single(name, precision, low):
    logits, targets = torch.tensor([[300.0, -300.0, 1.0]]).to(low), torch.tensor([1])
    with autocast(torch.device("cpu"), precision):
        loss = LOSSES[name](logits, targets)
    assert loss.dtype == torch.float32  # 2 * 301^2 is infinite in float16
    want = {"crossEntropy": 600.0, "squaredHinge": 2 * 301.0**2 + 4}[name]
    assert loss.item() == pytest.approx(want, rel=1e-6)


def trainer(*flags: str) -> Trainer:
    words = ["--dataset=synthetic", "--imageSize=8", "--nImages=8", "--nGPU=0", *flags]
    opt = opts.parse(words)
    return Trainer(opt, models.factory.create(opt, 3), torch.device("cpu"), RunLog(None))


def test_dsn_weighs_its_companions_less_from_epoch_to_epoch():
    flags = ["--netType=dsn", "--widen=0.1", "--dropRate=0", "--auxWeight=0.3", "--nEpochs=4"]
    net = trainer(*flags)
    images, targets = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 2, 0])
    for epoch in (1, 3, 4):
        net.epoch, net.step = epoch, 0
        net._advance_step(1)
        outputs = net.model.train()(images)
        rows = [logits.detach().double().tolist() for logits, _ in outputs]
        own, *companions = (restated_hinge(row, targets.tolist()) for row in rows)
        want = own + 0.3 * (1 - (epoch - 1) / 4) * sum(companions)
        got = mean_loss(net.loss, outputs, targets).item()
        assert got == pytest.approx(want, rel=1e-5) and not math.isclose(got, own, rel_tol=1e-3)
    assert torch.equal(net.model.eval()(images), net.model.classify(net.model.features(images)))
