"""Named random streams: the random numbers of one child of the model never depend on those of another."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def named_stream(seed: int, name: str) -> Iterator[None]:
    """A context in which torch's CPU generator is seeded with (seed, name); afterwards its old state is restored.

    GPU generators are not changed: create weights and draw numbers on the CPU, then move them.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
    finally:
        torch.set_rng_state(before)


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded with `key`: independent of other keys, and of what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
