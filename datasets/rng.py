"""Random numbers that depend on what they are for, not on what was drawn before."""

import hashlib

import torch


def generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with a key such as ("crop", seed, epoch).

    Equal keys give equal numbers, in any process and at any point of a run, so that any step can
    be replayed. The numbers of the CPU and of a GPU differ.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)


def permutation(size: int, *key: object, device: torch.device | str = "cpu") -> torch.Tensor:
    """The order of `size` things that belongs to a key."""
    return torch.randperm(size, generator=generator(*key, device=device), device=device)
