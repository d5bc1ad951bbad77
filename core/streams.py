"""Named random streams: what one child of the model draws never depends on what another one drew."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def named_stream(seed: int, name: str) -> Iterator[None]:
    """Within the block torch's CPU generator is the stream (seed, name); afterwards it is as it was before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
