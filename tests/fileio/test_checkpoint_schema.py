"""Test that the state of a trainer is valid, and a state that cannot be continued is not."""

import copy
import math

import pytest
import torch

from fileio import checkpoint_schema
from helpers.hostile_files import real_state

RESULT = {"epoch": 3, "val_loss": 0.5, "val_top1": 10.0, "val_top5": 1.0}


def test_the_state_of_a_trainer_has_no_problem():
    assert checkpoint_schema.validate(real_state()) is None
    in_an_epoch = {"sums": {"totals": [1.0, 2.0, 3.0], "count": 8}, "best": RESULT, "last": RESULT}
    assert checkpoint_schema.validate(real_state() | in_an_epoch) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_a_result(value):
    """Allow it, though it is never the best, since training continued."""
    assert checkpoint_schema.validate(real_state() | {"last": RESULT | {"val_loss": value}}) is None


def test_a_loss_scaler_that_is_on_has_all_its_numbers():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(1))
    assert checkpoint_schema.validate(real_state() | {"scaler": scaler.state_dict()}) is None
    part = {key: value for key, value in scaler.state_dict().items() if key != "scale"}
    assert checkpoint_schema.validate(real_state() | {"scaler": part}) == "has an invalid scaler"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", {1: torch.zeros(1)}),
        ("momentum", {"w": [0.0]}),
        ("scaler", {"scale": 1.0}),
        ("rng", {"cuda": torch.zeros(16, dtype=torch.uint8)}),
        ("rng", {"cpu": torch.zeros(5056)}),
        ("rng", {"cpu": torch.zeros(5056, dtype=torch.uint8)}),
        ("epoch", True),
        ("epoch", 1.0),
        ("step", -1),
        ("global_step", 2**53),
        ("global_step", 10**400),
        ("device", None),
        ("threads", "1"),
        ("sums", {"totals": [1.0, 2.0], "count": 8}),
        ("sums", {"totals": [1.0, 2.0, "3"], "count": 8}),
        ("sums", {"totals": [1.0, 2.0, 3.0], "count": 0.5}),
        ("time_s", math.nan),
        ("time_s", -1.0),
        ("data_s", 1),
        ("best", {**RESULT, "epoch": 1.5}),
        ("best", RESULT | {"more": 1}),
        ("last", RESULT | {"val_top1": torch.zeros(1)}),
        ("settings", {"depth": {"a": 1}}),
        ("settings", {1: 2}),
        ("settings", {"depth": 10**400}),
        ("data", {"classes": [["a"]]}),
        ("data", {"classes": torch.zeros(1)}),
        ("overrides", [["deep"]]),
        ("overrides", "text"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_invalid_entry_is_named(name, value):
    assert checkpoint_schema.validate(real_state() | {name: value}) == f"has an invalid {name}"


def test_of_many_missing_entries_three_are_named():
    state = copy.copy(real_state())
    for name in ("best", "data", "epoch", "last", "model"):
        del state[name]
    assert checkpoint_schema.validate(state) == "lacks best, data, epoch and 2 more entries"
