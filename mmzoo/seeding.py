"""Seeds for a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch, numpy and random inside the block; the caller's generators go on undisturbed.

    Args:
        seed: The seed.

    Example:
        >>> import torch
        >>> with seeded(1):
        ...     first = torch.rand(2)
        >>> with seeded(1):
        ...     bool((torch.rand(2) == first).all())
        True
    """
    # Pyro's own state lacks the accelerators; torch keeps one for each device.
    state = pyro.util.get_rng_state()
    with torch.random.fork_rng():
        pyro.set_rng_seed(seed)
        try:
            yield
        finally:
            pyro.util.set_rng_state(state)
