"""Test peer_monitor.py: the failure that one process reports is raised by the others."""

import json

import pytest

import errors
from distributed import peer_monitor

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_raises_an_error_of_the_same_kind(kind):
    error = peer_monitor._parse_failure(json.dumps([kind.__name__, "x is y", "do z", {}]).encode())
    assert type(error) is kind and error.code == kind("x is y", "do z").code


def test_an_unknown_failure_is_an_error_all_the_same():
    record = json.dumps(["ZeroDivisionError", "x is y", "do z", {}]).encode()
    assert type(peer_monitor._parse_failure(record)) is errors.RunError
