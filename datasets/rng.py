"""Seed random numbers by their purpose, so that they do not depend on earlier draws."""

import hashlib

import torch


def generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Seed a generator with a key such as ("crop", seed, epoch).

    Equal keys give equal numbers in any process and at any point of a run, so that any step can
    be replayed. A CPU and a GPU give different numbers.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)


def permutation(size: int, *key: object, device: torch.device | str = "cpu") -> torch.Tensor:
    """Permute `size` indices as the key determines."""
    return torch.randperm(size, generator=generator(*key, device=device), device=device)
