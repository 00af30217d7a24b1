"""Evaluate a trained network: its errors by class, its mistakes, and how sure it is of them."""
