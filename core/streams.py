"""Named random streams: what one child of the model draws never depends on what another one drew."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def named_stream(seed: int, name: str) -> Iterator[None]:
    """Within the block torch's CPU generator is the stream (seed, name); afterwards it is as it was before.

    Generators of GPUs are left alone: make weights and draw numbers on the CPU, then move them.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
    finally:
        torch.set_rng_state(before)


def generator(*key: object) -> torch.Generator:
    """The random numbers of that name, on the CPU: independent of all others, and of what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
