"""Keeps the C library from returning memory to the system between the steps of one forward."""

import torch


def keep_temporaries() -> None:
    """Lets freed blocks of up to 16 MB be reused; otherwise page faults take a tenth of a large forward on CPU.

    glibc returns freed blocks above a threshold to the system. The threshold is the size of the largest block freed so
    far, up to 32 MB (mallopt(3), M_MMAP_THRESHOLD). So this function allocates and frees 16 MB, without touching them.
    """
    torch.empty(2**24, dtype=torch.uint8)
