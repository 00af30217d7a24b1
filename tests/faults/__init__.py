"""Test faults that a run must survive or refuse, by their rows in docs/faults.md."""
