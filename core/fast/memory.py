"""Keeps the C library from handing memory back to the system between the steps of one forward."""

import torch


def keep_temporaries() -> None:
    """Lets freed blocks of up to 16 MB be reused; otherwise page faults take a tenth of a large forward on CPU.

    glibc returns freed blocks above a threshold to the system, and sets the threshold by the largest block freed so
    far, up to 32 MB (mallopt(3), M_MMAP_THRESHOLD). So free one, without touching it.
    """
    torch.empty(2**24, dtype=torch.uint8)
