"""Large uninitialised tensors whose memory is cheap to touch for the first time."""

import mmap

import torch
from torch import Tensor

_LARGE = 2**22  # bytes: a few huge pages


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and device of `like`.

    On Linux a large CPU tensor gets huge pages of its own: AnyUp writes each of its image-sized buffers only a few
    times, and with ordinary pages, handed back to the system after every forward, a tenth of the time goes into
    page faults.
    """
    size = torch.Size(shape).numel() * like.element_size()
    if like.device.type != "cpu" or size < _LARGE or torch.compiler.is_compiling() or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _keep_temporaries() -> None:
    """Lets the C library keep freed blocks of up to 32 MB for reuse instead of returning them to the system.

    glibc sets its threshold by the largest block freed so far (mallopt(3), M_MMAP_THRESHOLD): free one.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


_keep_temporaries()
